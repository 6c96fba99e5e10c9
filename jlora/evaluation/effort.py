"""Does fine-tuning pay, on the user's own task?

The same held-out rows answered by the base with the bare instruction, with examples in the prompt, and after training
on more and more rows, by `jlora.train` itself; quality beside tokens, minutes and money: effort.json, effort.html.
What is done is kept in effort.json and not done again.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.config import Config
from jlora.errors import ConfigError, UserError, require_scores
from jlora.evaluation.scores import answer_and_score, describe_scores
from jlora.evaluation.strategies import Rows, Strategy, ask, choose, split_rows
from jlora.files import lock
from jlora.files.atomic import strict_json, write_text
from jlora.files.paths import require_own
from jlora.files.theirs import MAX_JSON, read_theirs
from jlora.hf.adapters import open_adapter
from jlora.hf.pretrained import Opened, open_pretrained
from jlora.hf.source import base_fingerprint
from jlora.inference.generate import LENGTH_STEP
from jlora.inference.model import Adapted
from jlora.model import attention, quant
from jlora.model.sharding import one_device_mesh
from jlora.reports.plan import require_matplotlib
from jlora.runtime import distributed, signals
from jlora.training.evaluator import Evaluator, describe_figures
from jlora.training.folder import make_run_dir
from jlora.training.opening import Shared
from jlora.training.run import train
from jlora.training.step import Forward

Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says beside the config."""

    bases: list[str]
    rows: list[int]
    shots: list[int]
    heldout: int
    max_new_tokens: int
    batch_size: int
    price: float | None


class Results:
    """effort.json: one record for each base and strategy, on the disk as soon as it is known."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.records: dict[str, Record] = {}
        try:
            known = json.loads(read_theirs(folder / "effort.json", MAX_JSON))
            self.records = {record["identity"]: record for record in known["results"]}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise ConfigError(f"{folder}/effort.json: not written by this command; move it away") from None

    def put(self, record: Record, settings: Record, order: list[str]) -> None:
        """Keep a record, and write all; `order` of identities comes first."""
        self.records[record["identity"]] = record
        self.write(settings, order)

    def write(self, settings: Record, order: list[str]) -> list[Record]:
        """Write all; returns the records of `order`, as far as they are there."""
        wanted = [self.records[identity] for identity in order if identity in self.records]
        others = [record for identity, record in self.records.items() if identity not in order]
        text = strict_json({"settings": settings, "results": wanted + others})
        write_text(self.folder / "effort.json", text + "\n")
        return wanted


def effort(cfg: Config, options: Options, quiet: bool) -> tuple[Record, list[UserError], bool]:
    """Run what is not done yet; returns {"settings", "results"}, what went wrong, and whether it was stopped.

    Raises:
      UserError: see `jlora.errors`; a fine-tuning that fails by one is told at the end, and the others go on.
    """

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    check(cfg)
    folder = make_run_dir(cfg)
    how = cfg.data.chat_template, cfg.model.resize_embeddings
    opened = [open_pretrained(base, _tokenizer(cfg, base), *how) for base in options.bases]
    rows = split_rows(cfg, [one.tokenizer for one in opened], options.heldout)
    strategies = choose(options.shots, options.rows, len(rows.train))
    require_own(folder, ConfigError, ("data", *map(folder_of, opened)))
    files = write_rows(folder / "data", rows, strategies)
    settings = describe(cfg, options, rows)
    plan = [(one, way, identify(cfg, options, one, way, rows)) for one in opened for way in strategies]
    order = [identity for _, _, identity in plan]
    failures: list[UserError] = []
    with lock.locked(folder):
        results = Results(folder)
        for one in opened:
            shared = Shared(opened=one)
            mine = [(way, results.records.get(key) or _record(one, way, key)) for base, way, key in plan if base is one]
            for way, record in mine:
                if is_ready(way, record):
                    continue
                say(f"== {one.name}: {way.name}")
                try:
                    finished = fine_tune(tuned_config(cfg, one, way, folder, files), record, quiet, shared)
                except UserError as error:
                    failures.append(error)
                    say(f"error: {error}; going on with the others")
                    continue
                results.put(record, settings, order)
                if not finished:
                    return {"settings": settings, "results": []}, failures, True
            todo = [(way, record) for way, record in mine if is_ready(way, record) and "loss" not in record]
            if todo:
                mesh = one_device_mesh()
                with jax.set_mesh(mesh):
                    quant.check_device(cfg.model.quantization, mesh.devices.flat[0])
                    if jax.device_count() > 1:
                        shared = Shared(opened=one)  # the runs' own base lies over all devices
                    pretrained = shared.load(cfg, mesh)
                    for way, record in todo:
                        say(f"== {one.name}: answers, {way.name}")
                        adapter = open_adapter(record["training"]["run"], pretrained) if way.rows else {}
                        model = Adapted(pretrained, adapter, jnp.dtype(cfg.model.dtype))
                        record |= judge(model, way, rows, cfg, options, mesh)
                        say(f"{describe_figures(record)}; {describe_scores(record)}")
                        results.put(record, settings, order)
        found = results.write(settings, order)
    found = [record for record in found if "loss" in record]
    for record in found:
        record["cost"] = cost(record, options.price)
    return {"settings": settings, "results": found}, failures, False


def is_ready(way: Strategy, record: Record) -> bool:
    """Whether a strategy can be judged: it needs no fine-tuning, or that came to its end."""
    return not way.rows or (record["training"] or {"finished": False})["finished"]


def check(cfg: Config) -> None:
    """Refuse what no such report can be made of.

    Raises:
      ConfigError: a config, or a machine.
    """
    require_scores()
    require_matplotlib("the effort report")
    if cfg.data.eval is None:
        raise ConfigError(
            "the effort report judges by held-out rows; set data.eval to a file or a fraction such as 0.1"
        )
    if not isinstance(cfg.data.train, str):
        raise ConfigError("the effort report takes the rows of one source; set data.train to a file, not to a mixture")
    if cfg.data.format in ("text", "preference"):
        raise ConfigError(f"rows of {cfg.data.format} hold no prompt with one answer; set data.format to another")
    if cfg.method != "lora" or cfg.sweep:
        raise ConfigError("the effort report trains adapters one by one; set method=lora and leave sweep out")
    if distributed.expected(cfg.distributed):
        raise ConfigError("the effort report is one process; start it alone, without a scheduler's job")


def _tokenizer(cfg: Config, base: str) -> str | None:
    return cfg.model.tokenizer if base == cfg.model.path else None


def write_rows(folder: Path, rows: Rows, strategies: list[Strategy]) -> dict[str, Path]:
    """heldout.jsonl and the rows of each fine-tuning, by its key."""
    folder.mkdir(exist_ok=True)
    contents = {"heldout": rows.heldout} | {way.key: rows.train[: way.rows] for way in strategies if way.rows}
    files = {name: folder / f"{name}.jsonl" for name in contents}
    for name, file in files.items():
        write_text(file, rows.text(contents[name]))
    return files


def describe(cfg: Config, options: Options, rows: Rows) -> Record:
    """What all strategies have in common."""
    return {
        "train": cfg.data.train,
        "eval": cfg.data.eval,
        "heldout_rows": len(rows.heldout),
        "training_rows": len(rows.train),
        "left_out": rows.left_out,
        "max_new_tokens": options.max_new_tokens,
        "batch_size": options.batch_size,
        "dtype": cfg.model.dtype,
        "quantization": cfg.model.quantization,
        "seed": cfg.training.seed,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "price": options.price,
    }


def identify(cfg: Config, options: Options, opened: Opened, way: Strategy, rows: Rows) -> str:
    """SHA-256 of everything that a strategy's result depends on."""
    tree = cfg.model_dump(mode="json", exclude={"output_dir", "resume", "distributed"})
    tree["data"] |= {"train": rows.text(rows.train[: way.rows or way.shots]), "eval": rows.text(rows.heldout)}
    tree["model"] |= {"path": base_fingerprint(opened.source), "tokenizer": opened.tokenizer.digest}
    if not way.rows:  # nothing of how it would be trained
        tree = {name: tree[name] for name in ("model", "data")}
    asked = [way.key, options.max_new_tokens, options.batch_size, tree]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _record(opened: Opened, way: Strategy, identity: str) -> Record:
    known = {"base": opened.name, "strategy": way.key, "name": way.name, "short": way.short}
    return known | {"shots": way.shots, "rows": way.rows, "identity": identity, "training": None}


def tuned_config(cfg: Config, opened: Opened, way: Strategy, folder: Path, files: dict[str, Path]) -> Config:
    """The config of one fine-tuning: the user's own, on fewer rows."""
    model = cfg.model.model_copy(update={"path": opened.name, "tokenizer": _tokenizer(cfg, opened.name)})
    ours = {"train": str(files[way.key]), "eval": str(files["heldout"])}
    # They hold the rows that were chosen, under the format's own names.
    rows = cfg.data.model_copy(update=ours | {"split": "train", "eval_split": None, "columns": {}})
    output_dir = str(folder / folder_of(opened) / way.key)
    return cfg.model_copy(update={"model": model, "data": rows, "output_dir": output_dir})


def folder_of(opened: Opened) -> str:
    """The folder of all fine-tunings of a base, in that of the report."""
    return f"{Path(opened.name).stem}-{base_fingerprint(opened.source)[:8]}"


def fine_tune(cfg: Config, record: Record, quiet: bool, shared: Shared) -> bool:
    """Train by `jlora.train`, and note in `record` what it took; False where it was stopped and saved."""
    with signals.own_signals():
        summary = train(cfg, quiet, shared)
    record["training"] = {
        "run": cfg.output_dir,
        "finished": summary["status"] == "finished",
        "seconds": summary["wall_seconds"],
        "tokens": summary["tokens"]["total"],
        "steps": summary["steps"],
        "epochs": summary["epochs"],
        "trainable_params": summary["trainable_params"],
    }
    return record["training"]["finished"]


def judge(model: Adapted, way: Strategy, rows: Rows, cfg: Config, options: Options, mesh: jax.sharding.Mesh) -> Record:
    """Loss, scores, tokens and seconds of one strategy on the held-out rows."""
    pretrained, dtype = model.pretrained, model.dtype
    limit = pretrained.source.config.get("max_position_embeddings")
    room = limit - options.max_new_tokens if isinstance(limit, int) else None
    asked = ask(rows.heldout, rows.train[: way.shots], cfg.data, pretrained.tokenizer, room)
    longest = max(len(example.ids) for example in asked.dataset.examples)
    length = max(cfg.data.max_length, -(-longest // LENGTH_STEP) * LENGTH_STEP)
    section = cfg.data.model_copy(update={"max_length": length})
    device, shape = mesh.devices.flat[0], pretrained.base.cfg
    head_dim, softcap = shape.head_dim, shape.attention_softcap
    _, kernel = attention.choose(cfg.model.attention, device, head_dim, length, dtype, section.one_segment, softcap)
    size = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
    evaluator = Evaluator(asked.dataset, section, size, Forward(kernel, "none", dtype, token_accuracy=True), mesh)
    figures = evaluator.measure(pretrained.base, model.adapter)
    limits = {"max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
    scored = answer_and_score(model, asked.questions, **limits, timed=True, until=asked.until)
    prompt_tokens = sum(len(question.ids) for question in asked.questions) / len(asked.questions)
    for answer, question in zip(scored["answers"], asked.questions, strict=True):
        answer |= {"prompt": question.shown, "reference": question.reference}
    return figures | scored | {"prompt_tokens": prompt_tokens, "mean_shots": asked.shots}


def cost(record: Record, price: float | None) -> Record | None:
    """Dollars at `price` an hour of one device: of training, and of a thousand answers in the batches measured."""
    if price is None:
        return None
    training = (record["training"] or {}).get("seconds", 0.0) * jax.device_count()
    answers = record["seconds"] / record["generated"] * 1000
    return {"training": training / 3600 * price, "thousand_answers": answers / 3600 * price}
