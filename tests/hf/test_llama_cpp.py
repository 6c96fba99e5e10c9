"""Files that we write, in llama.cpp itself, where `llama-cpp-python` is installed: the same tokens and logits."""

import numpy as np
import pytest
from gguf_families import MODELS, make
from gguf_files import SPM
from shared_data import SHARED, needs_data
from tiny import make_llama

from jlora.hf import verify
from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_vocabulary import PROBES, vocabulary_of
from jlora.hf.gguf_writer import write_gguf
from jlora.hf.pretrained import open_tokenizer
from jlora.hf.source import open_source
from jlora.hf.weights import Stored

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:::llama_cpp")

F32 = 0  # of its cache, which has 16 bits by default
# ggml looks gelu up in a table of 16 bits.
TOLERANCE = {"gelu": 1e-3, "silu": 1e-5}


def opened(file):
    return llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=F32, type_v=F32)


# Phi-3's window is not applied by llama.cpp, and 46 random layers make much of a table's rounding.
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"phi3", "gemma2_of_46_layers"}))
def test_logits_of_every_family(name, tmp_path):
    make(tmp_path / "theirs.gguf", name)
    source = open_source(tmp_path / f"{name}-saved")
    vocabulary = {f"tokenizer.ggml.{key}": value for key, value in SPM.items()}
    write_gguf(tmp_path / "ours.gguf", source.model, source.config, Stored(source), vocabulary, "F32")
    written = GGUFFile(tmp_path / "ours.gguf")
    ours = verify.streamed_logits(written.model, Stored(written), {})
    model = opened(tmp_path / "ours.gguf")
    tokens = verify.probe_tokens(written.model.vocab_size, {})[0].tolist()
    model.eval(tokens)
    theirs = np.array(model.scores[: len(tokens)])
    difference = np.sqrt(((theirs - ours) ** 2).mean() / (ours**2).mean())
    assert difference < TOLERANCE["silu" if source.model.activation == "silu" else "gelu"]


@needs_data
@pytest.mark.parametrize("name", ["stories260K", "llama2_tokenizer"])
def test_tokens_of_a_folders_tokenizer(name, tmp_path):
    """Also of a text that begins with a space, which our own reader of GGUF takes as transformers' slow tokenizer."""
    tokenizer = open_tokenizer(str(SHARED / name), None)
    make_llama(tmp_path / "base", vocab_size=tokenizer.vocab_size)
    source = open_source(tmp_path / "base")
    vocabulary = vocabulary_of(tokenizer, None, tokenizer.vocab_size, [], "m.gguf")
    write_gguf(tmp_path / "m.gguf", source.model, source.config, Stored(source), vocabulary, "F32")
    model = opened(tmp_path / "m.gguf")
    assert (model.token_bos(), model.token_eos()) == (tokenizer.bos_id, tokenizer.eos_id)
    for text in (*filter(None, PROBES), " begins with a space", "  and with two"):
        assert model.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text), text
