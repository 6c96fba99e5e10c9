"""Ten steps with the options of an adapter are those of PEFT."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapter_options import OPTIONS, fresh, grown, peft_config, torch_model
from parity import assert_close, logits, random_tokens, torch_logits
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from jlora.config import PROJECTIONS, Config
from jlora.hf.peft import save_adapter
from jlora.model import attention
from jlora.model.adapter import Adapter, Lora, layer_ranks
from jlora.model.sharding import one_device_mesh
from jlora.training import optim
from jlora.training.step import Forward, init_state, make_train_step

STEPS = 10
TRAINED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa_patterns": OPTIONS["pissa_patterns"],
    "olora_some_layers": {"init_lora_weights": "olora", "layers_to_transform": [0, 2]},
    "saved_biased": {"modules_to_save": ["embed_tokens", "lm_head"], "bias": "all"},
    "loraplus_dora_saved_biased": {
        "use_dora": True,
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "bias": "all",
    },
}
OPTIMIZER = {"learning_rate": 2e-3, "schedule": "constant", "max_grad_norm": 0.5}


def run_config(lora: dict[str, Any], **optimizer: Any) -> Config:
    return Config(
        model={"path": "base", "dtype": "float32", "remat": "none"},
        lora=lora,
        data={"train": "rows"},
        training={"batch_size": 2},
        optimizer=OPTIMIZER | optimizer,
        output_dir="run",
    )


def batches(vocab_size: int) -> list[np.ndarray]:
    return [random_tokens(vocab_size, seed=seed) for seed in range(STEPS)]


def our_curve(cfg: Config, base, adapter: Adapter, forward: Forward) -> tuple[list[float], Adapter]:
    """Losses of each step on whole rows, and the adapter after them."""
    mesh = one_device_mesh()
    params = {"adapter": adapter, "base": base}
    trained, frozen = optim.split(params, "lora")
    hyper = optim.hyperparameters(cfg.optimizer, STEPS)
    with jax.set_mesh(mesh):
        state = init_state(trained, cfg, mesh)
        step = jax.jit(make_train_step(cfg, forward))
        losses = []
        for tokens in batches(base.cfg.vocab_size):
            targets = np.roll(tokens, -1, axis=1)
            weights = np.ones(tokens.shape, np.float32)
            weights[:, -1] = 0.0
            positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
            batch = {"tokens": tokens, "targets": targets, "weights": weights, "positions": positions}
            batch |= {"segments": np.ones_like(tokens)}
            state, metrics = step(state, frozen, {key: value[None] for key, value in batch.items()}, hyper)
            losses.append(float(metrics["loss"]))
    return losses, optim.join(state.trained, frozen)["adapter"]


def torch_curve(model: torch.nn.Module, vocab_size: int, ratio: float | None) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate, betas = OPTIMIZER["learning_rate"], {"betas": (0.9, 0.999), "eps": 1e-8}
    if ratio is None:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, **betas)
    else:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=ratio, weight_decay=0.0, **betas
        )
    losses = []
    for tokens in batches(vocab_size):
        ids = torch.from_numpy(tokens).long()
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "loraplus_dora_saved_biased" else pytest.mark.slow) for name in TRAINED],
)
def test_ten_steps_are_those_of_peft(name, bases, opened, tmp_path):
    """From one start: PEFT's own for what it takes from the base, ours read by PEFT for the rest."""
    (base, base_hash), folder = opened["biased"], bases["biased"]
    lora = {"rank": 4, "alpha": 6.0, "target_modules": list(PROJECTIONS)} | TRAINED[name]
    ratio = 4.0 if name.startswith("loraplus") else None
    cfg = run_config(lora, **({"loraplus_lr_ratio": ratio} if ratio else {}))
    adapter = fresh(cfg.lora, base)
    if cfg.lora.takes_from_base:
        model = get_peft_model(torch_model(folder), peft_config(cfg.lora)).train()
    else:
        adapter = adapter | {key: part for key, part in grown(adapter).items() if isinstance(part, Lora)}
        save_adapter(tmp_path / "start", adapter, cfg.lora, str(folder), base_hash)
        model = PeftModel.from_pretrained(torch_model(folder), tmp_path / "start", is_trainable=True).train()
    before = logits(base, {}, random_tokens(300))
    forward = Forward(attention.reference, "none", jnp.dtype("float32"))
    ours, trained = our_curve(cfg, base, adapter, forward)
    theirs = torch_curve(model, 300, ratio)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert_close(logits(base, trained, random_tokens(300)), torch_logits(model.eval(), random_tokens(300)), 1e-3)
    np.testing.assert_array_equal(logits(base, {}, random_tokens(300)), before)
    for key, part in trained.items():
        if isinstance(part, Lora):
            start = adapter[key]
            chex.assert_trees_all_equal(part.initial, start.initial)
            for layer, rank in enumerate(layer_ranks(cfg.lora, key, base.cfg)):
                assert not np.asarray(part.lora_a[layer, ..., rank:]).any()
                assert not np.asarray(part.lora_b[layer, rank:]).any()
                assert (np.asarray(part.lora_b[layer]) != np.asarray(start.lora_b[layer])).any() == (rank > 0)
