"""Tokenised rows on the disk: written as they are made, by the content they come from, and memory-mapped on reading.

An entry is a folder of flat arrays with a manifest of their SHA-256. What does not match it is made again, never read.
Knows nothing of formats, packing or order.
"""

import datetime
import hashlib
import importlib.metadata
import itertools
import json
import mmap
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from jlora.config import Counted, DataSection
from jlora.data.dataset import Dataset, View
from jlora.data.prompts import Example
from jlora.data.rows import BadRow, read_rows
from jlora.data.sources import Files, files_of
from jlora.data.tokens import Tokenizer
from jlora.errors import ConfigError, DataError
from jlora.files import lock, manifest
from jlora.files.atomic import leftovers, new_folder
from jlora.files.paths import private, shared
from jlora.files.theirs import open_theirs

# Raised with every change of what rows become, or of how it is written down.
VERSION = 2
# What decides which tokens a row becomes, beside the tokenizer and the row.
OPTIONS = (
    *("split", "separator", "columns", "format", "prompt", "max_length", "split_long", *Counted._fields, "on_bad_row"),
)
# Of an entry, beside its manifest.
FILES = ("tokens", "lengths", "places", "place_lengths", "seconds", "weights", "weighted")
# Where a pair's second sequence begins; weights that are neither 0 nor 1, and whether an example has such.
OPTIONAL = ("seconds", "weights", "weighted")
LIBRARIES = ("tokenizers", "sentencepiece", "jinja2")
# Examples read before the pages that hold them are given back, which else would count as memory of this process.
READS = 1024
# Tokens of an entry that are looked at together.
AT_ONCE = 2**20

Keep = Callable[[list[Example], list[str]], None]  # examples and where they stand


class _Mapped:
    """A flat array in a file, of which no more than some pages are in memory."""

    def __init__(self, path: Path, dtype: Any):
        with open(path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map, dtype)
        self._reads = 0

    def __getitem__(self, part: slice) -> np.ndarray:
        self._reads += 1
        if self._reads % READS == 0 and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return self._array[part].copy()


class StoredExamples(View[Example]):
    """Examples of an entry.

    Attributes:
      lengths: int32 [n].
    """

    def __init__(self, folder: Path):
        self.lengths = np.fromfile(folder / "lengths", np.int32)
        self._starts = _starts(self.lengths)
        self._tokens = _Mapped(folder / "tokens", np.int32)
        self._seconds = _optional(folder, "seconds", np.int32)
        self._weighted = _optional(folder, "weighted", bool)
        if self._weighted is not None:
            self._weights = _Mapped(folder / "weights", np.float32)
            self._weight_starts = _starts(self.lengths * self._weighted)

    def __len__(self) -> int:
        return len(self.lengths)

    def one(self, index: int) -> Example:
        """The example at an index; a token that is not trained is written as its complement."""
        tokens = self._tokens[self._starts[index] : self._starts[index + 1]]
        trained = tokens >= 0
        ids, weights = np.where(trained, tokens, ~tokens), trained
        second = None if self._seconds is None else int(self._seconds[index])
        if self._weighted is not None and self._weighted[index]:
            weights = self._weights[self._weight_starts[index] : self._weight_starts[index + 1]]
        return Example(ids, weights, second)


class StoredPlaces(View[str]):
    """Where the examples of an entry stand."""

    def __init__(self, folder: Path):
        self._lengths = np.memmap(folder / "place_lengths", np.int32, "r")
        self._text = _Mapped(folder / "places", np.uint8)

    def __len__(self) -> int:
        return len(self._lengths)

    @cached_property
    def _starts(self) -> np.ndarray:
        return _starts(self._lengths)  # for messages alone, so most runs never need it

    def one(self, index: int) -> str:
        return self._text[self._starts[index] : self._starts[index + 1]].tobytes().decode("utf-8", "surrogateescape")


def _optional(folder: Path, name: str, dtype: Any) -> np.ndarray | None:
    return np.fromfile(folder / name, dtype) if (folder / name).is_file() else None


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _write(files: dict[str, IO[bytes]], examples: list[Example], places: list[str]) -> None:
    ids = np.concatenate([example.ids for example in examples])
    trained = np.concatenate([example.trained for example in examples])
    names = [place.encode("utf-8", "surrogateescape") for place in places]
    files["tokens"].write(np.where(trained, ids, ~ids).astype(np.int32).tobytes())
    files["lengths"].write(np.array([len(example.ids) for example in examples], np.int32).tobytes())
    files["places"].write(b"".join(names))
    files["place_lengths"].write(np.array([len(name) for name in names], np.int32).tobytes())
    weighted = np.array([not example.plain for example in examples])
    files["weighted"].write(weighted.tobytes())
    for example in itertools.compress(examples, weighted):
        files["weights"].write(example.weights.astype(np.float32).tobytes())
    if examples[0].second is not None:
        files["seconds"].write(np.array([example.second for example in examples], np.int32).tobytes())


def content_key(source: str, tokenizer: Tokenizer, cfg: DataSection) -> str:
    """SHA-256 of all that decides what the rows become: the files' content, tokenizer, options and versions.

    Raises:
      DataError: a file is missing or cannot be read.
    """
    known = [VERSION, tokenizer.digest, *(getattr(cfg, name) for name in OPTIONS)]
    known += [importlib.metadata.version(name) for name in LIBRARIES]
    if tokenizer.writes_day:
        known.append(str(tokenizer.day or datetime.date.today()))
    files = files_of(source, cfg.split)
    if files is None:  # a data set of the datasets library
        rows = hashlib.sha256()
        for row in read_rows(source, cfg.split, cfg.separator):
            value = row.value.message if isinstance(row.value, BadRow) else row.value
            rows.update(json.dumps([row.where, value], default=repr).encode() + b"\n")
        known.append(rows.hexdigest())
    for path, name, _ in files.read if files else ():
        try:
            with open_theirs(path) as stream:
                known.append([name, hashlib.file_digest(stream, "sha256").hexdigest()])
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
    return hashlib.sha256(json.dumps(known).encode("utf-8", "surrogateescape")).hexdigest()


def stamp(source: str, split: str) -> list[tuple[str, int, int]]:
    """Size and time of each file of a source: while it is read, they stay the same."""
    files = files_of(source, split) or Files([], [])
    found = [(path, path.stat()) for path, *_ in files.read]
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in found]


def stored(cache: Path, key: str, vocab_size: int, make: Callable[[Keep], Dataset]) -> Dataset:
    """The entry of a key, made where it is not there or not whole.

    Args:
      make: hands over all examples, and returns the rest of the dataset. What it raises leaves no entry.

    Raises:
      ConfigError: `cache` cannot be made or written to, or others may write there.
    """
    folder = cache / key
    with ExitStack() as stack:
        try:
            private(cache, "data.cache_dir", "what lies there is trained on")
            alone = stack.enter_context(lock.waited_for(cache / f"{key}.lock"))
        except OSError as error:
            raise ConfigError(f"data.cache_dir {cache}: cannot be written to ({error.strerror}); set another") from None
        wrong = _fault(folder, vocab_size) if folder.exists() else "missing"
        if wrong != "missing" and wrong is not None:
            print(f"warning: {folder}: {wrong}; the rows are tokenised again", file=sys.stderr)
        if wrong is not None:
            _make(folder, make, alone, () if wrong == "missing" else (*FILES, manifest.NAME))
        facts = manifest.read(folder)
        return Dataset(
            StoredExamples(folder), facts["read"], facts["truncated"], Counter(facts["dropped"]),
            StoredPlaces(folder), facts["digest"],
            renamed=Counter({(name, column): count for name, column, count in facts["renamed"]}),
            unused=Counter(facts["unused"]),
        )  # fmt: skip


def _fault(folder: Path, vocab_size: int) -> str | None:
    """Why an entry is not read; its arrays count, whatever it says of them."""
    wrong = manifest.fault(folder) or shared(folder)
    if wrong is not None:
        return wrong
    lengths, place_lengths = (np.fromfile(folder / name, np.int32) for name in ("lengths", "place_lengths"))
    seconds, weighted = _optional(folder, "seconds", np.int32), _optional(folder, "weighted", np.uint8)
    fits = (
        len(lengths) == len(place_lengths) and len(lengths) > 0 and np.min(lengths) > 0 and np.min(place_lengths) >= 0
        and 4 * int(lengths.sum(dtype=np.int64)) == (folder / "tokens").stat().st_size
        and int(place_lengths.sum(dtype=np.int64)) == (folder / "places").stat().st_size
        and (seconds is None or len(seconds) == len(lengths) and ((seconds > 0) & (seconds < lengths)).all())
        and (weighted is not None) == (folder / "weights").is_file()
        and (
            weighted is None or len(weighted) == len(lengths) and weighted.max() == 1
            and 4 * int(lengths[weighted == 1].sum(dtype=np.int64)) == (folder / "weights").stat().st_size
        )
    )  # fmt: skip
    if not fits:
        return "its arrays do not fit each other"
    largest, digest = _measure(folder, lengths)
    if largest >= vocab_size:
        return f"holds the token {largest}, of a vocabulary of {vocab_size}"
    return None if digest == manifest.read(folder).get("digest") else "holds other tokens than it says"


def _measure(folder: Path, lengths: np.ndarray) -> tuple[int, str]:
    """The largest token, and the digest of all examples, of which some are in memory at once."""
    digest, largest = hashlib.sha256(), 0
    ends = np.cumsum(lengths, dtype=np.int64)
    weighted = _optional(folder, "weighted", bool)
    first = start = 0
    with open_theirs(folder / "tokens") as stream, ExitStack() as opened:
        weights = opened.enter_context(open_theirs(folder / "weights")) if weighted is not None else None
        while first < len(ends):
            last = max(first + 1, int(np.searchsorted(ends, start + AT_ONCE, "right")))
            written = np.fromfile(stream, np.int32, int(ends[last - 1]) - start)
            trained = written >= 0
            ids = np.where(trained, written, ~written)
            largest = max(largest, int(ids.max()))
            for number in range(first, last):
                part = slice(int(ends[number] - lengths[number]) - start, int(ends[number]) - start)
                example = Example(ids[part], trained[part])
                if weights is not None and weighted is not None and weighted[number]:
                    example = Example(ids[part], np.fromfile(weights, np.float32, int(lengths[number])))
                digest.update(example.digested())
            first, start = last, int(ends[last - 1])
    return largest, digest.hexdigest()


def _make(folder: Path, make: Callable[[Keep], Dataset], alone: bool, replaced: tuple[str, ...] = ()) -> None:
    """Make an entry under another name, and give it its own once it is whole.

    Args:
      replaced: the files of an entry that is not whole and gives way; of none, another's is taken.
    """
    if alone:  # so what others have begun of this entry, they were killed over
        for left in leftovers(folder):
            shutil.rmtree(left, ignore_errors=True)
    try:
        with new_folder(folder, ours=replaced) as partial:
            partial.chmod(0o700)
            with ExitStack() as opened:
                files: dict[str, IO[bytes]] = {name: opened.enter_context(open(partial / name, "wb")) for name in FILES}
                rest = make(lambda examples, places: _write(files, examples, places))
            empty = [name for name in OPTIONAL if not (partial / name).stat().st_size]
            for name in {*empty, *(["weighted"] if "weights" in empty else [])}:
                (partial / name).unlink()
            facts = {"read": rest.read, "truncated": rest.truncated, "dropped": dict(rest.dropped)}
            facts |= {"renamed": [[*names, count] for names, count in rest.renamed.items()], "unused": rest.unused}
            manifest.write(partial, facts | {"digest": rest.digest})
    except FileExistsError:
        if manifest.fault(folder) is not None:  # where there are no locks, another may have been first
            raise
    manifest.sync_folder(folder.parent)
