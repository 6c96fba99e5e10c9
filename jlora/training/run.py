"""The story of a run, top to bottom: open, resume, loop, finish.

If the run folder holds a checkpoint of the same run, training resumes from it. A sweep and the effort report are loops
over `train`, which hand what runs have in common from one to the next (`Shared`).
"""

import datetime
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jlora.config import Config
from jlora.data import packing
from jlora.data.dataset import Dataset
from jlora.data.packing import Epochs
from jlora.errors import ConfigError, DataError, ModelError, NonFiniteError
from jlora.files import lock
from jlora.files.atomic import write_json, write_text
from jlora.hf.pretrained import Pretrained, first_adapter, make_reference, warn_of_dropout, warn_of_length
from jlora.hf.source import base_fingerprint
from jlora.hf.verify import export_adapter
from jlora.model.adapter_init import check_options
from jlora.model.divisibility import check_batch_split, check_divides
from jlora.model.sharding import make_mesh
from jlora.reports.run import write_report
from jlora.runtime import distributed, signals
from jlora.runtime.watch import Watch
from jlora.training import optim
from jlora.training.auto_remat import compile_fastest
from jlora.training.checkpoint import Checkpoints
from jlora.training.evaluator import Evaluator, describe_figures
from jlora.training.folder import (
    batch_rows,
    due,
    make_run_dir,
    plan_steps,
    put_batch,
    require_taken,
    require_trained,
    saves_left,
)
from jlora.training.identity import check_identity, require_one_job, run_identity
from jlora.training.metrics import MetricsLog, ProgressLine, StepMeter, require_wandb
from jlora.training.samples import Samples
from jlora.training.shared import Shared
from jlora.training.step import (
    Forward,
    TrainState,
    count_parameters,
    count_trained,
    init_state,
    make_forward,
    make_train_step,
)
from jlora.training.summary import finished_summary, measured, rows_of


@dataclass
class Run:
    """A run from its opening to its end.

    Attributes:
      state, frozen, hyper: the arguments of the step beside the batch.
      start, step: steps done when this process took the run up, and now.
      compiled: the step, once it is.
    """

    cfg: Config
    folder: Path
    mesh: jax.sharding.Mesh
    shared: Shared
    watch: Watch
    kernel: str
    forward: Forward
    pretrained: Pretrained
    train_data: Dataset
    eval_data: Dataset | None
    epochs: Epochs
    num_steps: int
    state: TrainState
    frozen: dict[str, Any]
    hyper: dict[str, jax.Array]
    identity: dict[str, Any]
    checkpoints: Checkpoints
    batches: Any
    remat: str
    start: int = 0
    step: int = 0
    compiled: Any = None

    @property
    def params(self) -> dict[str, Any]:
        """{"adapter", "base"} and, of an objective on pairs, "reference", as they are now."""
        return optim.join(self.state.trained, self.frozen)


def train(cfg: Config, quiet: bool = False, shared: Shared | None = None, until: int | None = None) -> dict[str, Any]:
    """Run a config to its end, or on from its last checkpoint; returns the summary.

    Args:
      shared: what an earlier run of this process has left for this one.
      until: a step to stop after, evaluated and saved, as a signal would stop it; for `jlora.training.sweep`.

    Raises:
      UserError: see `jlora.errors`; what was saved before stays whole.
    """
    began = time.monotonic()
    signals.end_on_signals()
    distributed.start(cfg.distributed)
    mesh = make_mesh(cfg.mesh, jax.devices())
    check_batch_split(cfg, mesh)
    require_wandb(cfg.training.wandb)
    folder = make_run_dir(cfg)
    watch = Watch(cfg.distributed.step_timeout)  # before the processes compare anything: one that differs ends all
    main = distributed.is_main()
    quiet = quiet or not main
    with lock.held(folder, main), jax.set_mesh(mesh):
        require_one_job(cfg, folder)
        run = open_run(cfg, folder, mesh, watch, shared or Shared(), quiet)
        finished = resume(run)
        if finished is not None:
            if not quiet:
                print(f"{folder}: this run is finished; nothing is left to do", file=sys.stderr)
            run.checkpoints.close()
            return finished
        if main:
            write_text(folder / "config.yaml", cfg.dump_yaml())
        meter = loop(run, until, quiet)
        summary = finish(run, meter, began)
        # A process that has left the job treats peers as lost after host_timeout seconds.
        distributed.wait_for_all("report written")
    return summary


def open_run(cfg: Config, folder: Path, mesh: jax.sharding.Mesh, watch: Watch, shared: Shared, quiet: bool) -> Run:
    """The base, the rows, and what is trained of the whole, before the first step.

    Raises:
      ConfigError, DataError, ModelError: what does not fit together, before anything large is read where it can be.
    """
    opened = shared.open(cfg)
    check_divides(opened.model, mesh, cfg)
    if cfg.method == "lora":
        check_options(cfg.lora, opened.model)
        optim.check_rule(cfg, opened.model.num_hidden_layers)
    kernel, forward = make_forward(cfg, opened.model, mesh)
    if not quiet:
        warn_of_length(opened.source, f"data.max_length={cfg.data.max_length}", cfg.data.max_length)
        warn_of_dropout(opened.source)
    if not quiet and opened.tokenizer.writes_day and cfg.data.date is None:
        today = datetime.date.today()
        print(
            "warning: the chat template writes the day into every row, so this run does not resume tomorrow, when "
            f"its rows are others; set data.date={today}",
            file=sys.stderr,
        )
    loaded = {"base": base_fingerprint(opened.source), "tokenizer": opened.tokenizer.digest}
    distributed.require_agreement("base", ModelError, loaded)
    train_data, eval_data = shared.read(cfg)
    digests = {"data": train_data.digest, "eval": eval_data.digest if eval_data else None}
    distributed.require_agreement("data", DataError, digests)
    pretrained = shared.load(cfg, mesh)
    epochs, num_steps = plan_steps(cfg, train_data)
    params = {"adapter": first_adapter(cfg, pretrained, mesh), "base": pretrained.base}
    if (reference := make_reference(cfg, pretrained, mesh)) is not None:
        params["reference"] = reference
    trained, frozen = optim.split(params, cfg.method)
    return Run(
        cfg=cfg,
        folder=folder,
        mesh=mesh,
        shared=shared,
        watch=watch,
        kernel=kernel,
        forward=forward,
        pretrained=pretrained,
        train_data=train_data,
        eval_data=eval_data,
        epochs=epochs,
        num_steps=num_steps,
        state=init_state(trained, cfg, mesh),
        frozen=frozen,
        hyper=optim.hyperparameters(cfg.optimizer, num_steps),
        identity=run_identity(cfg, pretrained, train_data, eval_data),
        checkpoints=Checkpoints(folder / "checkpoints", cfg.training.keep_checkpoints),
        batches=packing.batches(epochs, cfg.training.batch_size, batch_rows(cfg, mesh)),
        remat=cfg.model.remat,
    )


def resume(run: Run) -> dict[str, Any] | None:
    """Bring a run to where an earlier start left off; returns the summary of one that is finished.

    Raises:
      ConfigError, ModelError: the checkpoint is another run's, or beyond the steps that are asked for.
    """
    cfg, num_steps = run.cfg, run.num_steps
    start = distributed.from_first(f"newest checkpoint of {run.folder}", run.checkpoints.newest_whole)
    if start:
        saved = run.checkpoints.identity(start)
        history = check_identity(run.folder, start, saved, run.identity, cfg.resume.allow_changes)
        run.identity["history"] = history
        if start > num_steps:
            raise ConfigError(
                f"{run.folder}: is at step {start} already, past the {num_steps} asked for; raise training.max_steps "
                "or training.epochs"
            )
        if run.remat == "auto":
            run.remat = saved.get("remat", run.remat)
        done = finished_summary(run.folder) if start == num_steps else None
        if done is not None:
            return done
        run.state, position = run.checkpoints.restore(start, run.state)
        run.batches.set_state(position)
    run.start = run.step = start
    run.checkpoints.require_room(run.state, saves_left(cfg.training.save_every, start, num_steps))
    return None


def loop(run: Run, until: int | None, quiet: bool) -> StepMeter:
    """Take steps to the end, or until told to stop; evaluates, saves and logs on the way.

    Raises:
      NonFiniteError: too many steps were skipped; ConfigError: a checkpoint could not be saved.
    """
    cfg, num_steps = run.cfg, run.num_steps
    log = MetricsLog(run.folder, run.start, cfg.training.wandb, cfg.model_dump(), distributed.is_main())
    progress = ProgressLine(num_steps, run.start, quiet)
    meter = StepMeter(log, progress, run.epochs, cfg.training, run.start, num_steps)
    announce(run, progress)
    evaluate = partial(held_out_loss, run, make_evaluator(run), log, progress, meter)
    samples = make_samples(run, progress)
    run.watch.beat(run.step)
    try:
        if run.step == 0:
            evaluate()
            if samples is not None:
                samples.take("before", run.params)
        end, stopped = min(num_steps, until or num_steps), False
        while run.step < end and not stopped:
            # While the step before still runs: its figures are waited for only after this one is under way.
            batch = put_batch(next(run.batches), cfg.training.gradient_accumulation_steps, run.mesh)
            if run.compiled is None:
                compile_step(run, batch, progress)
                stop_after = signals.save_on_signals()
                meter.start()
            require_taken(batch, run.compiled, run.step + 1)
            run.state, metrics = run.compiled(run.state, run.frozen, batch, run.hyper)
            run.step += 1
            meter.took(run.step, metrics, run.epochs.tokens_in(run.step - 1))
            run.watch.beat(run.step)
            run.checkpoints.check()
            last, stopped = run.step == end, stop_after(run.step)
            eval_loss = evaluate() if last or due(cfg.training.eval_every, run.step) else None
            if last or stopped or due(cfg.training.save_every, run.step):
                meter.settle()  # a run past its limit of non-finite steps ends here, unsaved
                run.checkpoints.save(run.step, run.state, run.batches.get_state(), run.identity, eval_loss)
        meter.settle()
        run.checkpoints.wait()
    except NonFiniteError as error:
        run.checkpoints.wait()
        kept = f"; checkpoint {run.checkpoints.steps()[-1]} stays" if run.checkpoints.steps() else ""
        raise NonFiniteError(f"{error}{kept}") from None
    finally:
        progress.close()
        try:
            log.close()
        finally:  # a full disk takes no log, and what is being saved is to be told, too
            run.checkpoints.close()
    if run.step == num_steps:
        require_trained(run.state)
        if samples is not None:
            samples.take("after", run.params)
    return meter


def finish(run: Run, meter: StepMeter, began: float) -> dict[str, Any]:
    """Export the adapter of a run that came to its end, and write what every run leaves; returns its summary."""
    cfg, finished = run.cfg, run.step == run.num_steps
    exported = finished and cfg.method == "lora"
    if exported:
        where = (cfg.lora, run.pretrained, run.forward.dtype, run.mesh)
        export_adapter(run.folder / "adapter", run.params["adapter"], *where)
    summary = {
        "status": "finished" if finished else "preempted",
        "steps": run.step,
        "epochs": run.epochs.epoch_at(run.step),
        "skipped_steps": int(run.state.skipped),
        "rows": rows_of(run.train_data, run.eval_data),
        "trainable_params": count_trained(run.state.trained),
        "frozen_params": count_parameters({name: part for name, part in run.frozen.items() if name != "scales"}),
        "remat": run.identity.get("remat", run.remat),
        "hashes": run.identity["hashes"],
        "history": run.identity.get("history", []),
        "adapter": str(run.folder / "adapter") if exported else None,
        "wall_seconds": time.monotonic() - began,
        **measured(run.folder, meter, run.compiled),
    }
    if distributed.is_main():
        write_json(run.folder / "summary.json", summary)
        write_report(run.folder)
    return summary


def compile_step(run: Run, batch: dict[str, jax.Array], progress: ProgressLine) -> None:
    """Compile the step for a batch, with the fastest rematerialisation that fits where the config leaves it open."""
    progress.say("compiling the training step")

    def lower(remat: str) -> Any:
        step = make_train_step(run.cfg, replace(run.forward, remat=remat))
        return jax.jit(step, donate_argnums=0).lower(run.state, run.frozen, batch, run.hyper)

    if run.remat == "auto":
        run.remat, run.compiled = compile_fastest(
            run.cfg, run.pretrained.base.cfg, run.mesh, lambda remat: run.shared.compile(lower(remat))
        )
        progress.say(f"rematerialisation {run.remat}, the fastest that fits")
    else:
        run.compiled = run.shared.compile(lower(run.remat))
    run.identity["remat"] = run.remat  # a run that resumes rounds as it did before


def make_evaluator(run: Run) -> Evaluator | None:
    """What measures the held-out rows, where there are some."""
    if run.eval_data is None:
        return None
    rows = run.cfg.training.batch_size // run.cfg.training.gradient_accumulation_steps
    # Nothing is differentiated, so nothing is kept.
    return Evaluator(run.eval_data, run.cfg.data, rows, replace(run.forward, remat="none"), run.mesh)


def held_out_loss(
    run: Run, evaluator: Evaluator | None, log: MetricsLog, progress: ProgressLine, meter: StepMeter
) -> float | None:
    """Held-out loss of the current state, logged; None without held-out rows."""
    if evaluator is None:
        return None
    with meter.paused():
        now = run.params
        parts = now["base"], now["adapter"], now.get("reference")
        figures = evaluator.measure(*parts, lambda: run.watch.beat(run.step))
    log.write({"step": run.step, **{f"eval_{name}": value for name, value in figures.items()}})
    progress.say(f"step {run.step}: held-out {describe_figures(figures)}")
    return figures["loss"]


def make_samples(run: Run, progress: ProgressLine) -> Samples | None:
    """What answers some rows before and after, where the config asks for it and one device holds the model."""
    count = run.cfg.training.samples
    if count and run.mesh.size > 1:
        progress.say("training.samples is left out: rows are answered on one device alone")
    if not count or run.mesh.size > 1:
        return None
    return Samples(run.folder, run.eval_data or run.train_data, count, run.pretrained, run.forward.dtype)


def announce(run: Run, progress: ProgressLine) -> None:
    """What is about to happen, in three lines."""
    cfg, rows = run.cfg, run.train_data
    dropped = f", dropped {dict(rows.dropped)}" if rows.dropped else ""
    cut = f", {rows.truncated} cut at {cfg.data.max_length} tokens" if rows.truncated else ""
    held = f" in {cfg.model.quantization}" if cfg.model.quantization else ""
    total, trained = count_parameters(run.pretrained.base), count_trained(run.state.trained)
    progress.say(f"base {cfg.model.path}{held}: {total:,} parameters, {trained:,} trained; attention {run.kernel}")
    sources = ", ".join(source.path for source in cfg.data.sources)
    progress.say(f"data {sources}: {len(rows.examples)} sequences of {rows.read} rows{dropped}{cut}")
    progress.say(f"{run.num_steps} steps" + (f", resumed from step {run.start}" if run.start else ""))
