"""A run folder from others, and what lies beside it: jlora writes and deletes what is its own, and nothing else."""

import errno
import importlib
import os
import shutil
import sys

import pytest
from safetensors.numpy import load_file
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora import verify
from jlora.config import load_config
from jlora.errors import ModelError
from jlora.report import write_report
from jlora.train import train

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a config and the finished run of it, `run`; to be copied."""
    folder = tmp_path_factory.mktemp("world")
    make_llama(folder / "base", hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder / "base")
    rows = make_completions(folder / "rows.jsonl", 8)
    data, training = {"format": "completion", "max_length": 32}, {"max_steps": 2, "save_every": 1}
    config = write_config(folder / "c.yaml", folder / "base", rows, folder / "run", data=data, training=training)
    train(load_config(config), quiet=True)
    return folder


@pytest.fixture
def run_dir(world, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(world / "run", tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capfd):
    """A command in this process: (exit code, stderr)."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"jlora.{name}", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"jlora.{name}").main()
        return ended.value.code, capfd.readouterr().err

    return run


def config_of(world, run_dir):
    return load_config(world / "c.yaml", [f"output_dir={run_dir}"])


def snapshot(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def earlier(path):
    """A folder that the user keeps."""
    path.mkdir()
    (path / "mine").write_text("precious", encoding="utf-8")


@pytest.mark.parametrize("more", [[], ["--merge"]], ids=["adapter", "merged"])
def test_an_export_leaves_what_lies_beside_it(run_dir, tmp_path, command, more):
    (tmp_path / "m").mkdir()
    for name in ("m.old", "m.partial"):
        earlier(tmp_path / name)
    code, err = command("export", "--run", run_dir, "--out", tmp_path / "m", "-q", *more)
    assert code == 0, err
    for name in ("m.old", "m.partial"):
        assert (tmp_path / name / "mine").read_text(encoding="utf-8") == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.old", "m.partial", "run"]
    assert any((tmp_path / "m").glob("*.safetensors"))


def test_two_exports_into_one_folder(run_dir, tmp_path, command, monkeypatch):
    """The first to be done has it; the other is refused, and takes with it what it wrote."""
    equal = verify.require_equal

    def other_is_faster(*args, **kwargs):
        if not (tmp_path / "m").exists():
            earlier(tmp_path / "m")
        return equal(*args, **kwargs)

    monkeypatch.setattr(verify, "require_equal", other_is_faster)
    code, err = command("export", "--run", run_dir, "--out", tmp_path / "m", "--merge", "-q")
    assert code == 2 and err.startswith(f"error: {tmp_path}/m: something is there by now") and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "run"]


def test_an_export_on_a_full_disk_leaves_nothing(run_dir, tmp_path, command, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("jlora.hf.peft.serialize", full)
    code, err = command("export", "--run", run_dir, "--out", tmp_path / "m", "-q")
    assert code == 2 and err.startswith(f"error: {tmp_path}/m: No space left on device; make room"), err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def unfinished(run_dir):
    """As if the run had died before it wrote its summary."""
    path = run_dir / "summary.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"finished"', '"failed"'), encoding="utf-8")


def test_an_adapter_written_anew_leaves_the_users_copies(world, run_dir, capsys):
    for name in ("adapter.old", "adapter.partial", "adapter.mine"):
        shutil.copytree(run_dir / "adapter", run_dir / name)
        (run_dir / name / "NOTES").write_text("mine", encoding="utf-8")
    (run_dir / "adapter" / "CARD.md").write_text("mine, too", encoding="utf-8")
    before = snapshot(run_dir)
    unfinished(run_dir)
    assert train(config_of(world, run_dir), quiet=True)["status"] == "finished"
    after = snapshot(run_dir)
    [kept] = run_dir.glob("adapter.before-*")
    assert (kept / "CARD.md").read_text(encoding="utf-8") == "mine, too" and str(kept) in capsys.readouterr().err
    for name in before:
        if "/adapter." in name:
            assert after[name] == before[name]
    assert sorted(path.name for path in (run_dir / "adapter").iterdir()) == ["adapter_config.json", WEIGHTS]
    unfinished(run_dir)
    train(config_of(world, run_dir), quiet=True)  # of what jlora alone wrote nothing is kept
    assert list(run_dir.glob("adapter.before-*")) == [kept]


def test_an_adapter_that_fails_its_proof_leaves_the_one_before(world, run_dir, monkeypatch):
    unfinished(run_dir)
    before = load_file(run_dir / "adapter" / WEIGHTS)

    def wrong(*_, **__):
        raise ModelError("logits differ")

    monkeypatch.setattr(verify, "require_equal", wrong)
    with pytest.raises(ModelError):
        train(config_of(world, run_dir), quiet=True)
    assert load_file(run_dir / "adapter" / WEIGHTS).keys() == before.keys()
    assert not list(run_dir.glob(".adapter*"))


def test_a_page_replaces_a_page_and_nothing_else(run_dir, tmp_path, command):
    out = tmp_path / "page.html"
    for _ in range(2):
        write_report(run_dir, out)
    (tmp_path / "notes.html").write_text("<!DOCTYPE html>\n<p>mine</p>", encoding="utf-8")
    code, err = command("report", run_dir, "--out", tmp_path / "notes.html")
    assert code == 2 and "is no page that jlora wrote; name another file" in err
    assert (tmp_path / "notes.html").read_text(encoding="utf-8") == "<!DOCTYPE html>\n<p>mine</p>"
    (tmp_path / "link.html").symlink_to(out)
    code, err = command("report", run_dir, "--out", tmp_path / "link.html")
    assert code == 2 and "link.html: cannot be written (is there and is no regular file)" in err
