"""Characters of several tokens are shown whole, once."""

import pytest
from shared_data import SHARED, needs_data
from tiny import make_tokenizer

from jlora.data.characters import characters
from jlora.data.tokens import load_tokenizer

WHOLE = {
    "a family": "👩‍👩‍👧",
    "a flag": "🇩🇪",
    "a skin tone": "👍🏽",
    "Hindi": "कि",
    "Thai": "ที่",
    "an accent": "e\u0301",
    "runes": "ᛇ",
    "hieroglyphs": "𓀀",
    "Korean": "\u1112\u1161\u11ab",
    "a heart": "❤️",
}
TOKENIZERS = ["bytes", *(pytest.param(f"{name}_tokenizer", marks=needs_data) for name in ("llama2", "mistral_v1"))]


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request, tmp_path_factory):
    folder = SHARED / request.param
    if request.param == "bytes":
        folder = tmp_path_factory.mktemp("tokenizer")
        make_tokenizer(folder)
    return load_tokenizer(folder, None)


@pytest.mark.parametrize("name", WHOLE)
def test_a_character_is_shown_once_at_its_last_token(name, tokenizer):
    text = f"ab {WHOLE[name]} cd {WHOLE[name]}{WHOLE[name]}"
    ids = tokenizer.encode(text)
    shown = [piece for piece, special in characters(tokenizer, ids)]
    assert len(shown) == len(ids) and "".join(shown).strip() == text
    holding = [piece for piece in shown if WHOLE[name] in piece]
    assert sum(piece.count(WHOLE[name]) for piece in holding) == 3
    assert not any(char in piece for piece in shown if piece not in holding for char in WHOLE[name] if char != "e")


def test_long_texts_of_rare_characters_are_whole(tokenizer):
    text = "ᚠᛇ𓀀🇩🇪 नमस्ते" * 40
    assert "".join(piece for piece, _ in characters(tokenizer, tokenizer.encode(text))).strip() == text


def test_a_character_that_never_ends_is_shown_as_such(tokenizer):
    ids = tokenizer.encode("ab 𓀀")[:-1]
    shown = characters(tokenizer, ids)
    assert len(shown) == len(ids) and shown[-1][0].endswith("\N{REPLACEMENT CHARACTER}")


def test_special_tokens_part_characters(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("🇩"), tokenizer.eos_id, *tokenizer.encode("🇪")]
    shown = characters(tokenizer, ids)
    assert [piece for piece, special in shown if special] == [tokenizer.bos_token, tokenizer.eos_token]
    assert "".join(piece for piece, special in shown if not special).replace(" ", "") == "🇩🇪"
