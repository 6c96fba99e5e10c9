"""Which modules an adapter folder is for, and what else it may say or hold: as PEFT reads it, on the same base."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from adapter_options import torch_model
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny import make_llama

from jlora.config import Config, LoraSection
from jlora.data.tokens import Tokenizer
from jlora.errors import ModelError
from jlora.files import sandbox
from jlora.hf.adapter_config import CONFIG, read_adapter_config
from jlora.hf.adapters import first_adapter
from jlora.hf.peft import WEIGHTS, load_adapter, read_options
from jlora.hf.pretrained import Pretrained
from jlora.hf.source import open_source
from jlora.model.adapter import Adapter, Lora
from jlora.model.sharding import one_device_mesh

ATTENTION = "model.layers.{}.self_attn.{}_proj"


@pytest.fixture(scope="module", params=["untied", "tied"])
def either(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_llama(folder, tie_word_embeddings=request.param == "tied")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder)
    return folder


def write_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter of PEFT's own, every number of it random."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(torch_model(base), LoraConfig(**given))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    model.save_pretrained(folder)
    return folder


def change(folder: Path, **keys: Any) -> None:
    """Set keys of its configuration; of value `...`, take them out."""
    config = json.loads((folder / CONFIG).read_text()) | keys
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))


def read(base: Path, folder: Path) -> tuple[Adapter, np.ndarray]:
    """The adapter, and its logits, which are found to be PEFT's."""
    decoder, base_hash = open_base(base)
    adapter = load_adapter(folder, decoder.cfg, base_hash, 0.0, open_source(base))
    tokens = random_tokens(decoder.cfg.vocab_size)
    ours = logits(decoder, adapter, tokens)
    theirs = torch_logits(PeftModel.from_pretrained(torch_model(base), folder).eval(), tokens)
    assert_close(ours, theirs, 1e-4)
    assert np.abs(ours - logits(decoder, {}, tokens)).max() > 1e-2
    return adapter, ours


# What selects modules -> the layers of each projection that it selects, of three.
ALL = [0, 1, 2]
SELECTIONS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "a pattern": ({"target_modules": r".*\.self_attn\.(q_proj|v_proj)$"}, {"q_proj": ALL, "v_proj": ALL}),
    "a pattern of layers": ({"target_modules": r"model\.layers\.[02]\..*up_proj"}, {"up_proj": [0, 2]}),
    "a pattern of both": (
        {"target_modules": r".*(0\.self_attn\.q_proj|[12]\.mlp\.down_proj)"},
        {"q_proj": [0], "down_proj": [1, 2]},
    ),
    "paths": (
        {"target_modules": [ATTENTION.format(0, "q"), ATTENTION.format(2, "v"), "layers.1.self_attn.v_proj"]},
        {"q_proj": [0], "v_proj": [1, 2]},
    ),
    "ends of paths": ({"target_modules": ["self_attn.k_proj", "1.mlp.gate_proj"]}, {"k_proj": ALL, "gate_proj": [1]}),
    "excluded by a pattern": (
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"q_proj": [1, 2], "o_proj": [1, 2]},
    ),
    "excluded by names": (
        {"target_modules": "all-linear", "exclude_modules": ["gate_proj", "up_proj", "layers.1.self_attn.k_proj"]},
        {"q_proj": ALL, "k_proj": [0, 2], "v_proj": ALL, "o_proj": ALL, "down_proj": ALL},
    ),
    "names that the base lacks": ({"target_modules": ["q_proj", "W_pack", "c_attn"]}, {"q_proj": ALL}),
    "layers that the base lacks": ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, {"q_proj": [1]}),
    "a layer": ({"target_modules": ["q_proj"], "layers_to_transform": 2}, {"q_proj": [2]}),
    "layers, and a whole path": (
        {"target_modules": ["v_proj", ATTENTION.format(0, "q")], "layers_to_transform": [1]},
        {"q_proj": [0], "v_proj": [1]},
    ),
    "a pattern for where layers are": (
        {"target_modules": ["v_proj"], "layers_to_transform": [1], "layers_pattern": "lay.rs"},
        {"v_proj": [1]},
    ),
    "what is trained in full too": (
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        {"q_proj": ALL},
    ),
    "ranks of its own": (
        {"target_modules": r".*[01]\.self_attn\.q_proj", "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}},
        {"q_proj": [0, 1]},
    ),
    "magnitudes": ({"target_modules": r".*2\.self_attn\.[qk]_proj", "use_dora": True}, {"q_proj": [2], "k_proj": [2]}),
}


@pytest.mark.long
@pytest.mark.parametrize("name", SELECTIONS)
def test_modules_are_those_that_peft_selects(name, llama, tmp_path):
    options, expected = SELECTIONS[name]
    folder = write_adapter(llama, tmp_path / "adapter", **options)
    change(folder, **{key: options[key] for key in ("target_modules", "exclude_modules") if key in options})
    adapter, _ = read(llama, folder)
    found = {
        name: [layer for layer, rank in enumerate(part.ranks or (1, 1, 1)) if rank]
        for name, part in adapter.items()
        if isinstance(part, Lora)
    }
    assert found == expected


# Keys of a configuration that change nothing, with the keys that they stand for as the adapter was made.
DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no alpha": ({"lora_alpha": ...}, {"lora_alpha": 8}),
    "no rank": ({"r": ...}, {"r": 8}),
    "no targets": ({"target_modules": ...}, {}),
    "targets that are null": ({"target_modules": None}, {}),
    "of an early version": ({"merge_weights": True, "enable_lora": None}, {}),
    "transposed weights": ({"fan_in_fan_out": True}, {}),
    "tied weights, of which it trains none": ({"ensure_weight_tying": True}, {}),
}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_configuration_leaves_out_or_says_in_vain(name, llama, tmp_path, capsys):
    changes, made = DEFAULTS[name]
    folder = write_adapter(llama, tmp_path / "adapter", **made)
    change(folder, **changes)
    read(llama, folder)
    warned = "fan_in_fan_out is taken as false" in capsys.readouterr().err
    assert warned == ("fan_in_fan_out" in changes)


# How trainers that save a model's own state name tensors: PEFT's own ends, and what stands there.
OWN_STATE = {
    "magnitudes of a module": {"lora_magnitude_vector": "lora_magnitude_vector.weight"},
    "an adapter's name": {
        "lora_A.weight": "lora_A.default.weight",
        "lora_B.weight": "lora_B.default.weight",
        "lora_magnitude_vector": "lora_magnitude_vector.default.weight",
    },
    "the name on some": {"lora_B.weight": "lora_B.default.weight"},
}


@pytest.mark.parametrize("name", OWN_STATE)
def test_tensors_under_the_names_of_a_models_own_state(name, llama, tmp_path):
    folder = write_adapter(llama, tmp_path / "adapter", use_dora=True)
    saved, renamed = load_file(folder / WEIGHTS), {}
    for own, tensor in saved.items():
        end = next((end for end in OWN_STATE[name] if own.endswith(end)), "")
        renamed[own.removesuffix(end) + OWN_STATE[name].get(end, "")] = tensor
    assert len(saved.keys() - renamed.keys()) == 6 * len(OWN_STATE[name])
    save_file(renamed, folder / WEIGHTS, {"format": "pt"})
    read(llama, folder)
    save_file(saved | renamed, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match="holds a tensor under two names"):
        read(llama, folder)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an adapter of MLX": ({"peft_type": None, "fine_tune_type": "lora"}, "peft_type is None; only LORA adapters"),
    "no such module": ({"target_modules": ["c_attn", "W_pack"]}, "selects no module of this base"),
    "a pattern of none": ({"target_modules": "q_proj"}, "selects no module of this base"),
    "all excluded": ({"exclude_modules": ["v_proj", "q_proj"]}, "exclude_modules=['v_proj', 'q_proj'] selects no"),
    "no name": ({"target_modules": []}, "selects no module of this base"),
    "a head": ({"target_modules": ["q_proj", "lm_head"]}, "selects lm_head, but adapters are computed for q_proj"),
    "an embedding": ({"target_modules": ".*(q_proj|embed_tokens)"}, "selects model.embed_tokens, but"),
    "all of a block": ({"target_modules": ".*layers.1.*"}, "selects model.layers.1, but"),
    "no pattern": ({"target_modules": "(q_proj"}, "target_modules holds '(q_proj', which is no regular expression"),
    "no such exclusion": ({"exclude_modules": "["}, "exclude_modules holds '[', which is no regular expression"),
    "a number": ({"exclude_modules": 3}, "exclude_modules=3 is not a list of names"),
    "numbers": ({"target_modules": [3]}, "target_modules=[3] is not a list of names"),
    "layers by name": ({"layers_to_transform": ["1"]}, "layers_to_transform=['1'] is neither"),
    "layers of a pattern": ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "write the layers into it"),
    "layers elsewhere": ({"layers_to_transform": [1], "layers_pattern": "h"}, "layers_pattern='h' selects no module"),
    "null": ({"r": None}, "rank"),
    "tied copies": ({"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, "ensure_weight_tying with"),
    "biases of some": ({"bias": "lora_only", "layers_to_transform": [1]}, "bias=lora_only is supported only where"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name, llama, tmp_path):
    changes, says = REFUSED[name]
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]} | changes))
    with pytest.raises(ModelError) as caught:
        read_adapter_config(folder, open_source(llama).model)
    message = str(caught.value)
    assert says in message and str(folder / CONFIG) in message and "\n" not in message and "Error(" not in message


@pytest.mark.long
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_never_ends_is_stopped(key, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    pattern = "(.*a?)*" * 6 + "!"
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", key: {pattern: 2} if key.endswith("_pattern") else pattern}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ModelError, match="takes more than"):
        read_adapter_config(folder, open_source(llama).model)


# Tables beside an adapter: which, by how much they differ from the base's.
BESIDE = {
    "the embedding, as it was": {"embed_tokens": 0.0},
    "both, as they were": {"embed_tokens": 0.0, "lm_head": 0.0},
    "another embedding": {"embed_tokens": 0.1},
    "another head": {"lm_head": 0.1},
    "two others": {"embed_tokens": 0.1, "lm_head": 0.2},
    "another embedding, the head as it was": {"embed_tokens": 0.1, "lm_head": 0.0},
}


def put_beside(base: Path, folder: Path, name: str) -> None:
    """Write the tables into the adapter's file, by PEFT's names."""
    tensors, tables = load_file(folder / WEIGHTS), load_file(base / "model.safetensors")
    for leaf, spread in BESIDE[name].items():
        of_base = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}[leaf]
        table = tables.get(of_base, tables["model.embed_tokens.weight"])
        moved = table + np.random.default_rng(1).normal(0, 1, table.shape) * spread
        tensors[f"base_model.model.{of_base}"] = moved.astype(np.float32)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.long
@pytest.mark.parametrize("name", BESIDE)
def test_an_embedding_or_head_beside_the_adapter_is_used(name, either, tmp_path):
    folder = write_adapter(either, tmp_path / "adapter")
    put_beside(either, folder, name)
    adapter, ours = read(either, folder)
    changed = max(BESIDE[name].values()) > 0
    assert ({"embed_tokens", "lm_head"} & adapter.keys() != set()) == changed
    decoder, base_hash = open_base(either)
    blind = load_adapter(folder, decoder.cfg, base_hash, 0.0)  # without the base's own to compare with
    np.testing.assert_allclose(logits(decoder, blind, random_tokens(decoder.cfg.vocab_size)), ours, atol=1e-6, rtol=0)


def test_an_embedding_beside_and_a_head_trained_in_full(either, tmp_path):
    folder = write_adapter(either, tmp_path / "adapter", modules_to_save=["lm_head"])
    put_beside(either, folder, "another embedding")
    read(either, folder)


def test_a_table_of_another_vocabulary_is_refused_by_name(llama, tmp_path):
    folder = write_adapter(llama, tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS) | {"base_model.model.lm_head.weight": np.zeros((303, 48), np.float32)}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head.weight of \[303, 48\], but the base has 300 rows.*was resized"):
        read_options(folder, open_source(llama).model)


def test_weights_as_a_pickle_alone_are_told_from_missing_ones(llama, tmp_path):
    folder = write_adapter(llama, tmp_path / "adapter")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"holds adapter_model.bin, a pickle.* convert it to adapter_model.safetens"):
        load_adapter(folder, open_source(llama).model, "hash", 0.0)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match=r"adapter_model.safetensors: missing"):
        load_adapter(folder, open_source(llama).model, "hash", 0.0)


# Starting from an adapter: what it selects -> what the config has to say, or why it cannot.
STARTS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "a pattern of all layers": (SELECTIONS["a pattern"][0], {}, None),
    "and layers by number": (SELECTIONS["a pattern"][0], {"layers_to_transform": [2, 1, 0]}, None),
    "a pattern of layers": (
        SELECTIONS["a pattern of layers"][0],
        {"target_modules": ["up_proj"], "layers_to_transform": [2, 0]},
        None,
    ),
    "layers that are not said": (
        SELECTIONS["a pattern of layers"][0],
        {"target_modules": ["up_proj"]},
        r"layers_to_transform=\[0, 2\], the config null; set lora.layers_to_transform=\[0, 2\]",
    ),
    "layers that differ": (SELECTIONS["paths"][0], {}, r"different layers \(q_proj on 0; v_proj on 1, 2\)"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_run_can_start_from_what_a_config_can_say(name, llama, tmp_path):
    options, section, says = STARTS[name]
    folder = write_adapter(llama, tmp_path / "adapter", **options)
    lora = {"rank": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_from": str(folder)} | section
    decoder, base_hash = open_base(llama)
    pretrained = Pretrained("base", llama, open_source(llama), decoder, base_hash, Mock(Tokenizer))
    cfg = Mock(Config, method="lora", lora=LoraSection(**lora))
    if says is None:
        first_adapter(cfg, pretrained, one_device_mesh())
        return
    with pytest.raises(ModelError, match=says):
        first_adapter(cfg, pretrained, one_device_mesh())
