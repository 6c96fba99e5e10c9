"""The licence that a base names."""

from pathlib import Path
from typing import Any

from jlora.config.yaml_text import parse_yaml
from jlora.files.paths import inside
from jlora.files.theirs import MAX_TEMPLATE, text_of_theirs
from jlora.hf.gguf import GGUFFile
from jlora.hf.pretrained import Opened, lasting_name

KEY = "general.license"
LONGEST = 100


def made_of(opened: Opened) -> dict[str, Any]:
    """What an export was made of, for those who use it: the base's name and its licence."""
    return {"base": lasting_name(opened.name), "license": license_of(opened.path)}


def license_of(path: Path) -> str | None:
    """As the hub calls it, such as apache-2.0: in the first lines of a folder's README.md, or in a GGUF file's header.

    None where none is named.
    """
    if path.is_file():
        found = GGUFFile(path).header.get(KEY, str, "")
    else:
        found = _front(path).get("license")
    return found if isinstance(found, str) and 0 < len(found) < LONGEST else None


def _front(folder: Path) -> dict[str, object]:
    """The YAML at the head of a model card."""
    try:
        text = text_of_theirs(inside(folder, "README.md"), MAX_TEMPLATE, "replace")
        found = parse_yaml(text.split("\n---", 1)[0].removeprefix("---")) if text.startswith("---") else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
