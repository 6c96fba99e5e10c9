"""What jlora takes from inside JAX is still there, and still needed; a failure says what a new JAX broke."""

import subprocess
import sys
from contextlib import contextmanager
from textwrap import dedent

import jax
import jax.numpy as jnp
import pytest

from jlora.model import attention
from jlora.runtime import private_jax


@contextmanager
def otherwise(sentence):
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        pytest.fail(f"jlora/runtime/private_jax.py with jax {jax.__version__}: {sentence} ({reason})")


@pytest.fixture
def equations(monkeypatch):
    """Primitive -> its parameters, of packed attention by cuDNN forward and backward, traced without a GPU."""
    # JAX asks the installed cuDNN for its version before it traces a call of it.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 92800)
    q, k = (jax.ShapeDtypeStruct((1, 128, heads, 64), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def loss(q, k, v, segments):
        return attention.cudnn(q, k, v, attention.Places(*[segments] * 4), None).astype(jnp.float32).sum()

    found = {}

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            found[equation.primitive.name] = equation.params
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    collect(inner)

    collect(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, k, segments).jaxpr)
    return {name: params for name, params in found.items() if "attention" in name}


def test_cudnn_forward(equations):
    with otherwise("CUDNN_FORWARD names no primitive, so every remat policy runs cuDNN's forward pass twice"):
        assert private_jax.CUDNN_FORWARD in equations, f"attention is {sorted(equations)}"


def test_no_mask_gradient(equations):
    with otherwise("cuDNN makes a mask's gradient, in a workspace of [B N T S] that no compiled peak shows"):
        assert equations
        for params in equations.values():
            has_bias, has_bias_gradient = params["variadic_args"]
            assert has_bias and not has_bias_gradient


def test_gpu_is_cuda():
    program = jax.jit(lambda x: jax.lax.platform_dependent(x, cuda=jnp.sin, default=jnp.cos)).trace(1.0)
    with otherwise("JAX lowers for an absent GPU by itself; delete gpu_is_cuda once the oldest supported JAX does"):
        with pytest.raises(RuntimeError, match="Unknown backend: 'gpu'"):
            program.lower(lowering_platforms=("gpu",))
    with otherwise("JAX does not lower for CUDA where there is no GPU, so `jlora plan` of one fails"):
        with private_jax.gpu_is_cuda():
            text = program.lower(lowering_platforms=("gpu",)).as_text()
        assert "sine" in text and "cosine" not in text


JOB = """
    import socket
    import jax
    from jlora.runtime import private_jax
    assert private_jax.job().client is None
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", 1, 0, cluster_detection_method="deactivate")
    job = private_jax.job()
    assert job.num_processes == 1
    job.client.key_value_set("a/b", "1")
    job.client.key_value_set("a/b", "2", allow_overwrite=True)
    assert job.client.blocking_key_value_get("a/b", 1000) == "2"
    assert job.client.key_value_dir_get("a/") == [("a/b", "2")]
    job.client.wait_at_barrier("c", 1000)
"""


def test_job():
    done = subprocess.run([sys.executable, "-c", dedent(JOB)], capture_output=True, text=True, timeout=120)
    with otherwise("job() has no key-value store as jlora uses it, so processes of one job cannot agree"):
        assert done.returncode == 0, done.stderr[-2000:]
