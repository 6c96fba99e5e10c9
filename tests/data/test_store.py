"""Tokenised rows on the disk: the same as in memory, made once, and never read where they are damaged."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from data_files import ROWS, jsonl, section, write, write_parquet
from tiny import make_tokenizer

from jlora.data import encoding, store
from jlora.data.encoding import tokenize
from jlora.data.tokens import load_tokenizer
from jlora.errors import ConfigError, DataError

PAIRS = [{"prompt": f"{i}", "chosen": " yes" * (1 + i), "rejected": " no"} for i in range(3)]
CHAT = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{i}"}]} for i in range(3)]
BYTES = int(float(os.environ.get("JLORA_TEST_STREAM_BYTES", 2e8)))
LIMIT = 10**9  # of memory, however large the file
# Long ones, for quick tokenising: memory grows with rows, not with their tokens.
WORDS = ["lamplighter", "of", "papermaking", "riverbank", "bluebottle", "underneath", "together", "sometimes", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    (folder / "chat.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder, str(folder / "chat.jinja"))


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", jsonl(ROWS))


def kept(tmp_path, **changes):
    return section(cache_dir=str(tmp_path / "cache"), **changes)


def entry(tmp_path):
    (found,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    return found


def assert_equal(found, wanted):
    assert (found.read, found.truncated, found.dropped) == (wanted.read, wanted.truncated, wanted.dropped)
    assert found.digest == wanted.digest and list(found.places) == list(wanted.places)
    assert found.lengths.tolist() == wanted.lengths.tolist()
    for one, other in zip(found.examples, wanted.examples, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)
        assert one.second == other.second and one.ids.dtype == np.int32 and one.trained.dtype == bool


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ([*ROWS, {"prompt": "a"}, {"prompt": "ü" * 9, "completion": "z" * 40}], {"on_bad_row": "skip"}),
        ([{"text": "long " * 40}, {"text": "short"}], {"format": "text"}),
        (CHATS, {"format": "messages"}),
        (PAIRS, {"format": "preference", "max_length": 64}),
    ],
)
def test_rows_from_the_disk_are_those_in_memory(tmp_path, tokenizer, content, keys):
    path = write(tmp_path / "r\udce9.jsonl", jsonl(content))  # a name that is not UTF-8
    wanted = tokenize(str(path), tokenizer, section(**keys))
    for _ in ("made", "read"):
        found = tokenize(str(path), tokenizer, kept(tmp_path, **keys))
        assert isinstance(found.examples, store.StoredExamples)
        assert_equal(found, wanted)
    assert found.examples[-1].ids.tolist() == wanted.examples[-1].ids.tolist()
    assert [len(example.ids) for example in found.examples[1:3]] == wanted.lengths[1:3].tolist()
    with pytest.raises(IndexError):
        found.examples[len(wanted.examples)]


def test_groups_of_rows_are_as_single_rows(tmp_path, tokenizer, rows, monkeypatch):
    wanted = tokenize(str(rows), tokenizer, section())
    for limits in ((1, 2**19), (3, 2**19), (512, 5)):
        monkeypatch.setattr(encoding, "AT_ONCE", limits[0])
        monkeypatch.setattr(encoding, "CHARACTERS", limits[1])
        assert_equal(tokenize(str(rows), tokenizer, section()), wanted)


def test_rows_are_tokenised_once(tmp_path, tokenizer, rows, monkeypatch):
    tokenize(str(rows), tokenizer, kept(tmp_path))
    monkeypatch.setattr(encoding, "_read_all", None)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for path in (rows, write(other / "rows.jsonl", rows.read_bytes())):  # by content, not by path
        assert tokenize(str(path), tokenizer, kept(tmp_path, packing=False)).read == len(ROWS)


def test_key_follows_all_that_decides_the_tokens(tmp_path, folder, tokenizer, rows, monkeypatch):
    import datasets

    def key(path=rows, tokenizer=tokenizer, **changes):
        return store.content_key(str(path), tokenizer, section(**changes))

    keys = [key(), key(max_length=31), key(train_on="all"), key(on_bad_row="skip"), key(split_long=False)]
    keys += [key(format="text"), key(prompt="chat"), key(split="test"), key(tokenizer=load_tokenizer(folder, None))]
    keys += [
        key(path=write(tmp_path / "other.jsonl", jsonl(ROWS))),
        key(path=write_parquet(tmp_path / "r.parquet", ROWS)),
    ]
    for count in (6, 7):  # what the datasets library reads counts by its rows
        datasets.Dataset.from_list(ROWS[:count]).save_to_disk(tmp_path / f"{count}" / "saved")
        keys.append(key(path=tmp_path / f"{count}" / "saved"))
    monkeypatch.setattr(store, "VERSION", store.VERSION + 1)
    keys.append(key())
    monkeypatch.undo()
    write(rows, jsonl(ROWS[::-1]))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    write(rows, jsonl(ROWS))
    assert key() == keys[0] == key(packing=False, cache_dir="anywhere")


@pytest.mark.parametrize("name", ["tokens", "lengths", "places", "place_lengths", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damaged_entry_is_made_again(tmp_path, tokenizer, rows, capsys, name, damage):
    wanted = tokenize(str(rows), tokenizer, kept(tmp_path))
    wanted = tokenize(str(rows), tokenizer, section())
    file = entry(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "bit":
            file.write_bytes(content)
        case "cut":
            file.write_bytes(content[:-1])
        case "gone":
            file.unlink()
    assert_equal(tokenize(str(rows), tokenizer, kept(tmp_path)), wanted)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "the rows are tokenised again" in warning
    assert_equal(tokenize(str(rows), tokenizer, kept(tmp_path)), wanted)
    assert capsys.readouterr().err == ""


def test_what_fails_leaves_no_entry(tmp_path, tokenizer, rows, monkeypatch):
    def left():
        return [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]

    write(rows, jsonl([*ROWS, {"prompt": "a"}]))
    with pytest.raises(DataError, match=r"rows\.jsonl:8: "):
        tokenize(str(rows), tokenizer, kept(tmp_path))
    assert left() == []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(rows, jsonl(ROWS))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
        with pytest.raises(OSError) as caught:
            tokenize(str(rows), tokenizer, kept(tmp_path))
    assert caught.value.filename.startswith(str(tmp_path / "cache")) and left() == []

    read = encoding.rows_of

    def growing(*arguments):
        yield from read(*arguments)
        write(rows, jsonl(ROWS * 2))

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "rows_of", growing)
        with pytest.raises(DataError, match="changed while it was read"):
            tokenize(str(rows), tokenizer, kept(tmp_path))
    assert left() == []

    key = store.content_key(str(rows), tokenizer, section())
    killed, theirs = tmp_path / "cache" / f".{key}.{'0f' * 8}.partial", tmp_path / "cache" / f"{key}.partial"
    killed.mkdir()
    theirs.mkdir()
    assert tokenize(str(rows), tokenizer, kept(tmp_path)).read == 2 * len(ROWS)
    assert sorted(left()) == [key, theirs.name]

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data.cache_dir .* cannot be written to"):
        tokenize(str(rows), tokenizer, section(cache_dir=str(tmp_path / "file" / "below")))


def test_runs_at_once_make_one_entry(tmp_path, tokenizer, rows, monkeypatch):
    made, real = [], encoding._read_all

    def slow(*arguments):
        made.append(time.sleep(0.05))
        return real(*arguments)

    monkeypatch.setattr(encoding, "_read_all", slow)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: tokenize(str(rows), tokenizer, kept(tmp_path)), range(4)))
    assert len(made) == 1
    for each in found:
        assert_equal(each, found[0])

    # Where there are no locks, each makes its own, and the first to be done is taken.
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    before = list(entry(tmp_path).iterdir())
    store._make(entry(tmp_path), lambda keep: real(str(rows), tokenizer, section(), keep), alone=False)
    assert list(entry(tmp_path).iterdir()) == before
    assert_equal(tokenize(str(rows), tokenizer, kept(tmp_path)), found[0])


def test_large_files_in_memory_are_warned_of(tmp_path, tokenizer, rows, monkeypatch, capsys):
    monkeypatch.setattr(encoding, "LARGE", 10)
    tokenize(str(rows), tokenizer, kept(tmp_path))
    assert capsys.readouterr().err == ""
    tokenize(str(rows), tokenizer, section())
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and "data.cache_dir" in warning and warning.count("\n") == 1


def test_pages_that_were_read_are_given_back(tmp_path, tokenizer, rows, monkeypatch):
    monkeypatch.setattr(store, "READS", 2)
    wanted = tokenize(str(rows), tokenizer, section())
    for _ in range(2):
        assert_equal(tokenize(str(rows), tokenizer, kept(tmp_path)), wanted)


def make_large(path: Path, num_bytes: int) -> None:
    """A JSONL file of so many bytes: rows of words of about 1 KB, over and over."""
    words = np.random.default_rng(0).choice(WORDS, 10**5)
    block = "".join(
        json.dumps({"prompt": " ".join(words[i : i + 20]), "completion": " ".join(words[i : i + 10 + i % 170])}) + "\n"
        for i in range(0, 99_000, 99)
    ).encode()
    with open(path, "wb") as stream:
        for _ in range(-(-num_bytes // len(block))):
            stream.write(block)


@pytest.mark.slow
def test_large_file_goes_through_in_bounded_memory(tmp_path):
    """JLORA_TEST_STREAM_BYTES says how large: 5e9 is the promise, and takes some minutes and 10 GB of disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path / "tokenizer")
    make_large(tmp_path / "large.jsonl", BYTES)
    script = Path(__file__).with_name("stream_large.py")
    arguments = [tmp_path / "large.jsonl", tmp_path / "tokenizer", tmp_path / "cache"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = json.loads(done.stdout)
    assert found["bytes"] >= BYTES and found["rows"] > BYTES / 2000
    assert found["peak_bytes"]["batches"] < LIMIT, found
