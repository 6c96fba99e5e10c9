"""A base model with its tokenizer, as every command opens it, and the adapter folder it is given."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from pydantic import ValidationError

from jlora.adapter import Adapter
from jlora.config import Config, describe, read_yaml
from jlora.errors import ModelError
from jlora.folders import require_own
from jlora.hf.architecture import parse_config
from jlora.hf.base import Source, open_source, resolve
from jlora.hf.load import load_base
from jlora.hf.peft import CONFIG, load_adapter, read_adapter_config
from jlora.initial import complete, new_adapter
from jlora.model import Decoder
from jlora.tokens import Tokenizer, load_tokenizer

# A tokenizer this much smaller than the embedding is another model's; padding of the vocabulary is not.
SMALLEST_VOCAB_SHARE = 0.75


# Options that an adapter to start from must have as the config says.
COMPARED = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "bias")


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
      ModelError: neither; or a run folder of links.
    """
    if (Path(folder) / CONFIG).is_file():
        return Path(folder)
    require_own(Path(folder), ModelError)
    if (Path(folder) / "adapter" / CONFIG).is_file():
        return Path(folder) / "adapter"
    raise ModelError(f"{folder}: neither a PEFT adapter folder nor a run folder with a finished adapter/")


def open_adapter(folder: str | None, pretrained: Pretrained) -> Adapter:
    """The adapter for inference; empty without a folder."""
    if folder is None:
        return {}
    return load_adapter(find_adapter(folder), pretrained.base.cfg, pretrained.base_hash, dropout=0.0)


def run_config(folder: str | Path | None) -> Config | None:
    """The resolved config of the run that `folder` is, or lies in; None where there is none.

    Raises:
      ModelError: it is no such config, or the run folder holds links.
    """
    if folder is None:
        return None
    for candidate in (Path(folder), Path(folder).parent):
        file = candidate / "config.yaml"
        if file.is_file() and (candidate == Path(folder) or (candidate / "checkpoints").is_dir()):
            require_own(candidate, ModelError)
            try:
                return Config.model_validate(read_yaml(file))
            except ValidationError as error:
                raise ModelError(f"{file}: not the config of a run ({describe(error)})") from None
            except (OSError, ValueError) as error:
                raise ModelError(f"{file}: not the config of a run ({' '.join(str(error).split())})") from None
    return None


def make_adapter(cfg: Config, pretrained: Pretrained) -> Adapter:
    """A fresh adapter, one read from `lora.init_from`, or none for full fine-tuning."""
    if cfg.method == "full":
        return {}
    model = pretrained.base.cfg
    if cfg.lora.init_from is None:
        seed = cfg.training.seed
        return complete(new_adapter(cfg.lora, model, seed), cfg.lora, pretrained.base, seed)
    folder = find_adapter(cfg.lora.init_from)
    theirs = read_adapter_config(folder)
    for key, ours in (
        ("rank", cfg.lora.rank),
        ("alpha", cfg.lora.alpha),
        ("targets", cfg.lora.targets),
        *((key, getattr(cfg.lora, key)) for key in COMPARED),
    ):
        if getattr(theirs, key) != ours:
            name = "target_modules" if key == "targets" else key
            value = json.dumps(getattr(theirs, key))
            raise ModelError(
                f"{folder}: the adapter has {name}={value}, the config {json.dumps(ours)}; set lora.{name}={value}"
            )
    return load_adapter(folder, model, pretrained.base_hash, cfg.lora.dropout)


def make_reference(cfg: Config, pretrained: Pretrained) -> Adapter | None:
    """The adapter of the model that an objective on pairs compares with; None where that is the bare base.

    It is the one that training begins with: as TRL, a policy that starts from an adapter is compared with it.
    """
    fresh = cfg.lora.init_from is None  # its B is zero
    return None if fresh or cfg.objective.name in ("sft", "orpo") else make_adapter(cfg, pretrained)
