"""What a command imports before it has anything to do."""

import subprocess
import sys

import pytest

from jlora.__main__ import COMMANDS

HEAVY = ("jax", "numpy", "transformers", "datasets", "rich", "jinja2", "matplotlib", "argcomplete")
CALL = """
import importlib, sys
module, sys.argv = sys.argv[1], sys.argv[1:]
try:
    importlib.import_module(module).main()
except SystemExit as ended:
    print("code", ended.code or 0, *[name for name in {heavy} if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--no-such-flag"]])
def test_help_and_bad_usage_import_no_library_of_numbers(arguments):
    """They would take seconds; `scripts/help_times` measures them."""
    for module in ("jlora.__main__", *COMMANDS.values()):
        called = [sys.executable, "-c", CALL.format(heavy=HEAVY), module, *arguments]
        done = subprocess.run(called, capture_output=True, text=True, timeout=60)
        code = 0 if arguments == ["--help"] else 2
        assert done.stdout.splitlines()[-1] == f"code {code}", (module, done.stdout, done.stderr)


@pytest.mark.parametrize("command", ["data", "train", "plan", "effort"])
def test_a_refused_config_imports_none_either(command, tmp_path):
    (tmp_path / "c.yaml").write_text("model: {path: base}\n", encoding="utf-8")
    arguments = [COMMANDS[command], "--config", str(tmp_path / "c.yaml"), *(["--topology=cpu:1"] * (command == "plan"))]
    called = [sys.executable, "-c", CALL.format(heavy=HEAVY), *arguments]
    done = subprocess.run(called, capture_output=True, text=True, timeout=60)
    assert done.stdout == "code 2\n" and "key 'data' is missing" in done.stderr
