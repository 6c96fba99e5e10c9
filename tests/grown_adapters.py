"""Adapters that change what a model computes, since their B is not zero, and runs that hold one."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tiny import make_completions, write_config

from jlora.config import LoraSection, load_config
from jlora.hf.architecture import parse_config
from jlora.hf.load import hash_base
from jlora.hf.source import open_source
from jlora.model.adapter import Adapter
from jlora.model.adapter_init import new_adapter
from jlora.model.llama import Decoder
from jlora.model.sharding import one_device_mesh
from jlora.training import optim
from jlora.training.checkpoint import Checkpoints
from jlora.training.step import init_state


def make_run(folder: Path, base: Path, *overrides: str) -> Path:
    """A run folder with a checkpoint of an adapter, whose B is not zero; nothing is trained."""
    rows = make_completions(folder.parent / "rows.jsonl")
    folder.mkdir()
    cfg = load_config(write_config(folder / "config.yaml", base, rows, folder), overrides)
    (folder / "config.yaml").write_text(cfg.dump_yaml(), encoding="utf-8")
    source = open_source(base)
    adapter = new_adapter(cfg.lora, parse_config(source.config, "base"), 0)
    grown = {name: dataclasses.replace(part, lora_b=part.lora_b + 0.02) for name, part in adapter.items()}
    trained, _ = optim.split({"adapter": grown, "base": {}}, "lora")
    checkpoints = Checkpoints(folder / "checkpoints", 1)
    identity = {"hashes": {"base": hash_base(source, "base")}}
    checkpoints.save(1, init_state(trained, cfg, one_device_mesh()), {}, identity, None)
    checkpoints.close()
    return folder


def grown(pretrained):
    section, model = LoraSection(rank=4, alpha=8.0), pretrained.base.cfg
    adapter = new_adapter(section, model, 0)
    grow = {name: dataclasses.replace(lora, lora_b=jnp.full_like(lora.lora_b, 0.02)) for name, lora in adapter.items()}
    return section, grow


def random_adapter(base: Decoder) -> Adapter:
    """An adapter on every projection whose B is not zero."""
    cfg = LoraSection(rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    fresh = new_adapter(cfg, base.cfg, 3)
    draw = np.random.default_rng(0)
    return {
        name: dataclasses.replace(lora, lora_b=jnp.asarray(draw.normal(0, 0.1, lora.lora_b.shape), jnp.float32))
        for name, lora in fresh.items()
    }
