"""Adapters that are there already: the folder, run and base of each, and one as the start or reference of a run."""

import hashlib
import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from pydantic import ValidationError

from jlora.config import Config, LoraSection, describe, read_yaml
from jlora.config.places import relocated
from jlora.errors import ConfigError, ModelError
from jlora.files.paths import beside, inside, require_own
from jlora.files.starts import places
from jlora.files.theirs import open_theirs
from jlora.hf.adapter_config import CONFIG
from jlora.hf.adapter_forms import scaled_to
from jlora.hf.peft import ROWS, WEIGHTS, load_adapter, read_options
from jlora.hf.pretrained import Pretrained, with_ids
from jlora.hf.source import open_safetensors, read_json
from jlora.model.adapter import Adapter, Lora, layer_scales, place_adapter, targets
from jlora.model.adapter_init import new_adapter
from jlora.model.config import ModelConfig

# How PEFT's names of an embedding or a head end.
TABLES_OF_PEFT = (".embed_tokens.weight", ".wte.weight", ".lm_head.weight", ".token_adapter.base_layer.weight")
MOST_DIGITS = 10

# Options that an adapter to start from must have as the config says.
COMPARED = (
    *("rank", "alpha", "targets", "use_rslora", "use_dora", "rank_pattern"),
    *("layers_to_transform", "modules_to_save", "trainable_tokens", "bias"),
)


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
    if not Path(folder).exists():
        raise ModelError(f"{folder}: no such folder{beside(folder)}")
    if (Path(folder) / "checkpoints").is_dir():
        raise ModelError(
            f"{folder}: a run that has no adapter yet; train it to its end, or write what its newest checkpoint holds "
            f"with `jlora export --adapter {folder} --out NAME` and name that folder"
        )
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
