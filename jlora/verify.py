"""Proof of an export: read back what was written, recompute logits on a probe, compare."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora import attention
from jlora.adapter import Adapter
from jlora.atomic import beside, new_folder
from jlora.config import LoraSection
from jlora.distributed import from_first, is_main, wait_for_all
from jlora.errors import ConfigError, ModelError
from jlora.hf.names import name_table
from jlora.hf.peft import CONFIG, WEIGHTS, load_adapter, save_adapter
from jlora.model import Decoder
from jlora.pretrained import Pretrained
from jlora.sharding import constrain, gather
from jlora.step import place_adapter

PROBE_LENGTH = 32


def probe_tokens(vocab_size: int) -> np.ndarray:
    """Fixed token ids spread over the vocabulary, [1 T] int32."""
    return np.random.default_rng(0).integers(0, vocab_size, (1, PROBE_LENGTH), dtype=np.int32)


def probe_logits(base: Decoder, adapter: Adapter, dtype: jnp.dtype) -> np.ndarray:
    """Logits of base and adapter on the probe, [T V] float32."""
    return np.asarray(_probed(base, adapter, dtype))


@partial(jax.jit, static_argnames="dtype")
def _probed(base: Decoder, adapter: Adapter, dtype: jnp.dtype) -> jax.Array:
    tokens = probe_tokens(base.cfg.vocab_size)
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
    folder: Path,
    adapter: Adapter,
    section: LoraSection,
    base_name: str,
    pretrained: Pretrained,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
) -> float:
    """Put a run's adapter in place, in that of an earlier one, once it is proven; see `write_adapter`.

    In a job of several processes the first puts it there.
    """
    # All read it under its first name, until the last has.
    partial = folder.with_name(from_first(f"partial {folder}", lambda: beside(folder).name))
    with new_folder(folder, partial=partial, ours=(WEIGHTS, CONFIG)) if is_main() else nullcontext():
        difference = write_adapter(partial, adapter, section, base_name, pretrained, dtype, mesh)
        wait_for_all("proven")
    return difference


def write_adapter(
    folder: Path,
    adapter: Adapter,
    section: LoraSection,
    base_name: str,
    pretrained: Pretrained,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh,
) -> float:
    """Write a PEFT folder, then read it back and compare its logits; returns their relative difference.

    In a job of several processes the first writes, and all read.
    """
    tolerance = 1e-6
    if section.takes_from_base:  # written in another form, which only float32 can compare
        dtype, tolerance = jnp.dtype("float32"), 1e-5
    whole = gather(adapter, mesh)
    if is_main():
        save_adapter(folder, whole, section, base_name, pretrained.base_hash)
    wait_for_all("exported")
    cfg = pretrained.base.cfg
    reread = place_adapter(load_adapter(folder, cfg, pretrained.base_hash, section.dropout), cfg, mesh)
    expected = probe_logits(pretrained.base, adapter, dtype)
    return require_equal(folder, expected, probe_logits(pretrained.base, reread, dtype), tolerance)


def compare_with_peft(folder: Path, adapter: Adapter, pretrained: Pretrained) -> float:
    """Load an exported adapter in PEFT on transformers' model, float32, and compare logits with ours.

    Raises:
      ConfigError: torch, transformers or peft is not installed.
      ModelError: the logits differ.
    """
    try:
        import torch
        from peft import PeftModel
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError(f"--verify needs torch and peft ({error.name} is missing); pip install torch peft") from None
    source, cfg = pretrained.source, pretrained.base.cfg
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**source.config))
    # Given tensor by tensor, so that a GGUF base is compared in just the same way as a folder.
    state = {name: torch.from_numpy(source.read(name).astype(np.float32)) for name in name_table(cfg)}
    if cfg.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffer was made on "meta"
    adapted = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        theirs = adapted(torch.from_numpy(probe_tokens(cfg.vocab_size)).long()).logits[0].float().numpy()
    ours = probe_logits(pretrained.base, adapter, jnp.dtype("float32"))
    return require_equal(folder, theirs, ours, tolerance=1e-4)
