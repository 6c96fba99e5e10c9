"""Training, exporting and merging on a base that was published quantised."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from eight_devices import load_published, run_on_eight
from grown_adapters import make_run
from parity import logits, random_tokens, torch_logits
from peft import PeftModel
from published_bases import KINDS, make_base, rewrite, with_bitsandbytes
from safetensors.numpy import load_file
from tiny import make_completions, make_tokenizer, write_config
from transformers import AutoModelForCausalLM

from jlora.config import load_config
from jlora.hf import share
from jlora.hf.load import hash_base, load_base
from jlora.hf.names import name_table, to_hf
from jlora.hf.pretrained import warn_of_dequantising
from jlora.hf.source import base_fingerprint, open_source
from jlora.hf.weights import Dequantized
from jlora.model import quant
from jlora.model.sharding import one_device_mesh
from jlora.training.export import export
from jlora.training.run import train

FLOAT32 = jnp.dtype("float32")
# Four runs of blocks along inputs, for four devices.
WIDE: dict[str, Any] = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 64, "num_hidden_layers": 2, "initializer_range": 0.05},
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SKIPPED = ["lm_head", "model.layers.1.mlp", "q_proj"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("plain") / "base", **WIDE)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def nf4(plain: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder of nf4 that gives float32 back, and its weights."""
    folder = plain.parent / "nf4"
    weights = with_bitsandbytes(plain, folder, torch.float32, **NF4)
    make_tokenizer(folder)
    return folder, weights


def load(folder: Path, kind: str | None = None) -> tuple[Any, str]:
    return load_base(open_source(folder), str(folder), FLOAT32, one_device_mesh(), kind)


@pytest.mark.long
@pytest.mark.parametrize("skipped", [None, SKIPPED], ids=["all", "some"])
def test_nf4_is_kept_as_it_was_published(skipped: list[str] | None, plain: Path, tmp_path: Path) -> None:
    """Codes, absmaxes, second absmaxes and offset, bit for bit; what is not stored so is quantised as ever."""
    weights = with_bitsandbytes(plain, tmp_path, **NF4, llm_int8_skip_modules=skipped)
    tensors = load_file(tmp_path / "model.safetensors")
    decoder, digest = load(tmp_path, "nf4")
    source, quantised = open_source(tmp_path), load(plain, "nf4")[0]
    assert digest == hash_base(source, "base") == load(tmp_path)[1] != hash_base(open_source(plain), "base")
    by_rows = Dequantized(source, decoder.cfg, "nf4")
    kept = 0
    for name, entry in name_table(decoder.cfg).items():
        if not entry.leaf.endswith("_proj"):
            continue
        leaf = jax.tree.map(lambda x, i=entry.layer: x[i], getattr(decoder.layers, entry.leaf).get_value())
        dense = to_hf(entry, np.asarray(quant.dequantize(leaf, FLOAT32)))
        np.testing.assert_array_equal(by_rows.rows(name, entry, 0, entry.hf_shape[0]), dense)
        if name not in weights:
            other = jax.tree.map(lambda x, i=entry.layer: x[i], getattr(quantised.layers, entry.leaf).get_value())
            jax.tree.map(np.testing.assert_array_equal, leaf, other)
            continue
        kept += 1
        np.testing.assert_array_equal(dense, weights[name].numpy())
        (outputs, inputs), blocks = entry.hf_shape, entry.hf_shape[1] // 64
        np.testing.assert_array_equal(leaf.scales.reshape(blocks, outputs).T.reshape(-1), tensors[f"{name}.absmax"])
        second = np.repeat(np.asarray(leaf.second).reshape(-1, outputs), blocks // leaf.second.shape[0], axis=0)
        nested = tensors[f"{name}.nested_absmax"]
        np.testing.assert_array_equal(second.T.reshape(-1), np.repeat(nested, 256)[: second.size])
        state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
        assert leaf.offset == np.float32(state["nested_offset"])
        codes = np.asarray(quant.unpack(leaf.codes)).reshape(inputs, outputs).T.reshape(-1)
        np.testing.assert_array_equal(codes[::2] << 4 | codes[1::2], tensors[name].reshape(-1))
    assert kept == (14 if skipped is None else 9)


def test_logits_are_those_of_transformers_on_the_same_folder(nf4: tuple[Path, Any], plain: Path) -> None:
    fp8 = plain.parent / "fp8"
    rewrite(plain, fp8, *KINDS["fp8_blocks"])
    ids = random_tokens(300, length=40)
    for folder, kind in ((nf4[0], "nf4"), (nf4[0], None), (fp8, None)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
        if folder != fp8:  # which transformers dequantises where there is no GPU
            model = model.dequantize()  # bitsandbytes' matmul on CPUs rounds to bfloat16
        expected = torch_logits(model.float(), ids)
        np.testing.assert_allclose(logits(load(folder, kind)[0], {}, ids), expected, atol=1e-4, err_msg=str(folder))


@pytest.mark.long
def test_eight_devices_hold_their_shards_of_the_same_base(
    plain: Path, nf4: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {tmp_path / kind: "-" for kind in ("gptq_4_act_order", "awq")}
    for folder in folders:
        rewrite(plain, folder, *KINDS[folder.name])
    with_bitsandbytes(plain, tmp_path / "some", **NF4, llm_int8_skip_modules=SKIPPED)
    folders |= {nf4[0]: "nf4", tmp_path / "some": "nf4"}
    lines = run_on_eight(load_published, *(str(word) for pair in folders.items() for word in pair)).split("\n")
    monkeypatch.setattr(share, "BLOCK_WEIGHTS", 12_345)
    for line, (folder, kind) in zip(lines, folders.items(), strict=False):
        base, digest = load(folder, None if kind == "-" else kind)
        whole = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base))
        assert line == f"{hashlib.sha256(whole).hexdigest()} {digest}", folder.name  # bit for bit


def test_bases_that_differ_in_a_setting_have_other_hashes(plain: Path, tmp_path: Path) -> None:
    """The same bytes mean other weights in GPTQ's second format."""
    rewrite(plain, tmp_path / "one", *KINDS["gptq_4"])
    rewrite(plain, tmp_path / "two", KINDS["gptq_4"][0], KINDS["gptq_v2"][1])
    one, two = (open_source(tmp_path / name) for name in ("one", "two"))
    assert one.sizes == two.sizes and base_fingerprint(one) != base_fingerprint(two)
    assert hash_base(one, "base") != hash_base(two, "base")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nf4", "nf4_kept", "gptq_4_symmetric_bias"])
def test_a_run_exports_an_adapter_of_the_folder_and_merges_into_a_plain_model(
    kind: str, plain: Path, nf4: tuple[Path, Any], tmp_path: Path
) -> None:
    if kind.startswith("nf4"):
        folder, weights = nf4
    else:
        folder = tmp_path / "base"
        written = rewrite(plain, folder, *KINDS[kind])
        weights = {name: torch.from_numpy(open_source(folder).read(name)) for name in written}
    rows = make_completions(tmp_path / "rows.jsonl")
    data = {"format": "completion", "max_length": 64}
    path = write_config(tmp_path / "run.yaml", folder, rows, tmp_path / "run", data=data)
    cfg = load_config(path, ["training.max_steps=2"] + (["model.quantization=nf4"] if kind == "nf4_kept" else []))
    train(cfg, quiet=True)
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    result = export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False)
    assert result["logits_relative_difference"] < 1e-5
    assert result.get("merged_into") == ("dequantised nf4" if kind == "nf4_kept" else None)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in weights.items():
        changed = np.abs(merged[name] - weight.float().numpy()).max()
        assert 0 < changed < 0.05 if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj") else not changed
    # What PEFT makes of the adapter on the dequantised base, from the plain model's own config.
    ids = torch.arange(3, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    theirs.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(theirs, adapter)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_verified_on_the_weights_that_jlora_reads(
    dtype: str, nf4: tuple[Path, Any], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", nf4[0], f"model.dtype={dtype}", "model.quantization=nf4")
    result = export(run, tmp_path / "out", None, False, None, True)
    assert result["peft_relative_difference"] < 1e-4 and result["base_read_by"] == "jlora"


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_what_a_base_takes_that_is_dequantised_is_said(nf4, kind, capsys):
    warn_of_dequantising(open_source(nf4[0]), kind)
    said = capsys.readouterr().err
    assert ("published quantised (bitsandbytes)" in said and "model.quantization=nf4" in said) == (kind is None)
