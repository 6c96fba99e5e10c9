"""Prompts and answers as cards, and the values that a chart lets a reader read off."""

import json
import time

import pytest
from report_pages import Page, make_run, train_line

from jlora.reports.answers import marked, sample_cell, turns_of
from jlora.reports.charts import MOST_READINGS, Chart, Line, chart
from jlora.reports.run import write_report
from jlora.reports.runs import compare


def differing(text, other):
    parts = marked(text, other)
    assert "".join(part.text for part in parts) == text
    return [part.text for part in parts if part.differs]


def test_words_that_another_text_has_not_are_marked():
    assert differing("The blue  box, dented.", "The red box,\ndented.") == ["blue  "]
    assert differing("gone as it was", "as it was") == ["gone "]
    assert differing("它很好用", "它不好用") == ["很"]
    assert differing("same", "same") == [] == differing("", "words")


def test_a_text_that_has_little_in_common_is_not_marked():
    assert differing("one two three four", "five six seven four") == []


@pytest.mark.parametrize("text", ["the " * 499, "a b " * 249, "x" * 100_000, "the " * 100_000])
def test_comparing_takes_no_time(text):
    began = time.process_time()
    marked(text, text[::-1] + "a")
    assert time.process_time() - began < 2


def test_a_sample_is_shown_by_its_roles_and_where_it_is_cut(tmp_path):
    sample = {"prompt": "user\nWhy?", "turns": [["user", "Why?"]], "before": "old", "after": "new", "wanted": "so"}
    make_run(tmp_path / "run", 2, 4)
    (tmp_path / "run" / "samples.json").write_text(json.dumps({"samples": [sample | {"cut": ["after"]}]}))
    (tmp_path / "run" / "summary.json").unlink()
    page = Page(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert page.problems == []
    shown = page.text[page.text.index("Samples") : page.text.index("Configuration")].split()
    assert shown == ["Samples", *"Prompt user Why? Before old After new … cut here In the data so".split()]
    cell = sample_cell("After", sample | {"cut": ["after"]}, "after", "newer")
    assert cell.cut and not cell.wanted and not sample_cell("Before", sample, "before").cut


@pytest.mark.parametrize("turns", [None, [], "user", [["user"]], [[1, 2], 3]])
def test_turns_of_another_form_are_left_for_the_prompt(turns):
    assert turns_of({"prompt": "Why?", "turns": turns}) == [("", "Why?")]


def test_runs_are_compared_word_by_word(tmp_path):
    folders = [make_run(tmp_path / name, 2, rank) for name, rank in (("a", 4), ("b", 8))]
    markup = compare(folders)
    assert "because of <mark>8</mark>" in markup and "<mark>4</mark>" not in markup


def test_values_are_read_off_where_points_are():
    points = [(float(step), 3.0 - step / 100) for step in range(1, 101)]
    held_out = [(0.0, 3.25), (50.0, 2.5), (100.0, None)]
    drawn = chart("Loss", "nats", [Line("train", "train", points), Line("eval", "held-out", held_out)], (0, 100))
    assert len(drawn.readings) <= MOST_READINGS
    assert drawn.readings[0].left == Chart.left and drawn.readings[-1].right == Chart.right
    for one, other in zip(drawn.readings, drawn.readings[1:], strict=False):
        assert one.left <= one.x < one.right == other.left < other.x
    words = {reading.words[0][1]: reading.words[1:] for reading in drawn.readings}
    assert words["step 50"] == [("train", "train 2.5"), ("eval", "held-out 2.5")]
    assert words["step 0"] == [("eval", "held-out 3.25")]
    values = dict(points)
    for step, ((_, first), *_) in words.items():
        if first.startswith("train"):
            assert first == f"train {values[float(step.removeprefix('step '))]:.4g}"


def test_a_page_says_its_values(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(train_line(s, loss=2.0 + s)) + "\n" for s in (1, 2, 3)))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.problems == [] and sum(dict(attrs).get("class") == "at" for _, attrs in page.tags) == 4 * 3
    for words in ("step 1", "train 3", "train 5"):
        assert words in page.text


def test_rates_have_ticks_of_one_kind():
    for rate, power in ((5e-3, "⁻³"), (0.01, "⁻²"), (2e-4, "⁻⁴")):
        assert chart("Learning rate", "rate", [Line("train", "", [(1.0, rate)])], (0, 1)).unit == f"rate, ×10{power}"
    assert chart("Gradient norm", "norm", [Line("train", "", [(1.0, 0.5)])], (0, 1)).unit == "norm"
