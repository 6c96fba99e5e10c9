"""What `jlora generate` does with a model: answer prompts in order, or talk."""

import argparse
import sys
from functools import partial
from typing import Any

import jax

from jlora.config import DataSection
from jlora.data.formats import Columns, rows_of
from jlora.data.prompts import encode_prompt, shown_prompt
from jlora.data.row import BadRow, Row
from jlora.errors import ConfigError, DataError
from jlora.files.atomic import strict_json
from jlora.files.text import clean
from jlora.hf.pretrained import Pretrained, warn_of_length
from jlora.inference.generate import Sampling, generate
from jlora.inference.model import open_model
from jlora.model.sharding import one_device_mesh

# What ends an answer among others that came to no end of its own, as on the pages.
CUT = " … cut here (--max-new-tokens)"


def read_prompts(args: argparse.Namespace, section: DataSection) -> list[Row]:
    """Rows to answer: the one on the command line, or a file's."""
    if args.prompts:
        rows = []
        for row in rows_of(args.prompts, section, Columns(section.format, section.columns, answered=False)):
            if isinstance(row.value, BadRow):
                raise DataError(f"{row.where}: {row.value.message}; fix it")
            rows.append(row)
        if not rows:
            raise DataError(f"{args.prompts}: holds no prompt")
        return rows
    return [Row("--prompt", row_of(args.prompt, section.format))]


def row_of(prompt: str, format: str) -> dict[str, Any]:
    """A text as a row without an answer; of alpaca it is the instruction."""
    if format == "sharegpt":
        return {"conversations": [{"from": "human", "value": prompt}]}
    if format == "messages":
        return {"messages": [{"role": "user", "content": prompt}]}
    return {{"alpaca": "instruction", "text": "text"}.get(format, "prompt"): prompt}


def prompted(args: argparse.Namespace) -> None:
    """Answer prompts in batches and print them in order, or talk.

    Raises:
      UserError: of base, adapter and prompts, as where they are read.
    """
    with jax.set_mesh(one_device_mesh()):
        model, section = open_model(args, args.prompts)
        if not args.quiet and not args.json:
            style = f", prompt style {section.prompt}" if section.format == "alpaca" else ""
            print(f"format {section.format}{style}", file=sys.stderr)
        sampling = Sampling(args.temperature, args.top_p)
        run = partial(generate, model, max_new_tokens=args.max_new_tokens, sampling=sampling)
        (chat if args.chat else answer_rows)(args, run, section, model.pretrained)


def answer_rows(args: argparse.Namespace, run: Any, section: DataSection, pretrained: Pretrained) -> None:
    """Answer prompts in batches and print them in order."""
    rows, encoded = [], []
    for row in read_prompts(args, section):
        rows.append(row.value)
        try:
            encoded.append(encode_prompt(pretrained.tokenizer, row.value, format=section.format, prompt=section.prompt))
        except BadRow as bad:
            raise DataError(f"{row.where}: {bad.message} (format {section.format}); fix it, or set --format") from None
    if not args.quiet:
        longest = max(map(len, encoded))
        warn_of_length(pretrained.source, f"a prompt of {longest} tokens", longest)
    for start in range(0, len(rows), args.batch_size):
        *_, texts = run(encoded[start : start + args.batch_size], seed=args.seed + start)
        for row, ids in zip(rows[start : start + args.batch_size], texts, strict=True):
            text = pretrained.tokenizer.decode(ids)
            if args.json:
                ended = len(ids) < args.max_new_tokens
                print(strict_json({"prompt": row, "text": text, "tokens": len(ids), "ended": ended}), flush=True)
            else:
                cut = len(ids) >= args.max_new_tokens
                if len(rows) > 1:
                    text = f"--- {shown_prompt(row, format=section.format)}\n{text}{CUT * cut}"
                print(clean(text) if sys.stdout.isatty() else text, flush=True)
                if cut and len(rows) == 1 and not args.quiet:
                    print(f"the answer is cut at --max-new-tokens {args.max_new_tokens}", file=sys.stderr)


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
        if not args.quiet:
            warn_of_length(pretrained.source, f"this conversation of {len(ids)} tokens", len(ids))
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
