"""Rows that are broken or mean harm: bounded, refused in one sentence, or dropped and counted.

The numbers are those of the fault cases in docs/reliability.md.
"""

import json
import subprocess
import sys

import pytest
from command_line import sentence_of
from data_files import write

from jlora.config import DataSection
from jlora.data.encoding import tokenize
from jlora.data.packing import Epochs
from jlora.data.rows import MAX_ROW_BYTES
from jlora.errors import DataError

GOOD = b'{"prompt": "a", "completion": "b"}\n'
MB = 2**20


def section(**changes):
    wanted = {"train": "unused", "format": "completion", "max_length": 32, "on_bad_row": "skip"}
    return DataSection.model_validate(wanted | changes)


# Rows that train nothing (cases 3, 4, 25, 27)


def test_case_3_prompt_that_fills_the_length_is_dropped_and_counted_or_named(tmp_path, tokenizer):
    long = json.dumps({"prompt": "a" * 50, "completion": "b"}).encode() + b"\n"
    path = write(tmp_path / "rows.jsonl", GOOD + long + GOOD)
    dataset = tokenize(str(path), tokenizer, section())
    assert (dataset.read, len(dataset.examples), dict(dataset.dropped)) == (3, 2, {"prompt_too_long": 1})
    assert dataset.places == ["rows.jsonl:1", "rows.jsonl:3"]
    assert "rows.jsonl:2: " in sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))
    write(path, long * 2)
    said = sentence_of(DataError, tokenize, str(path), tokenizer, section())
    assert "holds no usable row; all 2 are bad: rows.jsonl:1, rows.jsonl:2: the prompt alone fills" in said


@pytest.mark.parametrize("response", ['""', "null", '" \\n\\t"'])
def test_case_4_empty_response_is_dropped_and_counted_or_named(tmp_path, tokenizer, response):
    bad = f'{{"prompt": "a", "completion": {response}}}\n'.encode()
    path = write(tmp_path / "rows.jsonl", GOOD + bad)
    assert sum(tokenize(str(path), tokenizer, section()).dropped.values()) == 1
    assert "rows.jsonl:2: " in sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))


def test_case_25_rows_over_the_length_are_cut_and_counted(tmp_path, tokenizer):
    long = json.dumps({"prompt": "a", "completion": "b" * 50}).encode() + b"\n"
    dataset = tokenize(str(write(tmp_path / "rows.jsonl", GOOD + long)), tokenizer, section())
    assert dataset.truncated == 1 and [len(example.ids) for example in dataset.examples] == [4, 32]


@pytest.mark.parametrize(("count", "batches"), [(0, None), (1, 1), (4, 1), (5, 2)])
def test_case_27_few_rows_and_rows_that_do_not_divide(tmp_path, tokenizer, count, batches):
    path = str(write(tmp_path / "rows.jsonl", GOOD * count))
    if batches is None:
        assert "holds no usable row" in sentence_of(DataError, tokenize, path, tokenizer, section())
        return
    epochs = Epochs(tokenize(path, tokenizer, section()), section(packing=False), batch_size=4, seed=0)
    assert epochs.num_batches(1) == batches  # the last is filled with empty rows, which train nothing
    weights = [epochs[row]["weights"].sum() for row in range(4 * batches)]
    assert sum(weight > 0 for weight in weights) == count


# Rows that are malformed (case 24)

BAD_ROWS = {
    "invalid UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "invalid_utf8"),
    "invalid UTF-8 outside a field": (b'{"prompt": "a", "completion": "b", "\xc3\x28": 1}', "invalid_utf8"),
    "not an object": (b'["a", "b"]', "wrong_type"),
    "wrong type": (b'{"prompt": ["a"], "completion": "b"}', "wrong_type"),
    "duplicate key": (b'{"prompt": "a", "completion": "b", "completion": "c"}', "duplicate_key"),
    "duplicate key inside": (b'{"prompt": "a", "completion": "b", "c": [{"d": 1, "d": 2}]}', "duplicate_key"),
    "half a surrogate pair": (b'{"prompt": "\\ud800", "completion": "b"}', "not_unicode"),
}
BROKEN_ROWS = {
    "malformed": b'{"prompt": "a", "completion": "b"',
    "NUL": b'{"prompt": "a\0", "completion": "b"}',
    "too deep": b'{"prompt": ' + b"[" * 100_000,
    "too many digits": b'{"prompt": ' + b"7" * 5000 + b"}",
}


@pytest.mark.parametrize("name", [*BAD_ROWS, *BROKEN_ROWS])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_case_24_malformed_row_is_named_by_its_physical_line(tmp_path, tokenizer, name, kind):
    row, reason = BAD_ROWS.get(name) or (BROKEN_ROWS[name], "malformed_json")
    path = tmp_path / f"rows.{kind}"
    good = GOOD.rstrip()
    # Blank lines and a byte order mark, so that rows and lines are not numbered alike.
    lines = [good, b"", row, good] if kind == "jsonl" else [b"[", good + b",", b"", row + b",", good, b"]"]
    write(path, b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")
    line = 3 if kind == "jsonl" else 5 if name == "malformed" else 4  # its comma is missed in the row after it
    message = sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))
    assert f"rows.{kind}:{line}: " in message
    if kind == "json" and name in BROKEN_ROWS:  # nobody knows where the next row begins
        assert f"rows.{kind}:{line}: " in sentence_of(DataError, tokenize, str(path), tokenizer, section())
        return
    dataset = tokenize(str(path), tokenizer, section())
    assert (dataset.read, len(dataset.examples), dict(dataset.dropped)) == (3, 2, {reason: 1})


def test_case_24_escaped_nul_is_text(tmp_path, tokenizer):
    row = b'{"prompt": "a\\u0000", "completion": "b\\u0000c"}\n'
    (example,) = tokenize(str(write(tmp_path / "rows.jsonl", row)), tokenizer, section()).examples
    assert tokenizer.decode(example.ids) == "a\0b\0c"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prompt,prompt\na,b\n", "rows.csv:1: duplicate column 'prompt'"),
        (b'prompt,completion\na,"b\n\n\n', "rows.csv:4: malformed CSV"),
        (b"prompt,completion\na,\xff\n", "rows.csv:2: not valid UTF-8"),
        (b'prompt,completion\n"two\nlines",""\n', "rows.csv:3: the field"),
    ],
)
def test_case_24_malformed_csv_is_named_by_its_physical_line(tmp_path, tokenizer, content, words):
    path = write(tmp_path / "rows.csv", content)
    assert words in sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))


def test_case_24_parquet_text_that_is_not_utf8(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": ["b"] * 3}), tmp_path / "rows.parquet")
    dataset = tokenize(str(tmp_path / "rows.parquet"), tokenizer, section())
    assert (len(dataset.examples), dict(dataset.dropped)) == (2, {"invalid_utf8": 1})


# Writes a file of the kind, reads it in a process of its own, and prints the memory that this took in MiB.
MEASURE = """
import resource, sys
from jlora.errors import DataError
from jlora.data.rows import read_rows
kind, path = sys.argv[1:]
with open(path, "wb") as file:
    if kind == "nested":
        file.write(b"[")
        for _ in range(15):
            file.write(b"{}," * (2**20 // 3))
        file.write(b"0]\\n")
    elif kind == "array":
        file.write(b'[{"text": "a"}')
        for _ in range(100):
            file.write(b',{"text": "%s"}' % (b"x" * 2**20))
        file.write(b"]")
    else:
        file.write({"jsonl": b'{"text": "', "json": b'[{"text": "', "csv": b"text\\n"}[kind])
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write({"jsonl": b'"}\\n{"text": "b"}\\n', "json": b'"}]', "csv": b"\\nb\\n"}[kind])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, rows, says = peak(), [], ""
try:
    rows = [f"{row.where}: {row.value}"[:60] for row in read_rows(path, "train")]
except DataError as error:
    says = str(error)
print(peak() - before, len(rows), rows[0] if rows else says, sep="|")
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name", "rows", "says", "limit"),
    [
        ("jsonl", "a.jsonl", "2", "a.jsonl:1: the line is longer than 16 MiB", 80),
        ("json", "a.json", "0", "a.json:1: row 1 is longer than 16 MiB, or malformed JSON", 160),
        ("csv", "a.csv", "0", "a.csv:2: the row is longer than 16 MiB", 80),
        ("array", "a.json", "101", "a.json:1: row 1: {'text': 'a'}", 80),
        ("nested", "a.jsonl", "1", "a.jsonl:1: [{}, {}", 700),
    ],
)
def test_case_24_line_of_100_megabytes_takes_bounded_memory(tmp_path, kind, name, rows, says, limit):
    """An array may be one line of any length; a row may not. `nested` is the dearest JSON of the length allowed."""
    command = [sys.executable, "-c", MEASURE, kind, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    grown, count, first = done.stdout.strip().split("|")
    assert (count, first[: len(says)]) == (rows, says)
    assert int(grown) < limit
    assert MAX_ROW_BYTES == 16 * MB
    (tmp_path / name).unlink()
