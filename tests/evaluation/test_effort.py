"""The effort report: the same rows for every strategy, train's own runs, nothing done twice, a page that says so."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
import torch
from report_pages import Page
from tiny import make_completions, make_llama, make_tokenizer, write_config
from transformers import AutoModelForCausalLM

from jlora import effort as command_line
from jlora.config import DataSection, load_config
from jlora.data.tokens import load_tokenizer
from jlora.errors import NonFiniteError
from jlora.evaluation import effort, strategies
from jlora.evaluation.strategies import Strategy, ask, choose
from jlora.reports import effort as effort_page
from jlora.runtime import xla

HOSTILE = "</pre><script>alert(1)</script><b>\"'&\x00\x1b\u202e\u2066"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, rows and a config that hold a quarter of them out."""
    folder = tmp_path_factory.mktemp("effort")
    make_llama(folder / "base", num_hidden_layers=1)
    make_tokenizer(folder / "base")
    make_completions(folder / "rows.jsonl", 16)
    write_config(
        folder / "config.yaml",
        folder / "base",
        folder / "rows.jsonl",
        folder / "out",
        data={"eval": 0.25, "format": "completion", "max_length": 96},
        training={"max_steps": 2},
    )
    return folder


@pytest.fixture
def here(monkeypatch, capfd):
    """The command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(xla, "use_huge_pages", lambda: None)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["jlora.effort", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            command_line.main()
        return (exit.value.code or 0, *capfd.readouterr())

    return run


def command(world, *more):
    return ("--config", world / "config.yaml", "--max-new-tokens", 4, "--shots", 2, "--batch-size", 4, "-q", *more)


@pytest.fixture(scope="module")
def done(world):
    """A whole report; of 1000 rows there are twelve."""
    cfg = load_config(world / "config.yaml")
    options = effort.Options([cfg.model.path], [1000], [2], 100, 4, 4, None)
    result, failures, stopped = effort.effort(cfg, options, quiet=True)
    assert not failures and not stopped
    return result


def loss_by_transformers(world, rows, shots):
    """Mean loss of the rows' outputs and EOS, after the shots' texts."""
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    tokenizer = load_tokenizer(world / "base", None)
    losses = []
    before = "".join(shot["prompt"] + shot["completion"] + "\n\n" for shot in shots)
    for row in rows:
        prompt = [1, *tokenizer.encode(before + row["prompt"])]
        ids = torch.tensor([[*prompt, *tokenizer.encode(row["completion"]), 2]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none").tolist()
    return np.mean(losses)


def test_every_strategy_answers_the_same_held_out_rows(world, done):
    out = world / "out"
    records = done["results"]
    assert [r["strategy"] for r in records] == ["bare", "shots-2", "rows-12"]
    assert json.loads((out / "effort.json").read_text())["results"][0]["identity"] == records[0]["identity"]
    files = {p.stem: p.read_text().splitlines() for p in (out / "data").iterdir()}
    assert {name: len(lines) for name, lines in files.items()} == {"heldout": 4, "rows-12": 12}
    assert not {*files["heldout"]} & {*files["rows-12"]}
    rows = {name: [json.loads(line) for line in lines] for name, lines in files.items()}
    for record in records:
        assert [a["reference"] for a in record["answers"]] == [row["completion"] for row in rows["heldout"]]
        assert record["tokens"] == sum(len(row["completion"]) + 1 for row in rows["heldout"])
        assert record["generated"] == 4 and record["seconds"] > 0 and record["cost"] is None
    # Losses, and how long the prompts are.
    bare, shots, *tuned = records
    assert bare["loss"] == pytest.approx(loss_by_transformers(world, rows["heldout"], []), abs=1e-4)
    assert shots["loss"] == pytest.approx(loss_by_transformers(world, rows["heldout"], rows["rows-12"][:2]), abs=1e-4)
    assert shots["mean_shots"] == 2 and shots["prompt_tokens"] > 3 * bare["prompt_tokens"]
    for record in tuned:
        assert record["prompt_tokens"] == bare["prompt_tokens"] and record["loss"] < bare["loss"]
        summary = json.loads((Path(record["training"]["run"]) / "summary.json").read_text())
        assert record["loss"] == pytest.approx(summary["eval_loss"], abs=1e-5)
        assert record["training"]["tokens"] == summary["tokens"]["total"]
        assert record["training"]["seconds"] == summary["wall_seconds"] and summary["rows"]["used"] == record["rows"]


def test_what_is_done_is_not_done_again(world, done, here, monkeypatch):
    judged, trained = [], []

    def judge(model, way, *rest):
        judged.append(way.key)
        return effort_judge(model, way, *rest)

    effort_judge = effort.judge
    monkeypatch.setattr(effort, "judge", judge)
    monkeypatch.setattr(effort, "train", lambda cfg, quiet, shared: trained.append(cfg.output_dir))
    code, out, err = here(*command(world, "--rows", "1000", "--price", 2, "--json"))
    assert (code, err, judged, trained) == (0, "", [], [])
    again = json.loads(out)
    for now, before in zip(again["results"], done["results"], strict=True):
        assert now | {"cost": None} == before
        seconds = now["training"]["seconds"] if now["training"] else 0.0
        assert now["cost"]["training"] == pytest.approx(seconds * 2 / 3600 * jax.device_count())
        assert now["cost"]["thousand_answers"] == pytest.approx(now["seconds"] / 4 * 1000 * 2 / 3600)
    # One more strategy is one more; another base, seed or length is other work.
    code, out, _ = here(*command(world, "--rows", "1000", "--shots", "2,1", "--json"))
    assert code == 0 and judged == ["shots-1"] and trained == []
    assert [r["strategy"] for r in json.loads(out)["results"]] == ["bare", "shots-1", "shots-2", "rows-12"]

    shown = Page((world / "out" / "effort.html").read_text(encoding="utf-8"))
    assert shown.problems == []
    for record in done["results"]:
        assert record["name"] in shown.text and f"{record['loss']:.4f}" in shown.text
    assert len(shown.charts()) == 4
    assert [tag for tag, _ in shown.tags].count("circle") == 4 * len(again["results"]) + 4  # each in every chart
    picture = (world / "out" / "effort.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_a_stopped_and_a_failed_fine_tuning(world, here, tmp_path, monkeypatch):
    monkeypatch.setattr(effort, "judge", lambda *_: pytest.fail("nothing is there to judge"))
    summary = {"status": "preempted", "steps": 1, "epochs": 0.1, "trainable_params": 5}
    summary["tokens"] = {"total": 7}
    took = iter((60.0, 120.0))  # a summary counts the seconds of earlier starts itself
    monkeypatch.setattr(effort, "train", lambda *_: summary | {"wall_seconds": next(took)})
    where = f"output_dir={tmp_path}/out"
    assert here(*command(world, "--rows", 3, where))[0] == 75
    assert here(*command(world, "--rows", 3, where))[0] == 75
    (record,) = json.loads((tmp_path / "out" / "effort.json").read_text())["results"]
    assert record["training"]["seconds"] == 120.0 and not record["training"]["finished"]

    def fail(cfg, quiet, shared):
        raise NonFiniteError("the loss is not finite")

    judged = []
    monkeypatch.setattr(effort, "train", fail)
    monkeypatch.setattr(effort, "judge", lambda model, way, *_: judged.append(way.key) or figures())
    code, _, err = here(*command(world, "--rows", 3, where))
    assert (code, judged) == (6, ["bare", "shots-2"]) and "the loss is not finite" in err
    shown = Page((tmp_path / "out" / "effort.html").read_text(encoding="utf-8"))
    assert "3 rows" not in shown.text and "2 examples in the prompt" in shown.text


def figures():
    """What a judge would find."""
    answer = {"text": HOSTILE, "tokens": 1, "ended": True, "prompt": HOSTILE, "reference": HOSTILE}
    answer |= {"exact_match": 0.0, "rouge_l": 0.1, "chrf": 1.0}
    found = {"loss": 1.0, "perplexity": 2.7, "token_accuracy": 0.5, "tokens": 9, "rouge_l": 0.0, "chrf": 1.0}
    found |= {"exact_match": 0.0, "generated": 1, "mean_tokens": 1.0, "seconds": 1.0, "prompt_tokens": 9.0}
    return found | {"answers": [answer]}


def test_every_instruction_is_among_the_answers_shown():
    moods = ["bad"] * 7 + ["good", "mixed", "bad"]
    prompts = [f"Write a {mood} review.\n\nProduct {number}" for number, mood in enumerate(moods)]
    assert effort_page.shown(prompts) == [0, 1, 2, 7, 8]
    assert effort_page.shown(["a", "b"]) == [0, 1] and effort_page.shown([]) == []


def test_several_bases_with_hostile_names(tmp_path):
    settings = {"heldout_rows": 1, "training_rows": 9, "left_out": 2, "train": HOSTILE, "seed": 0, "batch_size": 1}
    settings |= {"max_new_tokens": 4, "device": HOSTILE, "devices": 1, "price": 2.0}
    training = {"seconds": 90.0, "tokens": 1234}
    results = [
        {"base": base, "name": way.name, "short": way.short, "shots": way.shots, "rows": way.rows}
        | figures()
        | {"training": training if way.rows else None, "cost": {"training": 0.05, "thousand_answers": 0.5}}
        for base in ("a/x$_{</script>$", HOSTILE)
        for way in choose([1, 2], [10], 10)
    ]
    effort_page.write_effort(tmp_path, settings, results)
    page = (tmp_path / "effort.html").read_text(encoding="utf-8")
    shown = Page(page)
    assert shown.problems == [] and "alert(1)" in shown.text and "1,234" in shown.text and "1.5" in shown.text
    assert not {tag for tag, _ in shown.tags} & {"script", "b", "link", "img"} and "\x00" not in page
    assert not re.search("https?:|[\x1b\u202a-\u202e\u2066-\u2069]", page)
    assert all(not name.startswith("on") for _, attrs in shown.tags for name in attrs)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.eval=null"], "set data.eval to a file or a fraction"),
        (["data.format=text"], "no prompt with one answer"),
        (["method=full"], "set method=lora"),
        (["--rows", "0,10"], "argument --rows: invalid numbers value"),
        (["--heldout", "0"], "must be at least 1"),
        (["--price", "-1"], "--price must be finite"),
    ],
)
def test_bad_usage(world, here, tmp_path, overrides, words):
    code, out, err = here(*command(world, f"output_dir={tmp_path}/out", *overrides))
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "effort.json").exists()


def test_missing_libraries_are_named(world, here, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    code, _, err = here(*command(world))
    assert code == 2 and "the effort report needs matplotlib" in err and "jlora[plot]" in err


def test_damaged_results_are_refused(world, here, tmp_path):
    (tmp_path / "effort.json").write_text("[]")
    code, _, err = here(*command(world, f"output_dir={tmp_path}"))
    assert code == 2 and "effort.json: not written by this command" in err


def test_strategies_by_name():
    assert [way.key for way in choose([3, 1], [1000, 10, 30], 25)] == [
        "bare",
        "shots-1",
        "shots-3",
        "rows-10",
        "rows-25",
    ]
    assert Strategy(rows=1000).name == "trained on 1,000 rows" and Strategy().short == "bare"


def test_examples_in_a_chat_and_in_little_room(world):
    tokenizer = load_tokenizer(world / "base", "llama2")
    rows = [{"messages": [{"role": "system", "content": "S"}, *turns("q0", "a0", "q9", "a9")]}]
    shots = [{"messages": turns(f"q{i}", f"a{i}")} for i in (1, 2)]
    section = DataSection(train="-", format="messages", max_length=512)
    asked = ask(rows, shots, section, tokenizer, None)
    (question,), (example,) = asked.questions, asked.dataset.examples
    assert (question.shown, question.reference) == ("system: S\n\nuser: q0", "a0")
    said = bytes_of(question.ids)
    assert said == "[INST] <<SYS>>\nS\n<</SYS>>\n\nq1 [/INST] a1 [INST] q2 [/INST] a2 [INST] q0 [/INST]"
    # Of the loss the row's own turns count, and the examples' do not.
    assert bytes_of(example.ids[example.trained]) == " a0  a9 "
    bare = ask(rows, [], section, tokenizer, None)
    assert bare.dataset.examples[0].trained.sum() == example.trained.sum() and bare.until == asked.until == ()
    # Where the answer is cut bare, it is cut at the same token behind examples.
    short = section.model_copy(update={"max_length": len(bare.questions[0].ids) + 3})
    (cut,) = ask(rows, shots, short, tokenizer, None).dataset.examples
    assert bytes_of(cut.ids[cut.trained]) == " a0"
    # Examples for which there is no room are left out.
    assert ask(rows, shots, section, tokenizer, len(question.ids) - 1).shots == 1
    assert ask(rows, shots, section, tokenizer, 1).shots == 0


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def bytes_of(ids):
    """The text of byte-level ids, special tokens left out."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    text = "".join(alphabet[i - 3] for i in ids if i >= 3)
    return text.replace("Ġ", " ").replace("Ċ", "\n")


def test_rows_that_all_bases_can_use_and_none_twice(world, tmp_path):
    lines = (world / "rows.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, lines[0], '{"prompt": "a"}']) + "\n")
    (tmp_path / "eval.jsonl").write_text("\n".join(lines[:3]) + "\n")
    cfg = load_config(
        world / "config.yaml",
        [f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/eval.jsonl", "data.on_bad_row=skip"],
    )
    tokenizer = load_tokenizer(world / "base", None)

    def longer(texts):
        return [tokenizer.encode(text) * (9 if "mountain" in text else 1) for text in texts]

    backend = Mock(type(tokenizer.backend), encode=lambda text: longer([text])[0], encode_all=longer, added={})
    other = replace(tokenizer, backend=backend)
    rows = strategies.split_rows(cfg, [tokenizer, other], 2)
    left = [row for row in rows.train if "mountain" in row["prompt"]]
    assert not left and len(rows.heldout) == 2 and rows.left_out >= 2
    assert not {json.dumps(row) for row in rows.train} & {json.dumps(row) for row in rows.heldout}
    # Fewer rows are the first of more, and the order is the seed's.
    files = effort.write_rows(tmp_path / "data", rows, choose([], [2, 5], 100))
    assert files["rows-5"].read_text().startswith(files["rows-2"].read_text())
    other_seed = load_config(world / "config.yaml", ["training.seed=1"])
    default = load_config(world / "config.yaml")
    drawn = [strategies.split_rows(c, [tokenizer], 9) for c in (default, default, other_seed)]
    assert drawn[0] == drawn[1] != drawn[2]
