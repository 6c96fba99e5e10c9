"""Several runs in one HTML page: figures side by side, curves over each other, and the keys in which they differ."""

from dataclasses import replace
from pathlib import Path

from jlora.config import yaml_scalar
from jlora.config.sections import dotted
from jlora.files.paths import short_names
from jlora.reports.cards import Card, sample_cell, turns_of
from jlora.reports.charts import MOST_DOTS, Chart, Line, chart, smoothed
from jlora.reports.figures import compact, drawable, duration, loss, memory, perplexity, shown
from jlora.reports.page import render
from jlora.reports.run_files import RunFiles, read_run

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


def compare(folders: list[Path]) -> str:
    """The page of some run folders, in their order."""
    names = short_names([folder.resolve() for folder in folders])
    runs = [replace(read_run(folder), name=name) for folder, name in zip(folders, names, strict=True)]
    after = sorted((value, run.name) for run in runs if (value := drawable(run.held_out()[1])))
    lowest = f"Lowest held-out loss: {after[0][1]}, {after[0][0]:.4f}. " if len(after) > 1 else ""
    return render(
        "runs.html",
        title=f"{len(runs)} runs compared",
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
        shown(summary.get("wall_seconds"), duration),
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
