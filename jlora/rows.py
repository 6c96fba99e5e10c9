"""Files and data sets -> rows, each with the place where it stands.

Owns reading alone: json, jsonl, csv, parquet, folders of them and hub data sets. Knows nothing of what a row means.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.errors import DataError
from jlora.prompts import BadRow

MAX_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """One row and where it stands, such as `train.jsonl:12`."""

    where: str
    value: Any


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
