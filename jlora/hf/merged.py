"""Writes full Hugging Face checkpoints: merged weights, or a fully fine-tuned model.

A few rows of a tensor at a time, so that the host holds no more than those.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory

from jlora.errors import ModelError
from jlora.files.atomic import write_json
from jlora.hf.families import FAMILIES
from jlora.hf.names import name_table
from jlora.hf.source import FLOATS
from jlora.hf.weights import Weights, blocks
from jlora.hf.wrapped import WRAPPED_IN
from jlora.model.adapter import Adapter
from jlora.model.config import ModelConfig

SHARD_BYTES = 5 * 10**9
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def untied(cfg: ModelConfig, config: dict[str, Any], adapter: Adapter) -> tuple[ModelConfig, dict[str, Any]]:
    """Shape and config.json of the merged model: an adapter that has the embedding or the head in full unties them."""
    if not cfg.tie_word_embeddings or not {"embed_tokens", "lm_head"} & adapter.keys():
        return cfg, config
    return replace(cfg, tie_word_embeddings=False), config | {"tie_word_embeddings": False}


def stored_bytes(cfg: ModelConfig, dtype: str) -> int:
    """Bytes of all tensors of a checkpoint in `dtype`."""
    return sum(math.prod(entry.hf_shape) for entry in name_table(cfg).values()) * np.dtype(DTYPES[dtype]).itemsize


def save_checkpoint(
    folder: Path,
    cfg: ModelConfig,
    weights: Weights,
    config: dict[str, Any],
    dtype: str,
    add_files: Callable[[Path], None],
) -> None:
    """Write config.json, sharded safetensors and what `add_files` puts beside them.

    A text model that was taken out of another is written as one of its own.

    Args:
      dtype: bfloat16, float16 or float32, of the tensors written.

    Raises:
      ModelError: a tensor is not finite in `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture, names = FAMILIES[config["model_type"]].architecture, FAMILIES[config["model_type"]].names
    table, width = name_table(replace(cfg, names=names)), np.dtype(DTYPES[dtype]).itemsize
    found = dict(zip(table, name_table(cfg), strict=True))  # where the weights are read
    sizes = {name: math.prod(entry.hf_shape) * width for name, entry in table.items()}
    pattern = "model{suffix}.safetensors"
    shards = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=pattern, max_shard_size=SHARD_BYTES
    )
    for file, shard in shards.filename_to_tensors.items():
        with (folder / file).open("wb") as out:
            out.write(header({name: table[name].file_shape for name in shard}, dtype))
            for name in shard:
                entry = table[name]
                pieces: Iterable[np.ndarray] = (weights.rows(found[name], entry, *rows) for rows in blocks(cfg, entry))
                if entry.input_first:  # whole, since its rows are the columns of all pieces
                    pieces = [np.concatenate(list(pieces)).T]
                for piece in pieces:
                    with np.errstate(over="ignore"):
                        rows = piece.astype(DTYPES[dtype])
                    if not np.isfinite(rows).all():
                        raise ModelError(
                            f"{folder}: tensor {name} does not fit {dtype}; export with --dtype bfloat16 or float32"
                        )
                    out.write(np.ascontiguousarray(rows).view(np.uint8).data)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    gone = ("torch_dtype", "dtype", WRAPPED_IN, "quantization_config")
    config = {key: value for key, value in config.items() if key not in gone}
    config |= {"architectures": [architecture], "dtype": dtype, "torch_dtype": dtype}
    write_json(folder / "config.json", config)
    add_files(folder)


def header(shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """What a safetensors file begins with: the tensors lie behind it in this order, of one dtype."""
    stored = next(name for name, known in FLOATS.items() if known == DTYPES[dtype])
    tensors: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape) * FLOATS[stored].itemsize
        tensors[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the data begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
