"""Judging: token accuracy against transformers, answers in batches, their scores, the page of several models."""

import importlib.util
import json
import math
import re
import sys

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from report_pages import Page
from tiny import make_completions, make_llama, make_tokenizer

from jlora.config import Counted, DataSection
from jlora.data.prompts import encode_prompt, encode_row, reference_answer, shown_prompt
from jlora.data.rows import BadRow
from jlora.data.speakers import Turn
from jlora.errors import ConfigError, DataError
from jlora.evaluation import scores
from jlora.hf.adapters import open_adapter
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.inference import answers
from jlora.inference.model import Adapted
from jlora.model.sharding import one_device_mesh
from jlora.reports import answers as answers_page
from jlora.reports import page

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror='x()'>\"'&amp;\x00\x1b[31m\ud800 \u202e</style>"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with two PEFT adapters, `one` and `two`, and rows."""
    folder = tmp_path_factory.mktemp("judge")
    for seed, name in enumerate(("one", "two")):
        model = make_llama(folder / "base", num_hidden_layers=2)
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(folder / name)
    make_tokenizer(folder / "base")
    make_completions(folder / "rows.jsonl", 7)
    return folder


@pytest.fixture(scope="module")
def pretrained(world):
    mesh = one_device_mesh()
    with jax.set_mesh(mesh):
        return load_pretrained(open_pretrained(str(world / "base"), None, None), np.dtype("float32"), mesh)


@pytest.fixture
def evaluate(monkeypatch, capfd):
    """`python -m jlora.evaluate` in this process: (exit code, stdout, stderr)."""
    from jlora.evaluate import main

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["jlora.evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        return (exit.value.code or 0, *capfd.readouterr())

    return run


def by_transformers(world, pretrained, adapter=None):
    """Mean loss and share of right tokens over the responses of the rows."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, world / adapter) if adapter else model
    losses, right = [], []
    for line in (world / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, trained, _ = encode_row(
            pretrained.tokenizer,
            row,
            format="completion",
            prompt="stanford",
            counted=Counted("response", "turn", "keep"),
        )
        with torch.no_grad():
            logits = model(torch.tensor(ids[None], dtype=torch.long)).logits[0]
        targets = torch.tensor(ids[1:], dtype=torch.long)
        kept = torch.tensor(trained[1:])
        losses += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="none")[kept].tolist()
        right += (logits[:-1].argmax(-1) == targets)[kept].tolist()
    return np.mean(losses), np.mean(right)


@pytest.mark.long
def test_rows_of_other_columns_are_measured_as_those_of_the_formats_own(world, evaluate, tmp_path):
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    renamed = [{"ask": row["prompt"], "reply": row["completion"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    common = ("--base", world / "base", "--dtype", "float32", "--max-length", 64, "--json")
    own = evaluate(*common, "--data", world / "rows.jsonl")
    assert evaluate(*common, "--data", tmp_path / "rows.jsonl", "--columns", "prompt=ask,completion=reply") == own
    code, _, err = evaluate(*common, "--data", tmp_path / "rows.jsonl")
    assert code == 3 and "rename one, or set --columns instruction=ask" in err


def test_several_models_side_by_side(world, pretrained, evaluate, tmp_path):
    file = tmp_path / "deep" / "page.html"
    common = ("--base", world / "base", "--data", world / "rows.jsonl", "--dtype", "float32", "--max-length", 64)
    common += ("--format", "completion")
    code, out, err = evaluate(
        *common,
        *("--compare", world / "one", f"{world}/two/", "--generate", 3, "--max-new-tokens", 6, "--json"),
        *("--html", file),
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    models = result["models"]
    assert [m["model"] for m in models] == ["base base", "one", "two"]
    assert [m["adapter"] for m in models] == [None, f"{world}/one", f"{world}/two/"]
    for model, adapter in zip(models, (None, "one", "two"), strict=True):
        loss, right = by_transformers(world, pretrained, adapter)
        assert model["loss"] == pytest.approx(loss, abs=1e-4)
        assert model["token_accuracy"] == pytest.approx(right, abs=1e-6)
        assert model["perplexity"] == pytest.approx(math.exp(model["loss"]))
        assert (model["rows"], model["generated"], len(model["answers"])) == (7, 3, 3)
    assert len({m["loss"] for m in models}) == 3
    text = file.read_text(encoding="utf-8")
    shown = Page(text)
    assert shown.problems == []
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        assert row["prompt"] in shown.text and row["completion"] in shown.text
    assert rows[3]["prompt"] not in shown.text
    for model in models:
        assert f"{model['loss']:.4f}" in shown.text and f"{model['chrf']:.2f}" in shown.text
        assert page.clean(model["answers"][0]["text"]) in shown.text.replace("\r", "")
    assert not re.search(r"https?://|<script|<img|<link", text)

    # One of them alone is the same, and its answers are those of `generate`.
    code, out, _ = evaluate(*common, "--adapter", world / "one", "--generate", 2, "--max-new-tokens", 6, "--json")
    alone = json.loads(out)
    assert code == 0 and alone["loss"] == pytest.approx(models[1]["loss"], abs=1e-6)
    assert alone["answers"] == models[1]["answers"][:2]


def test_answers_in_batches_are_those_one_by_one(world, pretrained):
    model = Adapted(pretrained, open_adapter(str(world / "one"), pretrained), np.dtype("float32"))
    prompts = [[1, *range(40, 40 + n)] for n in (30, 3, 45, 12)]
    assert answers.batches_of_like([31, 4, 46, 13], 2) == [(32, [1, 3]), (32, [0]), (64, [2])]
    with jax.set_mesh(one_device_mesh()):
        together = answers.answer(model, prompts, batch_size=2, timed=True, max_new_tokens=5)
        alone = [answers.answer(model, [ids], batch_size=2, max_new_tokens=5).texts[0] for ids in prompts]
    assert together.texts == alone and len(set(alone)) > 1 and together.seconds > 0
    assert all(0 < count <= 5 for count in together.tokens)
    assert not any(together.ended)
    end = alone[0][2:4]
    with jax.set_mesh(one_device_mesh()):
        cut = answers.answer(model, prompts[:1], batch_size=2, until=("no such", end), max_new_tokens=5)
    assert cut.texts == [alone[0].partition(end)[0]] and cut.ended == [True]
    assert [answers.width_of(n) for n in (1, 32, 33, 64, 65, 128, 129)] == [32, 32, 64, 64, 128, 128, 256]


def test_scores_by_hand_and_by_the_libraries():
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    said = ["the cat on mat", " The Cat sat. ", "ΝΑΙ, η γάτα!", ""]
    wanted = ["the cat sat on the mat", "The Cat sat.", "ναι η γάτα", "something"]
    total, each = scores.score(said, wanted)
    assert [one["exact_match"] for one in each] == [0, 1, 0, 0] and total["exact_match"] == 0.25
    # Four of four and of six words in common.
    assert each[0]["rouge_l"] == pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6))
    assert [one["rouge_l"] for one in each[1:]] == [1, 1, 0]
    assert total["rouge_l"] == pytest.approx(sum(one["rouge_l"] for one in each) / 4)
    theirs = RougeScorer(["rougeL"])
    for answer, reference in (("It's a-b c_d 3.5!", "its a b d, 3.5"), ("A\nb", "a b c")):
        (ours,) = scores.score([answer], [reference])[1]
        assert ours["rouge_l"] == theirs.score(reference, answer)["rougeL"].fmeasure
    assert total["chrf"] == CHRF().corpus_score(said, [wanted]).score
    assert each[1]["chrf"] == pytest.approx(100) and each[3]["chrf"] == 0


def test_interval_over_answers_of_which_some_match_nothing():
    total, _ = scores.score(["a b c d", "x", "y", "z", "w"], ["a b c d e", "1", "2", "3", "4"])
    low, high = total["intervals"]["chrf"]
    assert 0 <= low < total["chrf"] < high


def test_a_missing_library_is_one_sentence(world, evaluate, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "sacre" in name else found(name))
    monkeypatch.setitem(sys.modules, "jlora.evaluation.measure", None)  # told before what takes its time is imported
    with pytest.raises(ConfigError, match=r"needs sacrebleu, not installed here; .* 'jlora\[eval\] @ git\+https"):
        scores.require_scores()
    code, out, err = evaluate("--base", world / "base", "--data", world / "rows.jsonl", "--generate", 2)
    assert (code, out, err.count("\n")) == (2, "", 1) and "jlora[eval]" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--html", "x.html"), "say of how many rows with --generate"),
        (("--generate", "0"), "--generate and --max-new-tokens must be at least 1"),
        (("--compare", "a", "--adapter", "b"), "leave --adapter out"),
    ],
)
def test_bad_usage(world, evaluate, arguments, words):
    code, out, err = evaluate("--base", world / "base", "--data", world / "rows.jsonl", *arguments)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_rows_that_can_not_be_asked(pretrained, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n[]\n{"prompt": "c", "completion": "d"}\n')
    section = DataSection(train="-", format="completion", on_bad_row="skip")
    asked = answers.read_questions(str(file), section, pretrained.tokenizer, 9)
    assert [(q.shown, q.reference) for q in asked] == [("a", "b"), ("c", "d")]
    assert len(answers.read_questions(str(file), section, pretrained.tokenizer, 1)) == 1
    strict = section.model_copy(update={"on_bad_row": "error"})
    with pytest.raises(DataError, match=r'rows.jsonl:2: the field "completion" is missing'):
        answers.read_questions(str(file), strict, pretrained.tokenizer, 9)
    with pytest.raises(DataError, match="holds no row with a prompt and an answer"):
        answers.read_questions(str(file), section.model_copy(update={"format": "text"}), pretrained.tokenizer, 9)


def test_hostile_rows_stay_text(tmp_path):
    answer = {"text": HOSTILE, "ended": False, "exact_match": 0.0, "rouge_l": 0.1, "chrf": 2.0, "tokens": 3}
    results = [{"model": HOSTILE, "loss": math.inf, "rouge_l": 0.5, "answers": [answer]}] * 2
    file = tmp_path / "page.html"
    answers_page.write_comparison(file, HOSTILE, results, [([Turn(HOSTILE, HOSTILE)], HOSTILE)])
    text = file.read_text(encoding="utf-8")
    shown = Page(text)
    assert shown.problems == []
    assert {tag for tag, _ in shown.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "main", "pre"),
        *("table", "thead", "tbody", "tr", "th", "td", "article", "small", "div", "b", "span", "mark"),
    }
    assert shown.text.count("alert(1)") == text.count("alert(1)") >= 6
    assert not re.search("[\x00\x1b\ud800\u202e]", text)
    assert all(not name.startswith("on") for _, attrs in shown.tags for name in attrs)


def test_prompt_and_answer_of_a_row(pretrained):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    more = [*turns, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye."}]
    for format, row, shown, reference in (
        ("alpaca", {"instruction": "Say", "input": "a", "output": "A"}, "Say\n\na", "A"),
        ("alpaca", {"instruction": "Say", "input": " ", "output": "A"}, "Say", "A"),
        ("completion", {"prompt": "p:", "completion": " c"}, "p:", " c"),
        ("messages", {"messages": more}, "user: Hi", "Yes?"),  # what encode_prompt asks, too
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A"}]},
            "user: Hi",
            "A",
        ),
        ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, "p", "c"),
        ("preference", {"prompt": turns[:1], "chosen": turns[1:], "rejected": more[3:]}, "user: Hi", "Yes?"),
    ):
        assert shown_prompt(row, format=format) == shown
        assert reference_answer(row, format=format) == reference
        if format == "completion":
            assert encode_prompt(pretrained.tokenizer, row, format=format, prompt="stanford")
    for format, row in (
        ("text", {"text": "a"}),
        ("messages", {"messages": more[:3]}),
        ("alpaca", {"instruction": "a"}),
    ):
        with pytest.raises(BadRow):
            reference_answer(row, format=format)
