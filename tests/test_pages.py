"""Pages as Chromium lays them out, on a phone and on a desk: nothing sticks out, overlaps or is cut; axes have units.

Screenshots stay in the folder that JLORA_SCREENSHOTS names, if it is set.
"""

import os
from collections.abc import Callable
from pathlib import Path

import browser
import pytest
from test_report import make_run

from jlora.report import write_report
from jlora.runs_compared import compare

pytestmark = pytest.mark.skipif(browser.find() is None, reason="no Chromium here: apt-get install chromium")


def report_page(folder: Path) -> Path:
    return write_report(make_run(folder / "run", 3, 8))


def compared_page(folder: Path) -> Path:
    names = ("rank-8", "rank-32", "a-run-with-a-name-as-long-as-people-give-them-when-they-try-many-settings", "last")
    runs = [make_run(folder / name, 3 - i / 2, 8 * (i + 1)) for i, name in enumerate(names)]
    (folder / "compared.html").write_text(compare(runs), encoding="utf-8")
    return folder / "compared.html"


# A page more is a line more: who makes it, in an empty folder, and how many charts it has.
PAGES: dict[str, tuple[Callable[[Path], Path], int]] = {"report": (report_page, 5), "compared": (compared_page, 6)}
UNITS = ("nats per token", "learning rate", "global L2 norm", "tokens per second", "GiB")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_laid_out_well(name, width, tmp_path):
    make, num_charts = PAGES[name]
    page = make(tmp_path)
    found = browser.probe(page, width, tmp_path)
    if kept := os.environ.get("JLORA_SCREENSHOTS"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        browser.screenshot(page, width, found["height"], Path(kept).resolve() / f"{name}-{width}.png", tmp_path)
    assert found["wide"] == width and found["height"] > 800
    assert found["wrong"] == [] and found["small"] == []
    assert len(found["charts"]) == num_charts
    for chart in found["charts"]:
        assert "training step" in chart["texts"], chart["label"]
        assert any(text.startswith(UNITS) for text in chart["texts"]), chart["label"]
        numbers = [text for text in chart["texts"] if text.replace("\u2212", "").replace(",", "")[:1].isdigit()]
        assert len(numbers) >= 6, chart["label"]


def test_probe_finds_what_is_wrong(tmp_path):
    """A check that can not fail proves nothing."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><html><head><title>bad</title></head><body><div style='width:900px'>wide</div>"
        "<p style='position:absolute;top:90px;left:10px;margin:0'>one text</p>"
        "<p style='position:absolute;top:92px;left:20px;margin:0'>another text</p>"
        "<div style='width:40px;overflow:hidden;white-space:nowrap'>a text that is cut off</div></body></html>",
        encoding="utf-8",
    )
    wrong = " / ".join(browser.probe(page, 390, tmp_path)["wrong"])
    for word in (
        "the page is 908",
        "sticks out: DIV wide",
        "overlap: P one text | P another text",
        "cut off: DIV a text",
    ):
        assert word in wrong, wrong
