"""`jlora COMMAND ...`, the same as `python -m jlora.COMMAND ...`."""

import importlib
import sys

from jlora import cli

# Command -> the module that holds it.
COMMANDS = {name: f"jlora.{name}" for name in ("train", "plan", "generate", "evaluate", "effort", "export", "report")}
COMMANDS |= {name: f"jlora.{name}.__main__" for name in ("data", "config")}


def main() -> None:
    """Run the command named first with the arguments behind it."""
    parser = cli.Parser(prog="jlora", description="LoRA fine-tuning of Llama models in JAX.")
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.add_argument("arguments", nargs="*", default=[], help="see jlora COMMAND --help")
    args = parser.parse_args(sys.argv[1:2])
    sys.argv = [f"jlora {args.command}", *sys.argv[2:]]
    importlib.import_module(COMMANDS[args.command]).main()


if __name__ == "__main__":
    main()
