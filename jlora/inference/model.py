"""A base with an adapter, opened as the adapter's run had it."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jlora.config import DataSection
from jlora.data.formats import format_of
from jlora.data.rows import read_rows
from jlora.errors import ModelError
from jlora.hf.adapters import base_of, embedding_rows, find_adapter, open_adapter, run_config
from jlora.hf.pretrained import Pretrained, holds_tokenizer, load_pretrained, open_pretrained
from jlora.model import quant
from jlora.model.adapter import Adapter
from jlora.model.sharding import one_device_mesh


@dataclass(frozen=True)
class Adapted:
    """A base with an adapter, on one device.

    Attributes:
      adapter: empty for the bare base.
      dtype: of activations and matmuls.
    """

    pretrained: Pretrained
    adapter: Adapter
    dtype: jnp.dtype


def open_adapted(
    base: str,
    adapter: str | None,
    *,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> Adapted:
    """Open and load, on the first device; what is None is as the adapter's run had it, then as a config's default.

    Args:
      quantization: "none" is none, whatever the run had.

    Raises:
      UserError: of base, tokenizer and adapter, as where they are read.
    """
    run, mesh = run_config(adapter), one_device_mesh()
    folder = None if adapter is None else find_adapter(adapter)
    rows = 0 if folder is None else embedding_rows(folder)
    if run is None and folder is not None and rows and holds_tokenizer(folder):
        tokenizer = tokenizer or str(folder)  # which has the tokens that the rows are for
    if run is not None:
        tokenizer, chat_template = tokenizer or run.model.tokenizer, chat_template or run.data.chat_template
        dtype, quantization = dtype or run.model.dtype, quantization or run.model.quantization
    kind, compute = None if quantization == "none" else quantization, jnp.dtype(dtype or "bfloat16")
    coded = run is not None and run.model.compute is not None and run.model.compute == kind
    quant.check_device(kind, mesh.devices.flat[0])
    with jax.set_mesh(mesh):
        opened = open_pretrained(base, tokenizer, chat_template, rows=rows)
        pretrained = load_pretrained(opened, compute, mesh, kind, coded=coded)
        return Adapted(pretrained, open_adapter(adapter, pretrained), compute)


def open_model(args: argparse.Namespace, rows: str | None) -> tuple[Adapted, DataSection]:
    """The model that a command line names, and how its rows are read: as asked for, as the run did, or as they are.

    Args:
      rows: where they come from, if not from the command line.
    """
    base = args.base or base_of(args.adapter)
    run = run_config(args.adapter)
    columns = args.columns or (run.data.columns if run else {})
    chosen = {
        "split": args.split,
        "columns": columns,
        "format": args.format or (run.data.format if run else _format_of(rows, args.split, columns)),
        "prompt": args.prompt_style or (run.data.prompt if run else "stanford"),
        "chat_template": args.chat_template or (run.data.chat_template if run else None),
    }
    section = (run.data if run else DataSection(train="-")).model_copy(update=chosen)
    given = {name: getattr(args, name) for name in ("tokenizer", "chat_template", "dtype", "quantization")}
    try:
        opened = open_adapted(base, args.adapter, **given)
        if not (args.format or run or rows) and opened.pretrained.tokenizer.chat_template:
            section = section.model_copy(update={"format": "messages"})  # a text alone is what a user says
        return opened, section
    except ModelError as error:
        if args.base or Path(base).exists():
            raise
        raise ModelError(f"{error}; if the base of {args.adapter} has moved, say where it lies with --base") from None


def _format_of(source: str | None, split: str, columns: dict[str, str]) -> str:
    """By the columns of the first row, which need not hold an answer; a text alone is completed."""
    if source is None:
        return "completion"
    first = next((row.value for row in read_rows(source, split) if isinstance(row.value, dict)), {})
    found = format_of(first, given=columns) or format_of(first, answered=False, given=columns)
    return found or DataSection.model_fields["format"].default
