"""Adafactor over layers that are stacked in one leaf, against transformers' on each layer's own tensor."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from tiny import shape_of
from transformers.optimization import Adafactor

from jlora.config import Config, OptimizerSection
from jlora.errors import ConfigError
from jlora.model.adapter import Lora
from jlora.training.optim import check_rule, hyperparameters, make_optimizer, split

SIZES = np.array([0.01, 0.1, 1.0, 3.0])
WIDTH, STEPS = 144, 5  # both dims large enough for optax to factor the second moment


def test_each_layer_moves_by_its_own_size():
    rng = np.random.default_rng(0)
    shape = (len(SIZES), WIDTH, WIDTH)
    a, b = (rng.normal(size=shape).astype(np.float32) * SIZES[:, None, None].astype(np.float32) for _ in range(2))
    gradients = [rng.normal(size=(2, *shape)).astype(np.float32) * SIZES[::-1, None, None] for _ in range(STEPS)]
    cfg = OptimizerSection(
        name="adafactor", learning_rate=1e-2, schedule="constant", max_grad_norm=None, weight_decay=0.0
    )
    adapter = {"q_proj": Lora(jnp.asarray(a), jnp.asarray(b), jnp.ones(len(SIZES)), 0.0)}
    trained, _ = split({"adapter": adapter, "base": {}}, "lora")
    optimizer = make_optimizer(cfg, trained, hyperparameters(cfg, STEPS))
    state = optimizer.init(trained)
    for to_a, to_b in gradients:
        gradient = {"q_proj": Lora(jnp.asarray(to_a, jnp.float32), jnp.asarray(to_b, jnp.float32), None, 0.0)}
        updates, state = optimizer.update({"adapter": gradient}, state, trained)
        trained = optax.apply_updates(trained, updates)

    theirs = [[torch.nn.Parameter(torch.from_numpy(leaf[layer].copy())) for leaf in (a, b)] for layer in range(len(a))]
    leaves = [leaf for pair in theirs for leaf in pair]
    reference = Adafactor(
        leaves,
        lr=1e-2,
        scale_parameter=True,
        relative_step=False,
        warmup_init=False,
    )
    for gradient in gradients:
        for layer, pair in enumerate(theirs):
            for leaf, of_leaf in zip(pair, gradient, strict=True):
                leaf.grad = torch.from_numpy(of_leaf[layer].astype(np.float32))
        reference.step()
    ours = trained["adapter"]["q_proj"]
    for layer, pair in enumerate(theirs):
        for mine, leaf, start in zip((ours.lora_a, ours.lora_b), pair, (a, b), strict=True):
            moved, right = np.asarray(mine[layer]) - start[layer], leaf.detach().numpy() - start[layer]
            assert np.linalg.norm(moved - right) < 1e-4 * np.linalg.norm(right), layer


def config(**lora) -> Config:
    sections = {"model": {"path": "b"}, "data": {"train": "r"}, "output_dir": "o", "optimizer": {"name": "adafactor"}}
    return Config(**sections, lora=lora)


def test_ranks_that_differ_are_refused():
    """Zeros of the padding count in the root mean square, so a pattern on one layer would slow all of them."""
    model = shape_of(64, 128, layers=2, heads=2, kv_heads=1, vocab_size=64)
    with pytest.raises(ConfigError, match="lora.rank_pattern"):
        check_rule(config(rank_pattern={"layers.0.self_attn.q_proj": 2}), model)
    check_rule(config(rank_pattern={"q_proj": 2}), model)
    check_rule(config(layers_to_transform=[1]), model)
