"""`jlora init`: a config for rows and a base, with a reason beside each line, checked as `jlora data` checks it."""

import sys
from pathlib import Path
from typing import Any

from jlora import cli
from jlora.errors import ConfigError, DataError
from jlora.files.atomic import write_text


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora init",
        description="Look at your rows, and write a config to train on them.",
        examples=(
            "jlora init --data rows.jsonl --base meta-llama/Llama-2-7b-hf",
            "jlora init --data rows.csv --base base/ --out run.yaml",
        ),
    )
    parser.add_argument("--data", type="path", metavar="ROWS", help="file, folder or hub data set; asked for without")
    parser.add_argument("--base", type="path", help="Hugging Face folder, .gguf file or hub name")
    cli.add_old_name(parser, "--model", "base")
    parser.add_argument("--eval", type="path", metavar="ROWS", help="held-out rows; default: a share of --data")
    cli.add_columns_argument(parser)
    parser.add_argument("--out", type="path", metavar="FILE", help="config to write; default: named after the rows")
    cli.add_output_arguments(parser)
    args = parser.parse_args()

    def body() -> int:
        args.data = args.data or asked("Rows to train on (file, folder or hub data set)", "--data")
        args.base = args.base or asked("Base model (folder, .gguf file or hub name)", "--base")
        out = Path(args.out or f"{Path(args.data).stem}.yaml")
        if out.exists():
            raise ConfigError(f"--out {out}: is there already; name another, or remove it")

        from jlora.planning.proposal import propose

        text, seen = propose(args.data, args.base, args.eval, out.stem, args.columns)
        write_text(out, text)
        if not args.quiet:
            print_checks(seen.report, out)
        for sentence in seen.errors:
            print(f"error: {sentence}", file=sys.stderr)
        return DataError.exit_code if seen.errors else 0

    cli.run(body)


def asked(question: str, flag: str) -> str:
    """The answer on the terminal.

    Raises:
      ConfigError: there is no terminal, or no answer.
    """
    answer = ""
    if sys.stdin.isatty():
        try:
            answer = input(f"{question}: ").strip()
        except EOFError:
            print()
    if not answer:
        raise ConfigError(f"{flag} is missing; name it")
    return answer


def print_checks(report: dict[str, Any], out: Path) -> None:
    """What the rows are like, and how to go on."""
    rows = report["train"]
    print(
        f"{rows['rows']:,} rows, {rows['examples']:,} sequences to train on, of {rows['lengths']['min']:,} to "
        f"{rows['lengths']['max']:,} tokens; {report['steps']:,} optimizer steps"
    )
    for found in report["checks"]:
        if found["level"] != "error":
            print(f"{found['level']}: {found['sentence']}")
    print(f"wrote {out}; see the rows with: jlora data {out}\ntrain with: jlora train {out}")


if __name__ == "__main__":
    main()
