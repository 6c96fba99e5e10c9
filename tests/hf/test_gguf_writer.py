"""GGUF files that we write: those of llama.cpp's converter, tensor by tensor, and tokenizers that cut texts alike."""

import dataclasses

import numpy as np
import pytest
import torch
from command_line import sentence_of
from gguf_families import MODELS, make
from gguf_files import SPM
from shared_data import SHARED, SMOLLM2, needs_data, needs_smollm2
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from jlora.errors import ModelError
from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_vocabulary import PROBES, vocabulary_of
from jlora.hf.gguf_writer import KINDS, Rounded, write_gguf
from jlora.hf.names import name_table
from jlora.hf.pretrained import open_pretrained, open_tokenizer
from jlora.hf.source import open_source
from jlora.hf.weights import Stored
from jlora.model.rope import DynamicRope

VOCABULARY = {f"tokenizer.ggml.{key}": value for key, value in SPM.items()}


@pytest.mark.parametrize("name", MODELS)
def test_file_is_that_of_the_converter(name, tmp_path):
    """Of each family, by a second writer that was written after the converter: keys of the model, and every byte."""
    make(tmp_path / "theirs.gguf", name)
    source = open_source(tmp_path / f"{name}-saved")
    write_gguf(tmp_path / "ours.gguf", source.model, source.config, Stored(source), VOCABULARY, "Q8_0")
    ours, theirs = GGUFFile(tmp_path / "ours.gguf"), GGUFFile(tmp_path / "theirs.gguf")
    assert ours.model == theirs.model == dataclasses.replace(source.model, names=ours.model.names)
    assert ours.header.tensors.keys() == theirs.header.tensors.keys()
    last = max(ours.header.tensors.values(), key=lambda tensor: tensor.offset)
    assert ours.path.stat().st_size - last.offset - last.size < 32  # but for padding
    for each, right in theirs.header.tensors.items():
        found = ours.header.tensors[each]
        if each == "position_embd.weight":  # which the converter leaves in float32
            assert (found.shape, found.type.name) == (right.shape, "F32")
            continue
        assert (found.shape, found.size) == (right.shape, right.size) and (found.type, each) == (right.type, each)
        read = [np.memmap(t.file, np.uint8, "r", t.offset, (t.size,)) for t in (found, right)]
        if each.startswith("rope_freqs"):  # to the last bit of float32, which a division may move
            np.testing.assert_allclose(read[0].view("f4"), read[1].view("f4"), rtol=1e-6)
        else:
            np.testing.assert_array_equal(*read, err_msg=each)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama3", "gpt2_tied", "gemma3"])
def test_what_is_read_is_what_the_kind_holds(name, kind, tmp_path):
    make(tmp_path / "theirs.gguf", name)
    source = open_source(tmp_path / f"{name}-saved")
    write_gguf(tmp_path / "ours.gguf", source.model, source.config, Stored(source), VOCABULARY, kind)
    read, rounded = Stored(GGUFFile(tmp_path / "ours.gguf")), Rounded(Stored(source), kind)
    worst = 0.0
    for each, entry in name_table(source.model).items():
        rows = (0, entry.hf_shape[0] if len(entry.hf_shape) == 2 else 1)
        found, right = (weights.rows(each, entry, *rows) for weights in (read, rounded))
        np.testing.assert_allclose(found, right, rtol=0, atol=1.2e-7 if name == "gemma3" else 0, err_msg=each)
        whole = Stored(source).rows(each, entry, *rows)
        worst = max(worst, float(np.abs(found - whole).max() / np.abs(whole).max()))
    least, most = {"F32": (-1, 1.2e-7), "F16": (1e-5, 1e-3), "BF16": (1e-4, 1e-2)}.get(kind, (1e-3, 0.2))
    assert least < worst <= most


def test_what_gguf_has_no_words_for_is_refused_before_weights_are_written(tmp_path):
    make(tmp_path / "theirs.gguf", "qwen3")
    source = open_source(tmp_path / "qwen3-saved")
    rope = dataclasses.replace(source.model.ropes[0], scaling=DynamicRope(2.0, 90))
    for change, says in (
        ({"ropes": (rope,)}, "GGUF has no words for ropes=(Rope("),
        ({"activation": "gelu"}, "GGUF has no words for activation='gelu' of this model"),
    ):
        model = dataclasses.replace(source.model, **change)
        arguments = (tmp_path / "ours.gguf", model, source.config, Stored(source), VOCABULARY, "F16")
        assert says in sentence_of(ModelError, write_gguf, *arguments)

    class Infinite:
        def rows(self, name, entry, start, stop):
            return np.full((stop - start, entry.hf_shape[-1]), 1e9, np.float32)

    arguments = (tmp_path / "ours.gguf", source.model, source.config, Infinite(), VOCABULARY, "F16")
    assert "does not fit F16; write another kind, such as BF16" in sentence_of(ModelError, write_gguf, *arguments)


@needs_data
@pytest.mark.parametrize(
    ("name", "rows"), [("stories260K", 512), ("llama2_tokenizer", 32000), ("mistral_v1_tokenizer", 32003)]
)
@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer.model"])
def test_tokenizer_of_a_folder(name, rows, form, tmp_path):
    for file in (SHARED / name).iterdir():
        if file.name.startswith(("tokenizer_config", "special", form)):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = open_tokenizer(str(tmp_path), "llama2")
    found = vocabulary_of(tokenizer, None, rows, [tokenizer.eos_id, 7], "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and len(found["tokenizer.ggml.tokens"]) == rows
    assert found["tokenizer.chat_template"] == tokenizer.chat_template and found["tokenizer.ggml.eot_token_id"] == 7
    assert found["tokenizer.ggml.tokens"][3:6] == ["<0x00>", "<0x01>", "<0x02>"]
    pieces = ["<unk>", "<s>", "</s>"]
    assert found["tokenizer.ggml.tokens"][:3] == pieces and found["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]


@pytest.mark.long
@needs_smollm2
def test_tokenizer_of_a_gguf_file_stays_as_it_is():
    opened = open_pretrained(str(SMOLLM2), None, None)
    header = opened.source.header
    found = vocabulary_of(opened.tokenizer, header, opened.model.vocab_size, [opened.tokenizer.eos_id], "m.gguf")
    for key, value in header.values.items():
        if key.startswith("tokenizer."):
            kept = found[key]
            assert kept == (value.decode() if isinstance(value, bytes) else kept)
            assert len(kept) == len(value) if isinstance(kept, list) else True
    rebuilt = vocabulary_of(opened.tokenizer, None, opened.model.vocab_size, [], "m.gguf")  # as of a folder
    for key in ("tokens", "merges", "pre", "model", "token_type"):
        assert rebuilt[f"tokenizer.ggml.{key}"] == found[f"tokenizer.ggml.{key}"], key


@pytest.mark.long
@needs_smollm2
def test_tokenizer_that_llama_cpp_cannot_have_is_refused(monkeypatch):
    opened = open_pretrained(str(SMOLLM2), None, None)
    monkeypatch.setattr("jlora.hf.gguf_vocabulary.PRE_TOKENIZERS", ("llama-bpe",))
    arguments = (opened.tokenizer, None, opened.model.vocab_size, [], "m.gguf")
    assert "no way that jlora knows to cut texts as this tokenizer does" in sentence_of(
        ModelError, vocabulary_of, *arguments
    )
    assert any("  " in text for text in PROBES)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"gemma2_of_46_layers"}))
def test_transformers_reads_the_same_weights(name, kind, tmp_path):
    """By its own GGUF reader, with the model's config: of a file it takes some widths for the family's usual ones."""
    make(tmp_path / "theirs.gguf", name)
    saved = tmp_path / f"{name}-saved"
    source, config = open_source(saved), AutoConfig.from_pretrained(saved)
    if name == "mistral":  # whose files are Llama's
        config = LlamaConfig(**config.to_dict() | {"model_type": "llama"})
    write_gguf(tmp_path / "ours.gguf", source.model, source.config, Stored(source), VOCABULARY, kind)
    options = {"gguf_file": "ours.gguf", "config": config, "dtype": torch.float32}
    read = AutoModelForCausalLM.from_pretrained(tmp_path, **options).state_dict()
    right = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).state_dict()
    assert read.keys() == right.keys()
    for each, tensor in right.items():
        in_16_bits = kind == "F16" and tensor.ndim == 2 and each != "transformer.wpe.weight"
        rounded = tensor.half().float() if in_16_bits else tensor
        # A norm of Gemma lies there with 1 added.
        torch.testing.assert_close(read[each], rounded, rtol=0, atol=1.2e-7 if "gemma" in name else 0, msg=each)
