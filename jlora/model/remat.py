"""Rematerialisation: what a layer's forward pass keeps for the backward pass, by the names of config key `model.remat`.

Each policy of `LADDER` keeps less on the device than the one before it, and is paid for with a recomputation or,
for `offload`, with copies to the host's memory and back. Knows the names that `llama`, `block`, `adapter` and
`attention` give to values, and no more of them.
"""

from collections.abc import Callable
from typing import Any, get_args

import jax

from jlora.config import Remat
from jlora.model.adapter import ADAPTER_PRODUCT
from jlora.model.attention.interface import ATTENTION_OUTPUT
from jlora.runtime.private_jax import CUDNN_FORWARD

LADDER: tuple[str, ...] = tuple(name for name in get_args(Remat) if name != "auto")

# What `llama` and `block` mark with `checkpoint_name`: the residual stream into a layer and after attention, with what
# attention and MLP add to it where that goes through norms of its own; q, k and v; gate and up.
LAYER_INPUT, MIDDLE, ATTENTION_INPUT, MLP_INPUT = "layer_input", "middle", "attention_input", "mlp_input"
# A sum of base and adapter is kept in place of both: backward needs no more of a layer whose weights are frozen.
KEPT = {
    "lean": (MIDDLE, ATTENTION_OUTPUT, ATTENTION_INPUT, MLP_INPUT, ADAPTER_PRODUCT),
    "qkv": (MIDDLE, ATTENTION_OUTPUT, ATTENTION_INPUT),
    "attention": (ATTENTION_OUTPUT,),
}


def policy(remat: str) -> Callable[..., Any]:
    """Whether (and where) the result of a primitive is kept; names of `LADDER` but `none`."""
    policies = jax.checkpoint_policies
    match remat:
        case "lean" | "qkv" | "attention":
            return _named(*KEPT[remat])
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
