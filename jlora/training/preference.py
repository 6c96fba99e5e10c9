"""Losses on pairs of answers: DPO, IPO, SLiC's hinge and ORPO. Takes sums of log-probabilities; knows no model.

A packed row holds both sequences of a pair as two segments that follow each other: 1 is the chosen one of the
row's first pair, 2 the rejected one, 3 and 4 are the second pair. A loss is a sum over pairs, returned with
their number.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jlora.config import ObjectiveSection

# A sequence has a token of the prompt and one of the answer at least.
SHORTEST_PAIR = 4


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
        case _:
            raise ValueError(f"{cfg.name} is not an objective on pairs")
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
