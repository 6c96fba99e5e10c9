"""Who shows a run's figures beside metrics.jsonl: TensorBoard always; W&B, MLflow and trackio where asked."""

import contextlib
import importlib.util
import io
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.config import Config, TrainingSection
from jlora.config.sections import dotted
from jlora.errors import ConfigError
from jlora.files.atomic import write_text
from jlora.reports.run_files import read_text

# MLflow takes so many parameters at once, and so many characters of each.
MOST_PARAMETERS, LONGEST_PARAMETER = 100, 500


@dataclass(frozen=True)
class Tracker:
    """Somebody who is told figures.

    Attributes:
      log: takes figures by name, and their step.
      close: all is told.
      rewinds: it drops by itself what it was told of steps after the one that a run resumes from.
    """

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]
    rewinds: bool = False


def require_trackers(cfg: TrainingSection) -> None:
    """Fail before the base is read, if a run is to be shown by a tracker that is not there.

    Raises:
      ConfigError: one is not installed, or would ask who logs in where nobody is there to answer.
    """
    for key in ASKED_FOR:
        if getattr(cfg, key) and importlib.util.find_spec(key) is None:
            raise ConfigError(
                f"training.{key} is set, but {key} is not installed; pip install {key}, or set it to null"
            )
    if not cfg.wandb:
        return
    import wandb

    online = os.environ.get("WANDB_MODE", "online") == "online"
    if online and not wandb.api.api_key and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            "training.wandb is set, but nobody is logged in to Weights & Biases; run `wandb login`, set WANDB_API_KEY, "
            "or WANDB_MODE=offline"
        )


def open_trackers(cfg: Config, run_dir: Path, resume_step: int) -> dict[str, Tracker]:
    """Those that the config asks for, by name. A run that resumes goes on in the same place.

    Args:
      resume_step: 0 begins anew, also where the folder names a place.

    Raises:
      ConfigError: one refuses the run, or cannot be reached.
    """
    trackers = {"TensorBoard": _tensorboard(run_dir, resume_step)}
    for key, (title, opener) in ASKED_FOR.items():
        project = getattr(cfg.training, key)
        if not project:
            continue
        kept = run_dir / key / "jlora-id"
        before = read_text(kept).strip() if resume_step else ""
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # which is for results
                run_id, trackers[title] = opener(project, run_dir, cfg.model_dump(mode="json"), before)
        except Exception as error:  # of a library of others', which has its own for each cause
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"training.{key}={project}: {title} refuses the run ({reason})") from None
        if run_id != before:
            kept.parent.mkdir(exist_ok=True)
            write_text(kept, run_id)
    return trackers


def _tensorboard(run_dir: Path, resume_step: int) -> Tracker:
    from tensorboardX import SummaryWriter

    # A name that nobody has yet: its own, of a second, would cut the file of a start in the same one.
    suffix = f".{secrets.token_hex(4)}"
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1, filename_suffix=suffix)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close, rewinds=True)


def _wandb(project: str, run_dir: Path, config: dict[str, Any], before: str) -> tuple[str, Tracker]:
    import wandb

    # Runs of one name in several folders are several.
    run_id, name = before or secrets.token_hex(8), run_dir.resolve().name
    run = wandb.init(project=project, dir=str(run_dir), config=config, resume="allow", id=run_id, name=name)
    return run_id, Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)


def _mlflow(experiment: str, run_dir: Path, config: dict[str, Any], before: str) -> tuple[str, Tracker]:
    # A server that is gone is waited for once more, not for minutes: the run stands still meanwhile.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient()
    if before:
        client.update_run(before, status="RUNNING")
    else:
        found = client.get_experiment_by_name(experiment)
        where = found.experiment_id if found else client.create_experiment(experiment)
        before = client.create_run(where, run_name=run_dir.resolve().name).info.run_id
        values = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in dotted(config).items()]
        for start in range(0, len(values), MOST_PARAMETERS):
            client.log_batch(before, params=values[start : start + MOST_PARAMETERS])

    def log(numbers: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        client.log_batch(before, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    return before, Tracker(log, lambda: client.set_terminated(before))


def _trackio(project: str, run_dir: Path, config: dict[str, Any], before: str) -> tuple[str, Tracker]:
    import trackio

    name = before or f"{run_dir.resolve().name}-{secrets.token_hex(4)}"
    run = trackio.init(
        project, name=name, config=config, resume="allow", embed=False, auto_log_cpu=False, auto_log_gpu=False
    )

    def close() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # which is for results
            trackio.finish()

    return name, Tracker(run.log, close)


# Key of `training`, which is what to install, too -> what it is called, what opens it.
ASKED_FOR = {"wandb": ("Weights & Biases", _wandb), "mlflow": ("MLflow", _mlflow), "trackio": ("trackio", _trackio)}
