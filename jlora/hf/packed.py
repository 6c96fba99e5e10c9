"""A weight that is stored as several tensors, and what has to be so of them, looked at before any is read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from jlora.errors import ModelError
from jlora.hf import codecs

# What scales are stored as.
SCALES = ("F16", "BF16", "F32")
# Stored types as NumPy maps them, by safetensors' names; of 8-bit floats the bytes.
MAPPED: dict[str, np.dtype] = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    **dict.fromkeys(("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), np.dtype(np.uint8)),
}


def map_file(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read-only view of a region of a file that was whole when its header was read."""
    try:
        return np.memmap(path, dtype, "r", offset, shape)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: changed while it was being read ({error}); run again") from None


@dataclass(frozen=True)
class Stored:
    """The tensors of a folder as its files have them.

    Attributes:
      shapes, dtypes, sizes: by name, as in `Source`.
      places: name -> file, and the byte of it that the tensor begins at.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    sizes: Mapping[str, int]
    places: Mapping[str, tuple[Path, int]]

    def read(self, name: str) -> np.ndarray:
        """One tensor whole, as a read-only view of the mapped file; 8-bit floats come as bytes."""
        if self.dtypes[name] not in MAPPED:
            raise self.refuse(name, f"is {self.dtypes[name]}, which is not read")
        path, offset = self.places[name]
        return map_file(path, MAPPED[self.dtypes[name]], offset, self.shapes[name])

    def raw(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of one tensor, as such a view."""
        path, offset = self.places[name]
        return map_file(path, np.dtype(np.uint8), offset + start, (stop - start,))

    def refuse(self, name: str, what: str) -> ModelError:
        """The error that says of a tensor what is wrong, as `what` goes on after its name."""
        return ModelError(f"{self.places[name][0]}: tensor {name} {what}")

    def require(self, name: str, shape: tuple[int | None, ...], dtypes: tuple[str, ...], of: str) -> str:
        """`name`, once the tensor is there, of one of the dtypes and of `shape`, where None is any size but 0.

        Raises:
          ModelError: it is not; `of` is the tensor that it belongs to.
        """
        if name not in self.shapes:
            raise self.refuse(of, f"has codes and no {name.rpartition('.')[2]}; get the file again")
        found = self.shapes[name]
        if len(found) != len(shape) or any(
            size != (want or size or -1) for want, size in zip(shape, found, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.refuse(name, f"has the shape {list(found)}, not [{wanted}] as {of} of {list(self.shapes[of])}")
        if self.dtypes[name] not in dtypes:
            raise self.refuse(name, f"is {self.dtypes[name]}, not {' or '.join(dtypes)}")
        return name

    def modules(self, ending: str) -> Iterator[str]:
        """Modules that have a tensor of that name, with the dot behind."""
        for name in self.shapes:
            if name.endswith(f".{ending}"):
                yield name.removesuffix(ending)

    def matrix(self, name: str, sign: str, dtypes: tuple[str, ...]) -> tuple[int, int]:
        """The shape of a matrix of codes, which has to be there.

        Raises:
          ModelError: it is not; `sign` is the tensor that asks for it.
        """
        if name not in self.shapes:
            raise self.refuse(sign, f"has no {name.rpartition('.')[2]} beside it; get the file again")
        if len(self.shapes[name]) != 2 or not all(self.shapes[name]):
            raise self.refuse(name, f"has the shape {list(self.shapes[name])}, which is no matrix")
        if self.dtypes[name] not in dtypes:
            raise self.refuse(name, f"is {self.dtypes[name]} beside {sign}, not {' or '.join(dtypes)}")
        rows, columns = self.shapes[name]
        return rows, columns


@dataclass(frozen=True)
class Layout:
    """How a weight [out, in] is stored.

    Attributes:
      kind: the layout and its settings in words, which the base's hash covers.
      names: the stored tensors, by what the decoder calls them.
      decode: (those tensors, rows, columns) -> their numbers, float32.
      nf4_offset: of nf4 in the blocks that `quant.Quantized` has, so that its codes can be kept; else None.
    """

    kind: str
    shape: tuple[int, int]
    names: Mapping[str, str]
    decode: Callable[[codecs.Parts, codecs.Range, codecs.Range], np.ndarray]
    nf4_offset: float | None = None


@dataclass(frozen=True)
class Packed:
    """A weight that is stored as several tensors, as one."""

    layout: Layout
    stored: Stored

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.layout.shape

    @cached_property
    def dtype(self) -> str:
        """What the base's hash says of how it is stored."""
        types = ", ".join(f"{key} {self.stored.dtypes[name]}" for key, name in self.layout.names.items())
        return f"{self.layout.kind} ({types})"

    @cached_property
    def size(self) -> int:
        """Stored bytes."""
        return sum(self.stored.sizes[name] for name in self.layout.names.values())

    def part(self, rows: codecs.Range, columns: codecs.Range) -> np.ndarray:
        """Some rows and columns, float32, new."""
        return self.layout.decode(self._parts(), rows, columns)

    def raw(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) of the stored tensors, end to end."""
        found, first = [], 0
        for name in self.layout.names.values():
            size = self.stored.sizes[name]
            ours = max(start - first, 0), min(stop - first, size)
            if ours[0] < ours[1]:
                found.append(self.stored.raw(name, *ours))
            first += size
        return found[0] if len(found) == 1 else np.concatenate([*found, np.empty(0, np.uint8)])

    def nf4_codes(self, rows: codecs.Range, columns: codecs.Range) -> np.ndarray:
        """Codes in the order of `quant.Quantized`, uint8 [rows columns]; a column is a byte, 32 are a block."""
        return codecs.bnb_nf4_codes(self._parts(), rows, columns, width=self.layout.shape[1])

    def nf4_scales(self) -> tuple[np.ndarray, np.ndarray, np.float32]:
        """Scales, second and offset of `quant.Quantized`: uint8 [blocks out], float32 [segments out] and []."""
        return *codecs.bnb_nf4_scales(self._parts(), self.layout.shape), np.float32(self.layout.nf4_offset)

    def _parts(self) -> codecs.Parts:
        return {key: self.stored.read(name) for key, name in self.layout.names.items()}
