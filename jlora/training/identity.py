"""What makes a run the same run, so that a checkpoint is only resumed by the run that wrote it."""

from pathlib import Path
from typing import Any

import jax

from jlora.config import Config, nearest
from jlora.config.sections import dotted
from jlora.errors import ConfigError, ModelError
from jlora.runtime import distributed
from jlora.training.summary import versions

# Keys that may differ between a run and its continuation: they do not change what is computed.
FREE_KEYS = {
    *("data.cache_dir", "model.remat", "model.scan_layers", "output_dir"),
    *(f"training.{key}" for key in ("log_every", "eval_every", "save_every", "evals_per_epoch", "saves_per_epoch")),
    *(f"training.{key}" for key in ("early_stopping_patience", "early_stopping_min_delta", "export")),
    *(f"training.{key}" for key in ("keep_checkpoints", "max_nonfinite_steps", "wandb", "mlflow", "trackio")),
}
# Keys whose change leaves nothing to resume from: the checkpoint's leaves have other shapes, or another meaning.
FIXED_KEYS = {
    "method",
    "model.resize_embeddings",
    "optimizer.name",
    *(f"lora.{key}" for key in ("rank", "rank_pattern", "target_modules", "layers_to_transform", "use_dora")),
    *(f"lora.{key}" for key in ("modules_to_save", "trainable_tokens", "bias", "init_lora_weights")),
}
# Where a run is computed changes nothing but the order in which devices add numbers.
FREE_SECTIONS = ("mesh.", "distributed.", "resume.")


def run_identity(cfg: Config, hashes: dict[str, str | None]) -> dict[str, Any]:
    """What must be the same when a run resumes: its config, and `hashes` of what that names."""
    flat = dotted(cfg.model_dump(mode="json"))
    kept = {key: value for key, value in flat.items() if key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)}
    return {"config": kept, "hashes": hashes}


def require_one_job(cfg: Config, folder: Path) -> None:
    """All processes of a job run the same config with the same libraries into the same folder."""
    keys = dotted(cfg.model_dump(mode="json"))
    del keys["distributed.process_id"]
    kind = {"device": jax.local_devices()[0].device_kind}
    distributed.require_agreement("config", ConfigError, keys | versions() | kind)
    distributed.require_shared_folder(folder)


def check_identity(
    run_dir: Path, step: int, saved: dict[str, Any], current: dict[str, Any], allowed: list[str], whole: bool = True
) -> list[dict[str, Any]]:
    """The run's history, of what was changed on the way; refuses to resume from a checkpoint of another run.

    Args:
      step: of the checkpoint. allowed: names such as config.optimizer.learning_rate that may differ.
      whole: False compares what there is of `current`, whose other hashes are not known yet.

    Returns:
      one entry for each start that changed something: `step`, and `changes`, name -> [from, to].

    Raises:
      ModelError: saying what differs. ConfigError: `allowed` holds a name that there is not, or that cannot change.
    """
    # In a checkpoint of an older version, a key that it did not know counts as its default, and a hash as the same.
    defaults = dotted(Config(model={"path": "-"}, data={"train": "-"}, output_dir="-").model_dump(mode="json"))
    newer = {key: value for key, value in defaults.items() if key in current["config"]}
    saved = {**saved, "config": newer | saved["config"], "hashes": current["hashes"] | saved["hashes"]}
    before, now = _named(saved), _named(current)
    known = before.keys() | now.keys()
    for name in allowed:
        if name not in known:
            raise ConfigError(f"resume.allow_changes holds '{name}'{nearest(name, sorted(known))}")
    compared = sorted(known if whole else known - {f"hashes.{key}" for key in saved["hashes"]} | now.keys())
    changes = {name: [before.get(name), now.get(name)] for name in compared if before.get(name) != now.get(name)}
    for name in allowed:
        if name in changes and any(f"{name}.".startswith(f"config.{key}.") for key in FIXED_KEYS):
            raise ConfigError(
                f"resume.allow_changes holds '{name}', which shapes what is trained, so a run cannot change it; "
                "set another output_dir, and lora.init_from to start from this run's adapter"
            )
    refused = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items() if name not in allowed]
    if refused:
        raise ModelError(
            f"{run_dir}: holds a checkpoint of another run ({'; '.join(refused)}); undo the change, set "
            "another output_dir, name it in resume.allow_changes, or start anew with --fresh"
        )
    return saved.get("history", []) + ([{"step": step, "changes": changes}] if changes else [])


def _named(identity: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{key}": value for part in ("config", "hashes") for key, value in identity[part].items()}
