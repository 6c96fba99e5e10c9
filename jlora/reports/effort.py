"""The effort report's page and picture: what each strategy costs beside what it gives. Needs matplotlib, not JAX."""

import io
import math
from itertools import cycle
from pathlib import Path
from typing import Any

from jlora.data.speakers import Turn
from jlora.files.atomic import write_bytes
from jlora.files.paths import short_names
from jlora.reports.answers import SCORES, Card, Columns, said, tabulated
from jlora.reports.charts import Chart, Line, chart
from jlora.reports.figures import drawable
from jlora.reports.page import clean, render, write_page

Record = dict[str, Any]

# One style a base; in the picture Okabe and Ito's palette.
KINDS = tuple(f"c{number}" for number in range(6))
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vP"
INK, GREY, GRID = "#222222", "#666666", "#dddddd"
SHOWN_PROMPTS = 5
# What is drawn over the strategies: figure -> title and axis.
PANELS = {
    "loss": ("Held-out loss, lower is better", "nats a token"),
    "rouge_l": ("ROUGE-L of answers, higher is better", "ROUGE-L, 0 to 1"),
    "chrf": ("chrF of answers, higher is better", "chrF, 0 to 100"),
}
BENEFIT: Columns = {
    "loss": ("Held-out loss", "{:.4f}", min),
    "token_accuracy": ("Tokens right", "{:.1%}", max),
    **SCORES,
    "ended": ("Answers that end", "{:.0%}", None),
}
EFFORT: Columns = {
    "rows": ("Rows used", "{:,}", None),
    "tokens": ("Training tokens", "{:,}", None),
    "minutes": ("Training minutes", "{:.1f}", None),
    "prompt_tokens": ("Prompt tokens", "{:.0f}", None),
    "each": ("Seconds an answer", "{:.2f}", None),
    "training": ("Training, $", "{:.4f}", None),
    "thousand_answers": ("1,000 answers, $", "{:.4f}", None),
}


def write_effort(folder: Path, settings: Record, results: list[Record]) -> None:
    """Write effort.html and effort.png.

    Args:
      settings, results: as `jlora.evaluation.effort` gives them, one base after another, each in order of effort.
    """
    bases = list(dict.fromkeys(record["base"] for record in results))
    by_base = {
        name: [r for r in results if r["base"] == base] for base, name in zip(bases, short_names(bases), strict=True)
    }
    charts = panels(by_base)
    draw(charts, folder / "effort.png")
    asked = results[0]["answers"]
    named = [
        (f"{name}: {record['name']}" if len(by_base) > 1 else record["name"], record)
        for name, records in by_base.items()
        for record in records
    ]
    page = render(
        "effort.html",
        title="Does fine-tuning pay?",
        verdicts={name: verdict(records) for name, records in by_base.items()},
        charts=charts,
        tables={name: _tables(records) for name, records in by_base.items()},
        settings=settings,
        cards=[
            Card(
                f"Prompt {k + 1}",
                [Turn("", asked[k]["prompt"])],
                said(asked[k]["reference"], [(name, r["answers"][k]) for name, r in named]),
            )
            for k in shown([answer["prompt"] for answer in asked])
        ],
    )
    write_page(folder / "effort.html", page)


def shown(prompts: list[str]) -> list[int]:
    """The prompts whose answers are printed: one of each instruction (a first line), then the first of all."""
    kinds: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        kinds.setdefault(prompt.partition("\n")[0], number)
    return sorted([*dict.fromkeys([*kinds.values(), *range(len(prompts))])][:SHOWN_PROMPTS])


def verdict(records: list[Record]) -> list[str]:
    """What the figures of one base say, in sentences."""
    bare, tuned = records[0], [record for record in records if record["rows"]]
    shots = [record for record in records if record["shots"]]
    told = [f"Bare instruction: {_quality(bare)}."]
    if shots:
        best = max(shots, key=lambda record: record["rouge_l"])
        times = best["prompt_tokens"] / bare["prompt_tokens"]
        told.append(f"{best['name'].capitalize()}: {_quality(best)}, and prompts {times:.1f} times as long.")
    if tuned:
        best = min(tuned, key=lambda record: record["loss"])
        minutes = best["training"]["seconds"] / 60
        told.append(f"{best['name'].capitalize()}: {_quality(best)}, after {minutes:.1f} minutes of training.")
        for other in shots:
            saved = (other["seconds"] - best["seconds"]) / best["generated"]
            if saved > 0:
                queries = best["training"]["seconds"] / saved
                told.append(
                    f"Against {other['name']} that training is paid back in device time after {queries:,.0f} queries."
                )
    return told


def _quality(record: Record) -> str:
    return f"loss {record['loss']:.3f}, ROUGE-L {record['rouge_l']:.3f}, chrF {record['chrf']:.1f}"


def _tables(records: list[Record]) -> list[Any]:
    """Benefit, then effort."""
    benefit, effort = [], []
    for record in records:
        ended = sum(answer["ended"] for answer in record["answers"]) / record["generated"]
        training = record["training"] or {"tokens": None, "seconds": None}
        spent = {
            "rows": record["rows"] or record["shots"] or None,
            "tokens": training["tokens"],
            "minutes": training["seconds"] and training["seconds"] / 60,
            "prompt_tokens": record["prompt_tokens"],
            "each": record["seconds"] / record["generated"],
        }
        benefit.append((record["name"], record | {"ended": ended}))
        effort.append((record["name"], spent | (record["cost"] or {})))
    return [tabulated("Strategy", BENEFIT, benefit), tabulated("Strategy", EFFORT, effort)]


def panels(by_base: dict[str, list[Record]]) -> list[Chart]:
    """Each figure over the strategies in order of effort, then the loss over minutes of training."""
    ways = sorted({(r["rows"], r["shots"], r["short"]) for records in by_base.values() for r in records})
    names, across = [short for *_, short in ways], "bare, examples in the prompt, rows trained on"
    charts = []
    for key, (title, unit) in PANELS.items():
        lines = []
        for kind, (base, records) in zip(cycle(KINDS), by_base.items(), strict=False):
            points = [(float(names.index(r["short"])), drawable(r[key])) for r in records]
            lines.append(Line(kind, base, points, marked=True))
        charts.append(chart(title, unit, lines, (-0.4, len(names) - 0.6), across=across, x_names=names))
    most, lines = 0.0, []
    for kind, (base, records) in zip(cycle(KINDS), by_base.items(), strict=False):
        minutes = [(r["training"] or {"seconds": 0.0})["seconds"] / 60 for r in records]
        points = [(x, drawable(r["loss"])) for x, r in zip(minutes, records, strict=True)]
        lines.append(Line(kind, base, points, marked=True, joined=False, names=[r["short"] for r in records]))
        most = max(most, *minutes)
    title, x_range = "Held-out loss against minutes of training", (-0.2 * (most or 1), 1.12 * (most or 1))
    across = "minutes of training (wall time)"
    return [*charts, chart(title, PANELS["loss"][1], lines, x_range, across=across, x_least=0.0)]


def draw(charts: list[Chart], path: Path) -> None:
    """All panels as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout=ConstrainedLayoutEngine(h_pad=0.12))
    for axis, it in zip(axes.flat, charts, strict=True):
        axis.set(xlim=(0, it.width), ylim=(it.height, 0))
        axis.set_axis_off()
        axis.set_title(it.title, loc="left", fontsize=11, color=INK)
        axis.text(4, 14, it.unit, color=GREY)
        axis.text((it.left + it.right) / 2, it.height - 2, it.across, color=GREY, ha="center")
        for y, label in it.y_ticks:
            axis.hlines(y, it.left, it.right, color=GRID, linewidth=0.8)
            axis.text(it.left - 7, y, label, color=GREY, ha="right", va="center")
        for x, label in it.x_ticks:
            axis.text(x, it.base + 18, label, color=GREY, ha="center")
        for number, curve in enumerate(it.curves):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            spots = [spot for run in curve.runs for spot in [*run, (math.nan, math.nan)]]  # which parts the runs
            spots = spots or [(x, y) for x, y, _ in curve.dots]
            label = clean(curve.label).replace("$", "\\$")  # no formula
            style |= {"label": label, "linestyle": "-" if curve.runs else ""}
            axis.plot(*zip(*spots, strict=True), markersize=5, **style)
        for x, y, anchor, name in it.names:
            axis.text(x, y, name, color=GREY, fontsize=9, ha="left" if anchor == "start" else "right")
    if len(charts[0].curves) > 1:
        known = axes.flat[0].get_legend_handles_labels()
        figure.legend(*known, loc="outside lower center", ncols=2, frameon=False, labelcolor=INK)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, facecolor="white")
    write_bytes(path, file.getvalue())
    pyplot.close(figure)
