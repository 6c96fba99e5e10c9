"""The rows of a run as its model would see them, and what is wrong with them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jlora.config import Config
from jlora.data.checks import Check, check, check_overlap, check_run, count_batches, describe, scan
from jlora.data.encoding import read_data
from jlora.data.near import check_near
from jlora.data.packing import plan_steps
from jlora.data.preview import Shown, show_rows
from jlora.data.tokens import Tokenizer
from jlora.errors import ConfigError, DataError
from jlora.hf.pretrained import open_tokenizer, stop_tokens, tokenizer_of
from jlora.hf.shapes import SHAPES


@dataclass(frozen=True)
class Seen:
    """What was found.

    Attributes:
      report: the JSON, but for the rows. rows: the first ones.
    """

    report: dict[str, Any]
    rows: list[Shown]

    @property
    def errors(self) -> list[str]:
        """The sentences for which the command fails."""
        return [found["sentence"] for found in self.report["checks"] if found["level"] == "error"]


def look(cfg: Config, num_rows: int) -> Seen:
    """Read a run's data as `train` does, and check them.

    Raises:
      UserError: as `train`; but rows that cannot be used, and would end it, are an error among the checks.
    """
    tokenizer, stops, positions = _tokenizer(cfg)
    checks: list[Check] = []
    try:
        train_data, eval_data = read_data(cfg, tokenizer)
    except DataError as error:
        if cfg.data.on_bad_row == "skip":
            raise
        section = cfg.data.model_copy(update={"on_bad_row": "skip"})
        train_data, eval_data = read_data(cfg.model_copy(update={"data": section}), tokenizer)
        num_bad = sum(sum(each.dropped.values()) for each in (train_data, eval_data) if each)
        checks.append(Check("bad_rows", "error", num_bad, str(error)))
    report: dict[str, Any] = {"train": None, "eval": None, "near": []}
    hashes = {}
    for name, dataset in (("train", train_data), ("eval", eval_data)):
        if dataset is None:
            continue
        found = scan(dataset, cfg.data.longest, tokenizer.bos_id, stops)
        report[name], hashes[name] = describe(dataset, found), found.hashes
        checks += check(dataset, found, cfg, name)
    report["train"]["batches"] = count_batches(train_data, cfg)
    if eval_data is not None and isinstance(cfg.data.eval, float):  # a part of the rows that were read
        report["train"]["held_out"] = len(eval_data.examples)
    if eval_data is not None:
        checks += check_overlap(hashes["train"], eval_data, hashes["eval"])
        shared = np.isin(hashes["eval"], hashes["train"])
        warned, report["near"] = check_near(train_data, eval_data, shared, tokenizer.decode)
        checks += warned
    _, num_steps = plan_steps(cfg, train_data)
    report["steps"] = num_steps
    checks += check_run(cfg, num_steps, positions)
    report["checks"] = [asdict(found) for found in checks]
    each = -(-num_rows // len(cfg.data.sources))  # the first rows of every source
    rows = [row for source in cfg.data.sources for row in show_rows(source.path, each, tokenizer, cfg.data)]
    return Seen(report, rows[:num_rows])


def _tokenizer(cfg: Config) -> tuple[Tokenizer, list[int], Any]:
    """The run's tokenizer, the ids at which generation stops, and the base's positions, if it says them."""
    if cfg.model.path not in SHAPES:
        tokenizer, config = tokenizer_of(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
        return tokenizer, stop_tokens(tokenizer, config), config.get("max_position_embeddings")
    if cfg.model.tokenizer is None:
        raise ConfigError(f"model.path={cfg.model.path} is a shape alone; set model.tokenizer to see the data")
    tokenizer = open_tokenizer(cfg.model.tokenizer, cfg.data.chat_template)
    return tokenizer, [tokenizer.eos_id], None
