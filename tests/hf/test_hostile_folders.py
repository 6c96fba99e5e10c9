"""Bases and adapters that lie, or whose paths lead elsewhere, are refused in one sentence.

The numbers are those of the fault cases in docs/reliability.md.
"""

import json
import os
import time

import numpy as np
import pytest
from command_line import sentence_of
from data_files import write
from safetensors.numpy import load_file, save_file
from tiny import copy_folder

from jlora.config import LoraSection
from jlora.data.tokens import load_tokenizer
from jlora.errors import ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.peft import load_adapter, save_adapter
from jlora.hf.source import check_names, open_source
from jlora.model.adapter_init import new_adapter

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# Adapters that do not fit (cases 7, 8)


@pytest.fixture
def adapter(smallest_base, tmp_path):
    """An adapter folder for the smallest base, its model's shape, and the config section."""
    model = parse_config(open_source(smallest_base).config, "base")
    lora = LoraSection(rank=2, target_modules=["q_proj", "v_proj"])
    made = new_adapter(lora, model, 0)
    save_adapter(tmp_path / "adapter", made, lora, "base", "f" * 64)
    load_adapter(tmp_path / "adapter", model, "f" * 64, 0.0)
    return tmp_path / "adapter", model


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q.format("A")), f"{Q.format('A')} is missing"),
        (lambda t: t.update({"lm_head.lora_A.weight": t[Q.format("A")]}), "lm_head.lora_A.weight is not known"),
        (lambda t: t.update({"q_proj.lora_A": t.pop(Q.format("A"))}), f"{Q.format('A')} is missing (and 1 more)"),
        (lambda t: t.clear(), "is missing (and 3 more)"),
    ],
    ids=["missing", "extra", "misnamed", "empty"],
)
def test_case_7_adapter_with_wrong_keys_is_refused(adapter, change, words):
    folder, model = adapter
    edit_tensors(folder, change)
    assert words in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)


def test_case_8_adapter_of_wrong_rank_shape_or_base_is_refused(adapter):
    folder, model = adapter
    assert "another base" in sentence_of(ModelError, load_adapter, folder, model, "0" * 64, 0.0)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    assert "instead of [3, 24]" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    edit_tensors(folder, lambda t: t.update({Q.format("B"): np.zeros((7, 2), np.float32)}))
    assert "is [7, 2] instead of" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)


# Files of a base that lie (case 28)


def header_of(folder):
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_header(folder, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + data)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "length"),
    [
        (lambda h: h[NORM].update(data_offsets=[0, 96]), None),
        (lambda h: h[NORM].update(data_offsets=[2**62, 2**62 + 96]), None),
        (lambda h: h[NORM].update(data_offsets=[-96, 0]), None),
        (lambda h: h[NORM].update(data_offsets=[96, 0]), None),
        (lambda h: h[NORM].update(shape=[2**63, 2**63]), None),
        (lambda h: h[NORM].update(dtype="F7"), None),
        (lambda h: h[NORM].update(dtype="I32"), None),
        (lambda h: h[NORM].pop("dtype"), None),
        (lambda h: h.update(x=[]), None),
        (lambda h: None, 2**63),
        (lambda h: None, 2**64 - 1),
        (lambda h: None, 2**27),
        (lambda h: b"[" * 100_000, None),
        (lambda h: b"\xff\xfe{}", None),
        (lambda h: b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}', None),
    ],
    ids=(
        "overlap out-of-file negative backwards overflow unknown-dtype integers no-dtype no-tensor "
        "length-2^63 length-2^64 length-128M deep not-utf8 torn"
    ).split(),
)
def test_case_28_safetensors_header_that_lies_is_refused(smallest_base, tmp_path, change, length):
    folder = copy_folder(smallest_base, tmp_path / "bad")
    header, data = header_of(folder)
    changed = change(header)
    write_header(folder, changed if isinstance(changed, bytes) else header, data, length)

    def read():
        source = open_source(folder)
        check_names(parse_config(source.config, "bad"), source.shapes, "bad")
        source.read(NORM)

    assert "bad/model.safetensors" in sentence_of(ModelError, read)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": ' + b"7" * 5000 + b"}", b"\xff", b"[]", b"", b'{"model_type": "llama"}']
)
def test_case_28_config_of_a_base_that_is_broken_is_refused(smallest_base, tmp_path, content):
    folder = copy_folder(smallest_base, tmp_path / "bad")
    write(folder / "config.json", content)
    sentence_of(ModelError, lambda: parse_config(open_source(folder).config, "bad"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**400), ("rms_norm_eps", 10**400), ("hidden_size", True),
        ("architectures", [[]]), ("architectures", [{}]), ("model_type", []), ("rope_scaling", {"rope_type": [1]}),
        ("vocab_size", -1), ("attention_dropout", [0.1]), ("rope_scaling", {"rope_type": "linear", "factor": {}}),
    ],
)  # fmt: skip
def test_case_28_config_of_a_base_with_a_crafted_value_is_refused(smallest_base, key, value):
    source = open_source(smallest_base)
    began = time.monotonic()

    def read():
        check_names(parse_config(source.config | {key: value}, "bad"), source.shapes, "bad")

    sentence_of(ModelError, read)
    assert time.monotonic() - began < 1  # no table of a billion layers


def test_case_28_pickles_are_not_read(tmp_path, smallest_base):
    folder = copy_folder(smallest_base, tmp_path / "bad")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "convert them to safetensors once" in sentence_of(ModelError, open_source, folder)


# Paths that lead out (case 29)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "a\0b", "a/model"])
def test_case_29_index_that_names_a_file_elsewhere_is_refused(smallest_base, tmp_path, name):
    folder = copy_folder(smallest_base, tmp_path / "bad")
    (folder / WEIGHTS).rename(tmp_path / "secret")  # beside the weights the index would not be read
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    sentence_of(ModelError, open_source, folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_case_29_link_out_of_the_folder_is_refused_but_the_hubs_cache_works(smallest_base, tmp_path, name):
    def read(folder):
        open_source(folder)
        load_tokenizer(folder, None)

    cache = tmp_path / "models--owner--name"
    snapshot = copy_folder(smallest_base, cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    (snapshot / name).rename(cache / "blobs" / "123")
    (snapshot / name).symlink_to("../../blobs/123")
    read(snapshot)
    (tmp_path / "link").symlink_to(snapshot)  # the folder itself is the user's to name
    read(tmp_path / "link")

    folder = copy_folder(smallest_base, tmp_path / "bad")
    for target in ("../secret", str(tmp_path / "secret"), name):
        (folder / name).rename(tmp_path / "secret") if not (tmp_path / "secret").exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        assert f"bad/{name}: " in sentence_of(ModelError, read, folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_case_29_adapter_of_links_or_pipes_is_refused(adapter, tmp_path, name):
    folder, model = adapter
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    assert "outside its folder" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    assert "not a regular file" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)
