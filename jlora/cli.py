"""What the commands share: exit codes, and the console script `jlora SUBCOMMAND`."""

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from jlora.errors import ConfigError, MemoryExceeded, UserError

COMMANDS = ("train", "generate", "evaluate", "export", "config")
PREEMPTED = 75
# How XLA says it, on accelerators and on the CPU.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


class Parser(argparse.ArgumentParser):
    """Bad usage is one line on stderr, like every other error."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(ConfigError.exit_code)


def run(command: Callable[[], int | None]) -> None:
    """Run a command's body and exit: a `UserError` becomes one line on stderr and its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs its every step
    try:
        code = command() or 0
    except UserError as error:
        code = _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our stdout (such as `head`) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        wanted = str(error).split("\n")[0]
        code = _fail(
            MemoryExceeded(
                f"out of device memory ({wanted}); lower training.batch_size or data.max_length, raise "
                "training.gradient_accumulation_steps, or set model.remat=full (generate and evaluate: lower "
                "--batch-size, --max-new-tokens or --max-length)"
            )
        )
    sys.exit(code)


def _fail(error: UserError) -> int:
    print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return error.exit_code


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def main() -> None:
    """`jlora SUBCOMMAND ...` is `python -m jlora.SUBCOMMAND ...`."""
    parser = Parser(prog="jlora", description="LoRA fine-tuning of Llama models in JAX.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args(sys.argv[1:2])
    sys.argv = [f"jlora {args.command}", *sys.argv[2:]]
    importlib.import_module(f"jlora.{args.command}").main()
