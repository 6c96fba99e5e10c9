"""Run folders to report on, and their pages read back."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class Page(HTMLParser):
    """Checks that tags balance; collects tags, text, and the plotted coordinates of each curve class."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.problems: list[str] = []
        self.feed(markup)
        self.close()
        self.problems += [f"never closed: {tag}" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"unexpected </{tag}>")

    def handle_data(self, data: str) -> None:
        self.text += data

    def charts(self) -> dict[str, dict[str, str]]:
        """Chart title -> curve class -> path data, the legend's little drawings left out."""
        out: dict[str, dict[str, str]] = {}
        chart, kind = "", ""
        for tag, attrs in self.tags:
            if tag == "svg":
                chart, kind = (attrs.get("aria-label") or "").split(":")[0], ""
            elif tag == "g":
                kind = attrs.get("class") or ""
            elif tag == "path" and chart:
                out.setdefault(chart, {})[attrs.get("class") or kind] = attrs.get("d") or ""
            elif tag == "circle" and chart:
                out.setdefault(chart, {}).setdefault(kind, "")
        return out


def train_line(step: int, **changes: object) -> dict[str, object]:
    line: dict[str, object] = {
        "step": step,
        "loss": 1.5 + 1 / step,
        "learning_rate": 2e-4,
        "grad_norm": 0.8,
        "tokens": 900 * step,
        "tokens_per_second": 812.0,
        "skipped_steps": 0,
        "host_bytes": 2**30 + step,
    }
    return line | changes


SUMMARY = {
    "status": "finished",
    "started": "2026-11-29T10:01:12",
    "command": "jlora train configs/of-a-long-name/that-somebody-gave-it.yaml lora.rank=8 optimizer.learning_rate=2e-4",
    "steps": 40,
    "epochs": 1.5,
    "skipped_steps": 3,
    "train_loss": 1.5321,
    "eval_loss": 1.75,
    "eval_loss_before": 2.5,
    "wall_seconds": 3725.0,
    "tokens_per_second": 812.4,
    "device": "cpu x 1",
    "rows": {"read": 5200, "used": 5010, "dropped": {"empty answer": 120}, "truncated": 314},
    "tokens": {"trained": 360412, "total": 1180233},
    "peak_memory_bytes": {"host": 3 * 2**30, "device": 2**28},
    "trainable_params": 1_000_000,
    "frozen_params": 99_000_000,
    "versions": {"jlora": "9.8.7"},
    "hashes": {"base": "abc123"},
    "samples": [{"prompt": "Why?", "before": "old words", "after": "new words"}],
}


def make_run(folder: Path, scale: float, rank: int) -> Path:
    """A run's folder of 30 steps, with answers to the same prompts."""
    folder.mkdir(parents=True)
    lines = [train_line(step, loss=1 + scale / step) for step in range(1, 31)]
    lines += [{"step": step, "eval_loss": 1 + scale / (step + 1)} for step in (0, 15, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    samples = [{"prompt": "Why?", "before": "old", "after": f"because of {rank}"}]
    summary = SUMMARY | {"eval_loss": 1 + scale / 31, "samples": samples}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (folder / "config.yaml").write_text(f"lora: {{rank: {rank}, alpha: 16}}\nmethod: lora\n", encoding="utf-8")
    return folder
