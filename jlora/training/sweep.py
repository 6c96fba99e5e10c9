"""Many adapters in one step: the runs of a sweep trained together over one frozen base, in one process.

Each run has the folder, rows, state, log and checkpoints that it would have alone, and its result; what they share is
the base and the compiled step, which takes the step of one run after another: on the same shapes as alone, so with the
same rounding, and with one run's activations at a time. Ranks are filled up with zeros to the largest, which stay zero.
`jlora.train` tells the story of a single run.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import cli, data, distributed, lock, optim, preemption, running, streams
from jlora.adapter import Adapter, Lora, scaled, scaling
from jlora.atomic import write_text
from jlora.checkpoint import Checkpoints
from jlora.config import Config, variants
from jlora.data import Dataset, Epochs, read_data
from jlora.divides import check_batch_split, check_divides
from jlora.errors import ConfigError, NonFiniteError, NothingTrained, UserError
from jlora.evaluate import Evaluator, describe_figures
from jlora.fitting import compile_fastest
from jlora.folders import require_own
from jlora.hf.architecture import parse_config
from jlora.identity import check_identity, run_identity
from jlora.initial import check_options
from jlora.metrics import MetricsLog, ProgressLine, StepMeter, require_wandb
from jlora.pretrained import Pretrained, load_pretrained, make_adapter, open_pretrained
from jlora.report import write_report
from jlora.running import batch_rows, due, make_run_dir, put_batch, require_trained, run_summary, warn_of_length
from jlora.sharding import make_mesh
from jlora.step import Forward, TrainState, init_state, make_forward, make_train_step, param_dtype, place_adapter
from jlora.summary import finished_summary, peak_memory
from jlora.verify import export_adapter

Tree = Any


@dataclass(eq=False)
class Run:
    """One run of a sweep: what it has to itself, and how far it is.

    Attributes:
      state: as the run alone has it, with its own rank; while it is trained, the stacked state is the one in force.
      summary: once it has ended.
    """

    cfg: Config
    train_data: Dataset
    eval_data: Dataset | None
    epochs: Epochs
    num_steps: int
    state: TrainState
    checkpoints: Checkpoints
    identity: dict[str, Any]
    batches: Any
    step: int
    log: MetricsLog
    meter: StepMeter
    evaluator: Evaluator | None
    summary: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """The entry's name: that of its folder."""
        return self.cfg.output_dir.rpartition("/")[2]

    @property
    def scale(self) -> float:
        """What its product BA is multiplied by, in every layer."""
        return scaling(self.cfg.lora, self.cfg.lora.alpha, self.cfg.lora.rank)

    def wants(self, step: int, stopped: bool) -> tuple[bool, bool]:
        """Whether the run is evaluated, and whether it is saved, after a step."""
        last = step == self.num_steps
        evaluated = last or due(self.cfg.training.eval_every, step)
        return evaluated, last or stopped or due(self.cfg.training.save_every, step)


@dataclass(frozen=True, kw_only=True)
class _Scaled(Forward):
    """A forward pass whose adapter has a traced scale, folded into A: that of `Lora` is a constant of the program."""

    scale: jax.Array

    def loss(self, base: Any, adapter: Adapter, *rest: Any) -> Any:
        return super().loss(base, scaled(adapter, self.scale), *rest)


def make_sweep_step(cfg: Config, forward: Forward, labels: Tree) -> Callable[..., tuple[TrainState, list[Any]]]:
    """(states [K ...], frozen leaves, batches [K A B T], knobs [K ...]) -> (new states, each run's metrics).

    Mapped by a loop, not by vmap: products with the tokens of all runs at once would round otherwise than those of a
    run alone, which AdamW makes steps of where a gradient is next to nothing; and hold all runs' activations.

    Args:
      knobs: "rates" [K S], the learning rate of every step; "weight_decay", "scale" and "active" [K]. What is not
        active stays as it is, is not computed, and has no metrics.
    """

    def one(state: TrainState, frozen: Tree, batch: Tree, knobs: Tree) -> tuple[TrainState, Tree]:
        def schedule(count: Any) -> jax.Array:
            return knobs["rates"][count]

        section = cfg.optimizer.model_copy(update={"weight_decay": knobs["weight_decay"]})
        optimizer = optim.update_rule(section, schedule, labels)
        step = make_train_step(cfg, _Scaled(**vars(forward), scale=knobs["scale"]), optimizer, schedule)
        return step(state, frozen, batch)

    def step(states: TrainState, frozen: Tree, batches: Tree, knobs: Tree) -> tuple[TrainState, list[Any]]:
        def if_active(run: tuple[TrainState, Tree, Tree]) -> tuple[TrainState, Tree]:
            state, batch, own = run
            _, metrics = jax.eval_shape(one, state, frozen, batch, own)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)
            return jax.lax.cond(own["active"], lambda: one(state, frozen, batch, own), lambda: (state, nothing))

        new, metrics = jax.lax.map(if_active, (states, batches, knobs))
        count = len(knobs["active"])
        return new, [jax.tree.map(lambda x, k=k: x[k], metrics) for k in range(count)]

    return step


def make_knobs(runs: list[Run]) -> dict[str, jax.Array]:
    """What differs between the runs beside state and rows; "active" is added with each step."""
    longest = max(run.num_steps for run in runs)
    counts = jnp.arange(longest + 1)
    rates = [optim.learning_rate(run.cfg.optimizer, run.num_steps) for run in runs]
    return {
        "rates": jnp.stack([jnp.broadcast_to(jnp.float32(jax.vmap(rate)(counts)), counts.shape) for rate in rates]),
        "weight_decay": jnp.float32([run.cfg.optimizer.weight_decay for run in runs]),
        "scale": jnp.float32([run.scale for run in runs]),
    }


def unscaled(tree: Tree) -> Tree:
    """A tree with every `Lora` in it at scale 1, so that those of all runs have one structure; see `scaled`."""

    def one(x: Any) -> Any:
        return replace(x, scale=1.0) if isinstance(x, Lora) else x

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Lora))


def widen(tree: Tree, like: Tree) -> Tree:
    """The leaves filled up with zeros to the shapes of those of `like`, in its structure."""

    def fill(x: jax.Array, wide: jax.Array) -> jax.Array:
        missing = [(0, n - m) for m, n in zip(x.shape, wide.shape, strict=True)]
        return jnp.pad(x, missing) if any(map(any, missing)) else x

    leaves = map(fill, jax.tree.leaves(tree), jax.tree.leaves(like))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def stack(runs: list[Run], wide: TrainState) -> TrainState:
    """The states of the runs at the shapes of `wide`, one after another in a leading dim."""
    return jax.tree.map(lambda *parts: jnp.stack(parts), *(widen(run.state, wide) for run in runs))


def own_state(states: TrainState, k: int, run: Run) -> TrainState:
    """The state of the `k`th run as it would be alone."""

    def cut(x: jax.Array, like: jax.Array) -> jax.Array:
        return jax.device_put(x[k][tuple(slice(n) for n in like.shape)], like.sharding)

    leaves = [*map(cut, jax.tree.leaves(states), jax.tree.leaves(run.state))]
    return jax.tree.unflatten(jax.tree.structure(run.state), leaves)


def train_together(cfg: Config, quiet: bool = False, as_json: bool = False) -> int:
    """Run all entries of a sweep to their ends, or on from their last checkpoints; returns the exit code.

    Raises:
      UserError: see `jlora.errors`; what was saved before stays whole. A run past its limit of non-finite steps ends
        alone, and the error is raised once the others have ended.
    """
    began = time.monotonic()
    if distributed.expected(cfg.distributed):
        raise ConfigError("a sweep runs in one process; take the keys of distributed out, or start one process")
    preemption.end_on_signals()
    folder = make_run_dir(cfg)
    mesh = make_mesh(cfg.mesh, jax.devices())
    check_batch_split(cfg, mesh)
    require_wandb(cfg.training.wandb)
    configs = variants(cfg)
    require_own(folder, ConfigError, (Path(each.output_dir).name for each in configs))
    with ExitStack() as locks, jax.set_mesh(mesh):
        for each in (folder, *map(make_run_dir, configs)):
            locks.enter_context(lock.held(each))
        opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
        model = parse_config(opened.source.config, opened.name)
        check_divides(model, mesh, cfg)
        for entry in configs:
            check_options(entry.lora, model)
        kernel, forward = make_forward(cfg, model, mesh)
        if not quiet:
            warn_of_length(cfg, opened)
        rows = [read_data(each, opened.tokenizer) for each in configs]
        pretrained = load_pretrained(opened, param_dtype(cfg), mesh, cfg.model.quantization)
        runs = [open_run(each, *pair, pretrained, forward, mesh) for each, pair in zip(configs, rows, strict=True)]
        write_text(folder / "config.yaml", cfg.dump_yaml())
        progress = ProgressLine(max(run.num_steps for run in runs), min(run.step for run in runs), quiet)
        progress.say(f"base {cfg.model.path}: one for {len(runs)} adapters; attention {kernel}")
        try:
            failures, stopped = _train(cfg, runs, pretrained, forward, mesh, progress, began)
        finally:
            progress.close()
            for run in runs:
                run.log.close()
                run.checkpoints.close()
    summary = {
        "status": "failed" if failures else "preempted" if stopped else "finished",
        "runs": {run.name: run.summary for run in runs},
        "wall_seconds": time.monotonic() - began,
        "peak_memory_bytes": peak_memory(None),
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    with streams.told(result=as_json and not stopped):
        if as_json:
            cli.print_json(summary)
        elif not quiet:
            _print(runs)
    if failures:
        raise NonFiniteError("; ".join(failures))
    return cli.PREEMPTED if stopped else 0


def open_run(
    cfg: Config,
    train_data: Dataset,
    eval_data: Dataset | None,
    pretrained: Pretrained,
    forward: Forward,
    mesh: jax.sharding.Mesh,
) -> Run:
    """A run at its start, or where its last checkpoint left it."""
    folder = make_run_dir(cfg)
    epochs = Epochs(train_data, cfg.data, cfg.training.batch_size, cfg.training.seed)
    num_steps = cfg.training.max_steps or epochs.num_batches(cfg.training.epochs)
    adapter = place_adapter(make_adapter(cfg, pretrained), pretrained.base.cfg, mesh)
    params = {"adapter": adapter, "base": pretrained.base}
    optimizer = optim.make_optimizer(cfg.optimizer, num_steps, optim.labels(params, cfg.method))
    state = init_state(params, optimizer, cfg, mesh)
    checkpoints = Checkpoints(folder / "checkpoints", cfg.training.keep_checkpoints)
    identity = run_identity(cfg, pretrained, train_data, eval_data)
    batches = data.batches(epochs, cfg.training.batch_size, batch_rows(cfg, mesh))
    start = checkpoints.newest_whole()
    summary = None
    if start:
        saved = checkpoints.identity(start)
        identity["history"] = check_identity(folder, start, saved, identity, cfg.resume.allow_changes)
        identity |= {"remat": saved["remat"]} if "remat" in saved else {}
        summary = finished_summary(folder) if start == num_steps else None
        restored = checkpoints.restore(start, state)
        state = restored.state
        batches.set_state(restored.data)
    checkpoints.require_room(state, running.saves_left(cfg.training.save_every, start, num_steps))
    write_text(folder / "config.yaml", cfg.dump_yaml())
    log = MetricsLog(folder, start, cfg.training.wandb, cfg.model_dump(), True)
    meter = StepMeter(log, ProgressLine(num_steps, start, True), epochs, cfg.training, start, num_steps)
    evaluator = None
    if eval_data is not None:
        size = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
        evaluator = Evaluator(eval_data, cfg.data, size, replace(forward, remat="none"), mesh)
    parts = train_data, eval_data, epochs, num_steps, state, checkpoints, identity, batches, start
    return Run(cfg, *parts, log, meter, evaluator, summary)


def _train(
    cfg: Config,
    runs: list[Run],
    pretrained: Pretrained,
    forward: Forward,
    mesh: jax.sharding.Mesh,
    progress: ProgressLine,
    began: float,
) -> tuple[list[str], bool]:
    """The loop. Returns what ended runs before their time, in words, and whether a signal stopped all."""
    wide = unscaled(max(runs, key=lambda run: run.cfg.lora.rank).state)
    params = {"adapter": wide.trained["adapter"], "base": pretrained.base}
    labels = optim.labels(params, cfg.method)
    _, frozen = optim.partition(params, labels)
    remat = next((run.identity["remat"] for run in runs if "remat" in run.identity), cfg.model.remat)
    failures: list[str] = []
    compiled: Any = None

    def live() -> list[Run]:
        return [run for run in runs if run.summary is None and run.step < run.num_steps]

    def evaluate(run: Run) -> float | None:
        if run.evaluator is None:
            return None
        with ExitStack() as paused:
            for each in live():
                paused.enter_context(each.meter.paused())
            # At the shapes of all, so that one program serves them.
            adapter = widen(run.state.trained["adapter"], wide.trained["adapter"])
            figures = run.evaluator.measure(pretrained.base, scaled(adapter, run.scale))
        run.log.write({"step": run.step, **{f"eval_{name}": value for name, value in figures.items()}})
        progress.say(f"{run.name}, step {run.step}: held-out {describe_figures(figures)}")
        return figures["loss"]

    def fail(run: Run, error: UserError) -> None:
        failures.append(f"{run.name}: {error}")
        run.summary = {"status": "failed", "error": str(error), "steps": run.step}

    def end(run: Run) -> None:
        """Write what a run leaves, finished or stopped."""
        run.checkpoints.wait()
        folder = Path(run.cfg.output_dir)
        if run.step == run.num_steps:
            try:
                require_trained(run.state)
            except NothingTrained as error:
                return fail(run, error)
            where = (run.cfg.lora, cfg.model.path, pretrained, forward.dtype, mesh)
            export_adapter(folder / "adapter", run.state.trained["adapter"], *where)
        arguments = run.train_data, run.eval_data, run.epochs, run.identity, began, run.meter, compiled
        run.summary = run_summary(run.cfg, run.step, run.num_steps, run.state, frozen, *arguments)
        write_text(folder / "summary.json", json.dumps(run.summary, indent=2) + "\n")
        write_report(folder)

    def compile_step(remat: str, arguments: tuple[Any, ...]) -> Any:
        step = make_sweep_step(cfg, replace(forward, remat=remat), labels)
        kept = jax.tree.map(lambda x: x.sharding, arguments[0])
        return jax.jit(step, donate_argnums=0, out_shardings=(kept, None)).lower(*arguments).compile()

    for run in runs:
        if run.step == 0:
            evaluate(run)
        elif run.step == run.num_steps and run.summary is None:  # it ended between its checkpoint and its summary
            end(run)
    slots = live()  # the runs in the stacked state; they end one by one
    states, knobs = (stack(slots, wide), make_knobs(slots)) if slots else (None, {})
    ticks, stopped, started = min(run.step for run in runs), False, time.monotonic()
    while (taking := live()) and not stopped:
        rows = {run.name: next(run.batches) for run in taking}
        some = next(iter(rows.values()))
        batch = {name: np.stack([rows.get(run.name, some)[name] for run in slots]) for name in some}
        on_device = put_batch(batch, cfg.training.gradient_accumulation_steps, mesh)
        knobs["active"] = jnp.asarray([run in taking for run in slots])
        if compiled is None:
            progress.say(f"compiling the training step of {len(slots)} adapters")
            arguments = states, frozen, on_device, knobs
            if remat == "auto":
                compile_with = partial(compile_step, arguments=arguments)
                remat, compiled = compile_fastest(cfg, pretrained.base.cfg, mesh, compile_with)
            else:
                compiled = compile_step(remat, arguments)
            for run in slots:
                run.identity["remat"] = remat
                run.meter.start()
            stop_after = preemption.save_on_signals()
        states, metrics = compiled(states, frozen, on_device, knobs)
        ticks += 1
        stopped = stop_after(ticks)
        wanted = {run.name: run.wants(run.step + 1, stopped) for run in taking}
        for run in taking:
            run.step += 1
            try:
                run.meter.took(run.step, metrics[slots.index(run)], run.epochs.tokens_in(run.step - 1))
                if any(map(any, wanted.values())):
                    run.meter.settle()  # a run past its limit of non-finite steps ends here, unsaved
            except NonFiniteError as error:
                fail(run, error)
        for run in taking:
            evaluated, saved = wanted[run.name]
            if run.summary is None and (evaluated or saved):
                run.state = own_state(states, slots.index(run), run)
                loss = evaluate(run) if evaluated else None
                if saved:
                    run.checkpoints.save(run.step, run.state, run.batches.get_state(), run.identity, loss)
                if run.step == run.num_steps or stopped:
                    end(run)
        tokens = sum(run.meter.tokens for run in runs)
        progress.update(ticks, [run.meter.loss for run in taking], tokens / (time.monotonic() - started))
    return failures, any(run.summary is not None and run.summary["status"] == "preempted" for run in runs)


def _print(runs: list[Run]) -> None:
    """The end of a sweep, for people."""
    for run in runs:
        summary = run.summary or {}
        losses = {name: summary.get(name) for name in ("train_loss", "eval_loss")}
        text = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items() if value is not None)
        print(f"{run.name}: {summary.get('status')} after {run.step} steps, {text}")
