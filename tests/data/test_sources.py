"""Files as people have them: every common kind, compression and layout of folders, read as `datasets` reads them."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pytest

from jlora.data.rows import read_rows
from jlora.data.sources import files_of
from jlora.errors import DataError

ROWS = [{"instruction": f"Name {i}, é, 🎉", "input": "", "output": f'"{i}";\tyes'} for i in range(4)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, separator):
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in rows]
    return "\n".join(map(separator.join, [list(rows[0]), *quoted])).encode()


def zstd(content):
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def pretty(rows):
    return "\n".join(json.dumps(row, indent=2) for row in rows).encode()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def values(source, split="train", **options):
    return [row.value for row in read_rows(str(source), split, **options)]


WHOLE = {
    "rows.jsonl.gz": gzip.compress(lines(ROWS)),
    "rows.JSONL.GZ": gzip.compress(lines(ROWS[:2])) + gzip.compress(lines(ROWS[2:])),
    "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.jsonl.bz2": bz2.compress(lines(ROWS)),
    "rows.jsonl.xz": lzma.compress(lines(ROWS)),
    "rows.jsonl.zst": zstd(lines(ROWS)),
    "rows.csv.gz": gzip.compress(table(ROWS, ",")),
    "rows.ndjson": lines(ROWS),
    "ROWS.JSONL": lines(ROWS),
    "rows.tsv": table(ROWS, "\t"),
    "semicolon.csv": table(ROWS, ";"),
    "bar.csv": table(ROWS, "|"),
    "utf16.csv": table(ROWS, ",").decode().encode("utf-16"),
    "utf16.jsonl": lines(ROWS).decode().encode("utf-16"),
    "utf16be.json": b"\xfe\xff" + json.dumps(ROWS).encode("utf-16-be"),
    "array.jsonl": json.dumps(ROWS).encode(),
    "pretty.json": pretty(ROWS),
    "pretty_array.jsonl": json.dumps(ROWS, indent=2).encode(),
    "data.json": json.dumps({"data": ROWS}).encode(),
    "data_pretty.json": json.dumps({"version": "1.0", "count": 4, "rows": ROWS}, indent=1).encode(),
    "splits.json": json.dumps({"validation": [{"text": "held out"}], "train": ROWS, "notes": ["a"]}).encode(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_file_gives_the_rows_that_it_holds(tmp_path, name):
    write(tmp_path, {name: WHOLE[name]})
    assert values(tmp_path / name) == ROWS


def test_row_over_several_lines_that_holds_a_list(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": []}]
    write(tmp_path, {"rows.json": pretty(rows)})
    assert values(tmp_path / "rows.json") == rows


def test_file_of_record_batches(tmp_path):
    kept = datasets.Dataset.from_list(ROWS)
    kept.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    (tmp_path / "rows.arrow").write_bytes(arrow.read_bytes())
    assert values(tmp_path / "rows.arrow") == ROWS
    (tmp_path / "torn.arrow").write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match=r"torn\.arrow: its Arrow files cannot be read"):
        values(tmp_path / "torn.arrow")


def test_value_missing_from_a_csv_file_as_datasets_reads_it(tmp_path, monkeypatch):
    """pandas has these words for no value; in JSON they are text."""
    words = ["NaN", "nan", "None", "null", "NULL", "N/A", "NA", "<NA>", "n/a"]
    rows = [{"instruction": "a", "input": word, "output": "b"} for word in [*words, "Nan and more", "none"]]
    write(tmp_path, {"rows.csv": table(rows, ","), "rows.jsonl": lines(rows)})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    theirs = datasets.load_dataset("csv", data_files=str(tmp_path / "rows.csv"), split="train").to_list()
    assert values(tmp_path / "rows.csv") == theirs
    assert [row["input"] for row in theirs] == [None] * len(words) + ["Nan and more", "none"]
    assert values(tmp_path / "rows.jsonl") == rows


def numbered(*names):
    return {name: lines([{"text": f"{name} {i}"} for i in range(2)]) for name in names}


LAYOUTS = {
    "one": numbered("a.jsonl"),
    "files": numbered("train.jsonl", "test.jsonl", "dev.jsonl"),
    "words": numbered("my_train_v2.jsonl", "my-eval.jsonl", "constraint.jsonl"),
    "shards": numbered(*(f"data/{name}-of-00002.jsonl" for name in ("train-00000", "train-00001", "dev-00000"))),
    "own_split": numbered("data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"),
    "folders": numbered("train/a.jsonl", "train/b/c.jsonl", "validation/a.jsonl"),
    "compressed": numbered("a.jsonl") | {"b/c.jsonl.gz": gzip.compress(lines([{"text": "c"}]))},
    "described": numbered("a.jsonl") | {"README.md": b"# Rows", ".hidden.jsonl": b"{}"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_has_the_splits_and_rows_that_datasets_finds(tmp_path, layout, monkeypatch):
    write(tmp_path / "rows", LAYOUTS[layout])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    theirs = datasets.load_dataset(str(tmp_path / "rows"))
    for split, rows in theirs.items():
        assert sorted(row["text"] for row in values(tmp_path / "rows", split)) == sorted(rows["text"])
        some = datasets.load_dataset(str(tmp_path / "rows"), split=f"{split}[1:2]").to_list()
        assert values(tmp_path / "rows", f"{split}[1:2]") == some
    with pytest.raises(DataError) as caught:
        values(tmp_path / "rows", "nonsense")
    assert str(caught.value).endswith(
        f"has no split 'nonsense'; set data.split to one of its own: {', '.join(sorted(theirs))}"
    )


def test_files_that_are_left_are_named(tmp_path):
    write(
        tmp_path,
        numbered("train.jsonl", "test.jsonl") | {"notes.txt": b"a", "b.xlsx": b"", "README.md": b"", "c.pkl": b""},
    )
    files = files_of(str(tmp_path), "train")
    assert [file.name for file in files.read] == [f"{tmp_path.name}/train.jsonl"]
    assert files.left == ["b.xlsx", "c.pkl", "notes.txt", "test.jsonl"]


def test_folder_of_another_trainer_is_a_folder_of_files(tmp_path):
    """LLaMA-Factory has a dataset_info.json beside its files, as `save_to_disk` of `datasets` does."""
    write(
        tmp_path, {"mine.json": json.dumps(ROWS).encode(), "dataset_info.json": b'{"mine": {"file_name": "mine.json"}}'}
    )
    assert values(tmp_path) == ROWS


def test_saved_data_set_without_the_split_names_those_it_has(tmp_path):
    saved = datasets.DatasetDict(
        train_sft=datasets.Dataset.from_list(ROWS), test_sft=datasets.Dataset.from_list(ROWS[:1])
    )
    saved.save_to_disk(tmp_path / "saved")
    assert values(tmp_path / "saved", "test_sft") == ROWS[:1]
    assert values(tmp_path / "saved", "train_sft[1:3]") == ROWS[1:3]
    with pytest.raises(DataError, match="has no split 'train'; set data.split to one of its own: train_sft, test_sft"):
        values(tmp_path / "saved")


FAULTS = {
    "cut.jsonl.gz": (gzip.compress(lines(ROWS))[:-30], "is damaged or cut short"),
    "other.jsonl.gz": (lines(ROWS), "is damaged or cut short"),
    "cut.jsonl.xz": (lzma.compress(lines(ROWS))[:-30], "is damaged or cut short"),
    "other.jsonl.bz2": (lines(ROWS), "cannot be read"),
    "cut.jsonl.zst": (zstd(lines(ROWS))[:-9], "cannot be read"),
    "odd.jsonl": ("\ufeffé".encode("utf-16-le") + b"\x00", "not valid UTF-16"),
    "rows.parquet.gz": (b"", "files ending in '.gz' are not read"),
    "torn.json": (b'{"data": [{"text": "a"}', "torn.json:1: malformed JSON"),
    "torn_object.json": (b'{"data": [{"text": "a"}]', "malformed JSON (the object does not end)"),
    "test_only.json": (b'{"test": [{"text": "a"}]}', "has no split 'train'; set data.split to one of its keys: test"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_file_that_is_not_what_its_name_says(tmp_path, name):
    content, words = FAULTS[name]
    write(tmp_path, {name: content})
    with pytest.raises(DataError) as caught:
        values(tmp_path / name)
    assert words in str(caught.value) and name in str(caught.value)


def test_split_that_only_the_hub_knows(tmp_path):
    write(tmp_path, numbered("a.jsonl"))
    with pytest.raises(DataError, match=r"data.split=train\[:10%\]: of files and folders"):
        values(tmp_path / "a.jsonl", "train[:10%]")


def test_separator_that_is_asked_for(tmp_path):
    write(tmp_path, {"rows.csv": b"text\ta,b\nwhole\tx\n"})
    assert values(tmp_path / "rows.csv", separator="\t") == [{"text": "whole", "a,b": "x"}]
