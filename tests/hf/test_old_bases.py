"""Bases of earlier versions and other writers, which say or hold more, or under other names, than jlora computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from safetensors.numpy import load_file, save_file
from tiny import copy_folder, make_completions, make_llama, make_tokenizer, write_config
from transformers import AutoModelForCausalLM

from jlora.config import load_config
from jlora.errors import ModelError
from jlora.hf.source import open_source
from jlora.training.run import train

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    make_llama(folder, tie_word_embeddings=True)
    return folder


def says(folder: Path, **keys: Any) -> None:
    """Set keys of its config.json; of rotary settings in transformers 4's own."""
    config = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in keys and "rope_parameters" in config:
        config = config | {"rope_theta": config.pop("rope_parameters")["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config | keys))


def holds(folder: Path, name: Callable[[str], str], **more: np.ndarray) -> None:
    """Rename its tensors, and put others beside them."""
    tensors = load_file(folder / FILE)
    save_file({name(key): tensor for key, tensor in tensors.items()} | more, folder / FILE, {"format": "pt"})


def same_as_transformers(folder: Path) -> np.ndarray:
    tokens = random_tokens(300, length=48)
    ours = logits(open_base(folder)[0], {}, tokens)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert_close(ours, torch_logits(theirs, tokens), 1e-4)
    return ours


NAMES = ["LLaMAForCausalLM", "LlamaModel", "llamaforcausallm"]


@pytest.mark.parametrize("name", NAMES)
def test_a_family_goes_by_all_its_names(name, llama, tmp_path):
    folder = copy_folder(llama, tmp_path / "base")
    says(folder, architectures=[name], pad_token_id=-1, max_sequence_length=512)
    np.testing.assert_array_equal(same_as_transformers(folder), same_as_transformers(llama))


def test_a_body_alone_is_a_model_where_its_head_is_tied(tied, tmp_path):
    folder = copy_folder(tied, tmp_path / "base")
    says(folder, architectures=["LlamaModel"])
    holds(folder, lambda name: name.removeprefix("model."))
    np.testing.assert_array_equal(same_as_transformers(folder), same_as_transformers(tied))
    assert open_base(folder)[1] == open_base(tied)[1]


def test_a_body_with_a_head_beside_it(llama, tmp_path):
    folder = copy_folder(llama, tmp_path / "base")
    holds(folder, lambda name: name.removeprefix("model."))
    np.testing.assert_array_equal(same_as_transformers(folder), same_as_transformers(llama))


def test_a_body_without_the_head_it_needs_is_refused(llama, tmp_path):
    folder = copy_folder(llama, tmp_path / "base")
    tensors = load_file(folder / FILE)
    save_file({k.removeprefix("model."): v for k, v in tensors.items() if k != "lm_head.weight"}, folder / FILE)
    with pytest.raises(ModelError, match=r"1 missing \(lm_head.weight\)"):
        open_base(folder)


BUFFERS = [
    "self_attn.masked_bias",
    "self_attn.bias",
    "self_attn.rotary_emb.inv_freq",
    "self_attn.rotary_emb.cos_cached",
    "self_attn.rotary_emb.sin_cached",
]


def test_what_is_computed_may_be_stored_too(llama, tmp_path):
    folder = copy_folder(llama, tmp_path / "base")
    holds(folder, str, **{f"model.layers.1.{name}": np.full((1, 3), 0.5, np.float32) for name in BUFFERS})
    np.testing.assert_array_equal(same_as_transformers(folder), same_as_transformers(llama))


# Rotary settings, and which of their keys transformers does not read.
ROTARY = [
    ({"type": "linear", "factor": 2.0, "mscale": 1.0}, "rope_scaling.mscale: not read for the type linear"),
    (
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24, "finetuned": True},
        "rope_scaling.finetuned: not read for the type yarn",
    ),
    ({"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 24}, None),
    ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}, None),
    (
        {"rope_type": "dynamic", "factor": 2.0, "alpha": 8, "beta_fast": 16},
        "rope_scaling.alpha, rope_scaling.beta_fast: not read for the type dynamic",
    ),
    ({"type": "linear", "factor": 2.0, "attention_factor": 0.5}, "rope_scaling.attention_factor: not read"),
    ({"type": "default", "factor": 2.0}, "rope_scaling.factor: not read for the type default"),
]


@pytest.mark.parametrize(("scaling", "warned"), ROTARY, ids=str)
def test_rotary_settings_that_transformers_does_not_read(scaling, warned, llama, tmp_path, capsys):
    folder = copy_folder(llama, tmp_path / "base")
    says(folder, rope_scaling=scaling)
    ours = same_as_transformers(folder)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line for line in said if "rope_scaling" in line] == said and len(said) == (warned is not None)
    assert warned is None or warned in said[0]
    plain = {"finetuned", "mscale", "partial_rotary_factor", "alpha", "beta_fast", "attention_factor"}
    says(folder, rope_scaling={key: value for key, value in scaling.items() if key not in plain})
    np.testing.assert_array_equal(ours, same_as_transformers(folder))


def test_code_of_a_models_own_is_not_run_and_said_so(llama, tmp_path, capsys):
    folder = copy_folder(llama, tmp_path / "base")
    says(folder, auto_map={"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"})
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')")
    np.testing.assert_array_equal(same_as_transformers(folder), same_as_transformers(llama))
    assert "auto_map names code of the model's own, which is not run; it is computed" in capsys.readouterr().err


def test_attention_dropout_is_accepted_and_training_says_that_it_is_not_applied(llama, tmp_path, capsys):
    folder = copy_folder(llama, tmp_path / "base")
    make_tokenizer(folder)
    says(folder, attention_dropout=0.1)
    assert open_source(folder).model == open_source(llama).model
    np.testing.assert_array_equal(same_as_transformers(folder), same_as_transformers(llama))
    rows = make_completions(tmp_path / "rows.jsonl")
    data = {"format": "completion", "max_length": 64}
    capsys.readouterr()
    train(load_config(write_config(tmp_path / "run.yaml", folder, rows, tmp_path / "run", data=data)))
    assert "warning: attention_dropout=0.1 of the base's config.json is not applied" in capsys.readouterr().err
