"""Base models on disk: every spelling that is read, every refusal, and full checkpoints written back."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from parity import assert_close, logits, open_base, random_tokens, torch_logits
from ropes import LONG_ROPE
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tiny import LLAMA3_ROPE, copy_folder, make_llama
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig

from jlora.errors import ModelError
from jlora.files.atomic import new_folder
from jlora.hf import weights
from jlora.hf.architecture import parse_config
from jlora.hf.source import check_names, open_source, resolve
from jlora.hf.weights import Trained, save_checkpoint
from jlora.model.rope import Rope

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
KEY = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_llama(folder, shard="100KB")
    return folder


def assert_same(first, second) -> None:
    chex.assert_trees_all_equal(first, second)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; a value of ... takes the key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# What is read


def test_sharded_equals_single(single, sharded):
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    (one, one_hash), (many, many_hash) = open_base(single), open_base(sharded)
    assert_same(one, many)
    assert one_hash == many_hash


def test_hash_is_of_the_tensors(single, tmp_path):
    folder = copy_folder(single, tmp_path / "changed")
    edit_config(folder, rope_theta=777.0, rope_parameters=...)
    assert open_base(folder)[1] == open_base(single)[1]
    edit_tensors(folder, lambda t: t.update({KEY: np.nextafter(t[KEY], np.float32(9), dtype=np.float32)}))
    assert open_base(folder)[1] != open_base(single)[1]


@pytest.mark.long
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_stored_dtypes(stored, single, tmp_path):
    """Wider than stored is exact; bfloat16 rounds to the nearest, as torch does."""
    folder = copy_folder(single, tmp_path / "stored")
    tensors = {name: tensor.to(stored) for name, tensor in load_torch(single / WEIGHTS).items()}
    save_torch(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for dtype, theirs in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        base, _ = open_base(folder, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype(dtype)}
        ours = np.asarray(base.layers.up_proj[...][1], np.float32)
        np.testing.assert_array_equal(ours.T, tensors[KEY].to(theirs).float())
        ours = np.asarray(base.layers.q_proj[...][2], np.float32).reshape(48, 60)
        np.testing.assert_array_equal(ours.T, tensors["model.layers.2.self_attn.q_proj.weight"].to(theirs).float())
        np.testing.assert_array_equal(
            np.asarray(base.lm_head[...], np.float32), tensors["lm_head.weight"].to(theirs).float()
        )


def test_both_spellings_of_the_config(single):
    raw = json.loads((single / "config.json").read_text())
    bare = {key: value for key, value in raw.items() if key not in ("rope_parameters", "dtype")}
    llama3 = LLAMA3_ROPE | {"original_max_position_embeddings": 64}
    for scaling in (None, llama3, {"rope_type": "linear", "factor": 3.0}):
        five = bare | {
            "dtype": "float32",
            "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": 523.0},
        }
        four = bare | {"torch_dtype": "float32", "rope_theta": 523.0, "rope_scaling": scaling}
        assert parse_config(five, "here") == parse_config(four, "here")
        cfg = parse_config(four, "here")
        assert cfg.ropes[0].theta == 523.0 and (cfg.ropes[0].scaling is None) == (scaling is None)
        if scaling:
            older = scaling | {"type": scaling["rope_type"]}
            del older["rope_type"]
            assert parse_config(four | {"rope_scaling": older}, "here") == cfg
            # transformers 5 also takes the new dict by the old name; its theta goes before the config's.
            mixed = bare | {"rope_theta": 1.5, "rope_scaling": five["rope_parameters"]}
            assert parse_config(mixed, "here") == cfg
            assert LlamaConfig(**mixed).rope_parameters["rope_theta"] == 523.0


def test_defaults_are_those_of_transformers():
    """A key that config.json leaves out has transformers' value."""
    raw = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "vocab_size": 100}
    ours, theirs = parse_config(raw, "here"), LlamaConfig(**raw)
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.ropes == (Rope(theirs.rope_parameters["rope_theta"], 16, None),)
    assert parse_config(raw | {"head_dim": None, "rope_scaling": None, "num_key_value_heads": None}, "here") == ours
    llama3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "original_max_position_embeddings"}
    cfg = parse_config(raw | {"rope_scaling": llama3, "max_position_embeddings": 512}, "here")
    assert cfg.ropes[0].scaling.original_max_position_embeddings == 512


def test_defaults_of_mistral_are_those_of_transformers():
    """It has 8 key/value heads and a window of 4096 where the keys are missing, and no window where that is null."""
    raw = {"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 16, "intermediate_size": 96}
    raw |= {"num_hidden_layers": 2, "vocab_size": 100}
    dynamic = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    for more in ({}, {"sliding_window": None}, {"num_key_value_heads": 4}, {"sliding_window": 7}):
        ours, theirs = parse_config(raw | dynamic | more, "here"), MistralConfig(**(raw | dynamic | more))
        for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
            assert getattr(ours, name) == getattr(theirs, name), (name, more)
        assert ours.norm_eps == theirs.rms_norm_eps and ours.windows == (theirs.sliding_window,)
        (rope,) = ours.ropes
        assert rope.theta == theirs.rope_parameters["rope_theta"]
        assert rope.scaling.max_position_embeddings == theirs.max_position_embeddings
    llama = parse_config(raw | {"model_type": "llama", "sliding_window": 7}, "here")  # which does not read it
    assert llama.windows == (None,) and llama.num_key_value_heads == 16
    with pytest.raises(ModelError, match="sliding_window must be a positive integer, not 0"):
        parse_config(raw | {"sliding_window": 0}, "here")


def test_redundant_tensors_are_ignored(tmp_path):
    """A tied head that is stored too, and the rotary buffers of old checkpoints."""
    make_llama(tmp_path / "tied", tie_word_embeddings=True)
    more = copy_folder(tmp_path / "tied", tmp_path / "more")

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)

    edit_tensors(more, add)
    (tied, tied_hash), (redundant, redundant_hash) = open_base(tmp_path / "tied"), open_base(more)
    assert_same(tied, redundant)
    assert tied_hash == redundant_hash


# What is refused


def refused(folder: Path, *says: str) -> None:
    """One sentence of ModelError with all of `says`."""
    with pytest.raises(ModelError) as caught:
        open_base(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert all(text in message for text in says), message


def test_wrong_tensors_in_one_error(single, tmp_path):
    folder = copy_folder(single, tmp_path / "bad")

    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.2.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(60, np.float32)
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((88, 48), np.float32)
        tensors[KEY] = np.ascontiguousarray(tensors[KEY].T)

    edit_tensors(folder, change)
    refused(
        folder,
        *("2 missing (model.norm.weight, model.layers.2.self_attn.q_proj.weight)", "2 unknown (", "q_proj.bias"),
        *("layers.3.mlp.up_proj", f"1 misshapen ({KEY} [48, 88] instead of [88, 48])"),
    )


def test_names_are_listed_in_part(single):
    cfg = parse_config(open_source(single).config, "here")
    with pytest.raises(ModelError, match=r"30 missing \(model.embed_tokens.weight, [^,]*, [^,]*, \.\.\.\)$"):
        check_names(cfg, {}, "here")


CONFIG_REFUSALS = [
    ("architectures", ["MistralForCausalLM"], "MistralForCausalLM"),
    ("architectures", "LlamaForCausalLM", "architecture"),
    ("architectures", ["LlamaForCausalLM", 7], "7"),
    ("model_type", "mistral", "model_type='mistral'"),
    ("model_type", ..., "model_type=None"),
    ("attention_bias", True, "12 missing (model.layers.0.self_attn.q_proj.bias"),
    ("attention_bias", "yes", "attention_bias='yes'"),
    ("mlp_bias", True, "9 missing (model.layers.0.mlp.gate_proj.bias"),
    ("hidden_act", "relu2", "hidden_act='relu2'"),
    ("attention_dropout", "0.1", "attention_dropout must be a number from 0 to 1"),
    ("attention_dropout", 1, "attention_dropout must be a number from 0 to 1"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("quantization_config", {"quant_method": "aqlm"}, "quantization_config"),
    ("architectures", ["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
    ("architectures", ["mistralmodel"], "mistralmodel"),
    ("rope_parameters", {"rope_type": "yarn", "factor": "2", "rope_theta": 1e4}, "rope_scaling.factor"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "truncate": None}, "rope_scaling.truncate"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "rope_scaling.beta_fast"),
    ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0}, "rope_scaling.attention_factor"),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4}, "rope_scaling.factor"),
    ("rope_scaling", {"type": "ntk", "factor": 2.0}, "'ntk'"),
    ("rope_scaling", {"type": "longrope", "factor": 2.0}, "rope_scaling.short_factor must be a list of 5 numbers"),
    ("rope_scaling", LONG_ROPE | {"long_factor": [1.0]}, "rope_scaling.long_factor must be a list of 5 numbers"),
    ("rope_scaling", LONG_ROPE | {"long_factor": [1, 2, 3, 4, "5"]}, "rope_scaling.long_factor must be a positive"),
    ("rope_scaling", {"type": "linear"}, "rope_scaling.factor"),
    ("rope_scaling", {"type": "linear", "factor": 0}, "rope_scaling.factor"),
    ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling.factor"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0}, "rope_scaling.low_freq_factor"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "rope_scaling.high_freq_factor"),
    ("rope_scaling", LLAMA3_ROPE | {"original_max_position_embeddings": "8k"}, "original_max_position_embeddings"),
    ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "rope_scaling.partial_rotary_factor"),
    ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}, "rope_scaling.full_attention"),
    ("rope_scaling", "linear", "rope_scaling"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 0}, "rope_theta"),
    ("rope_parameters", {"rope_type": "default", "rope_theta": "1e4"}, "rope_theta"),
    ("num_hidden_layers", 0, "num_hidden_layers"),
    ("num_hidden_layers", ..., "num_hidden_layers"),
    ("num_hidden_layers", "3", "num_hidden_layers"),
    ("hidden_size", 48.0, "hidden_size"),
    ("vocab_size", -1, "vocab_size"),
    ("vocab_size", True, "vocab_size"),
    ("num_attention_heads", None, "num_attention_heads"),
    ("num_key_value_heads", 4, "6 heads of 10 with 4 key/value heads"),
    ("head_dim", 9, "6 heads of 9"),
    ("rms_norm_eps", "1e-6", "rms_norm_eps"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("tie_word_embeddings", "false", "tie_word_embeddings"),
    ("tie_word_embeddings", True, None),  # then the head is redundant: accepted
    ("num_hidden_layers", 4, "9 missing"),
]


@pytest.mark.parametrize(("field", "value", "says"), CONFIG_REFUSALS, ids=str)
def test_config_refusals(field, value, says, single, tmp_path):
    folder = copy_folder(single, tmp_path / "bad")
    edit_config(folder, **{field: value})
    if says is None:
        open_base(folder)
    else:
        refused(folder, says)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1}', "\x00\xff"])
def test_config_that_is_none(text, single, tmp_path):
    folder = copy_folder(single, tmp_path / "bad")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refused(folder)


def test_missing_files(single, sharded, tmp_path, monkeypatch):
    for name in ("config.json", WEIGHTS):
        folder = copy_folder(single, tmp_path / name)
        (folder / name).unlink()
        refused(folder, name)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, "pickled, so convert them to safetensors once")
    folder = copy_folder(sharded, tmp_path / "shards")
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(folder, gone.name, "missing")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match="no such folder"):
        resolve(str(tmp_path / "absent"))


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/model.safetensors", "a/model.safetensors"])
def test_index_stays_in_the_folder(outside, single, sharded, tmp_path):
    """What lies there is a good file, so that only its place can be the reason."""
    folder = copy_folder(sharded, tmp_path / "bad")
    for place in (tmp_path, folder / "a"):
        place.mkdir(exist_ok=True)
        shutil.copyfile(single / WEIGHTS, place / WEIGHTS)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][KEY] = outside
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, outside, "outside the folder")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", '{"weight_map": {}}'])
def test_bad_index(content, sharded, tmp_path):
    folder = copy_folder(sharded, tmp_path / "bad")
    (folder / INDEX).write_text(content)
    refused(folder)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_file(size, single, tmp_path):
    folder = copy_folder(single, tmp_path / "bad")
    (folder / WEIGHTS).write_bytes((single / WEIGHTS).read_bytes()[:size])
    refused(folder, WEIGHTS, "cut short or damaged")


def test_damaged_header_is_never_a_crash(single, tmp_path):
    """Random bytes over the header: what is not noticed by the reader must be by the name table."""
    content = (single / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    cfg = parse_config(open_source(single).config, "here")
    folder = copy_folder(single, tmp_path / "bad")
    draw = np.random.default_rng(0)
    caught = 0
    for number in range(150):
        damaged = bytearray(content)
        for _ in range(1 + number % 3):
            damaged[draw.integers(8 if number % 2 else 0, header if number % 2 else 8)] = draw.integers(256)
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            source = open_source(folder)
            check_names(cfg, source.shapes, str(folder))
        except ModelError as error:
            assert "\n" not in str(error)
            caught += 1
    assert caught > 130  # the others fell into the metadata, or wrote what stood there


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("name", [KEY, "model.embed_tokens.weight"])
def test_non_finite_weight(value, name, single, tmp_path):
    folder = copy_folder(single, tmp_path / "bad")

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][3, 4] = value

    edit_tensors(folder, change)
    refused(folder, name, "NaN or infinity")


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_, ml_dtypes.float8_e4m3fn])
def test_tensor_that_is_no_float(dtype, single, tmp_path):
    folder = copy_folder(single, tmp_path / "bad")
    edit_tensors(folder, lambda tensors: tensors.update({KEY: np.zeros((88, 48), dtype)}))
    refused(folder, KEY, "only 16, 32 and 64-bit floats")


# What is written


def write(folder: Path, origin: Path, dtype: str) -> None:
    """`origin` read and written again."""
    base, _ = open_base(origin)

    def add_files(temporary):
        (temporary / "tokenizer.json").write_text("{}")

    with new_folder(folder) as made:
        save_checkpoint(made, base.cfg, Trained(base), open_source(origin).config, dtype, add_files)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_exact(tied, tmp_path):
    model = make_llama(tmp_path / "from", tie_word_embeddings=tied, rope_parameters=LLAMA3_ROPE | {"rope_theta": 523.0})
    write(tmp_path / "to", tmp_path / "from", "float32")
    before, after = load_file(tmp_path / "from" / WEIGHTS), load_file(tmp_path / "to" / WEIGHTS)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    assert open_base(tmp_path / "from")[1] == open_base(tmp_path / "to")[1]
    tokens = random_tokens(300)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "to").eval()
    np.testing.assert_array_equal(torch_logits(theirs, tokens), torch_logits(model, tokens))
    assert_close(logits(open_base(tmp_path / "to")[0], {}, tokens), torch_logits(model, tokens), 1e-4)
    files = {file.name: file.stat().st_mode & 0o044 for file in (tmp_path / "to").iterdir()}
    assert set(files) == {"config.json", WEIGHTS, "tokenizer.json"} and len(set(files.values())) == 1


def test_shards(single, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 60_000)
    write(tmp_path / "to", single, "float32")
    shards = sorted((tmp_path / "to").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    assert len(shards) > 4
    assert [shard.name for shard in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert all(size <= 60_000 or len(load_file(shard)) == 1 for shard, size in zip(shards, sizes, strict=True))
    index = json.loads((tmp_path / "to" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert held == index["weight_map"]
    assert_same(open_base(tmp_path / "to")[0], open_base(single)[0])
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "to").state_dict()
    for name, tensor in load_torch(single / WEIGHTS).items():
        assert torch.equal(theirs[name], tensor)


@pytest.mark.parametrize(("dtype", "theirs"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_written_in_half_precision(dtype, theirs, single, tmp_path):
    write(tmp_path / "to", single, dtype)
    config = json.loads((tmp_path / "to" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    exact, found = load_torch(single / WEIGHTS), load_torch(tmp_path / "to" / WEIGHTS)
    assert exact.keys() == found.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, exact[name].to(theirs))
    assert LlamaForCausalLM.from_pretrained(tmp_path / "to", dtype="auto").dtype == theirs


def test_failure_leaves_no_checkpoint(single, tmp_path):
    base, _ = open_base(single)
    save = partial(
        save_checkpoint, cfg=base.cfg, config={"model_type": "llama"}, dtype="float32", add_files=lambda folder: None
    )

    class Broken(Trained):
        def rows(self, name, entry, start, stop):
            return super().rows(name, entry, start, stop) if entry.layer is None else 1 / 0

    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "to") as folder:
        save(folder, weights=Broken(base))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_usual_mode(umask, tmp_path):
    """Some versions of safetensors write files that only their owner may read."""
    old = os.umask(umask)
    try:
        with new_folder(tmp_path / "final") as folder:
            (folder / WEIGHTS).touch(0o600)
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert (tmp_path / "final" / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~umask
