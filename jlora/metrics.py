"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases and the progress line."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jlora.errors import ConfigError

# Lines of a log file come this often where no terminal shows a bar.
PLAIN_LINE_SECONDS = 10.0


class MetricsLog:
    """Appends one JSON object a logged step, and mirrors its numbers to TensorBoard and W&B."""

    def __init__(self, run_dir: Path, resume_step: int, wandb_project: str | None, config: dict[str, Any]):
        """Args: resume_step: lines of later steps, written before a crash, are dropped."""
        self._path = run_dir / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= resume_step] if resume_step else []
        temporary = self._path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)
        self._stream = open(self._path, "a", encoding="utf-8")
        from tensorboardX import SummaryWriter

        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)
        self._wandb = _start_wandb(wandb_project, run_dir, config) if wandb_project else None

    def write(self, line: dict[str, Any]) -> None:
        """Log one object; `step` is its x value."""
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, int | float)}
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        """Flush everything."""
        self._stream.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, run_dir: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("training.wandb is set, but wandb is not installed; pip install wandb") from None
    return wandb.init(project=project, dir=str(run_dir), config=config, resume="allow", id=run_dir.name)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; a line that a crash cut short is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


class ProgressLine:
    """A bar with loss, tokens/s and time left on a terminal; a plain line now and then in a log file."""

    def __init__(self, total: int, start: int, quiet: bool):
        self._total, self._quiet, self._last = total, quiet, -math.inf
        self._bar: Progress | None = None
        self._first, self._began = start, time.monotonic()
        if sys.stderr.isatty() and not quiet:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("time left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=total, completed=start, text="")
            self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show a step's figures."""
        text = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if not self._quiet and (now - self._last >= PLAIN_LINE_SECONDS or step == self._total):
            self._last = now
            left = (now - self._began) / max(1, step - self._first) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  time left {left / 60:.0f}:{left % 60:02.0f}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
