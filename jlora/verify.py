"""Proof of an export: read back what was written, recompute logits on a probe, compare."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapter import Adapter
from jlora.config import LoraSection
from jlora.errors import ModelError
from jlora.hf.peft import load_adapter, save_adapter
from jlora.model import Decoder
from jlora.pretrained import Pretrained
from jlora.step import Forward

PROBE_LENGTH = 32


def probe_tokens(vocab_size: int) -> np.ndarray:
    """Fixed token ids spread over the vocabulary, [1 T] int32."""
    return np.random.default_rng(0).integers(0, vocab_size, (1, PROBE_LENGTH), dtype=np.int32)


def probe_logits(base: Decoder, adapter: Adapter, forward: Forward) -> np.ndarray:
    """Logits of base and adapter on the probe, [T V] float32."""
    tokens = probe_tokens(base.cfg.vocab_size)
    positions = np.arange(PROBE_LENGTH, dtype=np.int32)[None]
    segments = np.ones_like(tokens)

    @jax.jit
    def logits(base: Decoder, adapter: Adapter) -> jax.Array:
        hidden = base.hidden(
            jnp.asarray(tokens),
            jnp.asarray(positions),
            jnp.asarray(segments),
            adapter=adapter,
            dropout_key=None,
            attention=forward.attention,
            remat="none",
            dtype=forward.dtype,
        )
        return base.logits(hidden)[0]

    return np.asarray(logits(base, adapter))


def require_equal(where: Path, expected: np.ndarray, found: np.ndarray, tolerance: float) -> float:
    """The largest difference of logits, relative to their scale; more than `tolerance` is an error.

    Raises:
      ModelError: a mismatch, or logits that are not finite.
    """
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise ModelError(f"{where}: logits are not finite, so the export is refused")
    difference = float(np.abs(expected - found).max() / max(1.0, np.abs(expected).max()))
    if difference > tolerance:
        raise ModelError(
            f"{where}: what was written gives logits that differ by {difference:.2e} (at most {tolerance:.0e} "
            "is allowed), so the export is refused; please report this"
        )
    return difference


def export_adapter(
    folder: Path, adapter: Adapter, section: LoraSection, base_name: str, pretrained: Pretrained, forward: Forward
) -> float:
    """Write a PEFT folder, then read it back and compare its logits; returns the largest difference."""
    save_adapter(folder, adapter, section, base_name, pretrained.base_hash)
    reread = load_adapter(folder, pretrained.base.cfg, pretrained.base_hash, section.dropout)
    expected = probe_logits(pretrained.base, adapter, forward)
    return require_equal(folder, expected, probe_logits(pretrained.base, reread, forward), tolerance=1e-6)
