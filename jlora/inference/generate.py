"""`python -m jlora.generate`: text out of a base, with or without an adapter.

A jitted prefill fills a key/value cache with a batch of left-padded prompts; a jitted loop decodes until
every row has ended.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jlora import attention, cli, quant
from jlora.adapter import Adapter
from jlora.config import DataSection, MeshSection, Quantization
from jlora.errors import ConfigError, DataError
from jlora.model import Cache, Decoder, empty_cache
from jlora.precision import products_in
from jlora.pretrained import Opened, Pretrained, load_pretrained, open_adapter, open_pretrained, run_config
from jlora.prompts import FORMATS, BadRow, encode_prompt
from jlora.rows import Row, read_rows
from jlora.sharding import make_mesh

# Prompts are padded to multiples of this, so that few lengths are ever compiled.
LENGTH_STEP = 32
STREAM_TOKENS = 8


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature 0 takes the likeliest."""

    temperature: float
    top_p: float


@dataclass(frozen=True)
class Decoding:
    """Where a batch stands: [B] each but the cache, `out` [B max_new_tokens] and the scalars."""

    cache: Cache
    last: Array
    lengths: Array
    ended: Array
    out: Array
    num_out: Array
    key: Array


jax.tree_util.register_dataclass(
    Decoding,
    data_fields=["cache", "last", "lengths", "ended", "out", "num_out", "key"],
    meta_fields=[],
)


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Array:
    """One token id a row. Nucleus sampling (arXiv:1904.09751) keeps the likeliest tokens whose
    probabilities first add up to `top_p`."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1.0:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def _take(state: Decoding, logits: Array, stop_ids: Array, sampling: Sampling) -> Decoding:
    """Draw the next token of every row that has not ended, and write it down."""
    key, draw = jax.random.split(state.key)
    token = jnp.where(state.ended, stop_ids[0], sample(logits, draw, sampling))
    ended = state.ended | jnp.isin(token, stop_ids)
    out = jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.num_out))
    return Decoding(state.cache, token, state.lengths, ended, out, state.num_out + 1, key)


@partial(jax.jit, static_argnames=("kernel", "sampling", "max_new_tokens", "dtype"))
def prefill(
    base: Decoder,
    adapter: Adapter,
    tokens: Array,
    lengths: Array,
    stop_ids: Array,
    key: Array,
    kernel: attention.Attention,
    sampling: Sampling,
    max_new_tokens: int,
    dtype: jnp.dtype,
) -> Decoding:
    """Run left-padded prompts [B T] of the given lengths through the model and draw the first token."""
    batch, width = tokens.shape
    positions = jnp.arange(width)[None] - (width - lengths[:, None])
    segments = (positions >= 0).astype(jnp.int32)
    cache = empty_cache(base.cfg, batch, width + max_new_tokens, dtype)
    with products_in(dtype):
        hidden, cache = base.hidden_cached(
            tokens, jnp.maximum(positions, 0), segments, cache, adapter=adapter, attention=kernel
        )
        logits = base.logits(hidden[:, -1:], adapter)[:, 0]
    state = Decoding(
        cache=cache,
        last=tokens[:, -1],
        lengths=lengths,
        ended=jnp.zeros(batch, bool),
        out=jnp.zeros((batch, max_new_tokens), jnp.int32),
        num_out=jnp.zeros((), jnp.int32),
        key=key,
    )
    return _take(state, logits, stop_ids, sampling)


@partial(jax.jit, static_argnames=("kernel", "sampling"), donate_argnames=("state",))
def decode(
    base: Decoder,
    adapter: Adapter,
    state: Decoding,
    until: Array,
    stop_ids: Array,
    kernel: attention.Attention,
    sampling: Sampling,
) -> Decoding:
    """Decode until `until` tokens are out or every row has ended."""

    def running(state: Decoding) -> Array:
        return (state.num_out < until) & ~state.ended.all()

    @products_in(state.cache.keys.dtype)
    def one(state: Decoding) -> Decoding:
        positions = (state.lengths + state.num_out - 1)[:, None]
        hidden, cache = base.hidden_cached(
            state.last[:, None],
            positions,
            jnp.ones_like(positions),
            state.cache,
            adapter=adapter,
            attention=kernel,
        )
        moved = Decoding(cache, state.last, state.lengths, state.ended, state.out, state.num_out, state.key)
        return _take(moved, base.logits(hidden, adapter)[:, 0], stop_ids, sampling)

    return jax.lax.while_loop(running, one, state)


def stop_tokens(pretrained: Pretrained | Opened) -> list[int]:
    """Ids that end a text: the tokenizer's EOS and what the model's own config names."""
    configured = pretrained.source.config.get("eos_token_id")
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({pretrained.tokenizer.eos_id, *(i for i in ids if isinstance(i, int))})


def generate(
    pretrained: Pretrained,
    adapter: Adapter,
    prompts: list[list[int]],
    *,
    kernel: attention.Attention,
    dtype: jnp.dtype,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    width: int | None = None,
) -> Iterator[list[list[int]]]:
    """Continuations of a batch of prompts, yielded as they grow; the last one yielded is whole.

    A stop token is left out. Rows do not influence each other.

    Args:
      width: tokens that each prompt is padded to, where it is not to follow from the longest; each is compiled for.
    """
    stops = stop_tokens(pretrained)
    width = width or -(-max(map(len, prompts)) // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
    lengths, stop_ids = jnp.asarray([len(ids) for ids in prompts]), jnp.asarray(stops, jnp.int32)
    state = prefill(
        pretrained.base,
        adapter,
        jnp.asarray(tokens),
        lengths,
        stop_ids,
        jax.random.key(seed),
        kernel,
        sampling,
        max_new_tokens,
        dtype,
    )
    while True:
        done = bool(state.ended.all()) or int(state.num_out) >= max_new_tokens
        yield [_until_stop(row, stops) for row in np.asarray(state.out)[:, : int(state.num_out)].tolist()]
        if done:
            return
        until = jnp.minimum(state.num_out + STREAM_TOKENS, max_new_tokens)
        state = decode(pretrained.base, adapter, state, until, stop_ids, kernel, sampling)


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]


def add_model_arguments(parser: argparse.ArgumentParser, format: str) -> None:
    """The arguments of every command that runs a base with an adapter; `format` is how it reads rows by itself."""
    parser.set_defaults(own_format=format)
    parser.add_argument("--base", required=True, help="Hugging Face folder, .gguf file or hub name")
    parser.add_argument("--adapter", help="run folder or PEFT LoRA folder")
    parser.add_argument("--tokenizer", help="another folder for the tokenizer")
    parser.add_argument("--chat-template", help="llama2, chatml or a .jinja file")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="of weights and matmuls")
    parser.add_argument(
        "--quantization",
        choices=("none", *get_args(Quantization)),
        help="hold the base's projections in fewer bits; default: as the adapter's run did, else none",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help=f"how rows are read; default: as the adapter's run did, else {format}",
    )
    parser.add_argument(
        "--prompt-style", choices=("stanford", "chat"), help="how alpaca rows are written; default: as the run did"
    )


def open_model(args: argparse.Namespace, mesh: jax.sharding.Mesh) -> tuple[Pretrained, Adapter, jnp.dtype, DataSection]:
    """Base, adapter, dtype and row format from the arguments, then from the adapter's run, then defaults."""
    run = run_config(args.adapter)
    chosen = {
        "format": args.format or (run.data.format if run else args.own_format),
        "prompt": args.prompt_style or (run.data.prompt if run else "stanford"),
        "chat_template": args.chat_template or (run.data.chat_template if run else None),
    }
    section = (run.data if run else DataSection(train="-")).model_copy(update=chosen)
    dtype = jnp.dtype(args.dtype or (run.model.dtype if run else "bfloat16"))
    tokenizer = args.tokenizer or (run.model.tokenizer if run else None)
    asked = args.quantization or (run.model.quantization if run else None)
    quantization = None if asked == "none" else asked
    quant.check_device(quantization, mesh.devices.flat[0])
    opened = open_pretrained(args.base, tokenizer, section.chat_template)
    pretrained = load_pretrained(opened, dtype, mesh, quantization)
    return pretrained, open_adapter(args.adapter, pretrained), dtype, section


def one_device_mesh() -> jax.sharding.Mesh:
    """Inference runs on the first device."""
    return make_mesh(MeshSection(data=1, fsdp=1, tensor=1), jax.devices()[:1])


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
