"""Axolotl's `datasets` and its kin: which rows a run has, and of which format."""

from typing import Any

from jlora.config.convert.rules import Conversion, To, is_set, one_of
from jlora.config.data import TURN_WEIGHTS

_ROLES = {"gpt": "assistant", "human": "user"}
_ENDS = one_of({name: name for name in ("turn", "last", "none")}, "turn")
TEMPLATE = To(
    "data.chat_template",
    one_of(
        {"chatml": "chatml", "tokenizer_default": None},
        None,
        "the tokenizer's own chat template is taken; give a .jinja file as data.chat_template for another",
    ),
)


def _roles(value: Any) -> str | list[str]:
    roles = [_ROLES.get(role, role) for role in value]
    return "response" if roles == ["assistant"] else roles


def datasets(given: dict[str, Any], out: Conversion) -> None:
    """Set what is read, and in which format; note what jlora reads otherwise."""
    sets = given.get("datasets") or []
    if isinstance(sets, dict):
        sets = [sets]
    held = given.get("test_datasets")
    if isinstance(held, list) and len(held) == 1:
        out.notes = [note for note in out.notes if note.key != "test_datasets"]
        out.set("data.eval", _source(held[0]))
    if not sets:
        return  # told of at the end
    first = sets[0]
    alike = [one for one in sets if one.get("type") == first.get("type")]
    out.set("data.train", [{"path": _source(one)} for one in alike] if len(alike) > 1 else _source(first))
    for other in sets:
        if other not in alike:
            out.note("datasets", other.get("path"), "result", "the sources of a mixture have one format")
    if first.get("split"):
        out.set("data.split", str(first["split"]))
    kind = first.get("type")
    known = {"path", "data_files", "ds_type", "split", "type", "chat_template", "field", "name", "field_messages"}
    known |= {"roles_to_train", "train_on_eos", "message_field_training"}
    if isinstance(kind, str):
        _row_format(kind, first, given, out)
    else:
        out.note("datasets.type", kind, "result", "a format of your own: write rows of a format of data.format")
    for key in sorted(set(first) - known):
        if is_set(first[key]) and first[key] is not False:
            out.note(f"datasets.{key}", first[key], "result", "rows are read as data.format says, nothing beside it")
    if is_set(first.get("name")):
        out.note("datasets.name", first["name"], "result", "a data set's subset cannot be named; download it as files")


def _source(first: dict[str, Any]) -> str:
    files = first.get("data_files")
    files = files[0] if isinstance(files, list) and files else files
    return str(files or first.get("path") or "")


def _row_format(kind: str, first: dict[str, Any], given: dict[str, Any], out: Conversion) -> None:
    base = kind.split(".")[0].split(":")[0]
    if given.get("rl"):
        out.set("data.format", "preference")
        out.set("data.max_length", 2 * out.get("data.max_length"))  # here a pair's two sequences share a row
        if first.get("type") not in ("chat_template.default", "chat_template.argilla_chat"):
            out.note("datasets.type", kind, "result", "rows need prompt, chosen and rejected, strings or messages")
    elif base == "alpaca":
        out.set("data.format", "alpaca")
        if kind != "alpaca":
            out.note("datasets.type", kind, "result", "rows of instruction, input and output in Stanford's prompt")
    elif base in ("completion", "pretrain"):
        out.set("data.format", "text")
        if first.get("field", "text") != "text":
            out.note("datasets.field", first["field"], "result", "the column is called text: rename it")
    elif base in ("chat_template", "sharegpt"):
        column = first.get("field_messages", "conversations" if base == "sharegpt" else "messages")
        out.set("data.format", "sharegpt" if column == "conversations" else "messages")
        if column not in ("messages", "conversations"):
            out.note("datasets.field_messages", column, "result", "rows need messages, a list of role and content")
        if is_set(first.get("chat_template")):
            out.apply("chat_template", first["chat_template"], TEMPLATE)
        if is_set(first.get("roles_to_train")):
            out.apply("datasets.roles_to_train", first["roles_to_train"], To("data.train_on", _roles))
        if is_set(first.get("train_on_eos")):
            out.apply("datasets.train_on_eos", first["train_on_eos"], To("data.train_on_eos", _ENDS))
        if first.get("message_field_training", "train") not in TURN_WEIGHTS:
            why = f"call the field of a turn that is not to be trained one of {', '.join(TURN_WEIGHTS)}"
            out.note("datasets.message_field_training", first["message_field_training"], "result", why)
    else:
        out.set("data.format", "completion")
        out.note("datasets.type", kind, "result", "write rows of prompt and completion, or of another data.format")
