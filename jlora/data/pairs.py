"""Preference rows -> pairs of one chosen and one rejected answer. Knows nothing of prompts or tokens."""

from collections.abc import Iterator

from jlora.data.row import BadRow, Row


def pairs_of(row: Row) -> Iterator[Row]:
    """A preference row as pairs: one for each of its rejected answers, where `rejected` is a list of such.

    That is a list of texts beside a chosen text, or a list of lists of turns beside chosen turns; TRL, Axolotl and
    LLaMA-Factory read one alone.
    """
    value = row.value
    if not isinstance(value, dict) or value.get("chosen") is None or value.get("rejected") is None:
        yield row
        return
    chosen, rejected = value["chosen"], value["rejected"]
    answers = rejected if isinstance(rejected, list) else [rejected]
    if isinstance(chosen, list) and not any(isinstance(each, list) for each in answers):
        answers = [rejected]  # turns, of one answer
    if not answers:
        yield Row(row.where, BadRow("empty_response", 'the field "rejected" holds no answer'))
    for number, answer in enumerate(answers, 1):
        where = f"{row.where}, rejected {number}" if len(answers) > 1 else row.where
        yield Row(where, value | {"rejected": answer})
