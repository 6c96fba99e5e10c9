"""The frame of a page for people to judge by: one HTML file, no network, phone to print, light and dark.

Owns escaping: every text goes through `escape`, also a row's own. Knows nothing of what is shown.
"""

import html
from pathlib import Path

from jlora.atomic import write_bytes
from jlora.errors import ConfigError

# Control characters are invalid in HTML even when escaped, and a row may hold any of them; so may it halves of pairs.
_REFUSED = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(32), *range(127, 160)) if c not in (9, 10, 13)}
_REFUSED |= {c: "\N{REPLACEMENT CHARACTER}" for c in range(0xD800, 0xE000)}
CSS = """
:root{color-scheme:light dark;--bg:#fcfcfb;--panel:#fff;--text:#1a1a19;--muted:#5f5e5a;--grid:#e6e5e1;
--good:#1b7340;--mark:#eef4fc}
@media screen and (prefers-color-scheme:dark){:root{--bg:#161615;--panel:#1f1f1e;--text:#f1f0ec;--muted:#b3b2ac;
--grid:#3a3a37;--good:#6fcf97;--mark:#1d2a3a}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1120px;padding:1rem;background:var(--bg);color:var(--text);
font:16px/1.45 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.2;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .6rem}
h3{font-size:.95rem;margin:.3rem 0}p,ul{margin:.3rem 0}ul{padding-left:1.2rem}
small,.muted,th,dt{color:var(--muted)}small,dt{font-size:.82rem}
article,figure{background:var(--panel);border:1px solid var(--grid);border-radius:8px;
padding:.7rem .8rem;margin:0 0 .8rem;min-width:0}figure,.cell{break-inside:avoid}figcaption{font-weight:600}
figure svg{width:100%;height:auto;display:block}
.grid{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr))}
.wide{grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
.cell{border-left:3px solid var(--grid);padding-left:.6rem;min-width:0}.reference{border-color:var(--good)}
pre{white-space:pre-wrap;margin:.1rem 0 .4rem;font-family:inherit;font-size:.95rem}
table{border-collapse:collapse;width:100%;overflow-wrap:normal}td+td{white-space:nowrap}
td:first-child{overflow-wrap:anywhere}th,td{text-align:right;padding:.3rem .6rem;
border-bottom:1px solid var(--grid);vertical-align:top;font-weight:400;
font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left;
padding-left:0}thead th{vertical-align:bottom;font-size:.82rem}.best{color:var(--good);font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem .8rem;margin:.3rem 0}dd{margin:0}
@media(max-width:700px){thead{display:none}tbody tr{display:block;border-bottom:2px solid var(--grid);padding:.4rem 0}
tbody td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0;text-align:right}
tbody td:first-child{font-weight:600;padding-bottom:.2rem}
td[data-label]:not(:first-child)::before{content:attr(data-label);color:var(--muted);font-weight:400;text-align:left}}
@media print{body{max-width:none;padding:0;font-size:10pt;background:#fff}article{break-inside:auto}}
"""


# How every page begins; nothing in it may be fetched or run.
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""


def clean(text: str) -> str:
    """Text without what HTML refuses even where it is escaped."""
    return text.translate(_REFUSED)


def escape(value: object) -> str:
    """Text for HTML, inside an element or a quoted attribute."""
    return html.escape(clean(str(value)))


def pre(text: str) -> str:
    """Text as it stands, its line breaks kept."""
    # HTML drops one line break right after <pre>, so one is always added.
    return f'<pre dir="auto">\n{escape(text) or "(empty)"}</pre>'


def table(headers: list[str], rows: list[list[str]], best: list[int | None] | None = None) -> str:
    """A table that becomes a list of cards on a phone.

    Args:
      headers, rows: plain text; the first column names the row.
      best: of each column the number of the row to be marked, or None.
    """
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headers)
    body = ""
    for number, row in enumerate(rows):
        cells = ""
        for column, (name, value) in enumerate(zip(headers, row, strict=True)):
            mark = ' class="best"' if best and best[column] == number else ""
            cells += f'<td data-label="{escape(name)}"{mark}>{escape(value)}</td>'
        body += f"<tr>{cells}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def frame(title: str, css: str, header: str, main: str) -> str:
    """A whole page, of HTML but for its title."""
    return f"""{HEAD}<title>{escape(title)}</title><style>{css}</style></head><body>
<header>{header}</header>
<main>{main}</main></body></html>
"""


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all, in place of an earlier one.

    Raises:
      ConfigError: it cannot be written there, or what is there is no page of ours.
    """
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as there:
                if there.read(len(HEAD)) != HEAD.encode():
                    raise ConfigError(f"{path}: is there and is no page that jlora wrote; name another file")
        write_bytes(path, page.encode("utf-8", "replace"))  # a lone surrogate in a sample becomes "?"
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); make room or way there, or name another file"
        ) from None
