"""Quantised bases that cannot be read right are refused before a weight is read, in a sentence that names what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import one_sentence, shell
from published_bases import KINDS, Tensors, make_base, rewrite, set_config, with_bitsandbytes
from safetensors.torch import load_file, save_file
from tiny import copy_folder, make_rows, write_config
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from jlora.errors import ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.published import METHODS
from jlora.hf.source import check_names, open_source, read_config

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
MODULE = "model.layers.1.self_attn.o_proj."
STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind -> a folder of it, made once."""
    root = tmp_path_factory.mktemp("refused")
    base = make_base(root / "plain")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            if kind == "nf4":
                with_bitsandbytes(base, root / kind, **NF4)
            elif kind == "int8":
                with_bitsandbytes(base, root / kind, load_in_8bit=True)
            else:
                rewrite(base, root / kind, *KINDS[kind])
        return root / kind

    return folder


def without(ending: str) -> Callable[[Tensors], None]:
    def mutate(tensors: Tensors) -> None:
        del tensors[MODULE + ending]

    return mutate


def put(ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def mutate(tensors: Tensors) -> None:
        tensors[MODULE + ending] = change(tensors[MODULE + ending]).contiguous()

    return mutate


def blob(**keys: Any) -> Callable[[Tensors], None]:
    """bitsandbytes' state with other keys."""

    def change(state: torch.Tensor) -> torch.Tensor:
        return torch.tensor(list(json.dumps(json.loads(bytes(state.tolist())) | keys).encode()), dtype=torch.uint8)

    return put(STATE, change)


def a_bias(tensors: Tensors) -> None:
    tensors[MODULE + "bias"] = torch.tensor([0.0, 0.5] * 64).half()


# Kind, what is done to its tensors, and what the sentence says after the file's name.
DAMAGED = {
    "fp8_no_scales": ("fp8_blocks", without("weight_scale_inv"), "o_proj.weight is F8_E4M3 and has no scales as fp8"),
    "fp8_no_weight": ("fp8_blocks", without("weight"), "o_proj.weight_scale_inv has no weight beside it"),
    "fp8_other_grid": (
        "fp8_blocks",
        put("weight_scale_inv", lambda x: x[:, :2]),
        r"scale_inv has the shape \[16, 2\], wh",
    ),
    "fp8_scales_of_ints": (
        "fp8_blocks",
        put("weight_scale_inv", lambda x: x.int()),
        "weight_scale_inv is I32, which is no",
    ),
    "fp8_not_fp8": (
        "fp8_blocks",
        put("weight", lambda x: x.float()),
        "o_proj.weight is F32 beside .*_scale_inv, not F8",
    ),
    "gptq_no_scales": ("gptq_4", without("scales"), "o_proj.qweight has codes and no scales"),
    "gptq_no_zeros": ("gptq_4", without("qzeros"), "o_proj.qweight has codes and no qzeros"),
    "gptq_cut_scales": (
        "gptq_4",
        put("scales", lambda x: x[:, 1:]),
        r"scales has the shape \[3, 127\], not \[any, 128\]",
    ),
    "gptq_cut_zeros": ("gptq_4", put("qzeros", lambda x: x[:2]), r"qzeros has the shape \[2, 16\], not \[3, 16\] as"),
    "gptq_no_groups": ("gptq_4", put("scales", lambda x: x[:0]), r"scales has the shape \[0, 128\], not \[any, 128\]"),
    "gptq_other_group": ("gptq_4", put("g_idx", lambda x: x + 1), "g_idx names groups from 1 to 3, of 3"),
    "gptq_negative": ("gptq_4", put("g_idx", lambda x: x - 1), "g_idx names groups from -1 to 1, of 3"),
    "gptq_five_bits": (
        "gptq_4",
        put("qweight", lambda x: torch.cat([x, x[:6]])),
        "30 words for 192 inputs, which is 5 bits",
    ),
    "gptq_floats": ("gptq_4", put("qweight", lambda x: x.float()), "qweight is F32"),
    "gptq_bias": ("gptq_4", a_bias, "o_proj.bias is not zero, and the model has no such bias"),
    "awq_no_zeros": ("awq", without("qzeros"), "o_proj.qweight has codes and no qzeros"),
    "awq_groups": ("awq", put("scales", lambda x: x[:2]), r"qzeros has the shape \[3, 16\], not \[2, 16\]"),
    "packed_no_scale": ("ct_w4_groups", without("weight_scale"), "weight_packed has codes and no weight_scale"),
    "packed_no_shape": ("ct_w4_groups", without("weight_shape"), "weight_packed has codes and no weight_shape"),
    "packed_other_shape": (
        "ct_w4_groups",
        put("weight_shape", lambda x: x * 2),
        r"\[128, 24\], which is none of \[256, 384",
    ),
    "packed_groups": (
        "ct_w4_groups",
        put("weight_scale", lambda x: x.repeat(1, 3)[:, :5]),
        "5 groups, which do not divide",
    ),
    "packed_zeros": (
        "ct_w4_zeros",
        put("weight_zero_point", lambda x: x[1:]),
        r"has the shape \[15, 3\], not \[16, 3\]",
    ),
    "int8_no_scales": (
        "ct_int8_channel",
        without("weight_scale"),
        "o_proj.weight is I8 and has no scales as compressed",
    ),
    "bnb_int8_scales": ("int8", put("SCB", lambda x: x[1:]), r"SCB has the shape \[127\], not \[128\]"),
    "bnb_int8_layout": ("int8", put("weight_format", lambda x: x + 1), "a layout of bitsandbytes for one GPU"),
    "nf4_no_absmax": ("nf4", without("weight.absmax"), "o_proj.weight has codes and no absmax"),
    "nf4_no_nested": ("nf4", without("weight.nested_absmax"), "o_proj.weight has codes and no nested_absmax"),
    "nf4_no_state": ("nf4", without(STATE), "o_proj.weight is U8 and has no scales as bitsandbytes"),
    "nf4_cut": ("nf4", put("weight", lambda x: x[1:]), r"has 12287 bytes, not the 12288 of nf4 of \[128, 192\]"),
    "nf4_absmax": ("nf4", put("weight.absmax", lambda x: x[1:]), r"absmax has the shape \[383\], not \[384\]"),
    "nf4_levels": (
        "nf4",
        put("weight.quant_map", lambda x: x * 1.1),
        "quant_map has other levels than bitsandbytes' nf4",
    ),
    "nf4_blob": ("nf4", put(STATE, lambda x: x[1:]), "nf4 is no state of bitsandbytes"),
    "nf4_blob_list": ("nf4", put(STATE, lambda x: torch.tensor([91, 93], dtype=torch.uint8)), "it is no JSON object"),
    "nf4_large_blob": ("nf4", put(STATE, lambda x: x.repeat(99)), "is no state of bitsandbytes"),
    "nf4_shape": ("nf4", blob(shape=[128, -192]), r"says the shape \[128, -192\]"),
    "nf4_other_shape": ("nf4", blob(shape=[64, 384]), r"misshapen.*o_proj.weight \[64, 384\] instead of \[128, 192\]"),
    "nf4_block": ("nf4", blob(blocksize=0), "says the block size 0"),
    "nf4_large_offset": ("nf4", blob(nested_offset=10**400), "nested_offset=1000"),
    "nf4_offset": ("nf4", blob(nested_offset="x"), "nested_offset='x'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_codes_that_contradict_their_scales_are_refused_by_name(case: str, folders: Any, tmp_path: Path) -> None:
    kind, mutate, says = DAMAGED[case]
    folder = copy_folder(folders(kind), tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    mutate(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=says) as refused:
        source = open_source(folder)
        check_names(source.model, source.shapes, str(folder))
    assert str(refused.value).startswith(str(folder)) and "\n" not in str(refused.value)


CT, GPTQ, AWQ = (KINDS[kind][1] for kind in ("ct_w4_groups", "gptq_4", "awq"))
UNREAD = {
    "unknown": (
        {"quant_method": "new"},
        "quant_method='new' is not read, only bitsandbytes, fp8, .* and gptq; use",
    ),
    "none": ({"bits": 4}, "quant_method=None is not read"),
    "list": (["gptq"], r"quantization_config must be a JSON object, not \['gptq'\]"),
    "awq_gemv": (AWQ | {"version": "GEMV"}, "version='GEMV' of awq is not read, only gemm"),
    "awq_symmetric": (AWQ | {"zero_point": False}, "zero_point=False of awq"),
    "gptq_marlin": (
        GPTQ | {"checkpoint_format": "marlin"},
        "checkpoint_format='marlin' of gptq is not read, only gptq and",
    ),
    "gptq_bits": (GPTQ | {"bits": 5}, "bits=5 of gptq is not read, only 2 and 3 and 4 and 8"),
    "ct_marlin": (CT | {"format": "marlin-24"}, "format='marlin-24' of compressed-tensors"),
    "ct_sparse": (CT | {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config=.* changes the numerics"),
    "ct_rotated": (CT | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config=.* changes the numerics"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_method_or_version_that_is_not_read_is_named_and_needs_no_weights(case: str, tmp_path: Path) -> None:
    settings, says = UNREAD[case]
    folder = make_base(tmp_path / "base")
    set_config(folder, quantization_config=settings)
    for read in (lambda: open_source(folder), lambda: read_config(folder, "base")):
        with pytest.raises(ModelError, match=says):
            read()


# What the published folders of each method that is not read say, and what helps.
OTHERS = {
    "aqlm": ({"in_group_size": 8, "num_codebooks": 1}, "before it was quantised"),
    "auto-round": ({"bits": 4, "packing_format": "auto_round:auto_gptq"}, "export as auto_gptq or auto_awq"),
    "intel/auto-round": ({"bits": 4, "backend": "auto_round:gptq"}, "export as auto_gptq or auto_awq"),
    "bitnet": ({"linear_class": "bitlinear"}, "has no other form"),
    "eetq": ({"weights": "int8"}, "model.quantization: nf4 or int8"),
    "fouroversix": ({}, "before it was quantised"),
    "fp_quant": ({"forward_dtype": "mxfp4"}, "before it was quantised"),
    "gemma": ({}, "before it was quantised"),
    "gguf": ({}, "give the .gguf file itself"),
    "higgs": ({"bits": 4, "p": 2}, "before it was quantised"),
    "hqq": ({"quant_config": {"weight_quant_params": {"nbits": 4}}}, "before it was quantised"),
    "metal": ({"bits": 4}, "before it was quantised"),
    "modelopt": ({"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "export as compressed-tensors"),
    "mxfp4": ({"modules_to_not_convert": []}, "only mixtures of experts are published: use a dense model"),
    "mxfp8": ({}, "export as compressed-tensors"),
    "nvfp4": ({}, "export as compressed-tensors"),
    "quanto": ({"weights": "int4"}, "model.quantization: nf4 or int8"),
    "quark": ({"global_quant_config": {}}, "export as compressed-tensors"),
    "sinq": ({"nbits": 4}, "before it was quantised"),
    "spqr": ({"bits": 3}, "before it was quantised"),
    "torchao": ({"quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}, "before it was quantised"),
    "vptq": ({"config_for_layers": {}}, "before it was quantised"),
}


def test_each_method_of_transformers_is_read_or_refused_with_what_helps(tmp_path: Path) -> None:
    known = {"bitsandbytes_4bit", "bitsandbytes_8bit", *METHODS}
    others = dict.fromkeys(AUTO_QUANTIZER_MAPPING.keys() - known, ({}, "before it was quantised")) | OTHERS
    raw = json.loads((make_base(tmp_path) / "config.json").read_text())
    for method, (settings, remedy) in others.items():
        with pytest.raises(ModelError) as refused:
            parse_config(raw | {"quantization_config": {"quant_method": method} | settings}, "base")
        said = str(refused.value)
        assert said.startswith(f"base: quantization_config.quant_method='{method}' is not read, only"), said
        assert remedy in said and "\n" not in said


def test_a_folder_of_modelopt_that_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base")
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    for read in (lambda: open_source(folder), lambda: read_config(folder, "base")):
        with pytest.raises(ModelError, match="quant_method='modelopt' is not read, .*export as compressed-tensors"):
            read()


def test_a_command_ends_with_code_4(folders: Any, tmp_path: Path) -> None:
    folder = copy_folder(folders("awq"), tmp_path / "base")
    set_config(folder, quantization_config=AWQ | {"version": "gemv"})
    config = write_config(tmp_path / "run.yaml", folder, make_rows(tmp_path / "rows.jsonl"), tmp_path / "run")
    done = shell("train", "--config", config)
    assert done.returncode == 4 and "version='gemv' of awq is not read" in one_sentence(done.stderr)
    set_config(folder, quantization_config={"quant_method": "hqq"})
    done = shell("train", "--config", config)
    assert done.returncode == 4 and "quant_method='hqq' is not read" in one_sentence(done.stderr)
