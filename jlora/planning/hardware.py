"""What the planner knows of GPUs and TPUs: memory, published peaks, and what XLA's compiler is told of a card."""

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from jlora.config import read_yaml_of
from jlora.errors import ConfigError


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Gpu:
    """What XLA's GPU compiler is told of a card, and its published peaks.

    Attributes:
      capability: CUDA compute capability, such as (9, 0).
      cores: streaming multiprocessors. fpus, threads: of one of them, float32 units and resident threads.
      memory: bytes as the driver reports them.
      bandwidth: of the memory, bytes a second. clock: GHz.
      l2, shared, optin: bytes of L2, and of shared memory a core and a block.
      peak_flops: dense bfloat16 (float16 for the T4), a second.
      link_bandwidth: bytes a second that a card can send to others of its host: NVLink, or PCI Express.
    """

    capability: tuple[PositiveInt, int]
    cores: PositiveInt
    fpus: PositiveInt
    threads: PositiveInt
    memory: PositiveInt
    bandwidth: PositiveInt
    l2: PositiveInt
    clock: PositiveFloat
    shared: PositiveInt
    optin: PositiveInt
    peak_flops: PositiveFloat
    link_bandwidth: PositiveFloat


GIB = 2**30
_A100 = dict(capability=(8, 0), cores=108, fpus=64, threads=2048, l2=41943040, clock=1.41, shared=167936, optin=166912)
_H100 = dict(capability=(9, 0), cores=132, fpus=128, threads=2048, l2=52428800, clock=1.98, shared=233472, optin=232448)
_ADA = dict(capability=(8, 9), fpus=128, threads=1536, clock=2.52, shared=102400, optin=101376)
_TURING = dict(capability=(7, 5), fpus=64, threads=1024, clock=1.59, shared=65536, optin=65536)
_GA102 = dict(capability=(8, 6), fpus=128, threads=1536, l2=6291456, clock=1.7, shared=102400, optin=101376)
_B200 = dict(capability=(10, 0), cores=148, fpus=128, threads=2048, l2=132644864, clock=1.97)


def _gpu(chip: dict[str, Any], memory: float, bandwidth: float, peak: float, link: float, **more: int) -> Gpu:
    figures = {"memory": int(memory), "bandwidth": int(bandwidth), "peak_flops": peak, "link_bandwidth": link}
    return Gpu(**(chip | figures | more))


GPUS = {
    "a100-40gb": _gpu(_A100, 42331013120, 1555.2e9, 312e12, 300e9),
    "a100-80gb": _gpu(_A100, 85100068864, 2039.04e9, 312e12, 300e9),
    "h100-80gb": _gpu(_H100, 84929347584, 3352.32e9, 989e12, 450e9),
    "h200-141gb": _gpu(_H100, 151397597184, 4800e9, 989e12, 450e9),
    "b200-180gb": _gpu(_B200, 178.35 * GIB, 7672e9, 2250e12, 900e9, shared=233472, optin=232448),
    "l40s-48gb": _gpu(_ADA, 44.39 * GIB, 864e9, 362e12, 32e9, cores=142, l2=100663296),
    "l4-24gb": _gpu(_ADA, 22.03 * GIB, 300e9, 121e12, 32e9, cores=58, l2=50331648),
    "a10g-24gb": _gpu(_GA102, 22.03 * GIB, 600e9, 70e12, 32e9, cores=80),
    "rtxa6000-48gb": _gpu(_GA102, 47.53 * GIB, 768e9, 155e12, 32e9, cores=84),
    "rtx3090-24gb": _gpu(_GA102, 23.68 * GIB, 936e9, 71e12, 32e9, cores=82),
    "rtx4090-24gb": _gpu(_ADA, 23.64 * GIB, 1008e9, 165e12, 32e9, cores=128, l2=75497472),
    "t4-16gb": _gpu(_TURING, 14.56 * GIB, 320e9, 65e12, 16e9, cores=40, l2=4194304),
}


@dataclass(frozen=True)
class Tpu:
    """Published figures of a TPU generation, per device.

    Attributes:
      memory: HBM bytes that the compiler hands out. bandwidth: of HBM, bytes a second.
      peak_flops: bfloat16, a second. link_bandwidth: bytes a second sent over all links to other chips.
    """

    memory: int
    peak_flops: float
    bandwidth: float
    link_bandwidth: float


TPUS = {
    "v4": Tpu(int(15.25 * GIB), 137.5e12, 614e9, 150e9),  # a device is one of a chip's two cores
    "v5e": Tpu(int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v5p": Tpu(int(95.74 * GIB), 459e12, 2765e9, 600e9),
    "v6e": Tpu(int(31.25 * GIB), 918e12, 1640e9, 400e9),
}
KNOWN = (
    f"tpu:GENERATION:SLICE with {', '.join(TPUS)} (such as tpu:v5p:2x2x1), gpu:CARD:COUNT with "
    f"{', '.join(GPUS)} (such as gpu:h100-80gb:2) or a file that describes one (gpu:CARD.yaml:2), cpu:COUNT"
)

# Slices that Cloud offers, by the number of dims of a generation's torus.
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


def canonical(spec: str) -> str:
    """A SPEC as `resolve` knows it, from what clouds and people call the same.

    In any case; a card by the name that it alone begins with (`gpu:h100:2`), one of it where no number is given
    (`gpu:t4-16gb`); a TPU by its accelerator type in Cloud (`v5litepod-8`), of v4 and v5p two cores a chip.

    Raises:
      ConfigError: several cards are called so.
    """
    if spec.startswith("gpu:") and spec.rpartition(":")[0].endswith((".yaml", ".yml")):
        return spec
    lower = spec.lower()
    if typed := re.fullmatch(r"(?:tpu:)?(v4|v5litepod|v5e|v5p|v6e)-([0-9]+)", lower):
        name = typed[1].replace("v5litepod", "v5e")
        cores, dims = (2, 3) if name in ("v4", "v5p") else (1, 2)
        for slice_ in SLICES[dims]:
            if math.prod(map(int, slice_.split("x"))) * cores == int(typed[2]):
                return f"tpu:{name}:{slice_}"
    if lower.startswith("gpu:"):
        _, name, count = [*lower.split(":"), "1"][:3]
        cards = [card for card in GPUS if card == name or card.startswith(f"{name}-")]
        cards = cards or [card for card in GPUS if card.removeprefix("rtx").startswith(f"{name.removeprefix('rtx')}-")]
        if len(cards) > 1:
            raise ConfigError(f"topology '{spec}': which, {' or '.join(f'gpu:{card}:{count}' for card in cards)}?")
        return f"gpu:{cards[0] if cards else name}:{count}"
    return lower


def unknown(spec: str) -> ConfigError:
    """That a SPEC is not known, with the nearest that is, or all."""
    known = [*(f"gpu:{card}" for card in GPUS), *(f"tpu:{name}" for name in TPUS)]
    kind, _, rest = spec.partition(":")
    close = difflib.get_close_matches(f"{kind}:{rest.partition(':')[0]}".lower(), known, n=1, cutoff=0.6)
    size = rest.partition(":")[2]
    if kind == "gpu" and not (size.isascii() and size.isdecimal() and int(size)):
        size = "1"
    nearest = f"{close[0]}:{size}".rstrip(":") if close else ""
    instead = f"did you mean {nearest}? --topology list names all" if close else f"known are {KNOWN}"
    return ConfigError(f"unknown topology '{spec}'; {instead}")


def read_gpu(path: Path) -> Gpu:
    """A card described by a YAML file whose keys are the attributes of `Gpu`.

    Raises:
      ConfigError: the file cannot be read, or a key is unknown, missing or of a wrong value.
    """
    tree = read_yaml_of(path)
    try:
        return TypeAdapter(Gpu).validate_python(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key, known = ".".join(map(str, problem["loc"])), ", ".join(Gpu.__dataclass_fields__)
        match problem["type"]:
            case "missing":
                says = f"key '{key}' is missing; a card has {known}"
            case "unexpected_keyword_argument":
                says = f"unknown key '{key}'; a card has {known}"
            case "dataclass_type":
                says = f"must hold keys; a card has {known}"
            case _:
                says = f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, but it is {problem['input']!r}"
        raise ConfigError(f"{path}: {says}") from None
