"""GGUF files that lie about counts, types, ids and places are refused in one sentence, as llama.cpp refuses them."""

import math
import struct
import time

import pytest
from command_line import sentence_of
from gguf import GGUFValueType
from gguf_files import GPT2, LLAMA, SPM, write

from jlora.errors import ModelError
from jlora.hf.gguf import GGUFFile
from jlora.hf.pretrained import open_tokenizer

ARRAY, U8, U32, STRING = (int(GGUFValueType[name]) for name in ("ARRAY", "UINT8", "UINT32", "STRING"))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def with_key(path, key, value):
    """The file with one more key, put before all others; `value` begins with its type."""
    content = path.read_bytes()
    num_keys = struct.unpack_from("<Q", content, 16)[0]
    more = struct.pack("<Q", len(key)) + key + value
    more += key_of_padding(len(more))
    path.write_bytes(content[:16] + struct.pack("<Q", num_keys + 2) + more + content[24:])


def key_of_padding(length):
    """Another key, that makes up the length to the alignment, so that the tensors stay in their places."""
    start = struct.pack("<Q", 1) + b"p" + struct.pack("<I", STRING)
    text = -(length + len(start) + 8) % 32
    return start + struct.pack("<Q", text) + b"x" * text


COUNTS = {
    "list of 2^63 bytes": struct.pack("<IIQ", ARRAY, U8, 2**63),
    "list of 2^33 bytes": struct.pack("<IIQ", ARRAY, U8, 2**33),
    "list of 2^62 texts": struct.pack("<IIQ", ARRAY, STRING, 2**62),
    "text of 2^63 bytes": struct.pack("<IQ", STRING, 2**63),
    "text of 2^64 - 1 bytes": struct.pack("<IQ", STRING, 2**64 - 1),
    "lists in lists": struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 3000 + struct.pack("<IQ", U8, 0),
    "unknown type": struct.pack("<I", 99),
    "unknown type in a list": struct.pack("<IIQ", ARRAY, 99, 5),
    "truth value of 7": struct.pack("<IB", int(GGUFValueType.BOOL), 7),
}


@pytest.mark.parametrize("name", COUNTS)
def test_metadata_that_promises_more_than_the_file_has_is_refused_at_once(path, name):
    write(path)
    GGUFFile(path)
    with_key(path, b"x.y", COUNTS[name])
    began = time.process_time()
    assert "is truncated or damaged" in sentence_of(ModelError, GGUFFile, path)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "keys"])
@pytest.mark.parametrize("count", [2**40, 2**64 - 1])
def test_count_of_keys_or_tensors_beyond_the_file_is_refused(path, place, count):
    write(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, place, count)
    path.write_bytes(content)
    sentence_of(ModelError, GGUFFile, path)


def test_long_list_of_an_unknown_key_is_counted_not_shown(path):
    write(path)
    with_key(path, b"llama.x", struct.pack("<IIQ", ARRAY, U8, 2**20) + bytes(2**20))
    began = time.process_time()
    assert "sets llama.x to a list of 1048576" in sentence_of(ModelError, GGUFFile, path)
    assert time.process_time() - began < 2


# Each key that is read, with a value of another type, or one that means nothing.
WRONG = {
    "llama": {
        **dict.fromkeys(LLAMA, "text"),
        "attention.layer_norm_rms_epsilon": math.nan,
        "rope.freq_base": math.inf,
        "rope.scaling.factor": [1.0, 2.0],
        "rope.scaling.type": 3,
        "block_count": True,
        "context_length": 64.0,
    },
    "tokenizer": {
        "model": 5,
        "pre": ["smollm"],
        "tokens": "text",
        "token_type": ["a"] * len(GPT2["tokens"]),
        "merges": 7,
        "bos_token_id": "1",
        "eos_token_id": 0.5,
        "unknown_token_id": True,
        "padding_token_id": [1],
        "add_bos_token": "yes",
        "add_eos_token": 1,
        "add_space_prefix": 1.5,
    },
}


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, values in WRONG.items() for key in values])
def test_metadata_of_another_type_is_refused(path, part, key):
    write(path, **{part: (GPT2 if part == "tokenizer" else {}) | {key: WRONG[part][key]}})
    assert f"{key} to " in sentence_of(ModelError, lambda: GGUFFile(path).tokenizer())


@pytest.mark.parametrize("scores", [["a"] * 5, [0.0] * 5, [math.nan] * len(SPM["tokens"]), "text"], ids=str)
def test_scores_that_are_no_numbers_one_for_each_token_are_refused(path, scores):
    write(path, tokenizer={**SPM, "scores": scores})
    sentence_of(ModelError, lambda: GGUFFile(path).tokenizer())


def edited(path, key, value):
    """The file with another number for a key of four bytes, of which the `gguf` package writes no such value."""
    content = path.read_bytes()
    at = content.index(key) + len(key)
    path.write_bytes(content[:at] + value + content[at + len(value) :])


@pytest.mark.parametrize("name", ["bos", "eos", "unknown", "padding"])
def test_negative_token_id_is_not_counted_from_the_end(path, name):
    write(path)
    edited(path, f"ggml.{name}_token_id".encode(), struct.pack("<Ii", int(GGUFValueType.INT32), -1))
    assert f"the {name} token -1" in sentence_of(ModelError, lambda: GGUFFile(path).tokenizer())


def test_equal_tokens_are_refused_and_empty_ones_named_as_by_llama_cpp(path):
    tokens = GPT2["tokens"]
    write(path, tokenizer={"tokens": [*tokens[:-1], tokens[10]]})
    assert "twice" in sentence_of(ModelError, lambda: GGUFFile(path).tokenizer())
    path.unlink()
    kinds = [*GPT2["token_type"][:-3], 5, 5, GPT2["token_type"][-1]]
    write(path, tokenizer={"tokens": [*tokens[:-3], "", "", tokens[-1]], "token_type": kinds, "merges": ["h e"]})
    assert open_tokenizer(str(path), None).vocab_size == len(tokens)


def test_piece_of_thousands_of_letters_is_refused(path):
    """All ways to cut it would be looked at, which takes the square of its length."""
    write(path, tokenizer={**SPM, "tokens": [*SPM["tokens"][:-1], "a" * 200_000]})
    assert "token of 200000 letters" in sentence_of(ModelError, lambda: GGUFFile(path).tokenizer())


@pytest.mark.parametrize("offset", [0, 1, 2**40, 2**63, 2**64 - 32])
def test_tensor_that_lies_elsewhere_than_behind_the_one_before_is_refused(path, offset):
    """Such as in the header, in another tensor, or beyond the end."""
    write(path)
    name = b"output_norm.weight"
    # The offset stands behind the count of dims, one dim and the type.
    edited(path, name + path.read_bytes().partition(name)[2][:16], struct.pack("<Q", offset))
    assert "output_norm.weight" in sentence_of(ModelError, GGUFFile, path)


@pytest.mark.parametrize("dims", [0, 5, 2**32 - 1])
def test_count_of_dims_is_bounded(path, dims):
    write(path)
    edited(path, b"output_norm.weight", struct.pack("<I", dims))
    sentence_of(ModelError, GGUFFile, path)


@pytest.mark.parametrize("alignment", [0, 3, -32])
def test_alignment_is_a_power_of_two(path, alignment):
    write(path)
    with_key(path, b"general.alignment", struct.pack("<Ii", U32 if alignment >= 0 else 5, alignment))
    assert "general.alignment" in sentence_of(ModelError, GGUFFile, path)
