"""A single-file HTML page about one training run: figures, curves, data, samples and provenance.

`train` writes it at the end of a run; `python -m jlora.report RUN` writes it anew, and
`python -m jlora.report RUN RUN --out FILE` compares runs in one page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jlora import cli, streams
from jlora.charts import (
    Line,
    answers,
    chart,
    compact,
    drawable,
    duration,
    mapping,
    page,
    perplexity,
    shown,
    size,
    smoothed,
    table,
    thinned,
)
from jlora.errors import ConfigError
from jlora.folders import require_own
from jlora.page import escape, write_page
from jlora.run_files import RunFiles, read_run
from jlora.runs_compared import MOST_RUNS, compare

STATUS = {
    "finished": "finished",
    "preempted": "preempted, can be resumed",
    "failed": "failed",
    "None": "in progress, or stopped early",
}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write ``run_dir/report.html``, or `out`, from the run's metrics, summary and configuration; return its path.

    Each input may be missing or partial, so a run that is still going, or that crashed, has a page too.
    """
    run_dir = Path(run_dir)
    path = out or run_dir / "report.html"
    write_page(path, _page(read_run(run_dir)))
    return path


def _tiles(run: RunFiles, last_step: float | None) -> str:
    summary, (before, after) = run.summary, run.held_out()
    b, a = drawable(before), drawable(after)
    change = f"{(a - b) / b:+.1%} against before training".replace("-", "−") if a is not None and b else ""
    memory, loss, exp = mapping(summary.get("peak_memory_bytes")), "{:.4f}".format, perplexity
    speed = run.figure("tokens_per_second", "tokens_per_second")
    skipped = run.figure("skipped_steps", "skipped_steps")
    steps = last_step if summary.get("steps") is None else summary["steps"]
    trainable, frozen = drawable(summary.get("trainable_params")), drawable(summary.get("frozen_params"))
    share = f"{trainable / (trainable + frozen):.2%} of all" if trainable and frozen is not None else ""
    tiles = [  # in reading order: quality first, cost after
        ("Train loss", shown(run.figure("train_loss", "loss"), loss), "nats per token"),
        ("Held-out loss", f"{shown(before, loss)} → {shown(after, loss)}", change),
        ("Held-out perplexity", f"{shown(before, exp)} → {shown(after, exp)}", "before → after"),
        ("Steps", shown(steps), f"{shown(skipped)} skipped"),
        ("Speed", shown(speed, compact), "tokens per second"),
        ("Wall time", shown(summary.get("wall_seconds"), duration), escape(summary.get("device") or "")),
        ("Peak memory", shown(memory.get("host"), size), f"device {shown(memory.get('device'), size)}"),
        ("Trainable params", shown(summary.get("trainable_params"), compact), share),
    ]
    return "".join(
        f'<div class="tile{" wide" if "→" in value else ""}"><small>{name}</small><b>{value}</b>'
        f"<small>{note}</small></div>"
        for name, value, note in tiles
    )


def _data_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows, tokens = mapping(summary.get("rows")), mapping(summary.get("tokens"))
    dropped = rows.get("dropped")
    reasons = {f"dropped: {k}": v for k, v in mapping(dropped).items()}
    if "dropped" in rows and not reasons:
        reasons = {"dropped": dropped or 0}
    counted = {k: rows[k] for k in ("read", "used") if k in rows} | reasons
    counted |= {"truncated": rows["truncated"]} if "truncated" in rows else {}
    return [(f"Rows {k}", shown(v)) for k, v in counted.items()] + [
        (f"Tokens, {k}", shown(tokens[k])) for k in ("trained", "total") if k in tokens
    ]


def _samples(samples: object) -> str:
    out = ""
    for sample in (mapping(s) for s in (samples if isinstance(samples, list) else [])):
        sides = [(key.capitalize(), sample.get(key)) for key in ("before", "after")]
        sides += [("In the data", sample["wanted"])] if "wanted" in sample else []
        prompt = answers([("Prompt", sample.get("prompt"))])
        out += f'<div class="sample">{prompt}<div class="pair">{answers(sides)}</div></div>' if sample else ""
    return f"<h2>Samples</h2>{out}" if out else ""


def _charts(run: RunFiles, x_range: tuple[float, float]) -> str:
    series = run.series
    lines: list[Line] = [("train", "train", thinned(series["loss"]))]
    if len(series["loss"]) >= 5:
        span = max(5, len(series["loss"]) // 20)
        lines = [
            ("train raw", "train", lines[0][2]),
            ("train", f"smoothed (EMA, {span} logs)", thinned(smoothed(series["loss"], span))),
        ]
    lines.append(("eval", "held-out", thinned(series["eval_loss"])))
    out = chart("Loss", "nats per token", lines, x_range)
    for key, title, unit in (
        ("learning_rate", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm", "global L2 norm"),
        ("tokens_per_second", "Speed", "tokens per second"),
    ):
        out += chart(title, unit, [("train", title, thinned(series[key]))], x_range)
    memory = [("train", "host", thinned(series["host_bytes"])), ("eval", "device", thinned(series["device_bytes"]))]
    return out + chart("Memory", "GiB", [line for line in memory if line[2]], x_range)


def _page(run: RunFiles) -> str:
    summary = run.summary
    steps = [drawable(r["step"]) or 0.0 for r in run.records]
    first, last = min(steps, default=0.0), max(steps, default=0.0)
    # A log that begins late (a resumed run) is not squeezed into a corner by an axis from zero.
    x_low = first if last / 2 < first < last else min(0.0, first)
    status = str(summary.get("status"))
    note = f"last logged step {last:,.0f}" if steps else "no metrics yet"
    note += f"; unreadable metric lines ignored: {run.unreadable:,}" if run.unreadable else ""
    origin = [(f"{k} version", escape(v)) for k, v in mapping(summary.get("versions")).items()]
    origin += [(f"{k} hash", f"<code>{escape(v)}</code>") for k, v in mapping(summary.get("hashes")).items()]
    config = escape(run.config or "No config.yaml in the run folder.")
    name = escape(run.name)
    return page(
        f"{run.name}: training report",
        f"""<h1>{name}</h1><p><span class="status {status if status in STATUS else ""}">
{escape(STATUS.get(status, status))}</span><span class="muted">{note}</span></p>""",
        f"""<h2>Key figures</h2><div class="tiles">{_tiles(run, last if steps else None)}</div>
<h2>Curves</h2><div class="charts">{_charts(run, (x_low, max(last, x_low + 1)))}</div>
<h2>Data</h2>{table(_data_rows(summary))}
{_samples(summary.get("samples"))}
<h2>Versions and hashes</h2>{table(origin)}
<h2>Configuration</h2><details><summary>config.yaml</summary><pre>\n{config}</pre></details>""",
    )


def main() -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m jlora.report", description="Write a run's report, or compare runs in one page.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="FILE", help="HTML file; default for one run: its own report.html")
    args = parser.parse_args()

    def body() -> None:
        runs = [Path(run) for run in args.runs]
        for run in runs:
            require_own(run, ConfigError)
            if not any((run / name).is_file() for name in ("metrics.jsonl", "summary.json", "config.yaml")):
                raise ConfigError(f"{run}: is no run folder (no metrics.jsonl, summary.json or config.yaml in it)")
        if len(runs) > 1 and not args.out:
            raise ConfigError("several runs are compared in one page; name it with --out FILE")
        if len(runs) > MOST_RUNS:
            raise ConfigError(f"{len(runs)} runs are too many for one page; name at most {MOST_RUNS}")
        out = Path(args.out) if args.out else runs[0] / "report.html"
        if len(runs) > 1:
            write_page(out, compare(runs))
        else:
            write_report(runs[0], out)
        with streams.told():
            print(out)

    cli.run(body)


if __name__ == "__main__":
    main()
