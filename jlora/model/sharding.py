"""The device mesh, and the one table that maps logical axes of arrays to mesh axes.

Knows nothing of the model: callers name the axes of their arrays.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora.config import MeshSection
from jlora.errors import ConfigError

Tree = Any

# Their order is that of the devices: neighbours in the last talk most.
MESH_AXES = ("data", "fsdp", "context", "tensor")
CONTEXT = "context"

RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "qkv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "positions": None,
    "tokens": None,
    "rank": None,
    # activations
    "act_batch": ("data", "fsdp"),
    "act_shard": ("data", "fsdp", "context"),  # the tokens of one device
    "act_seq": ("context", "tensor"),  # of the residual stream
    "act_tokens": "context",  # within a layer, where heads or mlp take the axis tensor
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}


def make_mesh(cfg: MeshSection, devices: list[jax.Device]) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `context`, `tensor` over all `devices`.

    Raises:
      ConfigError: the axis sizes do not multiply to the number of devices.
    """
    sizes = [cfg.data, cfg.fsdp, cfg.context, cfg.tensor]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} context={cfg.context} tensor={cfg.tensor} does not cover "
            f"{len(devices)} devices; the sizes must multiply to that number (one may be -1, the rest)"
        )
    if devices[0].platform == "tpu" and all(device.core_on_chip == 0 for device in devices):
        # Neighbours in an axis are neighbours in the torus, tensor's first of all: it talks most.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes; two dims that claim one mesh axis are a bug."""
    spec = [RULES[axis] if axis else None for axis in axes]
    claimed = [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]
    assert len(claimed) == len(set(claimed)), f"logical axes {axes} claim a mesh axis twice: {spec}"
    return PartitionSpec(*spec)


def named_sharding(mesh: Mesh, axes: tuple[str | None, ...]) -> NamedSharding:
    """The placement on `mesh` of an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the mesh in force (`jax.set_mesh`); without it the partitioner replicates."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def context_size() -> int:
    """Over how many devices each row lies in the mesh in force; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[CONTEXT]


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, laid out; no process sends another anything."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather(tree: Tree, mesh: Mesh) -> Tree:
    """Arrays of any layout as NumPy arrays, whole, in every process; one that is sharded over processes is sent."""
    whole = jax.jit(lambda leaf: leaf, out_shardings=named_sharding(mesh, ()))
    return jax.tree.map(lambda leaf: np.asarray(whole(leaf)), tree)


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Rows, ascending, of a batch of `num_rows` that devices of this process hold."""
    shards = named_sharding(mesh, ("act_batch",)).addressable_devices_indices_map((num_rows,))
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in shards.values()]))


def place_rows(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """The batch [..., B, T] over all processes, from this one's `local_rows` of it [..., rows, T].

    Devices that share rows (`context`, `tensor`) hold them whole: they are numbers, and every query's device needs
    the segments of all keys.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    num_rows = local.shape[-2] // len(local_rows(mesh, shards)) * shards
    rows = local_rows(mesh, num_rows)
    leading = (None,) * (local.ndim - 2)

    def shard(index: Any) -> np.ndarray:
        wanted = np.arange(num_rows)[index[-2]]
        first = int(np.searchsorted(rows, wanted[0]))
        return local[..., first : first + len(wanted), :]

    shape = (*local.shape[:-2], num_rows, local.shape[-1])
    return jax.make_array_from_callback(shape, named_sharding(mesh, (*leading, "act_batch", None)), shard)


def one_device_mesh() -> jax.sharding.Mesh:
    """Inference runs on the first device."""
    return make_mesh(MeshSection(data=1, fsdp=1, tensor=1), jax.devices()[:1])
