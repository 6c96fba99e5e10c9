"""jlora from a Python program or a notebook: `finetune`, `open_run`, `plan_for`.

The same code as the commands, without what belongs to a process of one's own: signal handlers are as they were
afterwards, and nothing is started anew. Errors are those of `jlora.errors`, each one sentence.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jlora.config import Config, DataSection, config_of
from jlora.errors import ConfigError, DataError, MemoryExceeded, ModelError, UserError

Source = str | Path | dict[str, Any]


class Run:
    """A run folder, finished or not.

    Attributes:
      folder: where it lies.
      config: as the run resolved it.
    """

    def __init__(self, folder: str | Path):
        """Open a run folder.

        Raises:
          ModelError: it holds no run.
        """
        from jlora.hf.adapters import run_config

        config = run_config(folder)
        if config is None:
            raise ModelError(f"{folder}: not a run folder (it has no config.yaml)")
        self.folder, self.config = Path(folder), config

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.summary.get('status', 'unfinished')})"

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json; empty before there is one."""
        from jlora.reports.run_files import parse, read_text

        return parse(read_text(self.folder / "summary.json")) or {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        from jlora.training.metrics import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    def metrics_frame(self) -> Any:
        """The lines of metrics.jsonl as a pandas DataFrame.

        Raises:
          ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ConfigError("metrics_frame needs pandas; run: pip install pandas, or take metrics") from None
        return pandas.DataFrame(self.metrics)

    @property
    def adapter(self) -> Path:
        """The finished adapter, a folder that PEFT loads.

        Raises:
          ModelError: the run has none.
        """
        from jlora.hf.adapters import find_adapter

        return find_adapter(str(self.folder))

    def generate(
        self,
        prompts: Sequence[str | dict[str, Any]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers of the base with the run's adapter; the model is loaded at the first call, and kept.

        Args:
          prompts: text (of the format alpaca: the instruction), or rows as in the run's data; answered together.
          temperature: 0 is greedy.

        Raises:
          DataError: a row without a prompt. UserError: as `jlora generate`.
        """
        import jax

        from jlora.data.formats import Columns
        from jlora.data.prompts import encode_prompt
        from jlora.data.row import BadRow
        from jlora.inference.generate import Sampling, generate
        from jlora.inference.prompting import row_of
        from jlora.model.sharding import one_device_mesh

        with jax.set_mesh(one_device_mesh()):
            (model, section), encoded = self._model, []
            columns = Columns(section.format, section.columns, answered=False)
            for number, prompt in enumerate(prompts, 1):
                try:
                    row = row_of(prompt, section.format) if isinstance(prompt, str) else columns.read(prompt)
                    ids = encode_prompt(model.pretrained.tokenizer, row, format=section.format, prompt=section.prompt)
                except BadRow as bad:
                    raise DataError(f"prompt {number}: {bad.message} (format {section.format})") from None
                encoded.append(ids)
            if not encoded:
                return []
            sampling = Sampling(temperature, top_p)
            *_, answers = generate(model, encoded, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
        return [model.pretrained.tokenizer.decode(ids) for ids in answers]

    def evaluate(self, data: str | Path, **options: Any) -> dict[str, Any]:
        """Loss of the base with the run's adapter on rows; what `jlora evaluate --json` prints.

        Args:
          options: flags of `jlora evaluate`, such as generate=20 or batch_size=8.

        Raises:
          UserError: as `jlora evaluate`.
        """
        from jlora.evaluate import check_arguments, make_parser
        from jlora.evaluation.measure import evaluate

        known = make_parser().defaults()
        known |= {"data": str(data), "adapter": str(self.folder), "json": True, "quiet": True}
        if unknown := options.keys() - known.keys():
            raise ConfigError(f"evaluate takes no {sorted(unknown)[0]}; see jlora evaluate --help")
        args = argparse.Namespace(**known | options)
        check_arguments(args)
        return evaluate(args)

    def export(
        self, out: str | Path, *, step: int | str | None = None, merge: bool = False, dtype: str | None = None
    ) -> dict[str, Any]:
        """Write the adapter, or with `merge` a whole checkpoint, proved by reading it back; the figures of the proof.

        Args:
          step: a checkpoint's, or "best" by held-out loss; None is the newest.
          dtype: of merged weights; None is the run's.

        Raises:
          UserError: as `jlora export`.
        """
        from jlora.training.export import export

        return export(self.folder, Path(out), step, merge, dtype, peft=False)  # type: ignore[arg-type]

    @cached_property
    def _model(self) -> tuple[Any, DataSection]:
        from jlora.inference.model import open_adapted

        return open_adapted(self.config.model.path, str(self.folder)), self.config.data


def finetune(
    config: Source,
    *,
    quiet: bool = False,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
    on_eval: Callable[[int, dict[str, Any]], dict[str, Any] | None] | None = None,
    on_save: Callable[[int, Path], None] | None = None,
    **overrides: Any,
) -> Run:
    """Train, or resume from the last checkpoint; returns the run.

    Ctrl-C after the first step saves and returns; the run's summary says "preempted", and the same call resumes it.

    Args:
      config: a YAML file, or its keys as nested dicts.
      quiet: show no progress.
      on_step, on_eval, on_save: see `jlora.training.metrics.Callbacks`.
      overrides: dotted keys, as in `finetune("c.yaml", **{"training.max_steps": 100})`.

    Raises:
      UserError: see `jlora.errors`.
    """
    cfg = config_of(config, overrides)
    if cfg.sweep:
        raise ConfigError("finetune trains one run; start a sweep with: jlora train")
    given: dict[str, Any] = {"on_step": on_step, "on_eval": on_eval, "on_save": on_save}
    from jlora.runtime.signals import own_signals
    from jlora.training.metrics import Callbacks
    from jlora.training.run import train

    with own_signals():
        train(cfg, quiet, callbacks=Callbacks(**{name: call for name, call in given.items() if call is not None}))
    return Run(cfg.output_dir)


def open_run(folder: str | Path) -> Run:
    """A run that was trained before.

    Raises:
      ModelError: `folder` holds none.
    """
    return Run(folder)


def plan_for(config: Source, topology: str, **overrides: Any) -> dict[str, Any]:
    """What a run takes on hardware that is not here; what `jlora plan --json` prints, also where it does not fit.

    Compiled in a process of its own, since a compiler for absent hardware changes what JAX is in this one.

    Args:
      topology: such as gpu:h100-80gb:2; `jlora plan --topology list` names them.
      overrides: as of `finetune`.

    Raises:
      UserError: as `jlora plan`.
    """
    cfg: Config = config_of(config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(cfg.dump_yaml(), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "jlora.plan", str(path), "--topology", topology, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode not in (0, MemoryExceeded.exit_code) or not done.stdout.strip():
        kinds: dict[int, type[UserError]] = {kind.exit_code: kind for kind in (ConfigError, DataError, ModelError)}
        said = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise kinds.get(done.returncode, MemoryExceeded)(said[-1] if said else done.stderr[-1000:])
    return json.loads(done.stdout)
