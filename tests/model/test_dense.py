"""The product with a weight that may be trained: the einsum that it says, with gradients that are not rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.model.layers import dense

EQUATIONS = {
    "btd,dnh->btnh": ((2, 6, 8), (8, 3, 4)),
    "btnh,nhd->btd": ((2, 6, 3, 4), (3, 4, 8)),
    "btd,df->btf": ((2, 6, 8), (8, 5)),
}


def drawn(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_value_and_gradients_are_those_of_einsum(equation):
    x, w = drawn(*EQUATIONS[equation])

    def loss(product, x, w):
        return jnp.square(product(x, w)).sum()

    def plain(x, w):
        return jnp.einsum(equation, x, w)

    ours, theirs = (
        jax.value_and_grad(lambda x, w, product=product: loss(product, x, w), argnums=(0, 1))(x, w)
        for product in (lambda x, w: dense(equation, x, w), plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), ours, theirs)


def test_a_weights_gradient_is_not_rounded_to_the_models_dtype():
    """The sum over 4,096 tokens of bfloat16 products, each of them exact in float32, comes out exact."""
    x, dy = jnp.ones((1, 4096, 1), jnp.bfloat16), jnp.ones((1, 4096, 1), jnp.bfloat16)
    x = x.at[0, 0, 0].set(2.0)
    _, pull = jax.vjp(lambda w: dense("btd,df->btf", x, w), jnp.ones((1, 1), jnp.float32))
    assert pull(dy)[0].dtype == jnp.float32 and pull(dy)[0] == 4097.0  # bfloat16 has no number between 4096 and 4128


def test_a_frozen_weight_keeps_no_input_for_the_backward_pass():
    x, w = drawn((1, 4, 8), (8, 5))

    def kept(function, *arguments):
        return [leaf.shape for leaf in jax.tree.leaves(jax.vjp(function, *arguments)[1])]

    assert kept(lambda x: dense("btd,df->btf", x, w), x) == [w.shape]
    assert x.shape in kept(lambda x, w: dense("btd,df->btf", x, w), x, w)
