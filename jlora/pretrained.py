"""A base model with its tokenizer, as every command opens it, and the adapter folder it is given."""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import yaml
from pydantic import ValidationError

from jlora.adapter import Adapter
from jlora.config import Config, describe
from jlora.errors import ModelError
from jlora.hf.architecture import parse_config
from jlora.hf.base import Source, open_source, resolve
from jlora.hf.load import load_base
from jlora.hf.peft import CONFIG, load_adapter
from jlora.model import Decoder
from jlora.tokens import Tokenizer, load_tokenizer

# A tokenizer this much smaller than the embedding is another model's; padding of the vocabulary is not.
SMALLEST_VOCAB_SHARE = 0.75


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


@dataclass(frozen=True)
class Pretrained:
    """A base on the devices, with what it came from."""

    path: Path
    source: Source
    base: Decoder
    base_hash: str
    tokenizer: Tokenizer


def open_pretrained(path: str, tokenizer_path: str | None, chat_template: str | None) -> Opened:
    """Open base and tokenizer.

    Raises:
      ModelError: see `jlora.hf.base`; or the tokenizer has ids beyond the embedding, or far too few.
    """
    local = resolve(path)
    source = open_source(local)
    tokenizer = load_tokenizer(tokenizer_path or str(local), chat_template)
    vocab_size = parse_config(source.config, path).vocab_size
    if not SMALLEST_VOCAB_SHARE * vocab_size <= tokenizer.vocab_size <= vocab_size:
        raise ModelError(
            f"{tokenizer_path or path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model "
            f"{path} has {vocab_size}; give the tokenizer that belongs to the model (model.tokenizer)"
        )
    return Opened(path, local, source, tokenizer)


def load_pretrained(
    opened: Opened, dtype: jnp.dtype, mesh: jax.sharding.Mesh, quantization: str | None = None
) -> Pretrained:
    """Read the weights, quantising the projections on the way where asked to.

    Raises:
      ModelError: see `jlora.hf.load.load_base`.
      ConfigError: blocks of quantised weights do not divide over the mesh.
    """
    base, base_hash = load_base(opened.source, opened.name, dtype, mesh, quantization)
    return Pretrained(opened.path, opened.source, base, base_hash, opened.tokenizer)


def find_adapter(folder: str) -> Path:
    """The PEFT folder in a run folder, or `folder` itself.

    Raises:
      ModelError: neither.
    """
    for candidate in (Path(folder), Path(folder) / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise ModelError(f"{folder}: neither a PEFT adapter folder nor a run folder with a finished adapter/")


def open_adapter(folder: str | None, pretrained: Pretrained) -> Adapter:
    """The adapter for inference; empty without a folder."""
    if folder is None:
        return {}
    return load_adapter(find_adapter(folder), pretrained.base.cfg, pretrained.base_hash, dropout=0.0)


def run_config(folder: str | Path | None) -> Config | None:
    """The resolved config of the run that `folder` is, or lies in; None where there is none."""
    if folder is None:
        return None
    for candidate in (Path(folder), Path(folder).parent):
        file = candidate / "config.yaml"
        if file.is_file() and (candidate == Path(folder) or (candidate / "checkpoints").is_dir()):
            try:
                return Config.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
            except ValidationError as error:
                raise ModelError(f"{file}: not the config of a run ({describe(error)})") from None
            except (ValueError, yaml.YAMLError) as error:
                raise ModelError(f"{file}: not the config of a run ({' '.join(str(error).split())})") from None
    return None
