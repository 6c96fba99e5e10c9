"""What a run says at its end: figures for summary.json and for people. Knows nothing of training."""

import datetime
import importlib.metadata
import resource
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jlora.files.text import counted, redact
from jlora.reports.figures import drawable
from jlora.reports.run_files import parse, read_text
from jlora.training.auto_remat import peak_bytes
from jlora.training.metrics import METRICS, read_metrics


def origin(began: float) -> dict[str, Any]:
    """When the process began the run, and by which command; None of a Python program.

    Args:
      began: by `time.monotonic`.
    """
    program, started = Path(sys.argv[0]), time.time() - (time.monotonic() - began)
    # `jlora train` sets its own name; `python -m jlora.train` is known by its file.
    named = program.name if program.name.startswith("jlora ") else f"jlora {program.stem}"
    ours = named == program.name or program.parent.name == "jlora"
    return {
        "started": datetime.datetime.fromtimestamp(started).isoformat(timespec="seconds"),
        "command": redact(f"{named} {shlex.join(sys.argv[1:])}".strip()) if ours else None,
    }


def seconds_before(run_dir: Path, start: int) -> float:
    """Seconds of the starts before this one; of the last one, where it was ended by force, to its last logged line.

    Args:
      start: the step that this one resumed from; 0 where it began anew.
    """
    said = [parse(read_text(run_dir / "summary.json")) or {}, *read_metrics(run_dir / METRICS)] if start else []
    return max((drawable(each.get("wall_seconds")) or 0.0 for each in said), default=0.0)


def finished_summary(run_dir: Path) -> dict[str, Any] | None:
    """The summary of a run that ended well and whose adapter is still there; None of any other."""
    summary = parse(read_text(run_dir / "summary.json"))
    if summary is None or summary.get("status") != "finished":
        return None
    if summary.get("adapter", "") is None:  # a full fine-tuning
        return summary
    # The run may have been moved since, and not all of it.
    files = ("adapter_config.json", "adapter_model.safetensors")
    present = all((run_dir / "adapter" / name).is_file() for name in files)
    return summary | {"adapter": str(run_dir / "adapter")} if present else None


def final_losses(run_dir: Path) -> dict[str, Any]:
    """Last training loss; first, last and lowest held-out loss, and the step of the lowest; from the log."""
    lines = read_metrics(run_dir / METRICS)
    train_losses = [line["loss"] for line in lines if "loss" in line] or [None]
    evaluated = [line for line in lines if "eval_loss" in line]
    eval_losses = [line["eval_loss"] for line in evaluated] or [None]
    trained = [line for line in reversed(evaluated) if line["eval_loss"] is not None and line["step"]]
    lowest: dict[str, Any] = min(trained, key=lambda line: line["eval_loss"], default={})  # of equal ones the newest
    return {
        "train_loss": train_losses[-1],
        "eval_loss_before": eval_losses[0],
        "eval_loss": eval_losses[-1],
        "lowest_eval_loss": lowest.get("eval_loss"),
        "lowest_eval_step": lowest.get("step"),
    }


def peak_memory(compiled: Any) -> dict[str, int | None]:
    """Peak bytes of this process, of the device where it counts them, and of the compiled step."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    step = None if compiled is None else peak_bytes(compiled, jax.local_devices()[0].platform)
    return {"host": host, "device": device, "compiled_step": step}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    names = ("jlora", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": sys.version.split()[0]}


def print_summary(summary: dict[str, Any], output_dir: str) -> None:
    """The end of a run, for people."""
    if summary["status"] == "preempted":
        print(f"stopped at step {summary['steps']}, saved; run the same command again to resume")
        return
    before, after = summary["eval_loss_before"], summary["eval_loss"]
    if before is not None and after is not None:
        print(f"held-out loss {before:.4f} -> {after:.4f} ({(after - before) / before:+.1%})")
    rate, memory, steps = summary["tokens_per_second"], summary["peak_memory_bytes"], summary["steps"]
    speed = f"{rate:,.0f} tokens/s, " if rate else ""
    early = " (stopped early)" if summary.get("stopped_early") else ""
    print(f"{counted(steps, 'step')}{early}, {speed}peak host memory {memory['host'] / 2**30:.2f} GiB")
    which = ""
    if summary.get("exported_step") not in (None, steps):
        which = f" (of step {summary['exported_step']}: held-out loss {summary['lowest_eval_loss']:.4f})"
    print(f"adapter: {summary['adapter']}{which}" if summary["adapter"] else f"checkpoint: {output_dir}/checkpoints")
    print(f"report: {output_dir}/report.html")


def warn_of_result(summary: dict[str, Any]) -> None:
    """Say on stderr where training made the held-out loss worse than it was, or than it had been on the way."""
    before, after, lowest = (summary.get(key) for key in ("eval_loss_before", "eval_loss", "lowest_eval_loss"))
    if before is None or after is None or lowest is None:
        return
    step, steps, left = summary["lowest_eval_step"], summary["steps"], left_loss(summary)
    if left > before:
        print(
            f"warning: training raised the held-out loss from {before:.4f} to {left:.4f}: the base alone is better on "
            "these rows; lower optimizer.learning_rate or training.epochs",
            file=sys.stderr,
        )
    elif left > lowest:
        print(
            f"warning: the held-out loss was lower before the end: {lowest:.4f} at step {step}, {after:.4f} at step "
            f"{steps}, whose weights are kept; train less, or set training.export=best",
            file=sys.stderr,
        )


def left_loss(summary: dict[str, Any]) -> float | None:
    """Held-out loss of the weights that a run left, which need not be those of its last step."""
    best = summary.get("exported_step") is not None and summary["exported_step"] == summary["lowest_eval_step"]
    return summary.get("lowest_eval_loss" if best else "eval_loss")


def print_sweep(summary: dict[str, Any]) -> None:
    """The end of a sweep, for people."""
    for name, run in summary["runs"].items():
        losses = {"train loss": run.get("train_loss"), "held-out loss": run.get("eval_loss")}
        text = "".join(f", {key} {value:.4f}" for key, value in losses.items() if value is not None)
        print(f"{name}: {run['status']} after {counted(run['steps'], 'step')}{text}")
    left = {name: left_loss(run) for name, run in summary["runs"].items() if run["status"] == "finished"}
    losses = {name: loss for name, loss in left.items() if loss is not None}
    if losses:
        best = min(losses, key=lambda name: losses[name])
        print(f"best by held-out loss ({losses[best]:.4f}): {best}, adapter: {summary['runs'][best]['adapter']}")
    if summary["report"] is not None:
        print(f"report: {summary['report']}")
