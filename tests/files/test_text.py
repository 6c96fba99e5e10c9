"""Text of others on a terminal, in sentences and in tracebacks."""

import io
import sys

import pytest

from jlora import cli
from jlora.errors import DataError
from jlora.files.text import clean

# Sets the clipboard, clears the screen, rings, turns the text around.
HOSTILE = "a\x1b]52;c;aGk=\x07b\x1b[2Jc\u202ed\x9be"


def test_nothing_of_it_reaches_a_terminal():
    assert clean(HOSTILE) == "a�]52;c;aGk=�b�[2Jc�d�e"
    assert clean("a\tb\nc é 漢 👍🏽") == "a\tb\nc é 漢 👍🏽"


def test_errors_hold_none(monkeypatch, capfd):
    def fails():
        raise DataError(f"rows.jsonl:1: the role {HOSTILE} is unknown")

    with pytest.raises(SystemExit):
        cli.run(fails)
    with pytest.raises(SystemExit):
        cli.Parser(prog="jlora").parse_args([HOSTILE])
    assert not any(ord(character) < 32 and character != "\n" for character in capfd.readouterr().err)


def test_a_traceback_is_told_without_secrets(monkeypatch):
    monkeypatch.setenv("DB_PASS", "correct-horse-battery")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def fails():
        raise RuntimeError("no such host: db://u:correct-horse-battery@h")

    with pytest.raises(RuntimeError) as caught:
        cli.run(fails)
    sys.excepthook(RuntimeError, caught.value, None)
    assert "no such host" in sys.stderr.getvalue() and "correct-horse" not in sys.stderr.getvalue()
