"""How many tokens the text up to a place has: as if it was encoded alone, which is what is told apart for the loss."""

import re

import pytest
from chat_templates import PUBLISHED, SHAPES, accepted, ours
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import SHARED, needs_data

from jlora.config import Counted
from jlora.data.prompts import lay_out
from jlora.data.tokens import load_tokenizer

WORDS = [
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</think>",
    "<s>",
    "</s>",
    "\n",
    " ",
    "  ",
    "a",
    "na\u00efve",
    "<|im",
    "\U0001f642",
]


def counted(tokenizer, text, places):
    return [
        count + len(tokenizer.encode(left)) for count, left in tokenizer.up_to(text, tokenizer.encode(text), places)
    ]


def check(tokenizer, text, places):
    assert counted(tokenizer, text, places) == [len(tokenizer.encode(text[:place])) for place in places]


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_places_of_published_templates(name):
    for shape, row in SHAPES.items():
        if accepted(name, shape):
            laid = lay_out(
                ours(name), row, format="messages", prompt="chat", counted=Counted("response", "turn", "keep")
            )
            places = [place for span in laid.spans for place in span[:2]]
            check(ours(name), laid.text, places)
            left = [left for _, left in ours(name).up_to(laid.text, ours(name).encode(laid.text), places)]
            assert max(map(len, left)) < len(laid.text) / 2 or shape == "one"  # which is what it is for


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=12), st.data())
def test_any_place_of_any_text(parts, data):
    text = re.sub("[\ud800-\udfff]", "", "".join(parts))
    check(ours("qwen3"), text, data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=5)))


@needs_data
@pytest.mark.parametrize("folder", ["llama2_tokenizer", "mistral_v1_tokenizer", "stories260K"])
@pytest.mark.parametrize("files", [("tokenizer.json",), ("tokenizer.model",)])
def test_tokenizers_that_put_a_space_before_a_text(folder, files, tmp_path):
    for name in (*files, "tokenizer_config.json"):
        (tmp_path / name).write_bytes((SHARED / folder / name).read_bytes())
    tokenizer = load_tokenizer(tmp_path, None)
    texts = ["<s>[INST] Hi [/INST] Yes. </s><s>[INST]  no", " a</s> b", "</s>", "", "x <s", "a <unk> b<s> \n c"]
    for text in texts:
        check(tokenizer, text, list(range(len(text) + 1)))
