"""Answers side by side: the spread of their scores, files of answers, and the page that filters them."""

import json

import numpy as np
import pytest
from report_pages import Page, make_run
from scipy.stats import binomtest

from jlora.errors import DataError
from jlora.evaluation.scores import score
from jlora.reports import intervals
from jlora.reports.answers import SCORES, compare_files, tabulated, write_comparison
from jlora.reports.run import write_report


@pytest.mark.parametrize(("hits", "count"), [(0, 4), (4, 4), (1, 3), (20, 50), (700, 1000)])
def test_the_interval_of_a_share_is_wilsons(hits, count):
    theirs = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert intervals.share(hits, count) == pytest.approx([theirs.low, theirs.high], abs=1e-12)


def test_the_interval_of_a_mean_is_that_of_its_resamples():
    values = np.random.default_rng(5).random(400).tolist()
    low, high = intervals.mean(values)
    error = np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - 1.96 * error, np.mean(values) + 1.96 * error), abs=0.004)
    assert intervals.mean(values) == [low, high] and intervals.mean(values[:4]) is None


def test_scores_know_their_spread():
    pytest.importorskip("sacrebleu")
    from sacrebleu.metrics import CHRF

    answers, references = ["a b c d"] * 3 + ["a b y z"] * 5, ["a b c d"] * 8
    total, each = score(answers, references)
    theirs = CHRF().corpus_score(answers, [references], n_bootstrap=intervals.RESAMPLES)
    wanted = [theirs._mean - theirs._ci, theirs._mean + theirs._ci]
    assert total["intervals"]["chrf"] == pytest.approx(wanted, abs=1e-4) and wanted[0] < total["chrf"] < wanted[1]
    assert total["intervals"]["exact_match"] == intervals.share(3, 8)
    assert total["intervals"]["rouge_l"] == intervals.mean([one["rouge_l"] for one in each])
    few = score(answers[:4], references[:4])[0]["intervals"]
    assert few["rouge_l"] is few["chrf"] is None and few["exact_match"] == intervals.share(3, 4)


@pytest.mark.parametrize(("spread", "best"), [((0.5, 0.7), 1), ((0.4, 0.7), None), ((0.2, 0.9), None), (None, None)])
def test_the_best_of_few_answers_may_be_none(spread, best):
    results = [("a", {"rouge_l": 0.4, "intervals": {"rouge_l": None}})]
    results.append(("b", {"rouge_l": 0.6, "intervals": {"rouge_l": spread}}))
    heads, rows, found = tabulated("Model", SCORES, results)
    assert heads == ["Model", "ROUGE-L"] and found == [None, best]
    shown = "0.6000" if spread is None else ("0.6000", f"{spread[0]:.4f} – {spread[1]:.4f}")
    assert rows == [["a", "0.4000"], ["b", shown]]
    assert tabulated("Model", SCORES, [(name, {"rouge_l": value}) for name, value in (("a", 1.0), ("b", 2.0))])[2] == [
        None,
        1,
    ]


ROWS = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"messages": [{"role": "user", "content": "Add 2 + 2."}, {"role": "assistant", "content": "4"}]},
    {"prompt": "3 + 3 =", "completion": " 6"},
]


def answers_file(path, texts, rows=ROWS, **changes):
    lines = [
        {"prompt": row, "text": text, "tokens": 1, "ended": True} | changes
        for row, text in zip(rows, texts, strict=False)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_files_of_answers_stand_side_by_side(tmp_path):
    files = [
        answers_file(tmp_path / name, texts)
        for name, texts in (("a.jsonl", ["2", "4", "6"]), ("b.jsonl", ["2", "5", "7"]), ("c.jsonl", ["2", "4", "8"]))
    ]
    compare_files(tmp_path / "page.html", files)
    markup = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(markup)
    assert page.problems == []
    kinds = [dict(attrs).get("class") for tag, attrs in page.tags if tag == "article"]
    assert kinds == ["right", "mixed", "mixed"]
    for words in ("Add 2 + 2.", "1 + 1", "a wrong answer: 2", "one right, another wrong: 2", "100.0%", "33.3%"):
        assert words in page.text, words
    assert page.text.count("equal to the reference") == 3 + 2 + 1
    low, high = intervals.share(1, 3)
    assert f"{low:.1%} – {high:.1%}" in page.text and 'class="best"' not in markup


def test_without_references_answers_are_marked_against_the_first(tmp_path):
    rows = [{"instruction": "Say it."}]
    texts = ("the box was red and dented", "the box was blue and dented")
    files = [answers_file(tmp_path / f"{i}.jsonl", [text], rows, ended=i == 0) for i, text in enumerate(texts)]
    compare_files(tmp_path / "page.html", files)
    markup = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert markup.count("<mark>") == 1 and "<mark>blue </mark>" in markup and "cut here" in markup
    assert "Reference" not in markup and "Exact match" not in markup and 'type="radio"' not in markup


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "b.jsonl: holds no answer; make the file with"),
        ("[]\n", "b.jsonl:1: is no answer; make the file with"),
        ('\n{"prompt": {}, "text": 3, "tokens": 1, "ended": true}\n', "b.jsonl:2: is no answer"),
        ('{"prompt": {}, "text": "a", "tokens": 1, "ended": true}\n', "b.jsonl: answers other prompts than .*a.jsonl"),
    ],
)
def test_what_is_no_file_of_answers(text, words, tmp_path):
    (tmp_path / "b.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        compare_files(tmp_path / "page.html", [answers_file(tmp_path / "a.jsonl", "246"), tmp_path / "b.jsonl"])
    assert not (tmp_path / "page.html").exists()


def test_a_model_leads_to_the_page_of_its_run(tmp_path):
    run = make_run(tmp_path / "runs" / "javascript:a b", 2, 4)
    write_report(run)
    answer = {"text": "a", "ended": True, "exact_match": 0.0, "rouge_l": 0.1, "chrf": 2.0, "tokens": 3}
    results = [{"model": str(i), "adapter": adapter, "answers": [answer]} for i, adapter in enumerate((None, str(run)))]
    write_comparison(tmp_path / "page.html", "t", results, [([], "b")])
    tags = Page((tmp_path / "page.html").read_text(encoding="utf-8")).tags
    assert [attrs["href"] for tag, attrs in tags if tag == "a"] == ["./runs/javascript%3Aa%20b/report.html"]
