"""Parquet files, data sets and data folders that mean harm: bounded, refused in one sentence, nothing fetched."""

import json
import os
import resource
import socket

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from command_line import sentence_of
from data_files import ROWS, jsonl, section, values, write, write_parquet

from jlora.data import tables
from jlora.data.encoding import tokenize
from jlora.data.rows import BadRow, read_rows
from jlora.errors import DataError

MB = 2**20


def rows_of(path):
    return [row.value for row in read_rows(str(path), "train")]


@pytest.fixture
def saved(tmp_path):
    """A folder of `save_to_disk`, and its file of record batches."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved", tmp_path / "saved" / "data-00000-of-00001.arrow"


# Of bounded memory


@pytest.mark.parametrize("nested", [False, True])
def test_value_that_stands_in_many_rows_takes_memory_once(tmp_path, nested):
    """A file of kilobytes with 4,096 rows of one megabyte, which would be four gigabytes."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4096, pyarrow.int32()), ["x" * MB])
    column = pyarrow.ListArray.from_arrays(range(4097), text) if nested else text
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2 * MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    texts = (row.value["text"] for row in read_rows(str(tmp_path / "a.parquet"), "train"))
    assert sum(len(text[0] if nested else text) for text in texts) == 4096 * MB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_dictionary_is_seen_behind_rows_that_have_none_of_it(tmp_path):
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4096, pyarrow.int32()), ["x" * MB])
    lists = pyarrow.ListArray.from_arrays([0] * 2001 + [4096], text)
    pyarrow.parquet.write_table(pyarrow.table({"text": lists}), tmp_path / "a.parquet")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    *empty, bad = rows_of(tmp_path / "a.parquet")
    assert empty == [{"text": []}] * 2000 and bad.reason == "too_long"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_row_that_repeats_a_value_is_as_long_as_all_of_it(tmp_path):
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), ["x" * MB])
    column = pyarrow.ListArray.from_arrays([0, 1, 1000], text)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    good, bad = rows_of(tmp_path / "a.parquet")
    assert good == {"text": ["x" * MB]} and bad.reason == "too_long"


@pytest.mark.parametrize("kind", ["parquet", "data set"])
def test_row_longer_than_a_row_may_be_is_a_bad_row(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    rows = [{"text": "a"}, {"text": "b" * 2000}, {"text": "c"}]
    if kind == "parquet":
        path = write_parquet(tmp_path / "a.parquet", rows)
    else:
        path = tmp_path / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(path)
    found = rows_of(path)
    assert [found[0], found[2]] == [rows[0], rows[2]]
    assert isinstance(found[1], BadRow) and found[1].reason == "too_long"


# Of damaged files


def test_damaged_record_batches_are_refused_before_they_are_read(saved):
    folder, file = saved
    content = file.read_bytes()
    at = content.index(b"".join(row["prompt"].encode() for row in ROWS))  # behind the offsets of the texts
    for change in (b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x80" * 8):
        write(file, content[: at - 24] + change + content[at - 16 :])
        assert "its Arrow files cannot be read" in sentence_of(DataError, rows_of, folder)


def test_crash_of_the_library_is_one_sentence(saved, monkeypatch, tmp_path):
    killer = write(tmp_path / "killer.py", b"import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr("jlora.files.sandbox.__file__", str(killer))
    assert "it crashes the library that reads it (SIGSEGV)" in sentence_of(DataError, rows_of, saved[0])


def test_files_of_record_batches_are_tried_once_in_a_process(saved, monkeypatch):
    calls = []
    monkeypatch.setattr(tables, "tried", lambda *given, **more: calls.append(given))
    assert rows_of(saved[0]) == rows_of(saved[0]) == ROWS
    assert len(calls) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"_data_files": 5}', b'{"_data_files": [{}]}', b"[" * 100_000])
def test_damaged_state_of_a_data_set_is_one_sentence(saved, content):
    write(saved[0] / "state.json", content)
    assert "saved: damaged, or not a data set that can be loaded" in sentence_of(DataError, rows_of, saved[0])


def test_parquet_names_that_are_not_utf8(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"completion": "b"}])
    write(path, path.read_bytes().replace(b"completion", b"completi\xff\xfe"))
    assert "not a whole parquet file" in sentence_of(DataError, rows_of, path)


# Of what else is in a row


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("column", ["picture", "prompt"])
def test_media_are_neither_opened_nor_fetched(tmp_path, no_network, column):
    rows = [{"prompt": "a", "completion": "b"} | {column: {"bytes": None, "path": "http://127.0.0.1:9/x.png"}}]
    text = datasets.Value("string")
    features = {"prompt": text, "completion": text, column: {"bytes": datasets.Value("binary"), "path": text}}
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    info = json.loads((tmp_path / "saved" / "dataset_info.json").read_text())
    info["features"][column] = {"_type": "Image"}
    write(tmp_path / "saved" / "dataset_info.json", json.dumps(info))
    if column == "prompt":
        assert "the column 'prompt' is struct<" in sentence_of(DataError, rows_of, tmp_path / "saved")
    else:
        assert rows_of(tmp_path / "saved") == [{"prompt": "a", "completion": "b"}]


def test_json_of_the_datasets_library_is_read(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    made = datasets.Dataset.from_list([{"messages": json.dumps(messages)}])
    made.cast_column("messages", datasets.Json()).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == [{"messages": messages}]


def test_other_columns_that_are_text_or_numbers_stay(tmp_path):
    row = {"id": 7, "prompt": "a", "completion": "b", "tags": ["x"], "raw": b"\xff"}
    write_parquet(tmp_path / "a.parquet", [row])
    row.pop("raw")
    assert rows_of(tmp_path / "a.parquet") == [row]


# Of folders


@pytest.mark.parametrize("name", ["../other/data-00000-of-00001.arrow", "/etc/passwd", "link.arrow"])
def test_data_set_that_names_a_file_outside_is_refused(saved, tmp_path, name):
    folder, file = saved
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(tmp_path / "other")
    (folder / "link.arrow").symlink_to(tmp_path / "other" / file.name)
    state = json.loads((folder / "state.json").read_text())
    write(folder / "state.json", json.dumps(state | {"_data_files": [{"filename": name}]}))
    assert "outside" in sentence_of(DataError, rows_of, folder)


def test_link_or_pipe_in_a_data_folder_is_refused(tmp_path):
    write(tmp_path / "secret.jsonl", jsonl(ROWS))
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "a.jsonl", jsonl(ROWS))
    (folder / "b.jsonl").symlink_to("a.jsonl")
    assert values(folder) == ROWS * 2
    (folder / "c.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert "outside its folder" in sentence_of(DataError, rows_of, folder)
    (folder / "c.jsonl").unlink()
    os.mkfifo(folder / "c.jsonl")
    assert "c.jsonl: is not a regular file" in sentence_of(DataError, rows_of, folder)


def test_cache_of_a_data_folder_waits_for_no_pipe(tmp_path, tokenizer):
    (tmp_path / "rows").mkdir()
    os.mkfifo(tmp_path / "rows" / "a.jsonl")
    cfg = section(cache_dir=str(tmp_path / "cache"))
    assert "is not a regular file" in sentence_of(DataError, tokenize, str(tmp_path / "rows"), tokenizer, cfg)
