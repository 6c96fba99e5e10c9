"""`jlora verify`: whether a running server serves what a run trained, and if not, which fault it is."""

from typing import Any

from jlora import cli
from jlora.errors import ConfigError, ModelError


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora verify",
        description="Ask a server with OpenAI's API for held-out rows of a run, and compare each token with what was "
        "trained. Rows go to the given URL and nowhere else. A key is read from OPENAI_API_KEY.",
        examples=(
            "jlora verify --endpoint http://127.0.0.1:8000/v1 --model mine --run runs/mine",
            "jlora verify --endpoint http://127.0.0.1:8080 --model mine.gguf --run runs/mine --html served.html",
        ),
    )
    parser.add_argument(
        "--endpoint", required=True, metavar="URL", help="of the server, such as http://127.0.0.1:8000/v1"
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="that the server has for what was trained")
    parser.add_argument("--run", type="path", required=True, metavar="DIR", help="run folder")
    parser.add_argument("--base", type="path", help="where the base lies, if no longer where the run had it")
    parser.add_argument(
        "--rows", type=int, default=8, metavar="N", help="rows to ask for, the longest among them; default 8"
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="tokens of an answer; default 32")
    parser.add_argument(
        "--bound",
        type=float,
        default=0.05,
        metavar="NATS",
        help="mean difference of log-probabilities that is allowed; default 0.05",
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="for all requests together; default 600"
    )
    parser.add_argument("--html", type="path", metavar="FILE", help="write the answers side by side as a page")
    cli.add_output_arguments(parser, json="one JSON object")
    args = parser.parse_args()

    def body() -> None:
        if args.rows < 1 or args.max_new_tokens < 1:
            raise ConfigError("--rows and --max-new-tokens must be at least 1")
        if not 0 < args.bound < 10 or not 0 < args.timeout <= 86400:
            raise ConfigError("--bound must be more than 0 and less than 10, and --timeout at most a day of seconds")
        from jlora.evaluation.serving import verify

        result = verify(args)
        cli.show(args, result, lambda: print_result(result))
        if not result["passed"]:
            said = "; ".join(fault["says"] for fault in result["faults"])
            raise ModelError(f"{args.endpoint}: {args.model} is not what {args.run} trained: {said}")

    cli.run(body, flags=vars(args))


def print_result(result: dict[str, Any]) -> None:
    """The figures, for people."""
    print(f"{result['model']} at {result['endpoint']}: {result['rows']} rows, {result['requests']} requests")
    if result["difference"] is not None:
        print(
            f"  {result['compared']} of {result['tokens']} tokens: {result['difference']:.4f} nats a token from what "
            f"was trained ({result['bound']:g} allowed), {result['difference_from_base']:.4f} from the base alone"
        )
        print(f"  {result['agreeing']:.1%} of the server's tokens are the trained model's own choice")
    if (loss := result["loss"]) is not None:
        kept = "" if loss["gain_kept"] is None else f": {loss['gain_kept']:.0%} of what training gained"
        print(
            f"  loss of the rows {loss['server']:.4f} by the server, {loss['trained']:.4f} as trained, "
            f"{loss['base']:.4f} of the base{kept}"
        )
    for note in result["notes"]:
        print(f"  note: {note}")
    if result["passed"]:
        print("  it serves what was trained")


if __name__ == "__main__":
    main()
