"""Which tests need a compiler for devices that are not there."""

import importlib.util

import pytest

GPU_COMPILERS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

needs_gpu_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, GPU_COMPILERS)), reason="needs the extra cuda12 or cuda13"
)
needs_tpu_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
