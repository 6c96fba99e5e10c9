"""Devices to compile for that need not be there, by name.

A SPEC is `tpu:v5p:2x2x1` (generation and slice), `gpu:h100-80gb:2` (card and number), `gpu:CARD.yaml:2` (a card
that a file describes) or `cpu:8`. The TPU and CUDA compilers come with the extras `tpu`, and `cuda12` or `cuda13`; no
device of the kind is needed.
"""

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jlora.errors import ConfigError, with_extra
from jlora.planning.hardware import GPUS, SLICES, TPUS, Gpu, canonical, read_gpu, unknown
from jlora.runtime.xla import GPU_MEMORY_FRACTION

# What libtpu calls a generation, where that is another name than ours.
LIBTPU = {"v7x": "tpu7x"}


@dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      capacity: bytes a device that a program may use.
      peak_flops: published dense peak of a device, a second; None for CPUs, like the two after it.
      bandwidth: bytes a second between a device and its memory.
      link_bandwidth: bytes a second that a device sends to others.
      product_flops: a second, that large products were measured to reach; None where nobody did.
      host_bandwidth: bytes a second to the memory of the host; None where none is published.
      clock: cycles a second, of TPUs, whose compiler counts in them.
    """

    spec: str
    platform: str
    devices: list[Any]
    capacity: int
    peak_flops: float | None = None
    bandwidth: float | None = None
    link_bandwidth: float | None = None
    product_flops: float | None = None
    host_bandwidth: float | None = None
    clock: float | None = None


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
    spec = canonical(spec)
    kind, _, rest = spec.partition(":")
    name, _, size = rest.rpartition(":")
    if kind == "cpu" and not name and _number(size):
        jax.config.update("jax_num_cpu_devices", int(size))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(size)
        return Target(spec, "cpu", jax.devices("cpu"), memory)
    if kind == "tpu" and name in TPUS and size:
        _require("tpu", "libtpu")
        tpu, devices = TPUS[name], _tpu_devices(spec, name, size)
        rates = {"peak_flops": tpu.peak_flops, "bandwidth": tpu.bandwidth, "link_bandwidth": tpu.link_bandwidth}
        return Target(spec, "tpu", devices, tpu.memory, **rates, clock=tpu.clock)
    described = name.endswith((".yaml", ".yml"))
    if kind == "gpu" and (name in GPUS or described) and _number(size):
        gpu = read_gpu(Path(name)) if described else GPUS[name]
        _require("cuda12", "jax_cuda12_plugin", "jax_cuda13_plugin")
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_target_config(gpu, Path(name).stem), topology=f"1x1x{size}"
        )
        capacity = int(gpu.memory * GPU_MEMORY_FRACTION)
        devices = list(topology.devices)
        rates = {"peak_flops": gpu.peak_flops, "bandwidth": gpu.bandwidth, "link_bandwidth": gpu.link_bandwidth}
        reached = {"product_flops": gpu.product_flops, "host_bandwidth": gpu.host_bandwidth}
        return Target(spec, "gpu", devices, capacity, **rates, **reached)
    raise unknown(spec)


def _number(text: str) -> bool:
    """Whether a number of devices is written so: digits of ASCII, not zero."""
    return text.isascii() and text.isdecimal() and int(text) > 0


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


def _require(extra: str, *modules: str) -> None:
    """One of the modules, of which the extra brings the first."""
    if not any(map(importlib.util.find_spec, modules)):
        raise ConfigError(f"this topology needs a compiler that is not installed; pip install {with_extra(extra)}")


def _tpu_devices(spec: str, name: str, size: str) -> list[Any]:
    # One chip is less than a host has, which the topology must be told.
    options = {"chips_per_host_bounds": [1, 1, 1]} if size in ("1x1", "1x1x1") else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{LIBTPU.get(name, name)}:{size}", **options
        )
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        slices = ", ".join(SLICES[TPUS[name].dims])
        raise ConfigError(f"topology '{spec}' is not a slice that exists ({reason}); such as {slices}") from None
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
