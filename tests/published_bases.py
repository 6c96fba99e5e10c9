"""Tiny Llamas as others publish them quantised, and the weights that the library that wrote them reads from them.

bitsandbytes and transformers write theirs themselves. GPTQ's, AutoAWQ's and packed integers are written here, code by
code, after the libraries' own `pack`, and read back by the libraries' formulas in torch.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import OFF_DEFAULT, copy_folder, make_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

# Inputs in whole blocks of 64 and 128, and rows that no block of 128 or 32 divides.
SIZES: dict[str, Any] = OFF_DEFAULT | {
    **{"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2},
    **{"head_dim": 24, "num_hidden_layers": 2, "torch_dtype": "bfloat16"},
}
Tensors = dict[str, torch.Tensor]
# weight [out, in] -> what is stored beside the module's name, and what the library reads from it
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


def make_base(folder: Path, **overrides: Any) -> Path:
    """A Llama in bfloat16."""
    make_llama(folder, **SIZES | overrides).to(torch.bfloat16).save_pretrained(folder)
    return folder


def with_bitsandbytes(base: Path, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tensors:
    """The folder that transformers writes of `base`, and its weights as bitsandbytes dequantises them.

    Args:
      dtype: that of the weights that bitsandbytes is given, and gives back. options: of transformers' class.
    """
    import bitsandbytes as bnb

    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=dtype, device_map="cpu"
    )
    model.save_pretrained(folder)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            found[f"{name}.weight"] = dequantized(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scb = module.weight.SCB if module.state.SCB is None else module.state.SCB
            found[f"{name}.weight"] = bnb.functional.int8_vectorwise_dequant(module.weight.data, scb)
    return found


def dequantized(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """As bitsandbytes does it, before it is rounded to 16 bits.

    Its kernel for CPUs (0.50.2) takes other absmaxes than its quantiser and its kernel for GPUs where rows are no whole
    blocks; there it is what the latter two do.
    """
    from bitsandbytes.functional import dequantize_4bit, dequantize_blockwise

    state.dtype = torch.float32
    if state.shape[1] % state.blocksize == 0:
        return dequantize_4bit(codes, state)
    pairs = codes.view(torch.uint8).reshape(-1)
    values = state.code[torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1).long()]
    absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return (values * absmax.repeat_interleave(state.blocksize)[: len(values)]).reshape(state.shape)


def rewrite(
    base: Path, folder: Path, write: Writer, settings: dict[str, Any], skip: tuple[str, ...] = ("lm_head",)
) -> Tensors:
    """A copy of `base` with its projections as `write` has them; what is read of them.

    Args:
      settings: config.json's quantization_config. skip: parts of the names of modules that stay as they are.
    """
    copy_folder(base, folder)
    stored, found = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if tensor.ndim != 2 or "embed" in name or any(part in name for part in skip):
            stored[name] = tensor
            continue
        parts, found[name] = write(tensor)
        stored |= {f"{name.removesuffix('weight')}{key}": part.contiguous() for key, part in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, quantization_config=settings)
    return found


def set_config(folder: Path, **keys: Any) -> None:
    """Set keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def fp8_blocks(size: list[int] | None, scales: torch.dtype = torch.float32) -> Writer:
    """As DeepSeek and Qwen publish, by transformers' own quantiser."""
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=size, scale_fmt="float"))

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        made = Fp8Quantize(quantizer)._quantize_one("x.weight", weight)
        codes, scale = made["x.weight"], made["x.weight_scale_inv"].to(scales)
        if size is None:
            scale = scale.reshape(())
        return {"weight": codes, "weight_scale_inv": scale}, Fp8Dequantize(quantizer)._dequantize_one(
            codes, scale.reshape(1, 1) if size is None else scale, torch.float32
        )

    return write


def fp8_cut_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Blocks of 128 x 128 of which the last are cut, as DeepSeek's `weight_dequant` reads them."""
    rows, columns = weight.shape
    scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
    codes = weight.float().to(torch.float8_e4m3fn)
    read = torch.empty(rows, columns)
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            read[i : i + 128, j : j + 128] = codes[i : i + 128, j : j + 128].float() * scale[i // 128, j // 128]
    return {"weight": codes, "weight_scale_inv": scale}, read


def put_bits(codes: list[int], bits: int) -> list[int]:
    """int32 words that hold codes end to end, lowest bits first."""
    number = sum(code << bits * i for i, code in enumerate(codes))
    words = [number >> 32 * i & 2**32 - 1 for i in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 words of each row."""
    return torch.tensor([put_bits(row, bits) for row in codes.tolist()], dtype=torch.int32)


def grouped(weight: torch.Tensor, bits: int, groups: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes [in out], zeros and scales [groups out] of a weight, whose inputs lie in `groups`; float16."""
    number, top = int(groups.max()) + 1, 2**bits - 1
    by_input = weight.float().T
    least = torch.stack([by_input[groups == g].amin(0) for g in range(number)]).clamp(max=0)
    most = torch.stack([by_input[groups == g].amax(0) for g in range(number)]).clamp(min=0)
    if symmetric:
        most = torch.maximum(most, -least)
        least = -most
    scales = ((most - least) / top).half()
    zeros = torch.full_like(least, 2 ** (bits - 1)) if symmetric else (-least / scales).round().clamp(1, top)
    codes = (by_input / scales[groups] + zeros[groups]).round().clamp(0, top)
    return codes.long(), zeros.long(), scales


def gptq(
    bits: int,
    size: int,
    act_order: bool = False,
    symmetric: bool = False,
    second: bool = False,
    bias: bool = False,
    index: bool = True,
) -> Writer:
    """AutoGPTQ's layout; the first version of it stores zeros less one."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // (inputs if size == -1 else size)
        if act_order:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
        codes, zeros, scales = grouped(weight, bits, groups, symmetric)
        stored = {
            "qweight": pack_rows(codes.T, bits).T,
            "qzeros": pack_rows(zeros - (0 if second else 1), bits),
            "scales": scales,
        }
        stored |= {"g_idx": groups.int()} if index else {}
        stored |= {"bias": torch.zeros(outputs, dtype=torch.float16)} if bias else {}
        # `dequantize_weight` of gptqmodel
        return stored, (scales[groups] * (codes - zeros[groups]).half()).T

    return write


def awq(size: int) -> Writer:
    """AutoAWQ's gemm."""

    def pack(codes: torch.Tensor) -> torch.Tensor:
        ordered = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]  # `WQLinear_GEMM.from_linear`
        return pack_rows(ordered.reshape(len(codes), -1), 4)

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        groups = torch.arange(weight.shape[1]) // size
        codes, zeros, scales = grouped(weight, 4, groups, symmetric=False)
        read = (codes - zeros[groups]).to(torch.int8) * scales.repeat_interleave(size, dim=0)  # `dequantize_gemm`
        return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, read.T

    return write


def packed(bits: int, size: int, symmetric: bool = True, act_order: bool = False) -> Writer:
    """compressed-tensors' pack-quantized, in bfloat16."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // size
        if act_order:
            groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(3))]
        codes, zeros, scales = grouped(weight, bits, groups, symmetric)
        scales = scales.to(torch.bfloat16)
        stored = {
            "weight_packed": pack_rows(codes.T, bits),
            "weight_scale": scales.T,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        stored |= {} if symmetric else {"weight_zero_point": pack_rows(zeros, bits).T}
        stored |= {"weight_g_idx": groups.int()} if act_order else {}
        return stored, ((codes - zeros[groups]).to(torch.bfloat16) * scales[groups]).T

    return write


def one_byte(dtype: torch.dtype, by: str) -> Writer:
    """compressed-tensors' float-quantized and int-quantized, or fbgemm's FP8."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        weight = weight.float()
        largest = weight.abs().amax() if by == "tensor" else weight.abs().amax(1, keepdim=True)
        scale = (largest / (127 if dtype == torch.int8 else 448)).to(torch.bfloat16).reshape(-1, 1)
        scale = scale.reshape(1) if by == "tensor" else scale
        codes = weight / scale.float()
        codes = codes.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else codes.clamp(-448, 448).to(dtype)
        stored = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
        return stored, codes.to(torch.bfloat16) * scale

    return write


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        **{"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"]},
        **{"config_groups": {"group_0": group}, "quantization_status": "compressed"},
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 64]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}


def of_gptq(bits: int, size: int, **keys: Any) -> dict[str, Any]:
    """quantization_config of GPTQ."""
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": False} | keys


# Kind -> how projections are written, and quantization_config.
KINDS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "fp8_blocks": (fp8_blocks([8, 64]), FP8 | {"weight_block_size": [8, 64]}),
    "fp8_blocks_bf16_scales": (fp8_blocks([8, 64], torch.bfloat16), FP8 | {"weight_block_size": [8, 64]}),
    "fp8_cut_blocks": (fp8_cut_blocks, FP8 | {"weight_block_size": [128, 128]}),
    "fp8_tensor": (fp8_blocks(None, torch.bfloat16), FP8 | {"weight_block_size": None, "activation_scheme": "static"}),
    "fbgemm_fp8": (one_byte(torch.float8_e4m3fn, "channel"), {"quant_method": "fbgemm_fp8"}),
    "ct_fp8_channel": (one_byte(torch.float8_e4m3fn, "channel"), compressed("float-quantized", num_bits=8)),
    "ct_fp8_tensor": (one_byte(torch.float8_e4m3fn, "tensor"), compressed("float-quantized", num_bits=8)),
    "ct_int8_channel": (one_byte(torch.int8, "channel"), compressed("int-quantized", num_bits=8)),
    "ct_int8_tensor": (one_byte(torch.int8, "tensor"), compressed("int-quantized", num_bits=8)),
    "ct_w4_groups": (packed(4, 64), compressed("pack-quantized", **FOUR)),
    "ct_w4_zeros": (packed(4, 64, symmetric=False), compressed("pack-quantized", **FOUR)),
    "ct_w4_act_order": (packed(4, 64, act_order=True), compressed("pack-quantized", **FOUR, actorder="group")),
    "ct_w8_groups": (packed(8, 64), compressed("pack-quantized", **FOUR | {"num_bits": 8})),
    "awq": (awq(64), AWQ),
    "gptq_4": (gptq(4, 64), of_gptq(4, 64)),
    "gptq_4_no_index": (gptq(4, 64, index=False), of_gptq(4, 64)),
    "gptq_4_symmetric_bias": (gptq(4, 64, symmetric=True, bias=True), of_gptq(4, 64, sym=True)),
    "gptq_4_act_order": (gptq(4, 64, act_order=True), of_gptq(4, 64, desc_act=True)),
    "gptq_4_whole": (gptq(4, -1), of_gptq(4, -1)),
    "gptq_v2": (gptq(4, 64, second=True), of_gptq(4, 64, checkpoint_format="gptq_v2")),
    "gptq_3": (gptq(3, 64), of_gptq(3, 64)),
    "gptq_8": (gptq(8, 64), of_gptq(8, 64)),
    "gptq_2": (gptq(2, 64), of_gptq(2, 64)),
}
