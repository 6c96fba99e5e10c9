"""Training runs of a tiny model for the campaigns: started apart, told apart by the state that they end in."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {
    **{"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"},
    # Else every start would replace its process once more; and PYTHONPATH is for those that are not forked.
    **{"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONPATH": str(ROOT)},
}

from jlora.files import manifest  # noqa: E402
from jlora.training.metrics import read_metrics  # noqa: E402

STEPS, SAVE_EVERY = 40, 2
T = TypeVar("T")


class Lost(Exception):
    """Something that must not happen did; the message says what and where."""


def apart(body: Callable[[], object], log: Path) -> int:
    """Run a function in a process of its own, its output to a file; returns its pid.

    The process is a fork of this one, which has imported everything and never started JAX: that saves seconds a run.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        body()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 300.0) -> int:
    """Exit code of a process, negative for a signal; one that outlives the bound is an error."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Lost(f"process {pid} did not end in {seconds:.0f} s")
        time.sleep(0.002)


def trained(config: Path, run_dir: Path, *overrides: str) -> Callable[[], None]:
    """What `python -m jlora.train --config C output_dir=RUN` does."""

    def body() -> None:
        import jlora.train

        sys.argv = ["jlora.train", "--config", str(config), f"output_dir={run_dir}", *overrides]
        jlora.train.main()

    return body


def make_material(folder: Path, steps: int) -> Path:
    """A tiny random Llama, rows and a config: dropout, packing, held-out loss, checkpoints often."""

    def body() -> None:
        from tiny import make_completions, make_llama, make_tokenizer, write_config

        make_llama(folder / "base", num_attention_heads=4, head_dim=12)
        make_tokenizer(folder / "base")
        make_completions(folder / "rows.jsonl", 60)
        write_config(
            *(folder / "run.yaml", folder / "base", folder / "rows.jsonl", folder / "run"),
            lora={"target_modules": "all-linear", "dropout": 0.1},
            data={"format": "completion", "max_length": 64, "eval": 0.1},
            training={"batch_size": 4, "max_steps": steps, "save_every": SAVE_EVERY, "eval_every": 10, "seed": 5},
        )

    if wait(apart(body, folder / "material.log")):
        raise SystemExit((folder / "material.log").read_text(encoding="utf-8"))
    return folder / "run.yaml"


def final_state(run_dir: Path) -> str:
    """SHA-256 of all that a run ends with."""
    last = max(committed(run_dir))
    out = run_dir.with_suffix(".state")

    def body() -> None:
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        saved = run_dir / "checkpoints" / str(last) / "state"
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(saved).item_metadata.tree
            # As NumPy's: the devices of a job of four processes are not here.
            whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arrays = checkpointer.restore(saved, restore_args=whole)
        found = hashlib.sha256()
        for name in sorted(arrays):
            leaf = np.asarray(arrays[name])
            found.update(f"{name} {leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
        out.write_text(found.hexdigest(), encoding="utf-8")

    if wait(apart(body, run_dir.with_suffix(".log"))):
        raise Lost(f"{run_dir}: its last state cannot be read")
    measured = ("tokens_per_second", "wall_seconds", "host_bytes", "device_bytes")
    lines = [{k: v for k, v in line.items() if k not in measured} for line in read_metrics(run_dir / "metrics.jsonl")]
    parts = [str(last), out.read_text(encoding="utf-8"), json.dumps(lines)]
    parts.append((run_dir / "checkpoints" / str(last) / "data" / "metadata").read_text(encoding="utf-8"))
    whole = hashlib.sha256("\n".join(parts).encode())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        whole.update((run_dir / "adapter" / name).read_bytes())
    return whole.hexdigest()


def committed(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    return sorted(step for step in steps if manifest.fault(folder / str(step)) is None)


def began_at(log: Path) -> int | None:
    """The step from which the start in a log went on; None if it did not come as far as to say so."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    said = re.search(r"^\d+ steps?(?:, resumed from step (\d+))?$", text, flags=re.MULTILINE)
    return None if said is None else int(said[1] or 0)


class Campaign:
    """Material, the unbroken run's state and its seconds, and what was counted."""

    def __init__(self, folder: Path, seed: int, seconds: float, steps: int = STEPS):
        self.folder, self.seed, self.steps = folder, seed, steps
        self.random, self.ends = random.Random(seed), time.monotonic() + seconds
        self.config = make_material(folder, steps)
        import jlora.train  # noqa: F401  what is forked later has it

        for name in ("first", "unbroken"):  # the first compiles
            began = time.monotonic()
            self.finish(folder / name)
            self.unbroken_seconds = time.monotonic() - began
        self.state = final_state(folder / "unbroken")

    def log(self, run_dir: Path) -> Path:
        """The output of the last start of a run; not in its folder, whose disk may be full."""
        return self.folder / f"{run_dir.name}.log"

    def hand(self, cases: list[T], count: int) -> list[T]:
        """As many of the cases, shuffled once for all seeds and dealt to one after the other from seed 0 on.

        Raises:
          SystemExit: nothing is left for the seed; a campaign that does nothing finds nothing.
        """
        deck = random.Random(0).sample(cases, len(cases))
        dealt = deck[self.seed * count : (self.seed + 1) * count]
        if not dealt:
            raise SystemExit(f"--seed {self.seed}: the seeds before it have all {len(cases)} cases; take a lower one")
        return dealt

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.ends

    def start(self, run_dir: Path, *overrides: str) -> int:
        """Start training in a fork; its output, of this start alone, is in RUN.log."""
        self.log(run_dir).unlink(missing_ok=True)
        return apart(trained(self.config, run_dir, *overrides), self.log(run_dir))

    def finish(self, run_dir: Path) -> None:
        """Start, and let it come to its end."""
        code = wait(self.start(run_dir))
        if code:
            raise Lost(f"{run_dir}: exit code {code}: {self.log(run_dir).read_text(encoding='utf-8')[-2000:]}")

    def require_equal(self, run_dir: Path) -> None:
        """The state of the unbroken run, no debris, and the folder is gone after that."""
        left = [path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.isdecimal()]
        if left:
            raise Lost(f"{run_dir}: debris is left: {left}")
        if final_state(run_dir) != self.state:
            raise Lost(f"{run_dir}: ended in another state than the unbroken run")
        shutil.rmtree(run_dir)
