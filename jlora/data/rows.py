"""Files and data sets -> rows, each with the place where it stands.

Owns reading alone: json, jsonl, csv and plain text, and folders of them; parquet and data sets are read by `tables`.
Knows nothing of what a row means.
However long a file or a line of it is, little more than the longest row that is allowed is in memory at once.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jlora.data.row import MAX_ROW_BYTES, TOO_LONG, BadRow, Row
from jlora.data.tables import read_data_set, read_parquet
from jlora.errors import DataError
from jlora.files.paths import inside
from jlora.files.theirs import open_theirs, text_of_theirs

_SPACES = re.compile(r"[ \t\r\n]*")
KINDS = (".json", ".jsonl", ".csv", ".parquet")


def read_rows(source: str, split: str) -> Iterator[Row]:
    """Rows of a json, jsonl, csv or parquet file, a folder of such files, or a hub data set.

    A .txt file is one row, its text; a folder is one of such files where it holds no other kind.

    JSON and JSONL are read row by row here, not through `datasets`, which reports neither the line
    of a malformed row nor rows of unequal keys.

    Raises:
      DataError: missing, unreadable or malformed file, with file and line.
    """
    files = files_of(source)
    if files is None:
        name = Path(source).name if Path(source).is_dir() else source
        yield from _numbered(name, read_data_set(source, split))
    for path, name in files or ():
        yield from _read_file(path, name)


def files_of(source: str) -> list[tuple[Path, str]] | None:
    """The files that are read, each with its name in a row's place; None for what `datasets` reads.

    Raises:
      DataError: there is no such file, or none in a folder.
    """
    path = Path(source)
    if path.is_file():
        return [(path, path.name)]
    if not path.is_dir():
        if path.suffix in (*KINDS, ".txt") or source.startswith((".", "/", "~")):
            raise DataError(f"{source}: no such file; check the path")
        return None
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return None
    files = sorted(f for f in path.iterdir() if f.suffix in KINDS)
    files = files or sorted(f for f in path.iterdir() if f.suffix == ".txt")
    if not files:
        raise DataError(f"{path}: holds no json, jsonl, csv, parquet or txt file")
    return [(inside(path, file.name, DataError), f"{path.name}/{file.name}") for file in files]


def _read_file(path: Path, name: str) -> Iterator[Row]:
    try:
        match path.suffix:
            case ".csv":
                yield from _read_csv(path, name)
            case ".parquet":
                yield from _numbered(name, read_parquet(path))
            case ".json" if _is_json_array(path):
                yield from _read_json_array(path, name)
            case ".json" | ".jsonl":
                yield from _read_lines(path, name)
            case ".txt":
                yield from _read_text(path, name)
            case suffix:
                raise DataError(
                    f"{path}: files ending in '{suffix}' are not read; use json, jsonl, csv, parquet or txt"
                )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _numbered(name: str, values: Iterator[Any]) -> Iterator[Row]:
    """Rows that stand on no line."""
    for number, value in enumerate(values, 1):
        yield Row(f"{name}: row {number}", value)


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    """Rows by the header's names; the line is the one on which the row ends."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open_text(path) as stream:
        length = 0  # of the row's lines until now

        def lines() -> Iterator[str]:
            nonlocal length
            while line := stream.readline(MAX_ROW_BYTES + 1):
                length += len(line)
                if length > MAX_ROW_BYTES:
                    where = f"{name}:{reader.reader.line_num + 1}"
                    raise DataError(f"{where}: the row is {TOO_LONG}; is there a quote that is not closed?")
                yield line

        reader = csv.DictReader(lines(), strict=True)
        try:
            twice = [key for key, count in Counter(reader.fieldnames or ()).items() if count > 1]
            if twice:
                raise DataError(f"{name}:1: duplicate column {twice[0]!r}; rename one of the two")
            length = 0
            for value in reader:
                length = 0
                where = f"{name}:{reader.line_num}"
                if None in value:
                    yield Row(where, BadRow("extra_fields", "the row has more fields than the header"))
                elif any(_not_utf8(field or "") for field in value.values()):
                    yield Row(where, BadRow("invalid_utf8", "not valid UTF-8"))
                else:
                    yield Row(where, value)
        except csv.Error as error:
            raise DataError(f"{name}:{reader.reader.line_num}: malformed CSV ({error})") from None


def _open_text(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_theirs(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _not_utf8(text: str) -> bool:
    return re.search("[\udc80-\udcff]", text) is not None  # as surrogateescape hides such bytes


def _is_json_array(path: Path) -> bool:
    with open_theirs(path) as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


class _Window:
    """The text of a file from a place on, of which a part is in memory, and the line of that place."""

    def __init__(self, stream: io.TextIOBase):
        self.text, self.at, self.line = "", 0, 1
        self._stream = stream

    def more(self) -> bool:
        """Take in as much again; false at the end of the file, or where more than a row is in memory already."""
        unread = len(self.text) - self.at
        new = self._stream.read(max(2**16, unread)) if unread <= MAX_ROW_BYTES else ""
        if new:
            self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)

    def go(self, to: int) -> None:
        """Move the place on to an index of the text."""
        self.line += self.text.count("\n", self.at, to)
        self.at = to

    def peek(self) -> str:
        """Go past spaces; the character there, empty at the end."""
        while True:
            rest = _SPACES.match(self.text, self.at)
            self.go(rest.end() if rest else self.at)
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]


def _read_json_array(path: Path, name: str) -> Iterator[Row]:
    """Rows of one JSON array, an element at a time."""
    twice: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=partial(_object, twice))
    with _open_text(path) as stream:
        window, number = _Window(stream), 0
        window.peek()
        window.go(window.at + 1)  # the bracket
        going_on = window.peek() != "]"
        while going_on:
            number += 1
            window.peek()
            where = f"{name}:{window.line}: row {number}"
            value, end = _element(window, decoder, name, number)
            if _not_utf8(window.text[window.at : end]):
                value = BadRow("invalid_utf8", "not valid UTF-8")
            elif twice:
                value = _duplicate(twice)
            twice.clear()
            window.go(end)
            yield Row(where, value)
            going_on = window.peek() == ","
            window.go(window.at + going_on)
        if (found := window.peek()) != "]":
            what = f"row {number} is followed by {found!r}" if found else "the array does not end"
            raise DataError(f"{name}:{window.line}: malformed JSON ({what})")
        window.go(window.at + 1)
        if window.peek():
            raise DataError(f"{name}:{window.line}: malformed JSON (the array has ended, the file has not)")


def _element(window: _Window, decoder: json.JSONDecoder, name: str, number: int) -> tuple[Any, int]:
    """The value that stands at the window's place, and where it ends."""
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            if window.more():  # it may have been cut
                continue
            line = window.line + window.text.count("\n", window.at, error.pos)
            long = f"row {number} is {TOO_LONG}, or " if len(window.text) - window.at > MAX_ROW_BYTES else ""
            raise DataError(f"{name}:{line}: {long}malformed JSON ({error.msg}) in row {number}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}:{window.line}: {_why(error)} in row {number}") from None
        if end < len(window.text) or not window.more():  # a number may have been cut
            return value, end


def _object(twice: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a duplicate key in it, of which Python would take the last, is added to `twice`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice += [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    return found


def _duplicate(twice: list[str]) -> BadRow:
    return BadRow("duplicate_key", f"duplicate key {twice[0]!r}")


def _why(error: Exception) -> str:
    """What Python's JSON reader does not read."""
    return "JSON nested too deep" if isinstance(error, RecursionError) else "a number of thousands of digits"


def _read_lines(path: Path, name: str) -> Iterator[Row]:
    with open_theirs(path) as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(2**16)
                yield Row(where, BadRow("too_long", f"the line is {TOO_LONG}; is this JSONL?"))
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Row(where, _decode(line))


def _decode(line: bytes) -> Any:
    """One line of JSON, or why it is none."""
    twice: list[str] = []
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=partial(_object, twice))
    except UnicodeDecodeError as error:
        return BadRow("invalid_utf8", f"not valid UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return BadRow("malformed_json", f"malformed JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return BadRow("malformed_json", _why(error))
    return _duplicate(twice) if twice else value


def _read_text(path: Path, name: str) -> Iterator[Row]:
    """A file of plain text as one row; none where it is empty."""
    if path.stat().st_size > MAX_ROW_BYTES:
        yield Row(name, BadRow("too_long", f"the text is {TOO_LONG}; split the file"))
        return
    try:
        if text := text_of_theirs(path, MAX_ROW_BYTES).removeprefix("\ufeff"):
            yield Row(name, {"text": text})
    except UnicodeDecodeError as error:
        yield Row(name, BadRow("invalid_utf8", f"not valid UTF-8 at byte {error.start}"))
