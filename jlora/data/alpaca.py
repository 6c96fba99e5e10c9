"""Rows of instruction, input and output: as Stanford's prompt, and as a conversation. Knows nothing of tokens."""

from typing import Any

from jlora.data.conversation import Message
from jlora.data.fields import field_of, optional_text
from jlora.data.row import BadRow

# Stanford Alpaca's prompts (tatsu-lab/stanford_alpaca, train.py), which models know to the byte.
PREAMBLE_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)  # fmt: skip


def instruction_of(row: dict[str, Any]) -> tuple[str, str]:
    """Instruction and input; an input that is missing or blank is empty.

    Raises:
      BadRow: both are empty, or a field is no text.
    """
    instruction = field_of(row, "instruction", str)
    given = optional_text(row, "input")
    if not (instruction + given).strip():
        raise BadRow("empty_prompt", "instruction and input are both empty")
    return instruction, given


def stanford_prompt(row: dict[str, Any]) -> str:
    """What comes before the output; a `system` takes the place of Stanford's own, as in LLaMA-Factory and Axolotl.

    Raises:
      BadRow: as `instruction_of`; or there are turns before, for which the prompt has no place.
    """
    instruction, given = instruction_of(row)
    if _history(row):
        raise BadRow("history", 'the field "history" holds earlier turns, which only data.prompt=chat writes')
    system = optional_text(row, "system") or (PREAMBLE_WITH_INPUT if given else PREAMBLE)
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"{system}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:"


def asked_messages(row: dict[str, Any]) -> list[Message]:
    """The conversation up to the output: `system`, the pairs of `history`, then instruction and input.

    Raises:
      BadRow: as `instruction_of`; or the history is none.
    """
    system = optional_text(row, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for question, answer in _history(row):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": "\n\n".join(filter(None, instruction_of(row)))}]


def _history(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Earlier questions and answers, a list of pairs as LLaMA-Factory has it."""
    pairs = row.get("history") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise BadRow("wrong_type", 'the field "history" is not a list of pairs, [question, answer]')
        for text in pair:
            field_of({"history": text}, "history", str)
    return [(question, answer) for question, answer in pairs]
