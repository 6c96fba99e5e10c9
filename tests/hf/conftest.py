"""A base, and a tokenizer that has more tokens than it has rows."""

from pathlib import Path

import pytest
from grown_bases import VOCAB, add_tokens
from tiny import make_llama, make_tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama(folder, tie_word_embeddings=request.param)
    make_tokenizer(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return add_tokens(tmp_path_factory.mktemp("tokenizer"))
