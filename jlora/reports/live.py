"""A page that follows a run while it trains: a server on this machine alone, which re-reads the run's files.

Nothing but the page and its events is served: no request names a file. Knows nothing of command lines.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jlora.errors import ConfigError
from jlora.files.lock import held
from jlora.reports import page
from jlora.reports.figures import drawable, mapping
from jlora.reports.run import told
from jlora.reports.run_files import MAPPINGS, RunFiles, changed_at, read_run

ADDRESS = "127.0.0.1"
# Pages that follow at once, and connections of all kinds.
MOST_PAGES, MOST_CONNECTIONS = 8, 32
# Seconds between looks at the files, between signs of life where nothing changes, and that a client may take to ask.
LOOK_SECONDS, ALIVE_SECONDS, CLIENT_SECONDS = 1.0, 15.0, 10.0
# Times as long as drawing took, nothing is drawn: a log of a million steps does not keep the processor from training.
IDLE = 10
FILES = ("metrics.jsonl", "summary.json", "config.yaml", "samples.json")


@dataclass
class Pace:
    """Seconds a step takes, evaluations and saves with it, by the clock of who looks on."""

    seen: tuple[tuple[float, float], ...] = ()  # the first step and the latest, each with when it was seen

    def saw(self, step: float, now: float) -> None:
        """A step was there when somebody looked; a step back is a run begun anew."""
        if not self.seen or step < self.seen[-1][0]:
            self.seen = ((step, now),)
        elif step > self.seen[-1][0]:
            self.seen = (self.seen[0], (step, now))

    def left(self, total: float | None) -> float | None:
        """Seconds to the last step; None where nobody can tell yet."""
        if total is None or len(self.seen) < 2:
            return None
        (first, began), (latest, ended) = self.seen
        return max(0.0, total - latest) * (ended - began) / (latest - first)


class Followed:
    """A run folder as it is now, drawn once for all who look on."""

    def __init__(self, folder: Path):
        self._folder, self._lock, self._pace = folder, threading.Lock(), Pace()
        self._seen: list[Any] = []
        self._drawn, self._again = "", 0.0

    def markup(self) -> str:
        """The page's content, drawn anew where a file has changed or the run has begun or ended, but not too often."""
        with self._lock:
            began, training = time.monotonic(), held(self._folder)
            seen = [training, *(changed_at(self._folder / name) for name in FILES)]
            if seen != self._seen and began >= self._again:
                self._seen, self._drawn = seen, self._draw(training)
                self._again = began + IDLE * (time.monotonic() - began)
            return self._drawn

    def _draw(self, training: bool) -> str:
        run = read_run(self._folder)
        if training:  # a summary is that of an earlier start
            samples = run.summary["samples"]
            run = replace(run, summary={"samples": samples} | {key: {} for key in MAPPINGS}, training=True)
        if run.steps:
            self._pace.saw(max(run.steps), time.monotonic())
        total = steps_in_all(run)
        shown = told(run) | {"total": total, "left": self._pace.left(total) if training else None}
        return page.render("live.html", **shown)


def steps_in_all(run: RunFiles) -> float | None:
    """Steps of the whole run, as its config says, or else by the part of its epochs that is done."""
    training = mapping(run.keys().get("training"))
    if (steps := drawable(training.get("max_steps"))) is not None:
        return steps
    wanted = drawable(training.get("epochs"))
    done = [(drawable(line["step"]), drawable(line["epoch"])) for line in run.records if "epoch" in line]
    step, epoch = done[-1] if done else (None, None)
    return round(step * wanted / epoch) if step and epoch and wanted else None


class Handler(BaseHTTPRequestHandler):
    """Answers for the page and for its stream of events."""

    server: Server
    timeout = CLIENT_SECONDS
    server_version, sys_version = "jlora", ""

    def do_GET(self) -> None:
        """Serve the page, its events, or nothing."""
        # A page of another site, whose name was made to lead here, has that name as its host.
        if self.headers.get("Host") not in self.server.hosts:
            return self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "this is another host\n")
        if self.path == "/":
            return self._answer(HTTPStatus.OK, "text/html", self.server.shell)
        if self.path != "/events":
            return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is nothing else here\n")
        if not self.server.places.acquire(blocking=False):
            return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", "too many pages are open\n")
        try:
            self._follow()
        except OSError:  # the page was closed
            pass
        finally:
            self.server.places.release()

    def _follow(self) -> None:
        self._begin(HTTPStatus.OK, "text/event-stream")
        sent, told = None, 0.0
        while not self.server.over.is_set():
            markup = self.server.followed.markup()
            if markup != sent:
                self.wfile.write(f"data: {json.dumps(markup)}\n\n".encode())
                sent, told = markup, time.monotonic()
            elif time.monotonic() - told > ALIVE_SECONDS:
                self.wfile.write(b": still here\n\n")
                told = time.monotonic()
            self.server.over.wait(LOOK_SECONDS)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        self._begin(status, kind)
        self.wfile.write(text.encode("utf-8", "replace"))

    def _begin(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is for errors."""


class Server(ThreadingHTTPServer):
    """Serves the page of one run to this machine."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int):
        """Bind the port; 0 takes a free one.

        Raises:
          ConfigError: it is taken, or may not be.
        """
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"--port {port}: cannot be listened at on {ADDRESS} ({os.strerror(error.errno or 0)}); name another, "
                "or leave --port out to take a free one"
            ) from None
        self.followed, self.over = Followed(folder), threading.Event()
        self.places = threading.BoundedSemaphore(MOST_PAGES)
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.hosts = {f"{name}:{self.server_port}" for name in (ADDRESS, "localhost")}
        self.shell = page.render("live_shell.html", name=folder.resolve().name, nonce=secrets.token_urlsafe(16))

    @property
    def url(self) -> str:
        """Where a browser finds the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """As the library's, in a thread of its own; one connection too many is closed at once."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the library's."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def serve(folder: Path, port: int) -> None:
    """Serve until Ctrl-C, and say on stdout where, once it can be opened there.

    Raises:
      ConfigError: see `Server`.
    """
    with Server(folder, port) as server:
        print(f"following {folder} at {server.url}; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            server.over.set()
