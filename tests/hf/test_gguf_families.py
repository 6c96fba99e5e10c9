"""GGUF files of families beside Llama, and of Llama 3: the model that was converted, whoever reads it."""

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import sentence_of
from gguf_families import MODELS, VOCAB, make
from grown_adapters import grown
from parity import assert_close, logits, random_tokens, torch_logits
from transformers import AutoConfig, AutoModelForCausalLM

from jlora.errors import ModelError
from jlora.hf.gguf import GGUFFile
from jlora.hf.load import load_base
from jlora.hf.peft import save_adapter
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.hf.source import open_source
from jlora.hf.verify import compare_with_peft
from jlora.model.sharding import one_device_mesh

TOKENS, FLOAT32 = random_tokens(VOCAB), jnp.dtype("float32")


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_which_was_converted(name, tmp_path):
    """Its weights, its logits, and the config by which transformers builds it again."""
    model = make(tmp_path / "m.gguf", name)
    file = GGUFFile(tmp_path / "m.gguf")
    state = model.state_dict()
    for path, entry in file.shapes.items():
        found = file.read(path)
        right = state[path].numpy()
        right = right.T if found.shape != right.shape or "attn.c_proj" in path else right
        assert found.dtype == np.float32 and found.shape == entry
        # 1 is added to the norms of Gemma, and taken away again, each time rounded.
        np.testing.assert_allclose(found, right, rtol=0, atol=1.2e-7 if name.startswith("gemma") else 0, err_msg=path)
    right = open_source(tmp_path / f"{name}-saved").model
    assert file.model == right
    if right.num_hidden_layers > 3:  # rounding grows beyond any tolerance through that many random layers
        return
    expected = torch_logits(model, TOKENS)
    base, _ = load_base(file, "base", FLOAT32, one_device_mesh())
    assert_close(logits(base, {}, TOKENS), expected, 1e-4)
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**file.config), attn_implementation="eager")
    again.load_state_dict(state)
    assert_close(torch_logits(again.eval(), TOKENS), expected, 1e-6)


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [
        ("gpt2_tied", {"attention__head_count_kv": 2}, "gpt2.attention.head_count_kv to 2 where heads have size 6"),
        ("gpt2_tied", {"attention__key_length": 8}, "gpt2.attention.key_length to 8 where heads have size 16"),
        ("gpt2_tied", {"attention__sliding_window": 7}, "sets gpt2.attention.sliding_window to 7, which is not"),
        ("qwen3", {"rope__dimension_count": 16}, "qwen3.rope.dimension_count to 16 where heads have size 32"),
        ("qwen3", {"attention__sliding_window": 7}, "sets qwen3.attention.sliding_window to 7, which is not"),
        ("gemma3", {"attention__sliding_window_pattern": 0}, "sliding_window_pattern to 0, not to one positive"),
        ("gemma3", {"attn_logit_softcapping": 3.0}, "sets gemma3.attn_logit_softcapping to 3.0, which is not"),
        ("gemma3", {"final_logit_softcapping": float("nan")}, "final_logit_softcapping to nan, not to a finite number"),
        ("gemma3", {"rope__freq_base_swa": -1.0}, "rope_theta must be a positive number, not -1.0"),
        ("gemma2", {"final_logit_softcapping": -5.0}, "final_logit_softcapping must be a positive number, not -5.0"),
        ("phi3", {"rope__dimension_count": 7}, "partial_rotary_factor=0.4375 turns 7 of 16 dims, not an even part"),
        ("phi3", {"rope__scaling__attn_factor": 1.5}, "sets phi3.rope.scaling.attn_factor to 1.5, which is not"),
        ("phi3_longrope", {"rope__dimension_count": 8}, "rope_scaling.short_factor must be a list of 4 numbers"),
        ("phi3_longrope", {"rope__scaling__original_context_length": 0}, "original_context_length to 0, not to one"),
        ("phi3_longrope", {"rope__scaling__attn_factor": -1.0}, "attention_factor must be a positive number, not -1.0"),
    ],
)
def test_metadata_that_means_nothing_is_refused_by_name(name, keys, says, tmp_path):
    make(tmp_path / "m.gguf", name, **keys)
    assert says in sentence_of(ModelError, GGUFFile, tmp_path / "m.gguf")


@pytest.mark.parametrize("reader", ["transformers", "jlora"])
@pytest.mark.parametrize("name", ["gpt2_tied", "gemma3", "phi3"])
def test_an_export_is_proved_on_what_peft_has_for_a_base(name, reader, tmp_path, monkeypatch):
    """On the file as transformers reads it, with our config; on our weights where it does not read its kind."""
    make(tmp_path / "m.gguf", name)
    pretrained = load_pretrained(open_pretrained(str(tmp_path / "m.gguf"), None, None), FLOAT32, one_device_mesh())
    section, adapter = grown(pretrained)
    save_adapter(tmp_path / "adapter", adapter, section, "m.gguf", "0" * 64, pretrained.base.cfg.names)
    if reader == "jlora":
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: 1 / 0)
    difference, read_by = compare_with_peft(tmp_path / "adapter", adapter, pretrained)
    assert difference < 1e-5 and read_by == reader
