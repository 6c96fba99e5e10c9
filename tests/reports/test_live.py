"""The page that follows a run: what it says as the files grow, to whom, and how it ends."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest
from command_line import ROOT, one_sentence, shell
from report_pages import SUMMARY, Page, train_line

from jlora.errors import ConfigError
from jlora.files.lock import held, locked
from jlora.reports import live

CONFIG = "training: {epochs: 2, max_steps: null}\nmethod: lora\nlora: {rank: 8}\n"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    log(tmp_path, {"step": 0, "eval_loss": 3.25})
    return tmp_path


def log(run, *lines, end="\n"):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(line) for line in lines) + end)


@pytest.fixture
def server(run, monkeypatch):
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(live, "IDLE", 0)
    with live.Server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


@contextmanager
def asked(server, path="/", method="GET", **headers):
    with closing(http.client.HTTPConnection(live.ADDRESS, server.server_port, timeout=20)) as connection:
        connection.request(method, path, headers=headers)
        yield connection.getresponse()


def next_page(answer, wanted):
    """The first page that is sent and holds some words."""
    for _ in range(200):
        line = answer.readline()
        assert line, "the stream ended"
        if line.startswith(b"data: "):
            page = Page(json.loads(line[6:]))
            assert page.problems == []
            if wanted in page.text:
                return page
    raise AssertionError(wanted)


def test_the_page_follows_a_growing_file(run, server):
    with asked(server, "/events") as answer:
        assert answer.status == 200 and answer.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        with locked(run):
            page = next_page(answer, "training")
            assert "3.2500 → –" in page.text and "left" not in page.text and set(page.charts()) == {"Loss"}
            log(run, train_line(1, loss=2.75, epoch=0.05))
            page = next_page(answer, "step 1 of 40")
            assert "2.7500" in page.text and set(page.charts()) > {"Loss", "Speed"}
            half = json.dumps(train_line(2, loss=2.125, epoch=0.1))
            log(run, train_line(2, loss=9.5, epoch=0.1), end="\n" + half[:25])
            assert "2.1250" not in next_page(answer, "step 2 of 40").text
            log(run, end=half[25:] + "\n")
            page = next_page(answer, "2.1250")
            assert "9.5" not in page.text and "left" in page.text
        next_page(answer, "stopped, can be resumed")
        (run / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
        page = next_page(answer, "finished")
        assert "1.5321" in page.text
        with locked(run):  # resumed: the summary is that of before
            assert "1.5321" not in next_page(answer, "training").text


def test_time_left_is_that_of_the_clock():
    pace = live.Pace()
    for step, now in ((10, 100.0), (10, 101.0), (14, 108.0)):
        assert pace.left(20) is None
        pace.saw(step, now)
    assert pace.left(20) == pytest.approx(6 * 2.0) and pace.left(None) is None and pace.left(12) == 0
    pace.saw(3, 110.0)
    assert pace.left(20) is None


def test_nothing_but_the_page_is_served(run, server):
    with asked(server) as answer:
        text = answer.read().decode()
        assert answer.status == 200 and "EventSource" in text and "http:" not in text and "src=" not in text
    for path in ("/metrics.jsonl", "/../config.yaml", "/etc/passwd", "/events/", "/?x", f"{run}/config.yaml"):
        with asked(server, path) as answer:
            assert answer.status == 404, path
    with asked(server, method="POST") as answer:
        assert answer.status == 501


def test_only_this_machine_is_answered(server):
    assert server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", ""):
        for path in ("/", "/events"):
            with asked(server, path, Host=host) as answer:
                assert answer.status == 421, host
    with asked(server, Host=f"localhost:{server.server_port}") as answer:
        assert answer.status == 200


@pytest.mark.long
def test_pages_that_follow_are_bounded(server, monkeypatch):
    follow = f"GET /events HTTP/1.0\r\nHost: 127.0.0.1:{server.server_port}\r\n\r\n".encode()
    pages = [socket.create_connection(server.server_address, timeout=20) for _ in range(live.MOST_PAGES)]
    for page in pages:
        page.sendall(follow)
        assert page.recv(12) == b"HTTP/1.0 200"
    with asked(server, "/events") as answer:
        assert answer.status == 503
    rest = [
        socket.create_connection(server.server_address, timeout=20)
        for _ in range(live.MOST_CONNECTIONS - live.MOST_PAGES)
    ]
    with closing(socket.create_connection(server.server_address, timeout=20)) as beyond:
        assert beyond.recv(1) == b""
    for each in (*pages, *rest):
        each.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:  # a page that was closed gives its place to another
        try:
            with asked(server, "/events") as answer:
                if answer.status == 200:
                    return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    raise AssertionError("no place became free")


def test_a_port_that_is_taken(run, server):
    with pytest.raises(ConfigError, match=f"--port {server.server_port}: cannot be listened at on 127.0.0.1 .Address"):
        live.Server(run, server.server_port)


def test_a_lock_is_looked_at_and_left(tmp_path):
    assert not held(tmp_path)
    with locked(tmp_path):
        assert held(tmp_path)
    assert not held(tmp_path)


def test_the_command_ends_well_by_ctrl_c(run):
    # As in a terminal: what a shell starts in the background ignores SIGINT, and so does all that it starts.
    heard = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", heard, sys.executable, "-m", "jlora.report", str(run), "--watch"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as done:
        line = done.stdout.readline()
        port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            connection.request("GET", "/events")
            next_page(connection.getresponse(), "3.2500")
            done.send_signal(signal.SIGINT)
            assert done.wait(20) == 0 and done.stderr.read() == ""
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "80"], "--port is of --watch"),
        (["--watch", "--port", "65536"], "65536: is no port"),
        (["--watch", "--out", "x.html"], "writes no file"),
    ],
)
def test_bad_usage(run, arguments, words):
    done = shell("report", run, *arguments)
    assert done.returncode == 2 and words in one_sentence(done.stderr)
