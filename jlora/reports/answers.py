"""Answers to a prompt side by side, as cards, and how they score: the pages of `evaluate --html`, and of their files.

Knows nothing of models.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jlora.data.formats import format_of
from jlora.data.prompts import reference_answer
from jlora.data.row import BadRow
from jlora.data.speakers import Turn
from jlora.errors import DataError
from jlora.files.paths import short_names
from jlora.files.text import counted
from jlora.files.theirs import MAX_LOG, text_of_theirs
from jlora.reports import intervals
from jlora.reports.figures import mapping
from jlora.reports.page import link, render, write_page
from jlora.reports.run_files import parse

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

# Models whose answers fit side by side.
MOST_FILES = 4
# What a row asks with, none of which is its answer; and who answers in a conversation.
ASKING, ANSWERING = ("system", "instruction", "input", "prompt", "text"), ("assistant", "gpt")
# Words and other characters, with the space behind them; writing without spaces goes character by character.
_WORDS = re.compile("(?:[^\\W\u2e80-\u9fff]+|\\S)\\s*|\\s+")
# Longer texts are not compared word by word, nor those that have less than this share of their words in common.
MOST_WORDS, LEAST_ALIKE = 500, 0.5


class Part(NamedTuple):
    """Some words of a text."""

    text: str
    differs: bool


@dataclass(frozen=True)
class Cell:
    """A text, and who wrote it.

    Attributes:
      note: such as its scores.
      cut: it goes on, but was cut at the most tokens.
      wanted: it is the row's own. apart: of many, it is not one of those to be compared.
    """

    name: str
    parts: Sequence[Part]
    note: str = ""
    cut: bool = False
    wanted: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Card:
    """A prompt with its answers. `kind`: by which a page hides it."""

    name: str
    turns: Sequence[Turn]
    cells: Sequence[Cell]
    kind: str = ""


def whole(text: Any) -> list[Part]:
    """A text of which nothing is marked."""
    return [Part("" if text is None else str(text), False)]


def marked(text: Any, other: Any) -> list[Part]:
    """A text with the words marked that another does not have there, if the two have most in common."""
    words, others = _WORDS.findall(str(text)), _WORDS.findall(str(other))
    if not words or max(len(words), len(others)) > MOST_WORDS:
        return whole(text)
    bare, bare_others = ([word.strip() for word in each] for each in (words, others))
    differs = [True] * len(words)
    for start, _, length in SequenceMatcher(None, bare, bare_others, autojunk=False).get_matching_blocks():
        differs[start : start + length] = [False] * length
    if sum(differs) > (1 - LEAST_ALIKE) * len(words):
        return whole(text)
    runs = groupby(zip(words, differs, strict=True), lambda word: word[1])
    return [Part("".join(word for word, _ in run), mark) for mark, run in runs]


def turns_of(sample: dict[str, Any]) -> list[Turn]:
    """The prompt of a sample of a run, whatever its file says; one turn without a role where it names none."""
    told = sample.get("turns")
    if isinstance(told, list) and told and all(isinstance(each, list) and len(each) == 2 for each in told):
        return [Turn(str(role), str(text)) for role, text in told]
    return [Turn("", str(sample.get("prompt") or ""))]


def sample_cell(name: str, sample: dict[str, Any], key: str, other: Any = None) -> Cell:
    """One of a sample's texts, by its key; words that another text does not have are marked."""
    text, cut = sample.get(key), sample.get("cut")
    parts = whole(text) if text is None or other is None else marked(text, other)
    return Cell(name, parts, cut=isinstance(cut, list) and key in cut, wanted=key == "wanted")


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
    cards = []
    for k, (turns, reference) in enumerate(prompts):
        answers = [(result["model"], result["answers"][k]) for result in results]
        right = [bool(answer.get("exact_match")) for _, answer in answers]
        kind = "right" if all(right) else "mixed" if any(right) else ""
        cards.append(Card(f"Prompt {k + 1}", turns, said(reference, answers), kind))
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


def _run_page(page: Path, adapter: str | None) -> str | None:
    """Where the page of an adapter's run lies, seen from another; None where there is none."""
    known = [] if adapter is None else [Path(adapter) / "report.html", Path(adapter).parent / "report.html"]
    return next((link(page, target) for target in known if target.is_file()), None)


def compare_files(path: Path, files: list[Path]) -> None:
    """Write the page of files of answers to the same prompts, as `jlora generate --prompts FILE --json` prints them.

    Raises:
      DataError: a line is no answer, or the prompts differ. ConfigError: the page cannot be written there.
    """
    read = [read_answers(file) for file in files]
    asked = [answer["prompt"] for answer in read[0]]
    for file, answers in zip(files[1:], read[1:], strict=True):
        if [answer["prompt"] for answer in answers] != asked:
            raise DataError(
                f"{file}: answers other prompts than {files[0]}; compare answers to the same ones, in order"
            )
    prompts, names, results = [_asked(row) for row in asked], short_names(files), []
    for name, answers in zip(names, read, strict=True):
        for answer, (_, reference) in zip(answers, prompts, strict=True):
            if reference is not None:
                answer["exact_match"] = answer["text"].strip() == reference.strip()
        result = {"model": name, "answers": answers, "mean_tokens": fmean(answer["tokens"] for answer in answers)}
        result["ended"] = fmean(answer["ended"] for answer in answers)
        if all("exact_match" in answer for answer in answers):
            right = sum(answer["exact_match"] for answer in answers)
            result["exact_match"] = right / len(answers)
            result["intervals"] = {"exact_match": intervals.share(right, len(answers))}
        results.append(result)
    write_comparison(path, f"Answers of {', '.join(names)}", results, prompts)


def read_answers(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of answers.

    Raises:
      DataError: it cannot be read, or a line is no answer.
    """
    try:
        lines = text_of_theirs(file, MAX_LOG).split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        answer = parse(line) or {}
        kinds = {"prompt": dict, "text": str, "tokens": int, "ended": bool}
        if any(not isinstance(answer.get(key), kind) for key, kind in kinds.items()):
            raise DataError(f"{file}:{number}: is no answer; make the file with jlora generate --prompts ROWS --json")
        found.append({key: answer[key] for key in kinds})
    if not found:
        raise DataError(f"{file}: holds no answer; make the file with jlora generate --prompts ROWS --json")
    return found


def _asked(row: dict[str, Any]) -> tuple[list[Turn], str | None]:
    """The turns of a row, and its own answer, if it has one."""
    format = format_of(row)
    try:
        reference = reference_answer(row, format=format) if format else None
    except BadRow:  # such as a conversation that ends with a question
        reference = None
    said = next((row[key] for key in ("messages", "conversations", "prompt") if isinstance(row.get(key), list)), None)
    if said is None:
        return [Turn(key, str(row[key])) for key in ASKING if row.get(key)], reference
    turns = [Turn(str(t.get("role", t.get("from"))), str(t.get("content", t.get("value")))) for t in map(mapping, said)]
    return list(takewhile(lambda turn: turn.role not in ANSWERING, turns)), reference
