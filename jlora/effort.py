"""`jlora effort --config C [key=value ...]`: does fine-tuning pay, on the user's own task?

The same held-out rows answered by the base with the bare instruction, with examples in the prompt, and after training
on more and more rows, by `jlora.train` itself; quality beside tokens, minutes and money: effort.json, effort.html.
What is done is kept in effort.json and not done again.
"""

import sys
from pathlib import Path

from jlora import cli
from jlora.config import load_config
from jlora.errors import ConfigError, require_scores
from jlora.runtime import xla


def numbers(text: str) -> list[int]:
    """`10,30,100` as numbers, each at least 1."""
    found = [int(part) for part in text.split(",")]
    if any(number < 1 for number in found):
        raise ValueError
    return found


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora effort",
        description="Effort against benefit of fine-tuning on your rows.",
        examples=(
            "jlora effort run.yaml --rows 10,100,1000",
            "jlora effort run.yaml --base base-a --base base-b --price 2.5",
        ),
    )
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--base",
        type="path",
        action="append",
        metavar="BASE",
        help="base model; repeat for more; default: model.path",
    )
    parser.add_argument("--rows", type=numbers, default="10,30,100,300,1000", metavar="N,N", help="rows to train on")
    parser.add_argument("--shots", type=numbers, default="3", metavar="N,N", help="examples in the prompt")
    parser.add_argument("--heldout", type=int, default=100, metavar="N", help="at most so many held-out rows")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts answered together")
    parser.add_argument("--price", type=float, help="dollars per device-hour; without it no cost is shown")
    cli.add_output_arguments(parser, json="print settings and results as one JSON object")
    args = parser.parse_intermixed_args()
    xla.use_huge_pages()

    def body() -> int:
        if min(args.heldout, args.max_new_tokens, args.batch_size) < 1:
            raise ConfigError("--heldout, --max-new-tokens and --batch-size must be at least 1")
        if args.price is not None and not 0 <= args.price < float("inf"):
            raise ConfigError("--price must be finite and not negative")
        require_scores()
        cfg = load_config(cli.config_file(args), args.overrides)

        from jlora.evaluation.effort import Options, effort
        from jlora.reports.effort import write_effort

        bases = list(dict.fromkeys(args.base or [cfg.model.path]))
        numbers = (args.rows, args.shots, args.heldout, args.max_new_tokens, args.batch_size, args.price)
        result, failures, stopped = effort(cfg, Options(bases, *numbers), args.quiet)
        if stopped:
            if not args.quiet:
                print("stopped and saved; run the same command again to resume", file=sys.stderr)
            return cli.PREEMPTED
        write_effort(Path(cfg.output_dir), result["settings"], result["results"])
        cli.show(args, result, lambda: print(f"report: {cfg.output_dir}/effort.html"))
        if failures:
            raise failures[0]
        return 0

    cli.run(body)


if __name__ == "__main__":
    main()
