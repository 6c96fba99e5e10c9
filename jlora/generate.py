"""`python -m jlora.generate`: answers of a base, with or without an adapter, to prompts or in a chat."""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jlora import cli
from jlora.cli import add_model_arguments, open_model
from jlora.config import DataSection
from jlora.data.prompts import encode_prompt
from jlora.data.rows import BadRow, Row, read_rows
from jlora.errors import ConfigError, DataError
from jlora.hf.pretrained import Pretrained
from jlora.inference.generate import Sampling, generate
from jlora.model import attention
from jlora.model.sharding import one_device_mesh


def read_prompts(args: argparse.Namespace, format: str) -> list[Row]:
    """Rows to answer: the one on the command line, or a file's."""
    if args.prompts:
        rows = []
        for row in read_rows(args.prompts, "train"):
            if isinstance(row.value, BadRow) or not isinstance(row.value, dict):
                reason = row.value.message if isinstance(row.value, BadRow) else "not a JSON object"
                raise DataError(f"{row.where}: {reason}; mend it")
            rows.append(row)
        if not rows:
            raise DataError(f"{args.prompts}: holds no prompt")
        return rows
    if format == "sharegpt":
        return [Row("--prompt", {"conversations": [{"from": "human", "value": args.prompt}]})]
    if format == "messages":
        return [Row("--prompt", {"messages": [{"role": "user", "content": args.prompt}]})]
    return [Row("--prompt", {{"alpaca": "instruction", "text": "text"}.get(format, "prompt"): args.prompt})]


def answer_rows(args: argparse.Namespace, run: Any, section: DataSection, pretrained: Pretrained) -> None:
    """Answer prompts in batches and print them in order."""
    rows, encoded = [], []
    for row in read_prompts(args, section.format):
        rows.append(row.value)
        try:
            encoded.append(encode_prompt(pretrained.tokenizer, row.value, format=section.format, prompt=section.prompt))
        except BadRow as bad:
            raise DataError(f"{row.where}: {bad.message} (format {section.format}); mend it, or set --format") from None
    for start in range(0, len(rows), args.batch_size):
        *_, texts = run(encoded[start : start + args.batch_size], seed=args.seed + start)
        for row, ids in zip(rows[start : start + args.batch_size], texts, strict=True):
            text = pretrained.tokenizer.decode(ids)
            if args.json:
                ended = len(ids) < args.max_new_tokens
                cli.print_json({"prompt": row, "text": text, "tokens": len(ids), "ended": ended})
            else:
                if len(rows) > 1:
                    print(f"--- {json.dumps(row, ensure_ascii=False)}")
                print(text, flush=True)


def chat(args: argparse.Namespace, run: Any, section: DataSection, pretrained: Pretrained) -> None:
    """A conversation on the terminal, by the chat template; without one, single alpaca instructions."""
    single = pretrained.tokenizer.chat_template is None
    if single and section.format != "alpaca":
        raise ConfigError("--chat needs a chat template; the tokenizer has none, so set --chat-template")
    turns: list[dict[str, str]] = []
    if not args.quiet:
        print("An empty line or Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        except UnicodeDecodeError:
            raise DataError("stdin: not valid UTF-8") from None
        if not text:
            break
        turns.append({"role": "user", "content": text})
        row = {"instruction": text} if single else {"messages": turns}
        format = "alpaca" if single else "messages"
        try:
            ids = encode_prompt(pretrained.tokenizer, row, format=format, prompt=section.prompt)
        except BadRow as bad:
            raise DataError(f"turn {len(turns)}: {bad.message}") from None
        shown = ""
        for texts in run([ids], seed=args.seed + len(turns)):
            whole = pretrained.tokenizer.decode(texts[0])
            # A character cut in two decodes to U+FFFD until its other bytes are there.
            if whole.startswith(shown) and not whole.endswith("�"):
                print(whole[len(shown) :], end="", flush=True)
                shown = whole
        print(whole[len(shown) :] if whole.startswith(shown) else "")
        if whole.strip():
            turns.append({"role": "assistant", "content": whole})
        else:  # a turn without an answer is no part of a conversation
            turns.pop()


def main() -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m jlora.generate", description="Generate text.")
    add_model_arguments(parser, "completion")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text, or the instruction where the format is alpaca")
    what.add_argument("--prompts", metavar="FILE", help="rows to answer, in the format of the training data")
    what.add_argument("--chat", action="store_true", help="talk on the terminal")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts answered together")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt")
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
        mesh = one_device_mesh()
        with jax.set_mesh(mesh):
            pretrained, adapter, dtype, section = open_model(args, mesh)
            if not args.quiet and not args.json:
                print(f"format {section.format}, prompt style {section.prompt}", file=sys.stderr)
            run = partial(
                generate,
                pretrained,
                adapter,
                kernel=attention.reference,  # of few queries and many keys; kernels want as many of both
                dtype=dtype,
                max_new_tokens=args.max_new_tokens,
                sampling=Sampling(args.temperature, args.top_p),
            )
            (chat if args.chat else answer_rows)(args, run, section, pretrained)

    cli.run(body)


if __name__ == "__main__":
    main()
