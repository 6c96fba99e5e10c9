"""The ways to lay a run out: mesh, rematerialisation and micro-batch, which leave its result as it is, and
quantisation of the base, which changes it a little and saves memory, not work.

What exists, which of them a run's batch and model allow, and a guess at each before anything is compiled, by arithmetic
at the rates of `jlora.planning.speed`:

    seconds = FLOPs / rate  +  bytes of memory / rate  +  bytes sent / rate

No term hides behind another. Bytes of memory are the weights that a device multiplies with, once for each pass of each
micro-batch, and its temporaries four times: made, put into the stack of their layers, taken out, used. Quantised
weights are read as they are held, written out dequantised and read again. The guess says in which order layouts are
worth compiling; what is compiled is judged by its program, in which the compiler may recompute more to make it fit.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jlora.config import Config
from jlora.config.sections import assign
from jlora.model import quant
from jlora.model.adapter import targets
from jlora.model.config import ModelConfig, block_weights, outer_weights
from jlora.model.divisibility import input_cuts, row_multiple, split_sizes
from jlora.model.remat import LADDER
from jlora.planning.speed import rates_of
from jlora.planning.topology import Target
from jlora.training.auto_remat import Layout, saved_bytes

# Policies that hold at least as much as this one does.
HEAVIER = {name: LADDER[: number + 1] for number, name in enumerate(LADDER)}


# Tokens of a row that a device has at the least where rows are split: of shorter rows there are more for a batch.
SHORTEST_PART = 4096


def passes(remat: str) -> int:
    """How often a micro-batch goes through the weights: forward, backward, and again where layers are recomputed."""
    return 2 if remat in ("none", "lean") else 3


def arithmetic(
    target: Target,
    *,
    flops: float,
    weight_bytes: float,
    dequantized_bytes: float,
    temp_bytes: float,
    sent_bytes: float,
    micro_batches: int,
    remat: str,
) -> float:
    """Seconds of a step without its program; 0 where no peak is published.

    Args:
      flops: of a step over all devices.
      weight_bytes: the base weights that one device multiplies with, gathered, as they are held.
      dequantized_bytes: those of them that are quantised, in the dtype of the matmuls.
      temp_bytes, sent_bytes: of one device, held at once; sent in a step.
    """
    rates = rates_of(target)
    if rates is None:
        return 0.0
    weights = passes(remat) * (weight_bytes + 2 * dequantized_bytes)
    memory = micro_batches * (weights + 4 * temp_bytes)
    return flops / len(target.devices) / rates.products + memory / rates.memory + sent_bytes / rates.links


def quantizations(cfg: Config) -> list[Any]:
    """The config's own way to hold the base, none, int8 and nf4, in that order.

    fp8 and int4 take as many bytes as the last two and lose more: they are for those who ask for them.
    """
    if cfg.model.compute is not None:  # whose codes are the base's
        return [cfg.model.quantization]
    every = (cfg.model.quantization, None, "int8", "nf4")
    return list(dict.fromkeys(every)) if cfg.method == "lora" else [None]


def with_settings(cfg: Config, settings: dict[str, Any]) -> Config:
    """The config with dotted keys changed, validated anew."""
    tree = cfg.model_dump()
    for key, value in settings.items():
        assign(tree, key, value)
    return Config.model_validate(tree)


def as_overrides(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def meshes(model: ModelConfig, cfg: Config, num_devices: int) -> list[tuple[int, int, int, int]]:
    """Every (data, fsdp, tensor, context) over all devices that the model divides over.

    Rows are split where each part is still long: see `SHORTEST_PART`.
    """
    length = cfg.data.max_length
    common = {axis: math.gcd(*found.values(), 0) for axis, found in split_sizes(model, length).items()}
    return [
        (data, fsdp, tensor, context)
        for context in _divisors(num_devices)
        for data in _divisors(num_devices // context)
        for fsdp in _divisors(num_devices // (context * data))
        for tensor in [num_devices // (context * data * fsdp)]
        if common["fsdp"] % fsdp == 0 and common["tensor"] % tensor == 0
        if length % row_multiple(context, tensor) == 0 and (context == 1 or length // context >= SHORTEST_PART)
    ]


def layouts(model: ModelConfig, cfg: Config, num_devices: int, *, keep_batch: bool) -> Iterator[Layout]:
    """Every layout of a run, but for activations in the host's memory: no peak is published for the way there.

    Args:
      keep_batch: only where `training.batch_size` divides as it is; otherwise only where it does not, with the
        next multiple of what the mesh needs in its place.
    """
    for data, fsdp, tensor, context in meshes(model, cfg, num_devices):
        batch, shards = cfg.training.batch_size, data * fsdp
        if (batch % shards == 0) != keep_batch:
            continue
        batch = -(-batch // shards) * shards
        for quantization in quantizations(cfg):
            cuts = input_cuts(model, {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context})
            if not all(quant.divides(quantization, inputs, shards) for _, inputs, shards in cuts):
                continue
            for remat in (name for name in LADDER if name != "offload"):
                for rows in _divisors(batch // shards):
                    yield Layout(data, fsdp, tensor, remat, quantization, rows, batch, context)


def smallest(layout: Layout) -> Layout:
    """The layout over the same mesh that needs the least memory, all of it on the device."""
    return replace(layout, remat="full", rows=1)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def guess_seconds(
    model: ModelConfig, cfg: Config, target: Target, layout: Layout, flops: float
) -> tuple[float, float, float]:
    """Order in which layouts are worth compiling: seconds of a token, then FLOPs and bytes where no peak is known.

    The bytes sent are arithmetic here (weights gathered over fsdp, the residual stream gathered and scattered four
    times a layer over tensor, keys and values gathered over context and queries and what attention gives exchanged,
    the adapter's gradients reduced); of a compiled layout they are counted.

    Args:
      flops: of a step with the config's own batch.
    """
    dtype = jnp.dtype(cfg.model.dtype)
    itemsize = dtype.itemsize
    inner = model.num_hidden_layers * sum(math.prod(weight.shape) for weight in block_weights(model).values())
    outer = sum(math.prod(weight.shape) for weight in outer_weights(model).values())
    held = (quant.bytes_held(layout.quantization, dtype) * inner + itemsize * outer) / layout.tensor
    # What crosses devices is dequantised.
    weights = itemsize * (inner + outer) / layout.tensor
    tokens_held = layout.rows * cfg.data.max_length / layout.context * model.num_hidden_layers
    stream = tokens_held * model.hidden_size * itemsize
    often = layout.micro_batches * passes(layout.remat)
    sent = often * weights * (layout.fsdp - 1) / layout.fsdp
    sent += often * 4 * stream * (layout.tensor - 1) / layout.tensor
    if layout.context > 1:
        heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads * (layout.context - 1)
        sent += often * tokens_held * heads * model.head_dim * itemsize / layout.tensor
    shards = layout.data * layout.fsdp * layout.context
    adapted = model.num_hidden_layers * model.hidden_size * cfg.lora.rank
    sent += 2 * 4 * len(targets(cfg.lora, model)) * 2 * adapted * (shards - 1) / shards / layout.tensor
    tokens = layout.batch_size * cfg.data.max_length
    flops *= layout.batch_size / cfg.training.batch_size
    seconds = arithmetic(
        target,
        flops=flops,
        weight_bytes=held,
        dequantized_bytes=itemsize * inner / layout.tensor if layout.quantization else 0.0,
        temp_bytes=saved_bytes(model, cfg, layout),
        sent_bytes=sent,
        micro_batches=layout.micro_batches,
        remat=layout.remat,
    )
    return seconds / tokens, flops / tokens, sent / tokens
