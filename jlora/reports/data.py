"""The data as one HTML page that needs nothing else: figures, checks, lengths, and rows coloured by what is trained.

Knows nothing of how figures are found.
"""

from typing import Any

from jlora.charts import compact
from jlora.data.shown import Piece, Shown
from jlora.page import escape, frame

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 52, 12, 30, 44
PARTS = {"context": "not trained", "trained": "trained", "cut": "cut off", "special": "special token"}
CSS = """
:root{color-scheme:light dark;--bg:#fcfcfb;--panel:#fff;--text:#1a1a19;--muted:#5f5e5a;--grid:#e6e5e1;--axis:#8a8984;
--bar:#2a78d6;--bad:#b3261e;--warn:#8a5a00;--good:#1b7340;--t1:#c9ecd2;--t2:#b3e2c0;--c2:#efeeea;--cut:#f6d5d0}
@media screen and (prefers-color-scheme:dark){:root{--bg:#161615;--panel:#1f1f1e;--text:#f1f0ec;--muted:#b3b2ac;
--grid:#363633;--axis:#85847e;--bar:#5a9ff0;--bad:#ff8a80;--warn:#f0b95a;--good:#6fcf97;--t1:#1d4a2c;--t2:#255c38;
--c2:#2b2b29;--cut:#5a2722}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1040px;padding:1rem;background:var(--bg);color:var(--text);
font:16px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.2;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .6rem}p{margin:.3rem 0}
.muted,small,th,text{color:var(--muted)}small{font-size:.82rem}
.pill{display:inline-block;border:1px solid;border-radius:1em;padding:0 .7em;font-size:.82rem;font-weight:600}
.error{color:var(--bad)}.warning{color:var(--warn)}.good{color:var(--good)}
.tiles,.charts{display:grid;gap:.7rem}.tiles{grid-template-columns:repeat(auto-fill,minmax(min(100%,150px),1fr))}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr))}figure{max-width:520px}
.tile,figure,.row{background:var(--panel);border:1px solid var(--grid);border-radius:8px;padding:.6rem .7rem;
margin:0;min-width:0}.tile,figure{break-inside:avoid}.path td{border:0;padding-bottom:0;font-weight:600}.tile small{display:block}.tile b{font-size:1.2rem}
.row{margin-bottom:.7rem}.row p{break-after:avoid}
ul{list-style:none;padding:0;margin:0}li{padding:.35rem 0;border-bottom:1px solid var(--grid)}li b{margin-right:.5em}
figcaption{font-weight:600}figure svg{width:100%;height:auto}text{font-size:12px;fill:var(--muted)}
@media(max-width:480px){text{font-size:13.5px}}
rect{fill:var(--bar)}path{fill:none;stroke:var(--grid)}.axis{stroke:var(--axis)}
table{border-collapse:collapse;width:100%;max-width:46rem}
th,td{text-align:right;padding:.25rem 0 .25rem .8rem;border-bottom:1px solid var(--grid);font-weight:400}
th,td{white-space:nowrap}th:first-child,td:first-child{text-align:left;padding-left:0}td:first-child{white-space:normal}
td{font-variant-numeric:tabular-nums}
pre,.legend{font:.86rem/1.6 ui-monospace,"DejaVu Sans Mono",monospace}
pre{white-space:pre-wrap;margin:.3rem 0 0;unicode-bidi:isolate}
.legend{line-height:1.9}.legend span{padding:.1em .4em;margin-right:.6em;white-space:nowrap}
i{font-style:normal}.trained,.trained i{background:var(--t1);border-bottom:2px solid var(--good)}
.trained i:nth-child(even){background:var(--t2)}.context i:nth-child(even){background:var(--c2)}
.cut{background:var(--cut);text-decoration:line-through}.special{font-weight:700;outline:1px solid var(--axis);
outline-offset:-1px;border-radius:3px}.gap,.end{color:var(--muted)}.gap{font-style:italic}
@media print{body{max-width:none;padding:0;font-size:10.5pt;background:#fff}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}.charts{grid-template-columns:1fr 1fr}}
"""


def render(title: str, report: dict[str, Any], rows: list[Shown]) -> str:
    """The page of a report (`jlora.data.__main__.Seen`) and its first rows.

    Args:
      title: such as the config's name.
    """
    levels = [found["level"] for found in report["checks"]]
    state = "error" if "error" in levels else "warning" if levels else "good"
    words = {"error": "would train wrongly", "warning": "read the warnings", "good": "nothing found wrong"}[state]
    checks = "".join(
        f'<li><b class="{found["level"]}">{found["level"]}</b>{escape(found["sentence"])}</li>'
        for found in sorted(report["checks"], key=lambda found: found["level"])
    )
    sets = [(name, report[name]) for name in ("train", "eval") if report[name] is not None]
    parts = "".join(f'<span class="{part}">{label}</span>' for part, label in PARTS.items())
    shown = "".join(map(_row, rows)) or '<p class="muted">None asked for.</p>'
    return frame(
        f"{title}: data",
        CSS,
        f'<h1>Data of {escape(title)}</h1><p><span class="pill {state}">{words}</span></p>',
        f"""<h2>Key figures</h2><div class="tiles">{_tiles(report)}</div>
<h2>Checks</h2><ul>{checks or '<li><b class="good">ok</b>nothing found wrong</li>'}</ul>
<h2>Lengths</h2><div class="charts">{"".join(_chart(name, found) for name, found in sets)}</div>
<h2>Rows</h2>{_sets(sets)}
{_sources(report["train"]["sources"])}<h2>Batches of an epoch</h2>{_batches(report["train"]["batches"])}
<h2>The first rows, as the model sees them</h2><p class="legend">{parts}</p>{shown}""",
    )


def _tiles(report: dict[str, Any]) -> str:
    train, held = report["train"], report["eval"]
    tiles = [
        ("Rows", f"{train['rows']:,}", f"{sum(train['dropped'].values()):,} dropped"),
        ("Sequences", f"{train['examples']:,}", f"{held['examples']:,} held out" if held else "none held out"),
        ("Tokens", f"{train['tokens']:,}", f"{train['lengths']['median']:,} in the median sequence"),
        ("Trained tokens", f"{train['trained_tokens']:,}", f"{train['trained_tokens'] / train['tokens']:.1%} of all"),
        ("Rows cut off", f"{train['truncated']:,}", f"longest {train['lengths']['max']:,} tokens"),
        ("Exact copies", f"{train['duplicates']:,}", "of an earlier sequence"),
    ]
    return "".join(
        f'<div class="tile"><small>{name}</small><b>{value}</b><small>{note}</small></div>'
        for name, value, note in tiles
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    body = "".join("<tr>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def _sets(sets: list[tuple[str, dict[str, Any]]]) -> str:
    figures = {
        "rows read": "rows", "sequences": "examples", "tokens": "tokens", "trained tokens": "trained_tokens",
        "rows cut off": "truncated", "exact copies": "duplicates",
    }  # fmt: skip
    rows = [[label, *(f"{found[key]:,}" for _, found in sets)] for label, key in figures.items()]
    for name, label in (("min", "shortest"), ("median", "median"), ("p90", "90 % at most"), ("max", "longest")):
        rows.append([f"tokens, {label}", *(f"{found['lengths'][name]:,}" for _, found in sets)])
    for reason in sorted({reason for _, found in sets for reason in found["dropped"]}):
        rows.append([f"dropped: {escape(reason)}", *(f"{found['dropped'].get(reason, 0):,}" for _, found in sets)])
    return _table(["", *(f"data.{name}" for name, _ in sets)], rows)


def _sources(sources: list[dict[str, Any]]) -> str:
    """Each source's path over its figures, since paths are long and pages narrow."""
    names = ("weight", "rows", "sequences", "in epoch 1")
    body = ""
    for each in sources:
        weight = "–" if each["weight"] is None else f"{each['weight']:g}"
        figures = (weight, *(f"{each[key]:,}" for key in ("read", "examples", "first_epoch")))
        cells = "".join(f"<td>{value}</td>" for value in figures)
        body += f'<tr class="path"><td colspan="4">{escape(each["path"])}</td></tr><tr>{cells}</tr>'
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<h2>Sources of the mixture</h2>{table}" if sources else ""


def _batches(counts: dict[str, int]) -> str:
    kinds = ("packed", "padded")
    rows = [
        ["batches", *(f"{counts[kind]:,}" for kind in kinds)],
        ["tokens worked through", *(f"{counts[f'{kind}_tokens']:,}" for kind in kinds)],
        ["of them not padding", *(f"{counts['tokens'] / counts[f'{kind}_tokens']:.1%}" for kind in kinds)],
    ]
    return _table(["", "packed", "padded"], rows)


def _chart(name: str, found: dict[str, Any]) -> str:
    """The histogram of lengths: sequences over tokens."""
    bins = found["histogram"]
    most, end = max(count for *_, count in bins), bins[-1][1]
    tick = next(m * 10**k for k in range(20) for m in (1, 2, 5) if m * 10**k * 5 >= most)
    top, base, right = -(-most // tick) * tick, HEIGHT - BOTTOM, WIDTH - RIGHT

    def x(tokens: float) -> float:
        return LEFT + tokens / end * (right - LEFT)

    def y(count: float) -> float:
        return base - count / top * (base - TOP)

    body = [
        '<text x="4" y="14">sequences</text>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">tokens in a sequence</text>',
    ]
    for value in range(0, top + 1, tick):
        body.append(
            f'<path class="{"axis" if value == 0 else "grid"}" d="M{LEFT} {y(value):.1f}H{right}"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{compact(value)}</text>'
        )
    for low, high, count in bins:
        body.append(
            f'<rect x="{x(low) + 0.5:.1f}" y="{y(count):.1f}" width="{x(high) - x(low) - 1:.1f}" '
            f'height="{base - y(count):.1f}"><title>{low:,} to {high - 1:,} tokens: {count:,}</title></rect>'
        )
    every = -(-len(bins) // 5)
    for low in [bin[0] for bin in bins[::every]] + [end] * (len(bins) % every == 0):
        body.append(
            f'<path class="axis" d="M{x(low):.1f} {base}v5"/>'
            f'<text x="{x(low):.1f}" y="{base + 18}" text-anchor="middle">{compact(low)}</text>'
        )
    extent = f"{found['lengths']['min']:,} to {found['lengths']['max']:,} tokens"
    return (
        f"<figure><figcaption>data.{name}: {found['examples']:,} sequences</figcaption>"
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="lengths of data.{name}: {extent}">'
        f"{''.join(body)}</svg></figure>"
    )


def _row(row: Shown) -> str:
    cut = f", {row.cut:,} cut off" if row.cut else ""
    what = escape(row.bad) if row.bad else f"{row.tokens:,} tokens, {row.trained:,} trained{cut}"
    blocks = "".join(f'<pre dir="auto">\n{_tokens(pieces)}</pre>' for pieces in row.sequences)
    bad = ' class="error"' if row.bad else ""
    return f'<section class="row"><p><b>{escape(row.where)}</b> <small{bad}>{what}</small></p>{blocks}</section>'


def _tokens(pieces: list[Piece]) -> str:
    out, before = "", ""
    for piece in pieces:
        if piece.part != before:
            out += ("</span>" if before else "") + f'<span class="{piece.part}">'
        before = piece.part
        if piece.part == "gap":
            out += f" … {piece.text} … "
            continue
        text = escape(piece.text).replace("\n", '<span class="end">↵</span>\n')
        special = ' class="special"' if piece.special else ""
        out += f'<i{special} title="{piece.id}">{text}</i>'
    return out + ("</span>" if before else "")
