"""Rules of the house that a reader relies on: the README's map, the size of files, the direction of imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "jlora").rglob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_maps_every_module():
    table = README[README.index("## The code") :]
    mapped = re.findall(r"`(\w+\.py)`", table)
    assert sorted(mapped) == sorted(path.name for path in MODULES if path.name != "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def imports_of(path: Path) -> set[str]:
    """The jlora modules that a module imports at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jlora":
            found |= {f"jlora.{a.name}" for a in node.names} if node.module == "jlora" else {node.module}
    return {name.removeprefix("jlora.") for name in found}


def test_imports_have_no_cycle_and_kernels_know_no_commands():
    graph = {
        str(path.relative_to(ROOT / "jlora").with_suffix("")).replace("/", "."): imports_of(path)
        for path in MODULES
        if path.name != "__init__.py"
    }

    def reach(module: str, seen: frozenset[str]) -> None:
        assert module not in seen, f"import cycle through {module}"
        for name in graph.get(module, ()):
            reach(name, seen | {module})

    for module in graph:
        reach(module, frozenset())
    for module in ("layers", "attention.choice", "adapter", "objective", "optim", "gguf", "tokens"):
        assert not graph[module] & {"train", "generate", "evaluate", "export", "plan", "checkpoint", "metrics"}


def test_nothing_loads_pickles_or_remote_code():
    refused = r"\bimport pickle|torch\.load|trust_remote_code=True|yaml\.unsafe_load|yaml\.(Full|Unsafe)?Loader\b"
    for path in MODULES:
        assert not re.search(refused, path.read_text(encoding="utf-8")), path
