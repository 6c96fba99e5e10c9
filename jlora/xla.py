"""What JAX and XLA are told before they start: the compiler's flags, a GPU's memory, the compilation cache.

The one place for it. What the environment says already goes first.
"""

import os
from pathlib import Path

import jax

# JAX's default, three quarters of a GPU, is less than a run that fits may need.
GPU_MEMORY_FRACTION = 0.95
# XLA knows the flags of GPUs on every platform, and there alone they do something. CPUs and TPUs get none.
FLAGS = {
    # Collectives start early, so that weights travel while the GPU computes.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
}


def prepare() -> None:
    """Set up the process; before JAX first asks for its devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    given = os.environ.get("XLA_FLAGS", "").strip()
    if not given or given.startswith("-"):  # else it names a file of flags
        ours = [f"{name}={value}" for name, value in FLAGS.items() if name not in given]
        os.environ["XLA_FLAGS"] = " ".join([*ours, given]).strip()
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


def cache_folder() -> Path:
    """Where compiled programs are kept, unless JAX_COMPILATION_CACHE_DIR names another folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jlora" / "jax"
