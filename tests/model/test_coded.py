"""Products with 8-bit codes on both sides, beside the same sums in float64, and in the programs that are compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.model import quant
from jlora.model.coded import coded_einsum, row_codes

EQUATIONS = {
    "btd,dnh->btnh": ((2, 5, 96), (96, 4, 12), 1),
    "btnh,nhd->btd": ((2, 5, 4, 24), (4, 24, 56), 2),
    "btf,fd->btd": ((2, 5, 96), (96, 40), 1),
}
LARGEST = {"int8": 127.0, "fp8": 448.0}


def case(equation, kind, dtype=jnp.float32):
    of_x, of_w, num_inputs = EQUATIONS[equation]
    draw = np.random.default_rng(0)
    sizes = np.exp(draw.standard_normal(of_x[:2])).reshape(2, 5, *[1] * (len(of_x) - 2))  # of each token
    x = jnp.asarray(draw.standard_normal(of_x) * sizes)
    w = jnp.asarray(draw.standard_normal(of_w), jnp.float32)
    leaf = quant.quantize(w, kind, num_inputs)
    outputs = of_w[num_inputs:]
    dy = jnp.asarray(draw.standard_normal((2, 5, *outputs)), dtype)
    return x.astype(dtype), w, leaf, dy, num_inputs


def codes_of(x, kind):
    """Codes and scales of rows, in float64, rounded as the type rounds."""
    x = np.asarray(x, np.float64)
    scales = np.abs(x).max(tuple(range(2, x.ndim)), keepdims=True) / LARGEST[kind]
    scaled = (x.astype(np.float32) / scales.astype(np.float32)).astype(np.float32)
    if kind == "int8":
        return np.round(scaled).astype(np.float64), scales
    return np.asarray(jnp.asarray(scaled).astype(jnp.float8_e4m3fn)).astype(np.float64), scales


@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("equation", EQUATIONS)
def test_both_passes_are_the_sums_of_codes(equation, kind):
    x, _, leaf, dy, num_inputs = case(equation, kind)
    y, backward = jax.vjp(lambda x: coded_einsum(equation, x, leaf), x)
    weight, channels = np.asarray(leaf.codes, np.float64), np.asarray(leaf.scales, np.float64)
    codes, scales = codes_of(x, kind)
    kept = scales.reshape(2, 5, *[1] * (y.ndim - 2))
    expected = np.einsum(equation, codes, weight) * kept * channels
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())
    of_x, of_w, of_y = equation.replace("->", ",").split(",")
    codes, scales = codes_of(np.asarray(dy, np.float32) * np.asarray(leaf.scales), kind)
    kept = scales.reshape(2, 5, *[1] * (x.ndim - 2))
    expected = np.einsum(f"{of_y},{of_w}->{of_x}", codes, weight) * kept
    np.testing.assert_allclose(backward(dy)[0], expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "off"), [("int8", 0.012), ("fp8", 0.045)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_near_those_of_the_weight(kind, off, dtype):
    for equation in EQUATIONS:
        x, w, leaf, dy, _ = case(equation, kind, jnp.dtype(dtype))
        y, backward = jax.vjp(lambda x, e=equation, leaf=leaf: coded_einsum(e, x, leaf), x)
        exact, exact_backward = jax.vjp(lambda x, e=equation, w=w: jnp.einsum(e, x, w.astype(x.dtype)), x)
        for found, wanted in ((y, exact), (backward(dy)[0], exact_backward(dy)[0])):
            assert found.dtype == jnp.dtype(dtype)
            found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
            assert np.linalg.norm(found - wanted) < off * np.linalg.norm(wanted)


def test_a_token_of_zeros_has_codes_of_zero():
    codes, scales = row_codes(jnp.zeros((1, 2, 8)), "fp8")
    assert not np.asarray(codes, np.float32).any() and not np.asarray(scales).any()


@pytest.mark.parametrize(("kind", "name"), [("int8", "i8"), ("fp8", "f8E4M3FN")])
def test_the_program_multiplies_codes_in_both_passes(kind, name):
    """And holds no weight in another type."""
    x, _, leaf, dy, _ = case("btf,fd->btd", kind, jnp.bfloat16)

    def both(x, leaf, dy):
        y, backward = jax.vjp(lambda x: coded_einsum("btf,fd->btd", x, leaf), x)
        return y, backward(dy)[0]

    text = jax.jit(both).lower(x, leaf, dy).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    for line in products:
        assert line.count(f"x{name}>") >= 2, line
    assert "96x40xbf16" not in text and "96x40xf32" not in text
