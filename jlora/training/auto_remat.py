"""`model.remat: auto`: the fastest policy whose step fits, by the compiler's own answer, here or on absent hardware.

The ladder is walked from its fast end; what cannot fit by arithmetic is not compiled.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.config import Config
from jlora.model.config import ModelConfig
from jlora.model.remat import LADDER
from jlora.runtime import distributed

# Of a device, left free: cuDNN's workspaces and what lies between buffers are in no compiled peak.
HEADROOM = 0.05
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Layout:
    """One way to run a config.

    Attributes:
      rows: of a micro-batch, on one device.
      batch_size: rows of an optimizer step over all devices; the config's own, where it divides.
    """

    data: int
    fsdp: int
    tensor: int
    remat: str
    quantization: Any
    rows: int
    batch_size: int
    context: int = 1

    @property
    def place(self) -> tuple[int, int, int, int, Any]:
        """What decides where the weights lie."""
        return self.data, self.fsdp, self.tensor, self.context, self.quantization

    @property
    def micro_batches(self) -> int:
        """Gradient accumulation steps."""
        return self.batch_size // (self.rows * self.data * self.fsdp)

    def settings(self) -> dict[str, Any]:
        """Dotted config key -> value."""
        return {
            "mesh.data": self.data,
            "mesh.fsdp": self.fsdp,
            "mesh.tensor": self.tensor,
            "mesh.context": self.context,
            "model.remat": self.remat,
            "training.batch_size": self.batch_size,
            "training.gradient_accumulation_steps": self.micro_batches,
            "model.quantization": self.quantization,
        }


def current(cfg: Config, mesh: dict[str, int], remat: str) -> Layout:
    """The layout that a config asks for, on a mesh whose sizes are known and with a policy that is not `auto`."""
    parts, batch = cfg.training.gradient_accumulation_steps, cfg.training.batch_size
    rows = batch // (parts * mesh["data"] * mesh["fsdp"])
    return Layout(**mesh, remat=remat, quantization=cfg.model.quantization, rows=rows, batch_size=batch)


def saved_bytes(model: ModelConfig, cfg: Config, layout: Layout) -> float:
    """About what the forward pass of a micro-batch keeps for the backward pass, on one device."""
    d, f, h = model.hidden_size, model.intermediate_size, model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    products = 2 * d + (heads + 2 * kv_heads) * h + 2 * f
    mixed, taken = heads * h, (heads + 2 * kv_heads) * h
    width = {
        **{"none": 2 * products, "lean": 2 * d + mixed + taken + 2 * f, "qkv": 2 * d + mixed + taken},
        **{"attention": d + mixed, "full": d, "offload": 0},
    }[layout.remat]
    tokens = layout.rows * cfg.data.max_length / layout.context
    return tokens * model.num_hidden_layers * width * jnp.dtype(cfg.model.dtype).itemsize / layout.tensor


def fastest_that_fits(
    cfg: Config, model: ModelConfig, mesh: jax.sharding.Mesh, room: float, temporaries_of: Callable[[str], float]
) -> str:
    """The first policy of the ladder whose step's temporaries fit, or its last, which is then not asked for.

    Args:
      room: bytes of a device beside the step's arguments.
      temporaries_of: policy -> bytes of a device that its compiled step takes beside its arguments.
    """
    layout = current(cfg, dict(mesh.shape), LADDER[0])
    names = [name for name in LADDER if name != "offload" or mesh.devices.flat[0].platform != "cpu"]
    for name in names[:-1]:
        # Compilers recompute a little by themselves, so half of what is kept counts.
        if saved_bytes(model, cfg, replace(layout, remat=name)) / 2 <= room and temporaries_of(name) <= room:
            return name
    return names[-1]


def compile_fastest(
    cfg: Config, model: ModelConfig, mesh: jax.sharding.Mesh, compile_with: Callable[[str], Any]
) -> tuple[str, Any]:
    """The first policy of the ladder that fits into what the devices have left, and its compiled step.

    Args:
      compile_with: policy -> the step compiled for arguments that the devices hold already.
    """
    compiled: dict[str, Any] = {}
    platform = mesh.devices.flat[0].platform

    def temporaries_of(remat: str) -> float:
        compiled.clear()
        try:
            with fresh():
                compiled[remat] = compile_with(remat)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return math.inf
        arguments = compiled[remat].memory_analysis().argument_size_in_bytes
        return peak_bytes(compiled[remat], platform) - arguments

    room = distributed.least(free_bytes(mesh.local_devices))
    chosen = fastest_that_fits(cfg, model, mesh, room, temporaries_of)
    return chosen, compiled[chosen] if chosen in compiled else compile_with(chosen)


@contextmanager
def fresh() -> Iterator[None]:
    """No executable out of JAX's persistent cache meanwhile: one that was read back need not know its memory."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def peak_bytes(compiled: Any, platform: str) -> int:
    """Bytes of a device that a compiled program holds at once, arguments included."""
    memory = compiled.memory_analysis()
    everything = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    everything -= memory.alias_size_in_bytes
    # The CPU's compiler leaves temporaries out of its peak.
    return everything if platform == "cpu" else memory.peak_memory_in_bytes or everything


def free_bytes(devices: list[jax.Device]) -> int:
    """Bytes that a program may still take on each of these devices of this process, some headroom left."""
    if devices[0].platform == "cpu":
        return int(free_host_bytes() * (1 - HEADROOM)) // len(devices)
    stats = [device.memory_stats() for device in devices]
    return int(min(one["bytes_limit"] * (1 - HEADROOM) - one["bytes_in_use"] for one in stats))


def free_host_bytes() -> int:
    """Memory of this machine that is available, or of the container where that is less."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except OSError:  # not Linux; what others hold is not told
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        most, used = (int((CGROUP / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        stats = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, most - used + int(stats["inactive_file"]))  # pages of files, which make way
