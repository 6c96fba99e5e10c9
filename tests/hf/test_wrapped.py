"""The text model within a model that reads images, too: as transformers computes it, and back to where it was."""

import json

import numpy as np
import pytest
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from tiny import make_completions, make_tokenizer, write_config
from transformers import AutoModelForCausalLM
from wrapped import CLASSES, TEXT, make

from jlora.config import load_config
from jlora.errors import ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.families import WRAPPED_DEFAULTS as DEFAULTS
from jlora.hf.source import open_source
from jlora.training.export import export
from jlora.training.run import train


@pytest.mark.long
@pytest.mark.parametrize("name", CLASSES)
def test_from_import_to_merge(name, tmp_path, optimized):
    """The adapter is for the whole model, in which no other module gets one; the merged model reads text alone."""
    base = tmp_path / "base"
    model = make(base, name)
    make_tokenizer(base)
    tokens = random_tokens(290)
    assert_close(logits(open_base(base)[0], {}, tokens), torch_logits(model, tokens), 1e-4)
    data = {"format": "completion", "max_length": 64}
    lora = {"target_modules": "all-linear", "rank": 4}
    rows = make_completions(tmp_path / "rows.jsonl")
    cfg = load_config(write_config(tmp_path / "run.yaml", base, rows, tmp_path / "run", data=data, lora=lora))
    train(cfg, quiet=True)
    result = export(tmp_path / "run", tmp_path / "adapter", None, False, None, True)
    assert result["peft_relative_difference"] < 1e-4
    theirs = PeftModel.from_pretrained(CLASSES[name][1].from_pretrained(base), tmp_path / "adapter").eval()
    adapted = {path for path, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert adapted and all("language_model" in path for path in adapted)
    assert len(adapted) == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) // 2
    expected = torch_logits(theirs, tokens)
    assert np.abs(expected - torch_logits(model, tokens)).max() > 1e-3
    export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert type(merged).__name__ == open_source(base).config["architectures"][0]
    assert_close(torch_logits(merged, tokens), expected, 1e-4)


def test_names_of_tensors_in_either_order(tmp_path):
    """`language_model.model.` as published, and `model.language_model.` as the modules are called."""
    make(tmp_path / "base", "mistral3")
    tokens = random_tokens(290)
    expected = logits(open_base(tmp_path / "base")[0], {}, tokens)
    file = tmp_path / "base" / "model.safetensors"
    tensors, found = load_file(file), []
    bare = {name.replace("language_model.model.", "model.language_model."): array for name, array in tensors.items()}
    bare = {name.removeprefix("language_model.") if "lm_head" in name else name: bare[name] for name in bare}
    old = {name.replace("model.language_model.", "language_model.model."): array for name, array in bare.items()}
    old = {f"language_model.{name}" if name.startswith("lm_head") else name: array for name, array in old.items()}
    for named in (bare, old):
        save_file(named, file, metadata={"format": "pt"})
        found.append(sorted(named))
        np.testing.assert_array_equal(logits(open_base(tmp_path / "base")[0], {}, tokens), expected)
    assert found[0] != found[1]


@pytest.mark.parametrize("family", DEFAULTS)
def test_what_a_text_config_leaves_unsaid(family):
    """Published ones hold what differs from the defaults of transformers' class, and little else."""
    theirs = type(TEXT[{"gemma3_text": "gemma3", "mistral": "mistral3", "llama": "llava"}[family]])()
    assert {key: getattr(theirs, key) for key in DEFAULTS[family]} == DEFAULTS[family]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": None}, "has no text model to train"),
        ({"text_config": {"model_type": "gemma3n"}}, "text_config.model_type='gemma3n' is not supported in Mistral3"),
        (
            {"architectures": ["PaliGemmaForConditionalGeneration"]},
            "PaliGemmaForConditionalGeneration is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, changes, says):
    make(tmp_path / "base", "mistral3")
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    with pytest.raises(ModelError) as caught:
        parse_config(raw | changes, "here")
    assert says in str(caught.value) and "\n" not in str(caught.value)
