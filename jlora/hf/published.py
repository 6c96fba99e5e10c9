"""Bases that were published quantised: which tensors of a folder make up each weight, and how they are turned back.

What is stored decides: a module whose codes are there is quantised, any other is not, whatever lists of modules
config.json has. Everything is looked at before a weight is read: methods, versions, shapes, and bitsandbytes' blobs.
"""

import math
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jlora.errors import ModelError
from jlora.files.paths import inside
from jlora.hf import codecs
from jlora.hf.bnb import bitsandbytes
from jlora.hf.packed import SCALES, Layout, Packed, Stored

KEY = "quantization_config"

# How the names of codes end.
CODES = (".weight", ".qweight", ".weight_packed")
# How those of what says how activations and caches were quantised end, which here are not.
BESIDE = (
    *(".activation_scale", ".input_scale", ".input_zero_point", ".input_global_scale"),
    *(".output_scale", ".output_zero_point", ".k_scale", ".v_scale", ".q_scale"),
)
ONE_BYTE = ("F8_E4M3", "F8_E5M2", "I8")
COMPRESSED = (
    *("float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision", "dense"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
GPTQ_BITS, PACKED_BITS = (2, 3, 4, 8), (2, 4, 8)

# What to use instead of a method that is not read, where it is not the model alone.
BEFORE = "use the model as it was before it was quantised, in as few bits by model.quantization: nf4 or int8"
BY_COMPRESSED = f"use its export as compressed-tensors, or {BEFORE.removeprefix('use ')}"
INSTEAD = {
    "auto-round": f"use its export as auto_gptq or auto_awq, or {BEFORE.removeprefix('use ')}",
    **dict.fromkeys(("modelopt", "modelopt_fp4", "nvfp4", "quark", "mxfp8"), BY_COMPRESSED),
    "bitnet": "it was trained in three values and has no other form: use a model of another kind",
    "mxfp4": "of mxfp4 only mixtures of experts are published: use a dense model",
    "gguf": "give the .gguf file itself as model.path",
}
# The file by which some of modelopt's folders say that they are quantised, and not by config.json.
MODELOPT = "hf_quant_config.json"


Finder = Callable[[dict[str, Any], Stored], Iterator[tuple[str, Layout]]]


def method_of(config: dict[str, Any], where: str) -> str | None:
    """How a base was quantised, as its config.json says; None where it was not.

    Raises:
      ModelError: a method, or a version of one, that is not read.
    """
    settings = config.get(KEY)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ModelError(f"{where}: {KEY} must be a JSON object, not {settings!r}")
    named = settings.get("quant_method")
    method = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else named
    if not isinstance(method, str) or method not in METHODS:
        *others, last = METHODS
        remedy = INSTEAD.get(str(method).lower().removeprefix("intel/"), BEFORE)
        raise ModelError(
            f"{where}: {KEY}.quant_method={named!r} is not read, only {', '.join(others)} and {last}; {remedy}"
        )
    for key, allowed in VERSIONS.get(method, {}).items():
        value = settings.get(key)
        value = value.lower() if isinstance(value, str) else value
        if value is not None and value not in allowed:
            raise ModelError(
                f"{where}: {KEY}.{key}={settings[key]!r} of {method} is not read, only "
                f"{' and '.join(map(str, allowed))}; use the model as it was before it was quantised"
            )
    for key in ("sparsity_config", "transform_config"):
        if method == "compressed-tensors" and (found := settings.get(key)) and found != {"format": "dense"}:
            raise ModelError(f"{where}: {KEY}.{key}={found!r} changes the numerics and is not supported")
    return method


def said_beside(folder: Path) -> dict[str, Any]:
    """What a folder says by another file than config.json, as that would say it."""
    return {KEY: {"quant_method": "modelopt"}} if inside(folder, MODELOPT).is_file() else {}


def find_packed(config: dict[str, Any], stored: Stored, where: str) -> dict[str, Packed]:
    """The quantised weights of a folder, by the names that they have where they are not.

    Raises:
      ModelError: see `method_of`; codes without scales, of other shapes than theirs, or of an unknown kind.
    """
    method = method_of(config, where)
    if method is None:
        return {}
    found = {name: Packed(layout, stored) for name, layout in METHODS[method](config[KEY], stored)}
    used = {name for packed in found.values() for name in packed.layout.names.values()}
    for name, dtype in stored.dtypes.items():
        if name.endswith(CODES) and name not in used and dtype not in (*SCALES, "F64"):
            raise stored.refuse(name, f"is {dtype} and has no scales as {method} stores them; get the file again")
    return found


def other_tensors(stored: Stored, packed: Mapping[str, Packed], expected: Container[str]) -> list[str]:
    """The stored tensors that are weights by themselves: none of a quantised module but its bias.

    Args:
      expected: names that the model has.

    Raises:
      ModelError: a bias that the model does not have and that is not zero. GPTQ writes zeros.
    """
    modules = {name.removesuffix("weight") for name in packed}
    found = []
    for name in stored.shapes:
        before, dot, _ = name.partition(".weight.")
        module = f"{before if dot else name.rpartition('.')[0]}."
        if name.endswith(".bias") and module in modules and name not in expected:
            if stored.read(name).any():
                raise stored.refuse(name, "is not zero, and the model has no such bias; get the files again")
        elif name.endswith(".bias") or not (module in modules or name.endswith(BESIDE)):
            found.append(name)
    return found


def _scaled_bytes(settings: dict[str, Any], stored: Stored) -> Iterator[tuple[str, Layout]]:
    """FP8 and int8, whatever the scales are called: `weight_scale_inv` is multiplied by, too."""
    for ending in ("weight_scale_inv", "weight_scale"):
        for module in stored.modules(ending):
            if f"{module}weight_packed" in stored.shapes:
                continue
            name, scale = f"{module}weight", f"{module}{ending}"
            shape = stored.matrix(name, scale, ONE_BYTE)
            names = {"weight": name, "scale": scale}
            if f"{module}weight_zero_point" in stored.shapes:
                of_scale = stored.shapes[scale]
                names["zero"] = stored.require(f"{module}weight_zero_point", of_scale, ("I8",), scale)
            block = _block(settings, shape, name, scale, stored)
            columns = _index(module, names, shape[1], -(-shape[1] // block[1]), stored)
            codes, scales = stored.dtypes[name], stored.dtypes[scale]
            kind = f"{codes} by {scales} in blocks of {block[0]} x {block[1]}{columns}"
            decode = partial(codecs.scaled_bytes, stored=codes, scale=scales, block=block)
            yield name, Layout(kind, shape, names, decode)


def _block(settings: dict[str, Any], shape: tuple[int, int], name: str, scale: str, stored: Stored) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    found, dtype = stored.shapes[scale], stored.dtypes[scale]
    if dtype not in (*SCALES, "F8_E8M0", "F8_E4M3"):
        raise stored.refuse(scale, f"is {dtype}, which is no type of scales")
    if math.prod(found) == 1:
        return shape
    grid = found if len(found) == 2 else (*found, 1)
    sizes = [settings.get("weight_block_size"), *_weights(settings, "block_structure")]
    for size in [*filter(None, sizes), (1, shape[1]), *((1, n) for n in _weights(settings, "group_size") if n)]:
        if isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            if grid == (-(-shape[0] // size[0]), -(-shape[1] // size[1])):
                return size[0], size[1]
    raise stored.refuse(scale, f"has the shape {list(found)}, which fits no blocks of {name} of {list(shape)}")


def _weights(settings: dict[str, Any], key: str) -> list[Any]:
    """What the groups of modules of a compressed-tensors config say of their weights."""
    groups = settings.get("config_groups")
    several = groups.values() if isinstance(groups, dict) else ()
    found = [group.get("weights") for group in several if isinstance(group, dict)]
    return [weights.get(key) for weights in found if isinstance(weights, dict)]


def _index(module: str, names: dict[str, str], inputs: int, groups: int, stored: Stored) -> str:
    """Adds the tensor that says the group of each input, where there is one."""
    name = f"{module}weight_g_idx"
    if name not in stored.shapes:
        return ""
    names["index"] = stored.require(name, (inputs,), ("I32",), names["weight"])
    _check_index(name, groups, stored)
    return ", by index"


def _check_index(name: str, groups: int, stored: Stored) -> bool:
    """Whether the groups that a tensor says are runs of inputs, equally long."""
    index = stored.read(name)
    if index.size and not 0 <= index.min() <= index.max() < groups:
        raise stored.refuse(name, f"names groups from {index.min()} to {index.max()}, of {groups}; get the file again")
    return bool((index == np.arange(index.size) // max(1, -(-index.size // groups))).all())


def _compressed(settings: dict[str, Any], stored: Stored) -> Iterator[tuple[str, Layout]]:
    yield from _scaled_bytes(settings, stored)
    for module in stored.modules("weight_packed"):
        name, scale = f"{module}weight_packed", f"{module}weight_scale"
        rows, columns = stored.matrix(name, name, ("I32", "U8"))
        names = {
            "weight": name,
            "scale": stored.require(scale, (rows, None), (*SCALES, "F8_E4M3", "F8_E8M0", "U8"), name),
        }
        groups = stored.shapes[scale][1]
        if stored.dtypes[name] == "U8":
            yield f"{module}weight", _e2m1(module, names, (rows, 2 * columns), groups, stored)
            continue
        yield f"{module}weight", _pack(settings, module, names, groups, stored)


def _e2m1(module: str, names: dict[str, str], shape: tuple[int, int], groups: int, stored: Stored) -> Layout:
    scale, whole = stored.dtypes[names["scale"]], f"{module}weight_global_scale"
    scale = "F8_E8M0" if scale == "U8" else scale
    group = 32 if scale == "F8_E8M0" else 16
    if scale not in ("F8_E8M0", "F8_E4M3") or groups * group != shape[1]:
        of = f"{stored.dtypes[names['scale']]} of {list(stored.shapes[names['scale']])}"
        raise stored.refuse(names["scale"], f"is {of}, which fits no 4-bit floats of {list(shape)}")
    if scale == "F8_E4M3":
        names["global"] = stored.require(whole, (1,), SCALES, names["weight"])
    decode = partial(codecs.packed_e2m1, scale=scale, group=group)
    return Layout(f"e2m1 by {scale} in groups of {group}", shape, names, decode)


def _pack(settings: dict[str, Any], module: str, names: dict[str, str], groups: int, stored: Stored) -> Layout:
    name = names["weight"]
    rows, words = stored.shapes[name]
    said = stored.read(stored.require(f"{module}weight_shape", (2,), ("I64", "I32"), name)).tolist()
    inputs = said[1]
    said_bits = {bits for bits in _weights(settings, "num_bits") if type(bits) is int and bits in PACKED_BITS}
    bits = {one for one in said_bits if -(-inputs * one // 32) == words}
    if said[0] != rows or len(bits) != 1:
        raise stored.refuse(name, f"has the shape {[rows, words]}, which is none of {said} in the bits that {KEY} says")
    (width,) = bits
    if inputs % groups:
        raise stored.refuse(names["scale"], f"has {groups} groups, which do not divide the {inputs} inputs of {name}")
    if stored.dtypes[names["scale"]] not in SCALES:
        raise stored.refuse(names["scale"], f"is {stored.dtypes[names['scale']]}, which is no type of scales")
    zero = f"{module}weight_zero_point"
    if zero in stored.shapes:
        names["zero"] = stored.require(zero, (-(-rows * width // 32), groups), ("I32",), name)
    by_index = _index(module, names, inputs, groups, stored)
    block = (1, inputs // groups)
    decode = partial(codecs.packed_rows, bits=width, width=inputs, block=block)
    return Layout(f"int{width} in groups of {block[1]}{by_index}", (rows, inputs), names, decode)


def _gptq(settings: dict[str, Any], stored: Stored) -> Iterator[tuple[str, Layout]]:
    second = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
    for module in stored.modules("qweight"):
        name, index = f"{module}qweight", f"{module}g_idx"
        words, outputs = stored.matrix(name, name, ("I32",))
        scales = stored.require(f"{module}scales", (None, outputs), SCALES, name)
        groups, bits = stored.shapes[scales][0], settings.get("bits")
        names = {"qweight": name, "scales": scales}
        if index in stored.shapes and len(stored.shapes[index]) == 1 and stored.shapes[index][0]:
            inputs = stored.shapes[index][0]
            bits = words * 32 // inputs  # `dynamic` gives some modules their own
        elif type(bits) is int and bits in GPTQ_BITS:
            inputs = words * 32 // bits
        else:
            inputs = 0
        if not inputs or bits not in GPTQ_BITS or words * 32 != inputs * bits:
            raise stored.refuse(
                name, f"has {words} words for {inputs} inputs, which is {bits!r} bits a weight; "
                f"{', '.join(map(str, GPTQ_BITS))} are read"
            )  # fmt: skip
        group = -(-inputs // groups)
        names["qzeros"] = stored.require(f"{module}qzeros", (groups, -(-outputs * bits // 32)), ("I32",), name)
        runs = True
        if index in stored.shapes:
            names["g_idx"] = stored.require(index, (inputs,), ("I32",), name)
            runs = _check_index(index, groups, stored)
        elif -(-inputs // group) != groups or (settings.get("group_size") or -1) not in (group, -1):
            raise stored.refuse(scales, f"has {groups} groups, which do not divide the {inputs} inputs of {name}")
        plus = 0 if second else 1
        kind = f"gptq of {bits} bits in groups of {group}, zeros less {plus}"
        decode = partial(codecs.gptq, bits=bits, group=group, plus=plus, runs=runs)
        yield f"{module}weight", Layout(kind, (outputs, inputs), names, decode)


def _awq(settings: dict[str, Any], stored: Stored) -> Iterator[tuple[str, Layout]]:
    for module in stored.modules("qweight"):
        name = f"{module}qweight"
        inputs, words = stored.matrix(name, name, ("I32",))
        scales = stored.require(f"{module}scales", (None, 8 * words), SCALES, name)
        groups = stored.shapes[scales][0]
        names = {"qweight": name, "scales": scales}
        names["qzeros"] = stored.require(f"{module}qzeros", (groups, words), ("I32",), name)
        if inputs % groups:
            raise stored.refuse(scales, f"has {groups} groups, which do not divide the {inputs} inputs of {name}")
        group = inputs // groups
        kind = f"awq of 4 bits in groups of {group}"
        yield f"{module}weight", Layout(kind, (8 * words, inputs), names, partial(codecs.awq, group=group))


METHODS: dict[str, Finder] = {
    "bitsandbytes": bitsandbytes,
    "fp8": _scaled_bytes,
    "fbgemm_fp8": _scaled_bytes,
    "compressed-tensors": _compressed,
    "awq": _awq,
    "gptq": _gptq,
}
# Keys of a method's config that name a version or a size, with those that are read; a key may be missing.
VERSIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "compressed-tensors": {"format": COMPRESSED},
    "awq": {"version": ("gemm",), "format": ("gemm",), "bits": (4,), "w_bit": (4,), "zero_point": (True,)},
    "gptq": {
        "checkpoint_format": ("gptq", "gptq_v2"), "format": ("gptq", "gptq_v2"), "bits": GPTQ_BITS,
        "is_marlin_format": (False,),
    },
}  # fmt: skip
