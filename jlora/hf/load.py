"""Brings a base from disk to the devices of a mesh, with bounded host memory.

Each process reads only the slices that its devices hold, in blocks of a few megabytes, and writes them into
the devices' own buffers; the arrays over the whole mesh are put together at the end. A projection that is to be
quantised is, block by block, on its devices. Nothing is sent between processes but the tensors' digests and, for the
second quantisation of nf4 and int4, the absmax of their blocks.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora.errors import ConfigError, ModelError
from jlora.hf.names import Entry
from jlora.hf.packed import Packed
from jlora.hf.share import Range, Share, share_of
from jlora.hf.source import Source, check_names
from jlora.model import quant
from jlora.model.llama import Decoder, abstract_decoder
from jlora.model.sharding import named_sharding

HASH_BYTES = 4 * 2**20

# The one axis of a mesh of this process's devices. A buffer over it is the devices' own shards, end to end.
DEVICE = PartitionSpec("device")

# The next two run on all devices of this process, each on its own shard and with nothing between them: one
# program, compiled once and not once for each device.


@partial(jax.jit, static_argnames=("mesh", "shapes", "carriers", "dtype", "kind", "width", "transposed"))
def _turn(
    pieces: jax.Array,
    kept: jax.Array,
    *,
    mesh: Mesh,
    shapes: tuple[tuple[int, ...], ...],
    carriers: tuple[jnp.dtype, ...],
    dtype: jnp.dtype,
    kind: str | None,
    width: int,
    transposed: bool,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Each device's piece of the file as a block of each buffer; and whether it is finite, [devices] bool.

    Args:
      kept, width: see `Share`.
      shapes, carriers: of the blocks, in the order of the leaf's buffers.
      dtype: of the weight where it is not quantised to `kind`.
    """

    def turn(piece: jax.Array, first: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        # Checked here, since NumPy takes longer for it in 16 bits than all the rest.
        finite = jnp.isfinite(piece).all()[None]
        weight = piece.T if transposed else piece
        parts: tuple[jax.Array, ...] = (weight.astype(dtype),)
        if kind is not None:
            parts = quant.encode(weight, kind)
        if width != piece.shape[1]:
            parts = jax.lax.dynamic_slice_in_dim(parts[0], first[0], width), *parts[1:]
        blocks = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return tuple(map(carried, blocks, carriers)), finite

    def carried(block: jax.Array, carrier: jnp.dtype) -> jax.Array:
        return block if carrier == block.dtype else jax.lax.bitcast_convert_type(block, carrier)

    return jax.shard_map(turn, mesh=mesh, in_specs=DEVICE, out_specs=DEVICE)(pieces, kept)


@partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _write(
    buffers: tuple[jax.Array, ...], blocks: tuple[jax.Array, ...], starts: tuple[jax.Array, ...], *, mesh: Mesh
) -> tuple[jax.Array, ...]:
    """Each device's blocks at their indices of its buffers."""

    def write(buffer: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(buffer, block, tuple(start))

    specs = (DEVICE, DEVICE, PartitionSpec())
    every = jax.shard_map(lambda *args: tuple(map(write, *args)), mesh=mesh, in_specs=specs, out_specs=DEVICE)
    return every(buffers, blocks, starts)


def _pieces(part: Callable[[Range, Range], np.ndarray], share: Share, size: int, start: int) -> Iterator[np.ndarray]:
    """Rows [start, start + size) of each device's share, each row of the file read once for all of them."""
    wanted: dict[Range, list[Range]] = {}
    for (first, _), columns in share.regions:
        wanted.setdefault((first + start, first + start + size), []).append(columns)
    hulls = {rows: (min(c[0] for c in columns), max(c[1] for c in columns)) for rows, columns in wanted.items()}
    read = {rows: part(rows, hull) for rows, hull in hulls.items()}
    cut: dict[tuple[Range, Range], np.ndarray] = {}
    for (first, _), (left, right) in share.regions:
        rows = first + start, first + start + size
        if (rows, (left, right)) not in cut:
            piece = read[rows][:, left - hulls[rows][0] : right - hulls[rows][0]]
            cut[rows, (left, right)] = np.require(piece, requirements=["C", "A"])  # a header may be of odd length
        yield cut[rows, (left, right)]


def _load_tensor(source: Source, name: str, entry: Entry, share: Share, leaf: "Loaded", local: Mesh) -> bool:
    """Writes the tensor into the leaf's buffers; whether all of it that was read is finite."""
    spread = NamedSharding(local, DEVICE)
    shapes = [list(spread.shard_shape(buffer.shape)) for buffer in leaf.buffers]
    starts = [np.zeros(len(shape), np.int32) for shape in shapes]
    for shape, start in zip(shapes, starts, strict=True):
        if entry.layer is not None:
            shape[0], start[0] = 1, entry.layer
        shape[share.axis] = -1
    part: Callable[[Range, Range], np.ndarray] = partial(source.part, name)
    if (codes := source.stored_codes(name, leaf.kind)) is not None:
        share, part = share.of_codes(), codes.nf4_codes
        leaf.codes[entry.layer] = codes
    size, offsets = share.blocks()
    finite = True
    for offset in offsets:
        pieces = list(_pieces(part, share, size, offset))
        put = jax.device_put(pieces, list(local.devices))
        whole = (len(pieces) * pieces[0].shape[0], pieces[0].shape[1])
        blocks, checked = _turn(
            jax.make_array_from_single_device_arrays(whole, spread, put),
            share.kept,
            mesh=local,
            shapes=tuple(map(tuple, shapes)),
            carriers=tuple(buffer.dtype for buffer in leaf.buffers),
            dtype=jnp.dtype(jax.tree.leaves(leaf.parts)[0].dtype),
            kind=leaf.kind,
            width=share.width,
            transposed=entry.transposed,
        )
        for start in starts:
            start[share.axis] = offset // share.unit
        # Waits, so that blocks cannot pile up on their way.
        leaf.buffers = jax.block_until_ready(_write(leaf.buffers, blocks, tuple(map(np.copy, starts)), mesh=local))
        finite &= bool(np.asarray(checked).all())
    return finite


def stored_digest(source: Source, name: str) -> bytes:
    """SHA-256 of one tensor as it is stored."""
    digest, size = hashlib.sha256(), source.sizes[name]
    for start in range(0, size, HASH_BYTES):
        digest.update(source.stored(name, start, min(start + HASH_BYTES, size)).data)
    return digest.digest()


@dataclass
class Loaded:
    """One leaf of the decoder on its way to the devices.

    Attributes:
      shape, sharding: of the weight, over the whole mesh.
      kind: what it is quantised to, or None.
      parts: the arrays that hold it, as shapes: itself, or the codes and scales of a `Quantized` before its
        `finish`.
      buffers: this process's shards of each part, end to end along dim 0, over the mesh of this process's devices.
        On CPUs floats of 8 and 16 bits are unsigned integers there, since XLA for CPUs writes into a bfloat16
        buffer by converting all of it to float32 and back.
      codes: layer -> the tensor whose codes are written as they are stored, and whose scales are, in the end.
    """

    param: nnx.Param
    shape: tuple[int, ...]
    sharding: NamedSharding
    kind: str | None
    parts: Any
    buffers: tuple[jax.Array, ...]
    codes: dict[int | None, Packed] = field(default_factory=dict)

    @classmethod
    def empty(
        cls, param: nnx.Param, name: str, shape: tuple[int, ...], mesh: Mesh, local: Mesh, where: str
    ) -> "Loaded":
        """Zeros for an abstract `param` of `shape`; ConfigError where `mesh` does not divide it."""
        abstract = param.get_raw_value()
        sharding = named_sharding(mesh, param.axes)
        kind = abstract.kind if quant.is_quantized(abstract) else None
        try:
            shard = sharding.shard_shape(shape)
        except ValueError:
            sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
            raise ConfigError(
                f"{where}: {sizes} does not divide its weight of {' x '.join(map(str, shape))} "
                f"({', '.join(param.axes)}); choose sizes that divide the model's"
            ) from None
        if kind is not None:
            quant.check_shards(kind, name, math.prod(abstract.inputs), shape[1] // shard[1])
        parts = quant.unfinished(abstract)
        on_cpu = local.devices.flat[0].platform == "cpu"

        def zeros(part: jax.ShapeDtypeStruct, over: NamedSharding) -> jax.Array:
            first, *rest = over.shard_shape(part.shape)
            narrow = on_cpu and part.dtype.itemsize < 4 and jnp.issubdtype(part.dtype, jnp.floating)
            carrier = jnp.dtype(f"uint{8 * part.dtype.itemsize}") if narrow else part.dtype
            make = partial(jnp.zeros, (local.size * first, *rest), carrier)
            return jax.jit(make, out_shardings=NamedSharding(local, DEVICE))()

        buffers = jax.tree.leaves(jax.tree.map(zeros, parts, _shardings(parts, param.axes, mesh)))
        return cls(param, shape, sharding, kind, parts, tuple(buffers))

    def finish(self, mesh: Mesh) -> None:
        """Gives the param its arrays over the whole mesh. Nothing is copied but an absmax, which is quantised."""

        def whole(part: jax.ShapeDtypeStruct, buffer: jax.Array, sharding: NamedSharding) -> jax.Array:
            shards = [shard.data for shard in buffer.addressable_shards]
            if buffer.dtype != part.dtype:  # a CPU's: the same memory by its right name
                shards = [jax.device_put(np.asarray(shard).view(part.dtype), shard.device) for shard in shards]
            return jax.make_array_from_single_device_arrays(part.shape, sharding, shards)

        axes, buffers = self.param.axes, jax.tree.unflatten(jax.tree.structure(self.parts), self.buffers)
        value = jax.tree.map(whole, self.parts, buffers, _shardings(self.parts, axes, mesh))
        self.buffers = ()
        if self.kind in quant.LEVELS:
            value = _finish(value, mesh, _shardings(self.param.get_raw_value(), axes, mesh))
            value = _with_stored_scales(value, self.codes) if self.codes else value
        self.param.set_raw_value(value)


def _shardings(leaf: Any, axes: tuple[str, ...], mesh: Mesh) -> Any:
    return quant.map_axes(lambda _, axes: named_sharding(mesh, axes), leaf, axes)


def _finish(leaf: quant.Quantized, mesh: Mesh, placed: quant.Quantized) -> quant.Quantized:
    """A stacked leaf whose absmax is quantised, layer by layer, each device with the absmax of the whole layer."""

    def one_layer(absmax: jax.Array) -> quant.Quantized:
        absmax = jax.lax.with_sharding_constraint(absmax, named_sharding(mesh, ()))
        return quant.finish(replace(leaf, codes=None, scales=absmax))

    without = replace(placed, codes=None)
    layers = jax.jit(partial(jax.lax.map, one_layer), out_shardings=without, donate_argnums=0)
    return replace(layers(leaf.scales), codes=leaf.codes)


def _with_stored_scales(leaf: quant.Quantized, codes: dict[int | None, Packed]) -> quant.Quantized:
    """A stacked leaf with its scales as they are stored, in the layers that have them stored."""

    def whole(number: int, computed: jax.Array) -> jax.Array:
        layers, *shape = computed.shape

        def of_layer(layer: int, index: tuple[slice, ...]) -> np.ndarray:
            none = np.zeros(shape, computed.dtype)
            found = np.asarray(codes[layer].nf4_scales()[number]).reshape(shape) if layer in codes else none
            return np.asarray(found[index])

        def stored(index: tuple[slice, ...] | None) -> np.ndarray:
            first, *rest = index or (slice(None),) * computed.ndim
            return np.stack([of_layer(layer, tuple(rest)) for layer in range(*first.indices(layers))])

        found = jax.make_array_from_callback(computed.shape, computed.sharding, stored)
        return _where(np.array([layer in codes for layer in range(layers)]), found, computed)

    scales, second, offset = map(whole, range(3), (leaf.scales, leaf.second, leaf.offset))
    return replace(leaf, scales=scales, second=second, offset=offset)


@jax.jit
def _where(layers: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """The layers of `first` where they are marked, else of `second`."""
    return jnp.where(layers.reshape(-1, *(1 for _ in first.shape[1:])), first, second)


def _agreed(rows: np.ndarray) -> np.ndarray:
    """Of every process's digest and failure flag by tensor, [tensors 33] uint8: the owner's digest, any flag."""
    gathered = np.asarray(multihost_utils.process_allgather(rows))
    tensors = np.arange(len(rows))
    agreed = gathered[tensors % len(gathered), tensors]
    agreed[:, 32] = gathered[:, :, 32].max(0)
    return agreed


def load_base(
    source: Source,
    where: str,
    dtype: jnp.dtype,
    mesh: Mesh,
    quantization: str | None = None,
    sizes: tuple[int, ...] | None = None,
    coded: bool = False,
) -> tuple[Decoder, str]:
    """The model in `dtype`, laid out over `mesh`, and the SHA-256 of its tensors as stored, in hex.

    With a `quantization` its projections are quantised from the stored numbers, not from those in `dtype`.

    The hash covers, in the name table's order, each tensor's name, stored type, shape and the SHA-256 of its
    stored bytes, so it depends neither on the mesh nor on the processes. Of P processes each hashes every P-th
    tensor, and they exchange the digests; all of them must call this. With the devices of a mesh in one process
    nothing is exchanged.

    Args:
      sizes, coded: as of `abstract_decoder`.

    Raises:
      ConfigError: the mesh does not divide a weight, or cuts one within a quantised block.
      ModelError: what `parse_config` and `check_names` refuse, a damaged file, a non-finite weight; in every
        process, if one of them meets it.
    """
    cfg = source.model
    table = check_names(cfg, source.shapes, where)
    decoder = abstract_decoder(cfg, dtype, quantization, sizes, coded)
    places = [(stack, layer) for stack in decoder.stacks for layer in range(stack.size)]
    local = Mesh(np.asarray(mesh.local_devices), ("device",))
    processes, process = (jax.process_count(), jax.process_index()) if mesh.is_multi_process else (1, 0)
    digests = np.zeros((len(table), 33), np.uint8)  # and a flag: refused
    failure: ModelError | None = None
    leaves: dict[int, Loaded] = {}
    with jax.set_mesh(local), ThreadPoolExecutor(1) as hasher:
        for number, (name, entry) in enumerate(table.items()):
            owner: Any = decoder
            shape = entry.shape
            if entry.layer is not None:
                owner, layer = places[entry.layer]
                shape, entry = (owner.size, *shape), replace(entry, layer=layer)
            param = getattr(owner, entry.leaf)
            if id(param) not in leaves:
                leaves[id(param)] = Loaded.empty(param, entry.leaf, shape, mesh, local, where)
            leaf = leaves[id(param)]
            try:
                # Meanwhile: the file is read from disk once for both, and hashing takes as long as the rest.
                digest = hasher.submit(stored_digest, source, name) if number % processes == process else None
                share = share_of(cfg, entry, leaf.sharding, leaf.shape, leaf.kind in quant.CHANNEL_TYPES)
                finite = _load_tensor(source, name, entry, share, leaf, local)
                if digest is not None:
                    digests[number, :32] = np.frombuffer(digest.result(), np.uint8)
                if not finite:
                    raise ModelError(f"{where}: tensor {name} holds NaN or infinity; the file is damaged")
            except ModelError as error:
                digests[number, 32], failure = 1, error
                break
    if processes > 1:
        digests = _agreed(digests)
    if failure is not None:
        raise failure
    for name, flag in zip(table, digests[:, 32], strict=True):
        if flag:
            raise ModelError(f"{where}: tensor {name} was refused by another process; its message says why")
    for leaf in leaves.values():
        leaf.finish(mesh)
    return decoder, _content_hash(
        source, [(name, row[:32].tobytes()) for name, row in zip(table, digests, strict=True)]
    )


def hash_base(source: Source, where: str) -> str:
    """The hash of `load_base`, of a base that is not loaded; reads the file once, a few megabytes at a time.

    Raises:
      ModelError: what `parse_config` and `check_names` refuse.
    """
    table = check_names(source.model, source.shapes, where)
    return _content_hash(source, [(name, stored_digest(source, name)) for name in table])


def _content_hash(source: Source, digests: list[tuple[str, bytes]]) -> str:
    content = hashlib.sha256()
    for name, digest in digests:
        content.update(f"{name} {source.dtypes[name]} {source.shapes[name]} ".encode() + digest)
    return content.hexdigest()
