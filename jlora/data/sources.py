"""Which files a source of rows is made of, and what of a folder is left out. Opens them; knows nothing of rows."""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jlora.errors import DataError
from jlora.files.paths import beside, inside
from jlora.files.theirs import open_theirs

# How a file's name ends -> how it is read; and how it ends further where it is compressed.
KINDS = {
    **{".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".txt": "text"},
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
NAMED = "json, jsonl, csv, tsv, parquet, arrow or txt"
# Words in a name that tell its split, as the `datasets` library has them; and files that describe rows, or a model.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DESCRIPTIONS = re.compile(
    r"(readme|licen[cs]e)\b.*|(\w+_)?config\.json|dataset_infos?\.json|tokenizer\.json|special_tokens_map\.json",
    re.IGNORECASE,
)
_SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}\..+")
_SLICE = re.compile(r"([^\[\]+]+)(?:\[(\d*):(\d*)\])?")


class File(NamedTuple):
    """A file of rows: where it lies, its name in a row's place, and how it is read (of `KINDS`)."""

    path: Path
    name: str
    kind: str


@dataclass(frozen=True)
class Files:
    """The files of a source.

    Attributes:
      read: in the order of their names. left: names of files that are not read, of kinds that are not read or of
        other splits.
    """

    read: list[File]
    left: list[str]


class Split(NamedTuple):
    """A split's name, and the rows of it from `start` to `stop`."""

    name: str
    start: int
    stop: int | None


def parse_split(split: str) -> Split:
    """`train`, or some of its rows, such as `train[:1000]`, as the `datasets` library writes it.

    Raises:
      DataError: it is written in another way, which only data sets of the hub know.
    """
    found = _SLICE.fullmatch(split)
    if not found:
        raise DataError(
            f"data.split={split}: of files and folders a split is read by its name, or some rows of it, such as "
            "train[:1000]; percentages and sums of splits are for data sets of the hub"
        )
    name, start, stop = found.groups()
    return Split(name, int(start or 0), int(stop) if stop else None)


def files_of(source: str, split: str) -> Files | None:
    """The files that are read; None for what the `datasets` library reads.

    Of a folder, those that the split belongs to, where names tell it (`train.jsonl`, `test/a.csv`,
    `train-00000-of-00002.parquet`): a name that tells none is of the split `train`, unless others say that they are.
    Sub-folders are read, too, and .txt files where there are no others.

    Raises:
      DataError: there is no such file, or none in a folder, or no such split.
    """
    path = Path(source)
    if path.is_file():
        kind = kind_of(path.name)
        if kind is None:
            raise DataError(f"{path}: files ending in '{path.suffix}' are not read; use {NAMED}")
        return Files([File(path, path.name, kind)], [])
    if not path.is_dir():
        if kind_of(source) or source.startswith((".", "/", "~")):
            raise DataError(f"{source}: no such file{beside(source)}")
        return None
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return None  # as `save_to_disk` leaves it
    names = sorted(_names(path))
    kinds = {name: kind_of(name) for name in names}
    tables = [name for name in names if kinds[name] not in (None, "text")]
    chosen = _of_split(tables or [name for name in names if kinds[name]], parse_split(split).name, path)
    read = [File(_inside(path, name), f"{path.name}/{name}", str(kinds[name])) for name in chosen]
    return Files(read, [name for name in names if name not in set(chosen)])


def kind_of(name: str) -> str | None:
    """How a file is read by its name; None where it is not."""
    kind = KINDS.get(ending(name))
    compressed = name.lower().endswith(COMPRESSED)
    return None if compressed and kind in ("parquet", "arrow") else kind


def ending(name: str) -> str:
    """The end of a name that tells the kind of its content, such as `.json` of `Rows.JSON.gz`."""
    stem, end = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if end in COMPRESSED else end


def _names(folder: Path) -> Iterator[str]:
    """Files below a folder that may hold rows; links to folders are not followed."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not (name.startswith(".") or DESCRIPTIONS.fullmatch(name)):
                yield (Path(root) / name).relative_to(folder).as_posix()


def _of_split(names: list[str], split: str, folder: Path) -> list[str]:
    if not names:
        raise DataError(f"{folder}: holds no {NAMED} file")
    splits = {name: split_of(name) for name in names}
    told = set(splits.values()) - {None}
    own = "train" if "train" not in told else None  # of names that tell none
    found = [name for name in names if (splits[name] or own) == split]
    if not found:
        known = sorted({splits[name] or own or "train" for name in names})
        raise DataError(f"{folder}: has no split {split!r}; set data.split to one of its own: {', '.join(known)}")
    return found


def split_of(name: str) -> str | None:
    """The split that a path tells, its last part first; None where it tells none."""
    if shard := _SHARD.fullmatch(name):
        return shard[1]
    for part in reversed(Path(name.lower()).parts):
        for split, words in SPLITS.items():
            if re.search(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", part):
                return split
    return None


def _inside(folder: Path, name: str) -> Path:
    *parents, last = Path(name).parts
    for parent in parents:
        folder = inside(folder, parent, DataError, folders=True)
    return inside(folder, last, DataError)


@contextmanager
def open_rows(path: Path) -> Iterator[io.BufferedReader]:
    """The text of a file as UTF-8, decompressed, and decoded where a byte order mark says that it is UTF-16.

    Raises:
      DataError: it is not what its name says.
      OSError: it cannot be opened.
    """
    with open_theirs(path) as raw:
        try:
            stream = _decompressed(raw, path.suffix.lower())
            if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                stream = io.BufferedReader(_FromUTF16(stream))
            yield stream
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: is damaged or cut short ({error}); get it again") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not valid UTF-16 ({error.reason}); write it as UTF-8") from None


def _decompressed(raw: io.BufferedReader, end: str) -> io.BufferedReader:
    """What a compressed file holds; the file itself where its name ends otherwise."""
    match end:
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
        case ".bz2":
            return io.BufferedReader(bz2.BZ2File(raw))  # type: ignore[arg-type]
        case ".xz":
            return io.BufferedReader(lzma.LZMAFile(raw))  # type: ignore[arg-type]
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))  # type: ignore[arg-type]
    return raw


class _FromUTF16(io.RawIOBase):
    """The UTF-8 bytes of a text in UTF-16; `codecs.EncodedFile` does not tell a text that is cut short."""

    def __init__(self, stream: io.BufferedReader):
        self._text, self._left = io.TextIOWrapper(stream, encoding="utf-16", newline=""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there is text."""
        self._left = self._left or self._text.read(2**13).encode("utf-8")
        size = min(len(self._left), len(buffer))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
