"""Ending a run early at the end of a step, saved: what SIGTERM and SIGINT ask for."""

import os
import signal
from collections.abc import Callable
from typing import Any

from jlora import distributed


def catch_signals() -> Callable[[int], bool]:
    """Whether the loop is to end after a step: SIGTERM and SIGINT ask it to finish the step, save and exit 75.

    A second signal changes nothing. The processes of a job agree on the step, whoever got the signal.
    """
    received = []

    def handler(number: int, frame: Any) -> None:
        received.append(number)

    def to_jax(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    # In a job JAX itself listens for SIGTERM, to bring it to all processes.
    handlers = {signal.SIGINT: to_jax} if distributed.several() else {signal.SIGTERM: handler, signal.SIGINT: handler}
    try:
        for number, action in handlers.items():
            signal.signal(number, action)
    except ValueError:  # not in the main thread: a caller's program owns the signals
        pass
    return distributed.stop_agreed if distributed.several() else lambda step: bool(received)


def ignore_signals() -> None:
    """All is saved, and the exit code is known: a signal while Python takes itself down does not change it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
