"""A run traces and compiles each of its steps once, whatever its batches, evaluations, saves and samples."""

import chex
import jax
import pytest
from tiny import make_completions, make_llama, make_tokenizer, write_config

import jlora.training.run
from jlora.config import load_config
from jlora.hf.source import read_config
from jlora.inference import generate
from jlora.model.sharding import one_device_mesh
from jlora.planning.compiled import abstract_step
from jlora.training import evaluator
from jlora.training.run import train
from jlora.training.step import make_forward

COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the program came from a cache


@pytest.fixture
def compilations():
    """Names of the programs compiled so far, in order."""
    found: list[str] = []

    def listen(event: str, seconds: float, **more: str) -> None:
        if event == COMPILED:
            found.append(more.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def _traced_once(monkeypatch):
    """Whichever step is traced a second time fails: of training, of evaluation, and both of generation."""
    chex.clear_trace_counter()
    make_train_step, make_eval_step = jlora.training.run.make_train_step, evaluator.make_eval_step.__wrapped__

    def once(jitted, **options):
        return jax.jit(chex.assert_max_traces(jitted.__wrapped__, n=1), **options)

    static = ("sampling", "max_new_tokens", "dtype")
    monkeypatch.setattr(
        jlora.training.run, "make_train_step", lambda *args: chex.assert_max_traces(make_train_step(*args), n=1)
    )
    monkeypatch.setattr(evaluator, "make_eval_step", lambda forward: once(make_eval_step(forward)))
    monkeypatch.setattr(generate, "prefill", once(generate.prefill, static_argnames=static))
    monkeypatch.setattr(generate, "decode", once(generate.decode, static_argnames="sampling", donate_argnames="state"))


@pytest.mark.long
@pytest.mark.usefixtures("_traced_once")
def test_nothing_is_compiled_after_the_first_step(tmp_path, monkeypatch, compilations):
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    # 22 rows, each a packed row of its own: in an epoch the last batch of 3 holds one, and so does the last held out.
    section = {"format": "completion", "max_length": 64, "packing": False}
    data = section | {"eval": str(make_completions(tmp_path / "held.jsonl", 4, first=100))}
    training = {"batch_size": 3, "max_steps": 10, "eval_every": 2, "save_every": 3, "samples": 2}
    cfg = load_config(
        write_config(
            *(tmp_path / "c.yaml", tmp_path / "base", make_completions(tmp_path / "rows.jsonl", 22), tmp_path / "run"),
            **{"data": data, "training": training},
        )
    )
    before_each_step, put = [], jlora.training.run.put_batch

    def counted(*arguments):
        before_each_step.append(len(compilations))
        return put(*arguments)

    monkeypatch.setattr(jlora.training.run, "put_batch", counted)
    assert train(cfg, quiet=True)["steps"] == 10 == len(before_each_step)
    # The evaluation before the first step and the first step itself; the tenth ends past the end of an epoch.
    assert 0 < before_each_step[0] < before_each_step[1]
    assert compilations[before_each_step[1] : before_each_step[-1]] == []
    assert compilations.count("jit(step)") == 2, compilations


@pytest.mark.long
@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("optimizer.learning_rate=3e-5", True),
        ("optimizer.schedule=linear", True),
        ("optimizer.warmup_steps=7", True),
        ("optimizer.min_learning_rate_ratio=0.1", True),
        ("optimizer.weight_decay=0.3", True),
        ("training.max_steps=77", True),
        ("training.seed=9", True),
        ("lora.dropout=0.2", False),
        ("data.max_length=32", False),
    ],
)
def test_another_rate_schedule_seed_or_length_is_the_same_program(tmp_path, override, same):
    """So it comes from the compilation cache; what the program computes otherwise does not."""
    make_llama(tmp_path / "base")
    data = {"format": "completion", "max_length": 64}
    rows = make_completions(tmp_path / "rows.jsonl", 4)
    path = write_config(tmp_path / "c.yaml", tmp_path / "base", rows, tmp_path / "run", data=data)
    _, model = read_config(tmp_path / "base", "base")

    def program(*overrides):
        cfg, mesh = load_config(path, overrides), one_device_mesh()
        with jax.set_mesh(mesh):
            step, arguments, _ = abstract_step(cfg, model, mesh, make_forward(cfg, model, mesh)[1])
            return jax.jit(step).lower(*arguments).as_text()

    assert (program() == program(override)) == same
