"""Rows on disk to batches: nothing lost, nothing doubled, and every bad row named by file and line."""

import csv
import json
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
from data_files import RANDOM_LENGTHS, ROWS, jsonl, lengths_dataset, section, write, write_parquet
from tiny import make_tokenizer

import jlora.data.rows
from jlora import data
from jlora.data import Epochs, batches, hold_out, pack, pack_row, tokenize
from jlora.data.prompts import Example
from jlora.data.rows import BadRow, read_rows
from jlora.data.tokens import Tokenizer, load_tokenizer
from jlora.errors import DataError

GOOD = json.dumps(ROWS[0]).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder, None)


def values(path, split="train"):
    return [row.value for row in read_rows(str(path), split)]


def error_of(path, **changes):
    """The message of the DataError of tokenising a file, with a tokenizer that is not reached."""
    with pytest.raises(DataError) as caught:
        tokenize(str(path), changes.pop("tokenizer", Mock(Tokenizer)), section(**changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


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
        ("empty_folder", "empty_folder: holds no json, jsonl, csv, parquet or txt file"),
        ("rows.xml", "files ending in '.xml' are not read; use json, jsonl, csv, parquet or txt"),
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
    # Skipping bad rows does not mend a file that can not be read at all.
    for on_bad_row in ("error", "skip"):
        assert words in error_of(tmp_path / name, on_bad_row=on_bad_row, tokenizer=tokenizer)


@pytest.mark.parametrize("rest", [b", {", b",]", b",", b"", b"} ]", b" 1]", b"] {", b"]]", b', {"a": 12'])
def test_torn_json_array_is_not_half_read(tmp_path, rest):
    """A file that can not be read whole gives no rows at all."""
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
    assert "on_bad_row=skip" in message

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


def test_first_bad_row_is_named_and_the_others_are_counted(tmp_path, tokenizer):
    rows = [ROWS[0], {"prompt": "a"}, ROWS[1], {"completion": "b"}, {"prompt": 3, "completion": "b"}]
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    message = error_of(path, tokenizer=tokenizer)
    assert "rows.jsonl:2: " in message and "2 more bad rows" in message
    dataset = tokenize(str(path), tokenizer, section(on_bad_row="skip"))
    assert dict(dataset.dropped) == {"missing_field": 2, "wrong_type": 1}
    assert (dataset.read, len(dataset.examples)) == (5, 2)


def test_no_usable_row_says_why(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": "a"}] * 3))
    message = error_of(path, tokenizer=tokenizer, on_bad_row="skip")
    assert "holds no usable row; all 3 rows were dropped, the first at rows.jsonl:1" in message


def test_rows_of_another_format(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", jsonl([{"instruction": "a", "output": "b"}]))
    assert 'the field "prompt" is missing' in error_of(path, tokenizer=tokenizer)
    assert 'the field "messages" is missing' in error_of(path, tokenizer=tokenizer, format="messages")
    assert len(tokenize(str(path), tokenizer, section(format="alpaca", max_length=320)).examples) == 1


# Plain text


def test_plain_text_files_are_documents(tmp_path, tokenizer):
    folder = tmp_path / "books"
    folder.mkdir()
    write(folder / "b.txt", "second\n")
    write(folder / "a.txt", b"\xef\xbb\xbffirst\nline")
    write(folder / "c.txt", b"")
    assert values(folder) == [{"text": "first\nline"}, {"text": "second\n"}]
    write(folder / "d.txt", b"\xff")
    assert "d.txt: not valid UTF-8" in error_of(folder, tokenizer=tokenizer, format="text")


def test_a_long_text_is_split_and_every_token_trained_once(tmp_path, tokenizer):
    for length in (5, 30, 31, 61, 62, 100):  # 30 bytes, BOS and EOS just fit; 61 and 62 border on a third piece
        path = write(tmp_path / "book.txt", "".join(chr(97 + i % 26) for i in range(length)))
        whole = tokenize(str(path), tokenizer, section(format="text", max_length=200)).examples[0]
        found = tokenize(str(path), tokenizer, section(format="text"))
        assert found.read == 1 and found.truncated == 0
        assert len(found.examples) == -(-(length + 1) // 31)
        trained = np.concatenate([example.ids[1:][example.trained[1:]] for example in found.examples])
        np.testing.assert_array_equal(trained, whole.ids[1:])
        assert all(2 <= len(example.ids) <= 32 for example in found.examples)
    cut = tokenize(str(path), tokenizer, section(format="text", split_long=False))
    assert len(cut.examples) == cut.truncated == 1 and len(cut.examples[0].ids) == 32


# Truncation


def test_truncation_is_counted_and_leaves_no_end_of_text(tmp_path, tokenizer):
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (5, 28, 29, 100)]
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    dataset = tokenize(str(path), tokenizer, section())
    assert dataset.truncated == 2  # BOS, 2 and 28 bytes, EOS just fit
    assert [len(example.ids) for example in dataset.examples] == [9, 32, 32, 32]
    assert [example.ids[-1] == tokenizer.eos_id for example in dataset.examples] == [True, True, False, False]
    whole = tokenize(str(path), tokenizer, section(max_length=200)).examples[3]
    np.testing.assert_array_equal(dataset.examples[3].ids, whole.ids[:32])
    np.testing.assert_array_equal(dataset.examples[3].trained, whole.trained[:32])


def test_row_whose_last_token_is_the_only_trained_one(tmp_path, tokenizer):
    """BOS and 30 bytes of prompt leave one token of 32; with 31 bytes none is left."""
    path = write(tmp_path / "rows.jsonl", jsonl([{"prompt": "p" * 30, "completion": "cc"}]))
    dataset = tokenize(str(path), tokenizer, section())
    assert dataset.examples[0].trained.sum() == 1 and dataset.truncated == 1
    write(path, jsonl([{"prompt": "p" * 31, "completion": "cc"}]))
    assert "prompt alone fills" in error_of(path, tokenizer=tokenizer)


def test_digest_follows_the_rows(tmp_path, tokenizer):
    def digest(rows, **changes):
        return tokenize(str(write(tmp_path / "r.jsonl", jsonl(rows))), tokenizer, section(**changes)).digest

    first = digest(ROWS)
    assert len(first) == 64 and digest(ROWS) == first
    others = [
        digest(ROWS[::-1]),
        digest(ROWS[:-1]),
        digest(ROWS, train_on="all"),
        digest([ROWS[0] | {"completion": "y"}, *ROWS[1:]]),
    ]
    assert len({first, *others}) == 5


# Held-out rows


@pytest.mark.parametrize(
    ("total", "fraction", "held"), [(10, 0.2, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1), (60, 0.25, 15)]
)
def test_held_out_rows(total, fraction, held):
    dataset = lengths_dataset([3] * total)
    train, out = hold_out(dataset, fraction, seed=5)

    def numbers(part):
        return [int(example.ids[0]) for example in part.examples]

    assert len(numbers(out)) == held
    assert sorted(numbers(train) + numbers(out)) == [10 + i for i in range(total)]
    again = hold_out(dataset, fraction, seed=5)
    assert numbers(again[0]) == numbers(train) and numbers(again[1]) == numbers(out)
    assert train.read == total
    if total == 60:
        assert numbers(hold_out(dataset, fraction, seed=6)[1]) != numbers(out)
        assert numbers(out) != list(range(10, 25))  # not simply the first


def test_one_row_can_not_be_split():
    with pytest.raises(DataError, match="only one usable row"):
        hold_out(lengths_dataset([3]), 0.5, seed=0)


# Packing


@pytest.mark.parametrize("seed", range(5))
def test_pack_holds_every_example_once_within_capacity(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, rng.integers(1, 200)).tolist()
    order = rng.permutation(len(lengths))
    rows = pack(lengths, order, 32, packing=True)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 32 for row in rows)
    assert rows == pack(lengths, order, 32, packing=True)
    # A row that any other row has room for would never have been opened.
    firsts = [row[0] for row in rows]
    place = {int(i): number for number, i in enumerate(order)}
    for later in range(1, len(rows)):
        opened = place[firsts[later]]
        for row in rows[:later]:
            used = sum(lengths[i] for i in row if place[i] < opened)
            assert used + lengths[firsts[later]] > 32


def test_pack_takes_the_fullest_row_that_has_room():
    # 7 and 5 stand alone (of 10); 3 fits both and goes to 7; 4 fits only 5; 2 opens a row of its own.
    assert pack([7, 5, 3, 4, 2], np.arange(5), 10, packing=True) == [[0, 2], [1, 3], [4]]
    # Equally full rows: the oldest.
    assert pack([6, 6, 4, 4], np.arange(4), 10, packing=True) == [[0, 2], [1, 3]]
    # The order given counts, not that of the lengths.
    assert pack([7, 5, 3, 4, 2], np.array([4, 3, 2, 1, 0]), 10, packing=True) == [[4, 3, 2], [1], [0]]


def test_pack_off_gives_each_example_its_row():
    assert pack([7, 5, 3], np.array([2, 0, 1]), 10, packing=False) == [[2], [0], [1]]


def test_pack_row_arrays():
    a = Example(np.array([1, 10, 11, 12], np.int32), np.array([False, False, True, True]))
    b = Example(np.array([1, 20, 21], np.int32), np.array([False, True, True]))
    row = pack_row([a, b], 10)
    np.testing.assert_array_equal(row["tokens"], [1, 10, 11, 12, 1, 20, 21, 0, 0, 0])
    # The end of one example does not predict the start of the next.
    np.testing.assert_array_equal(row["targets"], [10, 11, 12, 0, 20, 21, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["weights"], [0, 1, 1, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(row["segments"], [1, 1, 1, 1, 2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 0, 1, 2, 0, 0, 0])
    assert row["weights"].dtype == np.float32 and row["tokens"].dtype == np.int32
    assert not any(array.any() for array in pack_row([], 10).values())


def test_pack_row_trains_what_the_examples_say():
    dataset = lengths_dataset([9, 8, 15])
    row = pack_row(dataset.examples, 32)
    assert row["weights"].sum() == sum(example.trained.sum() for example in dataset.examples) == 29
    assert (row["segments"] > 0).all()  # 32 of 32


# Epochs


def epochs(lengths=RANDOM_LENGTHS, batch_size=4, seed=0, **changes):
    return Epochs(lengths_dataset(lengths), section(**changes), batch_size, seed)


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_once_an_epoch_in_an_order_of_its_own(packing):
    one = epochs(packing=packing)
    orders = [[i for row in one.rows(epoch) for i in row] for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(len(RANDOM_LENGTHS)))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # Asked for in any order, and again: the same.
    again = epochs(packing=packing)
    assert [again.rows(epoch) for epoch in (2, 0, 1)] == [one.rows(epoch) for epoch in (2, 0, 1)]
    assert epochs(packing=packing, seed=1).rows(0) != one.rows(0)


def test_epochs_may_be_asked_by_many_threads_at_once(monkeypatch):
    """As the iterator does, which reads ahead in threads: an epoch made twice would move all that follow."""
    wanted = [epochs().rows(epoch) for epoch in range(4)]

    def slow_pack(*args):
        time.sleep(0.005)
        return pack(*args)

    monkeypatch.setattr(data.packing, "pack", slow_pack)
    one = epochs()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(one.rows, [0, 0, 1, 0, 1, 2, 3, 2, 0, 1, 3, 2]))
        last = list(threads.map(one.__getitem__, range(one.num_batches(4) * 4)))
    assert found == [wanted[epoch] for epoch in (0, 0, 1, 0, 1, 2, 3, 2, 0, 1, 3, 2)]
    assert one.num_batches(4) == epochs().num_batches(4) and len(last) == 4 * one.num_batches(4)


def test_order_of_evaluation_is_the_file_order():
    assert epochs([5] * 6, packing=False, batch_size=2, seed=None).rows(0) == [[i] for i in range(6)]
    assert epochs([5] * 6, packing=False, batch_size=2, seed=None).rows(1) == [[i] for i in range(6)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_last_batch_is_filled_with_empty_rows(batch_size):
    one = epochs(batch_size=batch_size)
    rows = one.rows(0)
    assert len(rows) % batch_size == 0
    empty = [not row for row in rows]
    assert sum(empty) < batch_size and empty == sorted(empty)
    assert one.num_batches(1) == len(rows) // batch_size
    assert one.num_batches(3) == sum(len(one.rows(epoch)) for epoch in range(3)) // batch_size


def test_batches_have_one_shape_and_hold_every_token_once_an_epoch():
    one = epochs(batch_size=4)
    last = one.num_batches(2)
    found = list(batches(one, 4, last=last))
    assert len(found) == last
    assert {array.shape for batch in found for array in batch.values()} == {(4, 32)}
    per_epoch = one.num_batches(1)
    for part in (found[:per_epoch], found[per_epoch:]):
        tokens = np.concatenate([batch["tokens"].ravel() for batch in part])
        segments = np.concatenate([batch["segments"].ravel() for batch in part])
        assert np.bincount(tokens[segments > 0])[10:].tolist() == RANDOM_LENGTHS
        assert sum(batch["weights"].sum() for batch in part) == sum(n - 1 for n in RANDOM_LENGTHS)


def test_epoch_at():
    one = epochs(batch_size=4)
    first, both = one.num_batches(1), one.num_batches(2)
    assert one.epoch_at(0) == 0.0
    assert one.epoch_at(first) == 1.0
    assert one.epoch_at(both) == 2.0
    assert one.epoch_at(1) == pytest.approx(1 / first)
    assert one.epoch_at(first + 1) == pytest.approx(1 + 1 / (both - first))


# The iterator's position


@pytest.mark.parametrize("taken", [0, 1, 3, 11])
def test_iterator_goes_on_exactly_where_it_was_saved(taken):
    def start():
        return batches(epochs(batch_size=4, seed=7), 4)

    def take(iterator, count):
        return [next(iterator) for _ in range(count)]

    expected = take(start(), taken + 12)  # over the end of the first epoch
    assert taken + 12 > epochs(batch_size=4, seed=7).num_batches(1)
    first = start()
    take(first, taken)
    state = json.loads(json.dumps(first.get_state()))
    ahead = take(first, 5)  # the read-ahead of the first iterator is not in its state
    second = start()
    take(second, 2)
    second.set_state(state)
    found = take(second, 12)
    for batch, wanted in zip(found, expected[taken:], strict=True):
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])
    for batch, wanted in zip(ahead, expected[taken:], strict=False):
        np.testing.assert_array_equal(batch["tokens"], wanted["tokens"])


def test_rows_come_as_bad_rows_not_as_exceptions(tmp_path):
    """So that the rows behind a malformed line are read too."""
    found = values(write(tmp_path / "rows.jsonl", b"{\n" + GOOD + b"\n"))
    assert isinstance(found[0], BadRow) and found[1] == ROWS[0]
