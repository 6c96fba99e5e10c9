"""One way to run a config on a mesh, and what its forward pass keeps for the backward pass."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jlora.config import Config
from jlora.model.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """One way to run a config.

    Attributes:
      rows: of a micro-batch, on one device.
      batch_size: rows of an optimizer step over all devices; the config's own, where it divides.
    """

    data: int
    fsdp: int
    tensor: int
    remat: str
    quantization: Any
    rows: int
    batch_size: int

    @property
    def place(self) -> tuple[int, int, int, Any]:
        """What decides where the weights lie."""
        return self.data, self.fsdp, self.tensor, self.quantization

    @property
    def micro_batches(self) -> int:
        """Gradient accumulation steps."""
        return self.batch_size // (self.rows * self.data * self.fsdp)

    def settings(self) -> dict[str, Any]:
        """Dotted config key -> value."""
        return {
            "mesh.data": self.data,
            "mesh.fsdp": self.fsdp,
            "mesh.tensor": self.tensor,
            "model.remat": self.remat,
            "training.batch_size": self.batch_size,
            "training.gradient_accumulation_steps": self.micro_batches,
            "model.quantization": self.quantization,
        }


def current(cfg: Config, mesh: dict[str, int], remat: str) -> Layout:
    """The layout that a config asks for, on a mesh whose sizes are known and with a policy that is not `auto`."""
    parts, batch = cfg.training.gradient_accumulation_steps, cfg.training.batch_size
    rows = batch // (parts * mesh["data"] * mesh["fsdp"])
    return Layout(**mesh, remat=remat, quantization=cfg.model.quantization, rows=rows, batch_size=batch)


def saved_bytes(model: ModelConfig, cfg: Config, layout: Layout) -> float:
    """About what the forward pass of a micro-batch keeps for the backward pass, on one device."""
    d, f, h = model.hidden_size, model.intermediate_size, model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    products = 2 * d + (heads + 2 * kv_heads) * h + 2 * f
    mixed, taken = heads * h, (heads + 2 * kv_heads) * h
    width = {
        **{"none": 2 * products, "dots": d + products + mixed, "qkv": d + taken + mixed},
        **{"attention": d + mixed, "full": d, "offload": 0},
    }[layout.remat]
    tokens = layout.rows * cfg.data.max_length
    return tokens * model.num_hidden_layers * width * jnp.dtype(cfg.model.dtype).itemsize / layout.tensor
