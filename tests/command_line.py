"""Commands in processes of their own, and the one sentence of a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def shell(module, *arguments, stdin=None):
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", f"jlora.{module}", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )


def one_sentence(err):
    """The message of a failed command: one line, and nothing of Python."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0], err
    assert "Traceback" not in err and 'File "' not in err
    return lines[0]


def sentence_of(error, call, *arguments, **options):
    """The one sentence that a call is refused with."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message
