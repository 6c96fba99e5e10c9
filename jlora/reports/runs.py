"""Several runs in one HTML page: figures side by side, curves over each other, and the keys in which they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jlora.charts import (
    Line,
    answers,
    chart,
    compact,
    drawable,
    duration,
    mapping,
    page,
    perplexity,
    shown,
    size,
    smoothed,
    thinned,
)
from jlora.page import escape
from jlora.run_files import RunFiles, read_run

# Lines that a reader still tells apart.
MOST_RUNS = 8
CURVES = (
    ("loss", "Training loss", "nats per token"),
    ("eval_loss", "Held-out loss", "nats per token"),
    ("learning_rate", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm", "global L2 norm"),
    ("tokens_per_second", "Speed", "tokens per second"),
    ("host_bytes", "Host memory", "GiB"),
    ("device_bytes", "Device memory", "GiB"),
)


def compare(folders: list[Path]) -> str:
    """The page of some run folders, in their order."""
    runs = [read_run(folder) for folder in folders]
    plain = _names(runs, folders)
    names = [escape(name) for name in plain]
    steps = [drawable(record["step"]) or 0.0 for run in runs for record in run.records]
    x_range = (min([0.0, *steps]), max([1.0, *steps]))
    curves = ""
    for key, title, unit in CURVES:
        lines = [_line(number, name, run, key) for number, (name, run) in enumerate(zip(names, runs, strict=True))]
        if key != "device_bytes" or any(points for _, _, points in lines):
            curves += chart(title, unit, lines, x_range)
    best = _best(runs, names)
    return page(
        f"{len(runs)} runs compared",
        f'<h1>{len(runs)} runs compared</h1><p class="muted">{best}</p>',
        f"""<h2>Key figures</h2>{_figures(runs, names)}
<h2>Curves</h2><div class="charts">{curves}</div>
<h2>What differs in their configurations</h2>{_differences(runs, names)}
{_samples(runs, plain)}""",
    )


def _names(runs: list[RunFiles], folders: list[Path]) -> list[str]:
    """The folders' names, with their parents' where two are alike."""
    plain = [run.name for run in runs]
    paths = [folder.resolve() for folder in folders]
    return [
        name if plain.count(name) == 1 else f"{path.parent.name}/{path.name}"
        for name, path in zip(plain, paths, strict=True)
    ]


def _line(number: int, name: str, run: RunFiles, key: str) -> Line:
    points = run.series[key]
    if key == "loss" and len(points) >= 5:
        points = smoothed(points, max(5, len(points) // 20))
    return f"c{number}", name, thinned(points)


def _best(runs: list[RunFiles], names: list[str]) -> str:
    after = [(value, name) for run, name in zip(runs, names, strict=True) if (value := drawable(run.held_out()[1]))]
    if len(after) < 2:
        return "Lines of training loss are smoothed."
    value, name = min(after)
    return f"Lowest held-out loss: {name}, {value:.4f}. Lines of training loss are smoothed."


def _grid(kind: str, head: list[str], rows: list[list[str]]) -> str:
    """A table whose rows become cards on a narrow screen; cells are HTML already."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{name}"><span>{cell}</span></td>' for name, cell in zip(head, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<table class="grid-table {kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _figures(runs: list[RunFiles], names: list[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        (before, after), loss, summary = run.held_out(), "{:.4f}".format, run.summary
        memory = mapping(summary.get("peak_memory_bytes"))
        rows.append(
            [
                name,
                f"{shown(before, loss)} → {shown(after, loss)}",
                shown(after, perplexity),
                shown(run.figure("train_loss", "loss"), loss),
                shown(summary.get("steps") or max((r["step"] for r in run.records), default=None)),
                shown(run.figure("tokens_per_second", "tokens_per_second"), compact),
                shown(summary.get("wall_seconds"), duration),
                shown(memory.get("host"), size),
                shown(memory.get("device"), size),
                shown(summary.get("trainable_params"), compact),
            ]
        )
    head = ["Run", "Held-out loss", "Held-out perplexity", "Train loss", "Steps", "Tokens/s", "Wall time"]
    return _grid("figures", [*head, "Peak host memory", "Peak device memory", "Trained parameters"], rows)


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict) and tree:
        return {key: text for name, inner in tree.items() for key, text in _flat(inner, f"{prefix}{name}.").items()}
    text = yaml.safe_dump(tree, default_flow_style=True, allow_unicode=True, width=10**6)
    return {prefix.removesuffix("."): text.strip().removesuffix("...").strip()}


def _differences(runs: list[RunFiles], names: list[str]) -> str:
    configs = []
    for run in runs:
        try:
            configs.append(_flat(yaml.safe_load(run.config) or {}))
        except yaml.YAMLError:
            configs.append({})
    keys = list(dict.fromkeys(key for config in configs for key in config if key != "output_dir"))
    rows = [[config.get(key, "–") for config in configs] for key in keys]
    differing = [
        [escape(key), *map(escape, row)] for key, row in zip(keys, rows, strict=True) if key and len(set(row)) > 1
    ]
    return (
        _grid("differences", ["Key", *names], differing)
        if differing
        else '<p class="muted">Nothing but the folder.</p>'
    )


def _samples(runs: list[RunFiles], names: list[str]) -> str:
    """The answers to each prompt of the first run that others were given, too."""
    told: list[dict[str, dict[str, Any]]] = []
    for run in runs:
        found = run.summary.get("samples")
        samples = [mapping(sample) for sample in (found if isinstance(found, list) else [])]
        told.append({str(sample.get("prompt")): sample for sample in samples if sample})
    out = ""
    for prompt, sample in told[0].items():
        after = [(name, mine[prompt].get("after")) for name, mine in zip(names, told, strict=True) if prompt in mine]
        if len(after) > 1:
            before = [(f"Before training ({names[0]})", sample.get("before"))]
            texts = answers([*before, *((f"After: {name}", text) for name, text in after)])
            out += f'<div class="sample">{answers([("Prompt", prompt)])}<div class="pair">{texts}</div></div>'
    return f"<h2>Samples</h2>{out}" if out else ""
