"""Bases of every family as others are: quantised, over a mesh, from a GGUF file, in a sweep, merged."""

import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import wrapped
import yaml
from eight_devices import gradients, run_on_eight
from families import make_family
from gguf_families import make as make_gguf
from parity import assert_close, logits, random_tokens, torch_logits
from tiny import make_completions, make_tokenizer, write_config
from transformers import AutoModelForCausalLM

from jlora.config import load_config, variants
from jlora.hf.load import load_base
from jlora.hf.source import open_source
from jlora.hf.weights import Dequantized, save_checkpoint
from jlora.model.sharding import one_device_mesh
from jlora.training.export import export
from jlora.training.run import train
from jlora.training.sweep import train_together

FLOAT32 = jnp.dtype("float32")
# Divide over a mesh of 2 x 2 x 2, and inputs in whole blocks of nf4 over its devices.
WIDTHS = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {
    "gpt2": {"n_embd": 256, "n_inner": 384, "n_head": 4},
    "qwen3": WIDTHS | {"head_dim": 32},
    "gemma2": WIDTHS | {"head_dim": 32},
    "gemma3": WIDTHS | {"head_dim": 32},
    "phi3": WIDTHS | {"head_dim": 64},
}
WRAPPED = {"gemma3_wrapped": "gemma3", "mistral3_wrapped": "mistral3"}


def make(folder: Path, name: str) -> None:
    """A wide model of that name, with a tokenizer."""
    more = {"initializer_range": 0.06}
    if name in WRAPPED:
        wrapped.make(folder, WRAPPED[name], **WIDTHS | {"head_dim": 32} | more)
    else:
        make_family(folder, name, **SIZES[name] | more)
    make_tokenizer(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Name -> the folder of that model, made once."""
    root = tmp_path_factory.mktemp("bases")

    def base(name):
        if not (root / name).exists():
            make(root / name, name)
        return root / name

    return base


def slow_but(quick, names):
    """All names as parameters, of which only `quick` are not slow: they have most of what a block may have."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.long
@pytest.mark.parametrize("name", slow_but(("gpt2", "gemma3", "mistral3_wrapped"), [*SIZES, *WRAPPED]))
def test_a_quantised_base_is_the_model_of_its_dequantised_weights(name, bases, tmp_path):
    """As transformers computes that; and each kind makes another of it."""
    source, tokens, found = open_source(bases(name)), random_tokens(290), {}
    for kind in ("nf4", "int8"):
        base, _ = load_base(source, "base", FLOAT32, one_device_mesh(), kind)
        by_rows = Dequantized(source, base.cfg, kind)
        save_checkpoint(tmp_path / kind, base.cfg, by_rows, source.config, "float32", lambda folder: None)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, attn_implementation="eager").eval()
        found[kind] = logits(base, {}, tokens)
        assert_close(found[kind], torch_logits(model, tokens), 1e-4)
    assert np.abs(found["nf4"] - found["int8"]).max() > 1e-2


@pytest.mark.long
@pytest.mark.parametrize(
    "names", [["gpt2"], pytest.param(["phi3", "qwen3", "gemma2", "gemma3"], marks=pytest.mark.slow)], ids=", ".join
)
def test_gradients_over_eight_devices_are_those_of_one(names, bases, tmp_path):
    """Over data, fsdp and tensor at once, on nf4 codes that are the same bit for bit."""
    configs = [
        str(write_config(tmp_path / f"{name}.yaml", bases(name), tmp_path / "rows", tmp_path, data={"max_length": 32}))
        for name in names
    ]
    assert run_on_eight(gradients, *configs).split() == [str(bases(name)) for name in names]


def file_digest(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.long
@pytest.mark.parametrize("name", slow_but(["phi3"], SIZES))
def test_a_sweep_over_a_gguf_file_in_nf4_is_two_runs_and_merges(name, tmp_path):
    """An adapter to the byte; and the merged model is the adapter on the dequantised base, whoever computes it."""
    make_gguf(tmp_path / "base.gguf", name)
    rows = make_completions(tmp_path / "rows.jsonl")
    data = {"format": "completion", "max_length": 64}
    lora = {"target_modules": "all-linear", "rank": 2}
    path = write_config(tmp_path / "c.yaml", tmp_path / "base.gguf", rows, tmp_path / "runs", data=data, lora=lora)
    tree = yaml.safe_load(path.read_text())
    tree["sweep"] = [{"name": "a"}, {"name": "b", "training.seed": 5, "optimizer.learning_rate": 1e-3}]
    path.write_text(yaml.safe_dump(tree))
    cfg = load_config(path, ["model.quantization=nf4", "training.max_steps=2"])
    assert train_together(cfg, quiet=True)["status"] == "finished"
    runs = [Path(each.output_dir) for each in variants(cfg)]
    alone = tmp_path / "alone"  # the second one's, which came to a base and a program that the first one used
    train(variants(cfg)[1].model_copy(update={"output_dir": str(alone)}), quiet=True)
    first, second, found = (file_digest(folder / "adapter") for folder in (*runs, alone))
    assert found == second != first
    result = export(runs[1], tmp_path / "merged", None, True, "float32", False)
    assert result["merged_into"] == "dequantised nf4" and result["logits_relative_difference"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    merged, _ = load_base(open_source(tmp_path / "merged"), "merged", FLOAT32, one_device_mesh())
    tokens = random_tokens(merged.cfg.vocab_size)
    assert_close(logits(merged, {}, tokens), torch_logits(model, tokens), 1e-4)
