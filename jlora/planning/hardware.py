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
    """What XLA's GPU compiler is told of a card, its published peaks, and what it was measured to reach.

    Attributes:
      capability: CUDA compute capability, such as (9, 0).
      cores: streaming multiprocessors. fpus, threads: of one of them, float32 units and resident threads.
      memory: bytes as the driver reports them.
      bandwidth: of the memory, bytes a second. clock: GHz.
      l2, shared, optin: bytes of L2, and of shared memory a core and a block.
      peak_flops: dense bfloat16 (float16 for the T4), a second, by the data sheet.
      link_bandwidth: bytes a second that a card can send to others of its host: NVLink, or PCI Express.
      product_flops: a second, that large products of that dtype were measured to reach; None: not measured.
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
    product_flops: PositiveFloat | None = None

    @property
    def host_bandwidth(self) -> float:
        """Bytes a second to the memory of its host: sixteen lanes of the PCI Express of its generation."""
        return 64e9 if self.capability >= (9, 0) else 32e9 if self.capability >= (8, 0) else 16e9


GIB = 2**30
_A100 = dict(capability=(8, 0), cores=108, fpus=64, threads=2048, l2=41943040, clock=1.41, shared=167936, optin=166912)
_HOPPER = dict(capability=(9, 0), fpus=128, threads=2048, clock=1.98, shared=233472, optin=232448)
_H100 = _HOPPER | dict(cores=132, l2=52428800)
_ADA = dict(capability=(8, 9), fpus=128, threads=1536, clock=2.52, shared=102400, optin=101376)
_TURING = dict(capability=(7, 5), fpus=64, threads=1024, clock=1.59, shared=65536, optin=65536)
_GA102 = dict(capability=(8, 6), fpus=128, threads=1536, l2=6291456, clock=1.7, shared=102400, optin=101376)
_GB202 = dict(capability=(12, 0), fpus=128, threads=1536, l2=100663296, clock=2.41, shared=102400, optin=101376)
_B200 = dict(
    **dict(capability=(10, 0), cores=148, fpus=128, threads=2048),
    **dict(l2=132644864, clock=1.97, shared=233472, optin=232448),
)


def _gpu(
    chip: dict[str, Any], memory: float, bandwidth: float, peak: float, product: float, link: float, **more: int
) -> Gpu:
    figures = {"memory": int(memory), "bandwidth": int(bandwidth), "peak_flops": peak, "link_bandwidth": link}
    return Gpu(**(chip | figures | more), product_flops=product)


# Memory, bandwidth, peak and links by NVIDIA's data sheets and its driver. What large bfloat16 products reach (the T4:
# float16), as others measured it, read on 2026-11-30:
#   A100, H100, H200, B200, GB200   github.com/stas00/ml-engineering, "Maximum Achievable Matmul FLOPS"
#   H100 NVL, L40S, L4, A10G, A6000, 3090, 4090   github.com/mag-/gpu_benchmark
#   RTX 5090   main-horse.github.io/posts/5090-mm-perf
#   H20        github.com/zzc0721/torch-performance-test-data
#   T4         forums.developer.nvidia.com/t/264462 (its 70 watts hold it there)
GPUS = {
    "a100-40gb": _gpu(_A100, 42331013120, 1555.2e9, 312e12, 271.2e12, 300e9),
    "a100-80gb": _gpu(_A100, 85100068864, 2039.04e9, 312e12, 271.2e12, 300e9),
    "h100-80gb": _gpu(_H100, 84929347584, 3352.32e9, 989e12, 794.5e12, 450e9),
    "h100nvl-94gb": _gpu(_H100, 93.10 * GIB, 3938e9, 835e12, 488.5e12, 300e9),
    "h20-96gb": _gpu(_HOPPER, 95.00 * GIB, 4000e9, 148e12, 141.9e12, 450e9, cores=78, l2=62914560),
    "h200-141gb": _gpu(_H100, 151397597184, 4800e9, 989e12, 794.5e12, 450e9),
    "b200-180gb": _gpu(_B200, 178.35 * GIB, 7672e9, 2250e12, 1745e12, 900e9),
    "gb200-186gb": _gpu(_B200, 184.31 * GIB, 8000e9, 2500e12, 1822e12, 900e9),
    "l40s-48gb": _gpu(_ADA, 44.39 * GIB, 864e9, 362e12, 252e12, 32e9, cores=142, l2=100663296),
    "l4-24gb": _gpu(_ADA, 22.03 * GIB, 300e9, 121e12, 91.4e12, 32e9, cores=58, l2=50331648),
    "a10g-24gb": _gpu(_GA102, 22.03 * GIB, 600e9, 70e12, 69.7e12, 32e9, cores=80),
    "rtxa6000-48gb": _gpu(_GA102, 47.53 * GIB, 768e9, 155e12, 131.2e12, 32e9, cores=84),
    "rtx3090-24gb": _gpu(_GA102, 23.68 * GIB, 936e9, 71e12, 78e12, 32e9, cores=82),
    "rtx4090-24gb": _gpu(_ADA, 23.64 * GIB, 1008e9, 165e12, 178.8e12, 32e9, cores=128, l2=75497472),
    "rtx5090-32gb": _gpu(_GB202, 31.36 * GIB, 1792e9, 209.5e12, 224.3e12, 64e9, cores=170),
    "t4-16gb": _gpu(_TURING, 14.56 * GIB, 320e9, 65e12, 24e12, 16e9, cores=40, l2=4194304),
}


@dataclass(frozen=True)
class Tpu:
    """Published figures of a TPU generation, per device.

    Attributes:
      memory: HBM bytes that the compiler hands out. bandwidth: of HBM, bytes a second.
      peak_flops: bfloat16, a second. link_bandwidth: bytes a second sent over all links to other chips.
      clock: cycles a second: the peak by what the matrix units of a core do in a cycle.
      cores: that Cloud counts of a chip in an accelerator type, such as v5p-8. dims: of its torus.
    """

    memory: int
    peak_flops: float
    bandwidth: float
    link_bandwidth: float
    clock: float
    cores: int
    dims: int


TPUS = {
    "v4": Tpu(int(15.25 * GIB), 137.5e12, 614e9, 150e9, 1.05e9, 2, 3),  # a device is one of a chip's two cores
    "v5e": Tpu(int(15.75 * GIB), 197e12, 819e9, 200e9, 1.5e9, 1, 2),
    "v5p": Tpu(int(95.74 * GIB), 459e12, 2765e9, 600e9, 1.75e9, 2, 3),
    "v6e": Tpu(int(31.25 * GIB), 918e12, 1640e9, 400e9, 1.75e9, 1, 2),
    "v7x": Tpu(int(94.75 * GIB), 1153.5e12, 3690e9, 300e9, 2.2e9, 2, 3),  # a core, as of v4
}
KNOWN = (
    f"tpu:GENERATION:SLICE with {', '.join(TPUS)} (such as tpu:v5p:2x2x1), gpu:CARD:COUNT with "
    f"{', '.join(GPUS)} (such as gpu:h100-80gb:2) or a file that describes one (gpu:CARD.yaml:2), cpu:COUNT"
)
# What else a generation is called.
ALSO = {"v5litepod": "v5e", "trillium": "v6e", "tpu7x": "v7x", "ironwood": "v7x"}
# An accelerator type of Cloud; cards that people ask for and XLA's CUDA compiler does not know.
TYPE = re.compile(r"(?:tpu:)?([a-z0-9]+)-([0-9]+)")
AMD = re.compile(r"(gpu:)?(amd-?)?(mi\d{2,3}x?|radeon.*|rx\d.*)\b")

# Slices that Cloud offers, by the number of dims of a generation's torus.
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


def canonical(spec: str) -> str:
    """A SPEC as `resolve` knows it, from what clouds and people call the same.

    In any case; a card by the name that it alone begins with (`gpu:h100:2`), with or without dashes and its brand, one
    of it where no number is given (`gpu:t4-16gb`); a TPU by its accelerator type in Cloud (`v5litepod-8`), of v4 and
    v5p two cores a chip, and the smallest slice where none is given.

    Raises:
      ConfigError: several cards are called so, or no compiler of ours knows it.
    """
    if spec.startswith("gpu:") and spec.rpartition(":")[0].endswith((".yaml", ".yml")):
        return spec
    lower = spec.lower()
    if AMD.match(lower):
        raise ConfigError(f"topology '{spec}': plans for GPUs come from XLA's CUDA compiler, which knows no AMD card")
    if (typed := TYPE.fullmatch(lower)) and (name := ALSO.get(typed[1], typed[1])) in TPUS:
        slice_ = _slices(TPUS[name]).get(int(typed[2]))
        return f"tpu:{name}:{slice_}" if slice_ else lower
    kind, name, size = [*lower.split(":"), "", ""][:3]
    if kind == "tpu" and (name := ALSO.get(name, name)) in TPUS:
        return f"tpu:{name}:{size or SLICES[TPUS[name].dims][0]}"
    if kind == "gpu":
        cards = [card for card in GPUS if card == name or card.startswith(f"{name}-")]
        cards = cards or [card for card in GPUS if _plain(name) in _called(card)]
        if len(cards) > 1:
            raise ConfigError(f"topology '{spec}': which, {' or '.join(f'gpu:{card}:{size or 1}' for card in cards)}?")
        return f"gpu:{cards[0] if cards else name}:{size or 1}"
    return "cpu:1" if lower == "cpu" else lower


def _slices(tpu: Tpu) -> dict[int, str]:
    """The slices of a generation by the number in their accelerator type."""
    return {math.prod(map(int, each.split("x"))) * tpu.cores: each for each in SLICES[tpu.dims]}


def _called(card: str) -> tuple[str, ...]:
    """What a card may be called: without its memory, or with it, `gb` or not."""
    whole = _plain(card)
    return _plain(card.partition("-")[0]), whole, whole.removesuffix("gb")


def _plain(name: str) -> str:
    """The letters and digits of a card's name, without its brand."""
    return re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", name)


def unknown(spec: str) -> ConfigError:
    """That a SPEC is not known, with the nearest that is, or all."""
    nearest = _nearest(spec.lower())
    instead = f"did you mean {nearest}? --topology list names all" if nearest else f"known are {KNOWN}"
    return ConfigError(f"unknown topology '{spec}'; {instead}")


def _nearest(lower: str) -> str | None:
    if typed := TYPE.fullmatch(lower):
        for name in difflib.get_close_matches(typed[1], [*TPUS, *ALSO], n=1, cutoff=0.6):
            sizes = _slices(TPUS[ALSO.get(name, name)])
            return f"{name}-{min(sizes, key=lambda size: abs(size - int(typed[2])))}"
    known = [*(f"gpu:{card}" for card in GPUS), *(f"tpu:{name}" for name in TPUS)]
    kind, name, size = [*lower.split(":"), "", ""][:3]
    if kind not in ("gpu", "tpu", "cpu"):  # a card alone, such as h100:2
        kind, name, size = "gpu", kind, name
    if kind == "gpu" and not (size.isascii() and size.isdecimal() and int(size)):
        size = "1"
    close = difflib.get_close_matches(f"{kind}:{name}", known, n=1, cutoff=0.6)
    return f"{close[0]}:{size}".rstrip(":") if close else None


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
