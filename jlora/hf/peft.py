"""PEFT LoRA folders <-> `Adapter`: adapter_config.json and adapter_model.safetensors.

PEFT keeps A as [R, in] and B as [out, R], one pair a layer.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config import ALL_PROJECTIONS, LoraSection
from jlora.errors import ModelError
from jlora.files.atomic import write_json
from jlora.files.paths import inside
from jlora.hf.adapter_config import CONFIG, AdapterSection, read_adapter_config
from jlora.hf.adapter_forms import of_one_scale, plain
from jlora.hf.names import tensor_name
from jlora.hf.source import Source, open_safetensors, read_floats, same_tables
from jlora.hf.trained_tokens import row_name, written_indices
from jlora.hf.weights import header
from jlora.model.adapter import Adapter, Lora, Rows, Saved, layer_ranks, new_lora, targets
from jlora.model.adapter_init import saved_weights
from jlora.model.config import LLAMA, ModelConfig, ModuleNames, module_in_layer, module_path, projection_shapes

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
MAGNITUDE = "lora_magnitude_vector"
# Where a file notes that its base's embedding has so many rows, more than the base on disk.
ROWS = "jlora_embedding_rows"
# What may be trained in full, the head last.
TABLES = ("embed_tokens", "lm_head")


def table_names(names: ModuleNames) -> dict[str, str]:
    """PEFT's names of what is trained in full, by leaf."""
    return {leaf: f"base_model.model.{module_path(names, leaf, None)}.weight" for leaf in TABLES}


def target_name(names: ModuleNames, projection: str) -> str:
    """How `target_modules` names a projection: by the end of its path that no other module's has."""
    module = module_in_layer(names, projection)
    return module if projection in dict(names.renamed) else module.rpartition(".")[2]


def factor_name(names: ModuleNames, projection: str, layer: int, factor: str) -> str:
    """PEFT's name of a tensor of one layer: `lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector` or a bias."""
    return f"base_model.model.{module_path(names, projection, layer)}.{factor}"


def bias_name(names: ModuleNames, projection: str, layer: int, adapted: bool) -> str:
    """PEFT's name of one layer's bias: an adapted projection hides its own in a `base_layer`."""
    return factor_name(names, projection, layer, "base_layer.bias" if adapted else "bias")


def tensor_shapes(section: LoraSection, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of an adapter with these options."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in targets(section, cfg):
        width_in, width_out = (math.prod(dims) for dims in projection_shapes(cfg)[name])
        for layer, rank in enumerate(layer_ranks(section, name, cfg)):
            if rank:
                shapes[factor_name(cfg.names, name, layer, "lora_A.weight")] = (rank, width_in)
                shapes[factor_name(cfg.names, name, layer, "lora_B.weight")] = (width_out, rank)
                if section.use_dora:
                    shapes[factor_name(cfg.names, name, layer, MAGNITUDE)] = (width_out,)
    for leaf, ids in section.token_rows(cfg.tie_word_embeddings).items():
        shapes[row_name(cfg.names, leaf)] = (len(ids), cfg.hidden_size)
    for name, shape in saved_weights(section, cfg).items():
        if name in TABLES:
            shapes[table_names(cfg.names)[name]] = shape
            continue
        projection = name.removesuffix("_bias")
        for layer in range(cfg.num_hidden_layers):
            name = bias_name(cfg.names, projection, layer, section.transforms(projection, layer))
            shapes[name] = (math.prod(shape[1:]),)
    return shapes


@dataclass(frozen=True)
class _Opened:
    """An adapter folder whose tensors are known by name and shape.

    Attributes:
      section: its options, with the tables of `tables` in `modules_to_save`.
      stored: what the file calls each tensor of `shapes`.
      tables: embed_tokens, lm_head -> the name of the tensor that stands for it.
      over: of these, those in which rows of tokens are trained -> the name of the rows' tensor, and their ids.
      trained_on: SHA-256 of its base, if it says so.
    """

    section: AdapterSection
    where: Path
    shapes: dict[str, tuple[int, ...]]
    stored: dict[str, str]
    tables: dict[str, str]
    over: dict[str, tuple[str, tuple[int, ...]]]
    trained_on: str | None


def _open(folder: Path, cfg: ModelConfig, source: Source | None) -> _Opened:
    section, names = read_adapter_config(folder, cfg), table_names(cfg.names)
    where = inside(folder, WEIGHTS)
    if not where.is_file() and inside(folder, PICKLE).is_file():
        raise ModelError(
            f"{folder}: holds {PICKLE}, a pickle, which may run code and is not read; convert it to {WEIGHTS} "
            "(docs/migration.md has the lines)"
        )
    with open_safetensors(where) as file:
        stored = {_saved_name(name): name for name in file.keys()}
        if len(stored) < len(file.keys()):
            raise ModelError(
                f"{where}: holds a tensor under two names (with and without .default or .weight); leave one"
            )
        shapes = {name: tuple(file.get_slice(own).get_shape()) for name, own in stored.items()}
        trained_on = (file.metadata() or {}).get("jlora_base_sha256")
        # PEFT writes the tables too where it takes the vocabulary to have changed, and loads them in the base's place.
        beside = [leaf for leaf in TABLES if leaf not in section.modules_to_save and names[leaf] in shapes]
        changed = [
            leaf for leaf in beside if source is None or not _as_in_base(file, stored[names[leaf]], leaf, source)
        ]
    tables: dict[str, str] = {leaf: names[leaf] for leaf in section.modules_to_save}
    if changed and cfg.tie_word_embeddings:  # one weight, of which PEFT loads the head last
        tables |= dict.fromkeys((leaf for leaf in TABLES if leaf not in tables), names[beside[-1]])
    else:
        tables |= {leaf: names[leaf] for leaf in changed}
    for leaf in changed:
        rows, wanted = shapes[names[leaf]][:1], cfg.vocab_size
        if rows != (wanted,):
            raise ModelError(
                f"{where}: holds {names[leaf]} of {list(shapes[names[leaf]])}, but the base has {wanted} rows: the "
                "adapter was trained on a base whose vocabulary was resized; give that one, or its tokenizer with "
                "model.resize_embeddings=true"
            )
    # PEFT writes a table that it takes to have changed without the rows that are trained in it.
    trained = {leaf: "embed_tokens" if cfg.tie_word_embeddings else leaf for leaf in tables}
    over = {
        leaf: (row_name(cfg.names, own), section.tokens[own]) for leaf, own in trained.items() if own in section.tokens
    }
    tokens = {leaf: ids for leaf, ids in section.tokens.items() if leaf not in tables}
    saved = [leaf for leaf in TABLES if leaf in tables]
    section = section.model_copy(update={"modules_to_save": saved, "tokens": tokens})
    return _Opened(section, where, shapes, stored, tables, over, trained_on)


def _saved_name(name: str) -> str:
    """What PEFT saves a tensor as that a model's own state names by its adapter too, `default`; PEFT loads both."""
    name = re.sub(r"(\.lora_[AB])\.default(\.weight)$", r"\1\2", name)
    name = name.replace(".token_adapter.base_layer.weight", ".weight")
    return re.sub(rf"(\.{MAGNITUDE})(\.default)?(\.weight)?$", r"\1", name)


def _as_in_base(file: Any, stored: str, leaf: str, source: Source) -> bool:
    """Whether a table beside the adapter is the base's own, as float32; read in blocks of rows."""
    own, embedding = (tensor_name(source.model.names, table, None) for table in (leaf, "embed_tokens"))
    name = own if own in source.shapes else embedding
    table = file.get_slice(stored)
    if tuple(table.get_shape()) != source.shapes[name]:
        return False
    width = source.shapes[name][1]
    return same_tables(
        source.shapes[name],
        lambda start, stop: table[start:stop],
        lambda start, stop: source.part(name, (start, stop), (0, width)),
    )


def read_options(folder: Path, cfg: ModelConfig, source: Source | None = None) -> AdapterSection:
    """The adapter's options; an embedding or head that it holds beside counts as one of its `modules_to_save`.

    Args:
      source: the base, whose own table beside an adapter counts for nothing.

    Raises:
      ModelError: see `jlora.hf.adapter_config.read_adapter_config`; or no tensors that can be read.
    """
    return _open(folder, cfg, source).section


def load_adapter(
    folder: Path, cfg: ModelConfig, base_hash: str, dropout: float, source: Source | None = None
) -> Adapter:
    """Read a PEFT folder for a base of shape `cfg`.

    Args:
      base_hash: SHA-256 of the base it will work on; compared where the adapter says its own.
      dropout: dropout probability of the result (PEFT's value is a training setting).
      source: see `read_options`.

    Raises:
      ModelError: no adapter, missing, extra, misshapen or non-finite tensors, or another base.
    """
    opened = _open(folder, cfg, source)
    section, where, shapes, tables = opened.section, opened.where, opened.shapes, opened.tables
    if opened.trained_on is not None and opened.trained_on != base_hash:
        raise ModelError(
            f"{where}: was trained on another base (tensors {opened.trained_on[:12]}..., this base "
            f"{base_hash[:12]}...); give the base it belongs to"
        )
    wanted, names = tensor_shapes(section, cfg), table_names(cfg.names)
    for leaf, name in tables.items():
        wanted[name] = wanted.pop(names[leaf]) if name != names[leaf] else wanted[name]
    for name, ids in opened.over.values():
        wanted[name] = (len(ids), cfg.hidden_size)
    known = {*wanted, *names.values()}
    if cfg.tie_word_embeddings and row_name(cfg.names, "embed_tokens") in wanted:
        known.add(row_name(cfg.names, "lm_head"))  # the same rows
    problems = [f"{name} is missing" for name in wanted if name not in shapes]
    problems += [f"{name} is not known" for name in shapes if name not in known]
    problems += [
        f"{name} is {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    tensors: dict[str, np.ndarray] = {}
    if not problems:  # a file of other tensors may be of any size, so it is not read
        with open_safetensors(where) as file:
            tensors = {name: read_floats(file, opened.stored[name], where) for name in wanted}
        problems = [
            f"{name} holds NaN or infinity"
            for name, tensor in tensors.items()
            if not np.isfinite(tensor.astype(np.float32)).all()
        ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelError(f"{where}: does not fit this base and its own configuration: {problems[0]}{more}")
    adapter: Adapter = {}
    num_layers = cfg.num_hidden_layers

    def stack(shape: tuple[int, ...], names: list[str]) -> np.ndarray:
        """Every layer's tensor, transposed, at the front of zeros."""
        stacked = np.zeros((num_layers, *shape), np.float32)
        for layer, name in enumerate(names):
            if name in tensors:
                value = tensors[name].astype(np.float32).T
                front: Any = (layer, *(slice(size) for size in value.shape))
                stacked[front] = value
        return stacked

    for name in targets(section, cfg):
        inputs, outputs = projection_shapes(cfg)[name]
        widths, rank = (math.prod(inputs), math.prod(outputs)), max(layer_ranks(section, name, cfg))
        a, b, m = (
            stack(shape, [factor_name(cfg.names, name, layer, factor) for layer in range(num_layers)])
            for shape, factor in (
                ((widths[0], rank), "lora_A.weight"),
                ((rank, widths[1]), "lora_B.weight"),
                ((widths[1],), MAGNITUDE),
            )
        )
        factors = jnp.asarray(a.reshape(-1, *inputs, rank)), jnp.asarray(b.reshape(-1, rank, *outputs))
        lora = new_lora(section, name, factors, cfg, dropout)
        magnitude = jnp.asarray(m.reshape(-1, *outputs)) if section.use_dora else None
        adapter[name] = replace(lora, magnitude=magnitude)
    for leaf, given in section.tokens.items():
        order = np.argsort(given)
        rows = tensors[row_name(cfg.names, leaf)].astype(np.float32)[order]
        adapter[leaf] = Rows(jnp.asarray(rows), tuple(np.array(given)[order].tolist()))
    for name, shape in saved_weights(section, cfg).items():
        if name in TABLES:
            weight = tensors[tables[name]].astype(np.float32)
            if name in opened.over:
                rows_of, ids = opened.over[name]
                weight[list(ids)] = tensors[rows_of].astype(np.float32)
        else:
            projection = name.removesuffix("_bias")
            adapted = [section.transforms(projection, layer) for layer in range(num_layers)]
            weight = stack(
                (math.prod(shape[1:]),), [bias_name(cfg.names, projection, i, own) for i, own in enumerate(adapted)]
            )
        adapter[name] = Saved(jnp.asarray(weight.reshape(shape)))
    return adapter


def serialize(tensors: dict[str, np.ndarray], base_hash: str, rows: int | None = None) -> bytes:
    """A safetensors file of float32 tensors. Args: rows: see `save_adapter`."""
    names = sorted(tensors)
    noted = {} if rows is None else {ROWS: str(rows)}
    start = header({name: tensors[name].shape for name in names}, "float32", jlora_base_sha256=base_hash, **noted)
    return start + b"".join(tensors[name].tobytes() for name in names)


def exported_tensors(folder: Path, adapter: Adapter, names: ModuleNames) -> dict[str, np.ndarray]:
    """Every tensor by PEFT's name, float32.

    Raises:
      ModelError: one is not finite.
    """
    tensors: dict[str, np.ndarray] = {}

    def host(name: str, array: Any) -> np.ndarray:
        found = np.asarray(jax.device_get(array), np.float32)
        if not np.isfinite(found).all():
            raise ModelError(f"{folder}: the adapter of {name} is not finite, so nothing was written")
        return found

    for name, part in adapter.items():
        if isinstance(part, Rows):
            tensors[row_name(names, name)] = host(name, part.weight)
            continue
        if isinstance(part, Saved):
            weight = host(name, part.weight)
            if name in TABLES:
                tensors[table_names(names)[name]] = weight
                continue
            projection = name.removesuffix("_bias")
            adapted = layers_adapted(adapter, projection, len(weight))
            for layer, bias in enumerate(weight.reshape(len(weight), -1)):
                tensors[bias_name(names, projection, layer, adapted[layer])] = bias
            continue
        num_layers, rank = part.lora_b.shape[:2]
        pairs = [(part.lora_a, part.lora_b)] + ([] if part.initial is None else [(part.initial[0], -part.initial[1])])
        lefts = [host(name, a).reshape(num_layers, -1, rank) for a, _ in pairs]
        rights = [host(name, b).reshape(num_layers, rank, -1) for _, b in pairs]
        magnitude = None if part.magnitude is None else host(name, part.magnitude).reshape(num_layers, -1)
        for layer, kept in enumerate(part.ranks or (rank,) * num_layers):
            if not kept:
                continue
            down = np.concatenate([a[layer, :, :kept].T for a in lefts])
            up = np.concatenate([b[layer, :kept].T for b in rights], axis=1)
            tensors[factor_name(names, name, layer, "lora_A.weight")] = np.ascontiguousarray(down)
            tensors[factor_name(names, name, layer, "lora_B.weight")] = np.ascontiguousarray(up)
            if magnitude is not None:
                tensors[factor_name(names, name, layer, MAGNITUDE)] = magnitude[layer]
    return tensors


def layers_adapted(adapter: Adapter, projection: str, num_layers: int) -> list[bool]:
    """Which layers have an adapter on a projection."""
    lora = adapter.get(projection)
    if not isinstance(lora, Lora):
        return [False] * num_layers
    return [True] * num_layers if lora.ranks is None else [rank > 0 for rank in lora.ranks]


def save_adapter(
    folder: Path,
    adapter: Adapter,
    section: LoraSection,
    base: str,
    base_hash: str,
    names: ModuleNames = LLAMA,
    rows: int | None = None,
) -> None:
    """Write the files of a PEFT folder, made if need be; tensors in float32.

    Args:
      base: name or path of the base, for `base_model_name_or_path`.
      names: what transformers calls the base's modules.
      rows: of the base's embedding, where it has more than the base on disk.

    Raises:
      ModelError: a factor is not finite.
    """
    adapter, section = of_one_scale(adapter, plain(section))
    tensors = exported_tensors(folder, adapter, names)
    modules = {leaf: module_path(names, leaf, None).rpartition(".")[2] for leaf in TABLES}
    saved = [modules[leaf] for leaf in section.modules_to_save]
    rows_of = {leaf: part.ids for leaf, part in adapter.items() if isinstance(part, Rows)}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": section.rank,
        "lora_alpha": int(section.alpha) if section.alpha == int(section.alpha) else section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": [target_name(names, name) for name in ALL_PROJECTIONS if name in adapter],
        "use_rslora": section.use_rslora,
        "bias": section.bias,
        "fan_in_fan_out": names.input_first,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "use_dora": section.use_dora,
        "rank_pattern": section.rank_pattern,
        "alpha_pattern": section.alpha_pattern,
        "layers_to_transform": section.layers_to_transform,
    }
    if rows_of:  # a key that not every reader knows
        config["trainable_token_indices"] = written_indices(rows_of, modules)
    if names.beside:  # whose projections PEFT would adapt as well, by their names
        config["exclude_modules"] = rf"(.*\.)?({'|'.join(names.beside)})\..*"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(serialize(tensors, base_hash, rows))
    write_json(folder / CONFIG, config)
