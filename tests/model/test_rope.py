"""Rotary embedding is a rotation of pairs, compiled or op by op."""

import chex
import jax.numpy as jnp
import numpy as np

from jlora.model import rope
from jlora.model.rope import rope_frequencies, rotary_table, rotate

ROPE = rope.Rope(523.0, 10, None)


class Rope(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_pairs_are_turned_as_complex_numbers_are(self):
        x = np.random.default_rng(0).standard_normal((2, 5, 3, 10)).astype(np.float32)
        positions = np.array([[0, 1, 2, 0, 1], [0, 1, 2, 3, 200]], np.int32)

        @self.variant
        def turned(x, positions):
            return rotate(x, rotary_table(positions, jnp.ones_like(positions), ROPE))

        angles = positions[..., None, None] * rope_frequencies(ROPE).astype(np.float64)
        pairs = (x[..., :5] + 1j * x[..., 5:]) * np.exp(1j * angles)
        expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
        np.testing.assert_allclose(turned(jnp.asarray(x), jnp.asarray(positions)), expected, rtol=0, atol=1e-4)
