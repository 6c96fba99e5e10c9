"""A LoRA adapter as a GGUF file, which llama.cpp adds to a base in GGUF (`--lora`); as its convert_lora_to_gguf.py."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.tensor_mapping import get_tensor_name_map

from jlora.config import LoraSection
from jlora.errors import ModelError
from jlora.hf.families import FAMILIES
from jlora.hf.gguf_header import read_header
from jlora.hf.gguf_writer import architecture_for, turned
from jlora.hf.names import tensor_name
from jlora.hf.peft import exported_tensors, factor_name
from jlora.model.adapter import Adapter, Lora
from jlora.model.config import ModelConfig


def write_gguf_adapter(
    file: Path, cfg: ModelConfig, config: dict[str, Any], adapter: Adapter, section: LoraSection
) -> None:
    """Write A and B of every module in float32, and read them back.

    llama.cpp multiplies each product by alpha / rank; what a module's own scale is beyond that goes into B.

    Args:
      config: the base's config.json.

    Raises:
      ModelError: the adapter trains what llama.cpp does not add (DoRA, whole weights, rows, biases), or is not finite.
    """
    for name, part in adapter.items():
        if not isinstance(part, Lora) or part.magnitude is not None:
            what = "DoRA's magnitudes" if isinstance(part, Lora) else f"{name} itself"
            raise ModelError(
                f"{file}: the run trains {what}, which llama.cpp's adapters cannot hold; write --gguf instead"
            )
    arch, architecture = architecture_for(cfg, config, str(file))
    stored = get_tensor_name_map(architecture.arch, cfg.num_hidden_layers)
    own, alpha = FAMILIES[architecture.model_type].names, section.alpha
    found = exported_tensors(file, adapter, cfg.names)
    tensors: dict[str, np.ndarray] = {}
    for name, part in adapter.items():
        assert isinstance(part, Lora)
        for layer, scale in enumerate(np.asarray(part.scale)):
            if not scale:
                continue
            down, up = (found[factor_name(cfg.names, name, layer, f"lora_{side}.weight")] for side in "AB")
            ratio = np.float32(float(scale) * len(down) / alpha)
            weight = stored.get_name(tensor_name(own, name, layer), (".weight",))
            tensors[f"{weight}.lora_a"] = down
            tensors[f"{weight}.lora_b"] = turned(cfg, architecture, name, up * ratio)
    writer = GGUFWriter(file, arch)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        for name, tensor in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    read = read_header(file).tensors
    same = read.keys() == tensors.keys() and all(
        np.array_equal(np.memmap(read[name].file, "<f4", "r", read[name].offset, read[name].shape), tensor)
        for name, tensor in tensors.items()
    )
    if not same:
        raise ModelError(f"{file}: what was written is not what is read back; please report this")
