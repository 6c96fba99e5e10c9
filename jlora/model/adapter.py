"""LoRA and its kin: shape, scale, the projection that an adapter takes part in, and its layout over a mesh.

The adapter of a model is a dict: from projection name to `Lora`, its factors stacked over layers like the weights they
belong to, and from the name of any other weight to `Saved`, where that is trained in full, or to `Rows`, where some of
its rows are. Knows nothing of files (`jlora.hf`) or of the optimizer.
"""

import math
import re
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, no_type_check

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jlora.config import LoraSection
from jlora.errors import ModelError, finding
from jlora.model.coded import coded_einsum
from jlora.model.config import NUM_INPUTS, ModelConfig, block_weights, module_path, outer_weights, projection_shapes
from jlora.model.layers import dense, products_in, times
from jlora.model.quant import Quantized, Weight, dequantize, quantized_einsum
from jlora.model.sharding import named_sharding, place

# The checkpoint name of what an adapter's gradients take from its products, for `jlora.model.remat`: x A, and with DoRA
# the two shares that its magnitude scales.
ADAPTER_PRODUCT = "adapter_product"


@no_type_check  # tree functions put what they like at its leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lora:
    """Low-rank factors of one projection (arXiv:2106.09685): W x becomes W x + scale * B A x.

    Attributes:
      lora_a: the projection's input dims, then R; float32.
      lora_b: R, then the projection's output dims; float32.
      scale: alpha / R, or alpha / sqrt(R) with rsLoRA, of each layer, 0 where it has no adapter; float32. It is never
        trained: None while it is kept apart from what is (see `without_scales`).
      dropout: probability with which an element of the adapter's input is dropped in training.
      magnitude: DoRA's (arXiv:2402.09353), the projection's output dims; float32. None without DoRA.
      initial: A and B at the start, whose product is taken from W (PiSSA, OLoRA); never changed. None elsewhere.
      ranks: of each layer where they differ; R is the largest, and what a layer lacks is zero, and stays so, since
        the gradient of each half of a zero pair is a product with the other half.
    Stacked over layers, all arrays have a leading dim L.
    """

    lora_a: Float[Array, "*inputs R"]
    lora_b: Float[Array, " R *outputs"]
    scale: Float[Array, ""]
    dropout: float = field(metadata={"static": True})
    magnitude: Float[Array, "*outputs"] | None = None
    initial: tuple[Float[Array, "*inputs R"], Float[Array, " R *outputs"]] | None = None
    ranks: tuple[int, ...] | None = field(default=None, metadata={"static": True})


@no_type_check  # tree functions put what they like at its leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """A weight that is trained in full, in place of the base's (`modules_to_save`, `bias`).

    Attributes:
      weight: as the base's, stacked over layers where that is; float32.
    """

    weight: Float[Array, "*weight"]


@no_type_check  # tree functions put what they like at its leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Rows of the embedding or head that are trained in place of the base's (PEFT's `trainable_token_indices`).

    Attributes:
      weight: of each token its row; float32.
      ids: the tokens, ascending.
    """

    weight: Float[Array, "tokens D"]
    ids: tuple[int, ...] = field(metadata={"static": True})

    def of(self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`x` with the trained rows at the tokens that have one."""
        ids = jnp.asarray(np.array(self.ids, np.int32))
        place = jnp.minimum(jnp.searchsorted(ids, tokens), len(self.ids) - 1)
        return jnp.where((ids[place] == tokens)[..., None], self.weight[place].astype(x.dtype), x)

    def within(self, table: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """A table with the trained rows in it."""
        return table.at[np.array(self.ids, np.int32)].set(self.weight.astype(table.dtype))


Adapter = dict[str, Lora | Saved | Rows]


def _by_pattern(patterns: dict[str, float], path: str, default: float) -> float:
    """The value of the first pattern that matches a module, as `get_pattern_key` of PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def targets(cfg: LoraSection, model: ModelConfig) -> tuple[str, ...]:
    """The model's projections that the options mean."""
    return tuple(name for name in projection_shapes(model) if cfg.means(name))


def scaling(cfg: LoraSection, alpha: float, rank: int) -> float:
    """What the product BA is multiplied by, as `LoraLayer.update_layer` of PEFT has it."""
    return alpha / (math.sqrt(rank) if cfg.use_rslora else rank)


def layer_ranks(cfg: LoraSection, projection: str, model: ModelConfig) -> tuple[int, ...]:
    """The rank of each layer's adapter; 0 where it has none."""
    return tuple(
        int(_by_pattern(dict(cfg.rank_pattern), module_path(model.names, projection, layer), cfg.rank))
        if cfg.transforms(projection, layer)
        else 0
        for layer in range(model.num_hidden_layers)
    )


def layer_scales(cfg: LoraSection, projection: str, model: ModelConfig) -> np.ndarray:
    """What each layer's product BA is multiplied by, 0 where there is none; [L] float32."""
    paths = [module_path(model.names, projection, layer) for layer in range(model.num_hidden_layers)]
    scales = [
        scaling(cfg, _by_pattern(cfg.alpha_pattern, path, cfg.alpha), rank) if rank else 0.0
        for path, rank in zip(paths, layer_ranks(cfg, projection, model), strict=True)
    ]
    return np.array(scales, np.float32)


def new_lora(
    cfg: LoraSection, projection: str, factors: tuple[Array, Array], model: ModelConfig, dropout: float
) -> Lora:
    """Stacked factors with what the options say of them."""
    ranks = layer_ranks(cfg, projection, model)
    scale = jnp.asarray(layer_scales(cfg, projection, model))
    return Lora(*factors, scale, dropout, ranks=ranks if len(set(ranks)) > 1 else None)


def lowest_adapted(adapter: Adapter) -> int:
    """The lowest layer whose output an adapter has a part in; 0 where what enters the first is trained, too."""
    layers = []
    for name, part in adapter.items():
        if isinstance(part, Lora) and part.ranks is not None:
            layers.append(next(layer for layer, rank in enumerate(part.ranks) if rank))
        elif name != "lm_head":
            return 0
    return min(layers, default=0)


def without_scales(adapter: Adapter) -> tuple[Adapter, dict[str, Any]]:
    """The adapter's own leaves, and the scales [L] of its low-rank parts by name; of shapes, shapes."""
    scales = {name: part.scale for name, part in adapter.items() if isinstance(part, Lora)}
    return with_scales(adapter, dict.fromkeys(scales)), scales


def with_scales(adapter: Adapter, scales: dict[str, Any]) -> Adapter:
    """The inverse of `without_scales`."""
    return {
        name: replace(part, scale=scales[name]) if isinstance(part, Lora) else part for name, part in adapter.items()
    }


def project(
    equation: str,
    x: Float[Array, "B T *inputs"],
    weight: Weight,
    lora: Lora | None,
    dropout_key: PRNGKeyArray | None,
    product: Float[Array, "B T *outputs"] | None = None,
) -> Float[Array, "B T *outputs"]:
    """`einsum(equation, x, weight)` plus the adapter's share, never forming W + BA.

    The adapter's input dims are the ones that `equation` sums over. Dropout falls on the adapter's
    input, as in PEFT; with DoRA that is the input of the base's share of the rescaling too. Result in the dtype of `x`.

    Args:
      weight: the projection's array, or its `jlora.model.quant.Quantized`.
      dropout_key: None when not training.
      product: `base_product(equation, x, weight)`, where it is known.
    """
    y = _less_initial(base_product(equation, x, weight) if product is None else product, equation, x, lora)
    if lora is None:
        return y
    dropped = x
    if dropout_key is not None and lora.dropout > 0.0:
        keep = jax.random.bernoulli(dropout_key, 1.0 - lora.dropout, x.shape)
        dropped = jnp.where(keep, x / (1.0 - lora.dropout), jnp.zeros_like(x))
    delta = _scaled(_low_rank(equation, dropped, lora.lora_a, lora.lora_b), lora)
    if lora.magnitude is None:
        return y + delta
    y, delta = checkpoint_name((y, delta), ADAPTER_PRODUCT)
    ratio = lora.magnitude / jnp.maximum(weight_norm(weight, lora, x.dtype), jnp.finfo(jnp.float32).tiny)
    ratio = jnp.where(lora.scale == 0.0, 1.0, ratio)  # a layer without an adapter
    rescaled = y
    if dropped is not x:
        rescaled = _less_initial(base_product(equation, dropped, weight), equation, dropped, lora)
        rescaled = checkpoint_name(rescaled, ADAPTER_PRODUCT)
    return y + times(rescaled, ratio - 1.0) + times(delta, ratio)


def _scaled(delta: Float[Array, "B T *outputs"], lora: Lora) -> Float[Array, "B T *outputs"]:
    # In float32: rounded to bfloat16 first, 32 / 12 would be off by 0.2 % in every element.
    return (delta.astype(jnp.float32) * lora.scale).astype(delta.dtype)


def base_product(equation: str, x: Float[Array, "B T *inputs"], weight: Weight) -> Float[Array, "B T *outputs"]:
    """`einsum(equation, x, weight)` in the dtype of `x`.

    A quantised weight is dequantised here, to that dtype, and nowhere else, or multiplied with as it is.
    """
    if isinstance(weight, Quantized):
        return (coded_einsum if weight.coded else quantized_einsum)(equation, x, weight)
    return dense(equation, x, weight)


def _less_initial(
    y: Float[Array, "B T *outputs"], equation: str, x: Float[Array, "B T *inputs"], lora: Lora | None
) -> Float[Array, "B T *outputs"]:
    """y less the product of the initial factors: with PiSSA and OLoRA the adapter stands on W - scale * B0 A0.

    W itself stays as it is, whole and shared: a residual rounded to bfloat16, or quantised, would be another base.
    """
    if lora is None or lora.initial is None:
        return y
    a, b = map(jax.lax.stop_gradient, lora.initial)
    return y - _scaled(_low_rank(equation, x, a, b), lora)


def weight_norm(weight: Weight, lora: Lora, dtype: jnp.dtype) -> Float[Array, "*outputs"]:
    """Norm over the inputs of W + scale * B A, the output dims; float32 and without gradient (arXiv:2402.09353, 4.3).

    From |W|^2 + 2 scale <W, B A> + scale^2 |B A|^2, by products of rank R: B A is never formed, which would take as
    much memory as W in float32. The product with W costs what R more tokens would.

    Args:
      dtype: what a quantised W is dequantised to.
    """
    num_outputs = math.prod(lora.lora_b.shape[1:])
    w = dequantize(weight, dtype).reshape(-1, num_outputs)
    a, b = lora.lora_a, lora.lora_b
    if lora.initial is not None:
        a, b = jnp.concatenate([a, lora.initial[0]], -1), jnp.concatenate([b, -lora.initial[1]])
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, num_outputs)

    def product(left: Array, right: Array) -> Array:
        with products_in(left.dtype):
            return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    of_w = jnp.sum(jnp.square(w.astype(jnp.float32)), axis=0)
    mixed = jnp.sum(product(a.T.astype(w.dtype), w) * b, axis=0)
    of_ba = jnp.sum(product(product(a.T, a), b) * b, axis=0)
    square = of_w + 2.0 * lora.scale * mixed + lora.scale**2 * of_ba
    return jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(square, 0.0)).reshape(lora.lora_b.shape[1:]))


def _dims(equation: str) -> tuple[str, ...]:
    """The dims of x, y, A, B and x A as an equation of the projection names them: r is the rank."""
    x, w, y = equation.replace("->", ",").split(",")
    summed, outputs = "".join(dim for dim in w if dim not in y), "".join(dim for dim in w if dim in y)
    return x, y, f"{summed}r", f"r{outputs}", "".join(dim for dim in x if dim not in summed) + "r"


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _low_rank(
    equation: str,
    x: Float[Array, "B T *inputs"],
    lora_a: Float[Array, "*inputs R"],
    lora_b: Float[Array, " R *outputs"],
) -> Float[Array, "B T *outputs"]:
    """(x A) B in the dtype of `x`. By hand for its gradients: those of A and B leave their products in float32, and
    no product has to transpose more than its side of rank R."""
    return _low_rank_forward(equation, x, lora_a, lora_b)[0]


def _low_rank_forward(equation: str, x: Array, lora_a: Array, lora_b: Array) -> tuple[Array, tuple[Array, ...]]:
    of_x, of_y, of_a, of_b, of_inner = _dims(equation)
    inner = checkpoint_name(jnp.einsum(f"{of_x},{of_a}->{of_inner}", x, lora_a.astype(x.dtype)), ADAPTER_PRODUCT)
    delta = jnp.einsum(f"{of_inner},{of_b}->{of_y}", inner, lora_b.astype(x.dtype))
    return delta, (x, inner, lora_a, lora_b)


def _low_rank_backward(equation: str, saved: tuple[Array, ...], to_y: Array) -> tuple[Array, Array, Array]:
    of_x, of_y, of_a, of_b, of_inner = _dims(equation)
    x, inner, lora_a, lora_b = saved
    in_float32 = partial(jnp.einsum, preferred_element_type=jnp.float32)
    to_inner = jnp.einsum(f"{of_y},{of_b}->{of_inner}", to_y, lora_b.astype(x.dtype))
    to_x = jnp.einsum(f"{of_inner},{of_a}->{of_x}", to_inner, lora_a.astype(x.dtype))
    to_a = in_float32(f"{of_inner},{of_x}->r{of_a[:-1]}", to_inner, x)
    # Behind a barrier, or XLA makes a product of it that transposes x, which in bfloat16 its CPU backend cannot.
    to_a = jnp.moveaxis(jax.lax.optimization_barrier(to_a), 0, -1)
    to_b = in_float32(f"{of_inner},{of_y}->{of_b}", inner, to_y)
    return to_x, to_a.astype(lora_a.dtype), to_b.astype(lora_b.dtype)


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def adapter_axes(cfg: ModelConfig, adapter: Adapter) -> Any:
    """A tree like the adapter, with logical axes for arrays: those of the weight, cut at the rank in A and B."""
    stacked, outer = block_weights(cfg), outer_weights(cfg)
    tree: dict[str, Any] = {}
    part: Any
    for name, part in adapter.items():
        if isinstance(part, Saved):
            axes = ("layers", *stacked[name].axes) if name in stacked else outer.get(name, outer["embed_tokens"]).axes
            tree[name] = Saved(axes)  # type: ignore[arg-type]
            continue
        if isinstance(part, Rows):
            tree[name] = replace(part, weight=("tokens", "embed"))  # type: ignore[arg-type]
            continue
        inputs = NUM_INPUTS.get(name, 1)
        ins, outs = stacked[name].axes[:inputs], stacked[name].axes[inputs:]
        a, b = ("layers", *ins, "rank"), ("layers", "rank", *outs)
        magnitude = None if part.magnitude is None else ("layers", *outs)
        initial = None if part.initial is None else (a, b)
        scale = None if part.scale is None else ("layers",)
        tree[name] = replace(part, lora_a=a, lora_b=b, scale=scale, magnitude=magnitude, initial=initial)
    return tree


def require_fits(adapter: Adapter, cfg: ModelConfig) -> None:
    """An adapter, arrays or shapes, must have the dims of the weights it belongs to.

    Raises:
      ModelError: it is another base's, and where that shows.
    """
    layers, shapes, stacked = cfg.num_hidden_layers, projection_shapes(cfg), block_weights(cfg)
    for name, part in adapter.items():
        try:
            if isinstance(part, Lora):
                inputs, outputs = shapes[name]
                chex.assert_tree_shape_prefix(part.lora_a, (layers, *inputs))
                chex.assert_tree_shape_prefix(part.lora_b, (layers,))
                chex.assert_tree_shape_suffix(part.lora_b, outputs)
            elif isinstance(part, Rows):
                chex.assert_tree_shape_prefix(part.weight, (len(part.ids), cfg.hidden_size))
                assert part.ids[-1] < cfg.vocab_size, f"token {part.ids[-1]} of {cfg.vocab_size}"
            else:
                whole = (layers, *stacked[name].shape) if name in stacked else (cfg.vocab_size, cfg.hidden_size)
                chex.assert_tree_shape_prefix(part.weight, whole)
        except AssertionError as error:
            raise ModelError(
                f"the adapter's {name} does not fit this base ({finding(error)}); give the base that it was trained on"
            ) from None


def place_adapter(adapter: Adapter, cfg: ModelConfig, mesh: jax.sharding.Mesh) -> Adapter:
    """The adapter laid out over `mesh` like the weights it belongs to; abstract in, abstract out.

    Raises:
      ModelError: see `require_fits`.
    """
    require_fits(adapter, cfg)

    def lay_out(
        array: Array | np.ndarray | jax.ShapeDtypeStruct, dims: tuple[str, ...]
    ) -> Array | jax.ShapeDtypeStruct:
        sharding = named_sharding(mesh, dims)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return place(np.asarray(array), sharding)

    return jax.tree.map(lay_out, adapter, adapter_axes(cfg, adapter))
