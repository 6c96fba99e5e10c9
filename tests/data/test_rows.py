"""Files to rows: every format gives the same rows, and every bad row is named by file and line."""

import csv
import json

import pytest
from data_files import GOOD, ROWS, error_of, jsonl, section, values, write, write_parquet

import jlora.data.rows
from jlora.data.encoding import tokenize
from jlora.data.rows import BadRow, read_rows
from jlora.errors import DataError

# Readers


def test_every_file_format_gives_the_same_rows(tmp_path):
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    write(tmp_path / "array.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "lines.json", jsonl(ROWS))
    write(tmp_path / "rows.jsonl", jsonl(ROWS))
    write(tmp_path / "unfinished.jsonl", jsonl(ROWS).rstrip("\n"))
    write(tmp_path / "windows.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).replace("\n", "\r\n").encode())
    write(tmp_path / "bom.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode())
    write_parquet(tmp_path / "rows.parquet", ROWS)
    for name in (
        *("array.json", "lines.json", "rows.jsonl", "unfinished.jsonl", "windows.jsonl", "bom.json"),
        *("rows.parquet",),
    ):
        assert values(tmp_path / name) == ROWS, name
    assert values(tmp_path / "rows.csv") == [row | {"id": str(row["id"])} for row in ROWS]


def test_rows_of_unequal_keys_stay_as_they_are(tmp_path):
    rows = [{"a": 1}, {"b": "x"}, {"a": "mixed"}]
    assert values(write(tmp_path / "rows.jsonl", jsonl(rows))) == rows


def test_text_survives_every_format(tmp_path):
    rows = [{"text": 'naïve "quotes", 日本語 \U0001f999\u2028\u0085 tab\t\r\nline\n two'}]
    write(tmp_path / "rows.jsonl", json.dumps(rows[0], ensure_ascii=False) + "\n")
    write(tmp_path / "rows.json", json.dumps(rows, ensure_ascii=False))
    write_parquet(tmp_path / "rows.parquet", rows)
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv"):
        assert values(tmp_path / name) == rows, name


def test_long_csv_field(tmp_path):
    path = write(tmp_path / "rows.csv", "text\n" + "x" * 200_000 + "\n")
    assert values(path) == [{"text": "x" * 200_000}]


def test_folder_of_files_is_read_in_the_order_of_names(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "b.json", json.dumps(ROWS[2:4]))
    write(folder / "a.jsonl", jsonl(ROWS[:2]))
    write_parquet(folder / "c.parquet", ROWS[4:])
    write(folder / "notes.txt", "not data")
    assert values(folder) == ROWS
    assert [row.where for row in read_rows(str(folder), "train")][:3] == [
        *("rows/a.jsonl:1", "rows/a.jsonl:2", "rows/b.json:1: row 1"),
    ]


def test_saved_data_set_of_the_datasets_library(tmp_path):
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one.select(range(2)), "test": one.select(range(2, 5))}).save_to_disk(
        tmp_path / "two"
    )
    assert values(tmp_path / "one") == ROWS
    assert values(tmp_path / "two") == ROWS[:2]
    assert values(tmp_path / "two", split="test") == ROWS[2:5]
    with pytest.raises(DataError, match="two"):
        values(tmp_path / "two", split="dev")


# Errors of files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("missing_folder", "missing_folder: no such file"),
        ("empty_folder", "empty_folder: holds no json, jsonl, csv, tsv, parquet, arrow or txt file"),
        ("rows.xml", "files ending in '.xml' are not read; use json, jsonl, csv, tsv, parquet, arrow or txt"),
        ("torn.parquet", "torn.parquet: not a whole parquet file"),
        ("no.parquet", "no.parquet: not a whole parquet file"),
        ("empty.jsonl", "empty.jsonl: holds no usable row"),
        ("blank.jsonl", "blank.jsonl: holds no usable row"),
        ("empty.json", "empty.json: holds no usable row"),
        ("empty.csv", "empty.csv: holds no usable row"),
        ("header.csv", "header.csv: holds no usable row"),
        ("torn.json", "torn.json:3: malformed JSON"),
        ("deep.json", "deep.json:1: JSON nested too deep in row 1"),
        ("bytes.json", "bytes.json:1: row 1: not valid UTF-8"),
        ("quote.csv", "quote.csv:3: malformed CSV"),
    ],
)
def test_unusable_file(tmp_path, tokenizer, name, words):
    (tmp_path / "empty_folder").mkdir()
    write_parquet(tmp_path / "whole.parquet", ROWS)
    write(tmp_path / "torn.parquet", (tmp_path / "whole.parquet").read_bytes()[:-20])
    write(tmp_path / "no.parquet", b"")
    for empty in ("empty.jsonl", "empty.csv", "rows.xml"):
        write(tmp_path / empty, b"")
    write(tmp_path / "blank.jsonl", b"\n \r\n\t\n")
    write(tmp_path / "empty.json", b"[]")
    write(tmp_path / "header.csv", b"prompt,completion\n")
    write(tmp_path / "torn.json", b'[\n{"prompt": "a", "completion": "b"},\n{"prompt": "a"]\n')
    write(tmp_path / "deep.json", b"[" * 200_000)
    write(tmp_path / "bytes.json", b'[{"prompt":"\xff"}]')
    write(tmp_path / "quote.csv", b'prompt,completion\na,b\na,"b\n')
    # Skipping bad rows does not mend a file that cannot be read at all.
    for on_bad_row in ("error", "skip"):
        assert words in error_of(tmp_path / name, on_bad_row=on_bad_row, tokenizer=tokenizer)


@pytest.mark.parametrize("rest", [b", {", b",]", b",", b"", b"} ]", b" 1]", b"] {", b"]]", b', {"a": 12'])
def test_torn_json_array_is_not_half_read(tmp_path, rest):
    """A file that cannot be read whole gives no rows at all."""
    path = write(tmp_path / "torn.json", b"[\n" + GOOD + rest)
    with pytest.raises(DataError, match=r"torn\.json:2: malformed JSON \("):
        list(read_rows(str(path), "train"))


def test_name_that_is_no_file_is_looked_up_on_the_hub_and_explained():
    message = error_of("no-such-owner/no-such-data-set")
    assert "no-such-owner/no-such-data-set: no such file, and not a data set that can be loaded" in message


# Errors of rows


@pytest.mark.parametrize(
    ("content", "where", "reason", "words"),
    [
        (GOOD + b"\n{", ":2", "malformed_json", "malformed JSON at column 2"),
        (GOOD + b"\n\n  \n{", ":4", "malformed_json", "malformed JSON"),  # blank lines count
        (GOOD + b"\r\n\r\n{\r\n", ":3", "malformed_json", "malformed JSON"),
        (b"\xef\xbb\xbf" + GOOD + b"\n{]", ":2", "malformed_json", "malformed JSON at column 2"),
        (GOOD + b'\n{"prompt": "\xff", "completion": "b"}', ":2", "invalid_utf8", "not valid UTF-8 at byte 12"),
        (b"\0\0\0\n", ":1", "malformed_json", "malformed JSON"),
        (b"[" * 100_000 + b"\n", ":1", "malformed_json", "too deep"),  # in a .jsonl, not an array of rows
        (b'{"a":' * 100_000 + b"\n", ":1", "malformed_json", "too deep"),
        (GOOD + b"\n[1]\n", ":2", "wrong_type", "must be a JSON object, not list"),
        (b"null\n", ":1", "wrong_type", "not NoneType"),
        (b"NaN\n", ":1", "wrong_type", "not float"),
        (b'{"prompt": 3, "completion": "b"}', ":1", "wrong_type", 'field "prompt" is int, not str'),
        (b'{"prompt": "a", "completion": ["b"]}', ":1", "wrong_type", 'field "completion" is list'),
        (b'{"prompt": "a", "completion": ""}', ":1", "empty_response", 'field "completion" is empty'),
        (b'{"prompt": "a", "completion": " \\n"}', ":1", "empty_response", 'field "completion" is empty'),
        (b'{"prompt": " ", "completion": "b"}', ":1", "empty_prompt", 'field "prompt" is empty'),
        (b'{"prompt": "a"}', ":1", "missing_field", 'field "completion" is missing'),
        (b'{"prompt": "a", "completion": null}', ":1", "missing_field", 'field "completion" is missing'),
        (b'{"prompt": "\\ud800", "completion": "b"}', ":1", "not_unicode", "half of a surrogate pair"),
        (
            json.dumps({"prompt": "a" * 50, "completion": "b"}).encode(),
            *(":1", "prompt_too_long", "fills data.max_length=32"),
        ),
    ],
)
def test_bad_row_of_jsonl(tmp_path, tokenizer, content, where, reason, words):
    path = write(tmp_path / "rows.jsonl", content)
    message = error_of(path, tokenizer=tokenizer)
    assert f"rows.jsonl{where}: " in message and words in message
    assert "on_bad_row=skip" not in message or b"\n" in content.strip()  # where all are bad, none would be left

    # The same row among good ones is dropped and counted, and nothing else is.
    write(path, content.rstrip(b"\r\n") + b"\n" + (GOOD + b"\n") * 2)
    dataset = tokenize(str(path), tokenizer, section(on_bad_row="skip"))
    assert dict(dataset.dropped) == {reason: 1}
    assert dataset.read == len(dataset.examples) + 1
    assert len(dataset.examples) == 2 + content.removeprefix(b"\xef\xbb\xbf").startswith(GOOD)


@pytest.mark.parametrize(
    ("content", "where", "reason", "words"),
    [
        (b"a,b\nc,\n", ":3", "empty_response", 'field "completion" is empty'),
        (b"a,b\nc\n", ":3", "missing_field", 'field "completion" is missing'),
        (b"a,b\nc,d,e\n", ":3", "extra_fields", "more fields than the header"),
        (b"a,b\nc,\xff\n", ":3", "invalid_utf8", "not valid UTF-8"),
        (b'a,b\n"two\nlines",""\n', ":4", "empty_response", 'field "completion" is empty'),
    ],
)
def test_bad_row_of_csv(tmp_path, tokenizer, content, where, reason, words):
    path = write(tmp_path / "rows.csv", b"prompt,completion\n" + content)
    message = error_of(path, tokenizer=tokenizer)
    assert f"rows.csv{where}: " in message and words in message
    dataset = tokenize(str(path), tokenizer, section(on_bad_row="skip"))
    assert (dict(dataset.dropped), len(dataset.examples)) == ({reason: 1}, 1)


def test_bad_row_of_an_array_and_of_parquet(tmp_path, tokenizer):
    rows = [ROWS[0], ROWS[1] | {"completion": ""}, ROWS[2]]
    array = write(tmp_path / "rows.json", json.dumps(rows))
    parquet = write_parquet(tmp_path / "rows.parquet", rows)
    assert "rows.json:1: row 2: " in error_of(array, tokenizer=tokenizer)
    assert "rows.parquet: row 2: " in error_of(parquet, tokenizer=tokenizer)


def test_line_that_is_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr(jlora.data.rows, "MAX_ROW_BYTES", 1 << 10)
    path = write(tmp_path / "rows.jsonl", GOOD + b"\n" + b'{"prompt": "' + b"x" * 2000 + b'"}\n' + GOOD)
    good, bad, after = read_rows(str(path), "train")
    assert bad.where == "rows.jsonl:2" and bad.value.message.startswith("the line is longer than")
    assert (after.where, after.value) == ("rows.jsonl:3", good.value)


def test_bad_rows_are_named_each_and_those_past_ten_counted(tmp_path, tokenizer):
    rows = [ROWS[0], {"prompt": "a"}, ROWS[1], {"completion": "b"}, {"prompt": 3, "completion": "b"}]
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    message = error_of(path, tokenizer=tokenizer)
    assert message == (
        'rows.jsonl:2: the field "completion" is missing (it has prompt); rows.jsonl:4: the field "prompt" is missing '
        '(it has completion); rows.jsonl:5: the field "prompt" is int, not str; fix them, or drop such rows '
        "(data.on_bad_row=skip)"
    )
    dataset = tokenize(str(path), tokenizer, section(on_bad_row="skip"))
    assert dict(dataset.dropped) == {"missing_field": 2, "wrong_type": 1}
    assert (dataset.read, len(dataset.examples)) == (5, 2)


def test_no_usable_row_says_why(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": "a"}] * 3))
    message = error_of(path, tokenizer=tokenizer, on_bad_row="skip")
    assert "holds no usable row; all 3 are bad: rows.jsonl:1, rows.jsonl:2, rows.jsonl:3: the field" in message
    assert "skip" not in error_of(path, tokenizer=tokenizer)
    write(path, jsonl([ROWS[0], *[{"prompt": "a"}] * 25]))
    message = error_of(path, tokenizer=tokenizer)
    assert "rows.jsonl:11: the field" in message and "rows.jsonl:12" not in message
    assert "; 15 more bad rows; fix them" in message


def test_columns_of_no_format_are_told_with_the_key_that_maps_them(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl([{"question": "a", "reply_text": "b"}]))
    message = error_of(path, tokenizer=tokenizer, format="alpaca")
    assert 'the field "output" is missing (it has question, reply_text; rename one, or set data.columns' in message
    assert "data.columns.output=reply_text" in message
    given = section(format="alpaca", columns={"output": "reply_text"}, prompt="stanford", max_length=500)
    assert len(tokenize(str(path), tokenizer, given).examples) == 1


def test_rows_of_another_format(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl([{"instruction": "a", "output": "b"}]))
    assert 'the field "prompt" is missing' in error_of(path, tokenizer=tokenizer)
    assert 'the field "chosen" is missing' in error_of(path, tokenizer=tokenizer, format="preference")
    assert 'the field "messages" is missing' in error_of(path, tokenizer=tokenizer, format="messages")
    assert len(tokenize(str(path), tokenizer, section(format="alpaca", max_length=320)).examples) == 1


def test_rows_come_as_bad_rows_not_as_exceptions(tmp_path):
    """So that the rows behind a malformed line are read too."""
    found = values(write(tmp_path / "rows.jsonl", b"{\n" + GOOD + b"\n"))
    assert isinstance(found[0], BadRow) and found[1] == ROWS[0]
