"""The forward pass of both sides: jlora's on a folder, transformers' on the model that wrote it."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jlora.hf.load import load_base
from jlora.hf.source import open_source
from jlora.model import attention
from jlora.model.adapter import Adapter
from jlora.model.llama import Decoder
from jlora.model.sharding import one_device_mesh

LENGTH = 24


def open_base(folder: Path, dtype: str = "float32") -> tuple[Decoder, str]:
    """The base in `folder` on one device, and its hash."""
    return load_base(open_source(folder), str(folder), jnp.dtype(dtype), one_device_mesh())


def random_tokens(vocab_size: int, rows: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    """Token ids, [B T] int32."""
    return np.random.default_rng(seed).integers(0, vocab_size, (rows, length), dtype=np.int32)


@partial(jax.jit, static_argnames=("remat",))
def hidden(base: Decoder, adapter: Adapter, tokens, positions, segments, remat: str, dropout_key=None) -> jax.Array:
    """`Decoder.hidden` in float32 with the reference attention."""
    return base.hidden(
        tokens,
        positions,
        segments,
        adapter=adapter,
        dropout_key=dropout_key,
        neftune_noise_alpha=0.0,
        attention=attention.reference,
        remat=remat,
        dtype=jnp.dtype("float32"),
    )


@jax.jit
def _logits(base: Decoder, adapter: Adapter, tokens, positions, segments) -> jax.Array:
    return base.logits(hidden(base, adapter, tokens, positions, segments, "none"), adapter)


def logits(base: Decoder, adapter: Adapter, tokens: np.ndarray, positions=None, segments=None) -> np.ndarray:
    """jlora's logits [B T V]; by default each row is one whole sequence."""
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    segments = np.ones_like(tokens) if segments is None else segments
    return np.asarray(_logits(base, adapter, tokens, positions, segments))


def torch_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """transformers' (or PEFT's) logits [B T V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def assert_close(ours, theirs, tolerance: float) -> None:
    """Equal to an absolute tolerance, and neither constant nor of a scale that makes it meaningless."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert 0.1 < theirs.std() < 30, theirs.std()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
