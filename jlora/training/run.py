"""The story of a run, top to bottom: open, resume, loop, finish.

If the run folder holds a checkpoint of the same run, training resumes from it. A sweep and the effort report are loops
over `train`, which hand what runs have in common from one to the next (`Shared`).
"""

import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import jax

from jlora.config import Config
from jlora.config.places import places_of
from jlora.data.checks import count_sources
from jlora.errors import NonFiniteError
from jlora.files import lock
from jlora.files.atomic import write_json, write_text
from jlora.files.starts import add_start, read_starts
from jlora.files.text import counted
from jlora.hf.verify import export_adapter
from jlora.model.divisibility import check_batch_split
from jlora.model.sharding import make_mesh
from jlora.reports.run import write_report
from jlora.runtime import distributed, signals
from jlora.runtime.distributed import Watch
from jlora.training.auto_remat import compile_fastest
from jlora.training.checkpoint import Checkpoints
from jlora.training.evaluator import Evaluator, describe_figures
from jlora.training.folder import (
    due,
    make_run_dir,
    put_batch,
    require_taken,
    require_trained,
)
from jlora.training.identity import require_one_job
from jlora.training.metrics import Callbacks, MetricsLog, ProgressLine, StepMeter, figures_of
from jlora.training.opening import Run, Shared, announce, open_run, resume
from jlora.training.provenance import provenance, write_provenance
from jlora.training.samples import Samples
from jlora.training.step import (
    count_parameters,
    count_trained,
    make_train_step,
)
from jlora.training.summary import final_losses, origin, peak_memory, seconds_before, versions
from jlora.training.trackers import open_trackers, require_trackers


def train(
    cfg: Config,
    quiet: bool = False,
    shared: Shared | None = None,
    until: int | None = None,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Run a config to its end, or on from its last checkpoint; returns the summary.

    Args:
      shared: what an earlier run of this process has left for this one.
      until: a step to stop after, evaluated and saved, as a signal would stop it; for `jlora.training.sweep`.
      callbacks: of a Python program.

    Raises:
      UserError: see `jlora.errors`; what was saved before stays whole.
    """
    began = time.monotonic()
    signals.end_on_signals()
    distributed.start(cfg.distributed)
    mesh = make_mesh(cfg.mesh, jax.devices())
    check_batch_split(cfg, mesh)
    require_trackers(cfg.training)
    folder = make_run_dir(cfg)
    watch = Watch(cfg.distributed.step_timeout)  # before the processes compare anything: one that differs ends all
    main = distributed.is_main()
    quiet = quiet or not main
    with lock.locked(folder, main) as require_there, jax.set_mesh(mesh):
        require_one_job(cfg, folder)
        run = open_run(cfg, folder, mesh, watch, shared or Shared(), quiet)
        run.require_there, run.callbacks = require_there, callbacks or run.callbacks
        finished = resume(run)
        if finished is not None:
            if not quiet:
                print(f"{folder}: this run is finished; nothing is left to do", file=sys.stderr)
            run.checkpoints.close()
            return finished
        run.began = began - seconds_before(folder, run.start)
        if main:
            taken = cfg.model_copy(update={"model": run.cfg.model})  # as `base.load_checked` decided
            write_text(folder / "config.yaml", taken.dump_yaml())
            start = {"step": run.start, **origin(began), "changes": run.changes, "paths": places_of(cfg)}
            add_start(folder, start)
        meter = loop(run, until, quiet)
        summary = finish(run, meter, began)
        # A process that has left the job treats peers as lost after host_timeout seconds.
        distributed.wait_for_all("report written")
    return summary


def loop(run: Run, until: int | None, quiet: bool) -> StepMeter:
    """Take steps to the end, or until told to stop; evaluates, saves and logs on the way.

    Raises:
      NonFiniteError: too many steps were skipped; ConfigError: a checkpoint could not be saved.
    """
    cfg, num_steps = run.cfg, run.num_steps
    main = distributed.is_main()
    trackers = open_trackers(cfg, run.folder, run.start) if main else None
    log = MetricsLog(run.folder, run.start, trackers, main, run.began)
    progress = ProgressLine(num_steps, run.start, quiet, run.eval_every)
    meter = StepMeter(log, progress, run.epochs, cfg.training, run.tokens, num_steps, run.callbacks.on_step)
    announce(run, progress)
    evaluate = partial(held_out_loss, run, make_evaluator(run), log, progress, meter)
    samples = Samples(run) if cfg.training.samples and run.mesh.size == 1 else None
    if cfg.training.samples and samples is None:
        progress.say("training.samples is left out: rows are answered on one device alone")
    run.watch.beat(run.step)
    try:
        if run.step == 0:
            evaluate()
            if samples is not None:
                progress.say(f"answering {counted(cfg.training.samples, 'sample')} before training")
                samples.take("before")
        end, stopped = min(num_steps, until or num_steps), False
        while run.step < end and not stopped and not run.stopping.over:
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
            last, stopped, lowest = run.step == end, stop_after(run.step), False
            eval_loss = evaluate() if last or due(run.eval_every, run.step) else None
            if eval_loss is not None and due(run.eval_every, run.step):
                lowest = run.stopping.saw(eval_loss)
            wanted = due(run.save_every, run.step) or (lowest and cfg.training.exports_best)
            if last or stopped or run.stopping.over or wanted:
                meter.settle()  # a run past its limit of non-finite steps ends here, unsaved
                run.require_there()
                tokens = run.tokens + meter.tokens
                run.checkpoints.save(run.step, run.state, run.position(tokens), run.identity, eval_loss)
                run.callbacks.on_save(run.step, run.folder / "checkpoints" / str(run.step))
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
    if run.finished:
        if run.step < num_steps:
            progress.say(f"stopped early at step {run.step}: the held-out loss falls no more")
        require_trained(run.state)
        choose_weights(run)
        if samples is not None:
            progress.say(f"answering {counted(cfg.training.samples, 'sample')} after training")
            samples.take("after")
    return meter


def choose_weights(run: Run) -> None:
    """Take the trained weights of the lowest held-out loss instead of the last step's, where the config says so."""
    run.exported = run.step
    if not run.cfg.training.exports_best or run.cfg.method == "full":
        return
    saved = Checkpoints(run.folder / "checkpoints", run.cfg.training.keep_checkpoints, read_only=True)
    best = distributed.from_first("best checkpoint", lambda: saved.best() or run.step)
    if best != run.step:
        run.state = replace(run.state, trained=saved.restore_trained(best, run.state.trained))
        run.exported = best
    saved.close()


def finish(run: Run, meter: StepMeter, began: float) -> dict[str, Any]:
    """Export the adapter of a run that came to its end, and write what every run leaves; returns its summary."""
    run.require_there()
    cfg, finished, rows = run.cfg, run.finished, run.train_data
    exported = finished and cfg.method == "lora"
    if exported:
        where = (cfg.lora, run.pretrained, run.forward.dtype, run.mesh)
        export_adapter(run.folder / "adapter", run.params["adapter"], *where)
        if distributed.is_main():
            made = provenance(cfg, run.folder, run.exported or run.step, run.identity)
            write_provenance(run.folder / "adapter", made)
    summary = {
        "status": "finished" if finished else "preempted",
        "steps": run.step,
        "stopped_early": finished and run.step < run.num_steps,
        "exported_step": run.exported if exported else None,
        "epochs": run.epochs.epoch_at(run.step),
        "skipped_steps": int(run.state.skipped),
        "rows": {
            "read": rows.read,
            "used": len(rows.examples),
            "dropped": dict(rows.dropped),
            "truncated": rows.truncated,
            "eval": len(run.eval_data.examples) if run.eval_data else 0,
            **({"sources": count_sources(rows)} if rows.parts else {}),
        },
        "trainable_params": count_trained(run.state.trained),
        "frozen_params": count_parameters({name: part for name, part in run.frozen.items() if name != "scales"}),
        "remat": run.identity.get("remat", run.remat),
        "compute": cfg.model.compute,
        "hashes": run.identity["hashes"],
        "history": run.identity.get("history", []),
        "adapter": str(run.folder / "adapter") if exported else None,
        **origin(began),
        "started": next((start.get("started") for start in read_starts(run.folder)), None),
        "wall_seconds": time.monotonic() - run.began,
        **final_losses(run.folder),
        "tokens": {"total": meter.tokens_before + meter.tokens},
        "tokens_per_second": meter.tokens_per_second(),
        "peak_memory_bytes": peak_memory(run.compiled),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "versions": versions(),
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
            run.cfg, run.pretrained.base.cfg, run.mesh, lambda remat: run.shared.compile(run.cfg, remat, lower)
        )
        progress.say(f"rematerialisation {run.remat}, the fastest that fits")
    else:
        run.compiled = run.shared.compile(run.cfg, run.remat, lower)
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

    def measure() -> tuple[dict[str, Any], float, float]:
        if run.step == 0:
            progress.say("measuring the held-out loss of the base")
        marks = [time.monotonic()]

        def on_batch() -> None:
            run.watch.beat(run.step)
            marks.append(time.monotonic())

        now = run.params
        figures = evaluator.measure(now["base"], now["adapter"], now.get("reference"), on_batch)
        lasted, count = marks[-1] - marks[0], len(marks) - 1
        after_first = (marks[-1] - marks[1]) / (count - 1) * count if count > 1 else lasted  # the first may compile
        return figures, lasted, after_first

    with meter.paused():
        (figures, lasted, after_first), known = run.of_base("loss", measure) if run.step == 0 else (measure(), False)
    progress.evaluated(0.0 if known else lasted, after_first)
    more = figures_of(run.callbacks.on_eval(run.step, figures), figures)
    log.write({"step": run.step, **{f"eval_{name}": value for name, value in (figures | more).items()}})
    before = " (the base, as measured before)" if known else ""
    progress.say(f"step {run.step}: held-out {describe_figures(figures)}{before}")
    return figures["loss"]
