"""An embedding with rows for tokens that were added: as transformers resizes it, and the same again by itself."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from command_line import one_sentence, sentence_of
from families import make_family
from gguf import GGMLQuantizationType
from gguf_files import write as write_gguf
from grown_bases import ADDED, GROWN, VOCAB, add_tokens, grown_config, resized
from parity import assert_close, logits, random_tokens, torch_logits
from safetensors import safe_open
from tiny import copy_folder, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from jlora.errors import ModelError
from jlora.hf.adapters import embedding_rows
from jlora.hf.grown import Grown
from jlora.hf.load import hash_base, load_base
from jlora.hf.planned import shape_of
from jlora.hf.pretrained import open_pretrained
from jlora.hf.source import base_fingerprint, open_source
from jlora.inference.model import open_adapted
from jlora.model.sharding import one_device_mesh
from jlora.training.export import export
from jlora.training.run import train

FLOAT32 = jnp.dtype("float32")


def tables(model) -> list[np.ndarray]:
    both = model.get_input_embeddings(), model.get_output_embeddings()
    return [module.weight.detach().float().numpy() for module in both[: 2 - model.config.tie_word_embeddings]]


def ours(decoder) -> list[np.ndarray]:
    both = [decoder.embed_tokens] + ([] if decoder.cfg.tie_word_embeddings else [decoder.lm_head])
    return [np.asarray(param[...].astype(jnp.float32)) for param in both]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_those_of_transformers(dtype, base, tokenizer, tmp_path):
    """It draws them around the mean, with 3e-5 of the deviation of the others."""
    folder = copy_folder(base, tmp_path / "base")
    if dtype == "bfloat16":
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    opened = open_pretrained(str(folder), str(tokenizer), None, True)
    assert isinstance(opened.source, Grown)
    decoder, _ = load_base(opened.source, "base", FLOAT32, one_device_mesh())
    assert decoder.cfg.vocab_size == opened.model.vocab_size == opened.source.config["vocab_size"] == GROWN
    theirs, before = resized(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for found, wanted, old in zip(ours(decoder), tables(theirs), tables(before), strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_array_equal(found[:VOCAB], old)
        np.testing.assert_allclose(found[VOCAB:], np.tile(old.mean(0), (GROWN - VOCAB, 1)), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found[VOCAB:], wanted[VOCAB:], rtol=0, atol=2e-4 * old.std())
        assert np.abs(found[VOCAB:]).mean() > 0.02 * old.std()
    tokens = random_tokens(GROWN)
    tokens[0, :4] = range(VOCAB, GROWN)
    both = theirs.get_input_embeddings(), theirs.get_output_embeddings()
    for module, found in zip(both, ours(decoder), strict=False):  # without its noise
        module.weight.data[VOCAB:] = torch.tensor(found[VOCAB:])
    assert_close(logits(decoder, {}, tokens), torch_logits(theirs, tokens), 1e-4)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "gpt2_tied", "gemma3"])
def test_families_grow_alike(name, tmp_path):
    model = make_family(tmp_path / "base", name)
    old = model.config.vocab_size
    grown = Grown(open_source(tmp_path / "base"), old + 3)
    decoder, _ = load_base(grown, "base", FLOAT32, one_device_mesh())
    theirs = resized(tmp_path / "base", old + 3)
    for found, wanted in zip(ours(decoder), tables(theirs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 * wanted.std())


def test_nothing_grows_where_there_are_rows_for_all(base):
    plain = open_pretrained(str(base), None, None)
    asked = open_pretrained(str(base), None, None, True)
    assert not isinstance(asked.source, Grown) and asked.tokenizer.digest == plain.tokenizer.digest
    assert base_fingerprint(asked.source) == base_fingerprint(plain.source)


def test_a_base_with_rows_is_another_base_and_the_same_again(base, tokenizer):
    plain = open_pretrained(str(base), None, None).source
    first, again = (open_pretrained(str(base), str(tokenizer), None, True).source for _ in range(2))
    assert base_fingerprint(first) == base_fingerprint(again) != base_fingerprint(plain)
    assert hash_base(first, "base") == hash_base(again, "base") != hash_base(plain, "base")
    assert hash_base(Grown(plain, GROWN + 1), "base") != hash_base(first, "base")


def test_tokens_outside_are_named_without_the_key(base, tokenizer, tmp_path):
    add_tokens(tmp_path / "own", [])
    make_tokenizer(tmp_path / "own", VOCAB + 5)
    said = sentence_of(ModelError, open_pretrained, str(base), str(tmp_path / "own"), None)
    assert "has 305 tokens, but the model" in said and "model.resize_embeddings=true" in said
    assert "5 tokens ('<extra_41>', '<extra_42>', '<extra_43>', ...)" in said
    assert open_pretrained(str(base), str(tmp_path / "own"), None, True).model.vocab_size == VOCAB + 5
    beyond = open_pretrained(str(base), str(tokenizer), None).tokenizer
    said = beyond.beyond([1, VOCAB + 1])
    assert "'<|result|>' (id 301) has no row in the model's embedding of 300" in said
    assert "lacks 4 tokens ('<|call|>', '<|result|>', '<|done|>', ...)" in said and "model.resize_embeddings" in said
    assert open_pretrained(str(base), str(tokenizer), None, True).tokenizer.beyond([GROWN - 1]) is None
    make_tokenizer(tmp_path / "other", 5 * VOCAB)
    assert "belongs to the model" in sentence_of(
        ModelError, open_pretrained, str(base), str(tmp_path / "other"), None, True
    )


@pytest.fixture(scope="module")
def run(base, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    cfg = grown_config(folder, base, tokenizer, "training.save_every=2", "data.eval=0.2")
    summary = train(cfg, quiet=True)
    assert summary["status"] == "finished" and summary["rows"]["used"] > 0
    return folder / "run"


def test_a_run_resumes_on_the_same_rows(base, tokenizer, run, tmp_path):
    same = f"data.train={run.parent / 'rows.jsonl'}"
    cfg = grown_config(tmp_path, base, tokenizer, "training.save_every=2", "data.eval=0.2", same)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "summary.json").unlink()
    train(cfg, quiet=True)
    whole, resumed = (
        {line["step"]: line["loss"] for line in map(json.loads, (each / "metrics.jsonl").read_text().splitlines())
         if "loss" in line}
        for each in (run, tmp_path / "run")
    )  # fmt: skip
    assert whole == resumed and len(whole) == 4
    without = cfg.model_copy(update={"model": cfg.model.model_copy(update={"resize_embeddings": False})})
    assert "model.resize_embeddings: True -> False" in sentence_of(ModelError, train, without, quiet=True)


def test_an_adapter_finds_its_rows_by_itself(base, run, tmp_path):
    """From the run, and from its PEFT folder alone, which has the tokenizer that they are for."""
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert embedding_rows(tmp_path / "adapter") == GROWN
    both = [open_adapted(str(base), str(folder), dtype="float32") for folder in (run, tmp_path / "adapter")]
    tokens = random_tokens(GROWN)
    first, second = (logits(each.pretrained.base, each.adapter, tokens) for each in both)
    np.testing.assert_array_equal(first, second)
    for each in both:
        assert each.pretrained.tokenizer.encode(ADDED[2]) == [VOCAB + 2]


@pytest.mark.long
def test_commands_take_the_base_with_its_rows(base, run, here, tmp_path):
    code, out, err = here("generate", "--adapter", run, "--prompt", f"say {ADDED[0]}", "--max-new-tokens", 3, "--json")
    assert code == 0 and json.loads(out), err
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "say", "completion": ADDED[1]}))
    code, out, err = here("evaluate", "--adapter", run, "--data", rows, "--json", "-q")
    assert code == 0 and json.loads(out)["rows"] == 1, err
    code, out, err = here("evaluate", "--base", base, "--tokenizer", run / "adapter", "--data", rows, "--format",
                          "completion")  # fmt: skip
    assert code == 3 and "model.resize_embeddings" in one_sentence(err)


@pytest.mark.long
def test_exports_are_proved_in_peft_and_transformers(base, run, tmp_path):
    found = export(run, tmp_path / "adapter", None, False, None, True)
    assert found["peft_relative_difference"] < 1e-5 and found["base_read_by"] == "transformers"
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "np") as file:
        assert file.metadata()["jlora_embedding_rows"] == str(GROWN)
    export(run, tmp_path / "merged", None, True, "float32", False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert model.config.vocab_size == GROWN and len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == GROWN
    adapted = open_adapted(str(base), str(run), dtype="float32")
    tokens = random_tokens(GROWN)
    assert_close(logits(adapted.pretrained.base, adapted.adapter, tokens), torch_logits(model, tokens), 1e-4)


TRAINED = ["method=full", "lora.modules_to_save=[embed_tokens,lm_head]", "model.quantization=nf4"]


@pytest.mark.long
@pytest.mark.parametrize("key", TRAINED)
def test_what_else_is_trained_or_held(key, base, tokenizer, tmp_path):
    cfg = grown_config(tmp_path, base, tokenizer, key)
    assert train(cfg, quiet=True)["status"] == "finished"
    if key.startswith("model.quantization"):
        found = export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False)
        assert found["merged_into"] == "dequantised nf4"
        return
    if key.startswith("lora"):
        found = export(tmp_path / "run", tmp_path / "adapter", None, False, None, True)
        assert found["peft_relative_difference"] < 1e-5
    export(tmp_path / "run", tmp_path / "merged", None, True, "float32", False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    old = tables(AutoModelForCausalLM.from_pretrained(base))[0]
    new = tables(model)[0]
    assert model.config.vocab_size == len(new) == GROWN
    assert np.abs(new[VOCAB] - old.mean(0)).max() > 1e-4, "the row of a token that the rows have was not trained"


def test_a_gguf_file_grows(tokenizer, tmp_path):
    write_gguf(tmp_path / "base.gguf", GGMLQuantizationType.Q8_0)
    source = open_source(tmp_path / "base.gguf")
    old = source.model.vocab_size
    decoder, _ = load_base(Grown(source, old + 2), "base", FLOAT32, one_device_mesh())
    table = source.read("model.embed_tokens.weight")
    found = ours(decoder)[0]
    np.testing.assert_array_equal(found[:old], table)
    np.testing.assert_allclose(found[old:], np.tile(table.mean(0), (2, 1)), rtol=0, atol=1e-6)


def test_a_plan_counts_the_rows(base, tokenizer, tmp_path):
    cfg = grown_config(tmp_path, base, tokenizer)
    assert shape_of(cfg).vocab_size == GROWN
    named = cfg.model_copy(update={"model": cfg.model.model_copy(update={"path": "gpt2", "tokenizer": None})})
    assert shape_of(named).vocab_size == 50257


def test_parts_of_a_table_are_the_table(base):
    """Whatever rows and columns are asked for: those kept, those new, and both."""
    grown = Grown(open_source(base), GROWN)
    whole = grown.read("model.embed_tokens.weight")
    for rows in ((0, 3), (298, 302), (300, 304), (302, 303), (300, 300)):
        part = grown.part("model.embed_tokens.weight", rows, (5, 17))
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, whole[slice(*rows), 5:17])
    norm = grown.part("model.norm.weight", (0, 1), (0, 48))
    np.testing.assert_array_equal(norm, open_source(base).part("model.norm.weight", (0, 1), (0, 48)))
