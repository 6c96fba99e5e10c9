"""What every run does around its steps, alone or in a sweep: its folder, its batches on the devices, its summary."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora.config import Config
from jlora.data import Dataset, Epochs
from jlora.data.figures import count_sources
from jlora.errors import ConfigError, NothingTrained
from jlora.folders import require_own
from jlora.metrics import StepMeter
from jlora.pretrained import Opened
from jlora.sharding import local_rows, place_rows
from jlora.step import TrainState, count_parameters, count_trained
from jlora.summary import summarize


def due(every: int | None, step: int) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and step % every == 0


def saves_left(every: int | None, start: int, num_steps: int) -> int:
    """Checkpoints that a run is still to write."""
    return 0 if start == num_steps else 1 + ((num_steps - 1) // every - start // every if every else 0)


def warn_of_length(cfg: Config, opened: Opened) -> None:
    """Rows longer than the base was made for train, but not well."""
    limit = opened.source.config.get("max_position_embeddings")
    if isinstance(limit, int) and cfg.data.max_length > limit:
        print(
            f"warning: data.max_length={cfg.data.max_length} is beyond the base's {limit} positions",
            file=sys.stderr,
        )


def make_run_dir(cfg: Config) -> Path:
    """Create the run folder, or take the one that is there; see `jlora.folders.require_own`."""
    run_dir = Path(cfg.output_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {run_dir}: can not be made ({error.strerror}); set another") from None
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(f"output_dir {run_dir}: can not be written to; set another")
    require_own(run_dir, ConfigError)
    return run_dir


def require_trained(state: TrainState) -> None:
    """A run at its end that has trained nothing has failed, whatever its loss.

    Raises:
      NothingTrained: no step changed a trained leaf by its gradients.
    """
    if int(state.moved):
        return
    steps, skipped = int(state.step), int(state.skipped)
    raise NothingTrained(
        f"nothing was trained: of {steps} steps {skipped} were skipped, and the others had no gradient or an update "
        "too small to change a weight, so no adapter is written; look at metrics.jsonl, at "
        "optimizer.learning_rate, warmup_steps and max_grad_norm, and at the rows"
    )


def batch_rows(cfg: Config, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Rows of a batch that this process makes: of each micro-batch those that its devices hold."""
    parts = cfg.training.gradient_accumulation_steps
    size = cfg.training.batch_size // parts
    return np.concatenate([part * size + local_rows(mesh, size) for part in range(parts)])


def put_batch(batch: dict[str, np.ndarray], parts: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch [..., B, T] -> [..., A, B / A, T] on all devices."""
    split = {name: array.reshape(*array.shape[:-2], parts, -1, array.shape[-1]) for name, array in batch.items()}
    return {name: place_rows(array, mesh) for name, array in split.items()}


def run_summary(
    cfg: Config,
    step: int,
    num_steps: int,
    state: TrainState,
    frozen: Any,
    train_data: Dataset,
    eval_data: Dataset | None,
    epochs: Epochs,
    identity: dict[str, Any],
    began: float,
    meter: StepMeter,
    compiled: Any,
) -> dict[str, Any]:
    """summary.json of a run that ended at `step`.

    Args:
      began: `time.monotonic()` at its start.
      compiled: the compiled step, or None where no step was left to take.
    """
    finished, run_dir = step == num_steps, Path(cfg.output_dir)
    return {
        "status": "finished" if finished else "preempted",
        "steps": step,
        "epochs": epochs.epoch_at(step),
        "skipped_steps": int(state.skipped),
        "rows": {
            "read": train_data.read,
            "used": len(train_data.examples),
            "dropped": dict(train_data.dropped),
            "truncated": train_data.truncated,
            "eval": len(eval_data.examples) if eval_data else 0,
            **({"sources": count_sources(train_data)} if train_data.parts else {}),
        },
        "trainable_params": count_trained(state.trained),
        "frozen_params": count_parameters(frozen),
        "remat": identity.get("remat", cfg.model.remat),
        "hashes": identity["hashes"],
        "history": identity.get("history", []),
        "adapter": str(run_dir / "adapter") if finished and cfg.method == "lora" else None,
        "wall_seconds": time.monotonic() - began,
        **summarize(run_dir, meter, compiled),
    }
