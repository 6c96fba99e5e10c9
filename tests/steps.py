"""What `train` puts together, to be stepped by hand."""

import hashlib
from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
from shared_data import SHARED
from tiny import write_config

from jlora.config import load_config
from jlora.data import packing
from jlora.data.encoding import read_data
from jlora.data.packing import Epochs
from jlora.hf.adapters import first_adapter
from jlora.hf.pretrained import load_pretrained, open_pretrained
from jlora.model.sharding import one_device_mesh
from jlora.training import optim
from jlora.training.checkpoint import flatten
from jlora.training.run import put_batch
from jlora.training.step import init_state, make_forward, make_train_step, param_dtype

STORIES = SHARED / "stories260K"
REVIEWS = SHARED / "reviews" / "sephora_reviews.jsonl"
COMPLETIONS = {"format": "completion", "max_length": 64}


def configure(folder, base, rows, sections):
    overrides = [f"model.{key}={value}" for key, value in sections.pop("model", {}).items()]
    return load_config(write_config(folder / "run.yaml", base, rows, folder / "run", **sections), overrides)


def tiny_config(tiny, folder, **sections):
    sections["data"] = COMPLETIONS | sections.get("data", {})
    return configure(folder, *tiny, sections)


def review_config(folder, **sections):
    sections["data"] = {"max_length": 256, "packing": False, "on_bad_row": "skip"} | sections.get("data", {})
    return configure(folder, STORIES, REVIEWS, sections)


@cache
def open_base(path, dtype):
    return load_pretrained(open_pretrained(path, None, None), dtype, one_device_mesh())


def open_run(cfg, num_steps=20, like=None):
    """What `train` puts together, to be stepped by hand; with the compiled step of a run that it is `like`."""
    mesh = one_device_mesh()
    pretrained = open_base(cfg.model.path, param_dtype(cfg))
    _, forward = make_forward(cfg, pretrained.base.cfg, mesh)
    train_data, _ = read_data(cfg, pretrained.tokenizer)
    params = {"adapter": first_adapter(cfg, pretrained, mesh), "base": pretrained.base}
    trained, frozen = optim.split(params, cfg.method)
    hyper = optim.hyperparameters(cfg.optimizer, num_steps)
    return SimpleNamespace(
        cfg=cfg,
        mesh=mesh,
        forward=forward,
        pretrained=pretrained,
        train_data=train_data,
        epochs=Epochs(train_data, cfg.data, cfg.training.batch_size, cfg.training.seed),
        state=init_state(trained, cfg, mesh),
        frozen=frozen,
        step=like.step if like else jax.jit(make_train_step(cfg, forward)),
        hyper=hyper,
    )


def take_steps(run, count, same=None):
    """Take steps in place, on the run's batches or always on the `same`; returns their metrics."""
    batches = packing.batches(run.epochs, run.cfg.training.batch_size)
    lines = []
    for _ in range(count):
        batch = same or put_batch(next(batches), run.cfg.training.gradient_accumulation_steps, run.mesh)
        run.state, metrics = run.step(run.state, run.frozen, batch, run.hyper)
        lines.append({name: value.item() for name, value in metrics.items()})
    return lines


def digest(tree):
    """SHA-256 over every leaf's path and bytes."""
    found = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        found.update(name.encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def largest(a, b):
    """The largest difference between two dicts of arrays of the same names."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def restore_raw(step_folder):
    """Arrays of a checkpoint by name, as Orbax itself finds them."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(step_folder.absolute() / "state")
    return {name: np.asarray(leaf) for name, leaf in tree.items()}
