"""`python -m jlora.train --config C [key=value ...]`: the story of a run, top to bottom.

Config -> mesh -> data -> model -> step -> loop -> adapter. A run folder that holds a checkpoint of the
same run is gone on from.
"""

import argparse
import importlib.metadata
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import attention, cli, data, optim
from jlora.adapter import Adapter, init_adapter
from jlora.checkpoint import Checkpoints
from jlora.config import Config, load_config
from jlora.data import Dataset, Epochs
from jlora.errors import ConfigError, DataError, ModelError, NonFiniteError
from jlora.hf.peft import load_adapter, read_adapter_config
from jlora.metrics import MetricsLog, ProgressLine, read_metrics
from jlora.model import projection_shapes
from jlora.pretrained import Pretrained, load_pretrained
from jlora.report import write_report
from jlora.sharding import make_mesh, named_sharding
from jlora.step import Forward, TrainState, init_state, make_eval_step, make_train_step
from jlora.verify import export_adapter

# Keys that may differ between a run and its continuation: they do not change what is computed.
FREE_KEYS = {
    "output_dir",
    "training.log_every",
    "training.eval_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.max_nonfinite_steps",
    "training.wandb",
}


def train(cfg: Config, quiet: bool = False) -> dict[str, Any]:
    """Run a config to its end, or on from its last checkpoint; returns the summary.

    Raises:
      UserError: see `jlora.errors`; what was saved before stays whole.
    """
    began = time.monotonic()
    run_dir = Path(cfg.output_dir)
    mesh = make_mesh(cfg.mesh, jax.devices())
    check_batch_split(cfg, mesh)
    stop = catch_signals()

    with jax.set_mesh(mesh):
        forward = make_forward(cfg)
        pretrained = load_pretrained(
            cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template, param_dtype(cfg), mesh
        )
        train_data, eval_data = read_data(cfg, pretrained)
        epochs = Epochs(train_data, cfg.data, cfg.training.batch_size, cfg.training.seed)
        num_steps = cfg.training.max_steps or epochs.num_batches(cfg.training.epochs)

        params = {"adapter": make_adapter(cfg, pretrained), "base": pretrained.base}
        labels = optim.labels(params, cfg.method)
        optimizer = optim.make_optimizer(cfg.optimizer, num_steps, labels)
        state = init_state(params, optimizer, cfg)
        _, frozen = optim.partition(params, labels)
        del params
        identity = run_identity(cfg, pretrained, train_data, eval_data)

        checkpoints = Checkpoints(make_run_dir(run_dir) / "checkpoints", cfg.training.keep_checkpoints)
        batches = data.batches(epochs, cfg.training.batch_size)
        start = 0
        if checkpoints.steps():
            start = checkpoints.steps()[-1]
            check_identity(run_dir, checkpoints.identity(start), identity)
            restored = checkpoints.restore(start, state)
            state = restored.state
            batches.set_state(restored.data)
        (run_dir / "config.yaml").write_text(cfg.dump_yaml(), encoding="utf-8")
        log = MetricsLog(run_dir, start, cfg.training.wandb, cfg.model_dump())
        progress = ProgressLine(num_steps, start, quiet)
        announce(progress, cfg, pretrained, state, train_data, num_steps, start)

        evaluator = Evaluator(cfg, forward, eval_data, mesh)
        eval_loss = None
        if start == 0:
            eval_loss = evaluator.log(state, frozen, 0, log, progress)

        step_fn = make_train_step(cfg, forward, optimizer, optim.learning_rate(cfg.optimizer, num_steps))
        compiled = None
        tokens, tokens_done = 0, previous_tokens(run_dir, start)
        pending: tuple[int, dict[str, jax.Array], int] | None = None
        clock = loop_began = time.monotonic()
        measured_tokens, step, status = 0, start, "finished"

        def settle() -> None:
            """Log the step before: reading its figures only now keeps the device busy meanwhile."""
            nonlocal pending, clock, tokens
            if pending is None:
                return
            at, metrics, done = pending
            pending = None
            values = {name: value.item() for name, value in metrics.items()}
            if values["skipped_steps"] > cfg.training.max_nonfinite_steps:
                raise NonFiniteError(
                    f"step {at}: loss or gradients were not finite in {values['skipped_steps']} steps, more than "
                    "training.max_nonfinite_steps; lower optimizer.learning_rate or look at the data. "
                    + (f"Checkpoint {start_or_last(checkpoints)} stays." if checkpoints.steps() else "")
                )
            if at % cfg.training.log_every and at != num_steps:
                return
            now = time.monotonic()
            rate, clock, tokens = (done - tokens) / (now - clock), now, done
            line = {"step": at, **values, "tokens": tokens_done + done, "tokens_per_second": rate}
            log.write(line | {"epoch": epochs.epoch_at(at)})
            progress.update(at, values["loss"], rate)

        done = 0
        try:
            while step < num_steps:
                batch = next(batches)
                done += int((batch["segments"] > 0).sum())
                on_device = put_batch(batch, cfg.training.gradient_accumulation_steps, mesh)
                if compiled is None:
                    progress.say("compiling the training step")
                    compiled = jax.jit(step_fn, donate_argnums=0).lower(state, frozen, on_device).compile()
                    clock = loop_began = time.monotonic()
                state, metrics = compiled(state, frozen, on_device)
                step += 1
                settle()
                pending = (step, metrics, done)
                every = cfg.training.eval_every
                evaluate_now = (every is not None and step % every == 0) or step == num_steps
                if evaluate_now:
                    settle()
                    paused = time.monotonic()
                    eval_loss = evaluator.log(state, frozen, step, log, progress)
                    clock, loop_began = clock + time.monotonic() - paused, loop_began + time.monotonic() - paused
                every = cfg.training.save_every
                if (every is not None and step % every == 0) or step == num_steps or stop["signal"]:
                    settle()
                    loss_now = eval_loss if evaluate_now else None
                    checkpoints.save(step, state, batches.get_state(), identity, loss_now)
                if stop["signal"] and step < num_steps:
                    status = "preempted"
                    break
            settle()
            jax.block_until_ready(state.step)
            measured_tokens, seconds = done, time.monotonic() - loop_began
            checkpoints.wait()
        finally:
            progress.close()
            log.close()
            checkpoints.close()

        adapter_dir = None
        if status == "finished" and cfg.method == "lora":
            adapter_dir = run_dir / "adapter"
            adapter = optim.combine(state.trained, frozen)["adapter"]
            export_adapter(adapter_dir, adapter, cfg.lora, cfg.model.path, pretrained, forward)
        summary = {
            "status": status,
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
            "tokens": {"total": tokens_done + done, **evaluator.tokens_entry()},
            **final_losses(run_dir),
            "wall_seconds": time.monotonic() - began,
            "tokens_per_second": measured_tokens / seconds if measured_tokens else None,
            "peak_memory_bytes": peak_memory(compiled),
            "trainable_params": sum(leaf.size for leaf in jax.tree.leaves(state.trained)),
            "frozen_params": sum(leaf.size for leaf in jax.tree.leaves(frozen)),
            "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
            "versions": versions(),
            "hashes": identity["hashes"],
            "adapter": str(adapter_dir) if adapter_dir else None,
        }
    write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_report(run_dir)
    return summary


def start_or_last(checkpoints: Checkpoints) -> int:
    """The newest committed step."""
    return checkpoints.steps()[-1]


def check_batch_split(cfg: Config, mesh: jax.sharding.Mesh) -> None:
    """Every micro-batch must split evenly over the devices that share a batch."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
    if rows % shards:
        raise ConfigError(
            f"training.batch_size / gradient_accumulation_steps = {rows} rows can not be split over {shards} "
            f"devices (data x fsdp); make it a multiple of {shards}"
        )


def make_forward(cfg: Config) -> Forward:
    """The static choices of the forward pass."""
    _, kernel = attention.choose(cfg.model.attention)
    return Forward(kernel, cfg.model.remat, jnp.dtype(cfg.model.dtype))


def param_dtype(cfg: Config) -> jnp.dtype:
    """Dtype of the base's weights: float32 masters where they are trained."""
    return jnp.dtype("float32" if cfg.method == "full" else cfg.model.dtype)


def read_data(cfg: Config, pretrained: Pretrained) -> tuple[Dataset, Dataset | None]:
    """Training rows, and held-out rows where the config has some."""
    limit = pretrained.source.config.get("max_position_embeddings")
    if isinstance(limit, int) and cfg.data.max_length > limit:
        print(
            f"warning: data.max_length={cfg.data.max_length} is beyond the base's {limit} positions",
            file=sys.stderr,
        )
    train_data = data.tokenize(cfg.data.train, pretrained.tokenizer, cfg.data)
    match cfg.data.eval:
        case None:
            return train_data, None
        case float(fraction):
            return data.hold_out(train_data, fraction, cfg.training.seed)
        case source:
            return train_data, data.tokenize(source, pretrained.tokenizer, cfg.data)


def make_adapter(cfg: Config, pretrained: Pretrained) -> Adapter:
    """A fresh adapter, one read from `lora.init_from`, or none for full fine-tuning."""
    if cfg.method == "full":
        return {}
    model = pretrained.base.cfg
    if cfg.lora.init_from is None:
        return init_adapter(
            cfg.lora, projection_shapes(model), model.num_hidden_layers, cfg.training.seed
        )
    folder = Path(cfg.lora.init_from)
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


def run_identity(
    cfg: Config, pretrained: Pretrained, train_data: Dataset, eval_data: Dataset | None
) -> dict[str, Any]:
    """What must be the same when a run is gone on with."""
    flat = flatten_config(cfg.model_dump(mode="json"))
    return {
        "config": {key: value for key, value in flat.items() if key not in FREE_KEYS},
        "hashes": {
            "base": pretrained.base_hash,
            "tokenizer": pretrained.tokenizer.digest,
            "data": train_data.digest,
            "eval": eval_data.digest if eval_data else None,
        },
    }


def flatten_config(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def check_identity(run_dir: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run, saying what differs."""
    differences = [
        f"{part}.{key}: {saved[part].get(key)!r} -> {current[part].get(key)!r}"
        for part in ("config", "hashes")
        for key in sorted(saved[part].keys() | current[part].keys())
        if saved[part].get(key) != current[part].get(key)
    ]
    if differences:
        raise ModelError(
            f"{run_dir}: holds a checkpoint of another run ({'; '.join(differences)}); undo the change, or "
            "set another output_dir"
        )


def make_run_dir(run_dir: Path) -> Path:
    """Create the run folder."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir {run_dir}: can not be made ({error.strerror})") from None
    return run_dir


def put_batch(batch: dict[str, np.ndarray], parts: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """[B T] on the host -> [A, B / A, T] on the devices."""
    sharding = named_sharding(mesh, (None, "act_batch", "act_seq"))
    split = {name: array.reshape(parts, -1, array.shape[-1]) for name, array in batch.items()}
    return jax.device_put(split, sharding)


class Evaluator:
    """Held-out loss of a state; silent where there are no held-out rows."""

    def __init__(self, cfg: Config, forward: Forward, dataset: Dataset | None, mesh: jax.sharding.Mesh):
        self._dataset, self._mesh = dataset, mesh
        self._step = make_eval_step(forward)
        if dataset is not None:
            self._rows = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
            self._epochs = Epochs(dataset, cfg.data, self._rows, seed=None)

    def mean_loss(self, base: Any, adapter: Adapter) -> tuple[float, int]:
        """Mean loss over trained tokens in nats, and their number."""
        total, count = 0.0, 0.0
        for batch in data.batches(self._epochs, self._rows, last=self._epochs.num_batches(1)):
            part = {name: value[0] for name, value in put_batch(batch, 1, self._mesh).items()}
            loss, tokens = self._step(base, adapter, part)
            total, count = total + loss.item(), count + tokens.item()
        if not count:
            raise DataError("the held-out rows have no trained token")
        return total / count, int(count)

    def log(self, state: TrainState, frozen: Any, step: int, log: MetricsLog, progress: ProgressLine) -> float | None:
        """Evaluate, log, and return the held-out loss."""
        if self._dataset is None:
            return None
        params = optim.combine(state.trained, frozen)
        loss, count = self.mean_loss(params["base"], params["adapter"])
        perplexity = math.exp(min(loss, 700.0))
        log.write({"step": step, "eval_loss": loss, "eval_perplexity": perplexity, "eval_tokens": count})
        progress.say(f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:.2f} ({count} tokens)")
        return loss

    def tokens_entry(self) -> dict[str, int]:
        """Held-out tokens, for the summary."""
        return {} if self._dataset is None else {"eval": sum(len(e.ids) for e in self._dataset.examples)}


def announce(
    progress: ProgressLine,
    cfg: Config,
    pretrained: Pretrained,
    state: TrainState,
    dataset: Dataset,
    num_steps: int,
    start: int,
) -> None:
    """What is about to happen, in three lines."""
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    total = sum(leaf.size for leaf in jax.tree.leaves(pretrained.base))
    dropped = f", dropped {dict(dataset.dropped)}" if dataset.dropped else ""
    cut = f", {dataset.truncated} cut at {cfg.data.max_length} tokens" if dataset.truncated else ""
    kernel, _ = attention.choose(cfg.model.attention)
    progress.say(f"base {cfg.model.path}: {total:,} parameters, {trained:,} trained; attention {kernel}")
    progress.say(f"data {cfg.data.train}: {len(dataset.examples)} of {dataset.read} rows{dropped}{cut}")
    progress.say(f"{num_steps} steps" + (f", going on from step {start}" if start else ""))


def catch_signals() -> dict[str, int]:
    """SIGTERM and SIGINT ask the loop to finish its step, save and exit 75; a second one changes nothing."""
    stop = {"signal": 0}

    def handler(number: int, frame: Any) -> None:
        stop["signal"] = number

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)
    except ValueError:  # not in the main thread: a caller's program owns the signals
        pass
    return stop


def previous_tokens(run_dir: Path, start: int) -> int:
    """Tokens seen up to a restored step."""
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "tokens" in line and line["step"] <= start]
    return lines[-1]["tokens"] if start and lines else 0


def final_losses(run_dir: Path) -> dict[str, float | None]:
    """Last training loss, first and last held-out loss, from the log."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    train_losses = [line["loss"] for line in lines if "loss" in line]
    eval_losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {
        "train_loss": train_losses[-1] if train_losses else None,
        "eval_loss_before": eval_losses[0] if eval_losses else None,
        "eval_loss": eval_losses[-1] if eval_losses else None,
    }


def peak_memory(compiled: Any) -> dict[str, int | None]:
    """Peak bytes of this process, of the device where it counts them, and of the compiled step."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    analysis = compiled.memory_analysis() if compiled is not None else None
    step = None
    if analysis is not None:
        step = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        step -= analysis.alias_size_in_bytes
    return {"host": host, "device": device, "compiled_step": step}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    names = ("jlora", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": sys.version.split()[0]}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m jlora.train", description="Fine-tune a Llama with LoRA.")
    parser.add_argument("--config", required=True, help="YAML file; see docs/config.md for its keys")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a dotted config key")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON on stdout")
    args = parser.parse_intermixed_args()

    def body() -> int:
        summary = train(load_config(args.config, args.overrides), args.quiet)
        if args.json:
            cli.print_json(summary)
        elif not args.quiet:
            print_summary(summary, load_config(args.config, args.overrides).output_dir)
        return cli.PREEMPTED if summary["status"] == "preempted" else 0

    cli.run(body)


def print_summary(summary: dict[str, Any], output_dir: str) -> None:
    """The end of a run, for people."""
    if summary["status"] == "preempted":
        print(f"stopped at step {summary['steps']}, saved; run the same command again to go on")
        return
    if summary["eval_loss"] is not None:
        before, after = summary["eval_loss_before"], summary["eval_loss"]
        print(f"held-out loss {before:.4f} -> {after:.4f} ({(after - before) / before:+.1%})")
    rate, memory = summary["tokens_per_second"], summary["peak_memory_bytes"]
    speed = f"{rate:,.0f} tokens/s, " if rate else ""
    print(f"{summary['steps']} steps, {speed}peak host memory {memory['host'] / 2**30:.2f} GiB")
    print(f"adapter: {summary['adapter']}" if summary["adapter"] else f"checkpoint: {output_dir}/checkpoints")
    print(f"report: {output_dir}/report.html")


if __name__ == "__main__":
    main()
