"""What an adapter starts from: what its options ask of the model, and what of it is made from the base's weights.

PiSSA and OLoRA take their factors out of W. They are held beside the trained ones, and `adapter.project` takes their
product from W's: the base in memory stays the one on disk, and an export is plain LoRA of rank 2R against it
(B A - B0 A0), as PEFT's `path_initial_model_for_weight_conversion` makes it.
"""

import math
import re
import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from jlora.config import FUSED_PROJECTIONS, LoraSection
from jlora.errors import ConfigError
from jlora.model.adapter import Adapter, Lora, Rows, Saved, layer_ranks, new_lora, targets, weight_norm
from jlora.model.block import Block
from jlora.model.config import ModelConfig, block_weights, module_path, outer_weights, projection_shapes
from jlora.model.layers import products_in
from jlora.model.llama import Decoder
from jlora.model.quant import Weight, dequantize
from jlora.model.stacks import cut


def check_options(cfg: LoraSection, model: ModelConfig) -> None:
    """Whether the options fit the model, asked before anything is computed.

    Raises:
      ConfigError: a layer or pattern that names nothing, a rank that a weight does not have, no biases to train.
    """
    num_layers, shapes = model.num_hidden_layers, projection_shapes(model)
    if lost := _without_part(cfg, model):
        raise ConfigError(
            f"lora.target_modules names {lost[0]}, which this model has no projection for; it has {', '.join(shapes)}"
        )
    if missing := [layer for layer in cfg.layers_to_transform or () if layer >= num_layers]:
        raise ConfigError(
            f"lora.layers_to_transform names layer {missing[0]}, but the model has {num_layers}, 0 to {num_layers - 1}"
        )
    paths = [
        module_path(model.names, name, layer)
        for name in targets(cfg, model)
        for layer in range(num_layers)
        if cfg.transforms(name, layer)
    ]
    for key, patterns in (("rank_pattern", cfg.rank_pattern), ("alpha_pattern", cfg.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
                raise ConfigError(f"lora.{key}: '{pattern}' matches no adapted module, such as {paths[0]}")
    for name in targets(cfg, model) if cfg.takes_from_base else ():
        most, rank = min(map(math.prod, shapes[name])), max(layer_ranks(cfg, name, model))
        if rank > most:
            raise ConfigError(
                f"lora.init_lora_weights={cfg.init_lora_weights} takes {rank} ranks from {name}, which has {most}; "
                "lower lora.rank"
            )
    if cfg.bias == "all" and model.layer_norm:
        raise ConfigError(
            "lora.bias=all would train the biases of norms too, which is not supported; set it to lora_only"
        )
    if cfg.bias != "none" and not trained_biases(cfg, model):
        raise ConfigError(f"lora.bias={cfg.bias}, but the model has no biases to train there; set lora.bias=none")


def _without_part(cfg: LoraSection, model: ModelConfig) -> list[str]:
    """Names of `target_modules` that mean no projection of the model, alone or with others."""
    if cfg.target_modules == "all-linear":
        return []
    meant = {part for name in targets(cfg, model) for part in (name, *FUSED_PROJECTIONS.get(name, ()))}
    # In a model without a gate the others are all of its MLP.
    return [name for name in cfg.target_modules if name not in meant]


def trained_biases(cfg: LoraSection, model: ModelConfig) -> tuple[str, ...]:
    """The projections whose biases are trained."""
    chosen = {"none": (), "all": model.biased, "lora_only": targets(cfg, model)}[cfg.bias]
    return tuple(name for name in model.biased if name in chosen)


def saved_weights(cfg: LoraSection, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights that are trained in full; of biases, stacked over layers."""
    table = outer_weights(model)["embed_tokens"].shape
    stacked = {f"{name}_bias": block_weights(model)[f"{name}_bias"].shape for name in trained_biases(cfg, model)}
    return dict.fromkeys(cfg.modules_to_save, table) | {
        name: (model.num_hidden_layers, *shape) for name, shape in stacked.items()
    }


def new_adapter(cfg: LoraSection, model: ModelConfig, seed: int, base: Decoder | None = None) -> Adapter:
    """An adapter before its first step, whole on every device; with a base all processes must call this.

    Args:
      base: whose weights go into DoRA's magnitudes, the factors of PiSSA and OLoRA, and what is trained in full. All of
        it is zero without one, which shapes alone ask for.
    """
    adapter: Adapter = {name: _drawn(cfg, model, name, seed) for name in targets(cfg, model)}
    adapter |= {name: Saved(jnp.zeros(shape, jnp.float32)) for name, shape in saved_weights(cfg, model).items()}
    for name, ids in cfg.token_rows(model.tie_word_embeddings).items():
        adapter[name] = Rows(jnp.zeros((len(ids), model.hidden_size), jnp.float32), ids)
    if base is None:
        return adapter
    return {name: _completed(part, name, cfg, base, seed) for name, part in adapter.items()}


def _drawn(cfg: LoraSection, model: ModelConfig, name: str, seed: int) -> Lora:
    """A Kaiming-uniform or, if so configured, Gaussian; B zero, as `LoraLayer.reset_lora_parameters` of PEFT.

    PyTorch's `kaiming_uniform_(a=sqrt(5))` draws from U(-1/sqrt(fan_in), 1/sqrt(fan_in)). The draw of
    a projection depends on the seed and its name alone, so adding a target does not move the others.
    """
    num_layers, (inputs, outputs) = model.num_hidden_layers, projection_shapes(model)[name]
    ranks = layer_ranks(cfg, name, model)
    shape = (num_layers, *inputs, max(ranks))
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    lora_b = jnp.zeros((num_layers, max(ranks), *outputs), jnp.float32)
    if cfg.takes_from_base:
        lora_a = jnp.zeros(shape, jnp.float32)
    elif cfg.init_lora_weights == "gaussian":
        spread = np.array([1.0 / max(rank, 1) for rank in ranks], np.float32)
        lora_a = jax.random.normal(key, shape, jnp.float32) * spread.reshape(-1, *(1 for _ in shape[1:]))
    else:
        bound = 1.0 / math.sqrt(math.prod(inputs))
        lora_a = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    if len(set(ranks)) > 1:
        held = np.arange(max(ranks))[None] < np.array(ranks)[:, None]
        lora_a = jnp.where(held.reshape(num_layers, *(1 for _ in inputs), -1), lora_a, 0.0)
    return replace(
        new_lora(cfg, name, (lora_a, lora_b), model, cfg.dropout),
        magnitude=jnp.zeros((num_layers, *outputs), jnp.float32) if cfg.use_dora else None,
        initial=(jnp.zeros_like(lora_a), jnp.zeros_like(lora_b)) if cfg.takes_from_base else None,
    )


def _completed(part: Lora | Saved | Rows, name: str, cfg: LoraSection, base: Decoder, seed: int) -> Lora | Saved | Rows:
    """A part with what is made of the base's weights."""
    owners = base.stacks if hasattr(base.stacks[0], name) else [base]
    # A head that is tied is the embedding.
    leaves = [getattr(owner, name, base.embed_tokens).get_raw_value() for owner in owners]
    if isinstance(part, Saved):
        whole = jax.jit(lambda *parts: jnp.concatenate(parts).astype(jnp.float32), out_shardings=_whole(leaves[0]))
        return Saved(whole(*leaves))
    if isinstance(part, Rows):
        ids = np.array(part.ids, np.int32)
        rows = jax.jit(lambda w: w[ids].astype(jnp.float32), out_shardings=_whole(leaves[0]))
        return replace(part, weight=rows(*leaves))
    if cfg.takes_from_base:
        part = _taken_from(leaves, name, part, cfg, base.cfg, seed)
    return _with_magnitude(leaves, part, base.stacks) if cfg.use_dora else part


def _whole(leaf: Weight) -> jax.sharding.Sharding | None:
    sharding = jax.tree.leaves(leaf)[0].sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _with_magnitude(leaves: list[Weight], lora: Lora, stacks: list[Block]) -> Lora:
    """DoRA's magnitude: the norm of what the projection starts from."""

    def norms(leaf: Weight, lora: Lora) -> Array:
        return jax.lax.map(lambda at: weight_norm(at[0], at[1], jnp.dtype("float32")), (leaf, lora))

    compiled = jax.jit(norms, out_shardings=_whole(leaves[0]))
    magnitudes = [compiled(leaf, part) for leaf, part in zip(leaves, cut(lora, stacks), strict=True)]
    return replace(lora, magnitude=jnp.concatenate(magnitudes))


def _taken_from(leaves: list[Weight], name: str, lora: Lora, cfg: LoraSection, model: ModelConfig, seed: int) -> Lora:
    """Factors taken from each layer's weight, held and trained."""
    ranks = layer_ranks(cfg, name, model)
    make = jax.jit(principal, static_argnames=("init", "rank", "num_outputs"), out_shardings=_whole(leaves[0]))
    how = {"init": str(cfg.init_lora_weights), "num_outputs": len(lora.lora_b.shape) - 2}
    places = [(leaf, layer) for leaf in leaves for layer in range(jax.tree.leaves(leaf)[0].shape[0])]
    found = []
    for layer, (rank, scale, (leaf, place)) in enumerate(zip(ranks, lora.scale, places, strict=True)):
        weight = jax.tree.map(lambda array, place=place: array[place], leaf)
        key = jax.random.fold_in(jax.random.key(seed), layer)
        a, b = lora.lora_a[layer, ..., :0], lora.lora_b[layer, :0]
        if rank:
            a, b = make(weight, key=key, scale=scale, rank=rank, **how)
        missing = max(ranks) - rank
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        found.append((a, jnp.pad(b, [(0, missing)] + [(0, 0)] * (b.ndim - 1))))
    lora_a, lora_b = (jnp.stack(factors) for factors in zip(*found, strict=True))
    return replace(lora, lora_a=lora_a, lora_b=lora_b, initial=(jnp.copy(lora_a), jnp.copy(lora_b)))


@products_in(jnp.dtype("float32"))
def principal(
    leaf: Weight, init: str, rank: int, num_outputs: int, key: PRNGKeyArray, scale: Float[Array, ""]
) -> tuple[Float[Array, "*inputs R"], Float[Array, " R *outputs"]]:
    """A [*inputs, R] and B [R, *outputs] of one layer's weight, in float32, as `LoraLayer` of PEFT makes them.

    pissa: scale * B A is W's best approximation of rank R, its singular values shared evenly (arXiv:2404.02948).
    pissa_niter_N: the same by N subspace iterations from a random start (arXiv:0909.4061, 4.4), as
    `torch.svd_lowrank`. olora: B has the first R columns of Q and A the first R rows of R in W^T = Q R
    (arXiv:2406.01775), whatever the scale.
    """
    whole = dequantize(leaf, jnp.dtype("float32"))
    inputs, outputs = whole.shape[: whole.ndim - num_outputs], whole.shape[whole.ndim - num_outputs :]
    w = whole.reshape(math.prod(inputs), math.prod(outputs))
    if init == "olora":
        q, r = jnp.linalg.qr(w.T)
        a, b = r[:rank].T, q[:, :rank].T
    else:
        if init == "pissa":
            left, values, right = jnp.linalg.svd(w, full_matrices=False)
        else:
            start, _ = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], rank), jnp.float32))

            def iterate(_: Array, q: Array) -> Array:
                return jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])[0]

            q = jax.lax.fori_loop(0, int(init.removeprefix("pissa_niter_")), iterate, start)
            left, values, right = jnp.linalg.svd(q.T @ w, full_matrices=False)
            left = q @ left
        root = jnp.sqrt(values[:rank] / scale)
        a, b = left[:, :rank] * root[None], root[:, None] * right[:rank]
    return a.reshape(*inputs, rank), b.reshape(rank, *outputs)
