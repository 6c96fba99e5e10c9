"""Rules of the house that a reader relies on: the README's tree, the size of files and functions, no pickles.

The direction of imports is held by import-linter's contract in pyproject.toml.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "jlora").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_shows_what_lies_at_the_top():
    tree = README[README.index("## The code") :]
    shown = set(re.findall(r"\b(\w+\.py|\w+/)(?=[\s])", tree[: tree.index("Licence")])) - {"jlora/"}
    there = {path.relative_to(ROOT / "jlora").parts[0] for path in MODULES if not path.name.startswith("_")}
    there = {name if name.endswith(".py") else f"{name}/" for name in there}
    assert shown == there and len(there) <= 26


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 100, f"{node.name} is longer than 100 lines"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_nothing_loads_pickles_or_remote_code():
    refused = r"\bimport pickle|torch\.load|trust_remote_code=True|yaml\.unsafe_load|yaml\.(Full|Unsafe)?Loader\b"
    for path in MODULES:
        assert not re.search(refused, path.read_text(encoding="utf-8")), path
