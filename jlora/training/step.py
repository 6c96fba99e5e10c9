"""The training step and the evaluation step: what is compiled, for these devices or for absent ones.

Knows nothing of files, loops or logs.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jlora.config import Config, ObjectiveSection
from jlora.model import attention, quant
from jlora.model.adapter import Adapter, lowest_adapted
from jlora.model.adapter_init import new_adapter
from jlora.model.attention import Attention
from jlora.model.config import ModelConfig, check_length
from jlora.model.layers import products_in
from jlora.model.llama import Decoder
from jlora.model.quant import is_quantized
from jlora.model.sharding import CONTEXT, named_sharding, place
from jlora.training import optim
from jlora.training.objective import chunked_cross_entropy, correct_tokens, pair_loss, pair_sums, token_cross_entropy

Tree = Any

# A spike is told by the median of so many losses, once there are at least so many.
LOSS_WINDOW, FEWEST_LOSSES = 32, 8


def count_parameters(tree: Tree) -> int:
    """Number of elements of all leaves, arrays or shapes; a quantised weight has as many as it stands for."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_quantized))


def count_trained(trained: Tree) -> int:
    """Number of elements of the trained leaves, without factors that stay as they were (see `optim.roles`)."""
    roles = jax.tree.leaves(optim.roles(trained))
    leaves = jax.tree.leaves(trained)
    return sum(leaf.size for leaf, role in zip(leaves, roles, strict=True) if role != optim.FIXED)


@no_type_check  # tree functions put what they like at its leaves
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: batches taken so far, skipped ones included; scalar int32.
      skipped: of these, batches that were skipped, see `make_train_step`; scalar int32.
      trained: {"adapter": Adapter} or {"base": Decoder}, as `optim.split` gives it; float32.
      opt_state: optimizer state of the trained leaves.
      key: raw PRNG key that dropout draws from; a step folds its number into it.
      moved: batches that changed a trained leaf by their gradients; scalar int32.
      losses: of the last batches that were not skipped, NaN before there were so many; [LOSS_WINDOW] float32.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    trained: Tree
    opt_state: optax.OptState
    key: Array
    moved: Int[Array, ""]
    losses: Float[Array, " window"]


@dataclass(frozen=True)
class Forward:
    """How the forward pass is run: static choices of the config, resolved."""

    attention: Attention
    remat: str
    dtype: jnp.dtype
    objective: ObjectiveSection = ObjectiveSection()
    neftune_noise_alpha: float = 0.0
    token_accuracy: bool = False  # whether sft counts the tokens that are right, at the price of their logits

    def loss(
        self,
        base: Decoder,
        adapter: Adapter,
        batch: dict[str, Array],
        dropout_key: Array | None,
        reference: Adapter | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Loss summed over what the objective averages (trained tokens, or pairs), their number, sums of its metrics.

        Args:
          reference: the adapter that makes the base the model that pairs are compared with; None: the base alone.
        """
        if self.objective.name == "sft":
            scored, rows = self._scored(base, adapter, batch, dropout_key), base.head_rows(adapter)
            sums = {"token_accuracy": correct_tokens(*scored).sum()} if self.token_accuracy else {}
            return chunked_cross_entropy(*scored, base.cfg.logits_softcap, rows), batch["weights"].sum(), sums

        def answers(adapter: Adapter, dropout_key: Array | None) -> Float[Array, "B P 2"]:
            scored, rows = self._scored(base, adapter, batch, dropout_key), base.head_rows(adapter)
            losses = token_cross_entropy(*scored, base.cfg.logits_softcap, rows)
            return pair_sums(-losses, batch["segments"])

        policy = answers(adapter, dropout_key)
        compared = jax.lax.stop_gradient(policy)
        if self.objective.name != "orpo":
            compared = jax.lax.stop_gradient(answers(reference or {}, None))
        return pair_loss(self.objective, policy, compared, pair_sums(batch["weights"], batch["segments"]))

    def by_token(
        self, base: Decoder, adapter: Adapter, batch: dict[str, Array]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """Of every trained token its log-probability, and 1 where it is the likeliest; 0 of the others."""
        with products_in(self.dtype):
            scored = self._scored(base, adapter, batch, None)
            return -token_cross_entropy(*scored, base.cfg.logits_softcap), correct_tokens(*scored)

    def _scored(
        self, base: Decoder, adapter: Adapter, batch: dict[str, Array], dropout_key: Array | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], Int[Array, "B T"], Float[Array, "B T"]]:
        """What every loss takes: hidden states, head, targets and weights."""
        hidden = base.hidden(
            batch["tokens"],
            batch["positions"],
            batch["segments"],
            adapter=adapter,
            dropout_key=dropout_key,
            neftune_noise_alpha=self.neftune_noise_alpha,
            attention=self.attention,
            remat=self.remat,
            dtype=self.dtype,
        )
        return hidden, base.head(adapter), batch["targets"], batch["weights"]


def state_shardings(trained: Tree, cfg: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Where each leaf of the state lies: trained leaves where they are, optimizer moments with their parameter.

    Args:
      trained: as for `init_state`, arrays or shapes that have a sharding.
    """
    state = jax.eval_shape(partial(_new_state, cfg=cfg), trained)
    everywhere = named_sharding(mesh, ())
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    moments = optim.moments_like(_initial_optimizer(cfg, trained), state.opt_state, trained, places, everywhere)
    rest = jax.tree.map(lambda _: everywhere, state)
    return replace(rest, trained=places, opt_state=moments)


def init_state(trained: Tree, cfg: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step, laid out over `mesh`.

    Args:
      trained: what is trained of adapter and base, see `optim.split`.
    """
    shardings = state_shardings(trained, cfg, mesh)
    # Made in place: a moment as large as a sharded model never exists on one device.
    init = jax.jit(_initial_optimizer(cfg, trained).init, out_shardings=shardings.opt_state)
    state = _new_state(trained, cfg, init(trained))
    names = ("step", "skipped", "key", "moved", "losses")
    counts = {name: place(np.asarray(getattr(state, name)), getattr(shardings, name)) for name in names}
    return replace(state, **counts)


def abstract_state(trained: Tree, cfg: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes and shardings of the state, for compilation without arrays."""
    state = jax.eval_shape(partial(_new_state, cfg=cfg), trained)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(trained, cfg, mesh),
    )


def _initial_optimizer(cfg: Config, trained: Tree) -> optax.GradientTransformation:
    """The optimizer for its state, which no hyperparameter has a part in."""
    return optim.make_optimizer(cfg.optimizer, trained, defaultdict(float))


def _new_state(trained: Tree, cfg: Config, opt_state: optax.OptState | None = None) -> TrainState:
    if opt_state is None:
        opt_state = _initial_optimizer(cfg, trained).init(trained)
    key = jax.random.key_data(jax.random.key(cfg.training.seed))
    # Three arrays, not one thrice: the step donates its state, and a buffer can be given away only once.
    step, skipped, moved = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, skipped, trained, opt_state, key, moved, jnp.full(LOSS_WINDOW, jnp.nan))


def make_train_step(
    cfg: Config, forward: Forward
) -> Callable[[TrainState, Tree, dict[str, Array], dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """(state, what is frozen, batch [A B T], hyperparameters) -> (new state, metrics); A micro-batches make one step.

    Gradients exist for the trained leaves alone. Their sum over micro-batches and devices is divided
    once, by the number of trained tokens (or of pairs, as the objective has it) of the whole batch. A step
    whose loss, gradients or update are not finite, or whose loss is a spike, changes nothing but the counts:
    metrics["skip"] is 1 or 2 then, else 0.
    """

    @products_in(forward.dtype)
    def step(
        state: TrainState, frozen: Tree, batch: dict[str, Array], hyper: dict[str, Array]
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        with_dropout = (cfg.method == "lora" and cfg.lora.dropout > 0.0) or forward.neftune_noise_alpha > 0.0

        def loss_of(trained: Tree, part: dict[str, Array], part_key: Array) -> tuple[Array, tuple[Array, Any]]:
            params = optim.join(trained, frozen)
            dropout_key = part_key if with_dropout else None
            loss, count, sums = forward.loss(
                params["base"], params["adapter"], part, dropout_key, params.get("reference")
            )
            return loss, (count, sums)

        def accumulate(gradients: Tree, scanned: tuple[dict[str, Array], Array]) -> tuple[Tree, Tree]:
            figures, more = jax.value_and_grad(loss_of, has_aux=True)(state.trained, *scanned)
            return jax.tree.map(jnp.add, gradients, more), figures

        parts = jax.random.split(key, cfg.training.gradient_accumulation_steps)
        zeros = jax.tree.map(jnp.zeros_like, state.trained)
        gradients, figures = jax.lax.scan(accumulate, zeros, (batch, parts))
        loss, (count, sums) = jax.tree.map(lambda x: x.sum(axis=0), figures)
        count = jnp.where(count > 0.0, count, 1.0)
        loss, sums, gradients = jax.tree.map(lambda x: x / count, (loss, sums, gradients))
        norm = optax.tree.norm(gradients)

        optimizer = optim.make_optimizer(cfg.optimizer, state.trained, hyper)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        trained = optax.apply_updates(state.trained, updates)

        # Not the update's norm: the squares of small changes are zero in float32.
        changes = jax.tree.map(lambda new, old: jnp.max(jnp.abs(new - old)), trained, state.trained)
        change = jnp.max(jnp.stack(jax.tree.leaves(changes)))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(change)
        spike = finite & is_spike(loss, state.losses, cfg.training.max_loss_spike)
        accepted = finite & ~spike
        keep = partial(jax.tree.map, partial(jnp.where, accepted))
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": optim.learning_rate(hyper, state.step - state.skipped),
            "trained_tokens": jnp.sum(batch["weights"] > 0.0, dtype=jnp.float32),
            "skipped_steps": state.skipped + (~accepted).astype(jnp.int32),
            "skip": jnp.where(finite, jnp.where(spike, 2, 0), 1),
            **sums,
        }
        new_state = replace(
            state,
            step=state.step + 1,
            skipped=metrics["skipped_steps"],
            moved=state.moved + (accepted & (norm > 0.0) & (change > 0.0)).astype(jnp.int32),
            losses=jnp.where(accepted, jnp.roll(state.losses, 1).at[0].set(loss), state.losses),
            trained=keep(trained, state.trained),
            opt_state=keep(opt_state, state.opt_state),
        )
        return new_state, metrics

    return step


def is_spike(loss: Float[Array, ""], losses: Float[Array, " window"], factor: float | None) -> Array:
    """Whether a loss is over `factor` times the median of the losses before it, NaN where there was none."""
    if factor is None:
        return jnp.zeros((), bool)
    enough = jnp.sum(~jnp.isnan(losses)) >= FEWEST_LOSSES
    return enough & (loss > factor * jnp.nanmedian(losses))


@cache
def make_eval_step(
    forward: Forward,
) -> Callable[[Decoder, Adapter, Adapter | None, dict[str, Array]], tuple[Array, Array, dict[str, Array]]]:
    """Jitted (base, adapter, the reference's adapter, batch [B T]) -> what `Forward.loss` gives without dropout.

    Among the sums there is "tokens", the number of trained ones, whatever their weight.

    One for all that ask with an equal `forward`, so that runs of a sweep share what is compiled.
    """

    @products_in(forward.dtype)
    def step(
        base: Decoder, adapter: Adapter, reference: Adapter | None, batch: dict[str, Array]
    ) -> tuple[Array, Array, dict[str, Array]]:
        loss, count, sums = forward.loss(base, adapter, batch, None, reference)
        return loss, count, sums | {"tokens": jnp.sum(batch["weights"] > 0.0, dtype=jnp.float32)}

    return jax.jit(step)


def make_forward(cfg: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[str, Forward]:
    """The static choices of the forward pass, and what attention runs, for the log."""
    dtype, device = jnp.dtype(cfg.model.dtype), mesh.devices.flat[0]
    quant.check_device(cfg.model.quantization, device)
    check_length(model, cfg.data.longest, "data.max_length")
    shown, kernel = attention.choose(
        cfg.model.attention,
        device,
        model.head_dim,
        cfg.data.max_length,
        dtype,
        cfg.data.one_segment,
        model.attention_softcap,
        mesh.shape[CONTEXT],
    )
    noise = cfg.training.neftune_noise_alpha or 0.0
    return shown, Forward(kernel, cfg.model.remat, dtype, cfg.objective, noise)


def stack_sizes(cfg: Config, model: ModelConfig) -> tuple[int, ...]:
    """In which stacks the base's layers lie; see `jlora.model.stacks`.

    Those that lie below every adapter have one of their own, which no backward pass goes through.
    """
    layers = model.num_hidden_layers
    if cfg.method == "full":
        return (layers,)
    if not cfg.model.scan_layers:
        return (1,) * layers
    lowest = lowest_adapted(jax.eval_shape(partial(new_adapter, cfg.lora, model, 0)))
    return (lowest, layers - lowest) if lowest else (layers,)


def param_dtype(cfg: Config) -> jnp.dtype:
    """Dtype of the base's weights: float32 masters where they are trained."""
    return jnp.dtype("float32" if cfg.method == "full" else cfg.model.dtype)
