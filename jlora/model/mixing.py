"""What each layer's attention is told: how heads are turned, and how far a query sees. Both may differ by layer.

Layers are run by one scan, so a layer's number is an array, and what differs is chosen by it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jlora.model.attention import Attention, Places
from jlora.model.config import ModelConfig, kinds
from jlora.model.rope import Rotary, rotary_table
from jlora.model.sharding import constrain

# A layer's number: an array in a scan.
Layer = Int[Array, ""] | int


def rotary_by_layer(
    cfg: ModelConfig, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
) -> Callable[[Layer], Rotary | None]:
    """Layer -> cosines and sines of the tokens' angles, each computed once for all layers that turn alike.

    None where heads are not turned.
    """
    ropes, which = kinds(cfg.ropes)
    tables = [
        jax.tree.map(lambda table: constrain(table, "act_batch", None, None), rotary_table(positions, segments, rope))
        for rope in ropes
    ]
    if len(tables) <= 1:
        return lambda _: tables[0] if tables else None
    stacked: Rotary = jax.tree.map(lambda *same: jnp.stack(same), *tables)
    return lambda layer: jax.tree.map(lambda table: table[jnp.asarray(np.array(which, np.int32))[layer]], stacked)


def attend(
    cfg: ModelConfig,
    attention: Attention,
    layer: Layer,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    places: Places,
) -> Float[Array, "B T N H"]:
    """`attention` with the window of a layer. A kernel is compiled for one window, so there is a branch for each."""
    windows, which = kinds(cfg.windows)
    branches = [partial(attention, places=places, window=window, softcap=cfg.attention_softcap) for window in windows]
    if len(branches) == 1:
        return branches[0](q, k, v)
    return jax.lax.switch(jnp.asarray(np.array(which, np.int32))[layer], branches, q, k, v)
