"""A run before its first step: what it holds, what its config opens, and where an earlier start left off.

The runs of one process hand the base, tokenised rows and compiled steps from one to the next (`Shared`).
"""

import datetime
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jlora.config import FORMER_REMAT, Config
from jlora.data import packing
from jlora.data.checks import check_rows, check_run
from jlora.data.dataset import Dataset
from jlora.data.encoding import read_data
from jlora.data.packing import Epochs, Origin, plan_steps
from jlora.errors import ConfigError, DataError, ModelError
from jlora.files.text import counted
from jlora.hf.adapters import adapter_digest, first_adapter, make_reference
from jlora.hf.pretrained import (
    Opened,
    Pretrained,
    open_base,
    warn_of_dequantising,
    warn_of_dropout,
    with_ids,
)
from jlora.hf.source import base_fingerprint
from jlora.model.adapter_init import check_options
from jlora.model.divisibility import check_divides
from jlora.runtime import distributed
from jlora.runtime.distributed import Watch
from jlora.training import base, optim
from jlora.training.checkpoint import Checkpoints
from jlora.training.evaluator import Stopping
from jlora.training.folder import batch_rows, saves_left, steps_between
from jlora.training.identity import check_identity, run_identity
from jlora.training.metrics import METRICS, PLAIN_LINE_SECONDS, Callbacks, ProgressLine
from jlora.training.step import (
    Forward,
    TrainState,
    count_parameters,
    count_trained,
    init_state,
    make_forward,
)
from jlora.training.summary import finished_summary

# Keys that do not change the program of the step; see `optim.hyperparameters`.
ARGUMENTS: Any = {
    **{"output_dir": True, "sweep": True, "sweep_halving": True, "training": {"seed"}},
    "optimizer": {
        "learning_rate",
        "schedule",
        "min_learning_rate_ratio",
        "warmup_steps",
        "warmup_ratio",
        "weight_decay",
    },
}


@dataclass
class Shared:
    """What the runs of one process have in common, each taking from it what an earlier one made.

    Attributes:
      pretrained: the frozen base; its path, tokenizer, dtype, quantization and mesh are those of all the runs.
      programs: compiled steps, by the SHA-256 of what was compiled and by what of a config decides that.
      of_base: what was measured of the bare base, by what it depends on; see `Run.of_base`.
      in_dtype: the base does not bear the products in 8 bits that are asked for.
    """

    opened: Opened | None = None
    pretrained: Pretrained | None = None
    rows: dict[str, tuple[Dataset, Dataset | None]] = field(default_factory=dict)
    programs: dict[str, Any] = field(default_factory=dict)
    of_base: dict[str, Any] = field(default_factory=dict)
    in_dtype: bool = False

    def open(self, cfg: Config) -> Opened:
        """The base, no weight read yet, with its tokenizer."""
        if self.opened is None:
            self.opened = open_base(cfg)
        return self.opened

    def read(self, cfg: Config) -> tuple[Dataset, Dataset | None]:
        """The tokenised rows of a run, training and held out."""
        key = rows_key(cfg)
        if key not in self.rows:
            self.rows[key] = read_data(cfg, self.open(cfg).tokenizer)
        return self.rows[key]

    def load(self, cfg: Config, mesh: jax.sharding.Mesh) -> Pretrained:
        """The base on the devices; one that is trained itself is each run's own, and so are other stacks of layers."""
        if self.pretrained is not None:
            if base.has_stacks(self.pretrained, cfg):
                return self.pretrained
            self.pretrained = None  # one base at a time
        loaded = base.load(self.open(cfg), cfg, mesh)
        if cfg.method == "lora":
            self.pretrained = loaded
        return loaded

    def load_checked(
        self, cfg: Config, mesh: jax.sharding.Mesh, loss_of: Callable[[Pretrained], float] | None, quiet: bool
    ) -> tuple[Config, Pretrained]:
        """As `load`, for a run that is yet to begin, and the config that it is trained by; see `base.load_checked`."""
        if cfg.model.compute is not None and self.pretrained is None:
            checked, self.pretrained = base.load_checked(self.open(cfg), cfg, mesh, loss_of, quiet)
            self.in_dtype = checked.model.compute is None
        cfg = base.in_dtype(cfg) if self.in_dtype else cfg
        return cfg, self.load(cfg, mesh)

    def compile(self, cfg: Config, remat: str, lower: Callable[[str], Any]) -> Any:
        """The executable of a step, compiled once for all runs that lower to the same program.

        Lowered once for all whose configs differ only in what is an argument of the step.
        """
        known = json.dumps([cfg.model_dump(mode="json", exclude=ARGUMENTS), remat])
        if known not in self.programs:
            lowered = lower(remat)
            program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
            self.programs[known] = self.programs[program] = self.programs.get(program) or lowered.compile()
        return self.programs[known]


def rows_key(cfg: Config) -> str:
    """What the rows of a run depend on, with the tokenizer."""
    return json.dumps([cfg.data.model_dump(mode="json"), cfg.training.seed if cfg.data.eval else None])


@dataclass
class Run:
    """A run from its opening to its end.

    Attributes:
      state, frozen, hyper: the arguments of the step beside the batch.
      start, step: steps done when this process took the run up, and now; `tokens` those of the steps before.
      compiled: the step, once it is.
      exported: the step whose weights a finished run leaves.
      saved: the identity in the checkpoint at `start`; None where there is none.
      changes: what this start does otherwise than the one before, as in `history`.
      began: when the run began, by `time.monotonic`, as if all its starts had followed one another.
      require_there: raises ConfigError where the run folder is gone; see `jlora.files.lock`.
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
    stopping: Stopping
    remat: str
    saved: dict[str, Any] | None
    start: int
    step: int
    changes: dict[str, Any] = field(default_factory=dict)
    began: float = 0.0
    tokens: int = 0
    compiled: Any = None
    exported: int | None = None
    require_there: Callable[[], None] = lambda: None
    callbacks: Callbacks = Callbacks()

    @property
    def params(self) -> dict[str, Any]:
        """{"adapter", "base"} and, of an objective on pairs, "reference", as they are now."""
        return optim.join(self.state.trained, self.frozen)

    @property
    def finished(self) -> bool:
        """Whether no step is left to take."""
        return self.step == self.num_steps or self.stopping.over

    @property
    def eval_every(self) -> int | None:
        """Steps between evaluations."""
        training = self.cfg.training
        return steps_between(training.eval_every, training.evals_per_epoch, self.epochs.steps_in_epoch)

    @property
    def save_every(self) -> int | None:
        """Steps between checkpoints."""
        training = self.cfg.training
        return steps_between(training.save_every, training.saves_per_epoch, self.epochs.steps_in_epoch)

    def of_base(self, what: str, measure: Callable[[], Any]) -> tuple[Any, bool]:
        """What `measure` finds of a run that is yet to take a step, and whether an earlier run had found it.

        Runs whose new adapters add nothing measure the same, on the same rows in the same batches.
        """
        if self.cfg.method != "lora" or not self.cfg.lora.starts_as_base:
            return measure(), False
        sizes = self.cfg.training.batch_size // self.cfg.training.gradient_accumulation_steps, self.kernel
        key = json.dumps([what, rows_key(self.cfg), *sizes, self.cfg.objective.model_dump(mode="json")])
        if known := key in self.shared.of_base:
            return self.shared.of_base[key], known
        found = self.shared.of_base[key] = measure()
        return found, False

    def position(self, tokens: int) -> dict[str, Any]:
        """What a checkpoint says of the rows and evaluations so far, as JSON; see `take_up_rows`."""
        return {
            "batches": self.batches.get_state(),
            "origin": self.epochs.origin,
            "next": self.epochs.place(self.step),
            "tokens": tokens,
            "stopping": self.stopping.get_state(),
        }


def open_run(cfg: Config, folder: Path, mesh: jax.sharding.Mesh, watch: Watch, shared: Shared, quiet: bool) -> Run:
    """The base, the rows, and what is trained of the whole, before the first step.

    Raises:
      ConfigError, DataError, ModelError: what does not fit together, before anything large is read where it can be.
    """
    open_checkpoints = partial(Checkpoints, folder / "checkpoints", cfg.training.keep_checkpoints)
    earlier = open_checkpoints() if (folder / "checkpoints").is_dir() else None  # a refusal leaves no folder behind
    newest = earlier.newest_whole if earlier else lambda: 0
    start = distributed.from_first(f"newest checkpoint of {folder}", newest)
    saved = (earlier or open_checkpoints()).identity(start) if start else None

    def require_same(hashes: dict[str, str | None]) -> None:
        if saved is not None:
            check_identity(folder, start, saved, run_identity(asked, hashes), cfg.resume.allow_changes, whole=False)

    asked = cfg
    require_same({})  # at once: all else takes its time
    opened = shared.open(cfg)
    cfg = with_ids(cfg, opened)
    check_divides(opened.model, mesh, cfg)
    if cfg.method == "lora":
        check_options(cfg.lora, opened.model)
        if not quiet:
            warn_of_dequantising(opened.source, cfg.model.quantization)
        optim.check_rule(cfg, opened.model)
    kernel, forward = make_forward(cfg, opened.model, mesh)
    if not quiet:
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
    hashes = {"tokenizer": opened.tokenizer.digest, **digests}
    require_same(hashes)
    epochs, num_steps = plan_steps(cfg, train_data)
    checks = check_rows(cfg, train_data, eval_data)
    chats = opened.tokenizer.chat_template is not None
    checks += check_run(cfg, num_steps, opened.source.config.get("max_position_embeddings"), chats)
    for found in checks:
        if found.level == "error":
            raise DataError(found.sentence)
        if not quiet:
            print(f"{found.level}: {found.sentence}", file=sys.stderr)
    if not quiet:
        base.warn_of_cpu(cfg, mesh)
    if saved is None:
        loss_of = None if eval_data is None else partial(base.held_out_loss, cfg, eval_data, forward, mesh)
        cfg, pretrained = shared.load_checked(cfg, mesh, loss_of, quiet)
    else:
        cfg = cfg if saved.get("compute") or not cfg.model.compute else base.in_dtype(cfg)  # as it began
        pretrained = shared.load(cfg, mesh)
    hashes["base"] = pretrained.base_hash
    if cfg.lora.init_from:
        hashes["init_from"] = adapter_digest(cfg.lora.init_from)
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
        identity=run_identity(asked, hashes) | {"compute": cfg.model.compute},
        checkpoints=earlier or open_checkpoints(),
        batches=packing.batches(epochs, cfg.training.batch_size, batch_rows(cfg, mesh)),
        stopping=Stopping(cfg.training.early_stopping_patience, cfg.training.early_stopping_min_delta),
        remat=cfg.model.remat,
        saved=saved,
        start=start,
        step=start,
    )


def resume(run: Run) -> dict[str, Any] | None:
    """Bring a run to where an earlier start left off; returns the summary of one that is finished.

    Raises:
      ConfigError, ModelError: the checkpoint is another run's, or beyond the steps that are asked for.
    """
    cfg, start, saved = run.cfg, run.start, run.saved
    if saved is not None:
        history = check_identity(run.folder, start, saved, run.identity, cfg.resume.allow_changes)
        run.identity["history"] = history
        if len(history) > len(saved.get("history", [])):
            run.changes = history[-1]["changes"]
        take_up_rows(run, start, changed=bool(run.changes))
        if start > run.num_steps:
            raise ConfigError(
                f"{run.folder}: is at step {start} already, past the {run.num_steps} asked for; raise "
                "training.max_steps or training.epochs"
            )
        if run.remat == "auto":
            remat = saved.get("remat", run.remat)
            run.remat = FORMER_REMAT.get(remat, remat)
        done = finished_summary(run.folder) if run.finished else None
        if done is not None:
            return done
        run.state = run.checkpoints.restore(start, run.state)
    saves = saves_left(run.save_every, start, run.num_steps)
    if cfg.training.exports_best:
        saves += saves_left(run.eval_every, start, run.num_steps)
    run.checkpoints.require_room(run.state, saves)
    return None


def take_up_rows(run: Run, start: int, changed: bool) -> None:
    """Go on behind the last row that the steps before `start` took, and with the tokens and evaluations counted then.

    Args:
      changed: the config, or the rows, are not what they were, so that batches are counted anew from here.
    """
    cfg, position = run.cfg, run.checkpoints.position(start)
    if "next" not in position:  # a checkpoint of earlier versions, which counted batches alone
        run.batches.set_state(position)
        run.tokens = run.epochs.tokens_at(start)
        return
    origin = Origin(*position["next" if changed else "origin"])
    if origin != run.epochs.origin:
        run.epochs, run.num_steps = plan_steps(cfg, run.train_data, origin)
        run.hyper = optim.hyperparameters(cfg.optimizer, run.num_steps)
        run.batches = packing.batches(run.epochs, cfg.training.batch_size, batch_rows(cfg, run.mesh))
    if not changed:
        run.batches.set_state(position["batches"])
    run.tokens = position["tokens"]
    run.stopping.set_state(position["stopping"])


def announce(run: Run, progress: ProgressLine) -> None:
    """What is about to happen, in three lines; in a log file, how many lines are to come, too."""
    cfg, rows = run.cfg, run.train_data
    dropped = f", dropped {dict(rows.dropped)}" if rows.dropped else ""
    cut = f", {rows.truncated} cut at {cfg.data.max_length} tokens" if rows.truncated else ""
    held = f" in {cfg.model.quantization}" if cfg.model.quantization else ""
    total, trained = count_parameters(run.pretrained.base), count_trained(run.state.trained)
    progress.say(f"base {cfg.model.path}{held}: {total:,} parameters, {trained:,} trained; attention {run.kernel}")
    sources = ", ".join(source.path for source in cfg.data.sources)
    held_out = f", {len(run.eval_data.examples)} held out" if run.eval_data else ""
    if isinstance(cfg.data.eval, str):
        held_out += f" ({cfg.data.eval})"
    progress.say(f"data {sources}: {len(rows.examples)} sequences of {rows.read} rows{held_out}{dropped}{cut}")
    later = f", resumed from step {run.start}" if run.start else ""
    progress.say(counted(run.num_steps, "step") + later)
    if progress.plain:
        progress.say(f"a line every {PLAIN_LINE_SECONDS:.0f} s, and all of them in {run.folder}/{METRICS}")
