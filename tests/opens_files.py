"""A process that opens made-up files as the commands do, one after another, each named on stdin, for an `Opener`.

What the commands would try in a process of its own first is tried in this one, with a line before and after it: a
crash between them is one that the commands survive.
"""

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jlora.data import tables, tokens
from jlora.data.rows import read_rows
from jlora.errors import UserError
from jlora.files import sandbox

Say = Callable[..., None]
SECONDS = 5.0  # of processor time for one input


def try_here(say: Say, kind: str, *paths: str, content: bytes = b"", size: int = 0) -> str | None:
    """In place of `sandbox.tried`."""
    say("trying")
    fault = None
    try:
        if kind == "tokenizer":
            sandbox.tokenizer(content)
        for path in paths:
            sandbox.arrow(path)
    except BaseException as error:  # a panic is no Exception
        fault = str(error) or type(error).__name__
    say("tried")
    return fault


def read_tokenizer(path: str) -> None:
    """A folder's tokenizer, a text there and back."""
    tokenizer = tokens.load_tokenizer(path, None)
    tokenizer.decode(tokenizer.encode("hello é ☃ 12"))


def read_all(path: str) -> None:
    """Every row of a file or data set."""
    for _ in read_rows(path, "train"):
        pass


def abort(path: str) -> None:
    """What a library would do, of a file that was not tried before."""
    os.abort()


USES: dict[str, Callable[[str], None]] = {"tokenizer": read_tokenizer, "rows": read_all, "abort": abort}


def main() -> None:
    """Answers on stdout, a line each: `trying`, `tried`, and `read`, `refused` or `raised` at the end of an input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print

    def say(*words: str) -> None:
        print(json.dumps(words), file=answers)

    tokens.tried = tables.tried = partial(try_here, say)
    use = USES[sys.argv[1]]
    in_use = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + sandbox.FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends this process, in native code too
        try:
            use(json.loads(line))
            say("read")
        except UserError as error:
            say("refused", type(error).__name__, str(error))
        except BaseException:
            say("raised", traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
