"""Losses: cross-entropy, summed or token by token, and on pairs of answers DPO, IPO, SLiC's hinge and ORPO.

Takes hidden states; knows nothing of how they are made. A loss is a sum over trained tokens, or over pairs, returned
with their number: whoever adds up micro-batches and devices divides once.

A packed row holds both sequences of a pair as two segments that follow each other: 1 is the chosen one of the
row's first pair, 2 the rejected one, 3 and 4 are the second pair.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jlora.config import ObjectiveSection
from jlora.model.adapter import Rows
from jlora.model.layers import capped
from jlora.model.sharding import constrain, context_size

# Logits that are held at once on a device, and the fewest tokens that still keep its matmul units busy.
CHUNK_LOGITS, MIN_CHUNK = 2**24, 256
# A sequence has a token of the prompt and one of the answer at least.
SHORTEST_PAIR = 4

# Tokens of a chunk, the soft cap of logits, and the rows of the head that alone are trained, or None: all or none.
How = tuple[int, float | None, tuple[int, ...] | None]


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    softcap: float | None = None,
    rows: Rows | None = None,
) -> Float[Array, ""]:
    """Cross-entropy of the next token, summed by weight, without ever holding logits for more than a chunk of tokens.

    The same sum, in float32, as `torch.nn.functional.cross_entropy(..., reduction="sum")` over labels that are not
    ignored.

    On each device the trained tokens move to the front, and a chunk that has none is not computed:
    prompts and padding cost no pass through the head. The gradient of a chunk is taken while its logits
    are there, as Liger Kernel does (arXiv:2410.10989, section 3.2): two products with the head for a
    frozen head, where recomputing the logits takes three. There is no gradient for `weights`.

    Args:
      rows: those of the head that are trained, which are in `head`: they have a gradient, and the others none.
    """
    chunk, h, head, *grouped = _grouped(hidden, head, targets, weights)
    ids, trained = _trained(head, rows)
    return _cross_entropy((chunk, softcap, ids), h, *trained, *grouped)


def _trained(head: Float[Array, "V D"], rows: Rows | None) -> tuple[tuple[int, ...] | None, tuple[Array, Array | None]]:
    """Which rows of the head alone are trained; the head, with no gradient of its own then, and they."""
    if rows is None:
        return None, (head, None)
    return rows.ids, (jax.lax.stop_gradient(head), rows.weight)


def token_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    softcap: float | None = None,
    rows: Rows | None = None,
) -> Float[Array, "B T"]:
    """Weighted cross-entropy of each token, for losses that are no sum over tokens.

    Held in memory as `chunked_cross_entropy` is. What a token's loss counts is known only once all are
    added up, so the backward pass computes the logits again: three products with a frozen head.
    """
    chunk, h, head, *grouped = _grouped(hidden, head, targets, weights)
    ids, trained = _trained(head, rows)
    losses = _token_losses((chunk, softcap, ids), h, *trained, *grouped)
    return _by_row(losses, targets.shape)


def correct_tokens(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """The weight of each token that is the likeliest next one, else 0; of equal logits the lowest id is.

    Held in memory as `chunked_cross_entropy` is.
    """
    chunk, hidden, head, grouped, weights = _grouped(hidden, head, targets, weights)
    order = jnp.argsort(weights == 0.0, axis=1, stable=True)

    def counted(h: Array, t: Array, w: Array) -> Array:
        logits = jnp.einsum("gnd,vd->gnv", h, head, preferred_element_type=jnp.float32)
        likeliest = jnp.argmax(constrain(logits, "act_shard", None, "act_vocab"), axis=2)
        return (likeliest == t).astype(w.dtype) * w

    def of_chunk(scanned: tuple[Array, Array, Array]) -> Array:
        return jax.lax.cond(scanned[2].any(), counted, lambda h, t, w: jnp.zeros(t.shape), *scanned)

    parts = [_in_chunks(x, order, chunk) for x in (hidden, grouped, weights)]
    right = _in_place(jax.lax.map(of_chunk, (parts[0], parts[1], parts[2])), order)
    return _by_row(right, targets.shape)


def _grouped(hidden: Array, head: Array, targets: Array, weights: Array) -> tuple[int, Array, Array, Array, Array]:
    """Tokens of a chunk, then hidden states [G N D], head, targets and weights [G N] of G groups, one a device."""
    mesh = jax.sharding.get_abstract_mesh()
    batch, length, width = hidden.shape
    shards, split = (1, 1) if mesh.empty else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
    groups = math.gcd(batch, shards)
    hidden = constrain(hidden, "act_batch", "act_tokens", "act_embed")  # all of a device: they are put in another order
    h = constrain(_by_device(hidden, groups), "act_shard", None, "act_embed")
    return (
        chunk_size(h.shape[1], head.shape[0] // split),
        h,
        head.astype(hidden.dtype),
        _by_device(targets, groups),
        _by_device(weights, groups),
    )


def _by_device(x: Shaped[Array, "B T *width"], groups: int) -> Shaped[Array, "G N *width"]:
    """The tokens of each device: of every group of rows as many parts as there are devices for a row."""
    parts, (length, *width) = context_size(), x.shape[1:]
    if parts > 1:
        x = jnp.moveaxis(x.reshape(groups, -1, parts, length // parts, *width), 2, 1)
    return x.reshape(groups * parts, -1, *width)


def _by_row(x: Float[Array, "G N"], shape: tuple[int, ...]) -> Float[Array, "B T"]:
    """The inverse of `_by_device`; on every device whole rows, of one number a token."""
    (batch, length), parts = shape, context_size()
    if parts > 1:
        groups = len(x) // parts
        x = jnp.moveaxis(x.reshape(groups, parts, batch // groups, length // parts), 1, 2)
    return constrain(x.reshape(shape), "act_batch", None)


def chunk_size(num_tokens: int, vocab: int) -> int:
    """Tokens of a device whose logits are held at once, by the share of the vocabulary that it holds.

    A quarter of its tokens at most, or few chunks would be without a trained token.
    """
    most = min(CHUNK_LOGITS // vocab, num_tokens // 4)
    return min(num_tokens, max(MIN_CHUNK, 2 ** int(math.log2(max(1, most)))))


def _in_chunks(x: Array, order: Int[Array, "G N"], chunk: int) -> Array:
    """[G N ...] -> [C G chunk ...]: tokens in the given order, padded to whole chunks."""
    x = jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _in_place(x: Array, order: Int[Array, "G N"]) -> Array:
    """The inverse of `_in_chunks`."""
    x = jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(x, back.reshape(*back.shape, *[1] * (x.ndim - 2)), axis=1)


def _over_chunks(
    how: How,
    to_hidden: bool,
    to_head: bool,
    hidden: Float[Array, "G N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "G N"],
    weights: Float[Array, "G N"],
) -> tuple[Float[Array, "G N"], Float[Array, "G N D"] | None, Float[Array, "trained D"] | None]:
    """Each token's loss, and the gradients of their sum as far as they are asked for; the head's in float32, of the
    rows that `how` names, or of all."""
    chunk, softcap, ids = how
    trained = jax.ShapeDtypeStruct((head.shape[0] if ids is None else len(ids), head.shape[1]), jnp.float32)
    order = jnp.argsort(weights == 0.0, axis=1, stable=True)

    def computed(h: Array, t: Array, w: Array) -> tuple[Array, Array | None, Array | None]:
        logits = jnp.einsum("gnd,vd->gnv", h, head, preferred_element_type=jnp.float32)
        logits = capped(constrain(logits, "act_shard", None, "act_vocab"), softcap)
        normalizer = jax.nn.logsumexp(logits, axis=2, keepdims=True)
        target_logit = jnp.take_along_axis(logits, t[:, :, None], axis=2)
        loss = (normalizer - target_logit)[:, :, 0] * w
        if not (to_hidden or to_head):
            return loss, None, None
        is_target = (jnp.arange(head.shape[0])[None, None] == t[:, :, None]).astype(jnp.float32)
        to_logits = (jnp.exp(logits - normalizer) - is_target) * w[:, :, None]
        if softcap is not None:
            to_logits *= 1.0 - jnp.square(logits / softcap)
        to_logits = to_logits.astype(h.dtype)
        to_h = jnp.einsum("gnv,vd->gnd", to_logits, head) if to_hidden else None
        to_w = None
        if to_head:
            of_rows = to_logits if ids is None else to_logits[..., np.array(ids, np.int32)]
            to_w = jnp.einsum("gnv,gnd->vd", of_rows, h, preferred_element_type=jnp.float32)
        return loss, to_h, to_w

    def skipped(h: Array, t: Array, w: Array) -> tuple[Array, Array | None, Array | None]:
        return (
            jnp.zeros(t.shape),
            jnp.zeros_like(h) if to_hidden else None,
            jnp.zeros(trained.shape, trained.dtype) if to_head else None,
        )

    def add(total: Array | None, scanned: tuple[Array, Array, Array]) -> tuple[Array | None, Any]:
        loss, to_h, to_w = jax.lax.cond(scanned[2].any(), computed, skipped, *scanned)
        return jax.tree.map(jnp.add, total, to_w), (loss, to_h)

    zeros = jnp.zeros(trained.shape, trained.dtype) if to_head else None
    parts = [_in_chunks(x, order, chunk) for x in (hidden, targets, weights)]
    to_w, by_token = jax.lax.scan(add, zeros, (parts[0], parts[1], parts[2]))
    losses, to_h = jax.tree.map(partial(_in_place, order=order), by_token)
    return losses, to_h, to_w


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(how: How, hidden: Array, head: Array, rows: Array | None, targets: Array, weights: Array) -> Array:
    return _over_chunks(how, False, False, hidden, head, targets, weights)[0].sum()


def _forward(how: How, hidden: Any, head: Any, rows: Any, targets: Any, weights: Any) -> tuple[Array, Any]:
    values = hidden.value, head.value, targets.value, weights.value
    to_head = (head if rows is None else rows).perturbed
    losses, to_hidden, to_w = _over_chunks(how, hidden.perturbed, to_head, *values)
    if to_w is not None and rows is None:
        to_w = to_w.astype(head.value.dtype)
    return losses.sum(), (to_hidden, *((to_w, None) if rows is None else (None, to_w)))


def _backward(how: How, gradients: tuple[Array | None, ...], scale: Array) -> tuple[Array | None, ...]:
    return *jax.tree.map(lambda g: (g.astype(scale.dtype) * scale).astype(g.dtype), gradients), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_losses(how: How, hidden: Array, head: Array, rows: Array | None, targets: Array, weights: Array) -> Array:
    return _over_chunks(how, False, False, hidden, head, targets, weights)[0]


def _token_forward(how: How, hidden: Any, head: Any, rows: Any, targets: Any, weights: Any) -> tuple[Array, Any]:
    values = hidden.value, head.value, targets.value, weights.value
    perturbed = (head if rows is None else rows).perturbed
    return _over_chunks(how, False, False, *values)[0], (values, () if perturbed else None)


def _token_backward(how: How, saved: Any, scales: Array) -> tuple[Array | None, ...]:
    (hidden, head, targets, weights), head_is_trained = saved
    to_head = head_is_trained is not None
    _, to_h, to_w = _over_chunks(how, True, to_head, hidden, head, targets, weights * scales)
    if how[2] is not None:  # the rows', in float32
        return to_h, None, to_w, None, None
    return to_h, None if to_w is None else to_w.astype(head.dtype), None, None, None


_token_losses.defvjp(_token_forward, _token_backward, symbolic_zeros=True)


def pair_sums(values: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B P 2"]:
    """Sums over the tokens of each sequence: of the chosen one, then the rejected one, of all P pairs a row can hold.

    Args:
      segments: 1, 2, ... within a row; 0 is padding.
    """
    pairs = segments.shape[1] // SHORTEST_PAIR
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=1 + 2 * pairs))(values, segments)
    return sums[:, 1:].reshape(-1, pairs, 2)


def pair_loss(
    cfg: ObjectiveSection,
    policy: Float[Array, "B P 2"],
    reference: Float[Array, "B P 2"],
    lengths: Float[Array, "B P 2"],
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss summed over pairs, their number, and sums of what TRL logs, under its names.

    Args:
      policy, reference: log-probability of each answer, summed over its tokens; ORPO takes no reference.
      lengths: tokens of each answer; 0 where there is no pair.
    """
    real = lengths[..., 0] > 0
    per_token = jnp.where(real[..., None], policy / jnp.maximum(lengths, 1.0), -1.0)
    ratios = policy - reference
    delta = cfg.beta * (ratios[..., 0] - ratios[..., 1])
    rewards = cfg.beta * ratios
    match cfg.name:
        case "dpo":  # arXiv:2305.18290, equation 7; smoothed, it is the conservative DPO of one of its authors
            right, wrong = -jax.nn.log_sigmoid(delta), -jax.nn.log_sigmoid(-delta)
            losses = (1.0 - cfg.label_smoothing) * right + cfg.label_smoothing * wrong
        case "ipo":  # arXiv:2310.12036, equation 17, over the mean of an answer's tokens as its authors compute it
            mean = ratios / jnp.maximum(lengths, 1.0)
            losses = jnp.square(mean[..., 0] - mean[..., 1] - 1.0 / (2.0 * cfg.beta))
        case "hinge":  # arXiv:2309.06657, equation 10
            losses = jax.nn.relu(1.0 - delta)
        case "orpo":  # arXiv:2403.07691, equations 4 to 7
            odds = per_token - _log1mexp(per_token)
            losses = -per_token[..., 0] - cfg.beta * jax.nn.log_sigmoid(odds[..., 0] - odds[..., 1])
            rewards = cfg.beta * per_token
    chosen, rejected = jax.lax.stop_gradient((rewards[..., 0], rewards[..., 1]))
    logps = jax.lax.stop_gradient(per_token if cfg.name == "orpo" else policy)
    figures = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[..., 0],
        "logps/rejected": logps[..., 1],
    }

    def total(x: Array) -> Array:
        return jnp.where(real, x, 0.0).sum()

    return total(losses), real.sum(dtype=jnp.float32), {name: total(x) for name, x in figures.items()}


def _log1mexp(x: Array) -> Array:
    """log(1 - exp(x)) for x < 0, without cancellation at either end."""
    x = jnp.minimum(x, -1e-7)  # an answer of probability one has infinite odds, and no gradient
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -0.1))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
