"""A run's weights as a full Hugging Face checkpoint: the adapter merged into the base, or a full fine-tuning's own.

On the host, with no accelerator and no whole model: the base is read, merged, cast and written a few rows at a time,
and the proof runs base with adapter, then what was written, with one tensor in memory. What is held beside is the
adapter, or the weights of a full fine-tuning.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.config import Config, MeshSection
from jlora.data.encoding import read_data
from jlora.errors import ConfigError, DataError, MemoryExceeded
from jlora.files.paths import inside
from jlora.hf import verify
from jlora.hf.gguf import GGUFFile
from jlora.hf.load import hash_base, load_base
from jlora.hf.names import name_table
from jlora.hf.pretrained import Opened, load_pretrained
from jlora.hf.source import check_names, open_source
from jlora.hf.weights import Dequantized, Merged, Stored, Trained, Weights, save_checkpoint, stored_bytes, untied
from jlora.model import attention
from jlora.model.adapter import Adapter, place_adapter
from jlora.model.adapter_init import new_adapter
from jlora.model.config import ModelConfig
from jlora.model.llama import Decoder, abstract_decoder
from jlora.model.sharding import make_mesh, one_device_mesh
from jlora.training import auto_remat
from jlora.training.evaluator import Evaluator
from jlora.training.step import Forward, count_parameters

# Rows on which the cost of merging is measured.
COST_ROWS = 64

# Difference of logits that rounding to a dtype may make (see `verify.require_equal`).
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

# What blocks of rows, tokenizer, compiled programs and the checkpoint's reader take beside the weights.
SPARE_BYTES = 512 * 2**20


def needed_memory(cfg: Config, model: ModelConfig) -> int:
    """Bytes of the host that merging takes beside what the process holds already.

    The proof holds a projection in float32, and at times a second one: with DoRA its squares, else the one before it,
    whose product is not over. Of the adapter, or of the weights of a full fine-tuning, there is one copy.
    """
    largest = max(math.prod(entry.hf_shape) for entry in name_table(model).values() if entry.transposed)
    if cfg.method == "full":
        trained = count_parameters(abstract_decoder(model, jnp.dtype("float32")))
    else:
        trained = count_parameters(jax.eval_shape(lambda: new_adapter(cfg.lora, model, 0)))
    return 2 * 4 * largest + 4 * trained + SPARE_BYTES


def require_room(out: Path, cfg: Config, model: ModelConfig, dtype: str) -> None:
    """Refuse a merge that would not fit in the host's memory or on the disk, before anything is written.

    Raises:
      MemoryExceeded, ConfigError: with what is needed and what there is.
    """
    need, free = needed_memory(cfg, model), auto_remat.free_host_bytes()
    if need > free:
        raise MemoryExceeded(
            f"merging {cfg.model.path} takes {need / 2**30:,.1f} GiB of the host's memory, and {free / 2**30:,.1f} GiB "
            "are available; end other programs, or merge on another machine"
        )
    need, free = stored_bytes(model, dtype), shutil.disk_usage(out.parent).free
    if need > free:
        raise ConfigError(
            f"--out {out}: the checkpoint takes {need / 2**30:,.1f} GiB in {dtype}, and {free / 2**30:,.1f} GiB are "
            "free; make room, or name a folder on another disk"
        )


def merge(
    cfg: Config,
    opened: Opened,
    out: Path,
    dtype: str,
    restore: Callable[[str, Mesh], tuple[int, Adapter, Decoder | None]],
    cost: bool,
) -> dict[str, Any]:
    """Write a full checkpoint, read it back, compare logits; returns their relative difference, among others.

    Merging into a quantised base takes the weights that the adapter was trained on, dequantised: the result computes
    what the run did, while merging into the stored ones would put the adapter on weights it has never seen.

    Args:
      restore: (hash of the base, mesh of the host) -> step, adapter, and weights of a full fine-tuning.
      cost: whether the loss is measured, too, with both models whole on the first device.

    Raises:
      MemoryExceeded, ConfigError: see `require_room`.
      ModelError: another base, or a checkpoint that does not compute what the run does.
    """
    source, model = opened.source, opened.model
    require_room(out, cfg, model, dtype)
    host = make_mesh(MeshSection(data=1, fsdp=1, tensor=1), jax.devices("cpu")[:1])
    with jax.default_device(host.devices.flat[0]):
        step, adapter, trained = restore(hash_base(source, opened.name), host)
        weights: Weights = Stored(source)
        if trained is not None:
            weights = Trained(trained)
        elif cfg.model.quantization is not None:
            weights = Dequantized(source, model, cfg.model.quantization)
        shape, config = untied(model, source.config, adapter)
        save_checkpoint(
            out, shape, Merged(weights, adapter), config, dtype, lambda folder: add_tokenizer(opened, folder)
        )
        expected = verify.streamed_logits(shape, weights, adapter)
        difference = verify.require_equal(out, expected, written_logits(out), TOLERANCE[dtype])
    result: dict[str, Any] = {"step": step, "out": str(out), "kind": "full", "dtype": dtype}
    result["logits_relative_difference"] = difference
    if cfg.model.quantization is not None:
        result["merged_into"] = f"dequantised {cfg.model.quantization}"
    return result | (merging_cost(cfg, opened, out, adapter) if cost else {})


def written_logits(folder: Path) -> Any:
    """The logits of a checkpoint that was written, read as any base is."""
    source = open_source(folder)
    check_names(source.model, source.shapes, str(folder))
    return verify.streamed_logits(source.model, Stored(source), {})


def merging_cost(cfg: Config, opened: Opened, out: Path, adapter: Adapter) -> dict[str, float | None]:
    """Mean cross-entropy of trained tokens before and after merging, on the run's first held-out rows, or training rows
    where it has none: of a run on pairs, too, whose loss compares with the base that is no longer there once merged.

    Null where the rows are gone.
    """
    found: dict[str, float | None] = {"cross_entropy_before_merging": None, "cross_entropy_merged": None}
    try:
        train_data, eval_data = read_data(cfg, opened.tokenizer)
    except DataError:
        return found
    rows = eval_data or train_data
    rows = replace(rows, examples=rows.examples[:COST_ROWS])
    mesh, float32 = one_device_mesh(), jnp.dtype("float32")
    with jax.set_mesh(mesh):
        evaluator = Evaluator(rows, cfg.data, 1, Forward(attention.reference, "none", float32), mesh)
        base = load_pretrained(opened, float32, mesh, cfg.model.quantization).base
        placed = place_adapter(adapter, base.cfg, mesh)
        found["cross_entropy_before_merging"] = evaluator.mean_loss(base, placed)[0]
        del base  # before the second model comes
        merged, _ = load_base(open_source(out), str(out), float32, mesh)
        found["cross_entropy_merged"] = evaluator.mean_loss(merged, {})[0]
    return found


def add_tokenizer(opened: Opened, folder: Path) -> None:
    """The tokenizer's own files, and the generation config, beside the weights."""
    if isinstance(opened.source, GGUFFile) and not opened.tokenizer.files:
        opened.source.tokenizer().save_pretrained(folder)
    files = list(opened.tokenizer.files)
    if opened.path.is_dir():
        files.append(inside(opened.path, "generation_config.json"))
    for file in files:
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
