"""One run a folder: a second is refused by name, a dead one's lock does not block."""

import errno
import fcntl
import os
import signal
import socket

import pytest

from jlora import lock
from jlora.errors import ConfigError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.0)


def hold_in_another_process(folder):
    """A process that has the lock and never lets go of it; its pid."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        with lock.held(folder):
            os.write(writes, b"x")
            signal.pause()
    assert os.read(reads, 1) == b"x"
    os.close(reads)
    os.close(writes)
    return pid


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_second_run_is_refused_and_a_dead_one_is_not_in_the_way(tmp_path):
    pid = hold_in_another_process(tmp_path)
    try:
        with pytest.raises(ConfigError) as error, lock.held(tmp_path):
            raise AssertionError("two runs in one folder")
    finally:
        kill(pid)
    message = str(error.value)
    assert str(tmp_path) in message and f"process {pid} on {socket.gethostname()}" in message
    assert error.value.exit_code == 2 and "\n" not in message
    assert f'"pid": {pid}' in (tmp_path / lock.NAME).read_text(encoding="utf-8")  # what the dead one left
    with lock.held(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / lock.NAME).read_text(encoding="utf-8")
    assert (tmp_path / lock.NAME).read_text(encoding="utf-8") == ""
    with lock.held(tmp_path):
        pass


def test_it_waits_for_a_process_that_is_just_dying(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 30.0)
    pid = hold_in_another_process(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: kill(pid))
    with lock.held(tmp_path):
        pass


def test_an_error_inside_lets_go_of_it(tmp_path):
    with pytest.raises(KeyError), lock.held(tmp_path):
        raise KeyError
    with lock.held(tmp_path):
        pass


def test_other_processes_of_a_job_do_not_lock(tmp_path):
    with lock.held(tmp_path), lock.held(tmp_path, mine=False):
        pass
    with lock.held(tmp_path / "none", mine=False):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock.held(tmp_path):
        pass
    assert "can not be locked here (No locks available)" in capsys.readouterr().err
