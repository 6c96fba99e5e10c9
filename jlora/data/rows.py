"""Files and data sets -> rows, each with the place where it stands.

Owns reading alone: JSON, CSV and plain text. Arrow, Parquet and data sets are read by `tables`; `sources` says which
files. Knows nothing of what a row means.
However long a file or a line of it is, little more than the longest row that is allowed is in memory at once.
"""

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jlora.data.row import MAX_ROW_BYTES, TOO_LONG, BadRow, Row
from jlora.data.sources import File, ending, files_of, open_rows, parse_split, split_of
from jlora.data.tables import read_arrow, read_data_set, read_parquet
from jlora.errors import DataError

_SPACES = re.compile(r"[ \t\r\n]*")
# Keys of a JSON object that holds the rows of a file, beside the names of splits.
CONTAINERS = ("data", "rows", "examples", "instances")
# What a CSV file writes for no value, as pandas, and so the `datasets` library, reads it.
NO_VALUE = frozenset({
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA", "NULL",
    "NaN", "None", "n/a", "nan", "null",
})  # fmt: skip
SEPARATORS = ",;\t|"
# An object that holds rows under a key, with no more than plain values before it; and one written over several lines.
_HOLDER = re.compile(r'\{(?:\s*"[^"\\]*"\s*:\s*(?:"[^"\\]*"|[-+.\w]+)\s*,)*\s*"(?P<key>[^"\\]*)"\s*:\s*\[\s*[\[{]')
_ARRAY = re.compile(r'\[\s*\{\s*"')  # of objects: a line of JSONL that is a list is no row
_PRETTY = re.compile(r'\{[ \t]*\r?\n\s*"')


def read_rows(source: str, split: str, separator: str | None = None) -> Iterator[Row]:
    """Rows of a file, of a folder's files, or of a data set of the `datasets` library; see `sources.files_of`.

    A .txt file is one row, its text. JSON, JSONL and CSV are read row by row here, not through `datasets`, which
    reports neither the line of a malformed row nor rows of unequal keys.

    Args:
      split: of a folder or data set; of each, and of a file, it may ask for some rows, such as `train[:1000]`.
      separator: of CSV files; None: a tab in .tsv files, in others what parts the names of the first line.

    Raises:
      DataError: missing, unreadable or malformed file, with file and line.
    """
    files = files_of(source, split)
    if files is None and not Path(source).is_dir():  # on the hub, where the library knows more of splits
        yield from _numbered(source, read_data_set(source, split))
        return
    asked = parse_split(split)
    if files is None:
        rows = _numbered(Path(source).name, read_data_set(source, asked.name))
    else:
        rows = itertools.chain.from_iterable(_read_file(file, asked.name, separator) for file in files.read)
    yield from itertools.islice(rows, asked.start, asked.stop)


def _read_file(file: File, split: str, separator: str | None) -> Iterator[Row]:
    path, name, kind = file
    try:
        match kind:
            case "csv":
                yield from _read_csv(path, name, separator)
            case "parquet":
                yield from _numbered(name, read_parquet(path))
            case "arrow":
                yield from _numbered(name, read_arrow(path))
            case "json":
                yield from _read_json(path, name, split)
            case "text":
                yield from _read_text(path, name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _numbered(name: str, values: Iterator[Any]) -> Iterator[Row]:
    """Rows that stand on no line."""
    for number, value in enumerate(values, 1):
        yield Row(f"{name}: row {number}", value)


def _read_csv(path: Path, name: str, separator: str | None) -> Iterator[Row]:
    """Rows by the header's names; the line is the one on which the row ends."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _open_text(path) as stream:
        reader: csv.DictReader[str] | None = None
        length = 0  # of the row's lines until now

        def lines() -> Iterator[str]:
            nonlocal length
            while line := stream.readline(MAX_ROW_BYTES + 1):
                length += len(line)
                if length > MAX_ROW_BYTES:
                    where = f"{name}:{reader.reader.line_num + 1}" if reader else f"{name}:1"
                    raise DataError(f"{where}: the row is {TOO_LONG}; is there a quote that is not closed?")
                yield line

        try:
            header = next(lines(), "")
            reader = csv.DictReader(
                itertools.chain([header], lines()), strict=True, delimiter=separator or _separator(header, name)
            )
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
                    yield Row(where, {key: None if field in NO_VALUE else field for key, field in value.items()})
        except csv.Error as error:
            line = reader.reader.line_num if reader else 1
            raise DataError(f"{name}:{line}: malformed CSV ({error})") from None


def _separator(header: str, name: str) -> str:
    """What parts the names of a CSV file's first line; a comma where nothing does."""
    if ending(name) == ".tsv":
        return "\t"
    try:
        return csv.Sniffer().sniff(header, SEPARATORS).delimiter
    except csv.Error:
        return ","


@contextmanager
def _open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    with open_rows(path) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _not_utf8(text: str) -> bool:
    return re.search("[\udc80-\udcff]", text) is not None  # as surrogateescape hides such bytes


def _read_json(path: Path, name: str, split: str) -> Iterator[Row]:
    """Rows of JSON: a line each, the elements of one array, objects over several lines, or what one object holds."""
    with open_rows(path) as stream:
        start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().decode("utf-8", "replace")
    held = _HOLDER.match(start)
    is_holder = held is not None and (held["key"] in CONTAINERS or split_of(held["key"]) is not None)
    is_array = start.startswith("[") if ending(name) == ".json" else _ARRAY.match(start)
    if not (is_array or is_holder or _PRETTY.match(start)):
        with open_rows(path) as stream:
            yield from _read_lines(stream, name)
        return
    with _open_text(path) as text:
        window, number = _Window(text), 0
        if is_array:
            yield from _array(window, name)
            if window.peek():
                raise DataError(f"{name}:{window.line}: malformed JSON (the array has ended, the file has not)")
        elif is_holder:
            yield from _read_held(window, name, split)
        else:
            while window.peek():
                number += 1
                yield _value(window, name, number)


class _Window:
    """The text of a file from a place on, of which a part is in memory, and the line of that place.

    Attributes:
      decoder: reads a value of it, and adds duplicate keys to `twice`.
    """

    def __init__(self, stream: io.TextIOBase):
        self.text, self.at, self.line = "", 0, 1
        self.twice: list[str] = []
        self.decoder = json.JSONDecoder(object_pairs_hook=partial(_object, self.twice))
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


def _array(window: _Window, name: str) -> Iterator[Row]:
    """The elements of the JSON array at the window's place, one at a time."""
    window.peek()
    window.go(window.at + 1)  # the bracket
    number, going_on = 0, window.peek() != "]"
    while going_on:
        number += 1
        yield _value(window, name, number)
        going_on = window.peek() == ","
        window.go(window.at + going_on)
    if (found := window.peek()) != "]":
        what = f"row {number} is followed by {found!r}" if found else "the array does not end"
        raise DataError(f"{name}:{window.line}: malformed JSON ({what})")
    window.go(window.at + 1)


def _read_held(window: _Window, name: str, split: str) -> Iterator[Row]:
    """The rows of one JSON object, which lie under a key such as `data`, or of its splits under the one asked for."""
    keys, found = [], False
    while window.peek() in ("{", ","):
        window.go(window.at + 1)
        window.peek()
        key = _value(window, name, 0).value
        if window.peek() != ":":
            raise DataError(f"{name}:{window.line}: malformed JSON (a key without a value)")
        window.go(window.at + 1)
        keys.append(str(key))
        if window.peek() == "[":
            own = key in CONTAINERS or split in (key, split_of(str(key)))
            for row in _array(window, name):
                if own:
                    yield row
            found = found or own
        else:
            _value(window, name, 0)
    if window.peek() != "}":
        raise DataError(f"{name}:{window.line}: malformed JSON (the object does not end)")
    if not found:
        raise DataError(f"{name}: has no split {split!r}; set data.split to one of its keys: {', '.join(keys)[:200]}")


def _value(window: _Window, name: str, number: int) -> Row:
    """The value at the window's place, which moves behind it."""
    window.peek()
    where = f"{name}:{window.line}: row {number}"
    value, end = _element(window, name, number)
    if _not_utf8(window.text[window.at : end]):
        value = BadRow("invalid_utf8", "not valid UTF-8")
    elif window.twice:
        value = _duplicate(window.twice)
    window.twice.clear()
    window.go(end)
    return Row(where, value)


def _element(window: _Window, name: str, number: int) -> tuple[Any, int]:
    """The value that stands at the window's place, and where it ends."""
    while True:
        try:
            value, end = window.decoder.raw_decode(window.text, window.at)
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


def _read_lines(stream: io.BufferedReader, name: str) -> Iterator[Row]:
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
    with open_rows(path) as stream:
        content = stream.read(MAX_ROW_BYTES + 1)
    if len(content) > MAX_ROW_BYTES:
        yield Row(name, BadRow("too_long", f"the text is {TOO_LONG}; split the file"))
        return
    try:
        if text := io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read():
            yield Row(name, {"text": text})
    except UnicodeDecodeError as error:
        yield Row(name, BadRow("invalid_utf8", f"not valid UTF-8 at byte {error.start}"))
