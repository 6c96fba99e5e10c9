"""The training step compiled from shapes: what one device of a target would hold, compute and send.

The same mesh, state and step function as `jlora.train`. Memory is the compiler's own answer for one device, FLOPs
are counted over the step's jaxpr, and bytes sent over the compiled program's text. Executables come from the
compiler each time, never from JAX's persistent cache: see `jlora.training.auto_remat.fresh`.
"""

import math
import re
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlora.config import Config
from jlora.errors import MemoryExceeded
from jlora.hf.planned import shape_of
from jlora.model import attention
from jlora.model.adapter import place_adapter, without_scales
from jlora.model.adapter_init import check_options, new_adapter
from jlora.model.config import ModelConfig
from jlora.model.divisibility import check_batch_split, check_divides
from jlora.model.llama import Decoder, abstract_decoder
from jlora.model.quant import map_axes
from jlora.model.sharding import make_mesh, named_sharding
from jlora.planning.flops import count_flops
from jlora.planning.layouts import with_settings
from jlora.planning.program import Operation, Program, sent_bytes
from jlora.planning.speed import estimate
from jlora.planning.topology import Target
from jlora.runtime import private_jax
from jlora.training import optim
from jlora.training.auto_remat import HEADROOM, fastest_that_fits, fresh, peak_bytes
from jlora.training.step import (
    Forward,
    abstract_state,
    count_parameters,
    count_trained,
    make_forward,
    make_train_step,
    param_dtype,
    stack_sizes,
)


@dataclass(frozen=True)
class Plan:
    """What a run takes on a target: the figures of `plan --json`, under the same names.

    Attributes:
      mesh: size of each axis.
      attention: what runs it, and why.
      fits: whether the peak is within the capacity.
      argument_bytes, temp_bytes, offloaded_bytes: held on a device before the step, beside that in it, and for it in
        the host's memory; the last two are None where the compiler refused the step.
      base_bytes, adapter_bytes, optimizer_bytes, batch_bytes: of the arguments, on one device.
      flops_per_step: over all devices. sent_bytes_per_step: by one.
      estimate: see `jlora.planning.speed`.
      naive: see `naive`.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    attention: str
    remat: str
    fits: bool
    capacity_bytes: int
    peak_bytes: int
    argument_bytes: int
    temp_bytes: int | None
    offloaded_bytes: int | None
    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    flops_per_step: float
    sent_bytes_per_step: float | None
    estimate: dict[str, float] | None
    tokens_per_step: int
    trainable_params: int
    frozen_params: int
    compile_seconds: float
    naive: dict[str, int]

    @property
    def temporaries(self) -> int:
        """Bytes of a device that the step holds at its peak beside its arguments."""
        return self.peak_bytes - self.argument_bytes

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


def place_base(base: Decoder, mesh: jax.sharding.Mesh) -> Decoder:
    """The abstract base laid out over `mesh`, as `jlora.hf.load.load_base` lays out the real one."""

    def place(shape: jax.ShapeDtypeStruct, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=named_sharding(mesh, axes))

    for owner in (base, *base.stacks):
        for param in vars(owner).values():
            if isinstance(param, nnx.Param):
                param.set_raw_value(map_axes(place, param.get_raw_value(), param.axes))
    return base


def abstract_step(
    cfg: Config, model: ModelConfig, mesh: jax.sharding.Mesh, forward: Forward
) -> tuple[Any, tuple[Any, Any, Any, Any], dict[str, Any]]:
    """The step, its arguments (state, what is frozen, batch, hyperparameters) as shapes, and {"adapter", "base"}."""
    how = cfg.model.quantization, stack_sizes(cfg, model), cfg.model.compute is not None
    base = place_base(abstract_decoder(model, param_dtype(cfg), *how), mesh)
    adapter = {}
    if cfg.method == "lora":
        check_options(cfg.lora, model)
        optim.check_rule(cfg, model)
        make = partial(new_adapter, cfg.lora, model, 0)
        adapter = place_adapter(jax.eval_shape(make), model, mesh)
    params = {"adapter": adapter, "base": base}
    trained, frozen = optim.split(params, cfg.method)
    state = abstract_state(trained, cfg, mesh)
    parts = cfg.training.gradient_accumulation_steps
    shape = (parts, cfg.training.batch_size // parts, cfg.data.max_length)
    sharding = named_sharding(mesh, (None, "act_batch", None))
    dtypes = {"weights": jnp.float32}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=sharding)
        for name in ("tokens", "targets", "weights", "segments", "positions")
    }
    # The schedule's length does not change the program; a plan need not have read the data.
    hyper = jax.eval_shape(lambda: optim.hyperparameters(cfg.optimizer, cfg.training.max_steps or 1000))
    everywhere = named_sharding(mesh, ())
    hyper = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for name, x in hyper.items()}
    params["adapter"], _ = without_scales(adapter)
    return make_train_step(cfg, forward), (state, frozen, batch, hyper), params


def step_flops(cfg: Config, model: ModelConfig, mesh: jax.sharding.Mesh, forward: Forward) -> float:
    """FLOPs of one optimizer step over all devices, whatever the mesh and the micro-batches.

    Kernels hide their products, so they are counted over the reference attention.
    """
    counted = replace(forward, attention=attention.reference)
    step, arguments, _ = abstract_step(cfg, model, mesh, counted)
    return count_flops(jax.make_jaxpr(step)(*arguments).jaxpr)


def bytes_per_device(tree: Any) -> int:
    """What the leaves of a tree take on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def checked_mesh(cfg: Config, devices: list[Any], model: ModelConfig) -> jax.sharding.Mesh:
    """The mesh of a config over these devices.

    Raises:
      ConfigError: it does not match the devices, the model or the batch.
    """
    mesh = make_mesh(cfg.mesh, devices)
    check_divides(model, mesh, cfg)
    check_batch_split(cfg, mesh)
    return mesh


def held_bytes(cfg: Config, target: Target, model: ModelConfig) -> int:
    """Bytes of a device that the step's arguments take, without compiling it: less than it needs.

    Raises:
      ConfigError: as `plan`.
    """
    mesh = checked_mesh(cfg, target.devices, model)
    with jax.set_mesh(mesh):
        _, arguments, _ = abstract_step(cfg, model, mesh, make_forward(cfg, model, mesh)[1])
        return bytes_per_device(arguments)


def compile_for(target: Target, step: Any, arguments: tuple[Any, ...]) -> Any:
    """A step compiled for devices that need not be there, anew.

    Raises:
      JaxRuntimeError: the compiler refused it.
    """
    # Lets JAX lower for a GPU that is absent.
    with private_jax.gpu_is_cuda() if target.platform == "gpu" else nullcontext(), fresh():
        return jax.jit(step, donate_argnums=0).lower(*arguments).compile()


def plan(cfg: Config, target: Target, model: ModelConfig | None = None, flops: float | None = None) -> Plan:
    """Compile for a target.

    With `model.remat: auto` they are those of the policy that `jlora.train` would take there.

    Args:
      model: what `shape_of` gave before, and `flops` what `step_flops` did, for callers that plan many times.

    Raises:
      ConfigError: the mesh does not match the devices, the model or the batch.
    """
    model = model or shape_of(cfg)
    mesh = checked_mesh(cfg, target.devices, model)
    if cfg.model.remat == "auto":
        return _of_the_fastest(cfg, target, model, mesh)
    kernel, forward = make_forward(cfg, model, mesh)
    operations: list[Operation] | None = None
    with jax.set_mesh(mesh):
        step, arguments, params = abstract_step(cfg, model, mesh, forward)
        flops = step_flops(cfg, model, mesh, forward) if flops is None else flops
        began = time.monotonic()
        try:
            compiled = compile_for(target, step, arguments)
            memory: Any = compiled.memory_analysis()
            arguments_bytes, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            peak, offloaded = peak_bytes(compiled, target.platform), memory.host_temp_size_in_bytes
            operations = Program(compiled.as_text() or "").operations()
        except jax.errors.JaxRuntimeError as error:
            arguments_bytes, temp, offloaded = bytes_per_device(arguments), None, None
            peak = _wanted_bytes(str(error), arguments_bytes)
    state, _, batch, _ = arguments
    tokens = cfg.training.batch_size * cfg.data.max_length
    trained = count_trained(state.trained)
    total = count_parameters(params)
    base_bytes = bytes_per_device(params["base"])
    return Plan(
        topology=target.spec,
        devices=len(target.devices),
        mesh=dict(mesh.shape),
        attention=kernel,
        remat=cfg.model.remat,
        fits=peak <= target.capacity,
        capacity_bytes=target.capacity,
        peak_bytes=peak,
        argument_bytes=arguments_bytes,
        temp_bytes=temp,
        offloaded_bytes=offloaded,
        base_bytes=base_bytes,
        adapter_bytes=bytes_per_device(params["adapter"]),
        optimizer_bytes=bytes_per_device(state.opt_state),
        batch_bytes=bytes_per_device(batch),
        flops_per_step=flops,
        sent_bytes_per_step=None if operations is None else sent_bytes(operations),
        estimate=None if operations is None else estimate(operations, target, tokens),
        tokens_per_step=tokens,
        trainable_params=trained,
        frozen_params=total - trained,
        compile_seconds=time.monotonic() - began,
        naive=naive(count_parameters(params["base"])),
    )


def _of_the_fastest(cfg: Config, target: Target, model: ModelConfig, mesh: jax.sharding.Mesh) -> Plan:
    """The plan with the first policy of the ladder that fits."""
    plans: dict[str, Plan] = {}

    def planned(remat: str) -> Plan:
        if remat not in plans:
            plans[remat] = plan(with_settings(cfg, {"model.remat": remat}), target, model)
        return plans[remat]

    room = target.capacity * (1 - HEADROOM) - held_bytes(cfg, target, model)
    chosen = planned(fastest_that_fits(cfg, model, mesh, room, lambda remat: planned(remat).temporaries))
    return replace(chosen, compile_seconds=sum(each.compile_seconds for each in plans.values()))


def naive(num_params: int) -> dict[str, int]:
    """Bytes of full fine-tuning over all devices: bfloat16 weights and gradients, AdamW moments in float32.

    `optimizer_min` and `total_min` are for an optimizer with a single bfloat16 state.
    """
    weights = gradients = optimizer_min = 2 * num_params
    optimizer = 8 * num_params
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "total": weights + gradients + optimizer,
        "optimizer_min": optimizer_min,
        "total_min": weights + gradients + optimizer_min,
    }


def _wanted_bytes(message: str, arguments: int) -> int:
    """Bytes that a program which does not fit would use, from the TPU compiler's refusal."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    for found, more in ((used, 0), (temporaries, arguments)):
        if found is not None:
            return more + int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
    raise MemoryExceeded(f"the compiler refused the step: {message.splitlines()[0]}")
