"""Losses. Takes a function to hidden states and a batch; knows nothing of how they are made.

Every loss is a sum over trained tokens, returned with their number: whoever adds up micro-batches and
devices divides once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.sharding import constrain

CHUNK = 256


def next_token_loss(
    hidden_fn: Callable[[], Float[Array, "B T D"]],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Cross-entropy of the next token, summed over trained tokens, and their number; both float32.

    The same sum as `torch.nn.functional.cross_entropy(..., reduction="sum")` over labels that are not
    ignored. See `chunked_cross_entropy` for how it is held in memory.
    """
    return chunked_cross_entropy(hidden_fn(), head, targets, weights), weights.sum()


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Sum of weighted cross-entropy without ever holding logits for more than a chunk of each row.

    In each row the trained tokens move to the front, and a chunk in which no row has any is not
    computed: prompts and padding cost no pass through the head. The backward pass recomputes a
    chunk's logits.
    """
    hidden = constrain(hidden, "act_batch", None, "act_embed")  # whole rows: they are put in another order
    order = jnp.argsort(weights == 0.0, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)
    weights = jnp.take_along_axis(weights, order, axis=1)
    head = head.astype(hidden.dtype)

    batch, length, width = hidden.shape
    chunk = min(CHUNK, length)
    num_chunks = -(-length // chunk)
    padding = num_chunks * chunk - length

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, num_chunks, chunk, *x.shape[2:]), 1, 0)

    def loss_of(h: Array, t: Array, w: Array) -> Array:
        logits = jnp.einsum("btd,vd->btv", h, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "act_batch", None, "act_vocab")
        target_logit = jnp.take_along_axis(logits, t[:, :, None], axis=2)[:, :, 0]
        return jnp.sum((jax.nn.logsumexp(logits, axis=2) - target_logit) * w)

    # Around the condition, not in its branch: what a branch saves, the head too, is saved anew for each chunk.
    @jax.checkpoint
    def loss_if_any(h: Array, t: Array, w: Array) -> Array:
        return jax.lax.cond(w.any(), loss_of, lambda *_: jnp.zeros(()), h, t, w)

    def add(total: Array, scanned: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + loss_if_any(*scanned), None

    total, _ = jax.lax.scan(add, jnp.zeros(()), (chunks(hidden), chunks(targets), chunks(weights)))
    return total
