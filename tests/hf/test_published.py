"""Bases that others published quantised: their weights are those that the library that wrote them reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_family
from published_bases import KINDS, make_base, rewrite, with_bitsandbytes
from tiny import OFF_DEFAULT, save_random
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig

from jlora.hf.families import tensor_in
from jlora.hf.planned import model_shape
from jlora.hf.source import check_names, open_source

BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4_float_absmax": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_stored_as_bf16": {
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        **{"bnb_4bit_quant_storage": torch.bfloat16},
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "some_modules_not": {
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        **{"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp", "q_proj"]},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("plain") / "base")


@pytest.mark.parametrize("kind", [*KINDS, *BNB])
def test_weights_are_those_of_the_library_that_wrote_them(kind: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    if kind in BNB:
        expected = with_bitsandbytes(base, folder, **BNB[kind])
    else:
        expected = rewrite(base, folder, *KINDS[kind])
    source, plain = open_source(folder), open_source(base)
    check_names(source.model, source.shapes, "base")
    assert source.model == plain.model == model_shape(str(folder))
    assert len(expected) == (9 if kind == "some_modules_not" else 14)
    rng = np.random.default_rng(0)
    for name, wanted in expected.items():
        found, want = source.read(name), wanted.float().numpy()
        assert found.dtype == np.float32 and found.shape == want.shape
        rounded = torch.from_numpy(found).to(wanted.dtype).float().numpy()
        np.testing.assert_array_equal(rounded, want)
        (top, bottom), (left, right) = (np.sort(rng.choice(size + 1, 2, replace=False)) for size in want.shape)
        part = source.part(name, (int(top), int(bottom)), (int(left), int(right)))
        np.testing.assert_array_equal(part, found[top:bottom, left:right])
        # And it is a quantised form of the weight that was there.
        assert 0 < np.abs(found - plain.read(name).astype(np.float32)).max() < 0.5
    for name in source.shapes.keys() - expected.keys():
        np.testing.assert_array_equal(source.read(name), plain.read(name))


def test_fused_turned_and_odd_projections_are_read_too(tmp_path: Path) -> None:
    """Phi-3's qkv_proj and gate_up_proj; GPT-2's, elsewhere stored [in, out]; rows that are no whole blocks of 64."""
    for name, kind in (("phi3", "gptq_4_whole"), ("gpt2", "nf4"), ("gpt2", "int8")):
        plain, folder = tmp_path / f"{name}_{kind}", tmp_path / kind
        make_family(plain, name)
        if kind in BNB:
            expected = with_bitsandbytes(plain, folder, **BNB[kind])
        else:
            expected = rewrite(plain, folder, *KINDS[kind])
        source, before = open_source(folder), open_source(plain)
        check_names(source.model, source.shapes, name)
        assert len(expected) == 3 * 4
        for tensor, wanted in expected.items():
            found = source.read(tensor)
            rounded = torch.from_numpy(found).to(wanted.dtype).float().numpy()
            np.testing.assert_array_equal(rounded, wanted.float().numpy())
            error = np.abs(found - before.read(tensor).astype(np.float32))
            assert 0 < error.max() < 0.5 and error.mean() < 0.03


def test_the_text_model_within_a_quantised_model_is_read(tmp_path: Path) -> None:
    """As Ministral 3 is published: FP8 by tensor, its settings beside the text model's and not in them."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = MistralConfig(**OFF_DEFAULT).to_dict()
    whole = Mistral3Config(
        text_config=text, vision_config=vision | {"image_size": 16, "patch_size": 8}, tie_word_embeddings=False
    )
    save_random(Mistral3ForConditionalGeneration(whole), tmp_path / "plain")
    skip = ("lm_head", "vision_tower", "multi_modal_projector")
    expected = rewrite(tmp_path / "plain", tmp_path / "base", *KINDS["fp8_tensor"], skip=skip)
    source = open_source(tmp_path / "base")
    check_names(source.model, source.shapes, "base")
    assert len(expected) == 3 * 7
    for name, wanted in expected.items():
        np.testing.assert_array_equal(source.read(tensor_in(name)), wanted.numpy())
