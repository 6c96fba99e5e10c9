"""`jlora.hf.gguf` on files written by the `gguf` package, with tensors as llama.cpp's converter has them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import TokenType
from gguf_files import FFN, GPT2, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, SPM, write
from shared_data import SMOLLM2, needs_smollm2

from jlora.errors import ModelError
from jlora.hf.gguf import GGUFFile


def piece(text: str) -> int:
    return SPM["tokens"].index(text)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("qtype", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors(path: Path, qtype: Type, tied: bool) -> None:
    expected = write(path, qtype, tied)
    file = GGUFFile(path)
    assert file.shapes == {name: value.shape for name, value in expected.items()}
    for name, value in expected.items():
        found = file.read(name)
        assert found.dtype == np.float32 and found.flags.c_contiguous and found.flags.writeable
        np.testing.assert_array_equal(found, value, err_msg=name)
    assert file.config["tie_word_embeddings"] is tied
    assert file.config["torch_dtype"] == {Type.F16: "float16", Type.BF16: "bfloat16"}.get(qtype, "float32")


def test_config(path: Path) -> None:
    write(path)
    assert GGUFFile(path).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 3e-6,
        "rope_theta": 54321.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "vocab_size": len(GPT2["tokens"]),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
    ],
)
def test_rope_scaling(path: Path, keys: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    write(path, llama=keys)
    assert GGUFFile(path).config["rope_scaling"] == scaling


def test_values_llama_cpp_assumes(path: Path) -> None:
    write(path, llama={"rope.freq_base": None, "rope.dimension_count": None, "expert_count": 0})
    config = GGUFFile(path).config
    assert (config["rope_theta"], config["head_dim"]) == (10000.0, HIDDEN // HEADS)


def test_same_model_as_transformers_loads(path: Path) -> None:
    """An independent reader of the same file, for names, permutation and dequantisation at once."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    write(path, Type.Q4_1, tied=False)
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    file = GGUFFile(path)
    state = model.state_dict()
    assert state.keys() == file.shapes.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(file.read(name), value.numpy(), err_msg=name)
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "hidden_act"):
        assert getattr(model.config, key) == file.config[key]
    assert model.config.rope_parameters["rope_theta"] == file.config["rope_theta"]
    assert model.config.rms_norm_eps == pytest.approx(file.config["rms_norm_eps"], rel=1e-6)


def test_works_without_torch(path: Path) -> None:
    write(path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path; from jlora.hf.gguf import GGUFFile\n"
        "f = GGUFFile(Path(sys.argv[1])); [f.read(n) for n in f.shapes]; f.tokenizer()('hello')"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def pieces(path: Path, text: str, **tokenizer: Any) -> list[str]:
    write(path, tokenizer=tokenizer)
    return GGUFFile(path).tokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "hello hello 123", ["hello", "Ġhello", "Ġ", "1", "2", "3"]),
        ("gpt-2", "hello 123123", ["hello", "Ġ", "123", "123"]),
        ("gpt-2", "a  b", ["a", "Ġ", "Ġ", "b"]),  # the last space goes with the word
        ("qwen2", "123", ["1", "2", "3"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # composed first
        ("llama-bpe", "1231", ["123", "1"]),
        ("llama-bpe", "\u0663ab", ["Ù", "£", "ab"]),
        ("dbrx", "1231 hello", ["123", "1", "Ġhello"]),
        ("default", "ab1231", ["ab", "123", "1"]),
        ("default", "(hello", ["(", "hello"]),
    ],
)
def test_pre_tokenizers(path: Path, pre: str, text: str, expected: list[str]) -> None:
    assert pieces(path, text, pre=pre) == expected


def test_llama3_takes_whole_words_past_the_merges(path: Path) -> None:
    tokens = [*GPT2["tokens"], "xyz"]
    types = [*GPT2["token_type"], int(TokenType.NORMAL)]
    assert pieces(path, "xyz", pre="llama-bpe", tokens=tokens, token_type=types) == ["xyz"]
    path.unlink()
    assert pieces(path, "xyz", pre="smollm", tokens=tokens, token_type=types) == ["x", "y", "z"]


def test_byte_level_tokenizer(path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    write(path, template=template)
    tokenizer = GGUFFile(path).tokenizer()
    text = "<|start|>hello é日<tool>\n<|end|>"
    ids = tokenizer(text).input_ids
    assert ids[0] == 1 and ids[-1] == 0 and GPT2["tokens"].index("<tool>") in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello é日<tool>\n"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
    assert (tokenizer.unk_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert len(tokenizer) == len(GPT2["tokens"])  # nothing was added that has no embedding
    assert tokenizer.apply_chat_template([{"content": "hello"}], tokenize=False) == "<|start|>hello<|end|>"


@pytest.mark.parametrize(
    ("keys", "bos", "eos"),
    [
        ({"add_bos_token": True}, True, False),
        ({"add_bos_token": True, "add_eos_token": True}, True, True),
        ({"add_bos_token": None}, False, False),
        ({"add_bos_token": None, "pre": "llama-bpe"}, True, False),
        ({"add_bos_token": False, "pre": "llama-bpe"}, False, False),
    ],
)
def test_bos_and_eos(path: Path, keys: dict[str, Any], bos: bool, eos: bool) -> None:
    write(path, tokenizer=keys)
    tokenizer = GGUFFile(path).tokenizer()
    plain = tokenizer("hello", add_special_tokens=False).input_ids
    assert tokenizer("hello").input_ids == [1] * bos + plain + [0] * eos
    assert len(plain) == 1


def test_sentencepiece_tokenizer(path: Path) -> None:
    write(path, tokenizer=SPM)
    tokenizer = GGUFFile(path).tokenizer()
    # By score: ll, then ello or llo or hell: "ello" wins, then "hello" and last the space.
    assert tokenizer("hello").input_ids == [1, piece("▁hello")]
    assert tokenizer("hell").input_ids == [1, piece("▁"), piece("hell")]
    assert tokenizer("ö").input_ids == [1, piece("▁"), 3 + 0xC3, 3 + 0xB6]
    assert tokenizer("<s></s>", add_special_tokens=False).input_ids[-2:] == [1, 2]
    assert tokenizer("<0x41>").input_ids == [1, piece("▁"), piece("<0x4"), piece("1>")]
    for text in ("hello ö", "hello  hello é", "h\n"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_sentencepiece_is_llama_tokenizer(path: Path) -> None:
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    write(path, tokenizer=SPM)
    tokenizer = GGUFFile(path).tokenizer()
    vocab = {token: i for i, token in enumerate(SPM["tokens"])}
    merges = generate_merges(vocab, dict(zip(SPM["tokens"], SPM["scores"], strict=True)))
    other = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)
    for text in (
        "",
        " ",
        "hello",
        " hello",
        "  hello\thello ",
        "hello</s>hello ll",
        "日本 é\u0301",
        "<unk>x",
    ):
        assert tokenizer(text).input_ids == other(text).input_ids, text
        assert tokenizer.decode(tokenizer(text).input_ids) == other.decode(other(text).input_ids), text


def test_sentencepiece_switches(path: Path) -> None:
    write(path, tokenizer={**SPM, "add_bos_token": False, "add_space_prefix": False})
    tokenizer = GGUFFile(path).tokenizer()
    assert tokenizer("hello").input_ids == [piece("hello")]
    assert tokenizer.decode(tokenizer(" hello").input_ids) == " hello"


def refused(path: Path, *words: str, tokenizer: bool = False) -> None:
    with pytest.raises(ModelError) as caught:
        file = GGUFFile(path)
        if tokenizer:
            file.tokenizer()
    message = str(caught.value)
    assert all(word in message for word in (str(path), *words)), message
    assert "\n" not in message


def test_not_gguf(path: Path) -> None:
    refused(path, "cannot be opened")
    path.write_bytes(b"")
    refused(path, "not a GGUF file")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(path, "not a GGUF file")
    path.write_bytes(b"GGUF" + (99).to_bytes(4, "little") + bytes(100))
    refused(path, "version 99")


def test_truncated_anywhere(path: Path) -> None:
    write(path, tokenizer={"tokens": ["a"], "token_type": [1], "merges": ["a a"]})
    data = path.read_bytes()
    for size in [*range(4, 3500, 13), *range(3500, len(data), 20011), len(data) - 1]:
        path.write_bytes(data[:size])
        refused(path, "truncated")


def test_damaged(path: Path) -> None:
    write(path)
    path.write_bytes(path.read_bytes().replace(b"ggml.bos_token_id", b"ggml.eos_token_id"))
    refused(path, "damaged", "Duplicate")
    path.unlink()
    write(path)
    path.write_bytes(path.read_bytes().replace(b"smollm", b"smoll\xff"))
    refused(path, "tokenizer.ggml.pre", "UTF-8", tokenizer=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "mamba"}, ['"mamba"', '"llama"', '"phi3"']),
        ({"llama": {"attention.layer_norm_rms_epsilon": None}}, ["llama.attention.layer_norm_rms_epsilon"]),
        ({"llama": {"block_count": None}}, ["llama.block_count"]),
        ({"llama": {"attention.head_count_kv": [2, 2]}}, ["head_count_kv", "[2, 2]"]),
        ({"llama": {"attention.head_count": 0}}, ["llama.attention.head_count", "0"]),
        ({"llama": {"expert_count": 8}}, ["llama.expert_count", "8"]),
        ({"llama": {"attention.causal": False}}, ["attention.causal"]),
        ({"llama": {"attention.sliding_window": 64}}, ["attention.sliding_window"]),
        ({"llama": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, ["rope.scaling.type", "yarn"]),
        ({"llama": {"rope.scaling.attn_factor": 1.5}}, ["rope.scaling.attn_factor"]),
        ({"llama": {"rope.dimension_count": 8}}, ["rope.dimension_count", "8", "16"]),
        ({"llama": {"feed_forward_length": 95}}, ["ffn_gate.weight", "(96, 64)", "(95, 64)"]),
        ({"skip": "blk.1.ffn_up.weight"}, ["no tensor blk.1.ffn_up.weight"]),
        ({"skip": "token_embd.weight"}, ["token_embd.weight"]),
        ({"extra": {"rope_freqs.weight": (np.arange(1, 9, dtype=np.float32), Type.F32)}}, ["rope_freqs", "Llama 3"]),
        ({"extra": {"rope_freqs.weight": (np.full(8, np.nan, np.float32), Type.F32)}}, ["rope_freqs", "Llama 3"]),
        ({"extra": {"rope_freqs.weight": (np.ones(9, np.float32), Type.F32)}}, ["rope_freqs", "Llama 3"]),
        ({"extra": {"rope_freqs.weight": (np.ones(8, np.float16), Type.F16)}}, ["rope_freqs", "F16", "vector of F32"]),
        ({"extra": {"blk.0.attn_q.bias": (np.ones(64, np.float32), Type.F32)}}, ["blk.0.attn_q.bias"]),
    ],
)
def test_refused_models(path: Path, options: dict[str, Any], words: list[str]) -> None:
    write(path, **options)
    refused(path, *words)


def test_refused_type(path: Path) -> None:
    norm = (np.ones(HIDDEN, np.int32), Type.I32)
    write(path, skip="output_norm.weight", extra={"output_norm.weight": norm})
    refused(path, "output_norm.weight", "I32")


def test_refused_more_tokens_than_embeddings(path: Path) -> None:
    rows = (np.ones((5, HIDDEN), np.float32), Type.F32)
    write(path, skip="token_embd.weight", extra={"token_embd.weight": rows})
    refused(path, "5 embeddings", tokenizer=True)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({**SPM, "model": "bert"}, ['"bert"']),
        ({"pre": "unheard-of"}, ['"unheard-of"', "smollm"]),
        ({"pre": None}, ["tokenizer.ggml.pre"]),
        ({"merges": None}, ["tokenizer.ggml.merges"]),
        ({"eos_token_id": None}, ["tokenizer.ggml.eos_token_id"]),
        ({"bos_token_id": None, "add_bos_token": True}, ["tokenizer.ggml.bos_token_id"]),
        ({"padding_token_id": 100000}, ["padding token 100000"]),
        ({"token_type": [1]}, ["do not fit together"]),
        ({"merges": ["h zz"]}, ["vocabulary"]),
        ({"merges": ["hh"]}, ["vocabulary"]),
        ({"add_space_prefix": True}, ["add_space_prefix"]),
    ],
)
def test_refused_tokenizers(path: Path, tokenizer: dict[str, Any], words: list[str]) -> None:
    write(path, tokenizer=tokenizer)
    refused(path, *words, tokenizer=True)


@pytest.mark.long
@needs_smollm2
def test_smollm2_135m_instruct() -> None:
    file = GGUFFile(SMOLLM2)
    config = file.config
    sizes = [config[f"num_{what}"] for what in ("hidden_layers", "attention_heads", "key_value_heads")]
    assert sizes == [30, 9, 3] and config["rope_theta"] == 100000.0 and config["tie_word_embeddings"]
    assert len(file.shapes) == 2 + 30 * 9
    assert np.abs(file.read("model.embed_tokens.weight")).mean() == pytest.approx(0.1, abs=0.05)
    tokenizer = file.tokenizer()
    # Digits stand alone, special tokens stay whole.
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    assert tokenizer("Hello world! 123").input_ids == [19556, 905, 17, 216, 33, 34, 35]
    assert tokenizer("<|im_start|>\n<|im_end|>").input_ids == [1, 198, 2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n") and chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
