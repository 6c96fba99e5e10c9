"""Whether a model divides over a mesh, asked before anything is read or compiled.

JAX refuses an argument whose dim does not divide, deep in the call, and pads an activation in silence. Both
are refused here by name. Sizes come from the table of weights, axes from `jlora.model.sharding.RULES`.
"""

import math
from collections.abc import Iterator, Mapping

from jax.sharding import AbstractMesh, Mesh

from jlora.config import Config
from jlora.errors import ConfigError
from jlora.model import quant
from jlora.model.attention.context import CHUNKS
from jlora.model.config import ModelConfig, block_weights, outer_weights, projection_shapes
from jlora.model.sharding import CONTEXT, MESH_AXES, RULES

# Logical axis -> what a user calls its size, in config.json or in the run's config.
NAMES = {
    "embed": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "qkv_heads": "num_attention_heads + 2 num_key_value_heads",
    "mlp": "intermediate_size",
    "vocab": "vocab_size",
    "act_seq": "data.max_length",
}


def split_sizes(model: ModelConfig, max_length: int) -> dict[str, dict[str, int]]:
    """Mesh axis -> the named sizes that are split over it, from the weights' axes and the residual stream's.

    Over `context` only rows are, which `row_multiple` is about.
    """
    weights = (block_weights(model) | outer_weights(model)).values()
    sizes = {axis: size for weight in weights for axis, size in zip(weight.axes, weight.shape, strict=True)}
    sizes["act_seq"] = max_length
    found: dict[str, dict[str, int]] = {axis: {} for axis in MESH_AXES}
    for axis, size in sizes.items():
        rule = RULES[axis]
        for mesh_axis in (rule,) if isinstance(rule, str) else rule or ():
            if mesh_axis != CONTEXT:
                found[mesh_axis][NAMES.get(axis, axis)] = size
    return found


def row_multiple(context: int, tensor: int) -> int:
    """What the tokens of a row must be a multiple of: attention takes it in chunks, the residual stream in parts."""
    return math.lcm(CHUNKS * context if context > 1 else 1, context * tensor)


def working_sizes(model: ModelConfig, max_length: int, axis: str, limit: int) -> list[int]:
    """Sizes of a mesh axis, up to `limit`, that divide everything split over it."""
    common = math.gcd(*split_sizes(model, max_length)[axis].values())
    return [size for size in range(1, limit + 1) if common % size == 0]


def input_cuts(model: ModelConfig, sizes: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Projection, its inputs, and over how many devices they are cut on a mesh of these sizes."""
    weights = block_weights(model)
    for name, (inputs, _) in projection_shapes(model).items():
        mesh_axis = RULES[weights[name].axes[0]]
        assert isinstance(mesh_axis, str)
        yield name, math.prod(inputs), sizes[mesh_axis]


def check_divides(model: ModelConfig, mesh: Mesh | AbstractMesh, cfg: Config) -> None:
    """Every weight, and the residual stream's sequence, splits evenly over the mesh, and between quantised blocks.

    Raises:
      ConfigError: naming the sizes that do not, and the sizes of the mesh axis that would.
    """
    for axis, sizes in split_sizes(model, cfg.data.max_length).items():
        size = mesh.shape[axis]
        uneven = [f"{name}={value}" for name, value in sizes.items() if value % size]
        if uneven:
            fitting = [str(n) for n in working_sizes(model, cfg.data.max_length, axis, max(mesh.size, size, 8))]
            listed = " or ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]]))
            raise ConfigError(f"mesh.{axis}={size} does not divide {', '.join(uneven)}; {listed} would")
    length, multiple = cfg.data.max_length, row_multiple(mesh.shape[CONTEXT], mesh.shape["tensor"])
    if length % multiple:
        over = f"mesh.context={mesh.shape[CONTEXT]}" + f" x tensor={mesh.shape['tensor']}" * (mesh.shape["tensor"] > 1)
        raise ConfigError(
            f"data.max_length={length} cannot be split over {over}; make it a multiple of {multiple}, such as "
            f"{-(-length // multiple) * multiple}, or set mesh.context=1"
        )
    for cut in input_cuts(model, mesh.shape):
        quant.check_shards(cfg.model.quantization, *cut)


def check_batch_split(cfg: Config, mesh: Mesh) -> None:
    """Every micro-batch must split evenly over the devices that share a batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
    if rows % shards:
        raise ConfigError(
            f"training.batch_size / gradient_accumulation_steps = {rows} rows cannot be split over {shards} "
            f"devices (data x fsdp); make it a multiple of {shards}"
        )
