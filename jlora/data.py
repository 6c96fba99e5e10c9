"""Rows on disk -> tokenised examples -> packed rows -> batches, with a position that can be saved.

Owns reading, validation, truncation, packing and order. Knows nothing of models or devices.
"""

import csv
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import grain
import numpy as np

from jlora.config import DataSection
from jlora.errors import DataError
from jlora.prompts import BadRow, Example, encode_row
from jlora.tokens import Tokenizer

MAX_LINE_BYTES = 64 * 2**20


class Batch(TypedDict):
    """A batch of packed rows; all int32 [B T] but `weights`, float32 [B T].

    `targets` are the next tokens, and `weights` is 1 where predicting the target counts in the loss.
    `segments` number the examples within a row from 1 (0 is padding); `positions` restart in each.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Row:
    """One row and where it stands, such as `train.jsonl:12`."""

    where: str
    value: Any


@dataclass
class Dataset:
    """Tokenised examples, none longer than the configured length.

    Attributes:
      examples: in file order.
      read, truncated: rows read, and rows cut at the end.
      dropped: reason -> rows dropped.
      digest: SHA-256 of all token ids and trained flags.
    """

    examples: list[Example]
    read: int
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    digest: str = ""


def read_rows(source: str, split: str) -> Iterator[Row]:
    """Rows of a json, jsonl, csv or parquet file, a folder of such files, or a hub data set.

    JSON and JSONL are read line by line here, not through `datasets`, which reports neither the line
    of a malformed row nor rows of unequal keys.

    Raises:
      DataError: missing, unreadable or malformed file, with file and line.
    """
    path = Path(source)
    if path.is_dir():
        yield from _read_folder(path, split)
    elif path.is_file():
        yield from _read_file(path, path.name)
    elif path.suffix in (".json", ".jsonl", ".csv", ".parquet") or source.startswith((".", "/", "~")):
        raise DataError(f"{source}: no such file; check the path")
    else:
        yield from _read_datasets(source, split, source)


def _read_folder(path: Path, split: str) -> Iterator[Row]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        yield from _read_datasets(str(path), split, path.name)
        return
    files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl", ".csv", ".parquet"))
    if not files:
        raise DataError(f"{path}: holds no json, jsonl, csv or parquet file")
    for file in files:
        yield from _read_file(file, f"{path.name}/{file.name}")


def _read_file(path: Path, name: str) -> Iterator[Row]:
    try:
        match path.suffix:
            case ".csv":
                yield from _read_csv(path, name)
            case ".parquet":
                import pyarrow
                import pyarrow.parquet

                try:
                    number = 0
                    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                        for value in batch.to_pylist():
                            number += 1
                            yield Row(f"{name}: row {number}", value)
                except pyarrow.ArrowException as error:
                    raise DataError(f"{path}: not a whole parquet file ({error})") from None
            case ".json" if _is_json_array(path):
                yield from _read_json_array(path, name)
            case ".json" | ".jsonl":
                yield from _read_lines(path, name)
            case suffix:
                raise DataError(f"{path}: files ending in '{suffix}' are not read; use json, jsonl, csv or parquet")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{path}: can not be read ({error})") from None


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    """Rows by the header's names; the line is the one on which the row ends."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for value in reader:
                where = f"{name}:{reader.line_num}"
                if None in value:
                    yield Row(where, BadRow("extra_fields", "the row has more fields than the header"))
                elif any(re.search("[\ud800-\udfff]", field or "") for field in value.values()):
                    yield Row(where, BadRow("invalid_utf8", "not valid UTF-8"))
                else:
                    yield Row(where, value)
        except csv.Error as error:
            raise DataError(f"{name}:{reader.reader.line_num}: malformed CSV ({error})") from None


def _is_json_array(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_json_array(path: Path, name: str) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"{name}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise DataError(f"{where}: malformed JSON ({error})") from None
    for number, value in enumerate(rows, 1):
        yield Row(f"{name}: row {number}", value)


def _read_lines(path: Path, name: str) -> Iterator[Row]:
    with open(path, "rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; is this JSONL?")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                yield Row(where, json.loads(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield Row(where, BadRow("invalid_utf8", f"not valid UTF-8 at byte {error.start} of the line"))
            except json.JSONDecodeError as error:
                yield Row(where, BadRow("malformed_json", f"malformed JSON at column {error.colno}: {error.msg}"))
            except RecursionError:
                yield Row(where, BadRow("malformed_json", "JSON nested too deep"))


def _read_datasets(source: str, split: str, name: str) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(source, split=split)
    except Exception as error:  # datasets raises dozens of types for a name it can not load
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{source}: no such file, and not a data set that can be loaded ({reason})") from None
    for number, value in enumerate(loaded, 1):
        yield Row(f"{name}: row {number}", value)


def tokenize(source: str, tokenizer: Tokenizer, cfg: DataSection) -> Dataset:
    """Read and tokenise all rows; cut what is longer than `max_length` at its end.

    A row that can not be trained on (malformed, no response, no trained token within the length) ends
    the run or is dropped and counted by reason, as `on_bad_row` says.

    Raises:
      DataError: a bad row (file and line), or no row left.
    """
    dataset = Dataset(examples=[], read=0)
    first_bad: str | None = None
    digest = hashlib.sha256()
    for row in read_rows(source, cfg.split):
        dataset.read += 1
        try:
            example, truncated = _encode(row, tokenizer, cfg)
        except BadRow as bad:
            dataset.dropped[bad.reason] += 1
            first_bad = first_bad or f"{row.where}: {bad.message}"
            continue
        dataset.truncated += truncated
        dataset.examples.append(example)
        digest.update(example.ids.tobytes() + example.trained.tobytes() + b"|")
    num_bad = sum(dataset.dropped.values())
    if first_bad and cfg.on_bad_row == "error":
        others = f" ({num_bad - 1} more bad rows)" if num_bad > 1 else ""
        raise DataError(f"{first_bad}{others}; mend it, or drop such rows (data.on_bad_row=skip, or --on-bad-row skip)")
    if not dataset.examples:
        why = f"; all {num_bad} rows were dropped, the first at {first_bad}" if first_bad else ""
        raise DataError(f"{source}: holds no usable row{why}")
    dataset.digest = digest.hexdigest()
    return dataset


def _encode(row: Row, tokenizer: Tokenizer, cfg: DataSection) -> tuple[Example, bool]:
    if isinstance(row.value, BadRow):
        raise row.value
    if not isinstance(row.value, dict):
        raise BadRow("wrong_type", f"a row must be a JSON object, not {type(row.value).__name__}")
    example = encode_row(tokenizer, row.value, format=cfg.format, prompt=cfg.prompt, train_on=cfg.train_on)
    truncated = len(example.ids) > cfg.max_length
    if truncated:
        example = Example(example.ids[: cfg.max_length], example.trained[: cfg.max_length])
    if not example.trained[1:].any():  # the first token is predicted from nothing
        if truncated:
            raise BadRow(
                "prompt_too_long",
                f"the prompt alone fills data.max_length={cfg.max_length} tokens, so no token would be trained",
            )
        raise BadRow("no_trained_token", "no token of the row would be trained")
    return example, truncated


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a random fraction of the examples (at least one, and one stays) for evaluation."""
    total = len(dataset.examples)
    if total < 2:
        raise DataError("data.eval is a fraction, but there is only one usable row to split")
    order = np.random.default_rng([seed, 1]).permutation(total)
    num_held = min(total - 1, max(1, round(total * fraction)))
    held = set(order[:num_held].tolist())
    kept = [example for i, example in enumerate(dataset.examples) if i not in held]
    out = [example for i, example in enumerate(dataset.examples) if i in held]
    train = Dataset(kept, dataset.read, dataset.truncated, dataset.dropped, dataset.digest)
    return train, Dataset(out, len(out), digest=dataset.digest)


def pack(lengths: list[int], order: np.ndarray, max_length: int, packing: bool) -> list[list[int]]:
    """Assign examples to rows of `max_length` tokens, in the given order.

    Each goes into the fullest row that still has room (best fit), so short and long examples mix;
    without packing each has a row of its own.
    """
    if not packing:
        return [[int(i)] for i in order]
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room left -> rows
    for i in order.tolist():
        length = lengths[i]
        room = next((r for r in range(length, max_length + 1) if by_room[r]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, max_length
        else:
            row = by_room[room].pop(0)
        rows[row].append(i)
        by_room[room - length].append(row)
    return rows


class Epochs:
    """Packed rows of epoch after epoch, each epoch in an order of its own, by random access.

    The order depends on the seed and the epoch alone. An epoch whose rows do not fill its last batch
    is filled with empty ones, so that every batch has the same shape and no example is dropped.
    """

    def __init__(self, dataset: Dataset, cfg: DataSection, batch_size: int, seed: int | None):
        """Args: seed: None keeps file order, for evaluation."""
        self._dataset, self._cfg, self._batch_size, self._seed = dataset, cfg, batch_size, seed
        self._lengths = [len(example.ids) for example in dataset.examples]
        self._starts = [0]
        self._rows: list[list[list[int]]] = []
        self._lock = threading.Lock()

    def rows(self, epoch: int) -> list[list[int]]:
        """Example indices of each packed row of an epoch."""
        with self._lock:  # the iterator's threads ask at once, and each epoch is made once
            while len(self._rows) <= epoch:
                order = np.arange(len(self._lengths))
                if self._seed is not None:
                    order = np.random.default_rng([self._seed, len(self._rows)]).permutation(order)
                rows = pack(self._lengths, order, self._cfg.max_length, self._cfg.packing)
                rows += [[]] * (-len(rows) % self._batch_size)
                self._rows.append(rows)
                self._starts.append(self._starts[-1] + len(rows))
            return self._rows[epoch]

    def num_batches(self, epochs: int) -> int:
        """Batches in the first `epochs` epochs."""
        self.rows(epochs - 1)
        return self._starts[epochs] // self._batch_size

    def epoch_at(self, batch: int) -> float:
        """How many epochs the first `batch` batches are."""
        row, epoch = batch * self._batch_size, 0
        while self._starts[epoch] + len(self.rows(epoch)) <= row:
            epoch += 1
        return epoch + (row - self._starts[epoch]) / len(self.rows(epoch))

    def tokens_at(self, batch: int) -> int:
        """How many tokens the first `batch` batches hold, padding left out."""
        total, rows_left, epoch = 0, batch * self._batch_size, 0
        while rows_left > 0:
            rows = self.rows(epoch)[:rows_left]
            total += sum(self._lengths[i] for row in rows for i in row)
            rows_left, epoch = rows_left - len(rows), epoch + 1
        return total

    def __len__(self) -> int:
        return 2**40  # epochs follow each other without end; the trainer knows when to stop

    def __getitem__(self, index: int) -> Batch:
        epoch = 0
        while self._starts[epoch] + len(self.rows(epoch)) <= index:
            epoch += 1
        members = self.rows(epoch)[index - self._starts[epoch]]
        return pack_row([self._dataset.examples[i] for i in members], self._cfg.max_length)


def pack_row(examples: list[Example], length: int) -> Batch:
    """One packed row, arrays of [T]."""
    row = Batch(
        tokens=np.zeros(length, np.int32),
        targets=np.zeros(length, np.int32),
        weights=np.zeros(length, np.float32),
        segments=np.zeros(length, np.int32),
        positions=np.zeros(length, np.int32),
    )
    start = 0
    for number, (ids, trained) in enumerate(examples, 1):
        end = start + len(ids)
        row["tokens"][start:end] = ids
        row["targets"][start : end - 1] = ids[1:]
        row["weights"][start : end - 1] = trained[1:]
        row["segments"][start:end] = number
        row["positions"][start:end] = np.arange(len(ids))
        start = end
    return row


def batches(epochs: Epochs, batch_size: int, last: int | None = None) -> grain.DatasetIterator:
    """Iterator over batches [B T]; `get_state` and `set_state` save and restore its position.

    Args:
      last: number of batches; None goes on without end.
    """
    rows = grain.MapDataset.source(epochs)
    if last is not None:
        rows = rows[: last * batch_size]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch_size)
    return iter(rows.batch(batch_size, drop_remainder=True).to_iter_dataset(options))
