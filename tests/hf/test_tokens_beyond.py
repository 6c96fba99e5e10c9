"""Tokens that a tokenizer has and the embedding has no row for: only a text that has one is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import SHARED, needs_data
from tiny import copy_folder, make_completions, make_llama, make_tokenizer, write_config

from jlora.config import DataSection, load_config
from jlora.data.encoding import tokenize
from jlora.data.prompts import encode_prompt
from jlora.data.row import BadRow
from jlora.errors import DataError, ModelError
from jlora.hf.pretrained import open_pretrained
from jlora.training.run import train

VOCAB = 300


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama(folder, vocab_size=VOCAB)
    make_tokenizer(folder, VOCAB)
    return folder


def edit(folder: Path, name: str, **keys: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | keys))


def padding(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", pad_token="[PAD]")


def padding_in_the_map(folder: Path) -> None:
    edit(folder, "special_tokens_map.json", pad_token="[PAD]")


def a_token_beside(folder: Path) -> None:
    edit(folder, "added_tokens.json", **{"[PAD]": VOCAB})


def more_special_tokens(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", additional_special_tokens=["<|a|>", "[PAD]"])


def a_token_in_the_file(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)
    content["added_tokens"].append({"id": VOCAB, "content": "[PAD]"} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(content))


WAYS = [padding, padding_in_the_map, a_token_beside, more_special_tokens, a_token_in_the_file]


def rows(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"prompt": "Say:", "completion": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_token_beyond_is_refused_in_the_row_that_has_it(way, base, tmp_path):
    folder = copy_folder(base, tmp_path / "base")
    way(folder)
    tokenizer = open_pretrained(str(folder), None, None).tokenizer
    plain = open_pretrained(str(base), None, None).tokenizer
    section = DataSection(train="-", format="completion", max_length=64)
    good = rows(tmp_path / "good.jsonl", "blue", "<s> tree")
    for ours, theirs in zip(*(tokenize(good, each, section).examples for each in (tokenizer, plain)), strict=True):
        np.testing.assert_array_equal(ours.ids, theirs.ids)
    bad = rows(tmp_path / "bad.jsonl", "blue", "no [PAD] here")
    with pytest.raises(DataError) as caught:
        tokenize(bad, tokenizer, section)
    message = str(caught.value)
    assert "bad.jsonl:2: the token '[PAD]' (id 30" in message and "no row in the model's embedding of 300" in message
    skipping = tokenize(bad, tokenizer, section.model_copy(update={"on_bad_row": "skip"}))
    assert len(skipping.examples) == 1 and skipping.dropped == {"no_embedding": 1}
    with pytest.raises(BadRow, match="embedding of 300"):
        encode_prompt(tokenizer, {"prompt": "[PAD]"}, format="completion", prompt="stanford")
    with pytest.raises(BadRow, match="embedding of 300"):
        encode_prompt(tokenizer, {"text": "a[PAD]"}, format="text", prompt="stanford")


def test_pairs_and_the_end_of_a_text_are_looked_at_too(base, tmp_path):
    folder = copy_folder(base, tmp_path / "base")
    padding(folder)
    section = DataSection(train="-", format="preference", max_length=64)
    pair = {"prompt": "a", "chosen": "b", "rejected": "c [PAD]"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    with pytest.raises(DataError, match="embedding of 300"):
        tokenize(str(tmp_path / "pairs.jsonl"), open_pretrained(str(folder), None, None).tokenizer, section)
    edit(folder, "tokenizer_config.json", eos_token="[END]")
    opened = open_pretrained(str(folder), None, None)
    with pytest.raises(DataError, match=r"'\[END\]' \(id 30"):
        tokenize(
            rows(tmp_path / "rows.jsonl", "blue"), opened.tokenizer, section.model_copy(update={"format": "completion"})
        )


def test_rows_that_were_kept_for_one_model_are_no_other_ones(base, tmp_path):
    """Rows are kept under the tokenizer's digest, so a model with fewer embeddings must not find them."""
    folder = copy_folder(base, tmp_path / "larger")
    shutil.rmtree(folder)
    make_llama(folder, vocab_size=VOCAB + 8)
    make_tokenizer(folder, VOCAB)
    same = open_pretrained(str(folder), None, None).tokenizer.digest
    assert same == open_pretrained(str(base), None, None).tokenizer.digest
    smaller = copy_folder(base, tmp_path / "smaller")
    padding(folder)
    padding(smaller)
    digests = [open_pretrained(str(each), None, None).tokenizer.digest for each in (folder, smaller)]
    assert digests[0] != digests[1]


@pytest.mark.long
def test_a_run_trains_with_such_a_tokenizer(base, tmp_path):
    folder = copy_folder(base, tmp_path / "base")
    padding(folder)
    train_on = make_completions(tmp_path / "rows.jsonl")
    data = {"format": "completion", "max_length": 64}
    cfg = load_config(write_config(tmp_path / "run.yaml", folder, train_on, tmp_path / "run", data=data))
    assert train(cfg, quiet=True)["status"] == "finished"


def test_the_tokenizer_of_another_model_is_refused(base, tmp_path):
    for size in (VOCAB + 1, VOCAB * 2):
        (tmp_path / str(size)).mkdir()
        make_tokenizer(tmp_path / str(size), size)
        with pytest.raises(
            ModelError, match=f"has {size} tokens, but the model .* has {VOCAB}; give the tokenizer that"
        ):
            open_pretrained(str(base), str(tmp_path / str(size)), None)
    few = copy_folder(base, tmp_path / "few")
    make_llama(few, vocab_size=2 * VOCAB)
    with pytest.raises(ModelError, match=f"has {VOCAB} tokens, but the model .* has {2 * VOCAB}"):
        open_pretrained(str(few), None, None)


@needs_data
def test_a_sentencepiece_model_with_a_token_beyond(tmp_path):
    folder = copy_folder(SHARED / "stories260K", tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    added = {"512": {"content": "[PAD]", "special": True}}
    edit(
        folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", pad_token="[PAD]", added_tokens_decoder=added
    )
    tokenizer = open_pretrained(str(folder), None, None).tokenizer
    assert encode_prompt(tokenizer, {"text": "Once"}, format="text", prompt="stanford")
    with pytest.raises(BadRow, match=r"'\[PAD\]' \(id 512\) has no row in the model's embedding of 512"):
        encode_prompt(tokenizer, {"text": "Once [PAD]"}, format="text", prompt="stanford")
