"""What jlora takes from inside JAX because no public name has it: here alone, and each with why and until which JAX.

A new JAX may move any of it: `tests/runtime/test_private_jax.py` says what, and each is imported where it is used, so
that the rest goes on working.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The primitive of cuDNN's forward pass: remat knows the kernel's results by it, which have no names of their own.
# Until JAX lets one name them, as it does splash attention's (`residual_checkpoint_name`); 0.12 does not.
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"


def job() -> Any:
    """The job that `jax.distributed` joined: `client` (its key-value store and barriers) and `num_processes`.

    `jax.process_count` would start the devices. Until the store has a public name; it has none in 0.12.
    """
    from jax._src import distributed

    return distributed.global_state


@contextmanager
def gpu_is_cuda() -> Iterator[None]:
    """Lower for CUDA where there is no GPU: JAX resolves the alias "gpu" by asking backends that are up, and none is.

    Until jax issues 23971 and 28376 are fixed; in 0.12 they are not.
    """
    from unittest.mock import patch

    from jax._src import xla_bridge

    resolve = xla_bridge.canonicalize_platform
    with patch.object(xla_bridge, "canonicalize_platform", lambda name: "cuda" if name == "gpu" else resolve(name)):
        yield


@contextmanager
def no_mask_gradient() -> Iterator[None]:
    """Trace cuDNN's attention without a gradient of its mask, which nobody asks for.

    JAX asks cuDNN for that of any bias, made in a workspace of [B N T S] that no peak compiled without the GPU shows:
    1 GiB for 32 heads at 4096 tokens. Until 0.11.1, which asks for none of a boolean mask (jax pull request 39512);
    0.11.2 drops the function.
    """
    from unittest.mock import patch

    from jax._src.cudnn import fused_attention_stablehlo

    if not hasattr(fused_attention_stablehlo, "should_export_dbias"):
        yield
        return
    with patch.object(fused_attention_stablehlo, "should_export_dbias", lambda *_: False):
        yield
