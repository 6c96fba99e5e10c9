"""Pages as Chromium lays them out, on a phone and on a desk: nothing sticks out, overlaps or is cut; axes have units.

Screenshots stay in the folder that JLORA_SCREENSHOTS names, if it is set.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import browser
import pytest
from chat_templates import SHAPES, answer, source, tokenizer_folder, user
from report_pages import make_run
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora.config import load_config
from jlora.data.speakers import Turn
from jlora.evaluation.strategies import choose
from jlora.reports.answers import write_comparison
from jlora.reports.data import look, render
from jlora.reports.effort import write_effort
from jlora.reports.run import write_report
from jlora.reports.runs import compare, write_index

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(browser.find() is None, reason="no Chromium here: apt-get install chromium"),
]


def report_page(folder: Path) -> Path:
    return write_report(make_run(folder / "run", 3, 8))


def compared_page(folder: Path) -> Path:
    names = ("rank-8", "rank-32", "a-run-with-a-name-as-long-as-people-give-them-when-they-try-many-settings", "last")
    runs = [make_run(folder / name, 3 - i / 2, 8 * (i + 1)) for i, name in enumerate(names)]
    (folder / "compared.html").write_text(compare(runs), encoding="utf-8")
    return folder / "compared.html"


def data_page(folder: Path) -> Path:
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    rows = make_completions(folder / "rows.jsonl")
    section = {"format": "completion", "max_length": 96, "eval": 0.25}
    config = write_config(folder / "c.yaml", folder / "base", rows, folder / "run", data=section)
    seen = look(load_config(config), 6)
    (folder / "data.html").write_text(render("c", seen.report, seen.rows), encoding="utf-8")
    return folder / "data.html"


def chats_page(folder: Path) -> Path:
    """Tools, reasoning, emoji, rare scripts, weights, a row that is cut, and a held-out row that is nearly it."""
    thinking = answer("It is 391. 🎉", reasoning_content="17 · 20 + 17 · 3 = 391 👍🏽")
    weighted = [answer("नमस्ते, สวัสดี, 你好, مرحبا 🙂", weight=0.25), user("And?"), answer("𐎀𐎁 გამარჯობა", weight=0.5)]
    long = [user("Why is the sky blue?"), answer("Air scatters short waves of light more than long ones. " * 12)]
    rows = [SHAPES["results"], {"messages": [user("17 · 23?"), thinking]}]
    rows += [{"messages": [user("Hello to 👨‍👩‍👧‍👦 🇩🇪?"), *weighted, user("Bye"), answer("Bye")]}, {"messages": long}]
    held = [{"messages": [long[0], answer(long[1]["content"].replace("Air", "It", 1))]}]
    for name, some in (("rows", rows), ("held", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    (folder / "template.jinja").write_text(source("qwen3_instruct_2507"), encoding="utf-8")
    section = {"format": "messages", "max_length": 640, "eval": str(folder / "held.jsonl")}
    section["chat_template"] = str(folder / "template.jinja")
    config = write_config(folder / "c.yaml", Path("llama2-7b"), folder / "rows.jsonl", folder / "run", data=section)
    seen = look(load_config(config, [f"model.tokenizer={tokenizer_folder('<|im_end|>')}"]), 4)
    assert len(seen.report["near"]) == 1 and seen.rows[-1].cut
    (folder / "chats.html").write_text(render("c", seen.report, seen.rows), encoding="utf-8")
    return folder / "chats.html"


ANSWER = "It came on a Tuesday, the box was dented, and the card slot has been of more use than I had thought. "


def figures(number: int) -> dict[str, Any]:
    """What judging would find of one model."""
    answer = {
        "text": ANSWER * number,
        "tokens": 20 * number,
        "ended": number < 3,
        "prompt": "Write.",
        "reference": ANSWER,
    }
    answer |= {"exact_match": 0.0, "rouge_l": number / 12, "chrf": 8.0 * number}
    found = {"loss": 4 - 0.3 * number, "perplexity": 2.7, "token_accuracy": number / 12, "tokens": 5026}
    found |= {"rouge_l": number / 12, "chrf": 8.0 * number, "exact_match": 0.0, "generated": 20, "mean_tokens": 31.5}
    found["intervals"] = {"exact_match": (0.0, 0.14), "rouge_l": (number / 15, number / 9), "chrf": None}
    return found | {"seconds": 12.5, "prompt_tokens": 180.0, "answers": [answer, answer]}


def judged_page(folder: Path) -> Path:
    names = ("meta-llama/Llama-2-7b-hf", "runs/mine", "runs/another-with-a-long-name-of-many-words", "runs/last")
    results = [{"model": name, "rows": 60} | figures(number) for number, name in enumerate(names, 1)]
    results[1]["adapter"] = str(make_run(folder / "mine", 3, 8))
    write_report(folder / "mine")
    results[1]["answers"] = [results[1]["answers"][0], results[1]["answers"][1] | {"exact_match": 1.0}]
    prompt = [Turn("system", "Write as customers do."), Turn("user", "Write a negative review of this product. " * 3)]
    write_comparison(folder / "judged.html", "heldout.jsonl", results, [(prompt, ANSWER)] * 2)
    return folder / "judged.html"


def effort_page(folder: Path) -> Path:
    settings = {"heldout_rows": 60, "training_rows": 432, "left_out": 2, "train": "train.jsonl", "seed": 0}
    settings |= {"batch_size": 8, "max_new_tokens": 96, "device": "cpu", "devices": 1, "price": 2.0}
    results = [
        {"base": base, "name": way.name, "short": way.short, "shots": way.shots, "rows": way.rows}
        | figures(first + number)
        | {"training": {"seconds": 2.0 * way.rows, "tokens": 41 * way.rows} if way.rows else None}
        | {"cost": {"training": 0.05, "thousand_answers": 0.5}}
        | ({} if way.rows else {"loss": 4 - 0.3 * first - 0.01 * number})  # points close to each other
        for first, base in ((1, "SmolLM2-135M-Instruct"), (5, "meta-llama/Llama-2-7b-hf"))
        for number, way in enumerate(choose([1, 3], [10, 30, 100, 300], 432))
    ]
    write_effort(folder, settings, results)
    return folder / "effort.html"


def index_page(folder: Path) -> Path:
    names = ("rank-8", "a-run-with-a-name-as-long-as-people-give-them-when-they-try-many-settings", "last", "sweep/a")
    runs = [make_run(folder / name, 3 - i / 2, 8 * (i + 1)) for i, name in enumerate(names)]
    write_report(runs[0])
    (runs[2] / "summary.json").unlink()
    runs += [make_run(folder / "more" / f"seed-{i}", 2, 8) for i in range(4)]
    write_index(folder / "index.html", runs)
    return folder / "index.html"


# A page more is a line more: who makes it, in an empty folder, and how many charts it has.
PAGES: dict[str, tuple[Callable[[Path], Path], int]] = {
    "report": (report_page, 4),
    "compared": (compared_page, 4),
    "data": (data_page, 2),
    "chats": (chats_page, 2),
    "judged": (judged_page, 0),
    "effort": (effort_page, 4),
    "index": (index_page, 0),
}
WIDTHS = (390, 1280)
ACROSS = {"training step", "tokens in a sequence", "minutes of training (wall time)"}
ACROSS |= {"bare, examples in the prompt, rows trained on"}
UNITS = ("sequences", "nats per token", "learning rate", "global L2 norm", "tokens per second", "GiB")
UNITS += ("nats a token", "ROUGE-L, 0 to 1", "chrF, 0 to 100")


@pytest.mark.parametrize("name", PAGES)
def test_page_is_laid_out_well(name, tmp_path):
    make, num_charts = PAGES[name]
    page = make(tmp_path)
    for width, found in zip(WIDTHS, browser.probe(page, WIDTHS, tmp_path), strict=True):
        if kept := os.environ.get("JLORA_SCREENSHOTS"):
            Path(kept).mkdir(parents=True, exist_ok=True)
            browser.screenshot(page, width, found["height"], Path(kept).resolve() / f"{name}-{width}.png", tmp_path)
        assert found["wide"] == width and found["height"] > 500
        assert found["wrong"] == [] and found["small"] == []
        assert len(found["charts"]) == num_charts
        for chart in found["charts"]:
            assert ACROSS & set(chart["texts"]), chart["label"]
            assert any(text.startswith(UNITS) for text in chart["texts"]), chart["label"]
            numbers = [text for text in chart["texts"] if text.replace("\u2212", "").replace(",", "")[:1].isdigit()]
            assert len(numbers) >= 6, chart["label"]


def test_probe_finds_what_is_wrong(tmp_path):
    """A check that cannot fail proves nothing."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><html><head><title>bad</title></head><body><div style='width:900px'>wide</div>"
        "<p style='position:absolute;top:90px;left:10px;margin:0'>one text</p>"
        "<p style='position:absolute;top:92px;left:20px;margin:0'>another text</p>"
        "<div style='width:40px;overflow:hidden;white-space:nowrap'>a text that is cut off</div>"
        "<div style='width:40px;overflow-wrap:anywhere'>Perplexity</div></body></html>",
        encoding="utf-8",
    )
    wrong = " / ".join(browser.probe(page, (390,), tmp_path)[0]["wrong"])
    for word in (
        "the page is 908",
        "sticks out: DIV wide",
        "overlap: P one text | P another text",
        "cut off: DIV a text",
        "broken: Perplexity in DIV",
    ):
        assert word in wrong, wrong
