"""An export that does not compute what the run does is refused, and does not stay."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import write as write_gguf
from grown_adapters import grown
from parity import assert_close, torch_logits
from tiny import make_llama, make_mistral, make_tokenizer
from transformers import AutoModelForCausalLM, MistralForCausalLM

from jlora.errors import ModelError
from jlora.files.atomic import new_folder
from jlora.hf import verify
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.hf.weights import Merged, Stored, save_checkpoint
from jlora.model.sharding import one_device_mesh

FLOAT32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llama(folder)
    return opened(folder)


def opened(folder):
    make_tokenizer(folder)
    return load_pretrained(open_pretrained(str(folder), None, None), FLOAT32, one_device_mesh())


@pytest.fixture
def adapter(pretrained):
    return grown(pretrained)


def test_a_true_export_passes_and_stays(pretrained, adapter, tmp_path):
    section, factors = adapter
    difference = verify.export_adapter(tmp_path / "out", factors, section, pretrained, FLOAT32, one_device_mesh())
    assert difference == 0.0 and (tmp_path / "out" / "adapter_model.safetensors").is_file()
    difference, reader = verify.compare_with_peft(tmp_path / "out", factors, pretrained)
    assert difference < 1e-5 and reader == "transformers"


def test_a_mistral_is_exported_and_merged(tmp_path):
    """With a window shorter than the probe; PEFT, and transformers on the merged folder, compute what we do."""
    make_mistral(tmp_path / "base")
    pretrained = opened(tmp_path / "base")
    section, factors = grown(pretrained)
    verify.export_adapter(tmp_path / "out", factors, section, pretrained, FLOAT32, one_device_mesh())
    difference, reader = verify.compare_with_peft(tmp_path / "out", factors, pretrained)
    assert difference < 1e-5 and reader == "transformers"
    weights = Merged(Stored(pretrained.source), factors)
    config = {key: value for key, value in pretrained.source.config.items() if key != "architectures"}
    save_checkpoint(tmp_path / "merged", pretrained.base.cfg, weights, config, "float32", lambda folder: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(model) is MistralForCausalLM and model.config.sliding_window == 7
    tokens = verify.probe_tokens(300, {})
    assert_close(verify.probe_logits(pretrained.base, factors, FLOAT32), torch_logits(model, tokens)[0], 1e-4)


def test_a_wrong_export_is_refused_and_removed(pretrained, adapter, tmp_path, monkeypatch):
    section, factors = adapter
    honest = verify.load_adapter

    def off_by_a_little(*args, **kwargs):
        return jax.tree.map(lambda x: x * 1.001, honest(*args, **kwargs))

    monkeypatch.setattr(verify, "load_adapter", off_by_a_little)
    with pytest.raises(ModelError, match="logits that differ"):
        verify.export_adapter(tmp_path / "out", factors, section, pretrained, FLOAT32, one_device_mesh())
    assert not list(tmp_path.iterdir())


def test_peft_disagreeing_is_refused(pretrained, adapter, tmp_path):
    section, factors = adapter
    other = jax.tree.map(lambda x: x * 1.1, factors)
    with pytest.raises(ModelError, match="/out: what was written gives logits that differ"):
        with new_folder(tmp_path / "out") as folder:
            verify.write_adapter(folder, factors, section, pretrained, FLOAT32, one_device_mesh())
            verify.compare_with_peft(folder, other, pretrained)
    assert not list(tmp_path.iterdir())


def test_one_wrong_row_of_the_vocabulary_is_seen():
    """The mean hides nothing that matters: one token of 50,000 with another's logits is past the tolerance."""
    expected = np.random.default_rng(0).normal(size=(verify.PROBE_LENGTH, 50_000)).astype(np.float32)
    found = expected.copy()
    found[:, 7] = found[:, 8]
    with pytest.raises(ModelError):
        verify.require_equal(Path("out"), expected, found, tolerance=1e-4)
    assert verify.require_equal(Path("out"), expected, expected, tolerance=0.0) == 0.0


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match="not finite"):
        verify.require_equal(Path("out"), np.ones((2, 2)), np.array([[1.0, np.nan], [1, 1]]), tolerance=1.0)


@pytest.mark.parametrize("reader", ["transformers", "jlora"])
def test_a_gguf_base_is_read_by_transformers_where_it_can(reader, tmp_path, monkeypatch):
    """Elsewhere transformers computes on the weights as jlora read them, and the result says so."""
    write_gguf(tmp_path / "base.gguf", GGMLQuantizationType.Q4_1)
    pretrained = load_pretrained(open_pretrained(str(tmp_path / "base.gguf"), None, None), FLOAT32, one_device_mesh())
    section, factors = grown(pretrained)
    verify.export_adapter(tmp_path / "out", factors, section, pretrained, FLOAT32, one_device_mesh())
    if reader == "jlora":

        def refuse(*args, **kwargs):
            raise NotImplementedError("a type that is not known")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    difference, who = verify.compare_with_peft(tmp_path / "out", factors, pretrained)
    assert difference < 1e-5 and who == reader


def test_a_base_that_transformers_refuses_fits_no_export(pretrained, adapter, tmp_path, monkeypatch):
    section, factors = adapter

    def refuse(*args, **kwargs):
        raise RuntimeError("sizes\nmismatch")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    says = r"transformers does not load this base \(sizes mismatch\)"
    with pytest.raises(ModelError, match=says), new_folder(tmp_path / "out") as made:
        verify.write_adapter(made, factors, section, pretrained, FLOAT32, one_device_mesh())
        verify.compare_with_peft(made, factors, pretrained)
    assert not (tmp_path / "out").exists()
