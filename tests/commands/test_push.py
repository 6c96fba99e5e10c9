"""`jlora export --card` and `--push`: what the card says, what is uploaded, and what a hub may refuse."""

import json

import pytest
import yaml
from command_line import one_sentence
from hub_server import TOKEN, hub_server, pushed
from tiny import copy_folder, write_config

from jlora.hf.license import license_of


@pytest.fixture
def hub():
    with hub_server() as (hub, url):
        yield hub, url


def front_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_card_of_an_adapter(world, here, tmp_path):
    run = copy_folder(world / "run", tmp_path / "run")
    base = copy_folder(world / "base", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert license_of(base) == "apache-2.0" and license_of(world / "base") is None
    export = ("export", "--adapter", run, "--base", base, "--out", tmp_path / "out", "--card")
    code, out, err = here(*export)
    assert code == 0 and f"card: {tmp_path / 'out' / 'README.md'}" in out
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_of(text) == {
        "pipeline_tag": "text-generation",
        "tags": ["lora", "jlora"],
        "library_name": "peft",
        "license": "apache-2.0",
    }
    summary = json.loads((world / "run" / "summary.json").read_text())
    for told in (
        f"| before training | {summary['eval_loss_before']:.4f} |",
        f"| after 4 steps | {summary['eval_loss']:.4f} |",
        "24 trained on, 6 held out",
        f"`{summary['hashes']['data']}`",
        "| lora.rank | 4 |",
        f"jax {summary['versions']['jax']}",
        "vllm serve BASE --enable-lora --max-lora-rank 4 --lora-modules",
        "Stanford Alpaca's",
    ):
        assert told in text, told
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    assert (
        not any(row["instruction"] in text for row in rows) and str(tmp_path) not in text and "## Samples" not in text
    )


def test_card_shows_rows_that_were_asked_for(world, here, tmp_path):
    arguments = ("export", "--adapter", world / "run", "--out", tmp_path / "out", "--card", "--samples", "1", "-q")
    assert here(*arguments)[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Samples" in text and "### 1" in text and "### 2" not in text and "    Below is an instruction" in text


def test_adapter_is_pushed(world, hub, tmp_path):
    kept, url = hub
    done = pushed(
        url, "--adapter", world / "run", "--out", tmp_path / "out", "--push", "me/mine", "--private", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"].endswith("/me/mine") and TOKEN not in done.stdout + done.stderr
    there = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert kept.files == {"me/mine": there} and kept.private == {"me/mine": True}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json"} <= there.keys()
    assert kept.commits == [("me/mine", "Add step 4 of a jlora run")]
    assert b'PeftModel.from_pretrained(base, "me/mine")' in there["README.md"]
    # Once more, into the repository that is there, which is now private.
    again = pushed(url, "--adapter", world / "run", "--out", tmp_path / "two", "--push", "me/mine", "--private", "-q")
    assert again.returncode == 0 and len(kept.commits) == 2


@pytest.mark.long
def test_merged_weights_are_pushed(world, hub, tmp_path):
    kept, url = hub
    merged = ("--merge", "--out", tmp_path / "merged", "--push", "me/merged", "-q")
    done = pushed(url, "--adapter", world / "run", *merged)
    assert done.returncode == 0, done.stderr
    assert front_of(kept.files["me/merged"]["README.md"].decode())["library_name"] == "transformers"
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= kept.files["me/merged"].keys()
    assert kept.private == {"me/merged": False}


@pytest.mark.long
def test_what_the_hub_refuses(world, hub, tmp_path):
    kept, url = hub
    export = ("--adapter", world / "run", "--out", tmp_path / "out", "--push")
    done = pushed(url, *export, "me/mine", token="hf_wrong")
    assert done.returncode == 2 and "log in with `hf auth login`" in one_sentence(done.stderr)
    assert not (tmp_path / "out").exists() and "hf_wrong" not in done.stderr
    done = pushed(url, *export, "mine")
    assert done.returncode == 2 and "OWNER/NAME" in one_sentence(done.stderr) and not (tmp_path / "out").exists()
    done = pushed("http://127.0.0.1:9", *export, "me/mine")
    assert done.returncode == 2 and "the hub did not take it" in one_sentence(done.stderr)
    kept.files["me/mine"], kept.private["me/mine"] = {}, False
    done = pushed(url, *export, "me/mine", "--private")
    assert done.returncode == 2 and "is there already and is public" in one_sentence(done.stderr)
    assert kept.commits == [] and (tmp_path / "out" / "adapter_config.json").is_file()
    kept.fails["/api/models/me/mine/commit"] = 403
    done = pushed(url, "--adapter", world / "run", "--out", tmp_path / "two", "--push", "me/mine")
    assert done.returncode == 2 and f"hf upload me/mine {tmp_path / 'two'}" in one_sentence(done.stderr)
    assert TOKEN not in done.stderr


@pytest.mark.long
def test_rank_is_that_of_the_file(world, here, tmp_path):
    """An adapter that took its start out of the base's weights is written with twice the rank."""
    run = tmp_path / "run"
    write_config(
        tmp_path / "c.yaml", world / "base", world / "rows.jsonl", run, lora={"init_lora_weights": "pissa_niter_4"}
    )
    assert here("train", "--config", tmp_path / "c.yaml", "-q")[0] == 0
    assert here("export", "--adapter", run, "--out", tmp_path / "out", "--card", "-q")[0] == 0
    assert "--max-lora-rank 8 " in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "o", "--private"], "--private is of --push"),
        (["--out", "o", "--samples", "2"], "add --card"),
        (["--gguf-adapter", "a.gguf", "--card"], "leave them out with --gguf-adapter"),
        (["--out", "o", "--push", "mine"], "OWNER/NAME"),
    ],
)
def test_usage(world, here, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = here("export", "--adapter", world / "run", *arguments)
    assert code == 2 and says in one_sentence(err) and list(tmp_path.iterdir()) == []
