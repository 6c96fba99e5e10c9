"""The page of `evaluate --html`: several models' answers to the same prompts side by side, and how they score."""

from pathlib import Path
from typing import Any

from jlora.answers import Question
from jlora.page import CSS, escape, frame, pre, table, write_page
from jlora.scores import METRICS

# Figure -> its column, how it is written, and whether the least is the best.
COLUMNS: dict[str, tuple[str, str, bool]] = {
    "loss": ("Loss, nats a token", "{:.4f}", True),
    "perplexity": ("Perplexity", "{:.3f}", True),
    "token_accuracy": ("Tokens right", "{:.1%}", False),
    "exact_match": (METRICS["exact_match"], "{:.1%}", False),
    "rouge_l": (METRICS["rouge_l"], "{:.4f}", False),
    "chrf": (METRICS["chrf"], "{:.2f}", False),
    "mean_tokens": ("Tokens an answer", "{:.1f}", False),
}
UNRANKED = ("mean_tokens",)


def led(title: str, lead: str, body: str) -> str:
    """A whole page of HTML `body`, with a lead under its title, plain text both."""
    return frame(title, CSS, f'<h1>{escape(title)}</h1><p class="muted">{escape(lead)}</p>', body)


def write_comparison(path: Path, title: str, results: list[dict[str, Any]], questions: list[Question]) -> None:
    """Write the page.

    Args:
      results: one a model: {"model", "answers": [{"text", "rouge_l", "chrf", "exact_match", "ended"}, ...]} with the
        figures that are there of COLUMNS, and "rows" and "tokens" that the loss is over.
    """
    first = results[0]
    lead = f"{len(questions)} prompts, each answered greedily by {len(results)} model{'s' * (len(results) > 1)}."
    if "tokens" in first:
        lead += f" Loss and tokens right: over {first['tokens']:,} trained tokens of {first['rows']:,} rows."
    body = f"<h2>Summary</h2>{summary_table('Model', [(r['model'], r) for r in results])}<h2>Answers</h2>"
    for number, question in enumerate(questions):
        answers = [(result["model"], result["answers"][number]) for result in results]
        body += answer_card(number, question.shown, question.reference, answers)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, led(title, lead, body))


def summary_table(name: str, results: list[tuple[str, dict[str, Any]]]) -> str:
    """The figures of each, the best of a column marked where not all are equal."""
    columns = {key: column for key, column in COLUMNS.items() if any(key in figures for _, figures in results)}
    rows = [[label, *(_write(figures.get(key), columns[key][1]) for key in columns)] for label, figures in results]
    best: list[int | None] = [None]
    for key, (_, _, least) in columns.items():
        values = [(figures[key], number) for number, (_, figures) in enumerate(results) if key in figures]
        differ = key not in UNRANKED and len({value for value, _ in values}) > 1
        best.append((min if least else max)(values, key=lambda pair: pair[0])[1] if differ else None)
    return table([name, *(column[0] for column in columns.values())], rows, best)


def answer_card(number: int, prompt: str, reference: str, answers: list[tuple[str, dict[str, Any]]]) -> str:
    """One prompt with its reference and each model's answer, as HTML."""
    cells = f'<div class="cell reference"><h3>Reference</h3>{pre(reference)}</div>'
    for model, answer in answers:
        cut = "" if answer["ended"] else ", cut at the longest length"
        scores = f"ROUGE-L {answer['rouge_l']:.3f}, chrF {answer['chrf']:.1f}"
        scores += ", equal to the reference" if answer["exact_match"] else ""
        cells += f'<div class="cell"><h3>{escape(model)}</h3>{pre(answer["text"])}<small>{scores}{cut}</small></div>'
    return f'<article><small>Prompt {number + 1}</small>{pre(prompt)}<div class="grid">{cells}</div></article>'


def _write(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
