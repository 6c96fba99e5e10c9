"""What a run is, in a few words: its base, method, rate, rows, epochs, day and command, as far as its files say."""

import datetime
from pathlib import Path
from typing import Any

from jlora.reports.figures import compact, drawable, mapping, shown
from jlora.reports.run_files import RunFiles

ROWS = {"used": "trained on", "eval": "held out"}


def heading(run: RunFiles) -> dict[str, str]:
    """The facts that stand above a run's figures; what its files do not say is left out."""
    keys, summary = run.keys(), run.summary
    sections = {name: mapping(keys.get(name)) for name in ("model", "lora", "optimizer", "objective", "training")}
    facts = {
        "Base": _base(sections["model"]),
        "Method": method(keys, sections["lora"], sections["objective"]),
        "Learning rate": _rate(sections["optimizer"]),
        "Rows": _rows(summary["rows"]),
        "Epochs": _epochs(run, sections["training"]),
        "Date": day(run),
        "Command": str(summary.get("command") or ""),
    }
    return {name: fact for name, fact in facts.items() if fact}


def method(keys: dict[str, Any], lora: dict[str, Any], objective: dict[str, Any]) -> str:
    """Such as "DoRA, rank 8, alpha 16, DPO"."""
    said = [{"lora": "LoRA", "full": "full fine-tuning"}.get(str(keys.get("method")), shown(keys.get("method")))]
    if said == ["LoRA"]:
        said = ["DoRA" if lora.get("use_dora") is True else "LoRA"]
        said += [f"{name} {shown(lora[name])}" for name in ("rank", "alpha") if name in lora]
    if objective.get("name") not in (None, "sft"):
        said.append(str(objective["name"]).upper())
    return "" if said == ["–"] else ", ".join(said)


def day(run: RunFiles) -> str:
    """When it was started, or else when it logged last, in the time of this machine."""
    if run.summary.get("started") is not None:
        return str(run.summary["started"]).replace("T", " ")[:16]
    return "" if run.changed is None else datetime.datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M")


def _base(model: dict[str, Any]) -> str:
    if model.get("path") is None:
        return ""
    held = f" in {model['quantization']}" if model.get("quantization") else ""
    return f"{Path(str(model['path'])).name}{held}"


def _rate(optimizer: dict[str, Any]) -> str:
    said = [shown(optimizer.get("learning_rate"), "{:g}".format), str(optimizer.get("schedule", ""))]
    return "" if said[0] == "–" else ", ".join(filter(None, said))


def _rows(rows: dict[str, Any]) -> str:
    return ", ".join(f"{shown(rows[key], compact)} {what}" for key, what in ROWS.items() if rows.get(key))


def _epochs(run: RunFiles, training: dict[str, Any]) -> str:
    """Those done: a run by max_steps does not say how many it will be."""
    logged = next((record["epoch"] for record in reversed(run.records) if "epoch" in record), None)
    done = drawable(run.summary.get("epochs", logged))
    wanted = drawable(training.get("epochs")) if training.get("max_steps") is None else None
    over = f" of {wanted:g}" if wanted is not None and done is not None and done < wanted - 0.005 else ""
    return "" if done is None else f"{done:.2f}".rstrip("0").rstrip(".") + over
