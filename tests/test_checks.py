"""The checks that every test runs under are on."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jlora.model.layers import rms_norm


def test_shapes_are_those_of_the_annotations():
    """NumPy's rules would compute it: what is wrong is one dim too few."""
    with pytest.raises(TypeCheckError, match=r"B T \*heads D"):
        rms_norm(jnp.ones((3, 4)), jnp.ones(4), 1e-5)
