"""A base model with its tokenizer, as every command opens it."""

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.config import Config
from jlora.data.tokens import Tokenizer, from_fast, load_tokenizer, with_template
from jlora.errors import ModelError
from jlora.files.paths import inside
from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_header import gguf_in, is_gguf
from jlora.hf.grown import Grown
from jlora.hf.load import load_base
from jlora.hf.published import method_of
from jlora.hf.source import Source, open_source, read_config, read_json, resolve
from jlora.hf.trained_tokens import run_with_ids
from jlora.model.config import ModelConfig, check_length
from jlora.model.llama import Decoder

# A tokenizer this much smaller than the embedding is another model's; padding of the vocabulary is not.
SMALLEST_VOCAB_SHARE = 0.75
# And so is one this much larger, whatever is asked for.
LARGEST_VOCAB_SHARE = 4.0


# What models drop at random in training by keys of their own.
DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")


@dataclass(frozen=True)
class Opened:
    """A base with its tokenizer, found to fit each other; no weight is read yet.

    Attributes:
      name: the base as the user gave it.
      path: where it lies.
    """

    name: str
    path: Path
    source: Source
    tokenizer: Tokenizer

    @property
    def model(self) -> ModelConfig:
        """Shape and numerics of the base."""
        return self.source.model


@dataclass(frozen=True)
class Pretrained:
    """A base on the devices, with what it came from; `name` and `path` as in `Opened`."""

    name: str
    path: Path
    source: Source
    base: Decoder
    base_hash: str
    tokenizer: Tokenizer

    @property
    def lasting_name(self) -> str:
        """The name that an adapter gives its base; see `lasting_name`."""
        return lasting_name(self.name)

    @cached_property
    def stops(self) -> list[int]:
        """Ids that end a text; see `stop_tokens`."""
        return stop_tokens(self.tokenizer, with_stops(self.source.config, self.path))


def lasting_name(name: str) -> str:
    """A base's name on the hub, or where it lies, which another folder finds, too."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def with_ids(cfg: Config, opened: Opened | Pretrained) -> Config:
    """A run's config with `lora.trainable_tokens` as ids; see `jlora.hf.trained_tokens`."""
    rows = opened.source.model.vocab_size
    kept = opened.source.kept if isinstance(opened.source, Grown) else rows
    return run_with_ids(cfg, opened.tokenizer, kept, rows)


def open_pretrained(
    path: str, tokenizer_path: str | None, chat_template: str | None, resize: bool = False, rows: int = 0
) -> Opened:
    """Open base and tokenizer.

    Args:
      resize: give the embedding rows for all tokens of the tokenizer (`model.resize_embeddings`).
      rows: give it so many at least, as an adapter was trained with.

    Raises:
      ModelError: see `jlora.hf.source`; or the tokenizer's vocabulary is larger than the embedding, or far smaller.
        Tokens that were added to it may be beyond; a text that has one is refused where it is encoded.
    """
    local = resolve(path)
    source = open_source(local, path)
    where = tokenizer_path or str(local)
    tokenizer = fitting_tokenizer(path, where, chat_template, source.model.vocab_size, resize, rows)
    if tokenizer.limit is not None and tokenizer.limit > source.model.vocab_size:
        source = Grown(source, tokenizer.limit)
    return Opened(path, local, source, tokenizer)


def open_base(cfg: Config) -> Opened:
    """The base and tokenizer of a run.

    Raises:
      ModelError: as `open_pretrained`.
    """
    base = cfg.model
    return open_pretrained(base.path, base.tokenizer, cfg.data.chat_template, base.resize_embeddings)


def tokenizer_of(
    path: str, tokenizer_path: str | None, chat_template: str | None, resize: bool = False
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a base, and the base's config with all its stop tokens; no weights are downloaded for it.

    Raises:
      ModelError: as `open_pretrained`.
    """
    local = resolve(path, weights=False)
    config, model = read_config(local, path)
    tokenizer = fitting_tokenizer(path, tokenizer_path or str(local), chat_template, model.vocab_size, resize)
    return tokenizer, with_stops(config, local)


def fitting_tokenizer(
    path: str, tokenizer_path: str, chat_template: str | None, vocab_size: int, resize: bool, rows: int = 0
) -> Tokenizer:
    """The tokenizer, once it fits a base of `vocab_size` tokens; its `limit` is what the embedding is to have."""
    tokenizer = open_tokenizer(tokenizer_path, chat_template)
    wanted = max(vocab_size, rows, tokenizer.vocab_size if resize else 0)
    says = f"{tokenizer_path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model {path} has {vocab_size}"
    if tokenizer.vocab_size < SMALLEST_VOCAB_SHARE * vocab_size or wanted > LARGEST_VOCAB_SHARE * vocab_size:
        raise ModelError(f"{says}; give the tokenizer that belongs to the model (model.tokenizer)")
    if tokenizer.own_size > wanted:
        raise ModelError(
            f"{says}; give the tokenizer that belongs to the model (model.tokenizer), or set "
            f"model.resize_embeddings=true, which gives a row to the {tokenizer.outside(vocab_size)} that have none"
        )
    return replace(tokenizer, limit=wanted)


def warn_of_length(source: Source, what: str, length: int) -> None:
    """Say on stderr that `what` has more tokens than the base has positions: it is computed, but not well.

    Raises:
      ConfigError: the base has no such positions at all, since it learned each.
    """
    check_length(source.model, length, what.removesuffix(f" of {length} tokens"))
    limit = source.config.get("max_position_embeddings")
    if isinstance(limit, int) and length > limit:
        print(f"warning: {what} is beyond the base's {limit} positions", file=sys.stderr)


def warn_of_dropout(source: Source) -> None:
    """Say on stderr that the config drops attention at random in training, which jlora does not."""
    for key in DROPOUTS:
        if dropout := source.config.get(key):
            print(
                f"warning: {key}={dropout} of the base's config.json is not applied; lora.dropout is", file=sys.stderr
            )


def warn_of_dequantising(source: Source, quantization: str | None) -> None:
    """Say on stderr that the weights of a base that was published quantised take the memory of plain ones."""
    method = method_of(source.config, "config.json")
    if method and quantization is None:
        print(
            f"warning: the base was published quantised ({method}), and its weights are held in model.dtype; to hold "
            "them in 4 bits set model.quantization=nf4, which keeps the codes of bitsandbytes' nf4 as they are",
            file=sys.stderr,
        )


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def open_tokenizer(path: str, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a folder, a hub repository or a GGUF file.

    Raises:
      ModelError, ConfigError: see `jlora.data.tokens.load_tokenizer`.
    """
    local = Path(path)
    if local.is_dir() and not holds_tokenizer(local):
        local = gguf_in(local) or local
    if local.suffix.lower() != ".gguf" and not is_gguf(local):
        return load_tokenizer(path, chat_template)
    hf = GGUFFile(local).tokenizer()
    return with_template(from_fast(hf, hf.backend_tokenizer.to_str().encode(), (), path), chat_template, path)


def load_pretrained(
    opened: Opened,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
    quantization: str | None = None,
    sizes: tuple[int, ...] | None = None,
    coded: bool = False,
) -> Pretrained:
    """Read the weights, quantising the projections on the way where asked to.

    Args:
      sizes, coded: as of `abstract_decoder`.

    Raises:
      ModelError: see `jlora.hf.load.load_base`.
      ConfigError: blocks of quantised weights do not divide over the mesh.
    """
    base, base_hash = load_base(opened.source, opened.name, dtype, mesh, quantization, sizes, coded)
    return Pretrained(opened.name, opened.path, opened.source, base, base_hash, opened.tokenizer)


def with_stops(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A base's config with the ids of its generation_config.json in `eos_token_id`, too: chat models name more there.

    Raises:
      ModelError: that file cannot be read.
    """
    if not folder.is_dir() or not (file := inside(folder, "generation_config.json")).is_file():
        return config
    also = read_json(file).get("eos_token_id")
    return config | {"eos_token_id": [*_listed(config.get("eos_token_id")), *_listed(also)]}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def stop_tokens(tokenizer: Tokenizer, config: dict[str, Any]) -> list[int]:
    """Ids that end a text: the tokenizer's EOS and what the model's own configs name, see `with_stops`."""
    return sorted({tokenizer.eos_id, *(i for i in _listed(config.get("eos_token_id")) if isinstance(i, int))})
