"""What SIGTERM, SIGINT and SIGHUP ask of a run: to end at once before its first step, and to save and end after it."""

import _weakrefset
import gc
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from jlora.errors import Interrupted, Stopped
from jlora.runtime import distributed, supervise

# How long the main thread may take to hear a signal, and to leave a run for it.
GRACE_SECONDS = 2.0

_received: list[int] = []


def interrupt_on_signal() -> None:
    """Of a command that saves nothing: Ctrl-C raises `KeyboardInterrupt` in the main thread."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # which may raise where it is dropped
        signal.signal(signal.SIGINT, _interrupt)


def end_on_signals() -> None:
    """Until the first step: a signal raises `Stopped` in the main thread, and those after it change nothing."""
    _received.clear()
    _handle(_stop)


def save_on_signals() -> Callable[[int], bool]:
    """From the first step on: whether the loop is to end after a step, since a signal came; to save and exit 75.

    A second signal changes nothing. The processes of a job agree on the step, whoever got the signal.
    """

    def handler(number: int, frame: Any) -> None:
        if not _received and os.isatty(2):
            with suppress(OSError):  # and not by `print`, which the main thread may be in the middle of
                os.write(2, b"\nstopping after this step\n")
        _received.append(number)

    def to_jax(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    _handle(to_jax if distributed.several() else handler)
    return distributed.stop_agreed if distributed.several() else lambda step: received()


@contextmanager
def own_signals() -> Iterator[None]:
    """A run takes the signals that stop it; what the program around it does on them is given back after it."""
    before = {number: signal.getsignal(number) for number in supervise.STOP_SIGNALS}
    try:
        yield
    finally:
        with suppress(ValueError):  # not in the main thread, where none was changed
            for number, handler in before.items():
                signal.signal(number, handler)


def received() -> bool:
    """Whether a signal came since the last `save_on_signals`, be it after a run's last step."""
    return bool(_received)


def ignore_signals() -> None:
    """All is saved, and the exit code is known: a signal while Python takes itself down does not change it."""
    for number in supervise.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def leave(error: Interrupted) -> NoReturn:
    """End the process for a signal, with its sentence and code."""
    print(error, file=sys.stderr)
    # Python would take itself down under the feet of a compiler that is at work, and crash.
    distributed.end(error.exit_code, str(error))


@contextmanager
def listening() -> Iterator[None]:
    """End the process also where the main thread is in native code, such as the compiler, and sees no signal.

    A thread does so, if the block goes on for GRACE_SECONDS after a signal that ought to have ended it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    left = threading.Event()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading, left), name="signals", daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.close(writing)


def _listen(reading: int, left: threading.Event) -> None:
    with open(reading, "rb", buffering=0) as signals:
        while number := signals.read(1):
            # Asked again after waiting: a signal that came as the first step began is heard after it.
            if _awaited(number[0]) and not left.wait(GRACE_SECONDS) and (error := _awaited(number[0])):
                leave(error)


def _awaited(number: int) -> Interrupted | None:
    """What a signal ought to raise in the main thread, and has not, or what has not ended it yet."""
    handler = signal.getsignal(number)
    if handler == _interrupt:
        return Interrupted()
    return Stopped() if handler in (_stop, _stopping) else None


def _interrupt(number: int, frame: Any) -> None:
    if not _again_if_dropped(number, frame):
        signal.signal(number, signal.default_int_handler)
        raise Interrupted


def _stop(number: int, frame: Any) -> None:
    if not _again_if_dropped(number, frame):
        _handle(_stopping)
        raise Stopped


def _stopping(number: int, frame: Any) -> None:
    pass


def _again_if_dropped(number: int, frame: Any) -> bool:
    """Whether Python drops what is raised here, so that the signal has to come again, which it does soon.

    In a callback of its garbage collector, which JAX has, in one of a weak dictionary or set, or in `__del__`.
    """
    codes = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    weak = weakref.__file__, _weakrefset.__file__
    while frame is not None:
        code = frame.f_code
        if code in codes or code.co_name == "__del__" or code.co_filename in weak and "remove" in code.co_name:
            break
        frame = frame.f_back
    if frame is not None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    return frame is not None


def _handle(handler: Callable[[int, Any], None]) -> None:
    with suppress(ValueError):  # not in the main thread: a caller's program owns the signals
        for number in supervise.stop_signals():
            # In a job JAX itself listens for SIGTERM, to bring it to all processes.
            if number != signal.SIGTERM or not distributed.several():
                signal.signal(number, handler)
