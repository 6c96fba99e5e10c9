"""A config for somebody's rows: what they are, how long, how many, and what follows for the run."""

import itertools
from dataclasses import asdict
from typing import Any

import jax

from jlora.config import Config
from jlora.config.yaml_text import yaml_scalar
from jlora.data.checks import Check
from jlora.data.formats import COLUMNS, KNOWN, OPTIONAL, columns_of, format_of, lacking
from jlora.data.rows import BadRow, read_rows
from jlora.errors import ConfigError, DataError
from jlora.files.text import counted
from jlora.hf.pretrained import tokenizer_of
from jlora.reports.data import Seen, look

# Rows that are looked at for their format; the first of a large file stand for it.
LOOKED_AT = 1000
# Tokens of a row of a batch: at least so many, for rows to be packed into, and not more unless asked for.
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
# A run should take so many steps an epoch, for its schedule and its evaluations to mean something, and in all.
STEPS, ALL_STEPS = 20, 100
# Of fewer rows more epochs, up to where they are learnt by heart.
EPOCHS = (3, 5, 10)
BATCHES = (16, 8, 4, 2, 1)
# Weights of a base's layers below which it takes a higher rate, as the quickstart's with 0.1 billion does.
SMALL = 0.5e9
# Rows held out: a tenth, and of many no more than so many.
MOST_HELD_OUT = 500
# Of fewer held-out rows it is chance which adapter is the best.
FEW_HELD_OUT = 20


def propose(data: str, model: str, held_out: str | None, name: str, columns: dict[str, str]) -> tuple[str, Seen]:
    """The config as commented YAML, and what its rows look like in it.

    Args:
      held_out: held-out rows; None holds some of `data` out.
      name: of the run. columns: as `data.columns`.

    Raises:
      ConfigError: no format has such columns.
      DataError: the rows are of no known format, or of several.
      ModelError: see `jlora.hf.pretrained.tokenizer_of`.
    """
    format = rows_format(data, columns)
    tokenizer, config = tokenizer_of(model, None, None)
    prompt = "chat" if format == "alpaca" and tokenizer.chat_template else "stanford"
    positions = config.get("max_position_embeddings") or LENGTHS[-1]
    tree: dict[str, Any] = {
        "model": {"path": model},
        "data": {"train": data, "eval": held_out, "format": format, "prompt": prompt},
        "objective": {"name": "dpo" if format == "preference" else "sft"},
        "output_dir": f"runs/{name}",
    }
    packed = config.get("quantization_config")
    if isinstance(packed, dict) and packed.get("bnb_4bit_quant_type") == "nf4":
        tree["model"]["quantization"] = "nf4"
    if columns:
        tree["data"]["columns"] = columns
    tree["data"]["max_length"] = min(positions, LENGTHS[-1])
    seen = look(Config.model_validate(tree), 0)
    rows = seen.report["train"]
    longest = rows["lengths"]["max"]
    tree["data"]["max_length"] = min(positions, next((n for n in LENGTHS if n >= longest), LENGTHS[-1]))
    if held_out is None:
        share = min(0.1, MOST_HELD_OUT / max(rows["rows"], 1))
        tree["data"]["eval"] = round(share, 3) or None
    tree["training"] = {"epochs": 3 if rows["rows"] < 5000 else 2 if rows["rows"] < 20_000 else 1}
    packed = rows["tokens"] / tree["data"]["max_length"]
    tree["training"]["batch_size"] = next((size for size in BATCHES if packed / size >= STEPS), BATCHES[-1])
    seen = look(Config.model_validate(tree), 0)
    if tree["training"]["epochs"] == EPOCHS[0]:
        each = seen.report["steps"] / EPOCHS[0]
        tree["training"]["epochs"] = next((count for count in EPOCHS if count * each >= ALL_STEPS), EPOCHS[-1])
        if tree["training"]["epochs"] != EPOCHS[0]:
            seen = look(Config.model_validate(tree), 0)
    if left := unread(data, columns):
        names = columns_of(dict.fromkeys(left))
        sentence = f"the rows' own columns are not read: {names}; name one for a column of the format with --columns"
        seen.report["checks"].append(asdict(Check("unread_columns", "note", len(left), sentence)))
    # Of the layers: 4 matrices of attention and 8 of the MLP, as wide as the model.
    weights = 12 * (config.get("num_hidden_layers") or 0) * (config.get("hidden_size") or 0) ** 2
    return written(tree, seen.report, small=0 < weights < SMALL), seen


def rows_format(data: str, columns: dict[str, str]) -> str:
    """The format of the first rows.

    Args:
      columns: as `data.columns`.

    Raises:
      ConfigError: no format has such columns.
      DataError: naming the columns, where they are of none, or the first row that is of another than those before.
    """
    formats = {name: (*COLUMNS[name], *OPTIONAL[name]) for name in COLUMNS}
    if not any(columns.keys() <= {*own} for own in formats.values()):
        unknown = [column for column in columns if not any(column in own for own in formats.values())]
        known = "; ".join(f"{name}: {', '.join(own)}" for name, own in formats.items())
        raise ConfigError(f"--columns: no format has {' and '.join(unknown or columns)}; they have {known}")
    format = None
    for row in itertools.islice(read_rows(data, "train"), LOOKED_AT):
        if isinstance(row.value, BadRow) or not isinstance(row.value, dict):
            continue  # told by the check of all rows
        for column, name in columns.items():
            if name not in row.value:
                has = columns_of(row.value)
                raise DataError(f'{row.where}: has no column "{name}" (--columns {column}={name}); it has {has}')
        found = format_of(row.value, given=columns)
        if found is None:
            raise DataError(f"{row.where}: has the columns {columns_of(row.value)}, {_of_none(row.value, columns)}")
        if format not in (None, found):
            raise DataError(f"{row.where}: is of format {found}, the rows before it of {format}; part them into files")
        format = found
    if format is None:
        raise DataError(f"{data}: none of the first rows is a JSON object with columns, such as instruction and output")
    return format


def unread(data: str, columns: dict[str, str]) -> list[str]:
    """Columns of the first rows that no format reads, and that `columns` does not name either."""
    rows = (row.value for row in itertools.islice(read_rows(data, "train"), LOOKED_AT))
    filled = (name for row in rows if isinstance(row, dict) for name, value in row.items() if value not in (None, ""))
    return [name for name in dict.fromkeys(filled) if name not in KNOWN and name not in columns.values()]


def _of_none(row: dict[str, Any], columns: dict[str, str]) -> str:
    """What a row of no format lacks, as a clause, with a way to name it."""
    known = "; ".join(f"{name}: {', '.join(own)}" for name, own in COLUMNS.items())
    nearest, missing, left = lacking(row, columns)
    pairs = columns | dict(itertools.zip_longest(missing, left[: len(missing)], fillvalue="COLUMN"))
    return (
        f"which are those of no format ({known}); as {nearest} they lack {' and '.join(missing)}: say which they are, "
        f"such as --columns {','.join(f'{column}={name}' for column, name in pairs.items())}, or rename them"
    )


def written(tree: dict[str, Any], report: dict[str, Any], small: bool) -> str:
    """The config as YAML, with a reason beside each line that was chosen.

    Args:
      small: the base is one of few parameters.
    """
    cpu = jax.default_backend() == "cpu"
    data, training, rows = tree["data"], tree["training"], report["train"]
    lengths = rows["lengths"]
    each = report["steps"] / training["epochs"]
    held_out = rows.get("held_out") or (report["eval"] or {}).get("rows", 0)
    lines: list[tuple[str, Any, str]] = [
        ("model:", None, ""),
        ("  path:", tree["model"]["path"], ""),
        ("  dtype:", "float32" if cpu else "bfloat16", "this machine has no accelerator" if cpu else ""),
        ("  remat:", "none" if cpu else "auto", "" if cpu else "the fastest that fits the device's memory"),
        *((f"  {key}:", value, "as the base was published") for key, value in tree["model"].items() if key != "path"),
        ("lora:", None, ""),
        ("  rank:", 16, "8 to 64; more for more rows, or for what the base has never seen"),
        ("  alpha:", 32, "twice the rank is usual"),
        ("  target_modules:", "all-linear", "attention alone: [q_proj, k_proj, v_proj, o_proj]"),
        ("data:", None, ""),
        ("  train:", data["train"], f"{rows['rows']:,} rows"),
        ("  eval:", data["eval"], "held out, to see whether training helps" if data["eval"] else "too few rows"),
        ("  format:", data["format"], "by the columns of the rows"),
    ]
    if "columns" in data:
        lines.append(("  columns:", data["columns"], "column of the format: its name in the rows"))
    if data["format"] == "alpaca":
        why = "the tokenizer's own chat template" if data["prompt"] == "chat" else "it has no chat template"
        lines.append(("  prompt:", data["prompt"], why))
    lines += [
        (
            "  max_length:",
            data["max_length"],
            f"rows have {lengths['min']:,} to {lengths['max']:,} tokens, half of them at most {lengths['median']:,}",
        ),
        ("training:", None, ""),
        ("  epochs:", training["epochs"], f"{report['steps']:,} optimizer steps in all"),
        (
            "  batch_size:",
            training["batch_size"],
            f"about {each:,.0f} steps an epoch; short rows are packed, several into one",
        ),
        ("  gradient_accumulation_steps:", 1, "raise it, to a divisor of batch_size, if memory runs out"),
    ]
    lines.append(("  samples:", 3, "rows answered before and after, in report.html"))
    if data["eval"]:
        best = "the adapter with the lowest held-out loss; last: that of the last step"
        if held_out < FEW_HELD_OUT:
            best = f"the lowest held-out loss: a noisy choice by {counted(held_out, 'row')}; or last, the last step's"
        lines += [("  evals_per_epoch:", 2, ""), ("  export:", "best", best)]
    if tree["objective"]["name"] != "sft":
        lines += [("objective:", None, ""), ("  name:", "dpo", "or ipo, hinge, orpo")]
    rate = 5e-6 if tree["objective"]["name"] == "dpo" else 1e-3 if small else 2e-4
    lines += [
        ("optimizer:", None, ""),
        ("  learning_rate:", rate, "if the loss jumps, a third of it; if it hardly falls, three times as much"),
        ("  warmup_ratio:", 0.03, ""),
        ("output_dir:", tree["output_dir"], "checkpoints, logs, report.html and adapter/"),
    ]
    text = ""
    for key, value, why in lines:
        shown = f"{value:.1e}" if isinstance(value, float) and value <= 1e-3 else yaml_scalar(value)
        line = key if value is None and key != "  eval:" else f"{key} {shown}"
        text += f"{line:<35} # {why}\n" if why else f"{line}\n"
    return text
