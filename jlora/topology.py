"""Hardware that need not be there: device names, what a device holds, and compile-only devices for it.

A SPEC is `tpu:v5p:2x2x1` (generation and slice), `gpu:h100-80gb:2` (card and number) or `cpu:8`. The TPU and
CUDA compilers come with the extras `tpu` and `cuda12`; no device of the kind is needed.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies

from jlora.cli import GPU_MEMORY_FRACTION
from jlora.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """What XLA's GPU compiler is told of a card, and its published dense bfloat16 peak (float16 for the T4).

    Attributes:
      memory: bytes as the driver reports them.
      bandwidth: bytes a second. clock: GHz. l2, shared, optin: bytes of L2, and of shared memory a core and a block.
    """

    capability: tuple[int, int]
    cores: int
    fpus: int
    threads: int
    memory: int
    bandwidth: int
    l2: int
    clock: float
    shared: int
    optin: int
    peak_flops: float


GIB = 2**30
GPUS = {
    "a100-40gb": Gpu((8, 0), 108, 64, 2048, 42331013120, 1555200000000, 41943040, 1.41, 167936, 166912, 312e12),
    "a100-80gb": Gpu((8, 0), 108, 64, 2048, 85100068864, 2039040000000, 41943040, 1.41, 167936, 166912, 312e12),
    "h100-80gb": Gpu((9, 0), 132, 128, 2048, 84929347584, 3352320000000, 52428800, 1.98, 233472, 232448, 989e12),
    "h200-141gb": Gpu((9, 0), 132, 128, 2048, 151397597184, 4800000000000, 52428800, 1.98, 233472, 232448, 989e12),
    "l40s-48gb": Gpu((8, 9), 142, 128, 1536, int(44.39 * GIB), 864000000000, 100663296, 2.52, 102400, 101376, 362e12),
    "rtx4090-24gb": Gpu(
        (8, 9), 128, 128, 1536, int(23.64 * GIB), 1008000000000, 75497472, 2.52, 102400, 101376, 165e12
    ),
    "t4-16gb": Gpu((7, 5), 40, 64, 1024, int(14.56 * GIB), 320000000000, 4194304, 1.59, 65536, 65536, 65e12),
}
# Generation -> HBM bytes that the compiler hands out per device, and the published bfloat16 peak per device.
TPUS = {
    "v4": (int(15.25 * GIB), 137.5e12),  # a device is one of a chip's two cores
    "v5e": (int(15.75 * GIB), 197e12),
    "v5p": (int(95.74 * GIB), 459e12),
    "v6e": (int(31.25 * GIB), 918e12),
}
KNOWN = (
    f"tpu:GENERATION:SLICE with {', '.join(TPUS)} (such as tpu:v5p:2x2x1), gpu:CARD:COUNT with "
    f"{', '.join(GPUS)} (such as gpu:h100-80gb:2), cpu:COUNT"
)


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      capacity: bytes a device that a program may use.
      peak_flops: published dense peak of a device, a second; None for CPUs.
    """

    spec: str
    platform: str
    devices: list[Any]
    capacity: int
    peak_flops: float | None


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
    name, _, size = rest.partition(":")
    if kind == "cpu" and name.isdigit() and int(name) > 0 and not size:
        jax.config.update("jax_num_cpu_devices", int(name))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(name)
        return Target(spec, "cpu", jax.devices("cpu"), memory, None)
    if kind == "tpu" and name in TPUS and size:
        _require("libtpu", "tpu")
        capacity, peak = TPUS[name]
        return Target(spec, "tpu", _tpu_devices(spec, name, size), capacity, peak)
    if kind == "gpu" and name in GPUS and size.isdigit() and int(size) > 0:
        _require("jax_cuda12_plugin", "cuda12")
        gpu = GPUS[name]
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_target_config(gpu, name), topology=f"1x1x{size}"
        )
        return Target(spec, "gpu", list(topology.devices), int(gpu.memory * GPU_MEMORY_FRACTION), gpu.peak_flops)
    raise ConfigError(f"unknown topology '{spec}'; known are {KNOWN}")


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


@contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Let JAX lower for CUDA where it has no CUDA device.

    It resolves the alias "gpu" by asking the backends that are up, and none is (jax issues 23971, 28376).
    """
    if target.platform != "gpu":
        yield
        return
    from jax._src import xla_bridge

    expand, canonicalize = xla_bridge.expand_platform_alias, xla_bridge.canonicalize_platform
    aliased: dict[str, Any] = {
        "expand_platform_alias": lambda platform: ["cuda"] if platform == "gpu" else expand(platform),
        "canonicalize_platform": lambda platform: "cuda" if platform == "gpu" else canonicalize(platform),
    }
    with mock.patch.multiple(xla_bridge, **aliased):
        yield
