"""A page for people to judge by: one HTML file from a template, opened offline, from phone to paper, light and dark.

Knows nothing of what is shown.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from jlora.errors import ConfigError
from jlora.files.atomic import write_bytes
from jlora.files.text import clean
from jlora.reports import figures

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """A whole page.

    Args:
      template: such as "report.html", of `templates/`.
      values: what it shows, as plain text and figures; the templates escape every text.
    """
    return clean(_environment().get_template(template).render(values))


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all, in place of an earlier one.

    Raises:
      ConfigError: it cannot be written there, or what is there is no page of ours.
    """
    start = (Path(__file__).parent / "templates" / "base.html").read_text(encoding="utf-8").partition("<title>")[0]
    try:
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as there:
                if there.read(len(start)) != start.encode():
                    raise ConfigError(f"{path}: exists and is not a page that jlora wrote; name another file")
        write_bytes(path, page.encode("utf-8", "replace"))  # a lone surrogate in a sample becomes "?"
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); make room or way there, or name another file"
        ) from None


def link(page: Path, target: Path) -> str:
    """What a page writes to lead to another file; relative, so that a folder of pages can be moved."""
    # "./": the name of a folder may begin like the scheme of a URL.
    return "./" + quote(Path(os.path.relpath(target.resolve(), page.resolve().parent)).as_posix())


@functools.cache
def _environment() -> Environment:
    import jinja2  # only where a page is made: every command would start later for it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jlora.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figures.shown
    for style in (figures.compact, figures.loss, figures.perplexity, figures.memory, figures.duration):
        environment.filters[style.__name__] = functools.partial(figures.shown, style=style)
    environment.filters |= {"count": "{:,}".format, "percent": "{:.1%}".format}
    return environment
