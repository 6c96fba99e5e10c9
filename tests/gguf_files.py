"""Models in GGUF files written by the `gguf` package, with tensors as llama.cpp's converter has them."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
LLAMA = {
    "context_length": 128,
    "embedding_length": HIDDEN,
    "block_count": LAYERS,
    "feed_forward_length": FFN,
    "rope.dimension_count": HEAD_DIM,
    "rope.freq_base": 54321.0,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 3e-6,
}
# Hugging Face name -> (name in the file, shape); written out so that a wrong name table shows.
LAYER = {
    "self_attn.q_proj": ("attn_q", (HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HEADS * HEAD_DIM)),
    "mlp.gate_proj": ("ffn_gate", (FFN, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (FFN, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, FFN)),
    "input_layernorm": ("attn_norm", (HIDDEN,)),
    "post_attention_layernorm": ("ffn_norm", (HIDDEN,)),
}
SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "a b", "Ġ Ġ"]
GPT2 = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": SPECIAL + sorted(ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES] + ["<tool>"],
    "merges": MERGES,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "unknown_token_id": 0,
    "padding_token_id": 2,
    "add_bos_token": False,
}
GPT2["token_type"] = [int(TokenType.CONTROL)] * 3 + [int(TokenType.NORMAL)] * (len(GPT2["tokens"]) - 4)
GPT2["token_type"] += [int(TokenType.USER_DEFINED)]
# "hello" before "he" and "ll" in rank order is impossible; "ello" has a better score than "hell".
PIECES = ["▁", "h", "e", "l", "o", "ll", "ello", "hell", "he", "llo", "▁h", "▁hello", "hello", "é"]
# Enough to join up the name of a byte token, which must not happen.
PIECES += ["<0x4", "1>", "x4", "<0", "<", "0", "x", "4", "1", ">"]
SPM = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES],
    "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
    "token_type": [int(TokenType.UNKNOWN)] + [int(TokenType.CONTROL)] * 2 + [int(TokenType.BYTE)] * 256,
}
SPM["token_type"] += [int(TokenType.NORMAL)] * len(PIECES)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """convert_hf_to_gguf.py, `LlamaModel.permute`."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def weights(vocab: int, tied: bool) -> dict[str, tuple[str, np.ndarray]]:
    """Hugging Face name -> (name in the file, random float32 in the Hugging Face layout)."""
    shapes = {"model.embed_tokens": ("token_embd", (vocab, HIDDEN)), "model.norm": ("output_norm", (HIDDEN,))}
    shapes |= {} if tied else {"lm_head": ("output", (vocab, HIDDEN))}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{hf}": (f"blk.{i}.{n}", shape) for hf, (n, shape) in LAYER.items()}
    rng = np.random.default_rng(0)
    return {
        f"{hf}.weight": (f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
        for hf, (name, shape) in shapes.items()
    }


def write(
    path: Path,
    qtype: Type = Type.F32,
    tied: bool = True,
    arch: str = "llama",
    llama: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    template: str | None = None,
    extra: dict[str, tuple[np.ndarray, Type]] | None = None,
    skip: str | None = None,
) -> dict[str, np.ndarray]:
    """Writes a model; the dict arguments override, a None in them removes. Returns what must be read."""
    vocab = {**GPT2, **(tokenizer or {})} if (tokenizer or {}).get("model", "gpt2") == "gpt2" else tokenizer
    assert vocab is not None
    writer = GGUFWriter(path, arch)
    for prefix, values in (("llama", {**LLAMA, **(llama or {})}), ("tokenizer.ggml", vocab)):
        for name, value in values.items():
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
            }
            if value is not None:
                add.get(type(value), writer.add_array)(f"{prefix}.{name}", value)
    if template:
        writer.add_chat_template(template)
    expected = {}
    for hf, (name, value) in weights(len(vocab["tokens"]), tied).items():
        kind = qtype if value.ndim == 2 else Type.F32
        stored = value
        if ".attn_q." in name:
            stored = permute(value, HEADS)
        elif ".attn_k." in name:
            stored = permute(value, KV_HEADS)
        # The rows are permuted whole and the blocks lie inside a row, so this is what comes back.
        expected[hf] = dequantize(quantize(value, kind), kind)
        if name != skip:
            writer.add_tensor(name, quantize(stored, kind), raw_dtype=kind)
    for name, (value, kind) in (extra or {}).items():
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
