"""Rows to examples: long ones split or cut and counted, a digest of them all, and held-out rows."""

import numpy as np
import pytest
from data_files import ROWS, error_of, jsonl, lengths_dataset, section, values, write

from jlora.data.dataset import hold_out
from jlora.data.encoding import tokenize
from jlora.errors import DataError

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
