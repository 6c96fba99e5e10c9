"""One run a folder: a second is refused by name, a dead one's lock does not block."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jlora.errors import ConfigError
from jlora.files import lock

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.0)


HOLD = (
    "import signal, sys; from pathlib import Path; from jlora.files import lock\nwith lock.locked(Path(sys.argv[1])):\n"
)
HOLD += "    print('held', flush=True); signal.pause()"


@pytest.fixture
def other(tmp_path):
    """A process that has the lock and never lets go of it."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path, other):
    with pytest.raises(ConfigError) as error, lock.locked(tmp_path):
        raise AssertionError("two runs in one folder")
    other.kill()
    other.wait()
    message, pid = str(error.value), other.pid
    assert str(tmp_path) in message and f"process {pid} on {socket.gethostname()}" in message
    assert error.value.exit_code == 2 and "\n" not in message
    assert f'"pid": {pid}' in (tmp_path / lock.NAME).read_text(encoding="utf-8")  # what the dead one left
    with lock.locked(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / lock.NAME).read_text(encoding="utf-8")
    assert (tmp_path / lock.NAME).read_text(encoding="utf-8") == ""
    with lock.locked(tmp_path):
        pass


def test_it_waits_for_a_process_that_is_just_dying(tmp_path, other, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 30.0)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (other.kill(), other.wait()))
    with lock.locked(tmp_path):
        pass


def test_an_error_inside_lets_go_of_it(tmp_path):
    with pytest.raises(KeyError), lock.locked(tmp_path):
        raise KeyError
    with lock.locked(tmp_path):
        pass


def test_other_processes_of_a_job_do_not_lock(tmp_path):
    with lock.locked(tmp_path), lock.locked(tmp_path, mine=False):
        pass
    with lock.locked(tmp_path / "none", mine=False):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock.locked(tmp_path):
        pass
    assert "cannot be locked here (No locks available)" in capsys.readouterr().err


def test_what_is_not_ours_is_not_cut_short(tmp_path):
    """A file of the user's by that name, or one that has another name elsewhere, is locked and not written."""
    for text, linked in (("precious", False), ('{"pid": 1, "host": "h", "since": "t"}', True)):
        (tmp_path / lock.NAME).write_text(text, encoding="utf-8")
        if linked:
            os.link(tmp_path / lock.NAME, tmp_path / "another name")
        for _ in range(2):
            with lock.locked(tmp_path):
                assert (tmp_path / lock.NAME).read_text(encoding="utf-8") == text
        (tmp_path / lock.NAME).unlink()


@pytest.mark.parametrize("to", ["victim", "none"])
def test_a_link_is_not_followed(tmp_path, to):
    (tmp_path / "victim").write_text("precious", encoding="utf-8")
    (tmp_path / lock.NAME).symlink_to(tmp_path / to)
    with pytest.raises(OSError, match="is a link"), lock.locked(tmp_path):
        raise AssertionError("held")
    assert (tmp_path / "victim").read_text(encoding="utf-8") == "precious" and not (tmp_path / "none").exists()
