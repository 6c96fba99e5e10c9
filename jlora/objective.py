"""Losses. Takes a function to hidden states and a batch; knows nothing of how they are made.

Every loss is a sum over trained tokens, returned with their number: whoever adds up micro-batches and
devices divides once.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.sharding import constrain

# Logits that are held at once on a device, and the fewest tokens that still keep its matmul units busy.
CHUNK_LOGITS, MIN_CHUNK = 2**24, 256


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
    """Sum of weighted cross-entropy without ever holding logits for more than a chunk of tokens.

    On each device the trained tokens move to the front, and a chunk that has none is not computed:
    prompts and padding cost no pass through the head. The gradient of a chunk is taken while its logits
    are there, as Liger Kernel does (arXiv:2410.10989, section 3.2): two products with the head for a
    frozen head, where recomputing the logits takes three. There is no gradient for `weights`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, length, width = hidden.shape
    shards, split = (1, 1) if mesh.empty else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
    groups = math.gcd(batch, shards)
    hidden = constrain(hidden, "act_batch", None, "act_embed")  # whole rows: they are put in another order
    # G groups, one a device, of N tokens.
    h = constrain(hidden.reshape(groups, -1, width), "act_batch", None, "act_embed")
    num_tokens = h.shape[1]
    return _cross_entropy(
        chunk_size(num_tokens, head.shape[0] // split),
        h,
        head.astype(hidden.dtype),
        targets.reshape(groups, num_tokens),
        weights.reshape(groups, num_tokens),
    )


def chunk_size(num_tokens: int, vocab: int) -> int:
    """Tokens of a device whose logits are held at once, by the share of the vocabulary that it holds."""
    return min(num_tokens, max(MIN_CHUNK, 2 ** int(math.log2(max(1, CHUNK_LOGITS // vocab)))))


def _sum_over_chunks(
    chunk: int,
    hidden: Float[Array, "G N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "G N"],
    weights: Float[Array, "G N"],
    to_hidden: bool,
    to_head: bool,
) -> tuple[Float[Array, ""], Float[Array, "G N D"] | None, Float[Array, "V D"] | None]:
    """The loss, and its gradients as far as they are asked for; the head's in float32."""
    groups, num_tokens, width = hidden.shape
    num_chunks = -(-num_tokens // chunk)
    padding = num_chunks * chunk - num_tokens
    order = jnp.argsort(weights == 0.0, axis=1, stable=True)

    def chunks(x: Array) -> Array:
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(groups, num_chunks, chunk, *x.shape[2:]), 1, 0)

    def computed(h: Array, t: Array, w: Array) -> tuple[Array, Array | None, Array | None]:
        logits = jnp.einsum("gnd,vd->gnv", h, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "act_batch", None, "act_vocab")
        normalizer = jax.nn.logsumexp(logits, axis=2, keepdims=True)
        target_logit = jnp.take_along_axis(logits, t[:, :, None], axis=2)
        loss = jnp.sum((normalizer - target_logit)[:, :, 0] * w)
        if not (to_hidden or to_head):
            return loss, None, None
        is_target = jnp.arange(head.shape[0])[None, None] == t[:, :, None]
        to_logits = ((jnp.exp(logits - normalizer) - is_target) * w[:, :, None]).astype(h.dtype)
        to_h = jnp.einsum("gnv,vd->gnd", to_logits, head) if to_hidden else None
        to_w = None
        if to_head:
            to_w = jnp.einsum("gnv,gnd->vd", to_logits, h, preferred_element_type=jnp.float32)
        return loss, to_h, to_w

    def skipped(h: Array, t: Array, w: Array) -> tuple[Array, Array | None, Array | None]:
        return (
            jnp.zeros(()),
            jnp.zeros_like(h) if to_hidden else None,
            jnp.zeros(head.shape, jnp.float32) if to_head else None,
        )

    def add(totals: Any, scanned: tuple[Array, Array, Array]) -> tuple[Any, Array | None]:
        loss, to_h, to_w = jax.lax.cond(scanned[2].any(), computed, skipped, *scanned)
        return jax.tree.map(jnp.add, totals, (loss, to_w)), to_h

    zeros = (jnp.zeros(()), jnp.zeros(head.shape, jnp.float32) if to_head else None)
    (loss, to_w), to_h = jax.lax.scan(add, zeros, (chunks(hidden), chunks(targets), chunks(weights)))
    if to_h is not None:
        to_h = jnp.moveaxis(to_h, 0, 1).reshape(groups, -1, width)
        to_h = jnp.take_along_axis(to_h, jnp.argsort(order, axis=1)[:, :, None], axis=1)
    return loss, to_h, to_w


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(chunk: int, hidden: Array, head: Array, targets: Array, weights: Array) -> Array:
    return _sum_over_chunks(chunk, hidden, head, targets, weights, False, False)[0]


def _forward(chunk: int, hidden: Any, head: Any, targets: Any, weights: Any) -> tuple[Array, Any]:
    values = hidden.value, head.value, targets.value, weights.value
    loss, to_hidden, to_head = _sum_over_chunks(chunk, *values, hidden.perturbed, head.perturbed)
    return loss, (to_hidden, None if to_head is None else to_head.astype(head.value.dtype))


def _backward(chunk: int, gradients: tuple[Array | None, Array | None], scale: Array) -> tuple[Array | None, ...]:
    to_hidden, to_head = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    return to_hidden, to_head, None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)
