"""`model.compute`: a run over 8-bit products from its check to its resumption, and a base that does not bear them."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from shared_data import SHARED, needs_data
from tiny import copy_folder, write_config

from jlora.config import load_config, read_yaml
from jlora.errors import ConfigError
from jlora.inference.model import open_adapted
from jlora.model.quant import is_quantized
from jlora.training.run import train

BASE = SHARED / "stories260K"
pytestmark = [needs_data, pytest.mark.long]


def config(folder, base, *overrides):
    """Four steps over stories, a fifth of them held out."""
    stories = SHARED / "tinystories" / "stories_valid.jsonl"
    rows = folder / "rows.jsonl"
    rows.write_text("".join(stories.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    section = {"format": "text", "eval": 0.2, "max_length": 128}
    return load_config(write_config(folder / "c.yaml", base, rows, folder / "run", data=section), overrides)


@pytest.fixture(scope="module")
def wild(tmp_path_factory):
    """The real base with two channels of every norm at 400 times their size, and the weights behind them at a 400th.

    The same model in float32, but in 255 steps a row of activations has no room for its other channels.
    """
    folder = copy_folder(BASE, tmp_path_factory.mktemp("wild") / "base")
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        behind = {
            "input_layernorm": [f"self_attn.{key}_proj" for key in "qkv"],
            "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
        }.get(norm, [])
        if behind:
            tensors[name][:2] *= 400
        for module in behind:
            tensors[f"{layer}.{module}.weight"][:, :2] /= 400
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_run_trains_over_codes_and_says_what_they_cost(tmp_path, capsys, kind):
    summary = train(config(tmp_path, BASE, f"model.compute={kind}"))
    said = capsys.readouterr().err
    assert f"by {kind} products" in said and "in float32" in said
    assert summary["compute"] == kind and read_yaml(tmp_path / "run" / "config.yaml")["model"]["quantization"] == kind
    exact = train(config(tmp_path, BASE, f"output_dir={tmp_path / 'plain'}"), quiet=True)
    assert exact["compute"] is None
    assert summary["eval_loss"] == pytest.approx(exact["eval_loss"], rel=0.02)
    assert summary["eval_loss"] != exact["eval_loss"]
    model = open_adapted(str(BASE), str(tmp_path / "run"))
    assert model.pretrained.base.layers.q_proj.get_raw_value().coded  # what answers is what was trained over
    model = open_adapted(str(BASE), str(tmp_path / "run"), quantization="none")
    assert not is_quantized(model.pretrained.base.layers.q_proj.get_raw_value())


def test_a_base_that_int8_ruins_is_refused(tmp_path, wild, capsys):
    with pytest.raises(ConfigError, match=r"by int8 products, .* in float32, .* over where .*allows 0.1; set model"):
        train(config(tmp_path, wild, "model.compute=int8"), quiet=True)
    train(config(tmp_path, wild, "model.compute=fp8", "training.max_steps=1"))  # whose steps grow with the number
    assert "by fp8 products" in capsys.readouterr().err


def test_a_run_falls_back_where_that_is_asked_for_and_resumes_so(tmp_path, wild, capsys):
    asked = config(tmp_path, wild, "model.compute=int8", "model.compute_fallback=true")
    assert train(asked, until=2)["compute"] is None
    assert "warning: held-out loss of the base" in capsys.readouterr().err
    summary = train(asked)
    assert "held-out loss of the base" not in capsys.readouterr().err  # it is not asked again
    assert summary["compute"] is None and summary["steps"] == 4
    model = read_yaml(tmp_path / "run" / "config.yaml")["model"]
    assert model["compute"] is None and model["quantization"] is None
    exact = train(config(tmp_path, wild, f"output_dir={tmp_path / 'plain'}"), quiet=True)
    ours, theirs = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "plain"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert summary["eval_loss"] == exact["eval_loss"]


def test_without_held_out_rows_it_says_that_nothing_was_checked(tmp_path, capsys):
    train(config(tmp_path, BASE, "model.compute=int8", "data.eval=null", "training.max_steps=1"))
    assert "note: without held-out rows model.compute=int8 is not checked" in capsys.readouterr().err


def test_codes_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="compute=int8 multiplies with codes of its own kind, but quantization=nf4"):
        config(tmp_path, BASE, "model.compute=int8", "model.quantization=nf4")
    with pytest.raises(ConfigError, match="method=full trains every weight"):
        config(tmp_path, BASE, "model.compute=int8", "method=full")
