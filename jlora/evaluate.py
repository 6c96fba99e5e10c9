"""`jlora evaluate`: how good a base and its adapters are on held-out rows.

Mean loss over trained tokens, perplexity and token accuracy, or a loss on pairs; with `--generate` also answers,
scored against the rows' own, and with `--compare` those of several adapters side by side.
"""

import argparse

from jlora import cli
from jlora.errors import ConfigError, require_scores


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="jlora evaluate",
        description="Loss, perplexity and scored answers on rows.",
        examples=(
            "jlora evaluate --adapter runs/mine --data heldout.jsonl",
            "jlora evaluate --compare runs/a runs/b --data heldout.jsonl --generate 50 --html answers.html",
        ),
    )
    cli.add_model_arguments(parser)
    parser.add_argument("--data", type="path", required=True, help="rows: a file, folder or hub data set")
    parser.add_argument("--max-length", type=int, help="tokens in a row of a batch; default: as the run did")
    parser.add_argument(
        "--train-on", choices=("response", "last", "all"), help="tokens that count; default: as the run"
    )
    parser.add_argument("--on-bad-row", choices=("error", "skip"), help="default: as the run")
    parser.add_argument("--generate", type=int, metavar="N", help="answer the first N rows greedily, and score them")
    parser.add_argument(
        "--compare",
        type="path",
        nargs="+",
        metavar="ADAPTER",
        help="the base and these adapters, on the same rows and prompts",
    )
    parser.add_argument("--html", type="path", metavar="FILE", help="write the answers side by side as a page")
    cli.add_output_arguments(parser, json="one JSON object")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together, or that need what is not installed.

    Raises:
      ConfigError: naming them.
    """
    if args.batch_size < 1 or not (args.max_length is None or args.max_length >= 2):
        raise ConfigError("--max-length must be at least 2 and --batch-size at least 1")
    if args.max_new_tokens < 1 or (args.generate is not None and args.generate < 1):
        raise ConfigError("--generate and --max-new-tokens must be at least 1")
    if args.compare and args.adapter:
        raise ConfigError("--compare names all adapters itself; leave --adapter out")
    if args.html and args.generate is None:
        raise ConfigError("--html shows answers; say of how many rows with --generate N")
    if args.generate is not None:
        require_scores()


def main() -> None:
    """Command line."""
    args = make_parser().parse_args()

    def body() -> None:
        check_arguments(args)

        from jlora.evaluation.measure import evaluate

        found = evaluate(args)
        if args.json:
            cli.print_json(found)

    cli.run(body, flags=vars(args))


if __name__ == "__main__":
    main()
