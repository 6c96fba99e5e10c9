"""Hardware that need not be there: device names, what a device holds, and compile-only devices for it.

A SPEC is `tpu:v5p:2x2x1` (generation and slice), `gpu:h100-80gb:2` (card and number), `gpu:CARD.yaml:2` (a card
that a file describes) or `cpu:8`. The TPU and CUDA compilers come with the extras `tpu` and `cuda12`; no device of
the kind is needed.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pydantic
from jax.experimental import topologies
from pydantic import ConfigDict, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from jlora.config import read_yaml_of
from jlora.errors import ConfigError
from jlora.runtime import private_jax
from jlora.runtime.xla import GPU_MEMORY_FRACTION


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


def _gpu(chip: dict[str, Any], memory: float, bandwidth: float, peak: float, link: float, **more: int) -> Gpu:
    figures = {"memory": int(memory), "bandwidth": int(bandwidth), "peak_flops": peak, "link_bandwidth": link}
    return Gpu(**(chip | figures | more))


GPUS = {
    "a100-40gb": _gpu(_A100, 42331013120, 1555.2e9, 312e12, 300e9),
    "a100-80gb": _gpu(_A100, 85100068864, 2039.04e9, 312e12, 300e9),
    "h100-80gb": _gpu(_H100, 84929347584, 3352.32e9, 989e12, 450e9),
    "h200-141gb": _gpu(_H100, 151397597184, 4800e9, 989e12, 450e9),
    "l40s-48gb": _gpu(_ADA, 44.39 * GIB, 864e9, 362e12, 32e9, cores=142, l2=100663296),
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
    f"{', '.join(GPUS)} (such as gpu:h100-80gb:2) or a file (gpu:CARD.yaml:2, see docs/planner.md), cpu:COUNT"
)


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      capacity: bytes a device that a program may use.
      peak_flops: published dense peak of a device, a second; None for CPUs, like the two after it.
      bandwidth: bytes a second between a device and its memory.
      link_bandwidth: bytes a second that a device sends to others.
    """

    spec: str
    platform: str
    devices: list[Any]
    capacity: int
    peak_flops: float | None = None
    bandwidth: float | None = None
    link_bandwidth: float | None = None


def prepare() -> None:
    """Environment of a process that compiles for absent devices; before JAX first asks for its own."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server to ask for the slice
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing is run, so another process may compile too
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver to compare versions with
    # Autotuning times kernels on the device, which is not there.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()


def resolve(spec: str) -> Target:
    """The devices of a SPEC.

    Raises:
      ConfigError: an unknown name, or the compiler for it is not installed.
    """
    kind, _, rest = spec.partition(":")
    name, _, size = rest.rpartition(":")
    if kind == "cpu" and not name and size.isdigit() and int(size) > 0:
        jax.config.update("jax_num_cpu_devices", int(size))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(size)
        return Target(spec, "cpu", jax.devices("cpu"), memory)
    if kind == "tpu" and name in TPUS and size:
        _require("libtpu", "tpu")
        tpu, devices = TPUS[name], _tpu_devices(spec, name, size)
        return Target(spec, "tpu", devices, tpu.memory, tpu.peak_flops, tpu.bandwidth, tpu.link_bandwidth)
    described = name.endswith((".yaml", ".yml"))
    if kind == "gpu" and (name in GPUS or described) and size.isdigit() and int(size) > 0:
        gpu = read_gpu(Path(name)) if described else GPUS[name]
        _require("jax_cuda12_plugin", "cuda12")
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_target_config(gpu, Path(name).stem), topology=f"1x1x{size}"
        )
        capacity = int(gpu.memory * GPU_MEMORY_FRACTION)
        devices = list(topology.devices)
        return Target(spec, "gpu", devices, capacity, gpu.peak_flops, gpu.bandwidth, gpu.link_bandwidth)
    raise ConfigError(f"unknown topology '{spec}'; known are {KNOWN}")


# Slices that Cloud offers, by the number of dims of a generation's torus.
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


def larger(target: Target) -> Iterator[Target]:
    """More devices of the same kind, smallest number first; none for CPUs, which share one memory."""
    kind, _, rest = target.spec.partition(":")
    name, _, size = rest.rpartition(":")
    if kind == "gpu":
        for exponent in range(8):
            if 2**exponent > len(target.devices):
                yield resolve(f"gpu:{name}:{2**exponent}")
    if kind == "tpu":
        chips = math.prod(map(int, size.split("x")))
        for slice_ in SLICES[size.count("x") + 1]:
            if math.prod(map(int, slice_.split("x"))) > chips:
                yield resolve(f"tpu:{name}:{slice_}")


def read_gpu(path: Path) -> Gpu:
    """A card described by a YAML file whose keys are the attributes of `Gpu`.

    Raises:
      ConfigError: the file can not be read, or a key is unknown, missing or of a wrong value.
    """
    tree = read_yaml_of("--topology", path)
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


def _require(module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"this topology needs a compiler that is not installed; pip install 'jlora[{extra}]'")


def _tpu_devices(spec: str, name: str, size: str) -> list[Any]:
    # One chip is less than a host has, which the topology must be told.
    options = {"chips_per_host_bounds": [1, 1, 1]} if size in ("1x1", "1x1x1") else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{size}", **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"topology '{spec}' is not a slice that exists ({reason}); known are {KNOWN}") from None
    return list(topology.devices)


def _target_config(gpu: Gpu, name: str) -> str:
    """XLA's GPU target configuration, as text of its protocol buffer."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared} threads_per_core_limit: {gpu.threads} core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2} clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory} shared_memory_per_block_optin: {gpu.optin}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


@contextmanager
def compiler_logs_off() -> Iterator[None]:
    """Nothing on stderr meanwhile: the compilers write there of devices they miss, past Python and its settings."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def compiling_for(target: Target) -> AbstractContextManager[None]:
    """What lets JAX lower for the target where its devices are absent."""
    return private_jax.gpu_is_cuda() if target.platform == "gpu" else nullcontext()
