"""What the devices of one process hold of a tensor: rows and columns of the file, read in blocks of a few megabytes."""

import math
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import NamedSharding

from jlora.hf.names import Entry
from jlora.model.config import ModelConfig, projection_shapes

# Weights of one block, over all devices of this process. Beside the devices' buffers the host holds a block and
# its copies on the way (put, turned), and what malloc keeps of those that were: twenty to forty blocks
# were measured.
BLOCK_WEIGHTS = 2**20

Range = tuple[int, int]


@dataclass(frozen=True)
class Share:
    """What the devices of this process hold of one tensor, in the file's layout.

    Attributes:
      regions: rows and columns that each device is sent, each [start, stop); a vector is one row. All of one size.
      kept: the first column of those that each device keeps, counted from the first that it is sent; int32.
      width: number of columns that it keeps.
      unit: rows that must stay together, since they are one index of the leaf's dim `axis`.
      axis: dim of the leaf that the rows run along, counted from the last, which is -1.
    """

    regions: tuple[tuple[Range, Range], ...]
    kept: np.ndarray
    width: int
    unit: int
    axis: int

    def blocks(self) -> tuple[int, list[int]]:
        """Rows a block, and where blocks start, counted from each device's first row.

        All blocks have one size, so that one compiled function writes them all; the last may overlap the one
        before it.
        """
        (first, last), (left, right) = self.regions[0]
        units = (last - first) // self.unit
        unit_weights = self.unit * (right - left) * len(self.regions)
        count = math.ceil(units / max(1, BLOCK_WEIGHTS // unit_weights))
        size = math.ceil(units / count)
        starts = [min(start, units - size) for start in range(0, units, size)]
        return size * self.unit, [start * self.unit for start in starts]

    def of_codes(self) -> "Share":
        """The share in a tensor's 4-bit codes, two to a column."""
        regions = tuple((rows, (left // 2, right // 2)) for rows, (left, right) in self.regions)
        return replace(self, regions=regions, width=self.width // 2)


def _joined(cut: tuple[slice, ...], dims: tuple[int, ...]) -> Range:
    """The range that slices take once their dims are joined into one; only the first may be split."""
    assert all(one.indices(dim) == (0, dim, 1) for one, dim in zip(cut[1:], dims[1:], strict=True)), (cut, dims)
    if not dims:
        return 0, 1
    inner = math.prod(dims[1:])
    start, stop, _ = cut[0].indices(dims[0])
    return start * inner, stop * inner


def share_of(
    cfg: ModelConfig, entry: Entry, sharding: NamedSharding, shape: tuple[int, ...], whole_rows: bool
) -> Share:
    """The share of this process in the tensor of `entry`, whose weight has `shape`, over layers where stacked.

    Args:
      whole_rows: devices are sent whole rows of the file, whichever columns of them they keep.
    """
    stacked = len(shape) - len(entry.shape)
    # A projection has its input dims first, which are the file's columns. A table has its rows first, a vector none.
    split = len(projection_shapes(cfg)[entry.leaf][0]) if entry.transposed else len(entry.hf_shape) - 1
    regions = []
    indices = sharding.addressable_devices_indices_map(shape)
    for device in sharding.mesh.local_devices:
        cut = (indices[device] or ())[stacked:]
        head, tail = _joined(cut[:split], entry.shape[:split]), _joined(cut[split:], entry.shape[split:])
        regions.append((tail, head) if entry.transposed else (head, tail))
    unit = math.prod(entry.shape[split + 1 :]) if entry.transposed else 1
    axis = (split if entry.transposed else 0) - len(entry.shape)
    width, kept = regions[0][1][1] - regions[0][1][0], np.zeros(len(regions), np.int32)
    if whole_rows:
        kept = np.array([left for _, (left, _) in regions], np.int32)
        regions = [(rows, (0, entry.hf_shape[-1])) for rows, _ in regions]
    return Share(tuple(regions), kept, width, unit, axis)
