"""`python -m jlora.plan`: compile the real training step for hardware that is not there, and say what it takes.

The same mesh, state and step function as `jlora.train`, of shapes instead of arrays. Memory is the compiler's
own answer for one device; FLOPs are counted over the step's jaxpr; time follows from a utilisation that you name.
"""

import argparse
import math
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from jlora import attention, cli, data, optim
from jlora.adapter import init_adapter
from jlora.config import Config, load_config
from jlora.data import Epochs
from jlora.errors import ConfigError, MemoryExceeded
from jlora.hf.base import open_source, parse_config, resolve
from jlora.model import Decoder, LlamaConfig, abstract_decoder, check_blocks, projection_shapes
from jlora.pretrained import open_pretrained
from jlora.quant import map_axes
from jlora.sharding import make_mesh, named_sharding
from jlora.step import Forward, abstract_state, count_parameters, make_train_step, place_adapter
from jlora.topology import KNOWN, Target, compiler_logs_off, compiling_for, prepare
from jlora.topology import resolve as resolve_topology
from jlora.train import check_batch_split, make_forward, param_dtype

# Named shapes, for a plan without any file of the model.
SHAPES = {
    "llama2-7b": (4096, 11008, 32, 32, 32),
    "llama2-13b": (5120, 13824, 40, 40, 40),
    "llama2-70b": (8192, 28672, 80, 64, 8),
}
UTILIZATIONS = (0.2, 0.3, 0.4, 0.5)


def model_shape(path: str) -> LlamaConfig:
    """Shape of a named size, or of the base at `path`; no weight is read."""
    if path not in SHAPES:
        return parse_config(open_source(resolve(path)).config, path)
    hidden, mlp, layers, heads, kv_heads = SHAPES[path]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
    )


def place_base(base: Decoder, mesh: jax.sharding.Mesh) -> Decoder:
    """The abstract base laid out over `mesh`, as `jlora.hf.base.load_base` lays out the real one."""

    def place(shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=named_sharding(mesh, axes))

    for owner in (base, base.layers):
        for param in vars(owner).values():
            if isinstance(param, nnx.Param):
                param.set_raw_value(map_axes(place, param.get_raw_value(), param.axes))
    return base


def abstract_step(
    cfg: Config, model: LlamaConfig, mesh: jax.sharding.Mesh, forward: Forward
) -> tuple[Any, tuple[Any, Any, Any], dict[str, Any]]:
    """The step, its arguments (state, frozen leaves, batch) as shapes, and {"adapter", "base"}."""
    check_blocks(model, cfg.model.quantization, mesh)
    base = place_base(abstract_decoder(model, param_dtype(cfg), cfg.model.quantization), mesh)
    adapter = {}
    if cfg.method == "lora":
        make = partial(init_adapter, cfg.lora, projection_shapes(model), model.num_hidden_layers, 0)
        adapter = place_adapter(jax.eval_shape(make), model, mesh)
    params = {"adapter": adapter, "base": base}
    labels = optim.labels(params, cfg.method)
    # The schedule's length does not change the program; a plan need not have read the data.
    num_steps = cfg.training.max_steps or 1000
    optimizer = optim.make_optimizer(cfg.optimizer, num_steps, labels)
    state = abstract_state(params, optimizer, cfg, mesh)
    _, frozen = optim.partition(params, labels)
    parts = cfg.training.gradient_accumulation_steps
    shape = (parts, cfg.training.batch_size // parts, cfg.data.max_length)
    sharding = named_sharding(mesh, (None, "act_batch", None))
    dtypes = {"weights": jnp.float32}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32), sharding=sharding)
        for name in ("tokens", "targets", "weights", "segments", "positions")
    }
    step = make_train_step(cfg, forward, optimizer, optim.learning_rate(cfg.optimizer, num_steps))
    return step, (state, frozen, batch), params


def count_flops(jaxpr: core.Jaxpr) -> float:
    """Multiplications and additions of every matrix product, loops taken as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            out: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(left.shape[dim] for dim in contracted) * out.size
            continue
        inner = [count_flops(sub) for sub in _subjaxprs(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _subjaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


def bytes_per_device(tree: Any) -> int:
    """What the leaves of a tree take on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def count_data(cfg: Config) -> dict[str, int] | None:
    """Tokens of an epoch of the user's own rows, and batches packed and padded; None without rows or tokenizer."""
    if cfg.model.path in SHAPES and cfg.model.tokenizer is None:
        return None
    if not Path(cfg.data.train).exists():
        return None
    opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
    rows = data.tokenize(cfg.data.train, opened.tokenizer, cfg.data)
    steps = {}
    for name, packing in (("packed", True), ("padded", False)):
        section = cfg.data.model_copy(update={"packing": packing})
        steps[name] = Epochs(rows, section, cfg.training.batch_size, cfg.training.seed).num_batches(1)
    return {"tokens": sum(len(e.ids) for e in rows.examples), "rows": len(rows.examples), **steps}


def plan(cfg: Config, target: Target) -> dict[str, Any]:
    """Compile for a target; the figures of `--json`, one device's where they are bytes.

    Raises:
      ConfigError: the mesh does not match the devices.
    """
    mesh = make_mesh(cfg.mesh, target.devices)
    check_batch_split(cfg, mesh)
    model = model_shape(cfg.model.path)
    kernel, forward = make_forward(cfg, model, mesh)
    with jax.set_mesh(mesh):
        step, (state, frozen, batch), params = abstract_step(cfg, model, mesh, forward)
        # Kernels hide their products, so FLOPs are counted over the reference attention.
        counted = Forward(attention.reference, forward.remat, forward.dtype)
        counted_step, _, _ = abstract_step(cfg, model, mesh, counted)
        flops = count_flops(jax.make_jaxpr(counted_step)(state, frozen, batch).jaxpr)
        began = time.monotonic()
        with compiling_for(target):
            try:
                compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
                memory: Any = compiled.memory_analysis()
                arguments_bytes, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
                peak = getattr(memory, "peak_memory_in_bytes", 0) or (
                    arguments_bytes + temp + memory.output_size_in_bytes - memory.alias_size_in_bytes
                )
            except jax.errors.JaxRuntimeError as error:
                arguments_bytes, temp = bytes_per_device((state, frozen, batch)), None
                peak = _wanted_bytes(str(error), arguments_bytes)
    tokens = cfg.training.batch_size * cfg.data.max_length
    trained = count_parameters(state.trained)
    total = count_parameters(params)
    num_base = count_parameters(params["base"])
    return {
        "topology": target.spec,
        "devices": len(target.devices),
        "mesh": dict(mesh.shape),
        "attention": kernel,
        "fits": peak <= target.capacity,
        "capacity_bytes": target.capacity,
        "peak_bytes": peak,
        "argument_bytes": arguments_bytes,
        "temp_bytes": temp,
        "base_bytes": bytes_per_device(params["base"]),
        "adapter_bytes": bytes_per_device(params["adapter"]),
        "optimizer_bytes": bytes_per_device(state.opt_state),
        "batch_bytes": bytes_per_device(batch),
        "flops_per_step": flops,
        "tokens_per_step": tokens,
        "trainable_params": trained,
        "frozen_params": total - trained,
        "compile_seconds": time.monotonic() - began,
        "naive": naive(num_base),
    }


def _wanted_bytes(message: str, arguments: int) -> int:
    """Bytes that a program which does not fit would use, from the TPU compiler's refusal."""
    used = re.search(r"Used ([\d.]+)([KMGT]) of", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)", message)
    for found, more in ((used, 0), (temporaries, arguments)):
        if found is not None:
            return more + int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))
    raise MemoryExceeded(f"the compiler refused the step: {message.splitlines()[0]}")


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


def add_time(
    result: dict[str, Any], cfg: Config, target: Target, counts: dict[str, int] | None, args: argparse.Namespace
) -> None:
    """Seconds and dollars of an epoch, at named utilisations of the published peak or at a given speed."""
    devices, per_step = result["devices"], result["tokens_per_step"]
    steps = {name: counts[name] for name in ("packed", "padded")} if counts else {}
    if args.tokens is not None:
        steps = {"given": args.tokens / per_step}
    result["data"] = counts
    seconds: dict[str, dict[str, float]] = {}
    for name, number in steps.items():
        if args.tokens_per_second is not None:
            rate = args.tokens_per_second
            seconds[name] = {f"{rate:g} tokens/s/device": number * per_step / (rate * devices)}
        elif target.peak_flops is not None:
            flops = result["flops_per_step"] * number
            seconds[name] = {f"{u:g}": flops / (devices * target.peak_flops * u) for u in args.utilization}
    result["seconds_per_epoch_at"] = seconds
    result["cost_usd_at"] = None
    if args.price is not None:
        result["cost_usd_at"] = {
            name: {at: value / 3600 * devices * args.price for at, value in table.items()}
            for name, table in seconds.items()
        }


def print_plan(result: dict[str, Any]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    def gib(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**30:,.2f}"

    console = Console(highlight=False)
    word = "fits" if result["fits"] else "DOES NOT FIT"
    table = Table(title=f"{result['topology']}: {word}", title_justify="left")
    table.add_column("GiB per device")
    table.add_column("", justify="right")
    for name in ("base", "adapter", "optimizer", "batch", "argument", "temp", "peak", "capacity"):
        table.add_row(name, gib(result[f"{name}_bytes"]))
    console.print(table)
    naive_gb = {name: value / 1e9 for name, value in result["naive"].items()}
    console.print(
        f"full fine-tuning would take {naive_gb['total_min']:,.0f}-{naive_gb['total']:,.0f} GB over all devices: "
        f"weights {naive_gb['weights']:,.0f}, gradients {naive_gb['gradients']:,.0f}, optimizer "
        f"{naive_gb['optimizer_min']:,.0f}-{naive_gb['optimizer']:,.0f}"
    )
    console.print(
        f"{result['trainable_params']:,} trained of {result['frozen_params'] + result['trainable_params']:,} "
        f"parameters; {result['flops_per_step']:.3g} FLOPs and {result['tokens_per_step']:,} tokens a step; "
        f"attention {result['attention']}; compiled in {result['compile_seconds']:.0f} s"
    )
    for name, times in result["seconds_per_epoch_at"].items():
        for at, value in times.items():
            cost = result["cost_usd_at"]
            dollars = f", ${cost[name][at]:,.2f}" if cost else ""
            how = at if "tokens" in at else f"{float(at):.0%} of the peak"
            console.print(f"an epoch ({name}) at {how}: {value / 3600:,.1f} hours{dollars}")


def main() -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m jlora.plan", description="Compile a run for hardware that is not there.")
    parser.add_argument("--config", help="YAML file of the run")
    parser.add_argument(
        "--topology", action="append", default=[], metavar="SPEC", help=f"{KNOWN}; repeat for more; 'list' names them"
    )
    parser.add_argument("--utilization", type=float, nargs="+", default=list(UTILIZATIONS), help="shares of the peak")
    parser.add_argument("--tokens", type=float, help="tokens of an epoch, instead of counting the config's rows")
    parser.add_argument("--tokens-per-second", type=float, help="a speed per device, instead of utilisations")
    parser.add_argument("--price", type=float, help="dollars per device-hour")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a dotted config key")
    parser.add_argument("-q", "--quiet", action="store_true", help="no table; the exit code alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a topology")
    args = parser.parse_intermixed_args()

    def body() -> int:
        if "list" in args.topology:
            print(KNOWN)
            return 0
        if args.config is None or not args.topology:
            raise ConfigError("--config and --topology are needed (--topology list names the topologies)")
        cfg = load_config(args.config, args.overrides)
        if len(args.topology) > 1:
            return each_in_its_own_process(args)
        prepare()
        with compiler_logs_off():
            target = resolve_topology(args.topology[0])
            result = plan(cfg, target)
        add_time(result, cfg, target, None if args.tokens else count_data(cfg), args)
        if args.json:
            cli.print_json(result)
        elif not args.quiet:
            print_plan(result)
        if not result["fits"]:
            over = (result["peak_bytes"] - target.capacity) / 2**30
            raise MemoryExceeded(
                f"{target.spec}: does not fit by {over:.2f} GiB a device; raise mesh.tensor or mesh.fsdp, lower "
                "data.max_length or training.batch_size, or set model.remat=full"
            )
        return 0

    cli.run(body)


def each_in_its_own_process(args: argparse.Namespace) -> int:
    """One process a topology: the TPU and the CUDA compiler do not share one well. The highest exit code."""
    rest, codes = [], []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--topology":
            next(arguments)
        elif not argument.startswith("--topology="):
            rest.append(argument)
    for spec in args.topology:
        codes.append(subprocess.run([sys.executable, "-m", "jlora.plan", f"--topology={spec}", *rest]).returncode)
    return max(codes)


if __name__ == "__main__":
    main()
