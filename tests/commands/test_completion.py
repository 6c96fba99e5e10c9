"""Completion, in a real bash that has sourced what `jlora --completion bash` prints."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import shell

from jlora.__main__ import PURPOSES
from jlora.config.sections import known_keys

ROOT = Path(__file__).parents[2]

ASK = """
eval "$(jlora --completion bash)"
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9
eval "COMP_WORDS=($COMP_LINE)"; [[ $COMP_LINE == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
complete -p jlora >/dev/null || exit 1
_python_argcomplete jlora "${{COMP_WORDS[COMP_CWORD]}}" ""
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """What bash offers behind a line, in a folder with two configs, a note and a folder."""
    pytest.importorskip("argcomplete", reason="argcomplete is not installed")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "bin").mkdir()
    for name in ("one.yaml", "two.yaml", "notes.txt"):
        (folder / name).touch()
    program = folder / "bin" / "jlora"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m jlora "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{folder}/bin:{os.environ['PATH']}"}

    def ask(line):
        code = ASK.format(line=shlex.quote(line))
        done = subprocess.run(["bash", "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return {word.strip() for word in done.stdout.splitlines() if word}

    return ask


@pytest.mark.long
def test_commands_are_offered(offered):
    assert set(PURPOSES) <= offered("jlora ")
    assert offered("jlora ex") == {"export"}
    assert offered("jlora train") == {"train"}
    assert offered("jlora --completion ") >= {"bash", "zsh", "fish"}


def test_options_of_a_command_are_offered(offered):
    assert offered("jlora train --f") == {"--fresh"}
    assert {"--base", "--data", "--compare"} <= offered("jlora evaluate --")
    assert offered("jlora generate --dtype ") == {"bfloat16", "float32"}


@pytest.mark.long
def test_a_config_then_its_keys_are_offered(offered):
    assert offered("jlora train ") >= {"one.yaml", "two.yaml"} and "notes.txt" not in offered("jlora train ")
    assert offered("jlora plan o") == {"one.yaml"}
    assert offered("jlora train one.yaml lora.ra") == {"lora.rank=", "lora.rank_pattern="}
    assert offered("jlora train one.yaml lora.rank=8 ") >= {f"{key}=" for key in known_keys()}


@pytest.mark.parametrize("kind", ["zsh", "fish"])
def test_other_shells_get_a_script_too(kind):
    pytest.importorskip("argcomplete", reason="argcomplete is not installed")
    done = shell("__main__", "--completion", kind)
    assert (done.returncode, done.stderr) == (0, "") and "jlora" in done.stdout and "_ARGCOMPLETE" in done.stdout


def test_another_shell_is_refused():
    done = shell("__main__", "--completion", "csh")
    assert done.returncode == 2 and done.stderr.startswith("error: argument --completion: invalid choice: 'csh'")
