"""Parquet files and data sets of the `datasets` library -> the values of their rows, as Arrow has them.

Arrow reads what others made: files of record batches are looked through in a process of their own first, media are
neither opened nor fetched, and however often a value stands in a file, little more than the longest row that is
allowed is in memory at once.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.data.row import MAX_ROW_BYTES, TOO_LONG, BadRow
from jlora.errors import DataError
from jlora.files import hub
from jlora.files.paths import inside
from jlora.files.sandbox import tried
from jlora.files.theirs import MAX_JSON, open_theirs, read_theirs

if TYPE_CHECKING:
    import datasets
    import pyarrow

BATCH_ROWS = 1024
# Of rows that are decoded at once, and of all that the lists of a Parquet row group could come to.
MAX_BATCH_BYTES, MAX_LIST_BYTES = 64 * 2**20, 2**30
# The columns of all formats; of others, those that JSON has words for are read too.
COLUMNS = frozenset({
    "instruction", "input", "output", "prompt", "completion", "messages", "conversations", "system", "chosen",
    "rejected", "text",
})  # fmt: skip

JSON = "arrow.json"  # what the library keeps as text, and reads as a value

# Size and time of each file of record batches that was tried in a process of its own.
_survived: set[tuple[str, int, int]] = set()


def read_parquet(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file.

    Raises:
      DataError: it is no whole one, or a column of a format has values that are no text.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with open_theirs(path) as stream, open_theirs(path) as again:
            plain = parquet.ParquetFile(stream)
            columns = _columns(plain.schema_arrow, path)
            leaves = [plain.schema.column(i) for i in range(len(plain.schema))]
            texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
            coded = parquet.ParquetFile(again, read_dictionary=texts)
            for group in range(plain.num_row_groups):
                first = next(coded.iter_batches(1, row_groups=[group], columns=columns), None)
                rows, repeats = _bounds(plain.metadata.row_group(group), first)
                file = coded if repeats else plain
                for batch in file.iter_batches(rows, row_groups=[group], columns=columns):
                    yield from _values(batch)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError) as error:
        raise DataError(f"{path}: not a whole parquet file ({_line(error)})") from None


def read_arrow(path: Path) -> Iterator[Any]:
    """The rows of a file of Arrow record batches, as the cache of the `datasets` library keeps them.

    Raises:
      DataError: it is damaged, or a column of a format has values that are no text.
    """
    import datasets

    _try([path], path)
    yield from _read_loaded(lambda: datasets.Dataset.from_file(str(path)), str(path))


def _bounds(group: Any, first: "pyarrow.RecordBatch | None") -> tuple[int, bool]:
    """How many rows of a row group are read at once, and whether texts have to be kept as a dictionary meanwhile.

    A text of the dictionary, which stands in the file once, may be the value of every row, and any number of times in
    one list. Reading dictionaries takes ten times as long, and so is for files where that would be felt.

    Args:
      first: a row, with the dictionaries of its columns.
    """
    flat = nested = 0
    for column in first.columns if first is not None else ():
        longest = _longest(column)
        flat, nested = (flat + longest, nested) if column.type.num_fields == 0 else (flat, nested + longest)
    values = max((group.column(i).num_values for i in range(group.num_columns)), default=0)
    row = flat + group.total_byte_size // max(1, group.num_rows)
    return min(BATCH_ROWS, max(1, MAX_BATCH_BYTES // max(1, row))), nested * values > MAX_LIST_BYTES


def _longest(array: "pyarrow.Array") -> int:
    """The bytes of the longest text of each dictionary in an array."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    if types.is_dictionary(array.type):
        return compute.max(compute.binary_length(array.dictionary)).as_py() or 0
    if types.is_struct(array.type):
        return sum(map(_longest, array.flatten()))
    return _longest(array.values) if array.type.num_fields else 0


def read_data_set(source: str, split: str) -> Iterator[Any]:
    """The rows of a data set of the `datasets` library: a folder of `save_to_disk`, or a name on the hub.

    Raises:
      DataError: there is none, or it is damaged.
    """
    yield from _read_loaded(lambda: _load(source, split), source)


def _read_loaded(load: "Callable[[], datasets.Dataset]", source: str) -> Iterator[Any]:
    try:
        loaded = load()
        plain = loaded.select_columns(_columns(loaded.features.arrow_schema, source)).with_format("arrow")
        has_json = any(f"extension<{JSON}>" in str(kind) for kind in plain.features.arrow_schema.types)
        for table in plain.iter(BATCH_ROWS):
            for value in itertools.chain.from_iterable(map(_values, table.to_batches())):
                # Its media hold bytes, and so are not among the columns.
                yield plain.features.decode_example(value) if has_json and isinstance(value, dict) else value
    except DataError:
        raise
    except Exception as error:  # the libraries raise SystemError and bare Exception too
        raise DataError(f"{source}: cannot be read ({_line(error)}); make the data set again") from None


def _load(source: str, split: str) -> "datasets.Dataset":
    import datasets

    datasets.disable_progress_bars()
    folder = Path(source)
    try:
        if not folder.is_dir():
            hub.require_data_set(source, "file or folder", DataError)
            return datasets.load_dataset(source, split=split)
        if (folder / "dataset_dict.json").is_file():
            splits = _json(folder, "dataset_dict.json")["splits"]
            if split not in splits:
                known = ", ".join(map(str, splits))[:200]
                raise DataError(f"{folder}: has no split {split!r}; set data.split to one of its own: {known}")
            folder = inside(folder, split, DataError, folders=True)
        _try(_arrow_files(folder), folder)
        return datasets.load_from_disk(str(folder))
    except DataError:
        raise
    except Exception as error:  # datasets raises dozens of types for a name it cannot load
        what = "damaged, or not a data set" if folder.is_dir() else "no such file, and not a data set"
        raise DataError(f"{source}: {what} that can be loaded ({_line(error)[:200]})") from None


def _arrow_files(folder: Path) -> list[Path]:
    """The files of a folder of `save_to_disk`, which lie in it."""
    inside(folder, "dataset_info.json", DataError)
    state = _json(folder, "state.json")
    listed = [each["filename"] for key in ("_data_files", "_indices_files") for each in state.get(key) or ()]
    return [inside(folder, name, DataError) for name in listed]


def _try(files: list[Path], source: Path) -> None:
    """See that files of record batches kill no process that reads them."""
    found = {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files}
    if new := sorted(found - _survived):
        names, sizes, _ = zip(*new, strict=True)
        if fault := tried("arrow", *names, size=sum(sizes)):
            raise DataError(f"{source}: its Arrow files cannot be read: {fault}; make the data set again")
        _survived.update(new)


def _json(folder: Path, name: str) -> dict[str, Any]:
    return json.loads(read_theirs(inside(folder, name, DataError), MAX_JSON))


def _columns(schema: "pyarrow.Schema", source: str | Path) -> list[str]:
    """The names of the columns that are read: those of all formats, and what can be written as JSON."""
    for field in schema:
        if field.name in COLUMNS and not _readable(field.type, own=True):
            raise DataError(f"{source}: the column {field.name!r} is {str(field.type)[:80]}, which is not read")
    found = [field.name for field in schema if _readable(field.type, own=field.name in COLUMNS)]
    if not found:
        raise DataError(f"{source}: holds no column of text")
    if len(set(found)) < len(found):
        raise DataError(f"{source}: duplicate column {max(found, key=found.count)!r}; rename one of the two")
    return found


def _readable(kind: "pyarrow.DataType", own: bool) -> bool:
    """Whether values of a type are read: of a format's column also dates, which the row is refused for."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return all(_readable(field.type, own) for field in kind)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _readable(kind.value_type, own)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind):
        return True
    if getattr(kind, "extension_name", None) == JSON:
        return True
    return types.is_primitive(kind) and (own or not types.is_temporal(kind))


def _values(batch: "pyarrow.RecordBatch") -> Iterator[Any]:
    """The rows of a batch as Python has them; one by one where they are long, or a value of them does not exist."""
    if sum(map(_held, batch.columns)) <= MAX_ROW_BYTES:
        try:
            yield from batch.to_pylist()
            return
        except (ValueError, ArithmeticError):  # text that is not UTF-8, a date beyond the year 9999
            pass
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        try:
            if sum(map(_held, row.columns)) > MAX_ROW_BYTES:
                value = BadRow("too_long", f"the row is {TOO_LONG}")
            else:
                value = row.to_pylist()[0]
        except UnicodeDecodeError:
            value = BadRow("invalid_utf8", "not valid UTF-8")
        except (ValueError, ArithmeticError) as error:
            value = BadRow("wrong_type", f"a value that cannot be read ({error})")
        yield value


def _held(array: "pyarrow.Array") -> int:
    """The bytes of an array's values, each time that one stands in it."""
    import pyarrow.compute as compute
    import pyarrow.types as types

    kind = array.type
    if types.is_struct(kind):
        return sum(map(_held, array.flatten()))
    if types.is_dictionary(kind) and not types.is_primitive(kind.value_type):
        if not len(array.dictionary):
            return 0
        return compute.sum(compute.take(compute.binary_length(array.dictionary), array.indices)).as_py() or 0
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return array.nbytes - array.flatten().nbytes + _held(array.flatten())
    return array.nbytes


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
