"""What tests of data share."""

import pytest
from tiny import make_tokenizer

from jlora.data.tokens import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder, None)
