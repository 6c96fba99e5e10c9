"""What the runs of one process hand from one to the next: the base, tokenised rows, and compiled steps."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import jax

from jlora.config import Config
from jlora.data.dataset import Dataset
from jlora.data.encoding import read_data
from jlora.hf.pretrained import Opened, Pretrained, load_pretrained, open_pretrained
from jlora.training.step import param_dtype


@dataclass
class Shared:
    """What the runs of one process have in common, each taking from it what an earlier one made.

    Attributes:
      pretrained: the frozen base; its path, tokenizer, dtype, quantization and mesh are those of all the runs.
      programs: compiled steps by the SHA-256 of what was compiled.
    """

    opened: Opened | None = None
    pretrained: Pretrained | None = None
    rows: dict[str, tuple[Dataset, Dataset | None]] = field(default_factory=dict)
    programs: dict[str, Any] = field(default_factory=dict)

    def open(self, cfg: Config) -> Opened:
        """The base, no weight read yet, with its tokenizer."""
        if self.opened is None:
            self.opened = open_pretrained(cfg.model.path, cfg.model.tokenizer, cfg.data.chat_template)
        return self.opened

    def read(self, cfg: Config) -> tuple[Dataset, Dataset | None]:
        """The tokenised rows of a run, training and held out."""
        key = json.dumps([cfg.data.model_dump(mode="json"), cfg.training.seed if cfg.data.eval else None])
        if key not in self.rows:
            self.rows[key] = read_data(cfg, self.open(cfg).tokenizer)
        return self.rows[key]

    def load(self, cfg: Config, mesh: jax.sharding.Mesh) -> Pretrained:
        """The base on the devices; one that is trained itself is each run's own."""
        if self.pretrained is not None:
            return self.pretrained
        loaded = load_pretrained(self.open(cfg), param_dtype(cfg), mesh, cfg.model.quantization)
        if cfg.method == "lora":
            self.pretrained = loaded
        return loaded

    def compile(self, lowered: Any) -> Any:
        """The executable of a lowered step, compiled once for all runs that lower to the same program."""
        program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        if program not in self.programs:
            self.programs[program] = lowered.compile()
        return self.programs[program]
