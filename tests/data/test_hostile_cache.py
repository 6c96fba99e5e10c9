"""A cache of tokenised rows that somebody else could write to, or has written to."""

import os

import numpy as np
import pytest
from command_line import one_sentence, sentence_of
from data_files import ROWS, jsonl, section, write

from jlora.data.encoding import tokenize
from jlora.errors import ConfigError
from jlora.files import manifest


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", jsonl(ROWS))


@pytest.fixture
def kept(tmp_path, rows, tokenizer):
    """The rows, tokenised by way of the cache."""
    return lambda: tokenize(str(rows), tokenizer, section(cache_dir=str(tmp_path / "cache")))


@pytest.fixture
def open_umask():
    before = os.umask(0o002)
    yield
    os.umask(before)


def entry(tmp_path):
    (found,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    return found


def ids_of(dataset):
    return dataset.digest, [example.ids.tolist() for example in dataset.examples]


def forge(folder, **arrays):
    """Put other arrays into an entry, with a manifest that is right of them, and the facts that stood there."""
    facts = manifest.read(folder)
    for name, array in arrays.items():
        (folder / name).write_bytes(np.asarray(array, np.int32).tobytes())
    (folder / manifest.NAME).unlink()
    manifest.write(folder, facts)


@pytest.mark.usefixtures("open_umask")
def test_new_cache_is_its_owners_alone(tmp_path, kept):
    kept()
    for path in (tmp_path / "cache", entry(tmp_path)):
        assert path.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in entry(tmp_path).iterdir())


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o1777])
def test_cache_that_others_may_write_to_is_refused(tmp_path, kept, mode):
    kept()
    (tmp_path / "cache").chmod(mode)
    message = sentence_of(ConfigError, kept)
    assert (
        message.startswith(f"data.cache_dir {tmp_path}/cache: may be written to by others") and "chmod 700" in message
    )
    (tmp_path / "cache").chmod(0o755)
    kept()


def test_cache_of_another_user_is_refused(tmp_path, kept, monkeypatch):
    kept()
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "cache").stat().st_uid + 1)
    assert "cache: belongs to another user" in sentence_of(ConfigError, kept)


def test_entry_that_others_may_write_to_is_made_again(tmp_path, kept, capsys):
    kept()
    entry(tmp_path).chmod(0o777)
    kept()
    assert "may be written to by others; the rows are tokenised again" in capsys.readouterr().err
    kept()
    assert capsys.readouterr().err == ""


SAYS, FITS, LARGE = "other tokens than it says", "do not fit each other", "holds the token 2147483647"
FORGED = [
    (lambda tokens, lengths: {"tokens": np.where(tokens == tokens[3], tokens[4], tokens)}, SAYS),
    (lambda tokens, lengths: {"tokens": ~tokens}, SAYS),
    (lambda tokens, lengths: {"lengths": [lengths[0] + 1, lengths[1] - 1, *lengths[2:]]}, SAYS),
    (lambda tokens, lengths: {"tokens": np.where(tokens < 0, tokens, 2**31 - 1)}, LARGE),
    (lambda tokens, lengths: {"tokens": np.where(tokens < 0, -(2**31), tokens)}, LARGE),
    (lambda tokens, lengths: {"lengths": lengths[::-1] * 2}, FITS),
    (lambda tokens, lengths: {"lengths": np.append(lengths[:-1] - 1, lengths[-1])}, FITS),
    (lambda tokens, lengths: {"lengths": []}, FITS),
    (lambda tokens, lengths: {"seconds": lengths}, FITS),
    (lambda tokens, lengths: {"place_lengths": lengths * 9}, FITS),
]


@pytest.mark.parametrize(("change", "words"), FORGED)
def test_forged_entry_with_a_right_manifest_is_made_again(tmp_path, kept, capsys, change, words):
    digest, ids = ids_of(kept())
    arrays = (np.fromfile(entry(tmp_path) / name, np.int32) for name in ("tokens", "lengths"))
    forge(entry(tmp_path), **change(*arrays))
    found = kept()
    warning = capsys.readouterr().err
    assert words in warning and "the rows are tokenised again" in warning and warning.count("\n") == 1
    assert ids_of(found) == (digest, ids)


def test_many_tokens_are_looked_at_piece_by_piece(tmp_path, kept, capsys, monkeypatch):
    wanted = kept()
    for some in (1, 20, 2**20):
        monkeypatch.setattr("jlora.data.store.AT_ONCE", some)
        assert kept().digest == wanted.digest
    assert capsys.readouterr().err == ""


def test_command_refuses_such_a_cache_in_one_sentence(tmp_path, rows, smallest_base, here):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {{path: {smallest_base}}}\noutput_dir: {tmp_path}/run\n"
        f"data: {{train: {rows}, format: completion, max_length: 32, cache_dir: {tmp_path}/cache}}\n"
    )
    code, _, err = here("data", config)
    assert code == 2 and "data.cache_dir" in one_sentence(err)
