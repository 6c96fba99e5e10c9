"""Products of float32 in float32, wherever that is the dtype of a model, a proof or a norm.

GPUs multiply float32 in TF32 (10 bits of mantissa) and TPUs in bfloat16 (7 bits) unless JAX is told otherwise, while a
product is traced. Nothing changes on CPUs, nor in other dtypes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp


@contextmanager
def products_in(dtype: jnp.dtype) -> Iterator[None]:
    """What is traced within, backward passes too, multiplies float32 as such if that is `dtype`; also a decorator."""
    if dtype != jnp.float32:
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield
