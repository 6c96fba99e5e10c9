"""What tests run in a process that has eight CPU devices, since the number is fixed when JAX starts.

Each function below `run_on_eight` is called there, with words of a command line, and prints what the test reads.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from grown_adapters import random_adapter

from jlora.config import MeshSection, ObjectiveSection, load_config
from jlora.errors import ConfigError
from jlora.hf import load, share
from jlora.hf.architecture import parse_config
from jlora.hf.source import open_source
from jlora.model import attention
from jlora.model.adapter import place_adapter
from jlora.model.attention import interface, tpu
from jlora.model.config import block_weights
from jlora.model.divisibility import check_divides
from jlora.model.llama import Decoder
from jlora.model.quant import map_axes
from jlora.model.sharding import make_mesh, named_sharding, place_rows
from jlora.planning.compiled import place_base
from jlora.training.metrics import read_metrics
from jlora.training.run import train
from jlora.training.step import Forward, make_forward

ROOT = Path(__file__).parents[1]


def losses(run_dir):
    """Loss, gradient norm and held-out loss of every step."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    curves = {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm", "eval_loss")}
    assert all(curves.values())
    return curves


def run_on_eight(function, *words):
    """Call a function of this module in such a process; its stdout."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, function.__name__, *words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def train_over(config, meshes):
    """Runs of a config, one after another: most of the time of a small run is starting.

    Args:
      meshes: as JSON, output folder -> sizes of data, fsdp and tensor, and of context where rows are split.
    """
    devices = jax.devices()
    for folder, sizes in json.loads(meshes).items():
        order = np.random.default_rng(0).permutation(8) if "permuted" in folder else range(math.prod(sizes))
        jax.devices = lambda order=order: [devices[i] for i in order]
        axes = ("data", "fsdp", "tensor", "context")[: len(sizes)]
        overrides = [f"mesh.{axis}={size}" for axis, size in zip(axes, sizes, strict=True)]
        train(load_config(config, [*overrides, "model.remat=full", f"output_dir={folder}"]), quiet=True)


def attend_by_splash():
    """The gradients of splash over a mesh are those of the reference; the refusal of one that does not divide."""
    tpu.MAX_SPLASH_BLOCK = 128
    rng = np.random.default_rng(0)

    def grads(attend, qkv):
        return jax.jit(jax.grad(lambda *qkv: jnp.sin(attend(*qkv)).sum(), argnums=(0, 1, 2)))(*qkv)

    def compare(sizes, batch, length, window, kernel):
        qkv = [jnp.asarray(rng.standard_normal((batch, length, n, 64)), jnp.float32) for n in (4, 2, 2)]
        segments = jnp.asarray(np.sort(rng.integers(1, 4, (batch, length)), axis=1), jnp.int32)
        positions = jnp.arange(length)[None].repeat(batch, 0)
        places = attention.Places(segments, segments, positions, positions)
        expected = grads(partial(attention.reference, places=places, window=window), qkv)
        splash = partial(interface.per_device, partial(kernel, window=window, interpret=True), segments=segments)
        with jax.set_mesh(make_mesh(MeshSection(**sizes), jax.devices()[: math.prod(sizes.values())])):
            differences = [float(jnp.abs(x - y).max()) for x, y in zip(grads(splash, qkv), expected, strict=True)]
        print(*(f"{axis}={size}" for axis, size in sizes.items()), *(f"{each:.1e}" for each in differences))
        assert max(differences) < 1e-4

    compare({"data": 2, "fsdp": 2, "tensor": 2}, 4, 256, None, tpu._splash_rows)
    # A chunk is two blocks, or one.
    compare({"fsdp": 1, "context": 2, "tensor": 2}, 1, 1024, None, tpu._splash_over_context)
    compare({"fsdp": 2, "context": 4}, 2, 1024, 300, tpu._splash_over_context)
    try:
        compare({"data": 1, "fsdp": 2, "tensor": 4}, 4, 256, None, tpu._splash_rows)
    except ConfigError as error:
        print(error)


def load_published(*words):
    """SHA-256 of what is held of bases that were published quantised, and their hashes.

    Args:
      words: folder, and what it is quantised to or "-", in turn.
    """
    share.BLOCK_WEIGHTS = 30_000
    mesh = make_mesh(MeshSection(data=1, fsdp=4, tensor=2), jax.devices())
    for folder, kind in zip(words[::2], words[1::2], strict=True):
        source = open_source(Path(folder))
        base, digest = load.load_base(source, "base", jnp.dtype("float32"), mesh, None if kind == "-" else kind)
        print(hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(base))).hexdigest(), digest)


def load_quantized(folder):
    """Each array of a quantised base lies where its axes say; a line of kind and hash of the whole."""
    share.BLOCK_WEIGHTS = 30_000  # blocks of a few rows, of which the last overlaps the one before it
    mesh = make_mesh(MeshSection(data=1, fsdp=4, tensor=2), jax.devices())

    def check(where, array, axes):
        expected = named_sharding(mesh, axes)
        assert array.sharding.is_equivalent_to(expected, array.ndim), (where, array.sharding, expected)
        return array

    for kind in ("nf4", "int8", "fp8"):
        base, _ = load.load_base(open_source(Path(folder)), "base", jnp.dtype("bfloat16"), mesh, kind)
        for name in block_weights(base.cfg):
            param = getattr(base.layers, name)
            map_axes(partial(check, (kind, name)), param.get_value(), param.axes)
        codes = base.layers.down_proj.get_value().codes.addressable_shards[0].data
        assert codes.shape == ((2, 4, 32, 64) if kind == "nf4" else (2, 256, 64)), codes.shape
        whole = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(base))
        print(kind, hashlib.sha256(whole).hexdigest())


def gradients(*configs):
    """Over nf4 the loss of some rows and its gradients are those of one device, on the same codes; a line a base."""
    for file in configs:
        config = load_config(file, ["model.quantization=nf4", "model.remat=full"])
        source, found, bases = open_source(Path(config.model.path)), [], []
        rng = np.random.default_rng(0)
        shape = (8, config.data.max_length)
        segments = np.sort(rng.integers(1, 4, shape, np.int32), axis=1)
        starts = np.array([np.searchsorted(row, row) for row in segments], np.int32)
        batch = {"tokens": rng.integers(0, source.model.vocab_size, shape, np.int32), "segments": segments}
        batch |= {"positions": np.arange(shape[1], dtype=np.int32) - starts, "targets": batch["tokens"][:, ::-1].copy()}
        batch["weights"] = np.ones(shape, np.float32)
        for sizes in (MeshSection(), MeshSection(data=2, fsdp=2, tensor=2)):
            mesh = make_mesh(sizes, jax.devices()[: 8 if sizes.tensor == 2 else 1])
            check_divides(source.model, mesh, config)
            base, _ = load.load_base(source, "base", jnp.dtype("float32"), mesh, config.model.quantization)
            forward = make_forward(config, source.model, mesh)[1]
            placed = jax.device_put(batch, named_sharding(mesh, ("act_batch", "act_seq")))
            with jax.set_mesh(mesh):
                adapter = place_adapter(random_adapter(base), base.cfg, mesh)
                loss = jax.jit(jax.value_and_grad(lambda a, b, rows, f=forward: f.loss(b, a, rows, None)[0]))
                found.append(jax.tree.map(np.asarray, loss(adapter, base, placed)))
            bases.append(jax.tree.map(np.asarray, base))
        jax.tree.map(np.testing.assert_array_equal, *bases)
        (one, gradient), (eight, over) = found
        np.testing.assert_allclose(eight, one, rtol=1e-6)
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
        for right, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(over), strict=True):
            np.testing.assert_allclose(leaf, right, rtol=0, atol=1e-5 * scale)
        print(config.model.path)


def split_rows():
    """Over rows that are split the loss and every gradient are those of one device; a line a mesh and kernel.

    Gradients of adapter and base, under dropout and noise; over the last meshes what each token costs, too. Segments
    end anywhere, a row is one segment, there are padding and tokens without weight; layers with and without a window,
    grouped heads.
    """
    raw = {"model_type": "llama", "vocab_size": 304, "hidden_size": 48, "intermediate_size": 88, "head_dim": 12}
    raw |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 3e-4}
    model = replace(parse_config(raw, "here"), windows=(None, 9, None))
    rng = np.random.default_rng(0)
    base = Decoder(model, lambda weight: jnp.asarray(rng.normal(0, 0.2, weight.shape), jnp.float32))
    adapter = {name: replace(part, dropout=0.1) for name, part in random_adapter(base).items()}
    segments = np.sort(rng.integers(1, 5, (4, 192), np.int32), axis=1)
    segments[0], segments[1, 150:] = 1, 0
    starts = np.array([[np.argmax(row == segment) for segment in row] for row in segments], np.int32)
    batch = {"segments": segments, "positions": (np.arange(192, dtype=np.int32) - starts) * (segments > 0)}
    batch |= {name: rng.integers(0, 304, (4, 192), np.int32) for name in ("tokens", "targets")}
    batch["weights"] = ((rng.random((4, 192)) < 0.7) & (segments > 0)).astype(np.float32)

    def outcome(sizes, forward):
        mesh = make_mesh(MeshSection(**({"fsdp": 1} | sizes)), jax.devices()[: math.prod(sizes.values())])
        placed = place_base(jax.tree.map(lambda leaf: leaf, base), mesh)
        placed = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), base, placed)
        with jax.set_mesh(mesh):
            rows = {name: place_rows(array, mesh) for name, array in batch.items()}
            run = jax.jit(jax.value_and_grad(lambda a, b: forward.loss(b, a, rows, jax.random.key(1))[0], (0, 1)))
            found = run(place_adapter(adapter, model, mesh), placed)
            by_token = jax.jit(forward.by_token)(placed, adapter, rows) if "tensor" in sizes or not sizes else None
            return jax.tree.map(np.asarray, (found, by_token))

    dpo = ObjectiveSection(name="dpo", beta=0.1)
    for kernel, objective, remat, meshes in (
        (attention.blocked_finely, ObjectiveSection(), "full", SPLIT),
        (attention.reference, ObjectiveSection(), "none", SPLIT[-1:]),
        (attention.blocked, dpo, "none", SPLIT[-1:]),
    ):
        forward = Forward(kernel, remat, jnp.dtype("float32"), objective, neftune_noise_alpha=5.0)
        expected = outcome({}, forward)
        for sizes in meshes:
            found, worst = outcome(sizes, forward), 0.0
            for leaf, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=False):
                norm = np.linalg.norm(right)
                assert np.linalg.norm(leaf - right) <= 1e-5 * norm, (sizes, leaf.shape)
                worst = max(worst, float(np.linalg.norm(leaf - right) / max(norm, 1e-30)))
            assert jax.tree.structure(found[0]) == jax.tree.structure(expected[0]) and found[0][0] != 0.0
            name = "reference" if kernel is attention.reference else "tiles"
            print(name, objective.name, *(f"{axis}={size}" for axis, size in sizes.items()), f"{worst:.1e}")


SPLIT = [
    *({"context": 2}, {"context": 4}, {"context": 8}, {"data": 2, "fsdp": 2, "context": 2}),
    *({"context": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}),
]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
