"""Weights as bitsandbytes stores them: nf4 and fp4 with the state of each in a blob, and LLM.int8."""

import json
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from jlora.hf import codecs
from jlora.hf.packed import SCALES, Layout, Stored
from jlora.model.quant import DYNAMIC_MAP, NF4_LEVELS

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__"
# The largest blob that is read: real ones have some 200 bytes.
MAX_BLOB = 4096


def bitsandbytes(settings: dict[str, Any], stored: Stored) -> Iterator[tuple[str, Layout]]:
    """The quantised weights of a folder: name -> layout.

    Args:
      settings: config.json's quantization_config, of which nothing is read: every weight says its own kind.

    Raises:
      ModelError: a state, codes or scales that contradict each other.
    """
    for kind in codecs.BNB_LEVELS:
        for module in stored.modules(STATE + kind):
            yield f"{module}weight", _bnb_4bit(module, kind, stored)
    for module in stored.modules("SCB"):
        name = f"{module}weight"
        outputs, inputs = stored.matrix(name, f"{module}SCB", ("I8",))
        scb = stored.require(f"{module}SCB", (outputs,), SCALES, name)
        order = f"{module}weight_format"
        if order in stored.shapes and stored.read(order).any():
            raise stored.refuse(name, "is in a layout of bitsandbytes for one GPU, not by rows; save the model anew")
        names = {"weight": name, "SCB": scb}
        yield name, Layout("bitsandbytes int8", (outputs, inputs), names, codecs.bnb_int8)


def _bnb_4bit(module: str, kind: str, stored: Stored) -> Layout:
    name, state = f"{module}weight", f"{module}{STATE}{kind}"
    if name not in stored.shapes:
        raise stored.refuse(state, "has no weight beside it; get the file again")
    blob = _blob(state, stored)
    shape, block, nested = blob.get("shape"), blob.get("blocksize"), blob.get("nested_blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise stored.refuse(state, f"says the shape {shape!r}, not that of a matrix; get the file again")
    if type(block) is not int or block not in BLOCK_SIZES:
        raise stored.refuse(state, f"says the block size {block!r}, which is none of bitsandbytes'")
    size = math.prod(shape)
    num_bytes = stored.read(name).nbytes
    if num_bytes != -(-size // 2):
        raise stored.refuse(name, f"has {num_bytes} bytes, not the {-(-size // 2)} of {kind} of {shape}")
    num_blocks = -(-size // block)
    names = {"weight": name}
    offset: float | None = None
    if nested is None:
        names["absmax"] = stored.require(f"{name}.absmax", (num_blocks,), ("F32",), name)
        nested = 0
    else:
        value = blob.get("nested_offset")
        if type(nested) is not int or nested < 1 or not isinstance(value, float | int) or not math.isfinite(value):
            raise stored.refuse(state, f"says nested_blocksize={nested!r} and nested_offset={value!r}")
        offset = float(value)
        names["absmax"] = stored.require(f"{name}.absmax", (num_blocks,), ("U8",), name)
        second = f"{name}.nested_absmax"
        names["nested_absmax"] = stored.require(second, (-(-num_blocks // nested),), ("F32",), name)
        names["nested_quant_map"] = stored.require(f"{name}.nested_quant_map", (256,), ("F32",), name)
    levels = stored.read(stored.require(f"{name}.quant_map", (16,), ("F32",), name))
    if not np.allclose(levels, codecs.BNB_LEVELS[kind], rtol=0, atol=1e-6):
        raise stored.refuse(f"{name}.quant_map", f"has other levels than bitsandbytes' {kind}")
    same = kind == "nf4" and block == 64 and nested == 256 and shape[1] % 64 == 0 and np.array_equal(levels, NF4_LEVELS)
    return Layout(
        f"bitsandbytes {kind}, blocks of {block}, {nested} {offset!r}",
        (shape[0], shape[1]),
        names,
        partial(codecs.bnb_4bit, width=shape[1], block=block, kind=kind, offset=offset, nested=nested),
        offset if same and np.array_equal(stored.read(names["nested_quant_map"]), DYNAMIC_MAP) else None,
    )


def _blob(name: str, stored: Stored) -> dict[str, Any]:
    """The settings that bitsandbytes keeps as the bytes of a JSON object."""
    try:
        if stored.dtypes[name] != "U8" or math.prod(stored.shapes[name]) > MAX_BLOB:
            raise ValueError(f"it is {stored.dtypes[name]} of {list(stored.shapes[name])}")
        value = json.loads(stored.read(name).tobytes())
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise stored.refuse(name, f"is no state of bitsandbytes ({error}); get the file again") from None
    return value
