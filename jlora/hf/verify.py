"""Proof of an export: read back what was written, recompute logits on a probe, compare."""

import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jlora.config import LoraSection
from jlora.errors import ConfigError, ModelError
from jlora.files.atomic import beside, new_folder
from jlora.hf.adapter_config import CONFIG
from jlora.hf.families import WRAPPED_IN
from jlora.hf.grown import Grown
from jlora.hf.names import name_table, tensor_name
from jlora.hf.peft import WEIGHTS, load_adapter, save_adapter
from jlora.hf.pretrained import Pretrained
from jlora.hf.source import Source
from jlora.hf.weights import Merged, Weights, at_layer, blocks, leaf
from jlora.model import attention
from jlora.model.adapter import Adapter, Lora, Rows, place_adapter
from jlora.model.block import Block, normalize
from jlora.model.config import ModelConfig
from jlora.model.layers import capped, products_in
from jlora.model.llama import Decoder, attend, rotary_by_layer
from jlora.model.sharding import constrain, gather
from jlora.runtime.distributed import from_first, is_main, wait_for_all

PROBE_LENGTH = 32

# What `jlora.training.provenance` puts beside an adapter.
PROVENANCE = "provenance.json"


def probe_tokens(vocab_size: int, adapter: Adapter) -> np.ndarray:
    """Fixed token ids spread over the vocabulary, half of them at most those whose rows are trained; [1 T] int32."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (1, PROBE_LENGTH), dtype=np.int32)
    rows = adapter.get("embed_tokens")
    trained = rows.ids[: PROBE_LENGTH // 2] if isinstance(rows, Rows) else ()
    tokens[0, : len(trained)] = trained
    return tokens


def probe_logits(base: Decoder, adapter: Adapter, dtype: jnp.dtype) -> np.ndarray:
    """Logits of base and adapter on the probe, [T V] float32."""
    return np.asarray(_probed(base, adapter, dtype))


@partial(jax.jit, static_argnames="dtype")
def _probed(base: Decoder, adapter: Adapter, dtype: jnp.dtype) -> jax.Array:
    tokens = probe_tokens(base.cfg.vocab_size, adapter)
    with products_in(dtype):
        hidden = base.hidden(
            jnp.asarray(tokens),
            jnp.arange(PROBE_LENGTH, dtype=jnp.int32)[None],
            jnp.ones(tokens.shape, jnp.int32),
            adapter=adapter,
            dropout_key=None,
            neftune_noise_alpha=0.0,
            attention=attention.reference,
            remat="none",
            dtype=dtype,
        )
        return constrain(base.logits(hidden, adapter)[0], None, None)


class StreamedBlock:
    """One layer as `jlora.model.llama.Block` computes it, each weight read when it is used and let go after."""

    def __init__(self, cfg: ModelConfig, weights: Weights, layer: int):
        self.cfg = cfg
        self._weights, self._layer = weights, layer
        self._table = name_table(cfg)
        self._last: tuple[str, jax.Array | None] = "", None

    def __getattr__(self, name: str) -> nnx.Param:
        known, array = self._last
        if known != name or array is None:  # a layer asks for some twice
            self._last = "", None
            stored = tensor_name(self.cfg.names, name, self._layer)
            array = leaf(self._weights, self.cfg, stored, self._table[stored])
            self._last = name, array
        return nnx.Param(array)

    def __call__(self, *inputs: Any) -> jax.Array:
        """See `Block`."""
        return Block.__call__(self, *inputs)  # type: ignore[arg-type]


def streamed_logits(
    cfg: ModelConfig, weights: Weights, adapter: Adapter, tokens: np.ndarray | None = None
) -> np.ndarray:
    """As `probe_logits` in float32, with one tensor of the model in memory at a time; [T V].

    Args:
      tokens: of the probe, where they are another adapter's.
      cfg: of the model with the adapter; its head is not tied where the adapter has an embedding or a head of its own.
    """
    whole = Merged(weights, {name: part for name, part in adapter.items() if not isinstance(part, Lora)})
    low_rank = {name: part for name, part in adapter.items() if isinstance(part, Lora)}
    table, tokens = name_table(cfg), probe_tokens(cfg.vocab_size, adapter) if tokens is None else tokens
    positions, segments = jnp.arange(PROBE_LENGTH, dtype=jnp.int32)[None], jnp.ones(tokens.shape, jnp.int32)
    rotary = rotary_by_layer(cfg, positions, segments)
    places = attention.Places(segments, segments, positions, positions)

    def rows(leaf: str, start: int, stop: int) -> np.ndarray:
        name = tensor_name(cfg.names, leaf, None)
        return whole.rows(name, table[name], start, stop)

    x = jnp.asarray(np.concatenate([rows("embed_tokens", i, i + 1) for i in tokens[0].tolist()])[None])
    x = x * cfg.embedding_scale
    if cfg.learned_positions is not None:
        x = x + rows("embed_positions", 0, PROBE_LENGTH)[None]
    for layer in range(cfg.num_hidden_layers):
        factors = {name: at_layer(lora, layer) for name, lora in low_rank.items()}
        seeing = partial(attend, cfg, attention.reference, layer, places=places)
        x = StreamedBlock(cfg, whole, layer)(
            x, rotary(layer), seeing, {n: f for n, f in factors.items() if f is not None}, None
        )
    vectors = [jnp.asarray(rows(leaf, 0, 1)[0]) for leaf in ("norm", "norm_bias")[: 1 + cfg.layer_norm]]
    x = normalize(cfg, x, vectors[0], vectors[1] if cfg.layer_norm else None)
    head = "embed_tokens" if cfg.tie_word_embeddings else "lm_head"
    heads = (rows(head, *cut) for cut in blocks(cfg, table[tensor_name(cfg.names, head, None)]))
    pieces = (capped(jnp.einsum("btd,vd->btv", x, head)[0], cfg.logits_softcap) for head in heads)
    return np.concatenate([np.asarray(piece) for piece in pieces], axis=1)


def require_equal(where: Path, expected: np.ndarray, found: np.ndarray, tolerance: float) -> float:
    """The root mean square of the difference over that of the logits; more than `tolerance` is an error.

    Not the largest difference: a model with huge activations (SmolLM2's reach 22,000) has single logits that
    rounding alone moves a hundred times as far as the rest, while a mistake moves them all.

    Raises:
      ModelError: a mismatch, or logits that are not finite.
    """
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise ModelError(f"{where}: logits are not finite, so the export is refused")
    scale = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    difference = float(np.sqrt(np.mean(np.square(expected - found, dtype=np.float64)))) / max(scale, 1e-30)
    if difference > tolerance:
        raise ModelError(
            f"{where}: what was written gives logits that differ by {difference:.2e} of their size (at most "
            f"{tolerance:.0e} is allowed), so the export is refused; please report this"
        )
    return difference


def export_adapter(
    folder: Path, adapter: Adapter, section: LoraSection, pretrained: Pretrained, dtype: jnp.dtype, mesh: Mesh
) -> float:
    """Put a run's adapter in place, in that of an earlier one, once it is proven; see `write_adapter`.

    In a job of several processes the first puts it there.
    """
    # All read it under its first name, until the last has.
    partial = folder.with_name(from_first(f"partial {folder}", lambda: beside(folder).name))
    ours = WEIGHTS, CONFIG, PROVENANCE, *(file.name for file in pretrained.tokenizer.files)
    with new_folder(folder, partial=partial, ours=ours) if is_main() else nullcontext():
        difference = write_adapter(partial, adapter, section, pretrained, dtype, mesh)
        wait_for_all("proven")
    return difference


def write_adapter(
    folder: Path, adapter: Adapter, section: LoraSection, pretrained: Pretrained, dtype: jnp.dtype, mesh: Mesh
) -> float:
    """Write a PEFT folder, then read it back and compare its logits; returns their relative difference.

    Beside an adapter of a base whose embedding was given rows lies the tokenizer that they are for.

    In a job of several processes the first writes, and all read.
    """
    tolerance = 1e-6
    if section.takes_from_base:  # written in another form, which only float32 can compare
        dtype, tolerance = jnp.dtype("float32"), 1e-5
    whole = gather(adapter, mesh)
    if is_main():
        base, names = pretrained.lasting_name, pretrained.base.cfg.names
        grown = isinstance(pretrained.source, Grown)
        rows = pretrained.base.cfg.vocab_size if grown else None
        save_adapter(folder, whole, section, base, pretrained.base_hash, names, rows)
        for file in pretrained.tokenizer.files if grown else ():  # which the base's own folder need not have
            shutil.copyfile(file, folder / file.name)
    wait_for_all("exported")
    cfg = pretrained.base.cfg
    reread = place_adapter(load_adapter(folder, cfg, pretrained.base_hash, section.dropout), cfg, mesh)
    expected = probe_logits(pretrained.base, adapter, dtype)
    return require_equal(folder, expected, probe_logits(pretrained.base, reread, dtype), tolerance)


def compare_with_peft(folder: Path, adapter: Adapter, pretrained: Pretrained) -> tuple[float, str]:
    """Load an exported adapter in PEFT on the base as transformers reads it, float32, and compare logits with ours.

    Returns their relative difference, and who read the base's files: "transformers", or "jlora" where they are a GGUF
    file which transformers cannot read, or weights that were published quantised: it would round what it dequantises,
    and not without the library that wrote them.

    Raises:
      ConfigError: torch, transformers or peft is not installed.
      ModelError: the logits differ, or transformers refuses the base.
    """
    try:
        import torch
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(f"--verify needs torch and peft ({error.name} is missing); pip install torch peft") from None
    ours = probe_logits(pretrained.base, adapter, jnp.dtype("float32"))
    model, reader = transformers_base(pretrained)
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        tokens = torch.from_numpy(probe_tokens(pretrained.base.cfg.vocab_size, adapter)).long()
        theirs = adapted(tokens).logits[0].float().numpy()
    return require_equal(folder, theirs, ours, tolerance=1e-4), reader


def _resized(model: Any, source: Source) -> Any:
    """The model with the rows that a `Grown` source has more, and as it has them."""
    if isinstance(source, Grown):
        import torch

        model.resize_token_embeddings(source.model.vocab_size, mean_resizing=False)
        tables = (model.get_input_embeddings(), "embed_tokens"), (model.get_output_embeddings(), "lm_head")
        for module, leaf in tables[: 2 - source.model.tie_word_embeddings]:
            new = source.mean(tensor_name(source.model.names, leaf, None))
            module.weight.data[source.kept :] = torch.from_numpy(new)
    return model


def transformers_base(pretrained: Pretrained) -> tuple[Any, str]:
    """The base in transformers, float32, and who read its file; see `compare_with_peft`."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path, source = pretrained.path, pretrained.source
    stored = source.base if isinstance(source, Grown) else source
    folder = path if path.is_dir() else path.parent
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
    if not path.is_dir():  # of whose metadata transformers reads less than what changes the numbers
        options |= {"gguf_file": path.name, "config": AutoConfig.for_model(**stored.config)}
    auto = AutoModelForImageTextToText if WRAPPED_IN in source.config else AutoModelForCausalLM
    by_jlora = source.has_codes and WRAPPED_IN not in source.config
    try:
        if not by_jlora:
            return _resized(auto.from_pretrained(str(folder), **options), source), "transformers"
    except Exception as error:  # of any kind: it is another's reader
        if path.is_dir():
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{path}: transformers does not load this base ({reason}), so no export fits it") from None
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    dtype = pretrained.base.embed_tokens.get_value().dtype  # to which ours are rounded
    state = {}
    for name, entry in name_table(pretrained.base.cfg).items():
        weight = source.read(name).astype(dtype).astype(np.float32)
        state[name] = torch.from_numpy(np.ascontiguousarray(weight.T) if entry.input_first else weight)
    if pretrained.base.cfg.tie_word_embeddings:
        head, table = (tensor_name(pretrained.base.cfg.names, leaf, None) for leaf in ("lm_head", "embed_tokens"))
        state[head] = state[table]
    model.load_state_dict(state, assign=True)
    return model, "jlora"
