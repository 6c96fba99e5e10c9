"""What an adapter's share is multiplied by, in bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest

from jlora.model.adapter import Lora, project


@pytest.mark.parametrize(("alpha", "rank"), [(32, 12), (32, 24), (40, 96), (32, 16)])
def test_bfloat16_takes_the_scale_as_it_is(alpha, rank):
    """The mean gain over many elements, as torch has it, which multiplies bfloat16 by a Python float."""
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 512, 64), (64, rank), (rank, 64)))
    weight = jnp.zeros((64, 64), jnp.bfloat16)

    def share(scale: float) -> np.ndarray:
        lora = Lora(a, b, jnp.float32(scale), 0.0)
        return np.asarray(project("btd,df->btf", x.astype(jnp.bfloat16), weight, lora, None), np.float64)

    plain, scaled = share(1.0), share(alpha / rank)
    gain = (plain * scaled).sum() / (plain * plain).sum() / (alpha / rank)
    assert gain == pytest.approx(1.0, abs=2e-4)
