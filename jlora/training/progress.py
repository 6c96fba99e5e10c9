"""How far a run is, on the terminal or in a log file. Knows nothing of training; figures are given to it."""

import math
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jlora.files.text import clean

# Lines of a log file come this often, where no terminal shows a bar; above a bar, so many in a run.
PLAIN_LINE_SECONDS, LINES_ABOVE = 10.0, 20
BAR_WIDTH = 12


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
