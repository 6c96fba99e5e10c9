"""Numerical guards: what is not finite, a spike, or no training at all never ends as a success.

The numbers are those of the fault cases in docs/reliability.md.
"""

import json

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import make_llama, make_tokenizer, write_config

import jlora.runtime.signals
import jlora.training.run
from jlora.config import load_config
from jlora.errors import ModelError, NonFiniteError, NothingTrained
from jlora.training.metrics import read_metrics
from jlora.training.run import train
from jlora.training.step import FEWEST_LOSSES, LOSS_WINDOW, is_spike

# The order of the rows in the first epoch; in step 20 comes the one that is unlike all others.
ORDER = (np.random.default_rng([0, 0]).permutation(24) + 1).tolist()
ODD_ROW = ORDER[19]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The smallest base, and rows of which one is unlike all others: (base, rows)."""
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder / "base", hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder / "base")
    rows = [{"prompt": "a:", "completion": " " + "a" * 12} for _ in range(24)]
    rows[ODD_ROW - 1] = {"prompt": "b:", "completion": " !9z~Q#7;K%x"}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "base", folder / "rows.jsonl"


def configure(tiny, folder, overrides=(), **sections):
    """One row a step, learned at once: the rows that are all alike soon have a loss near zero."""
    wanted = {
        "data": {"format": "completion", "max_length": 24, "packing": False},
        "lora": {"rank": 2, "target_modules": "all-linear"},
        "optimizer": {"learning_rate": 0.1, "schedule": "constant"},
        "training": {"batch_size": 1, "max_steps": 24, "max_nonfinite_steps": 2},
    }
    for name, values in sections.items():
        wanted[name] = wanted[name] | values
    return load_config(write_config(folder / "run.yaml", *tiny, folder / "run", **wanted), overrides)


def skips(folder):
    """Step -> (what for, rows) of every step that the log says was skipped."""
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return {line["step"]: (line["skipped"], line["rows"]) for line in lines if "skipped" in line}


def adapter_bytes(folder):
    return (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


def poison(monkeypatch, *steps):
    """The loss of these steps of the next run is NaN."""
    real, taken = jlora.training.run.put_batch, []

    def put_batch(batch, parts, mesh):
        taken.append(None)
        if len(taken) in steps or not steps:
            batch = batch | {"weights": np.full_like(batch["weights"], np.nan)}
        return real(batch, parts, mesh)

    monkeypatch.setattr(jlora.training.run, "put_batch", put_batch)


def test_case_6_step_of_nan_is_skipped_counted_and_named(tiny, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 3)
    summary = train(configure(tiny, tmp_path, ["training.max_steps=5", "training.log_every=5"]))
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("finished", 5, 1)
    ((step, (why, rows)),) = skips(tmp_path).items()
    assert (step, rows) == (3, [f"rows.jsonl:{ORDER[2]}"]) and "not finite" in why  # whatever log_every says
    assert f"step 3: {why} (loss nan), on rows {rows[0]}; skipped (1 of at most 2)" in capsys.readouterr().err
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    chex.assert_tree_all_finite(tensors)


def test_case_6_too_many_skipped_steps_end_the_run_with_the_last_checkpoint_kept(tiny, tmp_path, monkeypatch):
    poison(monkeypatch, 3, 5, 6)
    with pytest.raises(NonFiniteError) as caught:
        train(configure(tiny, tmp_path, ["training.max_steps=9", "training.save_every=2"]), quiet=True)
    row = skips(tmp_path)[6][1][0]
    message = str(caught.value)
    assert message.startswith("step 6: ") and f"on rows {row};" in message and "3 steps were skipped" in message
    assert message.endswith("; checkpoint 4 stays") and caught.value.exit_code == 6
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.long
def test_case_6_spike_is_skipped_alike_in_one_run_and_in_one_gone_on_with(tiny, tmp_path, monkeypatch):
    whole, halves, off = (tmp_path / name for name in ("whole", "halves", "off"))
    for folder in (whole, halves, off):
        folder.mkdir()
    spike = ["training.max_loss_spike=2"]
    assert train(configure(tiny, whole, spike), quiet=True)["skipped_steps"] == 1
    assert skips(whole) == {20: ("the loss is a spike", [f"rows.jsonl:{ODD_ROW}"])}

    # Stopped right before the spike, the losses that tell it come from the checkpoint.
    with monkeypatch.context() as patched:
        patched.setattr(jlora.runtime.signals, "save_on_signals", lambda: lambda step: step == 19)
        assert train(configure(tiny, halves, spike), quiet=True)["steps"] == 19
    assert train(configure(tiny, halves, spike), quiet=True)["status"] == "finished"
    assert skips(halves) == skips(whole) and adapter_bytes(halves) == adapter_bytes(whole)

    # Off, the row is trained on.
    assert train(configure(tiny, off), quiet=True)["skipped_steps"] == 0
    assert adapter_bytes(off) != adapter_bytes(whole)


def test_case_6_what_a_spike_is():
    few = jnp.full(LOSS_WINDOW, jnp.nan).at[: FEWEST_LOSSES - 1].set(1.0)
    enough = few.at[FEWEST_LOSSES - 1].set(50.0)  # the median does not mind one outlier
    for losses, loss, factor, expected in (
        *((few, 1e6, 3.0, False), (enough, 2.9, 3.0, False), (enough, 3.1, 3.0, True), (enough, 3.1, None, False)),
        (jnp.full(LOSS_WINDOW, jnp.nan), 1.0, 3.0, False),
    ):
        assert bool(is_spike(jnp.asarray(loss), losses, factor)) is expected


def test_case_6_run_of_skipped_steps_alone_is_no_success(tiny, tmp_path, monkeypatch):
    poison(monkeypatch)
    cfg = configure(tiny, tmp_path, ["training.max_steps=2"])
    for _ in range(2):  # the same command meets the same end: it resumes from the last checkpoint
        with pytest.raises(NothingTrained, match="nothing was trained: of 2 steps 2 were skipped") as caught:
            train(cfg, quiet=True)
    assert caught.value.exit_code == 6
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "summary.json").exists()


def test_case_6_run_without_gradients_is_no_success(tiny, tmp_path):
    """An adapter of zeros gets none; weight decay alone is no training."""
    train(configure(tiny, tmp_path, ["training.max_steps=1"]), quiet=True)
    dead = (tmp_path / "run" / "adapter").rename(tmp_path / "dead")
    tensors = load_file(dead / "adapter_model.safetensors")
    save_file({name: np.zeros_like(tensor) for name, tensor in tensors.items()}, dead / "adapter_model.safetensors")
    overrides = [f"lora.init_from={dead}", "optimizer.weight_decay=0.1", f"output_dir={tmp_path}/again"]
    with pytest.raises(NothingTrained, match="of 2 steps 0 were skipped, and the others had no gradient"):
        train(configure(tiny, tmp_path, ["training.max_steps=2", *overrides]), quiet=True)


def test_case_6_run_whose_updates_are_lost_is_no_success(tiny, tmp_path):
    """The whole run lies in the first step of the warm-up, whose rate is zero."""
    with pytest.raises(NothingTrained, match="warmup_steps"):
        train(configure(tiny, tmp_path, ["training.max_steps=1", "optimizer.warmup_steps=9"]), quiet=True)


def test_case_6_adapter_that_is_not_finite_is_never_exported(tiny, tmp_path, monkeypatch):
    """Should one come about in spite of the guards."""
    real = jlora.training.run.require_trained

    def spoil(state):
        real(state)
        lora = state.trained["adapter"]["q_proj"]
        object.__setattr__(lora, "lora_b", lora.lora_b.at[0].set(jnp.nan))

    monkeypatch.setattr(jlora.training.run, "require_trained", spoil)
    with pytest.raises(ModelError, match="the adapter of q_proj is not finite, so nothing was written") as caught:
        train(configure(tiny, tmp_path, ["training.max_steps=1"]), quiet=True)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "summary.json").exists()
