"""`python -m jlora.train --config C [key=value ...]`: the story of a run, top to bottom.

Config -> mesh -> model -> data -> step -> loop -> adapter. A run folder that holds a checkpoint of the
same run is gone on from.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import attention, cli, data, distributed, optim, quant, xla
from jlora.adapter import Adapter, init_adapter
from jlora.checkpoint import Checkpoints
from jlora.config import Config, load_config
from jlora.data import Dataset, Epochs
from jlora.divides import check_divides
from jlora.errors import ConfigError, DataError, ModelError, NonFiniteError
from jlora.evaluate import Evaluator, perplexity
from jlora.fitting import compile_fastest
from jlora.hf.architecture import parse_config
from jlora.hf.base import base_fingerprint
from jlora.hf.peft import load_adapter, read_adapter_config
from jlora.identity import check_identity, flatten_config, run_identity
from jlora.metrics import MetricsLog, ProgressLine, StepMeter, require_wandb
from jlora.model import LlamaConfig, projection_shapes
from jlora.pretrained import Opened, Pretrained, find_adapter, load_pretrained, open_pretrained
from jlora.report import write_report
from jlora.sharding import local_rows, make_mesh, place_rows
from jlora.step import Forward, TrainState, count_parameters, init_state, make_train_step, place_adapter
from jlora.summary import finished_summary, print_summary, summarize, versions, write_text
from jlora.tokens import Tokenizer
from jlora.verify import export_adapter


def train(cfg: Config, quiet: bool = False) -> dict[str, Any]:
    """Run a config to its end, or on from its last checkpoint; returns the summary.

    Raises:
      UserError: see `jlora.errors`; what was saved before stays whole.
    """
    began = time.monotonic()
    distributed.start(cfg.distributed)
    mesh = make_mesh(cfg.mesh, jax.devices())
    check_batch_split(cfg, mesh)
    require_wandb(cfg.training.wandb)
    run_dir = make_run_dir(cfg)
    watch = distributed.Watch(cfg.distributed.step_timeout)
    require_one_job(cfg, run_dir)
    stop_after = catch_signals()
    main = distributed.is_main()
    quiet = quiet or not main
    with jax.set_mesh(mesh):
        # The base, the rows, and what is trained of the whole.
        opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
        model = parse_config(opened.source.config, opened.name)
        check_divides(model, mesh, cfg)
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
        start = max(checkpoints.steps(), default=0)
        remat: str = cfg.model.remat
        if start:
            saved = checkpoints.identity(start)
            check_identity(run_dir, saved, identity)
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
                loss, count = evaluator.mean_loss(now["base"], now["adapter"], lambda: watch.beat(step))
            line = {"eval_loss": loss, "eval_perplexity": perplexity(loss), "eval_tokens": count}
            log.write({"step": step, **line})
            progress.say(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
            return loss

        def compile_step(remat: str, arguments: tuple[Any, ...]) -> Any:
            step_fn = make_train_step(cfg, replace(forward, remat=remat), optimizer, schedule)
            return jax.jit(step_fn, donate_argnums=0).lower(*arguments).compile()

        step, stopped, compiled = start, False, None
        watch.beat(start)
        try:
            if start == 0:
                evaluate(0)
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
                    meter.start()
                state, metrics = compiled(state, frozen, on_device)
                step += 1
                meter.took(step, metrics, epochs.tokens_in(step - 1))
                watch.beat(step)
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
            log.close()
            checkpoints.close()

        finished = step == num_steps
        if finished and cfg.method == "lora":
            adapter = optim.combine(state.trained, frozen)["adapter"]
            export_adapter(run_dir / "adapter", adapter, cfg.lora, cfg.model.path, pretrained, forward.dtype, mesh)
        summary = {
            "status": "finished" if finished else "preempted",
            "steps": step,
            "epochs": epochs.epoch_at(step),
            "skipped_steps": int(state.skipped),
            "rows": {
                "read": train_data.read,
                "used": len(train_data.examples),
                "dropped": dict(train_data.dropped),
                "truncated": train_data.truncated,
                "eval": len(eval_data.examples) if eval_data else 0,
            },
            "trainable_params": count_parameters(state.trained),
            "frozen_params": count_parameters(frozen),
            "remat": remat,
            "hashes": identity["hashes"],
            "adapter": str(run_dir / "adapter") if finished and cfg.method == "lora" else None,
            "wall_seconds": time.monotonic() - began,
            **summarize(run_dir, meter, compiled),
        }
    if main:
        write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
        write_report(run_dir)
    return summary


def due(every: int | None, step: int) -> bool:
    """Whether something that happens every so many steps happens now."""
    return every is not None and step % every == 0


def check_batch_split(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Every micro-batch must split evenly over the devices that share a batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
    if rows % shards:
        raise ConfigError(
            f"training.batch_size / gradient_accumulation_steps = {rows} rows can not be split over {shards} "
            f"devices (data x fsdp); make it a multiple of {shards}"
        )


def make_forward(cfg: Config, model: LlamaConfig, mesh: jax.sharding.Mesh) -> tuple[str, Forward]:
    """The static choices of the forward pass, and what attention runs, for the log."""
    dtype, device = jnp.dtype(cfg.model.dtype), mesh.devices.flat[0]
    quant.check_device(cfg.model.quantization, device)
    shown, kernel = attention.choose(
        cfg.model.attention, device, model.head_dim, cfg.data.max_length, dtype, cfg.data.packing
    )
    return shown, Forward(kernel, cfg.model.remat, dtype)


def param_dtype(cfg: Config) -> jnp.dtype:
    """Dtype of the base's weights: float32 masters where they are trained."""
    return jnp.dtype("float32" if cfg.method == "full" else cfg.model.dtype)


def read_data(cfg: Config, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where the config has some."""
    train_data = data.tokenize(cfg.data.train, tokenizer, cfg.data)
    match cfg.data.eval:
        case None:
            return train_data, None
        case float(fraction):
            return data.hold_out(train_data, fraction, cfg.training.seed)
        case source:
            return train_data, data.tokenize(source, tokenizer, cfg.data)


def warn_of_length(cfg: Config, opened: Opened) -> None:
    """Rows longer than the base was made for train, but not well."""
    limit = opened.source.config.get("max_position_embeddings")
    if isinstance(limit, int) and cfg.data.max_length > limit:
        print(
            f"warning: data.max_length={cfg.data.max_length} is beyond the base's {limit} positions",
            file=sys.stderr,
        )


def make_adapter(cfg: Config, pretrained: Pretrained) -> Adapter:
    """A fresh adapter, one read from `lora.init_from`, or none for full fine-tuning."""
    if cfg.method == "full":
        return {}
    model = pretrained.base.cfg
    if cfg.lora.init_from is None:
        return init_adapter(cfg.lora, projection_shapes(model), model.num_hidden_layers, cfg.training.seed)
    folder = find_adapter(cfg.lora.init_from)
    theirs = read_adapter_config(folder)
    for key, ours in (
        ("rank", cfg.lora.rank),
        ("alpha", cfg.lora.alpha),
        ("targets", cfg.lora.targets),
        ("use_rslora", cfg.lora.use_rslora),
    ):
        if getattr(theirs, key) != ours:
            name = "target_modules" if key == "targets" else key
            value = json.dumps(getattr(theirs, key))
            raise ModelError(
                f"{folder}: the adapter has {name}={value}, the config {json.dumps(ours)}; set lora.{name}={value}"
            )
    return load_adapter(folder, model, pretrained.base_hash, cfg.lora.dropout)


def make_run_dir(cfg: Config) -> Path:
    """Create the run folder."""
    run_dir = Path(cfg.output_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {run_dir}: can not be made ({error.strerror}); set another") from None
    if not os.access(run_dir, os.W_OK):
        raise ConfigError(f"output_dir {run_dir}: can not be written to; set another")
    return run_dir


def require_one_job(cfg: Config, run_dir: Path) -> None:
    """All processes of a job run the same config with the same libraries into the same folder."""
    keys = flatten_config(cfg.model_dump(mode="json"))
    del keys["distributed.process_id"]
    kind = {"device": jax.local_devices()[0].device_kind}
    distributed.require_agreement("config", ConfigError, keys | versions() | kind)
    distributed.require_shared_folder(run_dir)


def batch_rows(cfg: Config, mesh: jax.sharding.Mesh) -> np.ndarray:
    """Rows of a batch that this process makes: of each micro-batch those that its devices hold."""
    parts = cfg.training.gradient_accumulation_steps
    size = cfg.training.batch_size // parts
    return np.concatenate([part * size + local_rows(mesh, size) for part in range(parts)])


def put_batch(batch: dict[str, np.ndarray], parts: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch [B T] -> [A, B / A, T] on all devices."""
    split = {name: array.reshape(parts, -1, array.shape[-1]) for name, array in batch.items()}
    return {name: place_rows(array, mesh) for name, array in split.items()}


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
    trained = count_parameters(state.trained)
    total = count_parameters(pretrained.base)
    dropped = f", dropped {dict(dataset.dropped)}" if dataset.dropped else ""
    cut = f", {dataset.truncated} cut at {cfg.data.max_length} tokens" if dataset.truncated else ""
    held = f" in {cfg.model.quantization}" if cfg.model.quantization else ""
    progress.say(f"base {cfg.model.path}{held}: {total:,} parameters, {trained:,} trained; attention {kernel}")
    progress.say(f"data {cfg.data.train}: {len(dataset.examples)} of {dataset.read} rows{dropped}{cut}")
    progress.say(f"{num_steps} steps" + (f", going on from step {start}" if start else ""))


def catch_signals() -> Callable[[int], bool]:
    """Whether the loop is to end after a step: SIGTERM and SIGINT ask it to finish the step, save and exit 75.

    A second signal changes nothing. The processes of a job agree on the step, whoever got the signal.
    """
    received = []

    def handler(number: int, frame: Any) -> None:
        received.append(number)

    def to_jax(number: int, frame: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    # In a job JAX itself listens for SIGTERM, to bring it to all processes.
    handlers = {signal.SIGINT: to_jax} if distributed.several() else {signal.SIGTERM: handler, signal.SIGINT: handler}
    try:
        for number, action in handlers.items():
            signal.signal(number, action)
    except ValueError:  # not in the main thread: a caller's program owns the signals
        pass
    return distributed.stop_agreed if distributed.several() else lambda step: bool(received)


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
        cfg = load_config(args.config, args.overrides)
        if distributed.expected(cfg.distributed):
            distributed.supervise()
        summary = train(cfg, args.quiet)
        if not distributed.is_main():
            pass
        elif args.json:
            cli.print_json(summary)
        elif not args.quiet:
            print_summary(summary, cfg.output_dir)
        return cli.PREEMPTED if summary["status"] == "preempted" else 0

    cli.run(body)


if __name__ == "__main__":
    main()
