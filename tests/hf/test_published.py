"""Bases that others published quantised: their weights are those that the library that wrote them reads."""

from pathlib import Path

import numpy as np
import pytest
import torch
from published_bases import KINDS, make_base, rewrite, with_bitsandbytes

from jlora.hf.pretrained import model_shape
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
