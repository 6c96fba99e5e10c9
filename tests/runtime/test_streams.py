"""Readers who go away and disks that are full: progress is dropped, and a result that is lost is an error."""

import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora import cli
from jlora.runtime import streams

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    rows = make_completions(folder / "rows.jsonl", 40)
    data = {"format": "completion", "max_length": 64, "eval": 0.25}
    training = {"max_steps": 8, "eval_every": 1}  # a line of progress at each step
    return write_config(folder / "c.yaml", folder / "base", rows, folder / "run", data=data, training=training)


def start(module, *arguments, redirect="", **streams):
    """A command as a shell starts it."""
    command = ["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", f"jlora.{module}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*command, *map(str, arguments)], env=env, start_new_session=True, **streams)


def read_until(descriptor, words):
    """Read until `words` were written; then nobody reads any more."""
    found = b""
    while words not in found:
        found += os.read(descriptor, 4096)
    os.close(descriptor)


def one_sentence(text):
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: stdout: the result cannot be written ("), text
    return lines[0]


def train_unread(config, run_dir, how):
    """Exit code of a training whose reader leaves as it begins."""
    arguments = "train", "--config", config, f"output_dir={run_dir}"
    if how in ("pipe", "terminal"):
        reading, writing = pty.openpty() if how == "terminal" else os.pipe()
        process = start(*arguments, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing)
        os.close(writing)
        read_until(reading, b"base ")
    else:
        process = start(*arguments, redirect={"full": ">/dev/full 2>&1", "closed": ">&- 2>&-"}[how])
    return process.wait(timeout=240)


@pytest.mark.long
@pytest.mark.parametrize("how", ["pipe", "terminal", "full", "closed"])
def test_training_that_nobody_watches_runs_to_its_end(config, tmp_path, how):
    """`2>&1 | head -1`, a terminal that goes, a full disk under the log, `>&- 2>&-`."""
    run_dir = tmp_path / "run"
    assert train_unread(config, run_dir, how) == 0
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert (run_dir / "summary.json").is_file() and (run_dir / "report.html").is_file()
    if how == "pipe":  # where the JSON was asked for, it is the result
        again = start(
            *("train", "--config", config, f"output_dir={run_dir}", "-q", "--json"),
            redirect=">/dev/full",
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "No space left" in one_sentence(again.communicate()[1]) and again.returncode == 2


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments, where, why",
    [
        (["config"], "closed", "Bad file descriptor"),
        (["config", "--help"], "full", "No space left on device"),
        (["data", "--json"], "full", "No space left on device"),
        (["data", "--rows", "40"], "unread", "Broken pipe"),  # by rich, which would end with 1 and no word
    ],
)
def test_result_that_cannot_be_written_is_an_error(config, arguments, where, why):
    arguments = [*arguments, *(["--config", config] if arguments[0] == "data" else [])]
    reading, writing = os.pipe()
    os.close(reading)
    redirect = {"closed": ">&-", "full": ">/dev/full", "unread": ""}[where]
    process = start(*arguments, redirect=redirect, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    error = process.communicate(timeout=120)[1]
    assert why in one_sentence(error) and process.returncode == 2


def test_a_reader_who_comes_back_is_told_again(tmp_path):
    """A collector of logs behind a named pipe, restarted."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with open(fifo, "w", encoding="utf-8") as before:
        stream = streams._text(before, results=False)
        os.close(reader)
        print("unheard", file=stream, flush=True)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        print("heard", file=stream, flush=True)
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)


def test_a_pipe_that_does_not_block_takes_all():
    """Another process that shares the pipe may have set it so; what is written waits for its reader all the same."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text, found = "x" * 300_000, []

    def read():
        with open(reading, "rb") as stream:
            found.append(stream.read())

    with open(writing, "w", encoding="utf-8") as before:
        stream = streams._text(before, results=True)
        thread = threading.Thread(target=read)
        thread.start()
        print(text, file=stream, flush=True)
    thread.join(timeout=30)
    assert found == [text.encode() + b"\n"]


def test_what_is_told_may_be_lost_and_a_result_may_not(monkeypatch):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", streams._text(full, results=True))
        with streams.told():
            print("a line for people")
        monkeypatch.setattr(sys, "stdout", streams._text(full, results=True))
        with pytest.raises(streams.OutputLost), streams.told(result=True):
            print("a result")
        sys.stdout.flush()  # lost once, and told once: what Python writes at its end changes no exit code
        with pytest.raises(SystemExit) as end:
            monkeypatch.setattr(sys, "stdout", streams._text(full, results=True))
            cli.run(lambda: cli.print_json({"loss": 1.0}))
        assert end.value.code == 2


def test_streams_of_a_caller_stay(monkeypatch):
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    streams.take_over()
    assert sys.stdout is mine
