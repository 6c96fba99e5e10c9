"""Where a run's numbers go: metrics.jsonl, trackers, the progress line, and a Python program's own functions."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jlora.config import TrainingSection
from jlora.data.packing import Epochs
from jlora.errors import ConfigError, NonFiniteError
from jlora.files.atomic import open_own, strict_json, write_text
from jlora.files.text import clean, redact
from jlora.reports.run_files import read_records
from jlora.training.trackers import Tracker

# Lines of a log file come this often, where no terminal shows a bar; above a bar, so many in a run.
PLAIN_LINE_SECONDS, LINES_ABOVE = 10.0, 20
BAR_WIDTH = 12
METRICS = "metrics.jsonl"
# What a step was skipped for, by its metric `skip`; and how many of its rows a sentence names.
SKIPS = (None, "the loss, the gradients or the update are not finite", "the loss is a spike")
NAMED_ROWS = 8


@dataclass(frozen=True)
class Callbacks:
    """Functions that the training loop calls, in the process of `train`; one that raises ends the run.

    Attributes:
      on_step: of each logged step, with its number and its line of metrics.jsonl.
      on_eval: of each evaluation, with the step and its figures; what it returns, a dict of numbers, is logged
        beside them.
      on_save: of each checkpoint whose writing began, with the step and the folder that it will be.
    """

    on_step: Callable[[int, dict[str, Any]], None] = lambda step, line: None
    on_eval: Callable[[int, dict[str, Any]], dict[str, Any] | None] = lambda step, figures: None
    on_save: Callable[[int, Path], None] = lambda step, folder: None


def figures_of(returned: object, taken: dict[str, Any]) -> dict[str, float]:
    """What `on_eval` returned, as figures to log beside those that are measured.

    Raises:
      ConfigError: it is no dict of numbers by names that are free.
    """
    if returned is None:
        return {}
    if not isinstance(returned, dict):
        raise ConfigError(f"on_eval returned {type(returned).__name__}; let it return a dict of numbers, or None")
    figures = {}
    for name, value in returned.items():
        if not isinstance(name, str) or name in taken:
            raise ConfigError(f"on_eval returned a figure named {name!r}, which is none or taken; name it otherwise")
        if isinstance(value, str) or not isinstance(value, SupportsFloat):
            raise ConfigError(f"on_eval returned {name}={value!r:.50}; let it be a number")
        figures[name] = float(value)
    return figures


class ProgressLine:
    """A bar on a terminal, with lines above it that stay; a plain line now and then in a log file.

    The time left is that of the steps and evaluations that are left, each as long as they took so far; compilation,
    before the first step, counts for neither.
    """

    def __init__(self, total: int, start: int, quiet: bool, eval_every: int | None = None):
        """Begin before the first step.

        Args:
          total, start: steps of the run, and those done before.
          eval_every: steps between evaluations; there is one at the end, too, if there is any.
        """
        self._total, self._quiet, self._eval_every = total, quiet, eval_every
        self._last, self._opened = -math.inf, time.monotonic()
        self._first: tuple[int, float] | None = None  # the step after which the clock of steps begins, and when
        self._step = self._evaluated = start  # the last one shown, and the last one that an evaluation followed
        self._evaluation = 0.0  # seconds of one
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(BAR_WIDTH))
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._task = self._bar.add_task("train", total=total, completed=start, text="")

    @property
    def plain(self) -> bool:
        """Whether there is no bar, so that lines come now and then."""
        return self._bar is None

    def update(self, step: int, figures: dict[str, Any]) -> None:
        """Show a step's figures, as metrics.jsonl has them."""
        self._step, now = step, time.monotonic()
        first, began = self._first = self._first or (step, now)  # compilation is over by then
        short = f"epoch {figures['epoch']:.2f}  loss {figures['loss']:.4f}"
        speed = f"{figures['tokens_per_second']:,.0f} tokens/s"
        clocks = clock(now - self._opened) + (
            f", {clock(self._left((now - began) / (step - first)))} left" if step > first else ""
        )
        more = f"lr {figures['learning_rate']:.1e}  grad {figures['grad_norm']:.2g}"
        line = f"step {step}/{self._total}  {short}  {more}  {speed}  {clocks}"
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, completed=step, text=f"{short}  {speed}  {clocks}")
            if step % max(1, self._total // LINES_ABOVE) == 0 or step == self._total:
                self.say(line)
        elif now - self._last >= PLAIN_LINE_SECONDS or step == self._total:
            self._last = now
            self.say(line)

    def evaluated(self, seconds: float, one: float) -> None:
        """The steps stood still meanwhile.

        Args:
          seconds: that went by. one: that an evaluation takes once it is compiled.
        """
        self._evaluation, self._evaluated = one, self._step
        if self._first is not None:
            self._first = self._first[0], self._first[1] + seconds

    def _left(self, seconds_per_step: float) -> float:
        every = self._eval_every or self._total
        evaluations = self._total // every - self._evaluated // every + (self._total % every > 0)
        return seconds_per_step * (self._total - self._step) + self._evaluation * evaluations

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._quiet:
            return
        text = clean(text)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """101 -> 1:41; 5000 -> 1:23:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class MetricsLog:
    """Appends one JSON object a logged step, and tells its numbers to the trackers."""

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        trackers: dict[str, Tracker] | None,
        main: bool = True,
        began: float | None = None,
    ):
        """Open the log, or go on with it.

        Args:
          resume_step: lines of later steps, written before a crash, are dropped.
          trackers: by name; closed with the log. They have clocks of their own.
          main: False writes nothing.
          began: by `time.monotonic`, from when `wall_seconds` of each line counts; None leaves them out.
        """
        self._main, self._began = main, began
        if not main:
            return
        self._trackers = dict(trackers or {})
        self._path = run_dir / METRICS
        lines = read_metrics(self._path) if resume_step else []
        kept = [line for line in lines if line["step"] <= resume_step]
        # What was told before a crash is not told again.
        self._told = {(line["step"], name) for line in lines[len(kept) :] for name in line}
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = os.fdopen(open_own(self._path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Log one object, whose `step` is its x value, and return it as it was logged."""
        seconds = {} if self._began is None else {"wall_seconds": round(time.monotonic() - self._began, 3)}
        timed = line | seconds
        if not self._main:
            return timed
        try:
            self._stream.write(strict_json(timed) + "\n")
            self._stream.flush()
        except OSError as error:  # a stream does not say which file it is
            error.filename = str(self._path)
            raise
        step = line["step"]
        numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        news = {name: value for name, value in numbers.items() if (step, name) not in self._told}
        for name, tracker in list(self._trackers.items()):
            self._tell(name, partial(tracker.log, numbers if tracker.rewinds else news, step))
        return timed

    def close(self) -> None:
        """Flush everything."""
        if not self._main:
            return
        self._stream.close()
        for name, tracker in list(self._trackers.items()):
            self._tell(name, tracker.close)

    def _tell(self, name: str, call: Callable[[], None]) -> None:
        """A tracker that fails, such as one whose server is gone, is no reason to end a run."""
        try:
            call()
        except Exception as error:  # of a library of others'
            del self._trackers[name]
            reason = redact(" ".join(str(error).split())[:200])
            print(f"warning: {name} is told no more ({reason}); metrics.jsonl has all figures", file=sys.stderr)


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
        on_step: Callable[[int, dict[str, Any]], None] = lambda step, line: None,
    ):
        self.tokens = 0  # not padding, since this process started
        self.tokens_before = tokens_before
        self._log, self._progress, self._epochs, self._cfg, self._num_steps = log, progress, epochs, cfg, num_steps
        self._on_step = on_step
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
            line |= {"tokens": total, "tokens_per_second": rate} | memory_now()
            line = self._log.write(line)
            self._progress.update(step, line)
            self._on_step(step, line)
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
