"""The device mesh, and the one table that maps logical axes of arrays to mesh axes.

Knows nothing of the model: callers name the axes of their arrays.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.config import MeshSection
from jlora.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "rank": None,
    # activations
    "act_batch": ("data", "fsdp"),
    "act_seq": "tensor",  # of the residual stream; within a layer heads or mlp take the axis
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}


def make_mesh(cfg: MeshSection, devices: list[jax.Device]) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor` over all `devices`.

    Raises:
      ConfigError: the axis sizes do not multiply to the number of devices.
    """
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} does not cover {len(devices)} "
            "devices; the sizes must multiply to that number (one may be -1, the rest)"
        )
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes; two dims that claim one mesh axis are a bug."""
    spec = [RULES[axis] if axis else None for axis in axes]
    claimed = [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
    assert len(claimed) == len(set(claimed)), f"logical axes {axes} claim a mesh axis twice: {spec}"
    return PartitionSpec(*spec)


def num_shards(mesh: Mesh, axis: str) -> int:
    """Into how many parts `mesh` cuts a dim with this logical axis."""
    names = RULES[axis] or ()
    return int(np.prod([mesh.shape[name] for name in ((names,) if isinstance(names, str) else names)], dtype=int))


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """The placement on `mesh` of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh in force (`jax.set_mesh`); without it the partitioner replicates."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
