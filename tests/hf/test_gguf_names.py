"""A GGUF file is one by its first bytes, whatever it is called, and also where its folder is given."""

import os
from pathlib import Path

import pytest
from gguf_files import write
from tiny import make_llama, make_tokenizer

from jlora.errors import ModelError
from jlora.hf.gguf import GGUFFile
from jlora.hf.pretrained import open_pretrained, open_tokenizer
from jlora.hf.source import SafetensorsFolder

NAMES = ["model.gguf", "MODEL.GGUF", "sha256-6a0746a1ec1a", "model", "model.bin"]
TEXT = "ab a"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_base_and_tokenizer(name, file, tmp_path):
    ids = open_pretrained(str(file), None, None).tokenizer.encode(TEXT)
    other = file.rename(tmp_path / name)
    opened = open_pretrained(str(other), None, None)
    assert isinstance(opened.source, GGUFFile) and opened.path == other
    assert opened.tokenizer.encode(TEXT) == open_tokenizer(str(other), None).encode(TEXT) == ids


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_one_such_file_is_that_file(name, file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file.rename(folder / name)
    (folder / "README.md").write_text("GGU")
    (folder / "config.json").write_text("{}")  # as beside the files of many repositories
    opened = open_pretrained(str(folder), None, None)
    assert isinstance(opened.source, GGUFFile) and opened.path == folder / name and opened.name == str(folder)
    assert open_tokenizer(str(folder), None).encode(TEXT) == opened.tokenizer.encode(TEXT)


def test_of_several_such_files_one_has_to_be_named(file, tmp_path):
    write(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(b.gguf, model.gguf\); give the path of one of them"):
        open_pretrained(str(tmp_path), None, None)
    assert open_pretrained(str(tmp_path / "b.gguf"), None, None)


def test_safetensors_and_a_tokenizer_json_go_before_a_gguf_file(file, tmp_path):
    make_llama(tmp_path)
    make_tokenizer(tmp_path)
    opened = open_pretrained(str(tmp_path), None, None)
    assert isinstance(opened.source, SafetensorsFolder)
    assert opened.tokenizer.files and opened.tokenizer.vocab_size == 300


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "model").write_bytes(b"GGML and more")
    with pytest.raises(ModelError, match=r"model.*is not a GGUF file"):
        open_pretrained(str(tmp_path / "model"), None, None)
    with pytest.raises(ModelError, match="is neither a folder nor a GGUF file"):
        open_tokenizer(str(tmp_path / "model"), None)
    with pytest.raises(ModelError, match=r"missing.gguf.*cannot be opened"):
        open_tokenizer(str(tmp_path / "missing.gguf"), None)
    with pytest.raises(ModelError, match=r"config.json: missing"):
        open_pretrained(str(tmp_path), None, None)


def test_a_pipe_in_the_folder_is_not_waited_for_and_a_link_out_of_it_not_followed(file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "linked").symlink_to(file)
    with pytest.raises(ModelError, match="outside its folder"):
        open_pretrained(str(folder), None, None)
