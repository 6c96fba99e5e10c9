"""Ids of what servers show for tokens."""

from tiny import make_tokenizer

from jlora.data.pieces import Pieces
from jlora.data.tokens import load_tokenizer


def test_ids_of_texts_bytes_and_ids(tmp_path):
    make_tokenizer(tmp_path, merges=(("l", "u"), ("b", "lu"), ("blu", "e")))
    tokenizer = load_tokenizer(tmp_path, None)
    pieces = Pieces(tokenizer)
    ids = tokenizer.encode("blue \u00e9</s>")
    assert len(ids) == 5  # the word, a space, two bytes of a letter, the end
    raw = [b"blue", b" ", b"\xc3", b"\xa9", b"</s>"]
    assert pieces.ids_of([("", each, None) for each in raw], "") == ids
    assert pieces.ids_of([("blue", None, None), (" ", None, None)], "") == ids[:2]
    # As they are: what is cut into bytes is told by the text as a whole, if it has as many tokens.
    assert pieces.ids_of([("blue", None, None), ("\u00e9", None, None), ("", None, None)], "") == [ids[0], *ids[2:4]]
    assert pieces.ids_of([("blue", None, None), ("\ufffd", None, None)], "") == [ids[0], None]
    assert pieces.ids_of([("x", b"blue", ids[0]), ("", None, 2)], "") == [ids[0], 2]


def test_tokens_that_are_shown_as_one_are_none(tmp_path):
    """llama-server has one entry, and the id of the last, for the tokens that a character is cut into."""
    make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path, None)
    first, last = tokenizer.encode("\u00e9")
    assert Pieces(tokenizer).ids_of([("\u00e9", b"\xc3\xa9", last)], "")[0] is None


def test_a_text_behind_another(tmp_path):
    make_tokenizer(tmp_path, merges=(("l", "u"), ("b", "lu")))
    tokenizer = load_tokenizer(tmp_path, None)
    pieces = Pieces(tokenizer)
    assert pieces.ids_of_text("blu", "a ") == tokenizer.encode("blu")
    assert pieces.ids_of_text("lu", "b") == []  # joined with what is before
