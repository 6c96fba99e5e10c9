"""What JAX and XLA are told before they start: the compiler's flags, a GPU's memory, the compilation cache.

The one place for it. What the environment says already goes first.
"""

import importlib.util
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

from jlora.files.paths import private

# JAX's default, three quarters of a GPU, is less than a run that fits may need.
GPU_MEMORY_FRACTION = 0.95
# How a setting of JAX's is switched off.
OFF = ("0", "false", "f", "no", "n", "off")
# XLA knows the flags of GPUs on every platform, and there alone they do something. CPUs and TPUs get none.
FLAGS = {
    # Collectives start early, so that weights travel while the GPU computes.
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
}


def prepare() -> None:
    """Set up the process; before JAX is imported.

    Raises:
      ConfigError: others may write where compiled programs are read from.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(GPU_MEMORY_FRACTION))
    given = os.environ.get("XLA_FLAGS", "").strip()
    if not given or given.startswith("-"):  # else it names a file of flags
        ours = [f"{name}={value}" for name, value in FLAGS.items() if name not in given]
        os.environ["XLA_FLAGS"] = " ".join([*ours, given]).strip()
    name = "JAX_COMPILATION_CACHE_DIR"
    with suppress(RuntimeError):  # no home folder: every program is compiled anew
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault(name, str(cache / "jlora" / "jax"))
    folder, enabled = os.environ.get(name), os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true")
    if folder and "://" not in folder and enabled.lower() not in OFF:  # what is in a bucket has no owner to look at
        with suppress(OSError):  # cannot be made: JAX says so, and compiles anew
            private(Path(folder), name, "what lies there is run as your own code")


# XLA on CPUs asks for a step's temporaries anew each step; in pages of 4 KiB their first touch is a tenth of the step.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
PAGE_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def use_huge_pages() -> None:
    """Start this process again with an allocator that asks for huge pages, where a CPU trains on Linux.

    glibc reads the setting before a program begins. Nothing happens where GLIBC_TUNABLES has it (or its denial), the
    kernel gives huge pages to nobody or to all, or there is an accelerator to train on.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, ACCELERATORS))
    if "glibc.malloc.hugetlb" in given or not on_cpu or platform.libc_ver()[0] != "glibc":
        return
    if not PAGE_POLICY.is_file() or "[madvise]" not in PAGE_POLICY.read_text(encoding="ascii"):
        return
    os.environ["GLIBC_TUNABLES"] = f"{given}:{HUGE_PAGES}".strip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
