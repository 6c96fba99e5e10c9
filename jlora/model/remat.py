"""Rematerialisation: what a layer's forward pass keeps for the backward pass, by the names of config key `model.remat`.

Each policy of `LADDER` keeps less on the device than the one before it, and is paid for with a recomputation or,
for `offload`, with copies to the host's memory and back. Knows the names that `llama` and `attention` give to
values, and no more of them.
"""

from collections.abc import Callable
from typing import Any, get_args

import jax

from jlora.config import Remat
from jlora.model.adapter import QUANTIZED_PRODUCT
from jlora.model.attention.interface import ATTENTION_OUTPUT
from jlora.runtime.private_jax import CUDNN_FORWARD

LADDER: tuple[str, ...] = tuple(name for name in get_args(Remat) if name != "auto")

# What `jlora.model.llama` marks with `checkpoint_name`, beside ATTENTION_OUTPUT.
LAYER_INPUT, ATTENTION_INPUT = "layer_input", "attention_input"


def policy(remat: str) -> Callable[..., Any]:
    """Whether (and where) the result of a primitive is kept; names of `LADDER` but `none`."""
    policies = jax.checkpoint_policies
    match remat:
        case "dots":
            # By name too, for a policy does not see into a quantised product.
            named = _named(ATTENTION_OUTPUT, QUANTIZED_PRODUCT)
            return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
        case "qkv":
            return _named(ATTENTION_INPUT, ATTENTION_OUTPUT)
        case "attention":
            return _named(ATTENTION_OUTPUT)
        case "full":
            return policies.nothing_saveable
        case "offload":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=[LAYER_INPUT],
                offload_src="device",
                offload_dst="pinned_host",
            )
    raise ValueError(f"unknown remat policy {remat!r}")


def _named(*names: str) -> Callable[..., bool]:
    by_name = jax.checkpoint_policies.save_only_these_names(*names)

    def keeps(primitive: Any, *args: Any, **params: Any) -> bool:
        return primitive.name == CUDNN_FORWARD or by_name(primitive, *args, **params)

    return keeps
