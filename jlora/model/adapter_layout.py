"""An adapter beside the model that it belongs to: whether it fits, and its layout over a mesh."""

from dataclasses import replace
from typing import Any

import chex
import jax
import numpy as np
from jaxtyping import Array

from jlora.errors import ModelError
from jlora.model.adapter import Adapter, Lora, Saved
from jlora.model.boundary import finding
from jlora.model.config import NUM_INPUTS, ModelConfig, block_weights, outer_weights, projection_shapes
from jlora.model.sharding import named_sharding, place


def adapter_axes(cfg: ModelConfig, adapter: Adapter) -> Any:
    """A tree like the adapter, with logical axes for arrays: those of the weight, cut at the rank in A and B."""
    stacked, outer = block_weights(cfg), outer_weights(cfg)
    tree: dict[str, Any] = {}
    part: Any
    for name, part in adapter.items():
        if isinstance(part, Saved):
            axes = ("layers", *stacked[name].axes) if name in stacked else outer.get(name, outer["embed_tokens"]).axes
            tree[name] = Saved(axes)  # type: ignore[arg-type]
            continue
        inputs = NUM_INPUTS.get(name, 1)
        ins, outs = stacked[name].axes[:inputs], stacked[name].axes[inputs:]
        a, b = ("layers", *ins, "rank"), ("layers", "rank", *outs)
        magnitude = None if part.magnitude is None else ("layers", *outs)
        initial = None if part.initial is None else (a, b)
        scale = None if part.scale is None else ("layers",)
        tree[name] = replace(part, lora_a=a, lora_b=b, scale=scale, magnitude=magnitude, initial=initial)
    return tree


def require_fits(adapter: Adapter, cfg: ModelConfig) -> None:
    """An adapter, arrays or shapes, must have the dims of the weights it belongs to.

    Raises:
      ModelError: it is another base's, and where that shows.
    """
    layers, shapes, stacked = cfg.num_hidden_layers, projection_shapes(cfg), block_weights(cfg)
    for name, part in adapter.items():
        try:
            if isinstance(part, Lora):
                inputs, outputs = shapes[name]
                chex.assert_tree_shape_prefix(part.lora_a, (layers, *inputs))
                chex.assert_tree_shape_prefix(part.lora_b, (layers,))
                chex.assert_tree_shape_suffix(part.lora_b, outputs)
            else:
                whole = (layers, *stacked[name].shape) if name in stacked else (cfg.vocab_size, cfg.hidden_size)
                chex.assert_tree_shape_prefix(part.weight, whole)
        except AssertionError as error:
            raise ModelError(
                f"the adapter's {name} does not fit this base ({finding(error)}); give the base that it was trained on"
            ) from None


def place_adapter(adapter: Adapter, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> Adapter:
    """The adapter laid out over `mesh` like the weights it belongs to; abstract in, abstract out.

    Raises:
      ModelError: see `require_fits`.
    """
    require_fits(adapter, cfg)

    def lay_out(
        array: Array | np.ndarray | jax.ShapeDtypeStruct, dims: tuple[str, ...]
    ) -> Array | jax.ShapeDtypeStruct:
        sharding = named_sharding(mesh, dims)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return place(np.asarray(array), sharding)

    return jax.tree.map(lay_out, adapter, adapter_axes(cfg, adapter))
