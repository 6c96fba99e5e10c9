"""What tokenised rows amount to, and what is wrong with them: lengths, batches, copies, checks of a sentence each.

Knows nothing of how they are shown.
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from jlora.config import Config
from jlora.data.dataset import Dataset, drawn
from jlora.data.formats import COLUMNS, OPTIONAL
from jlora.data.packing import Epochs
from jlora.data.prompts import Example
from jlora.data.sources import files_of
from jlora.files.text import counted

MAX_BINS = 20
# Fewer optimizer steps are hardly a training.
FEW_STEPS = 10
# Files that are named of those left out.
MOST_FILES = 5

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Check:
    """Something found; an `error` is what would train nothing, or wrongly, and a `note` what was chosen."""

    name: str
    level: Level
    count: int
    sentence: str


@dataclass(frozen=True)
class Scan:
    """One pass over the examples, an entry each.

    Attributes:
      lengths, trained: int32 [n], tokens and trained tokens.
      ended: bool [n], whether a token at which generation stops is trained (in both sequences of a pair).
      full: bool [n], whether a sequence is as long as allowed, and so may have been cut.
      double_bos: bool [n], whether two BOS follow each other.
      hashes: uint64 [n], of ids and weights.
    """

    lengths: np.ndarray
    trained: np.ndarray
    ended: np.ndarray
    full: np.ndarray
    double_bos: np.ndarray
    hashes: np.ndarray


def scan(dataset: Dataset, limit: int, bos_id: int | None, stops: list[int]) -> Scan:
    """Look at every example once.

    Args:
      limit: tokens of the longest sequence. bos_id: None where there is no BOS. stops: ids at which generation stops.
    """
    total = len(dataset.examples)
    kinds = (np.int32, np.int32, bool, bool, bool, np.uint64)
    found = Scan(*(np.zeros(total, kind) for kind in kinds))
    for i, example in enumerate(dataset.examples):
        ids, trained = example.ids, example.trained
        sequences = example.sequences()
        found.lengths[i], found.trained[i] = len(ids), trained.sum()
        found.ended[i] = all(any(stop in sequence.ids[sequence.trained] for stop in stops) for sequence in sequences)
        found.full[i] = any(len(sequence.ids) == limit for sequence in sequences)
        if bos_id is not None:
            found.double_bos[i] = ((ids[1:] == bos_id) & (ids[:-1] == bos_id)).any()
        found.hashes[i] = _hash(example)
    return found


def _hashes(dataset: Dataset) -> np.ndarray:
    """Those of `Scan`, where nothing else of it is asked for."""
    return np.array([_hash(example) for example in dataset.examples], np.uint64)


def _hash(example: Example) -> int:
    digest = hashlib.blake2b(example.digested(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def count_batches(dataset: Dataset, cfg: Config) -> dict[str, int]:
    """Tokens and examples of the first epoch, and its batches packed and padded.

    `packed_tokens` and `padded_tokens` are the tokens that the devices work through, padding included.
    """
    counts: dict[str, int] = {}
    for name, packing in (("packed", True), ("padded", False)):
        section = cfg.data.model_copy(update={"packing": packing})
        epochs = Epochs(dataset, section, cfg.training.batch_size, cfg.training.seed)
        batches = epochs.num_batches(1)
        counts = counts or {"tokens": epochs.tokens_at(batches), "rows": len(epochs.rows(0).members)}
        counts[name] = batches
        counts[f"{name}_tokens"] = batches * cfg.training.batch_size * cfg.data.max_length
    return counts


def count_sources(dataset: Dataset) -> list[dict[str, Any]]:
    """What each source of a mixture has, and how many of its sequences the first epoch has."""
    counts = [last - first for first, last in drawn(dataset.parts, 0)]
    return [asdict(part) | {"first_epoch": count} for part, count in zip(dataset.parts, counts, strict=True)]


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, count) of bins of equal round width, `to` not included, from 0 past the longest."""
    longest = int(lengths.max())
    width = next(m * 10**k for k in range(20) for m in (1, 2, 5) if m * 10**k * MAX_BINS > longest)
    counts = np.bincount(lengths // width, minlength=longest // width + 1)
    return [(i * width, (i + 1) * width, int(count)) for i, count in enumerate(counts)]


def describe(dataset: Dataset, found: Scan) -> dict[str, Any]:
    """The figures of one set of rows, as JSON has them."""
    quantiles = np.quantile(found.lengths, [0.0, 0.5, 0.9, 0.99, 1.0], method="higher")
    names = ("min", "median", "p90", "p99", "max")
    return {
        "rows": dataset.read,
        "examples": len(dataset.examples),
        "dropped": dict(dataset.dropped),
        "truncated": dataset.truncated,
        "tokens": int(found.lengths.sum(dtype=np.int64)),
        "trained_tokens": int(found.trained.sum(dtype=np.int64)),
        "lengths": {name: int(value) for name, value in zip(names, quantiles, strict=True)},
        "histogram": histogram(found.lengths),
        "duplicates": len(found.hashes) - len(np.unique(found.hashes)),
        "sources": count_sources(dataset),
    }


def check(dataset: Dataset, found: Scan, cfg: Config, name: str) -> list[Check]:
    """What is wrong with one set of rows.

    Args:
      name: the config's key, `train` or `eval`.
    """
    checks: list[Check] = []
    data, total = cfg.data, len(dataset.examples)

    def add(kind: str, level: Level, count: int, sentence: str) -> None:
        if count:
            checks.append(Check(kind, level, int(count), f"data.{name}: {sentence}"))

    doubles = np.flatnonzero(found.double_bos)
    add(
        "double_bos", "error", len(doubles),
        f"{_of(len(doubles), total)} have two BOS in a row, the first at {_place(dataset, doubles)}, which no model "
        "has seen; take BOS out of the rows or the chat template",
    )  # fmt: skip
    unended = np.flatnonzero(~found.ended & ~found.full)
    if not found.ended.any():
        why = (
            "the chat template ends no turn with a token at which generation stops; fix it (data.chat_template)"
            if len(unended)
            else f"all are cut at data.max_length={data.max_length}; raise it"
        )
        level: Level = "warning" if data.format == "text" else "error"
        add("end_never_trained", level, total, f"the end of no sequence is trained, so no answer would end: {why}")
    elif data.format != "text":
        add(
            "end_not_trained", "warning", len(unended),
            f"in {_of(len(unended), total)} no token at which generation stops is trained, though they are not cut, "
            f"the first at {_place(dataset, unended)}",
        )  # fmt: skip
    add(
        "truncated", "warning", dataset.truncated,
        f"{_of(dataset.truncated, dataset.read, 'rows')} are cut at data.max_length={data.max_length}",
    )  # fmt: skip
    dropped = sum(dataset.dropped.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dataset.dropped.items())
    if data.on_bad_row == "skip":  # else `train` stops, and drops none
        add("dropped", "warning", dropped, f"{_of(dropped, dataset.read, 'rows')} are dropped ({reasons})")
    copies = _copies(found.hashes)
    add(
        "duplicates", "warning", len(copies),
        f"{_of(len(copies), total)} are exact copies of an earlier one, the first at {_place(dataset, copies)}",
    )  # fmt: skip
    return checks + check_sources(dataset, cfg, name)


def check_sources(dataset: Dataset, cfg: Config, name: str) -> list[Check]:
    """What of a set of rows is read under another name, or not at all.

    Args:
      name: the config's key, `train` or `eval`.
    """
    checks = [
        Check(
            "other_name", "note", count,
            f'data.{name}: the column "{theirs}" is read as {ours} (in {counted(count, "row")}); set '
            f"data.columns.{ours} to take another",
        )
        for (theirs, ours), count in sorted(dataset.renamed.items())
        if ours not in cfg.data.columns
    ]  # fmt: skip
    own = ", ".join((*COLUMNS[cfg.data.format], *OPTIONAL[cfg.data.format]))
    checks += [
        Check(
            "unused_column", "warning", count,
            f'data.{name}: {_of(count, dataset.read, "rows")} have something in the column "{column}", which '
            f"data.format={cfg.data.format} does not read (it reads {own})",
        )
        for column, count in sorted(dataset.unused.items())
    ]  # fmt: skip
    section = cfg.data if name == "train" else cfg.data.held_out
    sources = [each.path for each in section.sources] if name == "train" else [str(section.eval)]
    for source in sources:
        files = files_of(source, section.split) if name == "train" or isinstance(section.eval, str) else None
        if files and files.left:
            some = ", ".join(files.left[:MOST_FILES]) + ", ..." * (len(files.left) > MOST_FILES)
            what = f"{source}: {counted(len(files.left), 'file')} not read: {some}"
            checks.append(Check("left_files", "note", len(files.left), f"data.{name}: {what}"))
    return checks


def check_rows(cfg: Config, train_data: Dataset, eval_data: Dataset | None) -> list[Check]:
    """What `train` says of its rows before it begins: how they were read, and held-out ones that are no such.

    `jlora data` looks further.
    """
    checks = check_sources(train_data, cfg, "train")
    if eval_data is not None and isinstance(cfg.data.eval, str):
        checks += check_sources(eval_data, cfg, "eval")
        checks += check_overlap(eval_data, np.isin(_hashes(eval_data), _hashes(train_data)))
    return checks


def check_run(cfg: Config, num_steps: int, positions: Any, chats: bool) -> list[Check]:
    """What of a run's own settings trains less, or shows less, than its owner may think, or otherwise than it is asked.

    Args:
      num_steps: optimizer steps to its end.
      positions: the base's `max_position_embeddings`, if it says so.
      chats: the tokenizer has a chat template.
    """
    training, warmup, longest = cfg.training, cfg.optimizer.warmup_steps, cfg.data.max_length
    more = "raise training.max_steps" if training.max_steps else "raise training.epochs"
    fewer = ", or lower training.batch_size" if training.batch_size > 1 and not training.max_steps else ""
    found = [
        (
            num_steps < FEW_STEPS, "few_steps", num_steps,
            f"the run is over after {counted(num_steps, 'optimizer step')} of "
            f"{counted(training.batch_size, 'row')} each, which hardly changes a model; {more}{fewer}",
        ),
        (
            warmup >= num_steps, "all_warmup", warmup,
            f"optimizer.warmup_steps={warmup} of {counted(num_steps, 'step')}: the learning rate never reaches its "
            "peak; lower it, or set optimizer.warmup_ratio=0.03 instead",
        ),
        (
            cfg.data.eval is None, "no_held_out", 1,
            "no rows are held out, so nothing shows whether training helps or overfits; set data.eval to a file, "
            "or to a share of the rows such as 0.1",
        ),
        (
            isinstance(positions, int) and longest > positions, "positions", longest,
            f"data.max_length={longest} is beyond the base's {positions} positions",
        ),
    ]  # fmt: skip
    checks = [Check(name, "warning", count, sentence) for holds, name, count, sentence in found if holds]
    if chats and cfg.data.format == "alpaca" and cfg.data.prompt == "stanford":
        sentence = (
            "data.prompt=stanford: the base has a chat template, with which servers ask it, and these rows are not "
            "written in it; set data.prompt=chat, or ask the model in Stanford's prompt later, too"
        )
        checks.append(Check("no_template", "note", 1, sentence))
    return checks


def check_overlap(eval_data: Dataset, exact: np.ndarray) -> list[Check]:
    """Examples of `eval` that are in `train` as well; where all are, it measures what was learnt by heart.

    Args:
      exact: bool [eval], which they are by the hashes of `Scan`.
    """
    shared = np.flatnonzero(exact)
    if not len(shared):
        return []
    total = len(exact)
    sentence = f"data.eval: {_of(len(shared), total)} are in data.train too, the first at {_place(eval_data, shared)}"
    if len(shared) == total:
        return [Check("overlap", "error", total, f"{sentence}, so its loss says nothing of new rows; set others")]
    return [Check("overlap", "warning", len(shared), sentence)]


def _copies(hashes: np.ndarray) -> np.ndarray:
    """Where the second and further copies stand, ascending."""
    copy = np.ones(len(hashes), bool)
    copy[np.unique(hashes, return_index=True)[1]] = False
    return np.flatnonzero(copy)


def _of(count: int, total: int, things: str = "sequences") -> str:
    share = 100 * count / max(total, 1)
    return f"{count:,} of {total:,} {things} ({share:.2g} %)" if share < 99.5 else f"{count:,} of {total:,} {things}"


def _place(dataset: Dataset, which: np.ndarray) -> str:
    return dataset.places[int(which[0])] if len(which) else ""
