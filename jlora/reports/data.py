"""The data as one HTML page that needs nothing else: figures, checks, lengths, and rows coloured by what is trained.

Knows nothing of how figures are found.
"""

from itertools import groupby
from typing import Any, get_args

from jlora.data.checks import Level
from jlora.data.preview import Piece, Shown
from jlora.reports import page
from jlora.reports.cards import Card, Cell, marked
from jlora.reports.charts import Chart, chart

Table = tuple[list[str], list[list[str]]]
COUNTS = {
    "rows": "rows read", "examples": "sequences", "tokens": "tokens", "trained_tokens": "trained tokens",
    "truncated": "rows cut off", "duplicates": "exact copies",
}  # fmt: skip
LENGTHS = {"min": "shortest", "median": "median", "p90": "90 % at most", "max": "longest"}

# How strong the colour of a token is whose loss hardly counts, in per cent of that of the one which counts most.
FAINT = 25
# Of checks, the worst first.
LEVELS = get_args(Level)


def render(title: str, report: dict[str, Any], rows: list[Shown]) -> str:
    """The page of a report (`jlora.reports.rows.Seen`) and its first rows.

    Args:
      title: such as the config's name.
    """
    sets = {name: report[name] for name in ("train", "eval") if report[name] is not None}
    shown = [piece for row in rows for sequence in row.sequences for piece in sequence]
    most = max((piece.weight for piece in shown), default=1.0)
    pieces = [[_runs(sequence, max(most, 1.0)) for sequence in row.sequences] for row in rows]
    return page.render(
        "data.html",
        name=title,
        checks=sorted(report["checks"], key=lambda found: LEVELS.index(found["level"])),
        near=[_near(**pair) for pair in report["near"]],
        train=report["train"],
        held_out=report["eval"],
        charts=[_lengths(f"data.{name}", found) for name, found in sets.items()],
        rows=_rows(sets),
        sources=_sources(report["train"]["sources"]),
        batches=_batches(report["train"]["batches"]),
        kinds={piece.kind for piece in shown},
        weighted=any(piece.weight not in (0.0, most) for piece in shown),
        first=list(zip(rows, pieces, strict=True)),
    )


def _runs(sequence: list[Piece], most: float) -> list[tuple[str, int, list[Piece]]]:
    """Pieces that look alike and follow each other: their classes, and how strong their colour is, in per cent."""

    def look(piece: Piece) -> tuple[str, int]:
        shade = FAINT + (100 - FAINT) * piece.weight / most if piece.part == "trained" else 100
        return f"{piece.part} {piece.kind}".strip(), round(shade)

    return [(*looks, list(run)) for looks, run in groupby(sequence, look)]


def _near(places: list[str], share: float, texts: list[str]) -> Card:
    """A held-out sequence and a training one, with the words marked that are not in both."""
    pairs = zip(places, texts, reversed(texts), strict=True)
    return Card(f"about {share:.0%} alike", [], [Cell(place, marked(text, other)) for place, text, other in pairs])


def _rows(sets: dict[str, dict[str, Any]]) -> Table:
    reasons = sorted({reason for found in sets.values() for reason in found["dropped"]})
    rows = [[name, *(f"{found[key]:,}" for found in sets.values())] for key, name in COUNTS.items()]
    if "held_out" in sets["train"]:
        rows.insert(1, ["of them held out", f"{sets['train']['held_out']:,}", *[""] * (len(sets) - 1)])
    rows += [[f"tokens, {k}", *(f"{found['lengths'][key]:,}" for found in sets.values())] for key, k in LENGTHS.items()]
    rows += [[f"dropped: {k}", *(f"{found['dropped'].get(k, 0):,}" for found in sets.values())] for k in reasons]
    return ["", *(f"data.{name}" for name in sets)], rows


def _sources(sources: list[dict[str, Any]]) -> Table:
    rows = []
    for each in sources:
        weight = "–" if each["weight"] is None else f"{each['weight']:g}"
        rows.append([each["path"], weight, *(f"{each[key]:,}" for key in ("read", "examples", "first_epoch"))])
    return ["source", "weight", "rows", "sequences", "in epoch 1"], rows


def _batches(counts: dict[str, int]) -> Table:
    kinds = ("packed", "padded")
    rows = [["batches", *(f"{counts[kind]:,}" for kind in kinds)]]
    rows.append(["tokens worked through", *(f"{counts[f'{kind}_tokens']:,}" for kind in kinds)])
    rows.append(["of them not padding", *(f"{counts['tokens'] / counts[f'{kind}_tokens']:.1%}" for kind in kinds)])
    return ["", *kinds], rows


def _lengths(name: str, found: dict[str, Any]) -> Chart:
    """The histogram of lengths: sequences over tokens."""
    bars = [(low, high, count, f"{low:,} to {high - 1:,} tokens: {count:,}") for low, high, count in found["histogram"]]
    title, end = f"{name}: {found['examples']:,} sequences", found["histogram"][-1][1]
    return chart(title, "sequences", [], (0, end), across="tokens in a sequence", bars=bars)
