"""An adapter made again by what lies beside it, and whether it came out the same, to the byte."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from jlora.config import Config, overridden
from jlora.config.places import relocated
from jlora.config.sections import dotted
from jlora.errors import ConfigError, DataError, ModelError
from jlora.files.starts import places
from jlora.hf.adapters import adapter_digest, find_adapter
from jlora.hf.load import hash_base
from jlora.hf.peft import WEIGHTS
from jlora.hf.source import open_safetensors
from jlora.training.export import export
from jlora.training.identity import FREE_KEYS, FREE_SECTIONS
from jlora.training.metrics import METRICS, read_metrics
from jlora.training.opening import Shared
from jlora.training.provenance import environment, read_provenance
from jlora.training.run import train

# Where things lie, which an override may say.
PLACES = ("model.path", "model.tokenizer", "data.train", "data.eval", "data.chat_template", "lora.init_from")
# What a run does beside training, and what a run that is made again does not.
ASIDE = {"training.samples": 0, "training.wandb": None, "training.mlflow": None, "training.trackio": None}
# What each digest is of.
NAMED = {
    "base": "the base is",
    "tokenizer": "the tokenizer is",
    "data": "the rows are",
    "eval": "the held-out rows are",
}
NAMED |= {"init_from": "the adapter that it started from is"}


def reproduce(adapter: str, out: Path, overrides: list[str], quiet: bool) -> dict[str, Any]:
    """Train an adapter anew in `out`, or on in it, and compare; returns what was found.

    Args:
      overrides: `key=value`, of keys that say where things lie or how the work is spread.

    Returns:
      `equal`, null where the run was stopped on the way; `differences`, name -> [then, now]; and of one that came out
      otherwise, `parted_at_step`, where the logged losses first differ, and `largest_difference` of a weight.

    Raises:
      DataError, ModelError: before a step is taken, where rows, base or tokenizer are others than they were.
      ConfigError: `out` is the run itself, or an override changes what is trained.
    """
    folder = find_adapter(adapter)
    if out.resolve() in (folder.resolve(), folder.resolve().parent):
        raise ConfigError(f"--out {out}: is where the adapter lies that is to be made again; name another folder")
    asked, facts = read_provenance(folder)
    if facts["history"]:
        first = facts["history"][0]
        raise ModelError(
            f"{folder}: its run was changed on the way (at step {first.get('step')}: "
            f"{', '.join(first.get('changes', {}))}), so that no one config makes it again"
        )
    cfg = _config(asked, facts, folder, out, overrides)
    shared = Shared()
    _require_same(cfg, facts, folder, shared)
    differences = _differences(facts, environment())
    for name, (then, now) in differences.items():
        if not quiet:
            said = f"warning: {name} is {now} here and was {then}: the last bits may come out otherwise"
            print(said, file=sys.stderr)
    step = facts["step"]
    summary = train(cfg, quiet, shared, until=step)
    result = {"adapter": str(folder), "out": str(out), "step": step, "equal": None, "differences": differences}
    if summary["status"] != "finished" and summary["steps"] < step:
        return result
    made = out / "adapter"
    if not (made / WEIGHTS).is_file() or summary.get("exported_step") not in (None, step):
        made = out / f"adapter-{step}"
        if not made.exists():
            export(out, made, step, False, None, False)
    return result | {"made": str(made)} | _compared(folder, made, facts, out)


def _config(asked: Config, facts: dict[str, Any], folder: Path, out: Path, overrides: list[str]) -> Config:
    """The config to train by."""
    tree = relocated(asked, places(folder.parent)).model_dump(mode="json")
    cfg = overridden(tree, "the overrides", overrides)
    before, after = dotted(asked.model_dump(mode="json")), dotted(cfg.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        free = key in FREE_KEYS or key.startswith((*FREE_SECTIONS, *PLACES))
        if before.get(key) != after.get(key) and not free:
            raise ConfigError(
                f"{key}={after.get(key)!r}: changes what is trained; only {', '.join(PLACES)} and keys that change "
                "nothing but where and how the same is computed can be given"
            )
    tree = cfg.model_dump(mode="json") | {"output_dir": str(out)}
    for key, value in ASIDE.items():
        tree["training"][key.removeprefix("training.")] = value
    if facts.get("remat"):
        tree["model"]["remat"] = facts["remat"]
    return Config.model_validate(tree)


def _require_same(cfg: Config, facts: dict[str, Any], folder: Path, shared: Shared) -> None:
    """Rows, base and tokenizer are those that the adapter was made from."""
    opened = shared.open(cfg)
    found: dict[str, Any] = {"tokenizer": opened.tokenizer.digest}
    train_data, eval_data = shared.read(cfg)
    found |= {"data": train_data.digest, "eval": eval_data.digest if eval_data else None}
    found["base"] = hash_base(opened.source, opened.name)
    if cfg.lora.init_from:
        found["init_from"] = adapter_digest(cfg.lora.init_from)
    lies = {"base": cfg.model.path, "tokenizer": cfg.model.tokenizer or cfg.model.path, "eval": cfg.data.eval}
    lies |= {"data": ", ".join(source.path for source in cfg.data.sources), "init_from": cfg.lora.init_from}
    for name, digest in found.items():
        then = facts["hashes"].get(name)
        if then != digest:
            kind = DataError if name in ("data", "eval") else ModelError
            raise kind(
                f"{lies[name]}: {NAMED[name]} not what {folder} was made from (SHA-256 {str(digest)[:12]}..., "
                f"then {str(then)[:12]}...); name those of then by key=value"
            )


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What of the environment is not as it was: name -> [then, now]."""
    flat = [{**(each.get("versions") or {}), **{name: each.get(name) for name in now}} for each in (then, now)]
    for each in flat:
        del each["versions"]
    return {name: [flat[0].get(name), flat[1][name]] for name in flat[1] if flat[0].get(name) != flat[1][name]}


def _compared(folder: Path, made: Path, facts: dict[str, Any], out: Path) -> dict[str, Any]:
    """Whether both are the same file; if not, from where on, and by how much."""
    if adapter_digest(str(made)) == facts["adapter"]:
        return {"equal": True, "parted_at_step": None, "largest_difference": 0.0}
    now = {line["step"]: line["loss"] for line in read_metrics(out / METRICS) if "loss" in line}
    parted = next((step for step, loss in facts["losses"] if step in now and now[step] != loss), None)
    largest = None
    if adapter_digest(str(folder)) == facts["adapter"]:
        with open_safetensors(folder / WEIGHTS) as old, open_safetensors(made / WEIGHTS) as new:
            if sorted(old.keys()) == sorted(new.keys()):
                pairs = ((old.get_tensor(name), new.get_tensor(name)) for name in old.keys())
                largest = max(float(np.max(np.abs(a - b))) if a.shape == b.shape else np.inf for a, b in pairs)
    return {"equal": False, "parted_at_step": parted, "largest_difference": largest}
