"""The header of a GGUF file: metadata and where the tensors lie, as ggml's gguf.cpp reads them.

Every count is held against the bytes that are left, so that no header takes more time or memory than its own length.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from jlora.errors import ModelError
from jlora.files.paths import inside
from jlora.files.theirs import open_theirs

CONVERT = "convert the model to GGUF again"
FOLDER = "use the model's Hugging Face folder"
_KINDS = {str: "text", bool: "truth value", int: "whole number", float: "finite number"}

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
ALIGNMENT = 32  # where general.alignment is not there

# How llama-gguf-split calls pieces.
PIECE = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)", re.DOTALL)
# Of ggml's types those that it has given up.
GONE = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8"}
GONE[38] = "IQ4_NL_8_8"

_SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor in the file.

    Attributes:
      file: it is of several pieces.
      shape: as NumPy has it, the last dim varying fastest.
      offset, size: bytes, from the start of the file; all of them lie in it.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size: int

    @property
    def row_bytes(self) -> int:
        """Bytes of the last dim."""
        return self.size // max(1, math.prod(self.shape[:-1]))


def is_gguf(path: Path) -> bool:
    """Whether a file is one of GGUF, whatever its name."""
    try:
        with open_theirs(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class Header:
    """What stands before the tensors' data.

    Attributes:
      path: the file.
      values: bool, int, float or bytes of a text, by key; of several, an array of numbers or a list of bytes.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, StoredTensor]

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """One value of a key: a finite float, int, bool or str, as llama.cpp never another than is asked for."""
        value = self.values.get(key)
        if value is None:
            if not default:
                raise self.refuse(f"has no metadata key {key}")
            return default[0]
        return self._checked(key, kind, value)

    def several(self, key: str, kind: type) -> list[Any]:
        """The values of a key that has several, each as `get` gives it."""
        value = self.values.get(key)
        if value is None:
            raise self.refuse(f"has no metadata key {key}")
        if not isinstance(value, list | np.ndarray):
            raise self.refuse(f"sets {key} to {shown(value)}, not to a list")
        return [self._checked(key, kind, each) for each in (value if isinstance(value, list) else value.tolist())]

    def _checked(self, key: str, kind: type, value: Any) -> Any:
        if kind is str and isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise self.refuse(f"has text in {key} that is not UTF-8") from error
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise self.refuse(f"sets {key} to {shown(value)}, not to a {_KINDS[kind]}")
        return value

    def refuse(self, what: str, do: str = CONVERT) -> ModelError:
        """The error to raise: what is wrong with the file, and what to do."""
        return ModelError(f"{self.path} {what}; {do}.")


def shown(value: Any) -> str:
    """A value in a message; of many, how many."""
    if isinstance(value, list | np.ndarray) and len(value) > 8:
        return f"a list of {len(value)}"
    return repr(value.tolist() if isinstance(value, np.ndarray) else value)[:100]


def read_header(path: Path) -> Header:
    """The header of a file whose magic is right.

    Raises:
      OSError: it cannot be read.
      ValueError: it is cut or damaged; one clause says how.
      ModelError: a tensor is of a type that is not known.
    """
    with open_theirs(path) as file:
        return _Reader(path, np.memmap(file, np.uint8, "r")).header()


def read_pieces(first: Header) -> Header:
    """The header of a model in several files, given that of the first, as llama-gguf-split parts it.

    Raises:
      OSError, ValueError: as `read_header`, with the file's name.
      ModelError: pieces are missing, or are not of one model.
    """
    count, name = first.get("split.count", int, 1), PIECE.fullmatch(first.path.name)
    if name is None or int(name["count"]) != count:
        raise ModelError(
            f"{first.path} is one of {count} pieces, and is not called ...-0000N-of-{count:05}.gguf; give all pieces "
            "the names that they were published with."
        )
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        file = inside(first.path.parent, f"{name['stem']}-{number:05}-of-{count:05}{name['ending']}")
        if not is_gguf(file):
            raise ModelError(
                f"{file} is missing or no GGUF file, piece {number} of {count}; put all pieces in one folder."
            )
        try:
            piece = read_header(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file.name}: {error}") from error
        found = piece.get("split.no", int, -1), piece.get("split.count", int, 1)
        if found != (number - 1, count) or tensors.keys() & piece.tensors.keys():
            raise ModelError(f"{file} is not piece {number} of {count} of {first.path.name}; get all pieces again.")
        tensors |= piece.tensors
    if (said := first.get("split.tensors.count", int, len(tensors))) != len(tensors):
        raise ModelError(f"{first.path} says {said} tensors, but its pieces have {len(tensors)}; get all pieces again.")
    return replace(first, tensors=tensors)


def first_piece(path: Path) -> Path:
    """The first file of a model in pieces, by the name of any; of others the file itself."""
    name = PIECE.fullmatch(path.name)
    return path if name is None else path.with_name(f"{name['stem']}-00001-of-{name['count']}{name['ending']}")


class _Reader:
    """A place in the file, which moves on with each read."""

    def __init__(self, path: Path, data: np.ndarray):
        self._path, self._data, self._at = path, data, 4

    def header(self) -> Header:
        version = self._int(4)
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}, not {' or '.join(map(str, VERSIONS))}")
        num_tensors, num_keys = self._int(8), self._int(8)
        values: dict[str, Any] = {}
        for _ in range(num_keys):  # each takes bytes, so no number of them runs past the end
            key = self._text()
            if key in values:
                raise ValueError(f"Duplicate key {key!r}")
            values[key] = self._value(GGUFValueType(self._int(4)))
        infos: dict[str, StoredTensor] = {}
        for _ in range(num_tensors):
            info = self._tensor()
            if info.name in infos:
                raise ValueError(f"Duplicate tensor {info.name!r}")
            infos[info.name] = info
        alignment = values.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("general.alignment is no power of two")
        start = self._at + -self._at % alignment
        tensors, end = {}, 0
        for name, info in infos.items():
            if info.offset != end:  # they follow each other, so that none lies in another or in the header
                raise ValueError(f"tensor {name!r} begins at {info.offset} instead of {end}")
            if start + end + info.size > len(self._data):
                raise ValueError(f"tensor {name!r} ends beyond the file")
            tensors[name] = info._replace(offset=start + end)
            end += info.size + -info.size % alignment
        return Header(self._path, values, tensors)

    def _take(self, count: int) -> np.ndarray:
        if count > len(self._data) - self._at:
            raise ValueError(f"{count} bytes at {self._at}, beyond the end of the file")
        self._at += count
        return self._data[self._at - count : self._at]

    def _int(self, size: int) -> int:
        return int.from_bytes(self._take(size).tobytes(), "little")

    def _bytes(self) -> bytes:
        return self._take(self._int(8)).tobytes()

    def _text(self) -> str:
        return self._bytes().decode("utf-8")

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._bytes()
        if kind != GGUFValueType.ARRAY:
            return self._scalars(kind, 1)[0].item()
        kind, count = GGUFValueType(self._int(4)), self._int(8)
        if kind == GGUFValueType.ARRAY:
            raise ValueError("a list of lists")
        if kind != GGUFValueType.STRING:
            return self._scalars(kind, count)
        return [self._bytes() for _ in range(count)]

    def _scalars(self, kind: GGUFValueType, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        data = self._take(count * dtype.itemsize)
        if kind == GGUFValueType.BOOL and (data > 1).any():
            raise ValueError("a truth value that is neither 0 nor 1")
        return data.view(dtype)

    def _tensor(self) -> StoredTensor:
        """Its offset is as it is stored: from the end of the header."""
        name, num_dims = self._text(), self._int(4)
        if num_dims > MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {num_dims} dims")
        shape = tuple(self._int(8) for _ in range(num_dims))[::-1]
        kind = self._kind(name, self._int(4))
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % per_block:
            raise ValueError(f"tensor {name!r} has rows of {shape[-1]} in blocks of {per_block}")
        return StoredTensor(self._path, name, shape, kind, self._int(8), math.prod(shape) // per_block * block_bytes)

    def _kind(self, name: str, number: int) -> GGMLQuantizationType:
        try:
            return GGMLQuantizationType(number)
        except ValueError:
            do = "use a file of another type, such as Q8_0 or F16"
            do += "" if number in GONE else ", or a newer gguf package: pip install -U gguf"
            kind = GONE.get(number, f"with the number {number}")
            raise ModelError(f"{self._path} has {name} in the type {kind}, which is not known; {do}.") from None


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder, by its first bytes, or its first piece; None where there is none.

    Raises:
      ModelError: there are several.
    """
    try:
        found = sorted({first_piece(file).name for file in folder.iterdir() if is_gguf(file)})
    except OSError as error:
        raise ModelError(f"{folder}: cannot be looked into ({error.strerror}); check its permissions") from None
    if len(found) > 1:
        named = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        raise ModelError(f"{folder}: holds {len(found)} GGUF files ({named}); give the path of one of them")
    return inside(folder, found[0]) if found else None
