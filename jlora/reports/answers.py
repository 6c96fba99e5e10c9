"""Answers to the same prompts side by side, and how they score: the page of `evaluate --html`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora.data.speakers import Turn
from jlora.files.text import counted
from jlora.reports.cards import Card, Cell, marked, whole
from jlora.reports.page import link, render, write_page

# Figure -> its column's head, how it is written, and which of all is the best.
Columns = dict[str, tuple[str, str, Callable[..., float] | None]]
SCORES: Columns = {
    "exact_match": ("Exact match", "{:.1%}", max),
    "rouge_l": ("ROUGE-L", "{:.4f}", max),
    "chrf": ("chrF", "{:.2f}", max),
}
COLUMNS: Columns = {
    "loss": ("Loss, nats a token", "{:.4f}", min),
    "perplexity": ("Perplexity", "{:.3f}", min),
    "token_accuracy": ("Tokens right", "{:.1%}", max),
    **SCORES,
    "mean_tokens": ("Tokens an answer", "{:.1f}", None),
    "ended": ("Answers that end", "{:.0%}", None),
}
# A cell that is not a text alone has its spread beside it.
Value = str | tuple[str, str]
Table = tuple[list[str], list[list[Value]], list[int | None]]


def write_comparison(
    path: Path, title: str, results: list[dict[str, Any]], prompts: Sequence[tuple[Sequence[Turn], str | None]]
) -> None:
    """Write the page whole or not at all.

    Args:
      results: one a model: {"model", "answers": [{"text", "rouge_l", "chrf", "exact_match", "ended"}, ...]} with the
        figures that are there of COLUMNS and their "intervals", the "adapter", and "rows" and "tokens" that the loss
        is over.
      prompts: the turns of each, and the reference, where there is one.

    Raises:
      ConfigError: it cannot be written there.
    """
    first = results[0]
    lead = f"{counted(len(prompts), 'prompt')}, each answered by {counted(len(results), 'model')}."
    if "tokens" in first:
        lead += f" Loss and tokens right: over {first['tokens']:,} trained tokens of {first['rows']:,} rows."
    if "intervals" in first:
        lead += " Small: 95 % intervals over these answers; a score is green where its interval holds no other model's."
    cards = [
        _card(k, turns, reference, [(result["model"], result["answers"][k]) for result in results])
        for k, (turns, reference) in enumerate(prompts)
    ]
    kinds = [card.kind for card in cards]
    page = render(
        "answers.html",
        title=title,
        lead=lead,
        summary=tabulated("Model", COLUMNS, [(result["model"], result) for result in results]),
        links=[_run_page(path, result.get("adapter")) for result in results],
        cards=cards,
        wrong=len(kinds) - kinds.count("right"),
        mixed=kinds.count("mixed"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, page)


def tabulated(name: str, columns: Columns, results: list[tuple[str, dict[str, Any]]]) -> Table:
    """Heads, rows, and the row of each column's best where not all are equal; a column without a figure is left out."""
    heads = [name]
    best: list[int | None] = [None]
    rows: list[list[Value]] = [[label] for label, _ in results]
    figures = [found for _, found in results]
    for key, (head, form, pick) in columns.items():
        values = [found.get(key) for found in figures]
        if all(value is None for value in values):
            continue
        heads.append(head)
        best.append(_best(key, figures, pick) if pick else None)
        for row, found, value in zip(rows, figures, values, strict=True):
            text, spread = "–" if value is None else form.format(value), found.get("intervals", {}).get(key)
            row.append(text if spread is None else (text, " – ".join(map(form.format, spread))))
    return heads, rows, best


def _best(key: str, figures: list[dict[str, Any]], pick: Callable[..., float]) -> int | None:
    """Which is the best, unless all are equal, or so few answers may have made it so: its interval holds another's."""
    values = {number: found[key] for number, found in enumerate(figures) if found.get(key) is not None}
    first = next(number for number, value in values.items() if value == pick(values.values()))
    spread, judged = figures[first].get("intervals", {}).get(key), key in figures[first].get("intervals", {})
    others = [value for number, value in values.items() if number != first]
    chance = judged and (spread is None or any(spread[0] <= value <= spread[1] for value in others))
    return None if chance or len({*values.values()}) == 1 else first


def said(reference: str | None, answers: list[tuple[str, dict[str, Any]]]) -> list[Cell]:
    """What a row and models say to one prompt; without a row's answer, words are marked against the first model's."""
    cells = [] if reference is None else [Cell("Reference", whole(reference), wanted=True)]
    for number, (name, answer) in enumerate(answers):
        scores = f"ROUGE-L {answer['rouge_l']:.3f}, chrF {answer['chrf']:.1f}" if "rouge_l" in answer else ""
        equal = "equal to the reference" if answer.get("exact_match") else ""
        other = reference if reference is not None else answers[0][1]["text"] if number else None
        parts = whole(answer["text"]) if other is None else marked(answer["text"], other)
        cells.append(Cell(name, parts, ", ".join(filter(None, (scores, equal))), cut=not answer["ended"]))
    return cells


def _card(number: int, turns: Sequence[Turn], reference: str | None, answers: list[tuple[str, dict[str, Any]]]) -> Card:
    right = [bool(answer.get("exact_match")) for _, answer in answers]
    kind = "right" if all(right) else "mixed" if any(right) else ""
    return Card(f"Prompt {number + 1}", turns, said(reference, answers), kind)


def _run_page(page: Path, adapter: str | None) -> str | None:
    """Where the page of an adapter's run lies, seen from another; None where there is none."""
    known = [] if adapter is None else [Path(adapter) / "report.html", Path(adapter).parent / "report.html"]
    return next((link(page, target) for target in known if target.is_file()), None)
