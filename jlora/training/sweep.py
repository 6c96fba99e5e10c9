"""The runs of a sweep, one after another over one frozen base in one process.

Each run is that of `jlora.training.run.train`, with the folder, log, checkpoints and result that it would have alone;
they share the base, their rows where those are the same, and the compiled step where its shapes are.
"""

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jlora.config import Config, variants
from jlora.data.packing import plan_steps
from jlora.errors import ConfigError, NonFiniteError, NothingTrained
from jlora.files import lock
from jlora.files.atomic import write_json, write_text
from jlora.files.paths import require_own
from jlora.hf.pretrained import with_ids
from jlora.model.adapter_init import check_options
from jlora.reports.runs import sweep_runs, write_sweep
from jlora.runtime import distributed, signals
from jlora.training import optim
from jlora.training.folder import make_run_dir
from jlora.training.metrics import read_metrics
from jlora.training.opening import Shared
from jlora.training.run import train
from jlora.training.summary import peak_memory


@dataclass
class Sweep:
    """What is known of the runs: summaries by name, and whether a signal stopped all."""

    configs: dict[str, Config]
    quiet: bool
    shared: Shared
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: bool = False

    def train(self, name: str, until: int | None = None) -> None:
        """Take one run on, to its end or to `until`; one that fails does not end the others."""
        if self.stopped or self.summaries.get(name, {}).get("status") == "failed":
            return
        if not self.quiet:
            number, rung = list(self.configs).index(name) + 1, f", to step {until}" if until else ""
            print(f"run {number} of {len(self.configs)}: {name}{rung}", file=sys.stderr)
        try:
            summary = train(self.configs[name], self.quiet, self.shared, until)
        except (NonFiniteError, NothingTrained) as error:
            lines = read_metrics(Path(self.configs[name].output_dir) / "metrics.jsonl")
            steps = max((line["step"] for line in lines), default=0)
            summary = {"status": "failed", "error": str(error), "steps": steps}
        self.summaries[name] = summary
        self.stopped = signals.received()  # also after a run's last step, which takes nothing from that run

    def halve(self) -> list[str]:
        """Take the runs from rung to rung, each of twice the steps; returns the half that is left at the last one.

        At each rung the worse half by held-out loss stops where it is, resumable like any stopped run
        (successive halving, arXiv:1502.07943).
        """
        names = list(self.configs)
        steps = {name: plan_steps(cfg, self.shared.read(cfg)[0])[1] for name, cfg in self.configs.items()}
        for rung in range(math.ceil(math.log2(len(names))), 0, -1):
            for name in names:
                self.train(name, until=max(1, steps[name] >> rung))
            losses = [(self.summaries[name].get("eval_loss"), name) for name in names if name in self.summaries]
            ranked = sorted((loss, name) for loss, name in losses if loss is not None)
            names = [name for _, name in ranked][: math.ceil(len(names) / 2)]
        return names


def train_together(cfg: Config, quiet: bool = False) -> dict[str, Any]:
    """Run all entries of a sweep to their ends, or on from their last checkpoints; returns the summary of all.

    A run past its limit of non-finite steps, or that trains nothing, ends alone; see `require_all`.

    Raises:
      UserError: see `jlora.errors`; what was saved before stays whole.
    """
    began = time.monotonic()
    if distributed.expected(cfg.distributed):
        raise ConfigError("a sweep runs in one process; take the keys of distributed out, or start one process")
    signals.end_on_signals()
    folder = make_run_dir(cfg)
    sweep = Sweep({Path(each.output_dir).name: each for each in variants(cfg)}, quiet, Shared())
    require_own(folder, ConfigError, sweep.configs)
    with lock.locked(folder):
        for each in sweep.configs.values():  # what is wrong with the last is told before the first is trained
            opened = sweep.shared.open(each)
            each, model = with_ids(each, opened), opened.model
            check_options(each.lora, model)
            optim.check_rule(each, model)
            sweep.shared.read(each)
        write_text(folder / "config.yaml", cfg.dump_yaml())
        for name in sweep.halve() if cfg.sweep_halving else sweep.configs:
            sweep.train(name)
        runs = {name: sweep.summaries.get(name, {"status": "not started", "steps": 0}) for name in sweep.configs}
        left = sweep.stopped and any(run["status"] != "finished" for run in runs.values())
        failed = any(run["status"] == "failed" for run in runs.values())
        summary = {
            "status": "failed" if failed else "preempted" if left else "finished",
            "runs": runs,
            "wall_seconds": time.monotonic() - began,
            "peak_memory_bytes": peak_memory(None),
            "report": str(folder / "report.html") if sweep_runs(folder) else None,
        }
        write_json(folder / "summary.json", summary)
        if summary["report"] is not None:
            write_sweep(folder)
    return summary


def require_all(summary: dict[str, Any]) -> None:
    """Raise what ended runs of a sweep before their time.

    Raises:
      NonFiniteError: naming each of them and why.
    """
    failed = [f"{name}: {run['error']}" for name, run in summary["runs"].items() if run["status"] == "failed"]
    if failed:
        raise NonFiniteError("; ".join(failed))
