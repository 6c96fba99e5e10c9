"""An index of runs as one HTML page: how each ended, the shape of its loss, and the keys in which it differs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jlora.files.paths import short_names
from jlora.reports.charts import Point, Spot, smoothed, thinned
from jlora.reports.figures import compact, drawable, loss, shown
from jlora.reports.heading import heading
from jlora.reports.page import link, render, write_page
from jlora.reports.run import STATUS
from jlora.reports.run_files import RunFiles, read_run
from jlora.reports.runs import differences

# The box that a loss is drawn in, the most points of one, and the keys that are named of a run.
WIDTH, HEIGHT, POINTS, MOST_KEYS = 120, 28, 120, 8


def write_index(path: Path, folders: list[Path]) -> None:
    """Write the page of some run folders, in their order, whole or not at all.

    Raises:
      ConfigError: it cannot be written there.
    """
    names = short_names([folder.resolve() for folder in folders])
    runs = [replace(read_run(folder), name=name) for folder, name in zip(folders, names, strict=True)]
    after = {n: value for n, run in enumerate(runs) if (value := drawable(run.held_out()[1])) is not None}
    lowest = min(after, key=lambda n: after[n]) if len(after) > 1 else None
    unlike = differences(runs)
    rows = []
    for number, (folder, run) in enumerate(zip(folders, runs, strict=True)):
        target = folder / "report.html"
        own = [f"{key} {values[number]}" for key, values in unlike]
        rows.append(
            _row(run)
            | {"link": link(path, target) if target.is_file() else None, "best": number == lowest}
            | {"unlike": own[:MOST_KEYS], "more": len(own[MOST_KEYS:])}
        )
    write_page(path, render("index.html", title="Runs", rows=rows, width=WIDTH, height=HEIGHT))


def _row(run: RunFiles) -> dict[str, Any]:
    (before, after), status, facts = run.held_out(), str(run.summary.get("status")), heading(run)
    return {
        "name": run.name,
        "state": status if status in STATUS else "",
        "status": STATUS.get(status, status),
        "date": facts.get("Date", ""),
        "what": ", ".join(facts[name] for name in ("Base", "Method") if name in facts),
        "steps": shown(run.num_steps(), compact),
        "held_out": "–" if after is None else f"{shown(before, loss)} → {shown(after, loss)}",
        "train": shown(run.figure("train_loss", "loss"), loss),
        "spark": sparkline(run.series["loss"]),
    }


def sparkline(points: list[Point]) -> list[Spot]:
    """The shape of a curve in a box of WIDTH x HEIGHT, y downwards, smoothed; empty of fewer than two values."""
    drawn = [(x, y) for x, y in thinned(smoothed(points, max(5, len(points) // 20)), POINTS) if y is not None]
    if len(drawn) < 2:
        return []
    first, last, low, high = drawn[0][0], drawn[-1][0], min(y for _, y in drawn), max(y for _, y in drawn)
    across, up = (WIDTH - 2) / (last - first), (HEIGHT - 2) / ((high - low) or 1.0)
    return [(round(1 + (x - first) * across, 1), round(HEIGHT - 1 - (y - low) * up, 1)) for x, y in drawn]
