"""Files of answers, as `jlora generate --json` prints them, side by side. Knows nothing of models."""

from itertools import takewhile
from pathlib import Path
from typing import Any

from jlora.data.formats import format_of
from jlora.data.prompts import reference_answer
from jlora.data.row import BadRow
from jlora.data.speakers import Turn
from jlora.errors import DataError
from jlora.files.paths import short_names
from jlora.files.theirs import MAX_LOG, text_of_theirs
from jlora.reports import intervals
from jlora.reports.answers import write_comparison
from jlora.reports.figures import mapping
from jlora.reports.run_files import parse

# Models whose answers fit side by side.
MOST_FILES = 4
# What a row asks with, none of which is its answer; and who answers in a conversation.
ASKING, ANSWERING = ("system", "instruction", "input", "prompt", "text"), ("assistant", "gpt")


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
    prompts = [_asked(row) for row in asked]
    results = []
    for name, answers in zip(short_names(files), read, strict=True):
        for answer, (_, reference) in zip(answers, prompts, strict=True):
            if reference is not None:
                answer["exact_match"] = answer["text"].strip() == reference.strip()
        result = {"model": name, "answers": answers, "mean_tokens": _mean(answers, "tokens")}
        result["ended"] = _mean(answers, "ended")
        if all("exact_match" in answer for answer in answers):
            right = sum(answer["exact_match"] for answer in answers)
            result["exact_match"] = right / len(answers)
            result["intervals"] = {"exact_match": intervals.share(right, len(answers))}
        results.append(result)
    write_comparison(path, f"Answers of {', '.join(short_names(files))}", results, prompts)


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


def _mean(answers: list[dict[str, Any]], key: str) -> float:
    return sum(answer[key] for answer in answers) / len(answers)
