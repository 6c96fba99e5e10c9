"""The effort report's page and picture: what each strategy costs beside what it gives. Needs matplotlib, not JAX."""

import io
import re
from pathlib import Path
from typing import Any

from jlora.atomic import write_bytes
from jlora.compare import answer_card, led
from jlora.page import clean, escape, table, write_page
from jlora.scores import METRICS

Record = dict[str, Any]

# Okabe and Ito's palette, one colour a base; what is not in it becomes the page's own colours, light or dark.
COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vP"
INK, GREY, GRID = "#222222", "#666666", "#dddddd"
VARIABLES = {INK: "var(--text)", GREY: "var(--muted)", GRID: "var(--grid)"}
SHOWN_PROMPTS = 5
# What is drawn over the strategies: figure -> title and axis.
PANELS = {
    "loss": ("Held-out loss, lower is better", "nats a token"),
    "rouge_l": ("ROUGE-L of answers, higher is better", "ROUGE-L, 0 to 1"),
    "chrf": ("chrF of answers, higher is better", "chrF, 0 to 100"),
}
MINUTES = "Held-out loss against minutes of training"
# Where a label may stand beside its point, in typographic points, the first free one of them.
PLACES = (("left", 4, 4), ("left", 4, -12), ("right", -4, 4), ("right", -4, -12), ("left", 8, -4), ("right", -8, -4))


def write_effort(folder: Path, settings: Record, results: list[Record]) -> None:
    """Write effort.html and effort.png.

    Args:
      settings, results: as `jlora.effort.effort` gives them, one base after another, each in order of effort.
    """
    bases = list(dict.fromkeys(record["base"] for record in results))
    by_base = {name: [r for r in results if r["base"] == base] for base, name in zip(bases, _short(bases), strict=True)}
    draw(by_base, folder / "effort.png")
    body = "<h2>In short</h2>"
    for name, records in by_base.items():
        body += f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(text)}</li>' for text in verdict(records))}</ul>"
    figures = [_figure(_title(key), panel_svg(by_base, key)) for key in (*PANELS, None)]
    body += f'<h2>Effort against benefit</h2><div class="grid wide">{"".join(figures)}</div>'
    for name, records in by_base.items():
        body += f"<h2>{escape(name)}</h2>{_tables(records)}"
    body += f"<h2>How it was measured</h2>{_method(settings)}<h2>Answers</h2>"
    asked = results[0]["answers"]
    for number in shown([answer["prompt"] for answer in asked]):
        first, several = asked[number], len(by_base) > 1
        said = [
            (f"{name}: {record['name']}" if several else record["name"], record["answers"][number])
            for name, records in by_base.items()
            for record in records
        ]
        body += answer_card(number, first["prompt"], first["reference"], said)
    lead = f"{settings['heldout_rows']} held-out rows, the same for every strategy; measured on {settings['device']}."
    write_page(folder / "effort.html", led("Does fine-tuning pay?", lead, body))


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
    said = [f"Bare instruction: {_quality(bare)}."]
    if shots:
        best = max(shots, key=lambda record: record["rouge_l"])
        times = best["prompt_tokens"] / bare["prompt_tokens"]
        said.append(f"{best['name'].capitalize()}: {_quality(best)}, and prompts {times:.1f} times as long.")
    if tuned:
        best = min(tuned, key=lambda record: record["loss"])
        minutes = best["training"]["seconds"] / 60
        said.append(f"{best['name'].capitalize()}: {_quality(best)}, after {minutes:.1f} minutes of training.")
        for other in shots:
            saved = (other["seconds"] - best["seconds"]) / best["generated"]
            if saved > 0:
                queries = best["training"]["seconds"] / saved
                said.append(
                    f"Against {other['name']} that training is paid back in device time after {queries:,.0f} queries."
                )
    return said


def _quality(record: Record) -> str:
    return f"loss {record['loss']:.3f}, ROUGE-L {record['rouge_l']:.3f}, chrF {record['chrf']:.1f}"


def _short(bases: list[str]) -> list[str]:
    """The last names of the bases, or all of them where two end alike."""
    names = [Path(base).name or base for base in bases]
    return names if len(set(names)) == len(names) else bases


def _tables(records: list[Record]) -> str:
    """Benefit, then effort."""
    scores = [*METRICS.items()]
    benefit = [
        [
            record["name"],
            f"{record['loss']:.4f}",
            f"{record['token_accuracy']:.1%}",
            f"{record['exact_match']:.1%}",
            f"{record['rouge_l']:.4f}",
            f"{record['chrf']:.2f}",
            f"{sum(answer['ended'] for answer in record['answers']) / record['generated']:.0%}",
        ]
        for record in records
    ]
    best: list[int | None] = [None]
    for key, least in (("loss", True), ("token_accuracy", False), *((key, False) for key, _ in scores)):
        values = [record[key] for record in records]
        pick = min(values) if least else max(values)
        best.append(values.index(pick) if len(set(values)) > 1 else None)
    heads = ["Strategy", "Held-out loss", "Tokens right", *(title for _, title in scores), "Answers that end"]
    priced = records[0]["cost"] is not None
    effort = [[record["name"], *_effort(record), *(_cost(record) if priced else ())] for record in records]
    costs = ["Training, $", "1,000 answers, $"] if priced else []
    return (
        "<h3>Benefit</h3>"
        + table(heads, benefit, [*best, None])
        + "<h3>Effort</h3>"
        + table(
            [
                "Strategy",
                "Rows used",
                "Training tokens",
                "Training minutes",
                "Prompt tokens",
                "Seconds an answer",
                *costs,
            ],
            effort,
        )
    )


def _effort(record: Record) -> list[str]:
    training = record["training"]
    trained = [f"{training['tokens']:,}", f"{training['seconds'] / 60:.1f}"] if training else ["–", "–"]
    rows = f"{record['rows'] or record['shots']:,}" if record["rows"] or record["shots"] else "–"
    return [rows, *trained, f"{record['prompt_tokens']:.0f}", f"{record['seconds'] / record['generated']:.2f}"]


def _cost(record: Record) -> list[str]:
    return [f"{record['cost']['training']:.4f}", f"{record['cost']['thousand_answers']:.4f}"]


def _method(settings: Record) -> str:
    price = settings["price"]
    said = [
        f"Rows to learn from: {settings['training_rows']:,} of {settings['train']}, in an order drawn with seed "
        f"{settings['seed']}; fewer rows are the first of more, and examples in the prompt are the first of all.",
        "Training minutes are wall time of the whole run: reading the base, compiling, held-out loss before and "
        f"after. Seconds an answer: {settings['batch_size']} prompts together on one device, at most "
        f"{settings['max_new_tokens']} tokens, greedy, without compilation.",
        "Held-out loss is that of the rows' own answers, after the strategy's prompt. Scores of answers need many "
        "rows to tell small differences from chance.",
        f"Cost: at {price:g} dollars an hour of each of {settings['devices']} device(s)."
        if price is not None
        else "No cost is shown, for no price of a device hour was given (--price).",
    ]
    if settings["left_out"]:
        said.append(f"{settings['left_out']} training rows equal a held-out row and were left out.")
    return "".join(f"<p>{escape(text)}</p>" for text in said)


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"


def _title(key: str | None) -> str:
    return MINUTES if key is None else PANELS[key][0]


def draw(by_base: dict[str, list[Record]], path: Path) -> None:
    """All panels as one picture."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, key in zip(axes.flat, (*PANELS, None), strict=True):
        _panel(axis, by_base, key)
        axis.set_title(_title(key), loc="left", fontsize=11, color=INK)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, facecolor="white")
    write_bytes(path, file.getvalue())
    pyplot.close(figure)


def panel_svg(by_base: dict[str, list[Record]], key: str | None) -> str:
    """One panel as SVG for a page, in the page's colours."""
    pyplot = _pyplot()
    # Ids are unique within a page, and text stays text.
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"panel {key}", "font.family": "sans-serif"}):
        figure, axis = pyplot.subplots(figsize=(4.6, 3.1), layout="constrained")
        _panel(axis, by_base, key)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        pyplot.close(figure)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(_title(key))}"', 1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{key or 'minutes'}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _panel(axis: Any, by_base: dict[str, list[Record]], key: str | None) -> None:
    """One figure over the strategies in order of effort; without a key the loss over minutes of training."""
    order = list(dict.fromkeys((r["shots"], r["rows"], r["short"]) for records in by_base.values() for r in records))
    names = [short for _, _, short in sorted(order, key=lambda one: (one[1], one[0]))]
    labelled: list[tuple[float, float, str]] = []
    for number, (name, records) in enumerate(by_base.items()):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        style["label"] = clean(name).replace("$", "\\$")  # no formula
        if key is None:
            points = [((r["training"] or {}).get("seconds", 0.0) / 60, r["loss"], r["short"]) for r in records]
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], linestyle="", markersize=5, **style)
            labelled += points
        else:
            xs = [names.index(record["short"]) for record in records]
            axis.plot(xs, [record[key] for record in records], linewidth=1.5, markersize=5, **style)
    if key is None:
        axis.set_xlabel("minutes of training (wall time)", fontsize=10, color=GREY)
        axis.set_ylabel("nats a token", fontsize=10, color=GREY)
        axis.margins(x=0.12, y=0.15)
    else:
        axis.set_xticks(range(len(names)), names)
        axis.set_xlabel("bare, examples in the prompt, rows trained on", fontsize=10, color=GREY)
        axis.set_ylabel(PANELS[key][1], fontsize=10, color=GREY)
        if key != "loss":
            # From zero, so that a small difference of scores looks small.
            axis.set_ylim(0, 1.1 * max(r[key] for records in by_base.values() for r in records) or 1)
    axis.tick_params(axis="both", length=0, colors=GREY, labelsize=10)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(GRID)
    if len(by_base) > 1:
        axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    if key is None:
        _label(axis, labelled)


def _label(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Names beside their points, where they cover neither another name nor a point, if there is such a place."""
    axis.figure.draw_without_rendering()  # the axes have their final scale only then
    taken = [axis.transData.transform((x, y)) for x, y, _ in points]
    boxes: list[Any] = []
    for x, y, text in points:
        for side, right, up in PLACES:
            style = {"textcoords": "offset points", "fontsize": 9, "color": GREY, "ha": side}
            note = axis.annotate(text, (x, y), (right, up), **style)
            box = note.get_window_extent()
            if not box.count_overlaps(boxes) and not any(box.contains(*point) for point in taken):
                break
            note.remove()
        else:
            box = axis.annotate(text, (x, y), PLACES[0][1:], **style | {"ha": "left"}).get_window_extent()
        boxes.append(box)
