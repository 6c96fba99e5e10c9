"""What a run's folder holds for its pages, however broken or unfinished. Knows nothing of HTML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jlora.config.yaml_text import parse_yaml
from jlora.files.lock import held
from jlora.files.starts import read_starts
from jlora.files.theirs import MAX_LOG, parse, text_of_theirs
from jlora.reports.charts import Point
from jlora.reports.figures import drawable, mapping

KEYS = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "skipped_steps")
MAPPINGS = ("rows", "tokens", "peak_memory_bytes", "versions", "hashes")


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it.

    Attributes:
      name: its folder's.
      records: the usable lines of metrics.jsonl, and `unreadable` the number of others.
      series: values by step of each of `KEYS`.
      summary: summary.json, empty where there is none yet; each of `MAPPINGS` is one, and samples are mappings.
      config: config.yaml as it stands.
      starts: see `jlora.files.starts`, the first one first; `training`: whether a process is at work there.
      changed: when metrics.jsonl was last written, in seconds since 1970; None where there is none.
    """

    name: str
    records: list[dict[str, Any]]
    unreadable: int
    series: dict[str, list[Point]]
    summary: dict[str, Any]
    config: str
    starts: list[dict[str, Any]]
    training: bool
    changed: float | None

    def figure(self, key: str, logged: str) -> Any:
        """A figure of the summary, or else the last value logged."""
        return self.summary[key] if self.summary.get(key) is not None else last_value(self.series[logged])

    @property
    def state(self) -> str:
        """As its summary says, or else whether it goes on, was ended by force, or has not begun."""
        if self.summary.get("status") is not None:
            return str(self.summary["status"])
        return "training" if self.training else "stopped" if self.records else "not begun"

    @property
    def seconds(self) -> Any:
        """How long all starts took together; of one that was ended by force, to its last logged line."""
        logged = next((record["wall_seconds"] for record in reversed(self.records) if "wall_seconds" in record), None)
        return self.summary["wall_seconds"] if self.summary.get("wall_seconds") is not None else logged

    @property
    def steps(self) -> list[float]:
        """The steps of all records."""
        return [drawable(record["step"]) or 0.0 for record in self.records]

    def keys(self) -> dict[str, Any]:
        """The config's keys, nested; empty where it is no YAML of keys."""
        try:
            return mapping(parse_yaml(self.config))
        except ValueError:
            return {}

    def num_steps(self) -> Any:
        """How many steps were made."""
        return self.summary["steps"] if self.summary.get("steps") is not None else max(self.steps, default=None)

    def held_out(self) -> tuple[Any, Any]:
        """Held-out loss before and after training."""
        points = self.series["eval_loss"]
        before, after = self.summary.get("eval_loss_before"), self.summary.get("eval_loss")
        before = last_value([p for p in points if p[0] == 0]) if before is None else before
        return before, last_value([p for p in points if p[0] > 0]) if after is None else after


def read_run(run_dir: Path) -> RunFiles:
    """Everything of a folder; each file may be missing or partial."""
    records, unreadable = read_records(run_dir / "metrics.jsonl")
    # A resumed run logs some steps twice; the later line is the one that counted.
    steps = {key: {drawable(r["step"]) or 0.0: drawable(r[key]) for r in records if key in r} for key in KEYS}
    series = {key: sorted(values.items()) for key, values in steps.items()}
    summary = parse(read_text(run_dir / "summary.json")) or {}
    if "samples" not in summary and (early := parse(read_text(run_dir / "samples.json"))):
        summary |= early  # of a run that goes on: those before it
    samples = summary.get("samples")
    summary |= {"samples": [each for each in samples if mapping(each)] if isinstance(samples, list) else []}
    summary |= {key: mapping(summary.get(key)) for key in MAPPINGS}
    config, changed = read_text(run_dir / "config.yaml"), changed_at(run_dir / "metrics.jsonl")
    begun = read_starts(run_dir), held(run_dir)
    return RunFiles(run_dir.resolve().name, records, unreadable, series, summary, config, *begun, changed)


def changed_at(path: Path) -> float | None:
    """When a file was last written, in seconds since 1970; None where there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def read_text(path: Path) -> str:
    """A file as text; empty where there is no regular one of less than `MAX_LOG` bytes."""
    try:
        return text_of_theirs(path, MAX_LOG, "replace")
    except (OSError, ValueError):
        return ""


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The usable records, and how many lines other than a torn last one could not be used."""
    *whole, torn = read_text(path).split("\n")  # not splitlines(): JSON strings may hold U+2028
    parsed = [parse(line) or {} for line in (*whole, torn)]
    records = [record for record in parsed if drawable(record.get("step")) is not None]
    wanted = sum(1 for line in whole if line.strip()) + (drawable(parsed[-1].get("step")) is not None)
    return records, wanted - len(records)


def last_value(points: list[Point]) -> float | None:
    """The last value that can be drawn."""
    return next((y for _, y in reversed(points) if y is not None), None)
