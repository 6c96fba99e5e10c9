"""A single-file HTML page about one training run: figures, curves, data, samples and provenance."""

import datetime
from pathlib import Path
from typing import Any

from jlora.reports.answers import Card, sample_cell, turns_of
from jlora.reports.charts import MOST_DOTS, Chart, Line, chart, smoothed
from jlora.reports.figures import compact, drawable, mapping, shown
from jlora.reports.page import render, write_page
from jlora.reports.run_files import RunFiles, read_run

STATUS = {
    "finished": "finished",
    "preempted": "stopped, can be resumed",
    "failed": "failed",
    "training": "training",
    "stopped": "stopped, can be resumed",
    "not begun": "has not begun",
}
UNSURE = ("stopped", "not begun")  # how it came to be is not written down
MOST_STARTS = 3  # of those that changed nothing, the last ones that are named
ROWS = {"used": "trained on", "eval": "held out"}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write `run_dir/report.html`, or `out`, from the run's metrics, summary and configuration; return its path.

    Each input may be missing or partial, so a run that is still going, or that crashed, has a page too.
    """
    run = read_run(Path(run_dir))
    path = out or Path(run_dir) / "report.html"
    origin = [
        (f"{name} {what}", str(value))
        for key, what in (("versions", "version"), ("hashes", "hash"))
        for name, value in run.summary[key].items()
        if value is not None
    ]
    write_page(path, render("report.html", origin=origin, **told(run)))
    return path


def told(run: RunFiles) -> dict[str, Any]:
    """What a page tells of a run, by the names that the templates know."""
    return {
        "run": run,
        "facts": heading(run),
        "state": "warning" if run.state in UNSURE else run.state if run.state in STATUS else "",
        "status": STATUS.get(run.state, run.state),
        "note": _note(run),
        "change": _change(run),
        "share": _share(run),
        "charts": _charts(run),
        "data": _data(run),
        "cards": _cards(run),
    }


def _note(run: RunFiles) -> str:
    """What a reader has to know before the figures."""
    (before, after), steps, notes = map(drawable, run.held_out()), run.steps, []
    if run.summary.get("status") != "finished":
        notes.append(f"last logged step {max(steps):,.0f}" if steps else "no metrics yet")
    if run.summary.get("stopped_early") is True:
        notes.append("stopped early: the held-out loss fell no more")
    if run.summary.get("exported_step") not in (None, run.num_steps()):
        notes.append(f"the adapter is that of step {shown(run.summary['exported_step'])}")
    elif before is not None and after is not None and after > before:
        notes.append("training raised the held-out loss")
    if run.unreadable:
        notes.append(f"unreadable metric lines ignored: {run.unreadable:,}")
    return "; ".join(notes)


def _change(run: RunFiles) -> str:
    before, after = map(drawable, run.held_out())
    change = after / before - 1 if after is not None and before else None
    return "" if change is None else f"{change:+.1%} against before training".replace("-", "−")


def _share(run: RunFiles) -> str:
    trainable, frozen = (drawable(run.summary.get(f"{which}_params")) for which in ("trainable", "frozen"))
    return f"{trainable / (trainable + frozen):.2%} of all" if trainable and frozen is not None else ""


def _data(run: RunFiles) -> list[tuple[str, str]]:
    rows, tokens = run.summary["rows"], run.summary["tokens"]
    dropped = {f"dropped: {reason}": count for reason, count in mapping(rows.get("dropped")).items()}
    counted = {name: rows[key] for key, name in {"read": "read", **ROWS}.items() if key in rows}
    counted |= dropped or ({"dropped": rows["dropped"] or 0} if "dropped" in rows else {})
    counted |= {"cut at the end": rows["truncated"]} if "truncated" in rows else {}
    return [(f"Rows {name}", shown(count)) for name, count in counted.items()] + [
        (f"Tokens, {name}", shown(tokens[name])) for name in ("trained", "total") if name in tokens
    ]


def _cards(run: RunFiles) -> list[Card]:
    """The samples: before, after, and what the row itself says."""
    cards = []
    for sample in run.summary["samples"]:
        texts = {"before": "Before", "after": "After", "wanted": "In the data"}
        cells = [
            sample_cell(name, sample, key, None if key == "wanted" else sample.get("wanted"))
            for key, name in texts.items()
            if key in sample or key != "wanted"
        ]
        cards.append(Card("Prompt", turns_of(sample), cells))
    return cards


def _charts(run: RunFiles) -> list[Chart]:
    # A log that begins late (a resumed run) is not squeezed into a corner by an axis from zero.
    first, last = min(run.steps, default=0.0), max(run.steps, default=0.0)
    x_low = first if last / 2 < first < last else min(0.0, first)
    x_range = (x_low, max(last, x_low + 1))
    series, held_out = run.series, run.series["eval_loss"]
    loss, span = [Line("train", "train", series["loss"])], max(5, len(series["loss"]) // 20)
    if len(series["loss"]) >= 5:
        smooth = smoothed(series["loss"], span)
        loss = [Line("train raw", "train", series["loss"]), Line("train", f"smoothed (EMA, {span} logs)", smooth)]
    # A line through few points would say what the loss was between them.
    few = len(held_out) <= MOST_DOTS
    loss.append(Line("eval", "held-out", held_out, marked=few, joined=not few))
    return [
        chart("Loss", "nats per token", loss, x_range),
        chart("Learning rate", "learning rate", [Line("train", "", series["learning_rate"])], x_range),
        chart("Gradient norm", "global L2 norm", [Line("train", "", series["grad_norm"])], x_range),
        chart("Speed", "tokens per second", [Line("train", "", series["tokens_per_second"])], x_range),
    ]


def heading(run: RunFiles) -> dict[str, str]:
    """The facts that stand above a run's figures; what its files do not say is left out."""
    keys, rows = run.keys(), run.summary["rows"]
    sections = {name: mapping(keys.get(name)) for name in ("model", "lora", "optimizer", "objective", "training")}
    model = sections["model"]
    held = f" in {model['quantization']}" if model.get("quantization") else ""
    facts = {
        "Base": "" if model.get("path") is None else f"{Path(str(model['path'])).name}{held}",
        "Method": method(keys, sections["lora"], sections["objective"]),
        "Learning rate": _rate(sections["optimizer"]),
        "Rows": ", ".join(f"{shown(rows[key], compact)} {what}" for key, what in ROWS.items() if rows.get(key)),
        "Epochs": _epochs(run, sections["training"]),
        "Date": day(run),
        "Resumed": _resumed(run),
        **_commands(run),
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
    """When it was first started, or else when it logged last, in the time of this machine."""
    for start in (*run.starts[:1], run.summary):
        if start.get("started") is not None:
            return _minute(start["started"])
    return "" if run.changed is None else datetime.datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M")


def _minute(time: object) -> str:
    return str(time).replace("T", " ")[:16]


def _resumed(run: RunFiles) -> str:
    """Where each later start went on, when, and what was changed; of many the last ones, and those with changes."""
    later = [start for start in run.starts if drawable(start.get("step"))]
    said = []
    for number, start in enumerate(later, 1):
        pairs = {name: pair for name, pair in mapping(start.get("changes")).items() if isinstance(pair, list)}
        changes = [f"{name.removeprefix('config.')} {' → '.join(map(shown, pair))}" for name, pair in pairs.items()]
        if changes or number > len(later) - MOST_STARTS:
            words = [f"at step {shown(start['step'])}", _minute(start.get("started", "")), *changes]
            said.append(", ".join(filter(None, words)))
    return f"{len(later)} times; " * (len(later) > len(said)) + "; ".join(said)


def _commands(run: RunFiles) -> dict[str, str]:
    """By which it was started first, and each other one that it was resumed by."""
    first: dict[str, float | None] = {}
    for start in run.starts or [run.summary]:
        if start.get("command"):
            first.setdefault(str(start["command"]), drawable(start.get("step")))
    return {f"Command at step {step:,.0f}" if step else "Command": command for command, step in first.items()}


def _rate(optimizer: dict[str, Any]) -> str:
    said = [shown(optimizer.get("learning_rate"), "{:g}".format), str(optimizer.get("schedule", ""))]
    return "" if said[0] == "–" else ", ".join(filter(None, said))


def _epochs(run: RunFiles, training: dict[str, Any]) -> str:
    """Those done: a run by max_steps does not say how many it will be."""
    logged = next((record["epoch"] for record in reversed(run.records) if "epoch" in record), None)
    done = drawable(run.summary.get("epochs", logged))
    wanted = drawable(training.get("epochs")) if training.get("max_steps") is None else None
    over = f" of {wanted:g}" if wanted is not None and done is not None and done < wanted - 0.005 else ""
    return "" if done is None else f"{done:.2f}".rstrip("0").rstrip(".") + over
