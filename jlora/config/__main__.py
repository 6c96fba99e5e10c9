"""`jlora config`: the configuration reference, its JSON schema, or another tool's file converted."""

import sys
from dataclasses import asdict
from pathlib import Path

from jlora import cli
from jlora.config.convert.convert import convert, describe_notes
from jlora.config.reference import json_schema, reference
from jlora.errors import ConfigError
from jlora.files.atomic import write_text


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora config",
        description="Print the configuration reference as Markdown, its JSON schema, or another tool's file converted.",
        examples=("jlora config --from axolotl.yaml --out run.yaml", "jlora config --schema --out jlora.schema.json"),
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")
    parser.add_argument(
        "--from", type="path", dest="source", metavar="FILE", help="convert an Axolotl or torchtune LoRA YAML"
    )
    parser.add_argument("--devices", type=int, default=1, help="devices FILE ran on: its batch is each one's")
    parser.add_argument("--out", type="path", metavar="FILE", help="write there instead of stdout")
    parser.add_argument("--json", action="store_true", help="with --from: print config and notes as JSON on stdout")
    args = parser.parse_args()
    if (args.schema or args.json) and bool(args.source) == args.schema:
        parser.error("--schema stands alone, and --json goes with --from")
    if args.devices < 1:
        parser.error(f"--devices {args.devices}: at least one")

    def body() -> None:
        if not args.source:
            write(json_schema() if args.schema else reference())
            return
        peer, text, notes = convert(args.source, args.devices)
        head = [f"# From {peer}'s {args.source}, for {args.devices} device(s).", *describe_notes(notes)]
        if args.out or not args.json:
            write(head[0] + "\n" + text)
        if args.json:
            cli.print_json({"peer": peer, "config": text, "notes": [asdict(note) for note in notes]})
        else:
            print("\n".join(head[1:] or ["every key has its counterpart"]), file=sys.stderr)

    def write(text: str) -> None:
        if not args.out:
            print(text, end="")
            return
        try:
            write_text(Path(args.out), text)
        except OSError as error:
            raise ConfigError(f"--out {args.out}: cannot be written ({error.strerror}); name another") from None

    cli.run(body)


if __name__ == "__main__":
    main()
