"""Attention over packed rows: one signature, one reference, and the kernels that take its place.

`cudnn` runs on GPUs, `splash` on TPUs; neither ever holds the scores. Both ask more of a row than the
reference does: queries and keys are the same tokens, and those of a segment stand together in the order of
their positions. Rows of `jlora.data` are so; the steps of decoding are not. Over `mesh.context`, where devices have
parts of a row each, see `jlora.model.attention.context`.

Knows nothing of projections, rotary embedding or caches.
"""

import jax
import jax.numpy as jnp

from jlora.errors import ConfigError
from jlora.model.attention.context import CHUNKS
from jlora.model.attention.gpu import cudnn, cudnn_one_segment
from jlora.model.attention.interface import Attention, Places, reference
from jlora.model.attention.tiles import blocked, blocked_finely
from jlora.model.attention.tpu import splash

# On CPUs packed rows gain from finer tiles at any length, and rows of one segment up to this one (docs/performance.md).
DENSE_FINE = 1024


def choose(
    name: str,
    device: jax.Device,
    head_dim: int,
    length: int,
    dtype: jnp.dtype,
    one_segment: bool,
    softcap: float | None = None,
    context: int = 1,
) -> tuple[str, Attention]:
    """The implementation for a config's `model.attention`, and its name for the log.

    Args:
      device: one of those that the run is for, here or absent.
      one_segment: no row holds more than one segment, from its start (see `DataSection.one_segment`).
      context: devices over which the tokens of a row lie.

    Raises:
      ConfigError: the implementation asked for by name does not run there, or not on these shapes.
    """
    platform, is_gpu = device.platform, device.platform in ("gpu", "cuda")
    wanted = "cudnn" if is_gpu else "splash" if platform == "tpu" else "blocked"
    asked = wanted if name == "auto" else name
    chunks = 1 if context == 1 else CHUNKS * context  # in which kernels take a row
    anywhere: dict[str, Attention] = {
        "reference": reference,
        "blocked": blocked_finely if platform == "cpu" and (not one_segment or length <= DENSE_FINE) else blocked,
    }
    if asked in anywhere:
        return asked, anywhere[asked]
    if asked == "cudnn":
        needs = {
            "a GPU": is_gpu,
            "compute capability 8.0": not is_gpu or float(getattr(device, "compute_capability", 8.0)) >= 8.0,
            "model.dtype bfloat16 or float16": dtype in (jnp.bfloat16, jnp.float16),
            "a head dim that is a multiple of 8 and at most 128": head_dim % 8 == 0 and head_dim <= 128,
            f"a length that is a multiple of {64 * chunks}": length % (64 * chunks) == 0,
            "a model whose attention has no soft cap": softcap is None,
        }
        kernel: Attention = cudnn_one_segment if one_segment else cudnn
    else:
        needs = {
            "a TPU": platform == "tpu",
            "a head dim of 64 or a multiple of 128": head_dim == 64 or head_dim % 128 == 0,
            f"a length that is a multiple of {128 * chunks}": length % (128 * chunks) == 0,
        }
        kernel = splash
    lacking = [need for need, met in needs.items() if not met]
    if not lacking:
        return asked, kernel
    here = f"{platform}, {jnp.dtype(dtype).name}, head dim {head_dim}, length {length}"
    here += f", mesh.context={context}" if context > 1 else ""
    if name == "auto":
        return f"blocked, because {asked} needs {' and '.join(lacking)} (here {here})", blocked
    working = " or ".join(dict.fromkeys(["auto", *([wanted] if wanted != asked else []), "blocked", "reference"]))
    raise ConfigError(
        f"model.attention={asked} needs {' and '.join(lacking)} (here {here}); set model.attention to {working}"
    )
