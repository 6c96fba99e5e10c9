"""Writes full Hugging Face checkpoints: merged weights, or a fully fine-tuned model.

Tensor by tensor into shards, so that the host holds one shard at a time.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jlora.adapter import Adapter, Saved
from jlora.errors import ModelError
from jlora.hf.architecture import FAMILIES
from jlora.hf.base import Source
from jlora.hf.names import OUTER, Entry, name_table, to_hf
from jlora.model import Decoder, LlamaConfig
from jlora.quant import dequantize

SHARD_BYTES = 5 * 10**9
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def merged_tensor(source: Source, entry: Entry, name: str, adapter: Adapter) -> np.ndarray:
    """One tensor of the stored base with its adapter's share added, W + scale * B A, in float32."""
    stored = name if name in source.shapes else OUTER["embed_tokens"]  # a head that was tied
    return add_adapter(source.read(stored).astype(np.float32), entry, adapter)


def add_adapter(weight: np.ndarray, entry: Entry, adapter: Adapter) -> np.ndarray:
    """A tensor of a base, in the file's layout, with its adapter's share added, or the adapter's own; float32.

    With DoRA, every output's row of the sum is brought to its magnitude.
    """
    part = adapter.get(entry.leaf)
    if isinstance(part, Saved):
        own = part.weight if entry.layer is None else part.weight[entry.layer]
        return to_hf(entry, np.asarray(own, np.float32))
    if part is None or entry.layer is None or (part.ranks is not None and not part.ranks[entry.layer]):
        return weight
    layer, rank = entry.layer, part.lora_b.shape[1]

    def product(a: Any, b: Any) -> np.ndarray:
        return np.asarray(a[layer], np.float32).reshape(-1, rank) @ np.asarray(b[layer], np.float32).reshape(rank, -1)

    delta = product(part.lora_a, part.lora_b)
    if part.initial is not None:
        delta -= product(*part.initial)
    scale = part.scale[layer] if isinstance(part.scale, tuple) else part.scale
    merged = weight + np.float32(scale) * delta.T
    if part.magnitude is None:
        return merged
    magnitude = np.asarray(part.magnitude[layer], np.float32).reshape(-1, 1)
    return merged * (magnitude / np.linalg.norm(merged, axis=1, keepdims=True))


def untied(cfg: LlamaConfig, config: dict[str, Any], adapter: Adapter) -> tuple[LlamaConfig, dict[str, Any]]:
    """Shape and config.json of the merged model: an adapter that has the embedding or the head in full unties them."""
    if not cfg.tie_word_embeddings or not {"embed_tokens", "lm_head"} & adapter.keys():
        return cfg, config
    return replace(cfg, tie_word_embeddings=False), config | {"tie_word_embeddings": False}


def trained_tensor(decoder: Decoder, entry: Entry) -> np.ndarray:
    """One tensor as the model has it on the devices, fully fine-tuned or quantised, in float32."""
    owner = decoder if entry.layer is None else decoder.layers
    leaf = getattr(owner, entry.leaf if hasattr(owner, entry.leaf) else "embed_tokens").get_value()
    if entry.layer is not None:
        leaf = jax.tree.map(lambda array: array[entry.layer], leaf)
    return to_hf(entry, np.asarray(dequantize(leaf, jnp.dtype("float32"))))


def save_checkpoint(
    folder: Path,
    cfg: LlamaConfig,
    tensor: Callable[[str, Entry], np.ndarray],
    config: dict[str, Any],
    dtype: str,
    add_files: Callable[[Path], None],
) -> None:
    """Write config.json, sharded safetensors and what `add_files` puts beside them.

    Args:
      tensor: Hugging Face name and table entry -> array in the file's layout.
      dtype: bfloat16, float16 or float32, of the tensors written.

    Raises:
      ModelError: a tensor is not finite in `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    sizes = [0]
    weight_map: dict[str, int] = {}

    def flush() -> None:
        save_file(shards[-1], folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards[-1] = {}

    for name, entry in name_table(cfg).items():
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(tensor(name, entry).astype(DTYPES[dtype]))
        if not np.isfinite(array).all():
            raise ModelError(f"{folder}: tensor {name} does not fit {dtype}; export with --dtype bfloat16 or float32")
        if sizes[-1] and sizes[-1] + array.nbytes > SHARD_BYTES:
            flush()
            shards.append({})
            sizes.append(0)
        shards[-1][name] = array
        sizes[-1] += array.nbytes
        weight_map[name] = len(shards)
    flush()
    # The number of shards, which their names carry, is known only now.
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / "model.safetensors")
    else:
        names = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
        for number, file in names.items():
            (folder / f"shard-{number}").rename(folder / file)
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {name: names[number] for name, number in weight_map.items()},
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    architecture = FAMILIES[config["model_type"]].architecture
    config |= {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    add_files(folder)
