"""`jlora generate`: answers of a base, with or without an adapter, to prompts or in a chat."""

import math
from pathlib import Path

from jlora import cli
from jlora.errors import ConfigError, DataError


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora generate",
        description="Generate text.",
        examples=(
            'jlora generate --adapter runs/mine --prompt "Write a review of a kettle."',
            "jlora generate --base meta-llama/Llama-2-7b-chat-hf --chat",
        ),
    )
    cli.add_model_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text, or the instruction where the format is alpaca")
    what.add_argument(
        "--prompts", type="path", metavar="FILE", help="rows to answer, in the format of the training data"
    )
    what.add_argument("--chat", action="store_true", help="talk on the terminal")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_output_arguments(parser, json="one JSON object a prompt")
    args = parser.parse_args()

    def body() -> None:
        if args.max_new_tokens < 1 or args.batch_size < 1:
            raise ConfigError("--max-new-tokens and --batch-size must be at least 1")
        if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
            raise ConfigError("--temperature must be finite and not negative, and --top-p lies in (0, 1]")
        if not 0 <= args.seed < 2**31:
            raise ConfigError("--seed must be at least 0 and less than 2147483648")
        if args.chat and args.json:
            raise ConfigError("--json goes with --prompt or --prompts, not with --chat")
        if args.prompts and not Path(args.prompts).is_file():
            raise DataError(f"{args.prompts}: no such file")

        from jlora.inference.prompting import prompted

        prompted(args)

    cli.run(body, flags=vars(args))


if __name__ == "__main__":
    main()
