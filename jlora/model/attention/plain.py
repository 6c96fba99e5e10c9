"""The reference that every kernel is checked against: all scores in memory."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jlora.model.attention.interface import ATTENTION_OUTPUT, Places
from jlora.model.layers import capped


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    places: Places,
    window: int | None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped queries, scores and softmax in float32.

    Matches `eager_attention_forward` of transformers' Llama. Positions restart in every segment, so
    "same segment, no later position" is causality within it; padding is segment 0 and sees itself only.
    """
    num_groups = q.shape[2] // k.shape[2]
    q_grouped = q.reshape(*q.shape[:2], k.shape[2], num_groups, q.shape[3])
    scores = jnp.einsum("btkgh,bskh->bkgts", q_grouped, k, preferred_element_type=jnp.float32)
    position, key_position = places.q_positions[:, :, None], places.kv_positions[:, None, :]
    visible = (places.q_segments[:, :, None] == places.kv_segments[:, None, :]) & (key_position <= position)
    if window is not None:
        visible &= key_position > position - window
    scores = capped(scores * q.shape[-1] ** -0.5, softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return checkpoint_name(jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape), ATTENTION_OUTPUT)
