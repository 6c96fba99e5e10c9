"""Many runs: in one page, compared or as an index, and in a line each on the terminal."""

import datetime
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jlora.config import yaml_scalar
from jlora.config.sections import dotted
from jlora.config.yaml_text import parse_yaml
from jlora.errors import ConfigError
from jlora.files.paths import require_own, short_names
from jlora.files.text import clean, counted
from jlora.reports.answers import Card, sample_cell, turns_of
from jlora.reports.charts import MOST_DOTS, Chart, Line, Point, Spot, chart, smoothed, thinned
from jlora.reports.figures import compact, drawable, duration, loss, mapping, memory, perplexity, shown
from jlora.reports.page import link, render, write_page
from jlora.reports.run import STATUS, heading
from jlora.reports.run_files import RunFiles, read_run, read_text

# Lines that a reader still tells apart.
MOST_RUNS = 8
CURVES = (
    ("loss", "Training loss", "nats per token"),
    ("eval_loss", "Held-out loss", "nats per token"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "global L2 norm"),
)
HEADS = (
    *("Run", "Held-out loss", "Held-out perplexity", "Train loss", "Steps", "Tokens/s", "Wall time"),
    *("Peak host memory", "Peak device memory", "Trained parameters"),
)
# Of an index: the box that a loss is drawn in, the most points of one, and the keys that are named of a run.
WIDTH, HEIGHT, POINTS, MOST_KEYS = 120, 28, 120, 8
LISTED = ("run", "status", "steps", "held-out loss", "train loss", "base", "method", "rate", "took", "changed")


def sweep_runs(folder: Path) -> list[Path] | None:
    """The runs of a sweep that have begun, in its order; None where the folder is not that of a sweep."""
    try:
        entries = mapping(parse_yaml(read_text(folder / "config.yaml"))).get("sweep")
    except ValueError:
        return None
    names = [str(mapping(entry).get("name")) for entry in entries] if isinstance(entries, list) else []
    runs = [folder / name for name in names if re.fullmatch(r"[\w-]+", name)]
    return [run for run in runs if (run / "metrics.jsonl").is_file()] if runs else None


def write_sweep(folder: Path, out: Path | None = None) -> Path:
    """Write `folder/report.html`, or `out`: the runs of a sweep compared, or listed where they are too many for that.

    Raises:
      ConfigError: none has begun, one is no folder of its own, or the page cannot be written there.
    """
    path, runs = out or folder / "report.html", sweep_runs(folder)
    if not runs:
        raise ConfigError(f"{folder}: no run of this sweep has begun; look again when one has")
    for run in runs:
        require_own(run, ConfigError)
    if len(runs) > MOST_RUNS:
        write_index(path, runs, "as the sweep has them")
    else:
        write_page(path, compare(runs))
    return path


def compare(folders: list[Path]) -> str:
    """The page of some run folders, in their order."""
    names = short_names([folder.resolve() for folder in folders])
    runs = [replace(read_run(folder), name=name) for folder, name in zip(folders, names, strict=True)]
    after = sorted((value, run.name) for run in runs if (value := drawable(run.held_out()[1])))
    lowest = f"Lowest held-out loss: {after[0][1]}, {after[0][0]:.4f}. " if len(after) > 1 else ""
    return render(
        "runs.html",
        title=f"{counted(len(runs), 'run')} compared",
        lead=f"{lowest}Lines of training loss are smoothed.",
        figures=(HEADS, [(run.name, *_figures(run)) for run in runs]),
        charts=_charts(runs),
        differences=(["Key", *names], [[key, *values] for key, values in differences(runs)]),
        samples=_samples(runs),
    )


def _figures(run: RunFiles) -> list[str]:
    (before, after), summary = run.held_out(), run.summary
    return [
        f"{shown(before, loss)} → {shown(after, loss)}",
        shown(after, perplexity),
        shown(run.figure("train_loss", "loss"), loss),
        shown(run.num_steps()),
        shown(run.figure("tokens_per_second", "tokens_per_second"), compact),
        shown(run.seconds, duration),
        *(shown(summary["peak_memory_bytes"].get(where), memory) for where in ("host", "device")),
        shown(summary.get("trainable_params"), compact),
    ]


def _charts(runs: list[RunFiles]) -> list[Chart]:
    steps = [step for run in runs for step in run.steps]
    x_range = (min([0.0, *steps]), max([1.0, *steps]))
    charts = []
    for key, title, unit in CURVES:
        lines = []
        for number, run in enumerate(runs):
            points = run.series[key]
            if key == "loss" and len(points) >= 5:
                points = smoothed(points, max(5, len(points) // 20))
            lines.append(Line(f"c{number}", run.name, points, marked=key == "eval_loss" and len(points) <= MOST_DOTS))
        charts.append(chart(title, unit, lines, x_range))
    return charts


def differences(runs: list[RunFiles]) -> list[tuple[str, list[str]]]:
    """The keys in which the configs of runs differ, with each run's value; the folder is none."""
    configs = [dotted(run.keys()) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "output_dir")
    rows = [(key, [yaml_scalar(config[key]) if key in config else "–" for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len({*values}) > 1]


def _samples(runs: list[RunFiles]) -> list[Card]:
    """The answers to each prompt of the first run that others were given, too, words unlike its own marked."""
    told = [(run.name, {str(sample.get("prompt")): sample for sample in run.summary["samples"]}) for run in runs]
    out = []
    for prompt, sample in told[0][1].items():
        after = [
            sample_cell(f"After: {name}", mine[prompt], "after", sample.get("after") if name != told[0][0] else None)
            for name, mine in told
            if prompt in mine
        ]
        if len(after) > 1:
            wanted = [sample_cell("In the data", sample, "wanted")] if "wanted" in sample else []
            before = sample_cell(f"Before training ({runs[0].name})", sample, "before")
            out.append(Card("Prompt", turns_of(sample), [*wanted, replace(before, apart=True), *after]))
    return out


def write_index(path: Path, folders: list[Path], order: str = "the newest first") -> None:
    """Write the page of some run folders, in their order, which has a name, whole or not at all.

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
    write_page(path, render("index.html", title="Runs", order=order, rows=rows, width=WIDTH, height=HEIGHT))


def _row(run: RunFiles) -> dict[str, Any]:
    (before, after), status, facts = run.held_out(), _status(run), heading(run)
    return {
        "name": run.name,
        "state": status if status in STATUS else "",
        "status": STATUS.get(status, status),
        "date": facts.get("Date", ""),
        "what": ", ".join(facts[name] for name in ("Base", "Method") if name in facts),
        "steps": shown(run.num_steps(), compact),
        "held_out": _held_out(before, after),
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


def _status(run: RunFiles) -> str:
    """Where it stands; a run that goes on has a summary of an earlier start."""
    return "training" if run.training else run.state


def _held_out(before: object, after: object) -> str:
    """Losses before and after, as far as they were measured."""
    return "–" if before is None and after is None else f"{shown(before, loss)} → {shown(after, loss)}"


def described(folder: Path) -> dict[str, Any]:
    """A run as its files tell it; None where they do not say."""
    run = read_run(folder)
    config, (before, after) = run.keys(), run.held_out()
    section = {name: mapping(config.get(name)) for name in ("model", "lora", "optimizer")}
    return {
        "run": str(folder),
        "status": _status(run),
        "steps": run.num_steps(),
        "eval_loss_before": before,
        "eval_loss": after,
        "train_loss": run.figure("train_loss", "loss"),
        "base": section["model"].get("path"),
        "method": config.get("method"),
        "rank": section["lora"].get("rank"),
        "learning_rate": section["optimizer"].get("learning_rate"),
        "wall_seconds": run.seconds,
        "changed": run.changed,
    }


def print_runs(runs: list[dict[str, Any]]) -> None:
    """A table of runs, as wide as the terminal; into a pipe whole."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=10_000)
    table = Table(*LISTED, box=box.SIMPLE_HEAD, pad_edge=False)
    for run in runs:
        method = f"LoRA r={run['rank']}" if run["method"] == "lora" else shown(run["method"])
        table.add_row(
            clean(run["run"]),
            clean(shown("stopped" if run["status"] == "preempted" else run["status"])),
            shown(run["steps"], compact),
            _held_out(run["eval_loss_before"], run["eval_loss"]),
            shown(run["train_loss"], loss),
            clean(Path(str(run["base"])).name),
            clean(method),
            shown(run["learning_rate"], "{:g}".format),
            shown(run["wall_seconds"], duration),
            datetime.datetime.fromtimestamp(run["changed"]).strftime("%Y-%m-%d %H:%M"),
        )
    console.print(table)
