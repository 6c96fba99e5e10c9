"""What the commands share: exit codes, and the console script `jlora SUBCOMMAND`."""

import argparse
import errno
import importlib
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

from jlora import distributed, preemption, streams, xla
from jlora.errors import ConfigError, HostLost, Interrupted, MemoryExceeded, Stopped, UserError
from jlora.redaction import redact

# Before transformers is imported: it reports at every start that PyTorch is not there, which it need not be.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

COMMANDS = ("train", "data", "plan", "generate", "evaluate", "effort", "export", "report", "config")
PREEMPTED = Stopped.exit_code
# What is wrong with the user's disk, not with us.
FILE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
# How XLA says it, on accelerators and on the CPU.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


class Parser(argparse.ArgumentParser):
    """Bad usage is one line on stderr, like every other error; options are written out. Parsing comes first of all."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False} | settings)

    def parse_known_args(self, *given: Any) -> Any:  # type: ignore[override]  # every other way of parsing calls it
        """As argparse's."""
        streams.take_over()
        try:
            return super().parse_known_args(*given)
        except streams.OutputLost as lost:  # --help
            self.exit(lost.exit_code, f"error: {lost}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """As argparse's, once all is written."""
        if message:
            print(message, end="", file=sys.stderr)
        sys.stdout.flush()
        sys.exit(status)

    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"error: {redact(message)}; see {self.prog} --help\n")


def run(command: Callable[[], int | None], listen: bool = True) -> None:
    """Run a command's body and exit: a `UserError` becomes one line on stderr and its exit code.

    Args:
      listen: to signals, also in native code; a command that forks has to do it itself, after that.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs its every step, and tracebacks of failed saves
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns of every loss that is not finite
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what else fails once Orbax has met a damaged file
    sys.unraisablehook = _unraisable
    xla.prepare()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries to their callers
    code, sentence = 0, ""
    try:
        preemption.interrupt_on_signal()
        with preemption.listening() if listen else nullcontext():
            code = command() or 0
        sys.stdout.flush()
    except Interrupted as interrupted:
        preemption.leave(interrupted)
    except KeyboardInterrupt:  # insisted on
        preemption.leave(Interrupted())
    except Exception as error:
        known = explain(error)
        if known is None:
            if not distributed.several():
                raise
            traceback.print_exc()
        code = known.exit_code if known else 1
        sentence = redact(" ".join(str(known or error).splitlines()))
        if known:
            print(f"error: {sentence}", file=sys.stderr)
    streams.flush()
    if distributed.several():
        if code not in (0, PREEMPTED):
            distributed.end(code, sentence)
        distributed.done(code)
    sys.exit(code)


def explain(error: Exception) -> UserError | None:
    """The sentence for an error that users can cause; None for a bug of ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        where = error.filename or "a file"
        return ConfigError(f"{where}: {error.strerror}; make room or way there, or write to another folder")
    first = str(error).split("\n")[0]
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return MemoryExceeded(
            f"out of device memory ({first}); lower training.batch_size or data.max_length, raise "
            "training.gradient_accumulation_steps, or set model.remat=full or offload (generate and evaluate: lower "
            "--batch-size, --max-new-tokens or --max-length)"
        )
    if distributed.is_lost_peer(error):
        return HostLost(
            f"another process of the job was lost ({first}); see its log, then run the same command again to go on "
            "from the last checkpoint"
        )
    return None


def _unraisable(stray: Any) -> None:
    """Once an array of a checkpoint is damaged, Orbax's reads of the others each fail on a closed event loop."""
    if str(stray.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(stray)


def strict_json(value: dict[str, Any]) -> str:
    """One line of JSON; a figure that is not finite, for which JSON has no word, becomes null."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(strict_json(value), flush=True)


def main() -> None:
    """`jlora SUBCOMMAND ...` is `python -m jlora.SUBCOMMAND ...`."""
    parser = Parser(prog="jlora", description="LoRA fine-tuning of Llama models in JAX.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs="*", default=[], help="see jlora COMMAND --help")
    args = parser.parse_args(sys.argv[1:2])
    sys.argv = [f"jlora {args.command}", *sys.argv[2:]]
    importlib.import_module(f"jlora.{args.command}").main()


if __name__ == "__main__":
    main()
