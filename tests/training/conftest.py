"""What tests of training share."""

import jax
import pytest
from tiny import make_completions, make_llama, make_tokenizer

from jlora.model.sharding import one_device_mesh


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama with a tokenizer, and short rows: (folder, rows); not to be written to."""
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    return folder / "base", make_completions(folder / "rows.jsonl")


@pytest.fixture
def mesh_of_one():
    """One device is the mesh in the test."""
    with jax.set_mesh(one_device_mesh()):
        yield
