"""The page of `evaluate --html`: several models' answers to the same prompts side by side, and how they score."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora.data.turns import Turn
from jlora.files.text import counted
from jlora.reports.cards import Card, Cell, marked, whole
from jlora.reports.page import render, write_page

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
}
Table = tuple[list[str], list[list[str]], list[int | None]]


def write_comparison(
    path: Path, title: str, results: list[dict[str, Any]], prompts: Sequence[tuple[Sequence[Turn], str]]
) -> None:
    """Write the page whole or not at all.

    Args:
      results: one a model: {"model", "answers": [{"text", "rouge_l", "chrf", "exact_match", "ended"}, ...]} with the
        figures that are there of COLUMNS, and "rows" and "tokens" that the loss is over.
      prompts: the turns of each, and the reference.

    Raises:
      ConfigError: it cannot be written there.
    """
    first = results[0]
    lead = (
        f"{counted(len(prompts), 'prompt')}, each answered greedily by {len(results)} model{'s' * (len(results) > 1)}."
    )
    if "tokens" in first:
        lead += f" Loss and tokens right: over {first['tokens']:,} trained tokens of {first['rows']:,} rows."
    summary = tabulated("Model", COLUMNS, [(result["model"], result) for result in results])
    cards = [
        Card(f"Prompt {k + 1}", turns, said(reference, [(result["model"], result["answers"][k]) for result in results]))
        for k, (turns, reference) in enumerate(prompts)
    ]
    page = render("answers.html", title=title, lead=lead, summary=summary, cards=cards)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, page)


def tabulated(name: str, columns: Columns, results: list[tuple[str, dict[str, Any]]]) -> Table:
    """Heads, rows, and the row of each column's best where not all are equal; a column without a figure is left out."""
    heads, rows = [name], [[label] for label, _ in results]
    best: list[int | None] = [None]
    for key, (head, form, pick) in columns.items():
        values = [figures.get(key) for _, figures in results]
        known = [value for value in values if value is not None]
        if known:
            heads.append(head)
            best.append(values.index(pick(known)) if pick and len({*known}) > 1 else None)
            for row, value in zip(rows, values, strict=True):
                row.append("–" if value is None else form.format(value))
    return heads, rows, best


def said(reference: str, answers: list[tuple[str, dict[str, Any]]]) -> list[Cell]:
    """What a row and models say to one prompt."""
    cells = [Cell("Reference", whole(reference), wanted=True)]
    for name, answer in answers:
        scores = f"ROUGE-L {answer['rouge_l']:.3f}, chrF {answer['chrf']:.1f}"
        scores += ", equal to the reference" if answer["exact_match"] else ""
        cells.append(Cell(name, marked(answer["text"], reference), scores, cut=not answer["ended"]))
    return cells
