"""Tokens whose rows of the embedding are trained: from their texts to ids, and PEFT's `trainable_token_indices`."""

from pathlib import Path
from typing import Any

from jlora.config import Config, LoraSection, nearest
from jlora.data.tokens import Tokenizer
from jlora.errors import ConfigError, ModelError
from jlora.model.config import ModelConfig, ModuleNames, module_path

DELTA = "token_adapter.trainable_tokens_delta"


def row_name(names: ModuleNames, leaf: str) -> str:
    """PEFT's name of the trained rows of the embedding or head."""
    return f"base_model.model.{module_path(names, leaf, None)}.{DELTA}"


def with_token_ids(section: LoraSection, tokenizer: Tokenizer | None, kept: int, rows: int) -> LoraSection:
    """The options with `trainable_tokens` as ids.

    Args:
      tokenizer: None where there is none, as for a plan of a named size.
      kept: rows of the embedding before `model.resize_embeddings` gave it more. rows: those that it has now.

    Raises:
      ConfigError: what is no token of the tokenizer, an id that has no row, or `new` where there are none.
    """
    asked, ids = section.trainable_tokens, list[int]()
    if asked == "new":
        ids = list(range(kept, rows))
        if not ids:
            raise ConfigError(
                "lora.trainable_tokens=new, but the embedding has no new rows; set model.resize_embeddings=true and a "
                "model.tokenizer with tokens that the base has none for, or name tokens"
            )
    for token in asked if isinstance(asked, list) else ():
        found: int | None = token if isinstance(token, int) else None
        if isinstance(token, str):
            if tokenizer is None:
                raise ConfigError(f"lora.trainable_tokens holds '{token}', a text; set model.tokenizer, or give its id")
            found = tokenizer.backend.id_of(token)
            if found is None:
                raise ConfigError(
                    f"lora.trainable_tokens holds '{token}', which is no token of the tokenizer"
                    f"{nearest(token, tokenizer.backend.added)}"
                )
        if found is not None and found >= rows:
            raise ConfigError(
                f"lora.trainable_tokens holds {token!r}, whose id {found} has no row in the embedding of {rows}; set "
                "model.resize_embeddings=true, or leave it out"
            )
        ids += [] if found is None else [found]
    return section.model_copy(update={"trainable_tokens": sorted(set(ids))})


def run_with_ids(cfg: Config, tokenizer: Tokenizer | None, kept: int, rows: int) -> Config:
    """A run's config with the ids; see `with_token_ids`."""
    if cfg.method != "lora" or not cfg.lora.trainable_tokens:
        return cfg
    return cfg.model_copy(update={"lora": with_token_ids(cfg.lora, tokenizer, kept, rows)})


def read_indices(raw: dict[str, Any], saved: list[str], model: ModelConfig, where: Path) -> dict[str, tuple[int, ...]]:
    """`trainable_token_indices` by our names, ids in their order.

    Args:
      saved: what is trained in full, by our names.

    Raises:
      ModelError: it is not one that PEFT computes, or that is computed here.
    """
    given = raw.get("trainable_token_indices")
    if not given:
        return {}
    leaves = {module_path(model.names, leaf, None).rpartition(".")[2]: leaf for leaf in ("embed_tokens", "lm_head")}
    by_module = given if isinstance(given, dict) else {next(iter(leaves)): given}
    found: dict[str, tuple[int, ...]] = {}
    for module, ids in by_module.items():
        if (leaf := leaves.get(str(module).rpartition(".")[2])) is None:
            raise ModelError(f"{where}: trainable_token_indices names {module!r}; only {' and '.join(leaves)} are read")
        whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or not ids or len({*ids}) < len(ids):
            raise ModelError(f"{where}: trainable_token_indices of {module} is no list of ids, each named once")
        if not 0 <= min(ids) <= max(ids) < model.vocab_size:
            raise ModelError(
                f"{where}: trainable_token_indices holds {max(ids) if min(ids) >= 0 else min(ids)}, but the base's "
                f"embedding has {model.vocab_size} rows; give its tokenizer with model.resize_embeddings=true"
            )
        if leaf in saved or (model.tie_word_embeddings and saved):
            raise ModelError(
                f"{where}: modules_to_save trains what trainable_token_indices trains rows of, {module}, which is not "
                "supported; merge the adapter in PEFT"
            )
        found[leaf] = tuple(ids)
    if model.tie_word_embeddings and "lm_head" in found:
        if found.get("embed_tokens") != found["lm_head"]:
            raise ModelError(
                f"{where}: trainable_token_indices differ between an embedding and the head that is tied to it, which "
                "is not supported; merge the adapter in PEFT"
            )
        del found["lm_head"]  # PEFT ties them
    return found


def written_indices(rows: dict[str, tuple[int, ...]], model_names: dict[str, str]) -> Any:
    """`trainable_token_indices` as PEFT reads it, of rows that are trained.

    Args:
      rows: leaf -> ids. model_names: leaf -> what PEFT calls its module.
    """
    if [*rows] == ["embed_tokens"]:
        return list(rows["embed_tokens"])
    return {model_names[leaf]: list(ids) for leaf, ids in rows.items()}
