"""The training step and the evaluation step: what is compiled, for these devices or for absent ones.

Knows nothing of files, loops or logs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array, Float, Int

from jlora import optim
from jlora.adapter import Adapter
from jlora.attention import Attention
from jlora.config import Config
from jlora.model import Decoder, LlamaConfig, adapter_axes
from jlora.objective import next_token_loss
from jlora.quant import is_quantized
from jlora.sharding import named_sharding, place

Tree = Any


def count_parameters(tree: Tree) -> int:
    """Number of elements of all leaves, arrays or shapes; a quantised weight has as many as it stands for."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_quantized))


@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: batches taken so far, skipped ones included; scalar int32.
      skipped: of these, batches that were skipped for a non-finite loss or gradient; scalar int32.
      trained: the trained leaves of {"adapter": Adapter, "base": Decoder}, None elsewhere; float32.
      opt_state: optimizer state of the trained leaves.
      key: raw PRNG key that dropout draws from; a step folds its number into it.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    trained: Tree
    opt_state: optax.OptState
    key: Array


jax.tree_util.register_dataclass(
    TrainState, data_fields=["step", "skipped", "trained", "opt_state", "key"], meta_fields=[]
)


@dataclass(frozen=True)
class Forward:
    """How the forward pass is run: static choices of the config, resolved."""

    attention: Attention
    remat: str
    dtype: jnp.dtype

    def loss(
        self, base: Decoder, adapter: Adapter, batch: dict[str, Array], dropout_key: Array | None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Loss summed over the batch's trained tokens, and their number."""
        hidden = partial(
            base.hidden,
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            adapter=adapter,
            dropout_key=dropout_key,
            attention=self.attention,
            remat=self.remat,
            dtype=self.dtype,
        )
        return next_token_loss(hidden, base.head, batch["targets"], batch["weights"])


def place_adapter(adapter: Adapter, cfg: LlamaConfig, mesh: jax.sharding.Mesh) -> Adapter:
    """The adapter laid out over `mesh` like the weights it belongs to; abstract in, abstract out."""
    axes = adapter_axes(cfg)

    def lay_out(array: Array, dims: tuple[str, ...]) -> Array:
        sharding = named_sharding(mesh, dims)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)  # type: ignore[return-value]
        return place(np.asarray(array), sharding)

    return {
        name: replace(lora, lora_a=lay_out(lora.lora_a, axes[name][0]), lora_b=lay_out(lora.lora_b, axes[name][1]))
        for name, lora in adapter.items()
    }


def state_shardings(
    params: dict[str, Tree], optimizer: optax.GradientTransformation, cfg: Config, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where each leaf of the state lies: trained leaves where they are, optimizer moments with their parameter.

    Args:
      params: as for `init_state`, arrays or shapes that have a sharding.
    """
    state = jax.eval_shape(lambda p: _new_state(p, optimizer.init(p), cfg), params)
    trained, _ = optim.partition(params, optim.labels(params, cfg.method))
    placed = {keystr(path): leaf for path, leaf in tree_leaves_with_path(trained)}
    everywhere = named_sharding(mesh, ())

    def sharding_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        name = keystr(path)
        # A moment's path ends with the path of the parameter whose shape it has.
        matches = (p.sharding for end, p in placed.items() if name.endswith(end) and p.shape == leaf.shape)
        return next(matches, everywhere)

    return tree_map_with_path(sharding_of, state)


def init_state(
    params: dict[str, Tree], optimizer: optax.GradientTransformation, cfg: Config, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state before the first step, laid out over `mesh`.

    Args:
      params: {"adapter": Adapter, "base": Decoder}, all of it; the optimizer looks at the labels.
    """
    shardings = state_shardings(params, optimizer, cfg, mesh)
    # Made in place: a moment as large as a sharded model never exists on one device.
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    state = _new_state(params, opt_state, cfg)
    counts = {
        name: place(np.asarray(getattr(state, name)), getattr(shardings, name)) for name in ("step", "skipped", "key")
    }
    return replace(state, **counts)


def abstract_state(
    params: dict[str, Tree], optimizer: optax.GradientTransformation, cfg: Config, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes and shardings of the state, for compilation without arrays."""
    state = jax.eval_shape(lambda p: _new_state(p, optimizer.init(p), cfg), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(params, optimizer, cfg, mesh),
    )


def _new_state(params: dict[str, Tree], opt_state: optax.OptState, cfg: Config) -> TrainState:
    trained, _ = optim.partition(params, optim.labels(params, cfg.method))
    key = jax.random.key_data(jax.random.key(cfg.training.seed))
    # Two arrays, not one twice: the step donates its state, and a buffer can be given away only once.
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, skipped, trained, opt_state, key)


def make_train_step(
    cfg: Config, forward: Forward, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[TrainState, Tree, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """(state, frozen leaves, batch [A B T]) -> (new state, metrics); A micro-batches make one step.

    Gradients exist for the trained leaves alone. Their sum over micro-batches and devices is divided
    once, by the number of trained tokens of the whole batch. A step whose loss or gradients are not
    finite changes nothing but the counts.
    """

    def step(state: TrainState, frozen: Tree, batch: dict[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        with_dropout = cfg.method == "lora" and cfg.lora.dropout > 0.0

        def loss_of(trained: Tree, part: dict[str, Array], part_key: Array) -> tuple[Array, Array]:
            params = optim.combine(trained, frozen)
            return forward.loss(params["base"], params["adapter"], part, part_key if with_dropout else None)

        def accumulate(carry: Tree, scanned: tuple[dict[str, Array], Array]) -> tuple[Tree, None]:
            (loss, tokens), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.trained, *scanned)
            return jax.tree.map(jnp.add, carry, (loss, tokens, gradients)), None

        parts = jax.random.split(key, cfg.training.gradient_accumulation_steps)
        zeros = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trained))
        (loss, tokens, gradients), _ = jax.lax.scan(accumulate, zeros, (batch, parts))
        count = jnp.maximum(tokens, 1.0)
        loss, gradients = loss / count, jax.tree.map(lambda g: g / count, gradients)
        norm = optax.tree.norm(gradients)

        # The optimizer knows the whole tree. Frozen leaves stand in for gradients that do not exist;
        # their label discards them, and the compiler drops the zeros made in their place.
        params = optim.combine(state.trained, frozen)
        updates, opt_state = optimizer.update(optim.combine(gradients, frozen), state.opt_state, params)
        trained_updates, _ = optim.partition(updates, optim.labels(params, cfg.method))
        trained = optax.apply_updates(state.trained, trained_updates)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = partial(jax.tree.map, partial(jnp.where, finite))
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "trained_tokens": tokens,
            "skipped_steps": state.skipped + ~finite,
        }
        new_state = replace(
            state,
            step=state.step + 1,
            skipped=metrics["skipped_steps"],
            trained=keep(trained, state.trained),
            opt_state=keep(opt_state, state.opt_state),
        )
        return new_state, metrics

    return step


def make_eval_step(
    forward: Forward,
) -> Callable[[Decoder, Adapter, dict[str, Array]], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Jitted (base, adapter, batch [B T]) -> (loss sum, trained tokens), without dropout."""

    def step(base: Decoder, adapter: Adapter, batch: dict[str, Array]) -> tuple[Array, Array]:
        return forward.loss(base, adapter, batch, None)

    return jax.jit(step)
