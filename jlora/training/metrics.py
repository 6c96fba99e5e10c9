"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases and the progress line."""

import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jlora.config import TrainingSection
from jlora.data.packing import Epochs
from jlora.errors import ConfigError, NonFiniteError
from jlora.files.atomic import open_own, strict_json, write_text
from jlora.reports.run_files import read_records, read_text
from jlora.training.progress import ProgressLine

# What a step was skipped for, by its metric `skip`; and how many of its rows a sentence names.
SKIPS = (None, "the loss, the gradients or the update are not finite", "the loss is a spike")
NAMED_ROWS = 8


class MetricsLog:
    """Appends one JSON object a logged step, and mirrors its numbers to TensorBoard and W&B."""

    def __init__(self, run_dir: Path, resume_step: int, wandb_project: str | None, config: dict[str, Any], main: bool):
        """Open the log, or go on with it.

        Args:
          resume_step: lines of later steps, written before a crash, are dropped.
          main: False writes nothing.
        """
        self._main = main
        if not main:
            return
        self._wandb = _start_wandb(wandb_project, run_dir, config) if wandb_project else None
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= resume_step] if resume_step else []
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = os.fdopen(open_own(self._path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")
        from tensorboardX import SummaryWriter

        # A name that nobody has yet: its own, of a second, would cut the file of a start in the same one.
        suffix = f".{secrets.token_hex(4)}"
        folder = str(run_dir / "tensorboard")
        self._tensorboard = SummaryWriter(folder, purge_step=resume_step + 1, filename_suffix=suffix)

    def write(self, line: dict[str, Any]) -> None:
        """Log one object; `step` is its x value."""
        if not self._main:
            return
        try:
            self._stream.write(strict_json(line) + "\n")
            self._stream.flush()
        except OSError as error:  # a stream does not say which file it is
            error.filename = str(self._path)
            raise
        numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        """Flush everything."""
        if not self._main:
            return
        self._stream.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb(project: str | None) -> None:
    """Fail before the base is read, if a run is to be logged to Weights & Biases and cannot be.

    Raises:
      ConfigError: wandb is not installed, or would ask who logs in where nobody is there to answer.
    """
    if not project:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("training.wandb is set, but wandb is not installed; pip install wandb, or set it to null")
    import wandb

    online = os.environ.get("WANDB_MODE", "online") == "online"
    if online and not wandb.api.api_key and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ConfigError(
            "training.wandb is set, but nobody is logged in to Weights & Biases; run `wandb login`, set WANDB_API_KEY, "
            "or WANDB_MODE=offline"
        )


def _start_wandb(project: str, run_dir: Path, config: dict[str, Any]) -> Any:
    import wandb

    name, kept = run_dir.resolve().name, run_dir / "wandb" / "jlora-id"
    # Made once and kept: runs of one name in several folders are several, and so is one begun anew.
    run_id = read_text(kept).strip()
    if not run_id:
        run_id = secrets.token_hex(8)
        kept.parent.mkdir(exist_ok=True)
        write_text(kept, run_id)
    try:
        return wandb.init(project=project, dir=str(run_dir), config=config, resume="allow", id=run_id, name=name)
    except wandb.Error as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"training.wandb={project}: Weights & Biases refuses the run ({reason})") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a line that a crash cut short is left out."""
    return read_records(path)[0]


def memory_now() -> dict[str, int]:
    """Bytes that this process holds, and those of its first device where it counts them."""
    held = {}
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        held["host_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # not Linux
        pass
    in_use = (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")
    return held if in_use is None else held | {"device_bytes": in_use}


class StepMeter:
    """Counts tokens and time, and turns what a step returns into a logged line.

    A step's figures are read only when the next step is under way, so that the device never waits for
    the host.
    """

    def __init__(
        self,
        log: MetricsLog,
        progress: ProgressLine,
        epochs: Epochs,
        cfg: TrainingSection,
        tokens_before: int,
        num_steps: int,
    ):
        self.tokens = 0  # not padding, since this process started
        self.tokens_before = tokens_before
        self._log, self._progress, self._epochs, self._cfg, self._num_steps = log, progress, epochs, cfg, num_steps
        self.loss = math.nan  # of the last step settled
        self._pending: tuple[int, dict[str, jax.Array], int] | None = None
        self._logged_tokens = 0
        self._began = self._clock = self._ended = time.monotonic()

    def start(self) -> None:
        """Time runs from here: compilation is over."""
        self._began = self._clock = time.monotonic()

    def took(self, step: int, metrics: dict[str, jax.Array], num_tokens: int) -> None:
        """A step was started; its predecessor is logged."""
        self.settle()
        self.tokens += num_tokens
        self._pending = (step, metrics, self.tokens)

    def settle(self) -> None:
        """Wait for the last step taken, and log it.

        Raises:
          NonFiniteError: more steps were skipped than the config allows.
        """
        if self._pending is None:
            return
        step, metrics, tokens = self._pending
        self._pending = None
        values = {name: value.item() for name, value in metrics.items()}
        skip = SKIPS[values.pop("skip")]
        rows = self._epochs.places_in(step - 1) if skip else []
        self._ended = now = time.monotonic()
        self.loss = values["loss"]
        if step % self._cfg.log_every == 0 or step == self._num_steps or skip:
            rate = (tokens - self._logged_tokens) / (now - self._clock)
            self._clock, self._logged_tokens = now, tokens
            total = self.tokens_before + tokens
            line = {"step": step, "epoch": self._epochs.epoch_at(step), **values}
            if skip:
                line |= {"skipped": skip, "rows": rows}
            self._log.write(line | {"tokens": total, "tokens_per_second": rate} | memory_now())
            self._progress.update(step, line | {"tokens_per_second": rate})
        if not skip:
            return
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        cause = f"step {step}: {skip} (loss {values['loss']:.4g}), on rows {', '.join(rows[:NAMED_ROWS])}{more}"
        limit = self._cfg.max_nonfinite_steps
        if values["skipped_steps"] > limit:
            raise NonFiniteError(
                f"{cause}; {values['skipped_steps']} steps were skipped, more than training.max_nonfinite_steps="
                f"{limit}; lower optimizer.learning_rate or look at the rows"
            )
        self._progress.say(f"{cause}; skipped ({values['skipped_steps']} of at most {limit})")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        self.settle()
        before = time.monotonic()
        yield
        lost = time.monotonic() - before
        self._began, self._clock = self._began + lost, self._clock + lost
        self._ended += lost

    def tokens_per_second(self) -> float | None:
        """Tokens a second over all steps of this process, evaluation, saving and compilation left out."""
        return self.tokens / (self._ended - self._began) if self.tokens else None
