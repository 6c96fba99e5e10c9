"""`jlora COMMAND ...`, the same as `python -m jlora.COMMAND ...`."""

import argparse
import importlib
import os
import sys
from typing import Any

import jlora
from jlora import cli
from jlora.errors import ConfigError

# Command -> the module that holds it.
COMMANDS = {name: f"jlora.{name}" for name in ("init", "train", "plan", "generate", "evaluate", "effort")}
COMMANDS |= {name: f"jlora.{name}" for name in ("export", "verify", "reproduce", "report", "runs")}
COMMANDS |= {name: f"jlora.{name}.__main__" for name in ("quickstart", "data", "config")}
PURPOSES = {
    "quickstart": "write a folder with rows, a config and a small base, for a first run",
    "init": "look at your rows and write a config for them",
    "data": "show rows as the model sees them, and check them",
    "plan": "say whether a run fits on hardware, how long it takes and what it costs",
    "train": "fine-tune, or resume from the last checkpoint",
    "generate": "answer prompts, or chat",
    "evaluate": "measure loss and answers on rows, also of several adapters",
    "export": "write an adapter for PEFT, or a whole checkpoint",
    "verify": "see whether a running server serves what was trained",
    "reproduce": "train an adapter anew, and compare it to the byte",
    "report": "draw the page of a run, or compare runs",
    "runs": "list runs with their figures",
    "effort": "find out whether fine-tuning pays, and how many rows it takes",
    "config": "print the config reference, or convert another tool's config",
}


def main() -> None:
    """Run the command named first with the arguments behind it."""
    commands = "\n".join(f"  {name:<10} {what}" for name, what in PURPOSES.items())
    parser = cli.Parser(
        prog="jlora",
        usage="jlora COMMAND ...",
        description="LoRA fine-tuning of language models in JAX.",
        epilog=f"commands:\n{commands}\n\njlora COMMAND --help says more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jlora {jlora.__version__}")
    parser.add_argument(
        "--completion", action=Completion, choices=("bash", "zsh", "fish"), help="print what makes a shell complete"
    )
    parser.add_argument("command", metavar="COMMAND", choices=tuple(PURPOSES), help=argparse.SUPPRESS)
    if len(sys.argv) == 1 and cli.COMPLETION not in os.environ:
        parser.print_help()
        parser.exit(ConfigError.exit_code)
    command = completed() or parser.parse_args(sys.argv[1 : 3 if sys.argv[1:2] == ["--completion"] else 2]).command
    sys.argv = [f"jlora {command}", *sys.argv[2:]]
    importlib.import_module(COMMANDS[command]).main()


class Completion(argparse.Action):
    """`eval "$(jlora --completion bash)"`: the shell then asks `jlora` itself what may follow."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Print it, and end."""
        import argcomplete

        print(argcomplete.shellcode(["jlora"], shell=values))
        parser.exit()


def completed() -> str | None:
    """The command whose arguments a shell asks for; its parser answers."""
    if cli.COMPLETION not in os.environ:
        return None
    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = line.split()
    if len(words) + line.endswith(" ") < 3 or words[1] not in COMMANDS:
        return None
    os.environ[cli.COMPLETION] = "2"
    return words[1]


if __name__ == "__main__":
    main()
