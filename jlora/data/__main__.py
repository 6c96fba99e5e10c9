"""`jlora data --config C`: the rows of a run as its model would see them, and what is wrong with them."""

import sys
from pathlib import Path

from jlora import cli
from jlora.config import load_config
from jlora.errors import ConfigError, DataError
from jlora.files.text import redact

ROWS = 5


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora data",
        description="A run's rows as its model sees them, and checks.",
        examples=("jlora data run.yaml", "jlora data run.yaml --rows 20 --html rows.html"),
    )
    cli.add_config_arguments(parser)
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help=f"rows shown; default {ROWS}")
    parser.add_argument("--html", type="path", metavar="FILE", help="write a page that opens offline")
    cli.add_output_arguments(parser, json="one JSON object")
    args = parser.parse_intermixed_args()

    def body() -> int:
        if args.rows < 0:
            raise ConfigError("--rows must be 0 or more")
        cfg = load_config(cli.config_file(args), args.overrides)

        from rich.console import Console

        from jlora.reports.data import look, print_report, render
        from jlora.reports.page import write_page

        seen = look(cfg, args.rows)
        if args.html:
            write_page(Path(args.html), render(Path(args.config).stem, seen.report, seen.rows))
        if args.json:
            cli.print_json({"ok": not seen.errors, **seen.report, "first_rows": [row.as_json() for row in seen.rows]})
        elif not args.quiet:
            print_report(seen.report, seen.rows, Console())
        for sentence in seen.errors:
            print(f"error: {redact(sentence)}", file=sys.stderr)
        return DataError.exit_code if seen.errors else 0

    cli.run(body)


if __name__ == "__main__":
    main()
