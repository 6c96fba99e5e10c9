"""PEFT LoRA folders <-> `Adapter`: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as [R, in] and B as [out, R], one pair a layer.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError
from safetensors.numpy import save

from jlora.adapter import Adapter, Lora, scaling
from jlora.config import PROJECTIONS, LoraSection, describe
from jlora.errors import ModelError
from jlora.hf.base import open_safetensors, read_floats, read_json, replace_folder
from jlora.hf.names import BLOCK
from jlora.model import LlamaConfig, projection_shapes

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Initialisations that leave the base as it is; others (pissa, olora, corda, loftq, ...) take their share
# out of the base's weights, so that the adapter means nothing without those.
INITS_OF_ADAPTER_ALONE = (True, False, None, "gaussian", "eva", "orthogonal")

# Keys of PEFT's LoraConfig that jlora reads, or that say nothing about the adapter's maths.
READ = ("peft_type", "init_lora_weights", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
SILENT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("megatron_core", "qalora_group_size", "exclude_modules", "layers_pattern"),
    *("eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
)


def tensor_name(projection: str, layer: int, factor: str) -> str:
    """PEFT's name of one factor, `lora_A` or `lora_B`."""
    module = BLOCK[projection].removesuffix(".weight")
    return f"base_model.model.model.layers.{layer}.{module}.{factor}.weight"


def read_adapter_config(folder: Path) -> LoraSection:
    """The adapter's options as a config section.

    Raises:
      ModelError: not a LoRA adapter, or an option that jlora does not compute, by name.
    """
    where = folder / CONFIG
    raw = read_json(where)
    if raw.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {raw.get('peft_type')!r}; only LORA adapters are read")
    if raw.get("init_lora_weights") not in INITS_OF_ADAPTER_ALONE:
        raise ModelError(
            f"{where}: init_lora_weights={raw['init_lora_weights']!r} changed the base's weights too; convert the "
            "adapter to plain LoRA (path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    for key, value in raw.items():
        neutral = value in (None, False, "none") or value == {} or value == []
        if key not in READ and key not in SILENT and not neutral:
            raise ModelError(f"{where}: option {key}={value!r} is not supported, so the adapter is not loaded")
    try:
        targets = raw["target_modules"]
        if not isinstance(targets, str | list):
            raise TypeError(f"target_modules is {targets!r}, not a list of names")
        named = [targets] if isinstance(targets, str) else [str(t).rpartition(".")[2] for t in targets]
        return LoraSection(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout") or 0.0,
            target_modules=sorted(set(named)),
            use_rslora=bool(raw.get("use_rslora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else repr(error)
        raise ModelError(f"{where}: not a usable LoRA configuration ({reason})") from None


def load_adapter(folder: Path, cfg: LlamaConfig, base_hash: str, dropout: float) -> Adapter:
    """Read a PEFT folder for a base of shape `cfg`.

    Args:
      base_hash: SHA-256 of the base it will work on; compared where the adapter says its own.
      dropout: dropout probability of the result (PEFT's value is a training setting).

    Raises:
      ModelError: no adapter, missing, extra, misshapen or non-finite tensors, or another base.
    """
    section = read_adapter_config(folder)
    where = folder / WEIGHTS
    with open_safetensors(where) as file:
        tensors = {name: read_floats(file, name, where) for name in file.keys()}
        trained_on = (file.metadata() or {}).get("jlora_base_sha256")
    if trained_on is not None and trained_on != base_hash:
        raise ModelError(
            f"{where}: was trained on another base (tensors {trained_on[:12]}..., this base "
            f"{base_hash[:12]}...); give the base it belongs to"
        )
    wanted: dict[str, tuple[int, int]] = {}
    for name in section.targets:
        width_in, width_out = (math.prod(dims) for dims in projection_shapes(cfg)[name])
        for layer in range(cfg.num_hidden_layers):
            wanted[tensor_name(name, layer, "lora_A")] = (section.rank, width_in)
            wanted[tensor_name(name, layer, "lora_B")] = (width_out, section.rank)
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not known" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems += [
        f"{name} holds NaN or infinity"
        for name in wanted
        if name in tensors and not np.isfinite(tensors[name].astype(np.float32)).all()
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(f"{where}: does not fit this base and its own configuration: {problems[0]}{more}")
    adapter: Adapter = {}
    for name in section.targets:
        inputs, outputs = projection_shapes(cfg)[name]
        layers = range(cfg.num_hidden_layers)
        a = np.stack([tensors[tensor_name(name, i, "lora_A")].astype(np.float32).T for i in layers])
        b = np.stack([tensors[tensor_name(name, i, "lora_B")].astype(np.float32).T for i in layers])
        adapter[name] = Lora(
            lora_a=jnp.asarray(a.reshape(-1, *inputs, section.rank)),
            lora_b=jnp.asarray(b.reshape(-1, section.rank, *outputs)),
            scale=scaling(section),
            dropout=dropout,
        )
    return adapter


def serialize(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file, the same bytes every time: the library writes metadata in an order of chance."""
    file = save(tensors, metadata)
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end]) | {"__metadata__": metadata}
    return file[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + file[end:]


def save_adapter(folder: Path, adapter: Adapter, section: LoraSection, base: str, base_hash: str) -> None:
    """Write a PEFT folder, whole or not at all; tensors in float32.

    Args:
      base: name or path of the base, for `base_model_name_or_path`.

    Raises:
      ModelError: a factor is not finite.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, lora in adapter.items():
        num_layers, rank = lora.lora_b.shape[:2]
        a = np.asarray(jax.device_get(lora.lora_a), np.float32).reshape(num_layers, -1, rank)
        b = np.asarray(jax.device_get(lora.lora_b), np.float32).reshape(num_layers, rank, -1)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ModelError(f"{folder}: the adapter of {name} is not finite, so nothing was written")
        for layer in range(num_layers):
            tensors[tensor_name(name, layer, "lora_A")] = np.ascontiguousarray(a[layer].T)
            tensors[tensor_name(name, layer, "lora_B")] = np.ascontiguousarray(b[layer].T)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": section.rank,
        "lora_alpha": int(section.alpha) if section.alpha == int(section.alpha) else section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": [name for name in PROJECTIONS if name in adapter],
        "use_rslora": section.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / WEIGHTS).write_bytes(serialize(tensors, {"format": "pt", "jlora_base_sha256": base_hash}))
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    replace_folder(temporary, folder)
