"""What an adapter was made from, `provenance.json` beside its weights, so that it can be made again.

It holds no row: digests of rows, base and tokenizer, the config, versions, the device, and the losses on the way.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
from pydantic import ValidationError

from jlora.config import Config, describe
from jlora.errors import ModelError
from jlora.files.paths import inside
from jlora.files.theirs import MAX_JSON, parse, text_of_theirs
from jlora.hf.adapters import adapter_digest
from jlora.hf.verify import PROVENANCE as NAME
from jlora.training.checkpoint import Checkpoints
from jlora.training.metrics import METRICS, read_metrics
from jlora.training.summary import versions

FORMAT = 1
# Losses that are kept, evenly over a long run.
MOST_LOSSES = 1000


def provenance(cfg: Config, run_dir: Path, step: int, identity: dict[str, Any]) -> dict[str, Any]:
    """What is written beside the weights of `step`, but for their own digest.

    Args:
      identity: of the run, as its checkpoint has it.
    """
    losses = [[line["step"], line["loss"]] for line in read_metrics(run_dir / METRICS) if "loss" in line]
    losses = [each for each in losses if each[0] <= step]
    return {
        "format": FORMAT,
        "step": step,
        "config": cfg.model_dump(mode="json"),
        "remat": identity.get("remat"),
        "hashes": identity["hashes"],
        "history": identity.get("history", []),
        **environment(),
        "losses": losses[:: len(losses) // MOST_LOSSES + 1],
    }


def provenance_of(cfg: Config, run_dir: Path, step: int) -> dict[str, Any]:
    """The same of a checkpoint."""
    checkpoints = Checkpoints(run_dir / "checkpoints", cfg.training.keep_checkpoints, read_only=True)
    try:
        return provenance(cfg, run_dir, step, checkpoints.identity(step))
    finally:
        checkpoints.close()


def environment() -> dict[str, Any]:
    """What decides the last bits beside config and data: versions, devices, processor, and XLA's flags."""
    devices = jax.devices()
    cpu = devices[0].platform == "cpu"
    return {
        "versions": versions(),
        "device": f"{devices[0].device_kind} x {len(devices)}",
        "processes": jax.process_count(),
        "processor": _processor() if cpu else None,
        "cores": len(os.sched_getaffinity(0)) if cpu and hasattr(os, "sched_getaffinity") else None,
        "xla_flags": os.environ.get("XLA_FLAGS") or None,
    }


def _processor() -> str | None:
    """The model of the CPU, which decides its vector instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def write_provenance(folder: Path, facts: dict[str, Any]) -> None:
    """Write it beside the weights that are there, whose digest it is given."""
    text = json.dumps(facts | {"adapter": adapter_digest(str(folder))}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_provenance(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The config of an adapter's run, its paths as they were typed, and all that was written of it.

    Raises:
      ModelError: there is none, or it is of another version.
    """
    file = inside(folder, NAME)
    if not file.is_file():
        raise ModelError(
            f"{folder}: has no {NAME}, by which an adapter is made again; jlora writes one beside every adapter since "
            "this version"
        )
    try:
        facts = parse(text_of_theirs(file, MAX_JSON)) or {}
        if facts.get("format") != FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r}, and this version reads {FORMAT}")
        hashes, losses, history = facts["hashes"], facts["losses"], facts["history"]
        if not isinstance(hashes, dict) or not isinstance(losses, list) or not isinstance(history, list):
            raise ValueError("hashes, losses or history are missing")
        if not isinstance(facts["step"], int) or not isinstance(facts["adapter"], str):
            raise ValueError("step or adapter is missing")
        return Config.model_validate(facts["config"]), facts
    except (OSError, ValueError, KeyError) as error:
        said = describe(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise ModelError(f"{file}: cannot be read ({said}); take an adapter whose file is whole") from None
