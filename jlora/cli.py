"""What the commands share: the parser, how a command ends, and the arguments that name a model."""

import argparse
import difflib
import errno
import itertools
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any, NoReturn, get_args

from jlora.errors import ConfigError, HostLost, Interrupted, MemoryExceeded, Stopped, UserError
from jlora.files.atomic import strict_json
from jlora.files.paths import expand_home
from jlora.files.text import clean, redact
from jlora.runtime import distributed, signals, streams, supervise, xla

# Before transformers is imported: it reports at every start that PyTorch is not there, which it need not be.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # and each warning comes twice

PREEMPTED = Stopped.exit_code
# What is wrong with the user's disk, not with us.
FILE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.EFBIG, errno.EMFILE, errno.ENFILE),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
# Set by a shell that completes; its value is the number of the word that is the command's name.
COMPLETION = "_ARGCOMPLETE"
# How XLA says it, on accelerators and on the CPU.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")


class Parser(argparse.ArgumentParser):
    """Bad usage is one line on stderr, like every other error; options are written out. Parsing comes first of all."""

    def __init__(self, examples: tuple[str, ...] = (), **settings: Any):
        """As argparse's.

        Args:
          examples: whole command lines, which the help ends with.
        """
        if examples:
            settings["epilog"] = "examples:\n" + "\n".join(f"  {line}" for line in examples)
            settings["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**{"allow_abbrev": False} | settings)
        self.register("type", "path", _path)
        self._completes = False
        self._given: list[str] = []

    def parse_intermixed_args(self, *given: Any, **named: Any) -> Any:
        """As argparse's, which hides the positional arguments from what it calls."""
        self._complete()
        return super().parse_intermixed_args(*given, **named)

    def parse_known_args(self, *given: Any, **named: Any) -> Any:  # every other way of parsing calls it
        """As argparse's."""
        self._given = list(sys.argv[1:] if not given or given[0] is None else given[0])
        streams.take_over()
        self._complete()
        try:
            return super().parse_known_args(*given, **named)
        except streams.OutputLost as lost:  # --help
            self.exit(lost.exit_code, f"error: {lost}\n")

    def _complete(self) -> None:
        """Tell a shell that asks what may follow, and end; see `jlora --completion`."""
        if COMPLETION in os.environ and not self._completes:
            self._completes = True  # it parses what is there already
            import argcomplete

            argcomplete.autocomplete(self)

    def defaults(self) -> dict[str, Any]:
        """Every argument as it is where a command line leaves it out; for programs, whose streams stay as they are."""
        return {action.dest: action.default for action in self._actions if action.dest != "help"}

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """As argparse's, once all is written."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """As argparse's, in one line that ends with what may be meant; an option that is not known goes first."""
        words = itertools.takewhile(lambda word: word != "--", self._given)
        unknown = [
            word for word in words if word.startswith("--") and word.split("=")[0] not in self._option_string_actions
        ]
        if unknown and not message.startswith("unrecognized"):  # that for which it was meant is said to be missing
            message = f"unrecognized arguments: {' '.join(unknown)}"
        if message.startswith("unrecognized") and (found := re.search(r" --(\w+\.[\w.]+)(?:[= ](\S+))?", message)):
            message = f"--{found[1]}: a config key takes no dashes; write {found[1]}={found[2] or 'VALUE'}"
        close = self._meant(unknown[0].split("=")[0]) if unknown else ""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            close = next(iter(difflib.get_close_matches(choice[1], re.findall(r"[\w.-]+", choice[2]), n=1)), "")
        more = f"did you mean {close}?" if close else f"see {self.prog} --help"
        self.exit(ConfigError.exit_code, f"error: {clean(redact(message))}; {more}\n")

    def _meant(self, flag: str) -> str:
        """The key of a config, where the command takes such, or the option that is nearest to one that is not known."""
        if any(action.dest == "overrides" for action in self._actions):
            from jlora.config.sections import known_keys

            leaf = flag.lstrip("-").replace("-", "_")
            if key := next((key for key in known_keys() if key.rpartition(".")[2] == leaf), ""):
                return f"{key}=VALUE"
        shown = [flag for action in self._actions if action.help != argparse.SUPPRESS for flag in action.option_strings]
        return next(iter(difflib.get_close_matches(flag, shown, n=1)), "")


def _path(text: str) -> str:
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(command: Callable[[], int | None], listen: bool = True, flags: Collection[str] = ()) -> None:
    """Run a command's body and exit: a `UserError` becomes one line on stderr and its exit code.

    Args:
      listen: to signals, also in native code; a command that forks has to do it itself, after that.
      flags: arguments of a command without a config, which its sentences name in place of keys.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs its every step, and tracebacks of failed saves
    logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # it warns of every loss that is not finite
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what else fails once Orbax has met a damaged file
    sys.unraisablehook, sys.excepthook = _unraisable, _uncaught
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries to their callers
    code, sentence = 0, ""
    try:
        xla.prepare()
        signals.interrupt_on_signal()
        with signals.listening() if listen else nullcontext():
            code = command() or 0
        sys.stdout.flush()
    except Interrupted as interrupted:
        signals.leave(interrupted)
    except KeyboardInterrupt:  # insisted on
        signals.leave(Interrupted())
    except Exception as error:
        known = explain(error)
        if known is None:
            if not distributed.several():
                raise
            _uncaught(type(error), error, error.__traceback__)
        code = known.exit_code if known else 1
        sentence = as_flags(clean(redact(" ".join(str(known or error).splitlines()))), flags)
        if known:
            print(f"error: {sentence}", file=sys.stderr)
    streams.flush()
    if distributed.several():
        if code not in (0, PREEMPTED):
            distributed.end(code, sentence)
        supervise.done(code)
    sys.exit(code)


def as_flags(sentence: str, flags: Collection[str]) -> str:
    """A sentence that says `--on-bad-row skip` where it said `data.on_bad_row=skip`, of the flags that there are."""

    def flag(found: re.Match[str]) -> str:
        name = "base" if found[0].startswith("model.path") else found[1]
        return f"--{name.replace('_', '-')}{' ' * bool(found[2])}" if name in flags else found[0]

    sentence = re.sub(r"\bdata\.columns\.\b", "data.columns=", sentence) if "columns" in flags else sentence
    return re.sub(r"\b(?:data|model)\.([a-z_]+)\b(=?)", flag, sentence)


def explain(error: Exception) -> UserError | None:
    """The sentence for an error that users can cause; None for a bug of ours."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in FILE_ERRORS:
        where = error.filename or "a file"
        return ConfigError(f"{where}: {error.strerror}; make room or way there, or write to another folder")
    first = str(error).split("\n")[0]
    # safetensors has errors of its own, which say the system's number.
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return explain(OSError(int(number[1]), os.strerror(int(number[1])))) if int(number[1]) in FILE_ERRORS else None
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return MemoryExceeded(
            f"out of device memory ({first}); lower training.batch_size or data.max_length, raise "
            "training.gradient_accumulation_steps, or set model.remat=full or offload (generate and evaluate: lower "
            "--batch-size, --max-new-tokens or --max-length)"
        )
    if distributed.is_lost_peer(error):
        return HostLost(
            f"another process of the job was lost ({first}); see its log, then run the same command again to resume "
            "from the last checkpoint"
        )
    return None


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """The traceback of a bug, which may hold values of the user's."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def _unraisable(stray: Any) -> None:
    """Once an array of a checkpoint is damaged, Orbax's reads of the others each fail on a closed event loop."""
    if str(stray.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(stray)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(strict_json(value), flush=True)


def show(args: argparse.Namespace, found: Any, people: Callable[[], None], kept: bool = False) -> None:
    """Print what a command found and wrote: with `--json` as that, else for people, who may be gone; nothing with -q.

    Args:
      kept: the JSON is in files, too, and who does not read it misses nothing.
    """
    as_json = getattr(args, "json", False)
    with streams.told(result=as_json and not kept):
        if as_json:
            print_json(found)
        elif not args.quiet:
            people()


def add_config_arguments(parser: Parser) -> None:
    """The config file, by position or as `--config FILE`, and `key=value` overrides behind it; see `config_file`."""
    parser.add_argument("--config", type="path", metavar="FILE", help="the same as CONFIG")
    overrides = parser.add_argument(
        "overrides",
        nargs="*",
        metavar="CONFIG, key=value",
        help="YAML file of the run, and overrides of its dotted keys, which `jlora config` lists",
    )
    overrides.completer = _config_words  # type: ignore[attr-defined]
    parser.usage = f"{parser.prog} CONFIG [key=value ...] [options]"


def _config_words(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """What a shell offers for the config and its overrides: first files, then keys."""
    from argcomplete.completers import FilesCompleter

    from jlora.config.sections import known_keys

    if parsed_args.config is None and not parsed_args.overrides:
        return list(FilesCompleter(("yaml", "yml"))(prefix))
    return [f"{key}=" for key in known_keys()]


def config_file(args: argparse.Namespace) -> str:
    """The config that a command line names; takes it off the overrides where it stands before them.

    Raises:
      ConfigError: there is none.
    """
    if args.config is None and args.overrides and ("=" not in args.overrides[0] or os.path.isfile(args.overrides[0])):
        args.config = expand_home(args.overrides.pop(0))
    if args.config is None:
        raise ConfigError("name the run's config, a YAML file; jlora init writes one")
    return args.config


def add_old_name(parser: argparse._ActionsContainer, flag: str, name: str) -> None:
    """A flag that the argument `name`, a path, once had; it still works, and no help names it."""
    parser.add_argument(flag, type="path", dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def add_output_arguments(parser: Parser, json: str | None = None) -> None:
    """What a command prints; -q means the same in all. `json` is what it prints as JSON, if it does."""
    parser.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        help="print errors alone, and answers, figures or JSON that were asked for",
    )
    if json:
        parser.add_argument("--json", action="store_true", help=json)


def named(text: str) -> dict[str, str]:
    """`instruction=q,output=reply` as column of the format -> its name in the rows."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(column.strip() and name.strip() for column, _, name in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form instruction=q,output=reply")
    return {column.strip(): name.strip() for column, _, name in pairs}


def add_columns_argument(parser: Parser) -> None:
    """How the columns of rows are named."""
    parser.add_argument(
        "--columns",
        type=named,
        default={},
        metavar="COLUMN=NAME,...",
        help="names of columns in your rows, such as instruction=q,output=reply; usual ones are found without",
    )


def add_model_arguments(parser: Parser) -> None:
    """The arguments of every command that runs a base with an adapter."""
    from jlora.config.data import Format
    from jlora.config.sections import Quantization

    parser.add_argument(
        "--base", type="path", help="Hugging Face folder, .gguf file or hub name; default: the adapter's own"
    )
    parser.add_argument("--adapter", type="path", help="run folder or PEFT LoRA folder")
    parser.add_argument("--tokenizer", type="path", help="another folder for the tokenizer")
    parser.add_argument("--chat-template", type="path", help="llama2, chatml or a .jinja file")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights and matmuls")
    parser.add_argument(
        "--quantization",
        choices=("none", *get_args(Quantization)),
        help="hold the base's projections in fewer bits; default: as the adapter's run did, else none",
    )
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        help="how rows are read; default: as the adapter's run did, else by their columns",
    )
    add_columns_argument(parser)
    parser.add_argument("--split", default="train", help="of a folder or data set; or some rows, as train[:100]")
    parser.add_argument(
        "--prompt-style", choices=("stanford", "chat"), help="how alpaca rows are written; default: as the run did"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer; default 256")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="prompts answered, or rows measured, together; default 8"
    )
