"""A base model with its tokenizer, as every command opens it, and the adapter folder it is given."""

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import ValidationError

from jlora.config import Config, LoraSection, describe, read_yaml
from jlora.config.places import relocated
from jlora.data.tokens import Tokenizer, from_fast, load_tokenizer, with_template
from jlora.errors import ConfigError, ModelError
from jlora.files.paths import inside, require_own
from jlora.files.starts import places
from jlora.files.theirs import open_theirs
from jlora.hf.adapter_config import CONFIG
from jlora.hf.adapter_forms import scaled_to
from jlora.hf.architecture import parse_config
from jlora.hf.gguf import GGUFFile
from jlora.hf.gguf_header import gguf_in, is_gguf
from jlora.hf.grown import Grown
from jlora.hf.load import load_base
from jlora.hf.peft import ROWS, WEIGHTS, load_adapter, read_options
from jlora.hf.published import method_of
from jlora.hf.shapes import SHAPES
from jlora.hf.source import Source, open_safetensors, open_source, read_config, read_json, resolve
from jlora.hf.trained_tokens import run_with_ids
from jlora.model.adapter import Adapter, Lora, layer_scales, place_adapter, targets
from jlora.model.adapter_init import new_adapter
from jlora.model.config import ModelConfig, check_length
from jlora.model.llama import Decoder

# A tokenizer this much smaller than the embedding is another model's; padding of the vocabulary is not.
SMALLEST_VOCAB_SHARE = 0.75
# And so is one this much larger, whatever is asked for.
LARGEST_VOCAB_SHARE = 4.0


# How PEFT's names of an embedding or a head end.
TABLES_OF_PEFT = (".embed_tokens.weight", ".wte.weight", ".lm_head.weight", ".token_adapter.base_layer.weight")
MOST_DIGITS = 10


# What models drop at random in training by keys of their own.
DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop")

# Options that an adapter to start from must have as the config says.
COMPARED = (
    *("rank", "alpha", "targets", "use_rslora", "use_dora", "rank_pattern"),
    *("layers_to_transform", "modules_to_save", "trainable_tokens", "bias"),
)


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
        """The name that an adapter gives its base: the hub's, or where it lies, which another folder finds, too."""
        return str(Path(self.name).absolute()) if Path(self.name).exists() else self.name

    @cached_property
    def stops(self) -> list[int]:
        """Ids that end a text; see `stop_tokens`."""
        return stop_tokens(self.tokenizer, with_stops(self.source.config, self.path))


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
    opened: Opened, dtype: jnp.dtype, mesh: jax.sharding.Mesh, quantization: str | None = None
) -> Pretrained:
    """Read the weights, quantising the projections on the way where asked to.

    Raises:
      ModelError: see `jlora.hf.load.load_base`.
      ConfigError: blocks of quantised weights do not divide over the mesh.
    """
    base, base_hash = load_base(opened.source, opened.name, dtype, mesh, quantization)
    return Pretrained(opened.name, opened.path, opened.source, base, base_hash, opened.tokenizer)


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


def embedding_rows(folder: Path) -> int:
    """Rows of the embedding that a PEFT folder was trained with, as far as its tensors' file tells; else 0.

    They are those of the embedding or head that it holds, or noted, where the base's own were not enough.
    """
    file = inside(folder, WEIGHTS)
    if not file.is_file():
        return 0  # what is wrong with the folder is told by whoever reads the tensors
    with open_safetensors(file) as tensors:
        noted = (tensors.metadata() or {}).get(ROWS, "")
        tables = [name for name in tensors.keys() if name.endswith(TABLES_OF_PEFT)]
        held = [shape[0] for name in tables if len(shape := tensors.get_slice(name).get_shape()) == 2]
    return max([0, *held, *([int(noted)] if noted.isdecimal() and len(noted) < MOST_DIGITS else [])])


def adapter_digest(folder: str) -> str:
    """SHA-256 of the file of an adapter's tensors, which was read already."""
    with open_theirs(inside(find_adapter(folder), WEIGHTS)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_adapter(folder: str | None, pretrained: Pretrained) -> Adapter:
    """The adapter for inference; empty without a folder."""
    if folder is None:
        return {}
    return load_adapter(find_adapter(folder), pretrained.base.cfg, pretrained.base_hash, 0.0, pretrained.source)


def run_config(folder: str | Path | None) -> Config | None:
    """The resolved config of the run that `folder` is, or lies in; None where there is none.

    Its relative paths lead to where they led when it was trained, unless there is something here that they lead to.

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
                return relocated(Config.model_validate(read_yaml(file)), places(candidate))
            except (OSError, ValueError) as error:
                said = describe(error) if isinstance(error, ValidationError) else " ".join(str(error).split())
                raise ModelError(f"{file}: not the config of a run ({said})") from None
    return None


def base_of(adapter: str | None) -> str:
    """The base that an adapter was trained on, as its run or its PEFT folder names it.

    Raises:
      ConfigError: without an adapter.
      ModelError: it names none.
    """
    if adapter is None:
        raise ConfigError("name a base with --base, or an adapter with --adapter, which knows its own")
    run = run_config(adapter)
    where = find_adapter(adapter) / CONFIG
    base = run.model.path if run else read_json(where).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{where}: names no base; give it with --base")
    return base


def first_adapter(cfg: Config, pretrained: Pretrained, mesh: Mesh) -> Adapter:
    """The adapter that a run begins with, laid out over `mesh`: fresh or `lora.init_from`; none for full fine-tuning.

    Raises:
      ModelError: the adapter of `lora.init_from` is not as the config says.
    """
    if cfg.method == "full":
        return {}
    model = pretrained.base.cfg
    cfg = with_ids(cfg, pretrained)
    if cfg.lora.init_from is None:
        return place_adapter(new_adapter(cfg.lora, model, cfg.training.seed, pretrained.base), model, mesh)
    folder = find_adapter(cfg.lora.init_from)
    theirs = read_options(folder, model, pretrained.source)
    own = targets(theirs, model)
    if any(theirs.layers(name) != theirs.layers(own[0]) for name in own):
        on = "; ".join(f"{name} on {', '.join(map(str, theirs.layers(name)))}" for name in own)
        raise ModelError(
            f"{folder}: the adapter's projections are on different layers ({on}), which a config cannot say; "
            "start from another adapter, or merge this one into its base"
        )
    tables = theirs.token_rows(model.tie_word_embeddings)
    if tables and (len({*tables.values()}) > 1 or len(tables) < 2 - model.tie_word_embeddings):
        raise ModelError(
            f"{folder}: the adapter trains other rows of the embedding than of the head, which a config cannot say; "
            "start from another adapter, or merge this one into its base"
        )
    for key in COMPARED:
        found, ours = (_compared(section, key, model) for section in (theirs, cfg.lora))
        if found != ours:
            name = "target_modules" if key == "targets" else key
            value = json.dumps(found)
            raise ModelError(
                f"{folder}: the adapter has {name}={value}, the config {json.dumps(ours)}; set lora.{name}={value}"
            )
    adapter = load_adapter(folder, model, pretrained.base_hash, cfg.lora.dropout, pretrained.source)
    scaled = {  # what alphas differ in is made up for by B
        name: scaled_to(part, layer_scales(cfg.lora, name, model)) if isinstance(part, Lora) else part
        for name, part in adapter.items()
    }
    return place_adapter(scaled, model, mesh)


def _compared(section: LoraSection, key: str, model: ModelConfig) -> Any:
    """An option in the one form that means it."""
    value = targets(section, model) if key == "targets" else getattr(section, key)
    if key == "layers_to_transform" and value is not None:
        return None if {*range(model.num_hidden_layers)} <= {*value} else sorted(set(value))
    if key == "trainable_tokens":
        return list(section.token_rows(model.tie_word_embeddings).get("embed_tokens", ()))
    return sorted(value) if key == "modules_to_save" else value


def make_reference(cfg: Config, pretrained: Pretrained, mesh: Mesh) -> Adapter | None:
    """The adapter of the model that an objective on pairs compares with; None where that is the bare base.

    It is the one that training begins with: as TRL, a policy that starts from an adapter is compared with it.
    """
    fresh = cfg.lora.init_from is None  # its B is zero
    return None if fresh or cfg.objective.name in ("sft", "orpo") else first_adapter(cfg, pretrained, mesh)


def model_shape(path: str) -> ModelConfig:
    """Shape of a named size, or of the base at `path`; no weight is read."""
    if path not in SHAPES:
        local = resolve(path, weights=False)
        return open_source(local, path).model if Path(path).exists() else read_config(local, path)[1]
    return parse_config(SHAPES[path], path)


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
