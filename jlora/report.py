"""A single-file HTML page about one training run: figures, curves, data, samples and provenance.

Plain HTML with inline SVG and CSS, so it opens from a mail attachment or an offline archive.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Point = tuple[float, float | None]  # (step, value); None is a step whose value cannot be drawn
Line = tuple[str, str, list[Point]]  # CSS class, legend label, points
Style = Callable[[float], str]

DOT = '<circle cx="11" cy="5" r="4"/>'
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 52, 20, 30, 44
# Control characters are invalid in HTML even when escaped, and a sample may hold any of them.
CONTROLS = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(32), *range(127, 160)) if c not in (9, 10, 13)}
STATUS = {
    "finished": "finished",
    "preempted": "preempted, can be resumed",
    "failed": "failed",
    "None": "in progress, or stopped early",
}
CSS = """
:root{color-scheme:light dark;--bg:#fcfcfb;--panel:#fff;--text:#1a1a19;--muted:#5f5e5a;--grid:#e6e5e1;
--axis:#8a8984;--train:#2a78d6;--eval:#d2541f;--bad:#b3261e;--good:#1b7340}
@media screen and (prefers-color-scheme:dark){:root{--bg:#161615;--panel:#1f1f1e;--text:#f1f0ec;
--muted:#b3b2ac;--grid:#363633;--axis:#85847e;--train:#5a9ff0;--eval:#f08a5d;--bad:#ff8a80;--good:#6fcf97}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1040px;padding:1rem;background:var(--bg);
color:var(--text);font:16px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.2;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .6rem}p{margin:.3rem 0}
.status{display:inline-block;border:1px solid;border-radius:1em;padding:0 .7em;margin-right:.4em}
.finished{color:var(--good)}.failed{color:var(--bad)}.muted,small,.legend,th{color:var(--muted)}
small,.status,.legend{font-size:.82rem}.tiles,.charts,.pair{display:grid;gap:.7rem}
.tiles{grid-template-columns:repeat(auto-fill,minmax(min(100%,165px),1fr));grid-auto-flow:dense}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr))}
.tile,figure,.sample{background:var(--panel);border:1px solid var(--grid);border-radius:8px;
padding:.6rem .7rem;margin:0;min-width:0;break-inside:avoid}.sample{margin-bottom:.7rem}
.tile small{display:block}.tile b{font-size:1.2rem}@media(min-width:384px){.wide{grid-column:span 2}}
figure{display:flex;flex-direction:column}figure>svg{width:100%;height:auto;margin-top:auto}
figcaption{font-weight:600}.legend{font-weight:400}.legend span{white-space:nowrap;margin-right:1em}
.legend svg{width:22px;height:10px}text{font-size:12px;fill:var(--muted)}
@media(max-width:480px){text{font-size:13.5px}}
path{fill:none;stroke-width:1.6;stroke-linejoin:round}.grid,.axis{stroke:var(--grid);stroke-width:1}
.axis{stroke:var(--axis)}.train{stroke:var(--train);color:var(--train)}.raw path{stroke-width:1;opacity:.45}
.eval{stroke:var(--eval);color:var(--eval)}.gap{stroke:var(--bad)}circle{fill:currentColor;stroke:var(--panel)}
table{border-collapse:collapse;width:100%;max-width:46rem}th,td{text-align:left;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid var(--grid);vertical-align:top;font-weight:400}th{width:45%}
pre{white-space:pre-wrap;margin:.2rem 0 .4rem;font:.86rem/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
@media print{body{max-width:none;padding:0;font-size:11pt;background:#fff}
.charts{grid-template-columns:1fr 1fr}
details::details-content{content-visibility:visible;block-size:auto}}
"""


def write_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from the run's metrics, summary and configuration; return its path.

    Each input may be missing or partial, so a run that is still going, or that crashed, has a page too.
    """
    run_dir = Path(run_dir)
    records, unreadable = _read_metrics(run_dir / "metrics.jsonl")
    page = _page(run_dir, records, unreadable, _parse(_read_text(run_dir / "summary.json")) or {})
    # Not tempfile: its files are private (0600), and the page should follow the user's umask.
    temporary = run_dir / f".report.html.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate in a sample becomes "?"
        os.replace(temporary, run_dir / "report.html")
    finally:
        temporary.unlink(missing_ok=True)
    return run_dir / "report.html"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The usable records, and how many lines other than a torn last one could not be used."""
    *whole, torn = _read_text(path).split("\n")  # not splitlines(): JSON strings may hold U+2028
    parsed = [_parse(line) or {} for line in (*whole, torn)]
    records = [record for record in parsed if _number(record.get("step")) is not None]
    wanted = sum(1 for line in whole if line.strip()) + (_number(parsed[-1].get("step")) is not None)
    return records, wanted - len(records)


def _number(value: object) -> float | None:
    """``value`` as a float that can be drawn, or None (absent, not a number, not finite, absurdly large)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None  # past 1e100 axis arithmetic could overflow; such a value is as good as infinite
    return float(value) if abs(value) > 1e-100 else 0.0


def _series(records: list[dict[str, Any]], key: str) -> list[Point]:
    """Values by step. A resumed run logs some steps twice; the later line is the one that counted."""
    return sorted({_number(r["step"]) or 0.0: _number(r[key]) for r in records if key in r}.items())


def _last(points: list[Point]) -> float | None:
    return next((y for _, y in reversed(points) if y is not None), None)


def _downsample(points: list[Point], limit: int = 600) -> list[Point]:
    """At most ``limit`` points: each bucket keeps its extremes and one gap, so that no spike is lost."""
    kept, buckets = [], limit // 3
    for b in range(buckets if len(points) > limit else 0):
        chunk = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        ranked = sorted((p for p in chunk if p[1] is not None), key=lambda p: p[1] or 0.0)
        gap = [p for p in chunk if p[1] is None][:1]
        kept += sorted({*ranked[:1], *ranked[-1:], *gap}, key=lambda p: p[0])
    return kept or points


def _smooth(points: list[Point], span: int) -> list[Point]:
    """Exponential moving average, bias-corrected so that the first values are not pulled towards zero."""
    alpha, total, weight, out = 2 / (span + 1), 0.0, 0.0, []
    for x, y in points:
        if y is not None:
            total, weight = total + alpha * (y - total), weight + alpha * (1 - weight)
        out.append((x, None if y is None else total / weight))
    return out


def _tick_step(span: float) -> float:
    """The round step (1, 2 or 5 times a power of ten) that cuts ``span`` into at most five parts."""
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    return next((m * magnitude for m in (1, 2, 5) if m * magnitude >= span / 5.005), 10 * magnitude)


def _compact(value: float) -> str:
    """1234567 -> 1.23M; whole below ten thousand."""
    for least, size, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.3g}{suffix}"
    return f"{value:,.4g}" if value % 1 else f"{value:,.0f}"


def _chart(title: str, unit: str, lines: list[Line], x_range: tuple[float, float]) -> str:
    """One figure with its lines drawn in order; an empty one says so."""
    values = [y for _, _, points in lines for _, y in points if y is not None]
    gaps = sorted({x for _, _, points in lines for x, y in points if y is None})
    if not values and not gaps:
        return f'<figure><figcaption>{title}</figcaption><p class="muted">No values yet.</p></figure>'
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = low if title == "Loss" else min(low, 0.0)  # a loss axis from zero would flatten its curve
    if high - low <= 1e-3 * max(abs(high), abs(low)):  # one point, or a flat line, still needs a range
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = _tick_step(high - low)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    power = math.floor(math.log10(max(abs(first), abs(last)) * step) + 1e-9)
    power = 0 if -3 < power < 5 else power  # labels must fit beside the axis: 2.0 with x10^-4 above it
    decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        return LEFT + across * (right - LEFT), base - (y / step - first) / (last - first) * (base - TOP)

    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    body = [
        f'<text x="4" y="14">{unit}{f", ×10{exponent}" if power else ""}</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">training step</text>',
    ]
    for k in range(first, last + 1):
        y, label = place(0, k * step)[1], f"{k * step / 10.0**power:,.{decimals}f}".replace("-", "−")
        body.append(
            f'<path class="{"grid" if k > first else "axis"}" d="M{LEFT} {y:.1f}H{right}"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    x_step = max(1.0, _tick_step(x_range[1] - x_range[0]))
    for k in range(math.ceil(x_range[0] / x_step), math.floor(x_range[1] / x_step) + 1):
        x = place(k * x_step, 0)[0]
        body.append(
            f'<path class="axis" d="M{x:.1f} {base}v5"/><text x="{x:.1f}" y="{base + 18}" '
            f'text-anchor="middle">{_compact(k * x_step)}</text>'
        )
    body += [_curve(kind, points, place) for kind, _, points in lines]
    keys = [
        (f'<g class="{kind}"><path d="M1 5H21"/>{DOT if kind == "eval" else ""}</g>', label)
        for kind, label, points in lines
        if len(lines) > 1 and points
    ]
    cross = "l6 6m0 -6l-6 6"
    if gaps:
        d = "".join(f"M{place(x, 0)[0] - 3:.1f} {base - 9}{cross}" for x in gaps)
        body.append(f'<path class="gap" d="{d}"/>')
        keys.append((f'<path class="gap" d="M8 2{cross}"/>', "not finite"))
    legend = "".join(f'<span><svg viewBox="0 0 22 10">{mark}</svg> {label}</span>' for mark, label in keys)
    extent = f"{min(values):.4g} to {max(values):.4g} {unit}" if values else "no finite value"
    return (
        f'<figure><figcaption>{title}<div class="legend">{legend}</div></figcaption><svg role="img" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{title}: {extent}">{"".join(body)}</svg></figure>'
    )


def _curve(kind: str, points: list[Point], place: Callable[[float, float], tuple[float, float]]) -> str:
    """One line, broken at gaps. A point with no drawable neighbour gets a dot: a line would hide it."""
    path, dots, marked = "", "", kind == "eval" and len(points) <= 60
    edged = [(0.0, None), *points, (0.0, None)]
    for (_, before), (step, value), (_, after) in zip(edged, points, edged[2:], strict=False):
        if value is not None:
            x, y = place(step, value)
            path += f"{'M' if before is None else 'L'}{x:.1f} {y:.1f}"
            if marked or (before is None and after is None):
                dots += (
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if marked else 3}">'
                    f"<title>step {step:,.0f}: {value:.4g}</title></circle>"
                )
    return f'<g class="{kind}"><path d="{path}"/>{dots}</g>' if path else ""


def _esc(value: object) -> str:
    return html.escape(str(value).translate(CONTROLS))


def _map(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _show(value: object, style: Style = "{:,.10g}".format) -> str:
    """A figure from the files: styled when it is a number, as it stands otherwise, a dash when absent."""
    number = _number(value)
    return style(number) if number is not None else "–" if value is None else _esc(value)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.4g}" if loss < 13 else f"{math.exp(min(loss, 700)):.2e}"


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    short = f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else short


def _table(rows: list[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{_esc(name)}</th><td>{value}</td></tr>' for name, value in rows)
    return f"<table><tbody>{body}</tbody></table>" if rows else '<p class="muted">Not recorded yet.</p>'


def _tiles(summary: dict[str, Any], series: dict[str, list[Point]], last_step: float | None) -> str:
    def pick(key: str, fallback: float | None) -> Any:
        return summary[key] if summary.get(key) is not None else fallback

    before = pick("eval_loss_before", _last([p for p in series["eval_loss"] if p[0] == 0]))
    after = pick("eval_loss", _last([p for p in series["eval_loss"] if p[0] > 0]))
    b, a = _number(before), _number(after)
    change = f"{(a - b) / b:+.1%} against before training".replace("-", "−") if a is not None and b else ""
    memory, loss, exp = _map(summary.get("peak_memory_bytes")), "{:.4f}".format, _perplexity
    speed = pick("tokens_per_second", _last(series["tokens_per_second"]))
    skipped = pick("skipped_steps", _last(series["skipped_steps"]))
    trainable, frozen = _number(summary.get("trainable_params")), _number(summary.get("frozen_params"))
    share = f"{trainable / (trainable + frozen):.2%} of all" if trainable and frozen is not None else ""
    tiles = [  # in reading order: quality first, cost after
        ("Train loss", _show(pick("train_loss", _last(series["loss"])), loss), "nats per token"),
        ("Held-out loss", f"{_show(before, loss)} → {_show(after, loss)}", change),
        ("Held-out perplexity", f"{_show(before, exp)} → {_show(after, exp)}", "before → after"),
        ("Steps", _show(pick("steps", last_step)), f"{_show(skipped)} skipped"),
        ("Speed", _show(speed, _compact), "tokens per second"),
        ("Wall time", _show(summary.get("wall_seconds"), _duration), _esc(summary.get("device") or "")),
        ("Peak memory", _show(memory.get("host"), _size), f"device {_show(memory.get('device'), _size)}"),
        ("Trainable params", _show(summary.get("trainable_params"), _compact), share),
    ]
    return "".join(
        f'<div class="tile{" wide" if "→" in value else ""}"><small>{name}</small><b>{value}</b>'
        f"<small>{note}</small></div>"
        for name, value, note in tiles
    )


def _data_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows, tokens = _map(summary.get("rows")), _map(summary.get("tokens"))
    dropped = rows.get("dropped")
    reasons = {f"dropped: {k}": v for k, v in _map(dropped).items()}
    if "dropped" in rows and not reasons:
        reasons = {"dropped": dropped or 0}
    shown = {k: rows[k] for k in ("read", "used") if k in rows} | reasons
    shown |= {"truncated": rows["truncated"]} if "truncated" in rows else {}
    return [(f"Rows {k}", _show(v)) for k, v in shown.items()] + [
        (f"Tokens, {k}", _show(tokens[k])) for k in ("trained", "total") if k in tokens
    ]


def _samples(samples: object) -> str:
    out = ""
    for sample in (_map(s) for s in (samples if isinstance(samples, list) else [])):
        # HTML drops one line break right after <pre>, so one is always added to keep the text verbatim.
        prompt, before, after = (
            f'<div><small>{k.capitalize()}</small><pre dir="auto">\n{_esc(sample.get(k) or "(empty)")}</pre></div>'
            for k in ("prompt", "before", "after")
        )
        out += f'<div class="sample">{prompt}<div class="pair">{before}{after}</div></div>' if sample else ""
    return f"<h2>Samples</h2>{out}" if out else ""


def _page(run_dir: Path, records: list[dict[str, Any]], unreadable: int, summary: dict[str, Any]) -> str:
    keys = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "skipped_steps")
    series = {key: _series(records, key) for key in keys}
    steps = [_number(r["step"]) or 0.0 for r in records]
    first, last = min(steps, default=0.0), max(steps, default=0.0)
    # A log that begins late (a resumed run) is not squeezed into a corner by an axis from zero.
    x_low = first if last / 2 < first < last else min(0.0, first)
    x_range = (x_low, max(last, x_low + 1))
    lines = [("train", "train", _downsample(series["loss"]))]
    if len(series["loss"]) >= 5:
        span = max(5, len(series["loss"]) // 20)
        lines = [
            ("train raw", "train", lines[0][2]),
            ("train", f"smoothed (EMA, {span} logs)", _downsample(_smooth(series["loss"], span))),
        ]
    lines.append(("eval", "held-out", _downsample(series["eval_loss"])))
    charts = _chart("Loss", "nats per token", lines, x_range)
    for key, title, unit in (
        ("learning_rate", "Learning rate", "learning rate"),
        ("grad_norm", "Gradient norm", "global L2 norm"),
        ("tokens_per_second", "Speed", "tokens per second"),
    ):
        charts += _chart(title, unit, [("train", title, _downsample(series[key]))], x_range)
    status = str(summary.get("status"))
    note = f"last logged step {last:,.0f}" if steps else "no metrics yet"
    note += f"; unreadable metric lines ignored: {unreadable:,}" if unreadable else ""
    origin = [(f"{k} version", _esc(v)) for k, v in _map(summary.get("versions")).items()]
    origin += [(f"{k} hash", f"<code>{_esc(v)}</code>") for k, v in _map(summary.get("hashes")).items()]
    config = _esc(_read_text(run_dir / "config.yaml") or "No config.yaml in the run folder.")
    name = _esc(run_dir.resolve().name)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}: training report</title><style>{CSS}</style></head><body>
<header><h1>{name}</h1><p><span class="status {status if status in STATUS else ""}">
{_esc(STATUS.get(status, status))}</span><span class="muted">{note}</span></p></header>
<main><h2>Key figures</h2><div class="tiles">{_tiles(summary, series, last if steps else None)}</div>
<h2>Curves</h2><div class="charts">{charts}</div>
<h2>Data</h2>{_table(_data_rows(summary))}
{_samples(summary.get("samples"))}
<h2>Versions and hashes</h2>{_table(origin)}
<h2>Configuration</h2><details><summary>config.yaml</summary><pre>\n{config}</pre></details></main></body></html>
"""
