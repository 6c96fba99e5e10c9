"""Several adapters as one, with PEFT as the judge."""

from pathlib import Path

import numpy as np
import pytest
from adapter_options import fresh, grown, torch_model
from parity import assert_close, logits, random_tokens, torch_logits
from peft import PeftModel

from jlora.config import LoraSection
from jlora.errors import ConfigError, ModelError
from jlora.hf.peft import load_adapter, save_adapter
from jlora.training.export import export_combined


@pytest.fixture(scope="module")
def several(bases, opened, tmp_path_factory) -> dict[str, Path]:
    """Two of one rank on other modules, one of another rank, with rsLoRA, on some layers; and one with DoRA."""
    base, base_hash = opened["gqa"]
    folders = {}
    for seed, (name, options) in enumerate(
        {
            "first": {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "o_proj", "up_proj"]},
            "second": {"rank": 4, "alpha": 4.0, "target_modules": ["q_proj", "down_proj"]},
            "third": {"rank": 3, "alpha": 3.0, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
            "dora": {"use_dora": True},
        }.items()
    ):
        section = LoraSection(**options)
        folders[name] = tmp_path_factory.mktemp("several") / name
        save_adapter(folders[name], grown(fresh(section, base), seed), section, str(bases["gqa"]), base_hash)
    return folders


@pytest.mark.parametrize(
    ("how", "weights", "rank"),
    [
        ("linear", {"first": 0.7, "second": -0.3}, None),
        ("cat", {"first": 0.7, "second": -0.3, "third": 1.5}, None),
        ("svd", {"first": 0.7, "second": 0.3, "third": 1.5}, None),
        ("svd", {"first": 0.7, "third": -1.5}, 2),
    ],
)
def test_several_adapters_as_one(how, weights, rank, several, bases, opened, tmp_path):
    base, base_hash = opened["gqa"]
    named = [f"{several[name]}={weight}" for name, weight in weights.items()]
    result = export_combined(named, how, rank, str(bases["gqa"]), tmp_path / "out")
    first, *others = weights
    model = PeftModel.from_pretrained(torch_model(bases["gqa"]), several[first], adapter_name=first)
    for other in others:
        model.load_adapter(several[other], adapter_name=other)
    model.add_weighted_adapter(list(weights), list(weights.values()), "one", combination_type=how, svd_rank=rank)
    model.set_adapter("one")
    assert result["rank"] == model.peft_config["one"].r
    tokens = random_tokens(300)
    ours = logits(base, load_adapter(tmp_path / "out", base.cfg, base_hash, 0.0), tokens)
    assert_close(ours, torch_logits(model.eval(), tokens), 1e-4)
    assert np.abs(ours - logits(base, {}, tokens)).max() > 1e-2


@pytest.mark.parametrize(
    ("named", "how", "rank", "says"),
    [
        (["first=0.5", "third=0.5"], "linear", None, "one rank"),
        (["first=0.5", "dora=0.5"], "cat", None, "DoRA"),
        (["first=0.5", "second=half"], "cat", None, "FOLDER=WEIGHT"),
        (["first=0.5", "first=0.5"], "cat", None, "once"),
        (["first=nan"], "cat", None, "finite"),
        (["first=0.5"], "cat", 3, "--rank 3"),
    ],
)
def test_what_can_not_be_combined(named, how, rank, says, several, bases, tmp_path):
    paths = [str(several[one.partition("=")[0]]) + "=" + one.partition("=")[2] for one in named]
    with pytest.raises((ConfigError, ModelError), match=says) as caught:
        export_combined(paths, how, rank, str(bases["gqa"]), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
