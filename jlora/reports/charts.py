"""What the pages of runs are drawn with: their style, line charts in SVG, and figures as words.

Plain HTML with inline SVG and CSS, so that a page opens from a mail attachment or an offline archive. Knows
nothing of runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jlora.page import escape, frame

Point = tuple[float, float | None]  # (step, value); None is a step whose value cannot be drawn
Line = tuple[str, str, list[Point]]  # CSS class, legend label, points
Style = Callable[[float], str]

DOT = '<circle cx="11" cy="5" r="4"/>'
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 52, 20, 30, 44
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
figcaption{font-weight:600}.legend{font-weight:400}.legend span{display:inline-block;max-width:100%;margin-right:1em}
.legend svg{width:22px;height:10px}text{font-size:12px;fill:var(--muted)}
@media(max-width:480px){text{font-size:13.5px}}
path{fill:none;stroke-width:1.6;stroke-linejoin:round}.grid,.axis{stroke:var(--grid);stroke-width:1}
.axis{stroke:var(--axis)}.train{stroke:var(--train);color:var(--train)}.raw path{stroke-width:1;opacity:.45}
.eval{stroke:var(--eval);color:var(--eval)}.gap{stroke:var(--bad)}circle{fill:currentColor;stroke:var(--panel)}
table{border-collapse:collapse;width:100%;max-width:46rem}th,td{text-align:left;padding:.25rem .8rem .25rem 0;
border-bottom:1px solid var(--grid);vertical-align:top;font-weight:400}th{width:45%}
pre{white-space:pre-wrap;margin:.2rem 0 .4rem;font:.86rem/1.45 ui-monospace,"DejaVu Sans Mono",monospace}
.c0{--c:#2a78d6}.c1{--c:#d2541f}.c2{--c:#1b7340}.c3{--c:#8a3ffc}.c4{--c:#b28600}.c5{--c:#0f7b8a}.c6{--c:#a2195b}
.c7{--c:#6f6f6f}[class^=c]>path,[class^=c]>circle{stroke:var(--c);color:var(--c)}.c1>path{stroke-dasharray:7 3}
.c2>path{stroke-dasharray:2 3}.c3>path{stroke-dasharray:9 3 2 3}.c4>path{stroke-dasharray:4 2}
.c5>path{stroke-dasharray:12 3}.c6>path{stroke-dasharray:1 2}.c7>path{stroke-dasharray:5 5}
@media screen and (prefers-color-scheme:dark){.c0{--c:#5a9ff0}.c1{--c:#f08a5d}.c2{--c:#6fcf97}.c3{--c:#b58cff}
.c4{--c:#e0b640}.c5{--c:#56c3d3}.c6{--c:#f07ab0}.c7{--c:#b3b2ac}}
.grid-table{max-width:none}.grid-table th{width:auto;font-size:.82rem}.grid-table td:first-child{font-weight:600}
.figures{overflow-wrap:normal}.figures td+td{white-space:nowrap}.figures td:first-child{overflow-wrap:anywhere}
@media(max-width:900px){.grid-table thead{display:none}.grid-table tr{display:block;background:var(--panel);
border:1px solid var(--grid);border-radius:8px;padding:.4rem .7rem;margin-bottom:.6rem;break-inside:avoid}
.grid-table td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0;text-align:right}
.grid-table td::before{content:attr(data-label);color:var(--muted);font-size:.82rem;font-weight:400;text-align:left;
overflow-wrap:break-word;flex-shrink:99;max-width:65%}}
@media print{body{max-width:none;padding:0;font-size:11pt;background:#fff}
.charts{grid-template-columns:1fr 1fr}
details::details-content{content-visibility:visible;block-size:auto}}
"""


def drawable(value: object) -> float | None:
    """``value`` as a float that can be drawn, or None (absent, not a number, not finite, absurdly large)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None  # past 1e100 axis arithmetic could overflow; such a value is as good as infinite
    return float(value) if abs(value) > 1e-100 else 0.0


def thinned(points: list[Point], limit: int = 600) -> list[Point]:
    """At most ``limit`` points: each bucket keeps its extremes and one gap, so that no spike is lost."""
    kept, buckets = [], limit // 3
    for b in range(buckets if len(points) > limit else 0):
        chunk = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        ranked = sorted((p for p in chunk if p[1] is not None), key=lambda p: p[1] or 0.0)
        gap = [p for p in chunk if p[1] is None][:1]
        kept += sorted({*ranked[:1], *ranked[-1:], *gap}, key=lambda p: p[0])
    return kept or points


def smoothed(points: list[Point], span: int) -> list[Point]:
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


def compact(value: float) -> str:
    """1234567 -> 1.23M; whole below ten thousand."""
    for least, size, suffix in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.3g}{suffix}"
    return f"{value:,.4g}" if value % 1 else f"{value:,.0f}"


def chart(title: str, unit: str, lines: list[Line], x_range: tuple[float, float]) -> str:
    """One figure with its lines drawn in order; an empty one says so."""
    values = [y for _, _, points in lines for _, y in points if y is not None]
    gaps = sorted({x for _, _, points in lines for x, y in points if y is None})
    if not values and not gaps:
        return f'<figure><figcaption>{title}</figcaption><p class="muted">No values yet.</p></figure>'
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = low if "loss" in title.lower() else min(low, 0.0)  # a loss axis from zero would flatten its curve
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
            f'text-anchor="middle">{compact(k * x_step)}</text>'
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


def mapping(value: object) -> dict[str, Any]:
    """``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def shown(value: object, style: Style = "{:,.10g}".format) -> str:
    """A figure from the files: styled when it is a number, as it stands otherwise, a dash when absent."""
    number = drawable(value)
    return style(number) if number is not None else "–" if value is None else escape(value)


def size(value: float) -> str:
    """Bytes in GiB, or in MiB below half of one."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    short = f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else short


def table(rows: list[tuple[str, str]]) -> str:
    """Names and values; the values are HTML already."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{value}</td></tr>' for name, value in rows)
    return f"<table><tbody>{body}</tbody></table>" if rows else '<p class="muted">Not recorded yet.</p>'


def perplexity(loss: float) -> str:
    """exp(loss), short."""
    return f"{math.exp(loss):,.4g}" if loss < 13 else f"{math.exp(min(loss, 700)):.2e}"


def page(title: str, header: str, main: str) -> str:
    """A whole page in this style; the title is plain text, the rest HTML."""
    return frame(title, CSS, header, main)


def answers(parts: list[tuple[str, object]]) -> str:
    """Named texts side by side, verbatim."""
    # HTML drops one line break right after <pre>, so one is always added to keep the text verbatim.
    out = (
        f'<div><small>{escape(name)}</small><pre dir="auto">\n{escape(text or "(empty)")}</pre></div>'
        for name, text in parts
    )
    return "".join(out)
