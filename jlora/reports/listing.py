"""A line about each of many runs, on the terminal. Reads what run folders hold, whatever state they are in."""

import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from jlora.files.text import clean
from jlora.reports.figures import compact, duration, loss, mapping, shown
from jlora.reports.run_files import read_run

HEADS = ("run", "status", "steps", "held-out loss", "train loss", "base", "method", "rate", "took", "changed")


def described(folder: Path) -> dict[str, Any]:
    """A run as its files tell it; None where they do not say."""
    run = read_run(folder)
    config = run.keys()
    section = {name: mapping(config.get(name)) for name in ("model", "lora", "optimizer")}
    before, after = run.held_out()
    return {
        "run": str(folder),
        "status": run.summary.get("status", "unfinished"),
        "steps": run.num_steps(),
        "eval_loss_before": before,
        "eval_loss": after,
        "train_loss": run.figure("train_loss", "loss"),
        "base": section["model"].get("path"),
        "method": config.get("method"),
        "rank": section["lora"].get("rank"),
        "learning_rate": section["optimizer"].get("learning_rate"),
        "wall_seconds": run.summary.get("wall_seconds"),
        "changed": (folder / "metrics.jsonl").stat().st_mtime,
    }


def print_runs(runs: list[dict[str, Any]]) -> None:
    """A table of runs, as wide as the terminal; into a pipe whole."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=10_000)
    table = Table(*HEADS, box=box.SIMPLE_HEAD, pad_edge=False)
    for run in runs:
        held_out = f"{shown(run['eval_loss_before'], loss)} → {shown(run['eval_loss'], loss)}"
        method = f"LoRA r={run['rank']}" if run["method"] == "lora" else shown(run["method"])
        table.add_row(
            clean(run["run"]),
            clean(shown(run["status"])),
            shown(run["steps"], compact),
            held_out if run["eval_loss"] is not None else "–",
            shown(run["train_loss"], loss),
            clean(Path(str(run["base"])).name),
            clean(method),
            shown(run["learning_rate"], "{:g}".format),
            shown(run["wall_seconds"], duration),
            datetime.datetime.fromtimestamp(run["changed"]).strftime("%Y-%m-%d %H:%M"),
        )
    console.print(table)
