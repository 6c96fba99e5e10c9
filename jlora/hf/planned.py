"""The base of a run as a plan takes it: its shape, and the rows that are trained, with no weight read."""

from dataclasses import replace
from pathlib import Path

from jlora.config import Config
from jlora.data.tokens import Tokenizer
from jlora.hf.architecture import parse_config
from jlora.hf.pretrained import fitting_tokenizer
from jlora.hf.shapes import SHAPES
from jlora.hf.source import open_source, read_config, resolve
from jlora.hf.trained_tokens import run_with_ids
from jlora.model.config import ModelConfig


def model_shape(path: str) -> ModelConfig:
    """Shape of a named size, or of the base at `path`; no weight is read."""
    if path not in SHAPES:
        local = resolve(path, weights=False)
        return open_source(local, path).model if Path(path).exists() else read_config(local, path)[1]
    return parse_config(SHAPES[path], path)


def shape_of(cfg: Config) -> ModelConfig:
    """Shape of a run's base, with the rows that `model.resize_embeddings` gives it; no weight is read.

    Raises:
      ModelError: as `open_pretrained`.
    """
    model = model_shape(cfg.model.path)
    return replace(model, vocab_size=_rows(_planned_tokenizer(cfg, model), model))


def to_plan(cfg: Config) -> Config:
    """A run's config with `lora.trainable_tokens` as ids, for who opens no base.

    Raises:
      ModelError: as `open_pretrained`. ConfigError: see `jlora.hf.trained_tokens`.
    """
    if not cfg.lora.trainable_tokens:
        return cfg
    model = model_shape(cfg.model.path)
    tokenizer = _planned_tokenizer(cfg, model)
    return run_with_ids(cfg, tokenizer, model.vocab_size, _rows(tokenizer, model))


def _rows(tokenizer: Tokenizer | None, model: ModelConfig) -> int:
    """Rows of the embedding that the tokenizer is for."""
    return model.vocab_size if tokenizer is None else tokenizer.limit or model.vocab_size


def _planned_tokenizer(cfg: Config, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a run whose embedding it has a say in; None where there is none, as of a named size alone."""
    path, needed = cfg.model.tokenizer, cfg.model.resize_embeddings or cfg.lora.trainable_tokens
    if not needed or (path is None and cfg.model.path in SHAPES):
        return None
    where = path or str(resolve(cfg.model.path, weights=False))
    how = cfg.data.chat_template, model.vocab_size, cfg.model.resize_embeddings
    return fitting_tokenizer(cfg.model.path, where, *how)
