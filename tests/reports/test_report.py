"""The run report: well-formed, self-contained, and able to describe runs that are broken or unfinished."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from report_pages import SUMMARY, Page, make_run, train_line

from jlora.errors import ConfigError
from jlora.reports.run import write_report
from jlora.reports.runs import compare

ROOT = Path(__file__).parents[2]
CHARTS = ("Loss", "Learning rate", "Gradient norm", "Speed")


def report(
    run: Path, lines: list[dict[str, object]] | None = None, summary: object = None, tail: str = ""
) -> tuple[str, Page]:
    if lines is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines) + tail
        (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.tmp")) and not list(run.glob(".*.tmp"))
    markup = path.read_text(encoding="utf-8")
    page = Page(markup)
    assert page.problems == []
    numbers = " ".join(a.get("d") or "" for _, a in page.tags)
    assert not re.search("nan|inf|e[+-]", numbers), "a coordinate that no browser can draw"
    return markup, page


EVALS: list[dict[str, object]] = [{"step": 0, "eval_loss": 2.5}, {"step": 40, "eval_loss": 1.75}]


def test_a_finished_run_shows_its_figures(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("lora:\n  rank: 16  # why <16>\n", encoding="utf-8")
    _, page = report(tmp_path, [train_line(s) for s in range(1, 41)] + EVALS, SUMMARY)
    for figure in (
        "finished",
        "1.5321",
        "2.5000 → 1.7500",
        "−30.0%",
        "12.18 → 5.755",
        "3 skipped",
        "812.4",
        "1 h 02 min",
        "3.00 GiB",
        "256.0 MiB",
        "1M",
        "1.00% of all",
        "5,200",
        "5,010",
        "314",
        "120",
        "Rows dropped: empty answer",
        "360,412",
        "1,180,233",
        "9.8.7",
        "abc123",
        "old words",
        "new words",
        "lora:\n  rank: 16  # why <16>\n",
        tmp_path.name,
        "training step",
        "held-out",
    ):
        assert figure in page.text, figure
    charts = page.charts()
    assert set(charts) == set(CHARTS)
    assert set(charts["Loss"]) >= {"train raw", "train", "eval", "grid", "axis"}
    assert "×10⁻⁴" in page.text  # the learning-rate ticks are small numbers with the power beside the unit


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    markup, page = report(tmp_path, [train_line(s) for s in range(1, 41)] + EVALS, SUMMARY)
    for forbidden in ("http:", "https:", "src=", "@import", "url(", "<script", "<link", "href="):
        assert forbidden not in markup.lower(), forbidden
    assert "default-src 'none'" in str(page.tags)
    assert "prefers-color-scheme:dark" in markup and "@media print" in markup


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"><img onerror=1>\x00\x1b\ud800\u202e\u2069"
    run = tmp_path / "a<b>&c"
    run.mkdir()
    (run / "config.yaml").write_text("name: </pre><i>x</i>\n", encoding="utf-8")
    summary = {
        "status": evil,
        "device": evil,
        "rows": {"read": evil, "dropped": {evil: evil}},
        "versions": {evil: evil},
        "hashes": {evil: evil},
        "steps": evil,
        "tokens": {"trained": evil},
        "peak_memory_bytes": {"host": evil},
        "trainable_params": evil,
        "train_loss": evil,
        "samples": [{"prompt": evil, "before": evil, "after": evil}],
    }
    markup, page = report(run, [train_line(1)], summary)
    assert not {"script", "img", "i", "b>"} & {tag for tag, _ in page.tags}
    assert "a<b>&c" in page.text and "</pre><i>x</i>" in page.text and "<script>alert('x')" in page.text
    assert not re.search("[\x00\x1b\u202a-\u202e\u2066-\u2069]", markup)


def test_a_value_that_is_not_finite_breaks_the_curve_and_is_marked(tmp_path: Path) -> None:
    lines = [train_line(s) for s in range(1, 11)]
    lines[4]["loss"] = math.nan
    lines[6]["loss"] = None
    lines[4]["grad_norm"] = math.inf
    lines[5]["grad_norm"] = 10**400
    _, page = report(tmp_path, lines, {"train_loss": math.nan})
    charts = page.charts()
    assert charts["Loss"]["train raw"].count("M") == 3 and charts["Loss"]["train"].count("M") == 3
    assert charts["Gradient norm"]["train"].count("M") == 2
    assert charts["Loss"]["gap"].count("l6 6") == 2 and charts["Gradient norm"]["gap"].count("l6 6") == 2
    assert "gap" not in charts["Learning rate"]
    assert "not finite" in page.text and "nan" in page.text


def test_a_run_of_only_bad_values_has_a_page(tmp_path: Path) -> None:
    _, page = report(tmp_path, [train_line(s, loss=math.nan) for s in range(1, 4)])
    assert set(page.charts()["Loss"]) == {"grid", "axis", "gap"}


@pytest.mark.parametrize("summary", [None, [], {"rows": None, "samples": "no", "tokens": 3, "status": ["odd"]}])
def test_an_empty_run_has_a_page(tmp_path: Path, summary: object) -> None:
    _, page = report(tmp_path, None, summary)
    assert page.charts() == {} and page.text.count("No values yet.") == len(CHARTS)
    assert "no metrics yet" in page.text


def test_a_summary_cut_short_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "finis', encoding="utf-8")
    _, page = report(tmp_path, [train_line(1)])
    assert "stopped, can be resumed" in page.text and "2.5000" in page.text


@pytest.mark.parametrize("step", [1, 10, 1_000_000])
def test_one_point_is_drawn_as_a_dot(tmp_path: Path, step: int) -> None:
    _, page = report(tmp_path, [train_line(step)])
    assert set(page.charts()) == set(CHARTS)
    assert sum(tag == "circle" for tag, _ in page.tags) == len(CHARTS)


def test_an_evaluation_before_training_is_drawn(tmp_path: Path) -> None:
    _, page = report(tmp_path, [{"step": 0, "eval_loss": 2.2}])
    assert set(page.charts()) == {"Loss"} and "eval" in page.charts()["Loss"]
    assert "2.2000 → –" in page.text and "last logged step 0" in page.text


def test_a_torn_last_line_is_ignored_and_others_are_counted(tmp_path: Path) -> None:
    lines = [train_line(s) for s in range(1, 4)]
    _, page = report(tmp_path, lines, tail='{"step": 99, "lo')
    assert "last logged step 3" in page.text and "unreadable" not in page.text
    _, page = report(tmp_path, lines, tail='{"step": 98, "lo\n[1]\n{"step": 4, "loss": 1.25}')
    assert "unreadable metric lines ignored: 2" in page.text
    assert "last logged step 4" in page.text and "1.2500" in page.text


def test_a_resumed_run_keeps_the_later_line_of_a_step(tmp_path: Path) -> None:
    lines = [train_line(1, loss=4.0), train_line(2, loss=9.0), train_line(2, loss=3.25)]
    _, page = report(tmp_path, lines)
    assert "3.2500" in page.text and "9.0" not in page.text
    assert page.charts()["Loss"]["train"].count("L") == 1


def test_a_long_run_is_thinned_but_keeps_its_spike(tmp_path: Path) -> None:
    lines = [train_line(s, loss=50.0 if s == 4321 else 2.0) for s in range(1, 9001)]
    lines[6000]["loss"] = math.nan
    markup, page = report(tmp_path, lines)
    loss = page.charts()["Loss"]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", loss["train raw"])]
    assert 200 <= len(heights) <= 600
    assert min(heights) < 40 < 150 < max(heights)  # the spike reaches the top, the rest stays below
    assert loss["train raw"].count("M") == 2 and "gap" in loss
    assert len(markup) < 100_000


def test_the_smoothed_line_follows_the_raw_one_more_calmly(tmp_path: Path) -> None:
    _, page = report(tmp_path, [train_line(s, loss=2.0 + s % 2) for s in range(1, 41)])
    raw, smooth = (
        [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", page.charts()["Loss"][kind])]
        for kind in ("train raw", "train")
    )
    assert smooth[0] == raw[0]  # no pull towards zero at the start
    assert max(smooth[5:]) - min(smooth[5:]) < 0.7 * (max(raw) - min(raw))
    assert min(raw) < min(smooth[5:]) and max(smooth[5:]) < max(raw)


def test_bytes_that_are_not_utf8_are_tolerated(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"name: caf\xe9\n")
    lines = b'{"step": 1, "loss": 2.5}\n\xff\xfe\n{"step": 2, "loss": 2.25}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    _, page = report(tmp_path)
    assert "caf\ufffd" in page.text and "2.2500" in page.text and "metric lines ignored: 1" in page.text


@pytest.mark.parametrize("value", [0.0, -3.5, 1e-300, 5e-7, 99999.0, 3e12, 9e99])
def test_any_size_of_value_gets_short_tick_labels(tmp_path: Path, value: float) -> None:
    _, page = report(tmp_path, [train_line(1, grad_norm=value), train_line(2, grad_norm=value * 1.7)])
    markup = (tmp_path / "report.html").read_text(encoding="utf-8")
    labels = re.findall(r'text-anchor="end">([^<]*)<', markup)
    assert len(labels) >= 12 and max(map(len, labels)) <= 6
    assert "Gradient norm" in page.charts()


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(tmp_path, [train_line(1)])
    old = (tmp_path / "report.html").read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr("jlora.files.atomic.os.replace", refuse)
        with pytest.raises(ConfigError, match="report.html: cannot be written .disk full.; make room"):
            write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_several_runs_in_one_page(tmp_path: Path) -> None:
    folders = [
        make_run(tmp_path / parent / "run<1>", scale, rank) for parent, scale, rank in (("a", 3, 4), ("b", 2, 8))
    ]
    samples = [{"prompt": "Why?", "before": "old\u202e", "after": "because of 4\u2067"}]
    summary = json.loads((folders[0] / "summary.json").read_text()) | {"samples": samples}
    (folders[0] / "summary.json").write_text(json.dumps(summary))
    markup = compare(folders)
    assert not re.search("[\u202e\u2067]", markup)
    page = Page(markup)
    assert page.problems == [] and "<script" not in markup and "http:" not in markup
    charts = page.charts()
    assert set(charts) == {"Training loss", "Held-out loss", "Learning rate", "Gradient norm"}
    assert set(charts["Held-out loss"]) >= {"c0", "c1"}
    assert "Lowest held-out loss: b/run<1>" in page.text
    differing = page.text[page.text.index("What differs") :]
    assert "lora.rank" in differing and "lora.alpha" not in differing and "method" not in differing
    assert differing.count("old") == 1 and "because of 4" in differing and "because of 8" in differing


def test_runs_that_are_alike_or_empty_have_a_page(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    markup = compare([make_run(tmp_path / "whole", 2, 4), tmp_path / "empty", tmp_path / "empty"])
    assert Page(markup).problems == []


def test_of_folders_with_one_name_none_is_lost(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / parent / "a" / "run", 2, rank) for parent, rank in (("x", 4), ("y", 8))]
    page = Page(compare(folders))
    assert "2 runs compared" in page.text and page.text.count("because of") == 2
    assert set(page.charts()["Held-out loss"]) >= {"c0", "c1"}


def test_html_stands_in_templates_alone() -> None:
    markdown = ROOT / "jlora" / "config" / "reference.py"  # anchors of our own keys' names, in a page of Markdown
    for path in sorted({*(ROOT / "jlora").rglob("*.py")} - {markdown}):
        tags = r"</?(a|b|div|p|pre|span|svg|path|table|td|small|style|html)\b[^<]*?>|Markup"
        found = re.search(tags, path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found}"


def test_an_installed_package_has_its_templates(tmp_path: Path) -> None:
    """From a copy, since setuptools leaves its files beside what it builds."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "jlora", tmp_path / "jlora", ignore=shutil.ignore_patterns("__pycache__"))
    install = ("pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target")
    subprocess.run([sys.executable, "-m", *install, tmp_path / "site", tmp_path], check=True, capture_output=True)
    run = make_run(tmp_path / "run", 2, 4)
    # jinja2 takes a tenth of a second that only pages should cost.
    program = (
        "import sys, pathlib, jlora.reports.run as run; assert 'jinja2' not in sys.modules;"
        "run.write_report(pathlib.Path(sys.argv[1])); print(run.__file__)"
    )
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": str(tmp_path / "site")
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, run], env=clean, check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert Page((run / "report.html").read_text(encoding="utf-8")).charts().keys() == {*CHARTS}
