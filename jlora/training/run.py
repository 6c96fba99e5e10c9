"""`python -m jlora.train --config C [key=value ...]`: the story of a run, top to bottom.

Config -> mesh -> model -> data -> step -> loop -> adapter. A run folder that holds a checkpoint of the
same run is gone on from.
"""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jlora import cli, data, distributed, lock, optim, preemption, streams, xla
from jlora.atomic import write_text
from jlora.checkpoint import Checkpoints
from jlora.config import Config, load_config
from jlora.data import Dataset, Epochs, read_data
from jlora.divides import check_batch_split, check_divides
from jlora.errors import ConfigError, DataError, ModelError, NonFiniteError
from jlora.evaluate import Evaluator, describe_figures
from jlora.fitting import compile_fastest
from jlora.hf.architecture import parse_config
from jlora.hf.base import base_fingerprint
from jlora.identity import check_identity, flatten_config, run_identity
from jlora.initial import check_options
from jlora.metrics import MetricsLog, ProgressLine, StepMeter, require_wandb
from jlora.pretrained import Pretrained, load_pretrained, make_adapter, make_reference, open_pretrained
from jlora.report import write_report
from jlora.running import (
    batch_rows,
    due,
    make_run_dir,
    put_batch,
    require_trained,
    run_summary,
    saves_left,
    warn_of_length,
)
from jlora.samples import Samples
from jlora.sharding import make_mesh
from jlora.step import (
    TrainState,
    count_parameters,
    count_trained,
    init_state,
    make_forward,
    make_train_step,
    param_dtype,
    place_adapter,
)
from jlora.summary import finished_summary, print_summary, versions
from jlora.sweep import train_together
from jlora.verify import export_adapter


def train(cfg: Config, quiet: bool = False) -> dict[str, Any]:
    """Run a config to its end, or on from its last checkpoint; returns the summary.

    Raises:
      UserError: see `jlora.errors`; what was saved before stays whole.
    """
    began = time.monotonic()
    preemption.end_on_signals()
    distributed.start(cfg.distributed)
    mesh = make_mesh(cfg.mesh, jax.devices())
    check_batch_split(cfg, mesh)
    require_wandb(cfg.training.wandb)
    run_dir = make_run_dir(cfg)
    watch = distributed.Watch(cfg.distributed.step_timeout)
    main = distributed.is_main()
    quiet = quiet or not main
    with lock.held(run_dir, main), jax.set_mesh(mesh):
        require_one_job(cfg, run_dir)
        # The base, the rows, and what is trained of the whole.
        opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
        model = parse_config(opened.source.config, opened.name)
        check_divides(model, mesh, cfg)
        if cfg.method == "lora":
            check_options(cfg.lora, model)
        kernel, forward = make_forward(cfg, model, mesh)
        if not quiet:
            warn_of_length(cfg, opened)
        loaded = {"base": base_fingerprint(opened.source), "tokenizer": opened.tokenizer.digest}
        distributed.require_agreement("base", ModelError, loaded)
        train_data, eval_data = read_data(cfg, opened.tokenizer)
        digests = {"data": train_data.digest, "eval": eval_data.digest if eval_data else None}
        distributed.require_agreement("data", DataError, digests)
        pretrained = load_pretrained(opened, param_dtype(cfg), mesh, cfg.model.quantization)
        epochs = Epochs(train_data, cfg.data, cfg.training.batch_size, cfg.training.seed)
        num_steps = cfg.training.max_steps or epochs.num_batches(cfg.training.epochs)
        adapter = place_adapter(make_adapter(cfg, pretrained), pretrained.base.cfg, mesh)
        params = {"adapter": adapter, "base": pretrained.base}
        if (reference := make_reference(cfg, pretrained)) is not None:
            params["reference"] = place_adapter(reference, pretrained.base.cfg, mesh)
        labels = optim.labels(params, cfg.method)
        optimizer = optim.make_optimizer(cfg.optimizer, num_steps, labels)
        schedule = optim.learning_rate(cfg.optimizer, num_steps)
        state = init_state(params, optimizer, cfg, mesh)
        _, frozen = optim.partition(params, labels)
        del params, adapter

        # Where an earlier start of this run left off.
        identity = run_identity(cfg, pretrained, train_data, eval_data)
        checkpoints = Checkpoints(run_dir / "checkpoints", cfg.training.keep_checkpoints)
        batches = data.batches(epochs, cfg.training.batch_size, batch_rows(cfg, mesh))
        start = distributed.from_first("newest checkpoint", checkpoints.newest_whole)
        remat: str = cfg.model.remat
        if start:
            saved = checkpoints.identity(start)
            identity["history"] = check_identity(run_dir, start, saved, identity, cfg.resume.allow_changes)
            if start > num_steps:
                raise ConfigError(f"{run_dir}: is at step {start} already, past the {num_steps} asked for; raise them")
            remat = saved.get("remat", remat) if remat == "auto" else remat
            done = finished_summary(run_dir) if start == num_steps else None
            if done is not None:
                if not quiet:
                    print(f"{run_dir}: this run is finished; nothing is left to do", file=sys.stderr)
                checkpoints.close()
                return done
            restored = checkpoints.restore(start, state)
            state = restored.state
            batches.set_state(restored.data)
        checkpoints.require_room(state, saves_left(cfg.training.save_every, start, num_steps))
        if main:
            write_text(run_dir / "config.yaml", cfg.dump_yaml())

        log = MetricsLog(run_dir, start, cfg.training.wandb, cfg.model_dump(), main)
        progress = ProgressLine(num_steps, start, quiet)
        meter = StepMeter(log, progress, epochs, cfg.training, start, num_steps)
        announce(progress, cfg, kernel, pretrained, state, train_data, num_steps, start)
        evaluator = None
        if eval_data is not None:
            rows = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
            # Nothing is differentiated, so nothing is kept.
            evaluator = Evaluator(eval_data, cfg.data, rows, replace(forward, remat="none"), mesh)

        def evaluate(step: int) -> float | None:
            """Held-out loss of the current state, logged; None without held-out rows."""
            if evaluator is None:
                return None
            with meter.paused():
                now = optim.combine(state.trained, frozen)
                parts = now["base"], now["adapter"], now.get("reference")
                figures = evaluator.measure(*parts, lambda: watch.beat(step))
            log.write({"step": step, **{f"eval_{name}": value for name, value in figures.items()}})
            progress.say(f"step {step}: held-out {describe_figures(figures)}")
            return figures["loss"]

        samples = None
        if cfg.training.samples and mesh.size == 1:
            samples = Samples(run_dir, eval_data or train_data, cfg.training.samples, pretrained, forward.dtype)
        elif cfg.training.samples:
            progress.say("training.samples is left out: rows are answered on one device alone")

        def compile_step(remat: str, arguments: tuple[Any, ...]) -> Any:
            step_fn = make_train_step(cfg, replace(forward, remat=remat), optimizer, schedule)
            return jax.jit(step_fn, donate_argnums=0).lower(*arguments).compile()

        step, stopped, compiled = start, False, None
        watch.beat(start)
        try:
            if start == 0:
                evaluate(0)
                if samples is not None:
                    samples.take("before", optim.combine(state.trained, frozen))
            while step < num_steps and not stopped:
                # While the step before still runs: its figures are waited for only after this one is under way.
                on_device = put_batch(next(batches), cfg.training.gradient_accumulation_steps, mesh)
                if compiled is None:
                    progress.say("compiling the training step")
                    if remat == "auto":
                        compile_with = partial(compile_step, arguments=(state, frozen, on_device))
                        remat, compiled = compile_fastest(cfg, model, mesh, compile_with)
                        progress.say(f"rematerialisation {remat}, the fastest that fits")
                    else:
                        compiled = compile_step(remat, (state, frozen, on_device))
                    identity["remat"] = remat  # a run that goes on rounds as it did before
                    stop_after = preemption.save_on_signals()
                    meter.start()
                state, metrics = compiled(state, frozen, on_device)
                step += 1
                meter.took(step, metrics, epochs.tokens_in(step - 1))
                watch.beat(step)
                checkpoints.check()
                last, stopped = step == num_steps, stop_after(step)
                eval_loss = evaluate(step) if last or due(cfg.training.eval_every, step) else None
                if last or stopped or due(cfg.training.save_every, step):
                    meter.settle()  # a run past its limit of non-finite steps ends here, unsaved
                    checkpoints.save(step, state, batches.get_state(), identity, eval_loss)
            meter.settle()
            checkpoints.wait()
        except NonFiniteError as error:
            checkpoints.wait()
            kept = f"; checkpoint {checkpoints.steps()[-1]} stays" if checkpoints.steps() else ""
            raise NonFiniteError(f"{error}{kept}") from None
        finally:
            progress.close()
            try:
                log.close()
            finally:  # a full disk takes no log, and what is being saved is to be told, too
                checkpoints.close()

        finished = step == num_steps
        if finished:
            require_trained(state)
            if samples is not None:
                samples.take("after", optim.combine(state.trained, frozen))
        if finished and cfg.method == "lora":
            adapter = optim.combine(state.trained, frozen)["adapter"]
            export_adapter(run_dir / "adapter", adapter, cfg.lora, cfg.model.path, pretrained, forward.dtype, mesh)
        summary = run_summary(
            cfg,
            step,
            num_steps,
            state,
            frozen,
            train_data,
            eval_data,
            epochs,
            {"remat": remat} | identity,
            began,
            meter,
            compiled,
        )
        if main:
            write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
            write_report(run_dir)
        # Who has left the job waits host_timeout seconds for the last to leave, and then takes it for lost.
        distributed.wait_for_all("report written")
    return summary


def require_one_job(cfg: Config, run_dir: Path) -> None:
    """All processes of a job run the same config with the same libraries into the same folder."""
    keys = flatten_config(cfg.model_dump(mode="json"))
    del keys["distributed.process_id"]
    kind = {"device": jax.local_devices()[0].device_kind}
    distributed.require_agreement("config", ConfigError, keys | versions() | kind)
    distributed.require_shared_folder(run_dir)


def announce(
    progress: ProgressLine,
    cfg: Config,
    kernel: str,
    pretrained: Pretrained,
    state: TrainState,
    dataset: Dataset,
    num_steps: int,
    start: int,
) -> None:
    """What is about to happen, in three lines."""
    trained = count_trained(state.trained)
    total = count_parameters(pretrained.base)
    dropped = f", dropped {dict(dataset.dropped)}" if dataset.dropped else ""
    cut = f", {dataset.truncated} cut at {cfg.data.max_length} tokens" if dataset.truncated else ""
    held = f" in {cfg.model.quantization}" if cfg.model.quantization else ""
    progress.say(f"base {cfg.model.path}{held}: {total:,} parameters, {trained:,} trained; attention {kernel}")
    sources = ", ".join(source.path for source in cfg.data.sources)
    progress.say(f"data {sources}: {len(dataset.examples)} sequences of {dataset.read} rows{dropped}{cut}")
    progress.say(f"{num_steps} steps" + (f", going on from step {start}" if start else ""))


def main() -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m jlora.train", description="Fine-tune a Llama with LoRA.")
    parser.add_argument("--config", required=True, help="YAML file; see docs/config.md for its keys")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a dotted config key")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    args = parser.parse_intermixed_args()
    xla.use_huge_pages()

    def body() -> int:
        preemption.end_on_signals()
        cfg = load_config(args.config, args.overrides)
        if distributed.expected(cfg.distributed):
            distributed.supervise(cfg.distributed.host_timeout)
        try:
            with preemption.listening():
                if cfg.sweep:
                    return train_together(cfg, args.quiet, args.json)
                summary = train(cfg, args.quiet)
        finally:
            preemption.ignore_signals()
        finished = summary["status"] == "finished"
        if distributed.is_main():
            with streams.told(result=args.json and finished):
                if args.json:
                    cli.print_json(summary)
                elif not args.quiet:
                    print_summary(summary, cfg.output_dir)
        return 0 if finished else cli.PREEMPTED

    cli.run(body, listen=False)


if __name__ == "__main__":
    main()
