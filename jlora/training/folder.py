"""Small steps around a run: its folder, when something is due, its batches on the devices."""

import os
from itertools import count
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np

from jlora.config import Config
from jlora.errors import ConfigError, DataError, NothingTrained, finding
from jlora.files import lock
from jlora.files.paths import require_own
from jlora.model.sharding import local_rows, place_rows
from jlora.training.step import TrainState


def due(every: int | None, step: int) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and step % every == 0


def saves_left(every: int | None, start: int, num_steps: int) -> int:
    """Checkpoints that a run is still to write."""
    return 0 if start == num_steps else 1 + ((num_steps - 1) // every - start // every if every else 0)


def steps_between(every: int | None, per_epoch: int | None, epoch_steps: int) -> int | None:
    """Steps from one evaluation, or checkpoint, to the next: as asked for in steps, or by the epoch; None for never."""
    return every if per_epoch is None else max(1, round(epoch_steps / per_epoch))


def make_run_dir(cfg: Config) -> Path:
    """Create the run folder, or take the one that is there; see `jlora.files.paths.require_own`."""
    run_dir = Path(cfg.output_dir)
    if run_dir.exists() and Path(cfg.model.path).exists() and run_dir.samefile(cfg.model.path):
        raise ConfigError(f"output_dir {run_dir}: is the base's own folder (model.path); set another")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {run_dir}: cannot be made ({error.strerror}); set another") from None
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(f"output_dir {run_dir}: cannot be written to; set another")
    require_own(run_dir, ConfigError)
    return run_dir


def set_aside(run_dir: Path) -> Path | None:
    """Move what is in a run folder to a new folder beside it, so that a run starts anew; nothing is deleted.

    Returns:
      where it is now; None where nothing was there.

    Raises:
      ConfigError: another process is training there, or it is no run folder.
    """
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return None
    with lock.locked(run_dir):
        entries = [path for path in run_dir.iterdir() if path.name != lock.NAME]
        if not any((run_dir / name).exists() for name in ("config.yaml", "effort.json")):
            raise ConfigError(f"output_dir {run_dir}: holds files, but no run; --fresh leaves it alone; set another")
        number = next(n for n in count(1) if not run_dir.with_name(f"{run_dir.name}.before-{n}").exists())
        aside = run_dir.with_name(f"{run_dir.name}.before-{number}")
        aside.mkdir()
        for path in entries:
            path.rename(aside / path.name)
    return aside


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
    """This process's rows of a batch [B, T] -> [A, B / A, T] on all devices."""
    split = {name: array.reshape(parts, -1, array.shape[-1]) for name, array in batch.items()}
    return {name: place_rows(array, mesh) for name, array in split.items()}


def require_taken(batch: dict[str, jax.Array], compiled: Any, step: int) -> None:
    """A batch must have the arrays that the step was compiled for, by their names, shapes and dtypes.

    Raises:
      DataError: it has others, and how they differ.
    """
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(batch, compiled.args_info[0][2])
    except AssertionError as error:
        raise DataError(
            f"the batch of step {step} is not what steps take ({finding(error)}); please report this"
        ) from None
