"""What makes a run the same run, so that a checkpoint is only gone on from by the run that wrote it."""

from pathlib import Path
from typing import Any

from jlora.config import Config
from jlora.data import Dataset
from jlora.errors import ModelError
from jlora.pretrained import Pretrained

# Keys that may differ between a run and its continuation: they do not change what is computed.
FREE_KEYS = {
    "model.remat",
    "output_dir",
    "training.log_every",
    "training.eval_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.max_nonfinite_steps",
    "training.wandb",
}
# Where a run is computed changes nothing but the order in which devices add numbers.
FREE_SECTIONS = ("mesh.", "distributed.")


def run_identity(cfg: Config, pretrained: Pretrained, train_data: Dataset, eval_data: Dataset | None) -> dict[str, Any]:
    """What must be the same when a run is gone on with."""
    flat = flatten_config(cfg.model_dump(mode="json"))
    return {
        "config": {
            key: value for key, value in flat.items() if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)
        },
        "hashes": {
            "base": pretrained.base_hash,
            "tokenizer": pretrained.tokenizer.digest,
            "data": train_data.digest,
            "eval": eval_data.digest if eval_data else None,
        },
    }


def flatten_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_identity(run_dir: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run, saying what differs."""
    differences = [
        f"{part}.{key}: {saved[part].get(key)!r} -> {current[part].get(key)!r}"
        for part in ("config", "hashes")
        for key in sorted(saved[part].keys() | current[part].keys())
        if saved[part].get(key) != current[part].get(key)
    ]
    if differences:
        raise ModelError(
            f"{run_dir}: holds a checkpoint of another run ({'; '.join(differences)}); undo the change, or "
            "set another output_dir"
        )
