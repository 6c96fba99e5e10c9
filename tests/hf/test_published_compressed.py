"""What compressed-tensors itself writes, of every kind that a dense model is published in, is read as it reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_bases import Tensors, make_base, rewrite

from jlora.hf.source import open_source

library = pytest.importorskip("compressed_tensors")

# Format -> scheme of the library.
SCHEMES = {
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "W8A8": "int-quantized",
    "W8A16": "pack-quantized",
    "W4A16": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W4AFP8": "pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
}


def scales_of(weight: torch.Tensor, args: Any) -> Tensors:
    """Scale and zero point of a weight, in bfloat16 as the library's observers make them for its strategy."""
    outputs, inputs = weight.shape
    rows, columns = {
        "tensor": (outputs, inputs),
        "channel": (1, inputs),
        "group": (1, args.group_size),
        "tensor_group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % columns, 0, -outputs % rows))
    blocks = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
    found: Tensors = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = (448 * 6 / weight.float().abs().amax()).reshape(1)
        scale = blocks.abs().amax((1, 3)) / 6 * found["weight_global_scale"]
        return found | {"weight_scale": scale.to(torch.float8_e4m3fn).to(torch.bfloat16)}
    top = {"float": 6.0 if args.num_bits == 4 else 448.0, "int": 2 ** (args.num_bits - 1) - 0.5}[args.type]
    if args.symmetric:
        scale = blocks.abs().amax((1, 3)) / top
    else:
        least, most = blocks.amin((1, 3)).clamp(max=0), blocks.amax((1, 3)).clamp(min=0)
        scale = (most - least) / (2**args.num_bits - 1)
        zero = -(2 ** (args.num_bits - 1)) - (least / scale).round()
        found["weight_zero_point"] = zero.clamp(-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1).to(
            torch.int8
        )
    if args.type == "float" and args.num_bits == 4:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(torch.bfloat16)
    return found | {"weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_that_the_library_decompresses(name: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    if scheme.weights.group_size == 128:
        scheme.weights.group_size = 64  # else half of these weights have no whole group
    compressor = BaseCompressor.get_value_from_registry(SCHEMES[name])

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        made = {"weight": weight} | scales_of(weight, scheme.weights)
        stored = compressor.compress(made, scheme)
        return stored, compressor.decompress(stored, scheme)["weight"]

    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=SCHEMES[name], quantization_status="compressed", ignore=["lm_head"]
    )
    folder, base = tmp_path / "base", make_base(tmp_path / "plain")
    expected = rewrite(base, folder, write, config.model_dump(mode="json"))
    source, plain = open_source(folder), open_source(base)
    assert len(expected) == 14
    for tensor, wanted in expected.items():
        found = source.read(tensor)
        rounded = torch.from_numpy(found).to(wanted.dtype).float().numpy()
        np.testing.assert_array_equal(rounded, wanted.float().numpy())
        assert 0 < np.abs(found - plain.read(tensor).astype(np.float32)).max() < 0.5
