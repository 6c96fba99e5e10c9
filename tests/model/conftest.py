"""Models and adapters that the tests of a model share."""

from pathlib import Path

import pytest
from grown_adapters import random_adapter
from parity import open_base
from shared_data import SHARED
from tiny import make_llama, make_qwen2, make_tokenizer


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Grouped queries and an untied head; the real model, whose head is tied; and one with biases. Not to be
    written to."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("gqa", "biased")}
    make_llama(folders["gqa"], num_hidden_layers=3)
    make_qwen2(folders["biased"], tie_word_embeddings=True)
    make_tokenizer(folders["gqa"])
    return folders | {"stories260K": SHARED / "stories260K"}


@pytest.fixture(scope="session")
def opened(bases):
    return {name: open_base(folder) for name, folder in bases.items() if folder.is_dir()}


@pytest.fixture(scope="module")
def base(llama):
    return open_base(llama[0])[0]


@pytest.fixture(scope="module")
def adapter(base):
    return random_adapter(base)
