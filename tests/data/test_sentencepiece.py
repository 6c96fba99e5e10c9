"""A tokenizer.model alone, with what the files beside it say of spaces: the ids of transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shared_data import SHARED, needs_data
from transformers import AutoTokenizer

from jlora.data.tokens import load_tokenizer

pytestmark = needs_data

LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FLAGS: dict[str, dict[str, Any]] = {
    "not legacy": {"legacy": False},
    "legacy": {"legacy": True},
    "nothing said": {},
    "null": {"legacy": None, "add_prefix_space": None},
    "by its older name": {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
    "no space": {"add_prefix_space": False},
    "a space": {"add_prefix_space": True, "legacy": False},
}
# Where a space is put before a space, sentencepiece keeps both, and transformers one.
TEXTS = ["Once", "a</s>b", "<s>[INST] hi [/INST] there </s><s>[INST] x", "x</s></s>y", "a</s>\nb", "a<s>", "\n", ""]
SPACES = ["</s> b", "</s><s> b"]


def folder_of(name: str, folder: Path, **flags: Any) -> Path:
    shutil.copyfile(SHARED / name / "tokenizer.model", folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps(LLAMA | flags))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.mark.long
@pytest.mark.parametrize("base", ["llama2_tokenizer", "stories260K"])
@pytest.mark.parametrize("name", FLAGS)
def test_spaces_are_where_transformers_has_them(name, base, tmp_path):
    folder = folder_of(base, tmp_path, **FLAGS[name])
    ours, theirs = load_tokenizer(folder, None), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS if theirs.legacy else TEXTS + SPACES:
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected, text
        assert ours.encode_all([text]) == [expected]
    for text in ("Once", "Once upon a time", "\n"):
        assert ours.decode(ours.encode(text)) == text


def test_spaces_decide_whose_rows_these_are(tmp_path):
    """A store of rows, and a run's identity, hold the hash; that of a folder that says nothing stays as it was."""
    hashes = {}
    for name in FLAGS:
        (tmp_path / name).mkdir()
        hashes[name] = load_tokenizer(folder_of("stories260K", tmp_path / name, **FLAGS[name]), None).vocabulary_hash
    assert hashes["not legacy"] == hashes["nothing said"] == hashes["null"] == hashes["a space"]
    assert len({hashes["not legacy"], hashes["legacy"], hashes["no space"]}) == 3
