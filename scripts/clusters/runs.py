"""Training runs of a tiny model on a cluster, the harm's moments, and the table of cases."""

import hashlib
import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from nodes import Cluster, Late, until

STEPS, SAVE_EVERY = 60, 10
# Makes a random Llama of 37,216 parameters, in the environment of jlora.
BASE = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

base = Path(sys.argv[1])
base.mkdir()
words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
vocab, embed, mlp = len(words), 32, 64
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": embed,
    "intermediate_size": mlp, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False}
shapes = {"model.embed_tokens": (vocab, embed), "lm_head": (vocab, embed), "model.norm": (embed,)}
for layer in ("model.layers.0", "model.layers.1"):
    shapes |= {f"{layer}.self_attn.{name}_proj": (embed, embed) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj": (mlp, embed) for name in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj": (embed, mlp)}
    shapes |= {f"{layer}.{name}_layernorm": (embed,) for name in ("input", "post_attention")}
drawn = np.random.default_rng(0)
weights = {f"{name}.weight": drawn.normal(0, 0.1, shape).astype(np.float32) + (len(shape) == 1)
    for name, shape in shapes.items()}
save_file({name: array.astype(np.float32) for name, array in weights.items()}, base / "model.safetensors")
(base / "config.json").write_text(json.dumps(config))
tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.save(str(base / "tokenizer.json"))
special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
(base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
"""


def make_material(folder: Path) -> Path:
    """A base, rows and a config; what is lost is noticed after 10 s, so that a case takes no longer than it must."""
    subprocess.run([folder / "bin/python", "-c", BASE, folder / "base"], check=True)
    rows = [{"prompt": f"blue {i}:", "completion": " blue" * (1 + i % 7)} for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model": {"path": f"{folder}/base", "dtype": "float32", "remat": "none"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"train": f"{folder}/rows.jsonl", "format": "completion", "max_length": 64, "eval": 0.1},
        "training": {"batch_size": 4, "max_steps": STEPS, "save_every": SAVE_EVERY, "seed": 5},
        "optimizer": {"learning_rate": 5e-3},
        "distributed": {"host_timeout": 10, "start_timeout": 60},
    }
    (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return folder / "run.yaml"


def digest(run: Path) -> str:
    """SHA-256 of the adapter that a run ended with."""
    adapter = run / "adapter/adapter_model.safetensors"
    if not adapter.exists():
        raise Late(f"{run.name} has no adapter")
    return hashlib.sha256(adapter.read_bytes()).hexdigest()


def last_step(run: Path) -> int:
    """The last step that a run has logged, 0 before the first."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    found = 0
    for line in lines:
        try:
            found = max(found, json.loads(line).get("step", 0))
        except json.JSONDecodeError:  # it is being written
            continue
    return found


def resumed_from(log: str) -> str:
    """The steps from which the starts in a log went on.

    Raises:
      Late: none did.
    """
    if not (steps := re.findall(r"resumed from step (\d+)", log)):
        raise Late("nothing was resumed")
    return f"from step {', '.join(steps)}"


def in_a_step(run: Path) -> None:
    """Return in the middle of a run, while no checkpoint is written; one that is due may not have begun."""
    until(f"{run.name} trains", 120, lambda: last_step(run) > 2 * SAVE_EVERY + 2 and not saving(run), 0.005)


def saving(run: Path) -> list[Path]:
    """The checkpoints that are half written."""
    return list((run / "checkpoints").glob("*.saving"))


def in_a_save(run: Path) -> None:
    """Return while a checkpoint after the first is being written."""
    until(f"{run.name} trains", 120, lambda: last_step(run) > SAVE_EVERY + 2, 0.01)
    until(f"{run.name} saves", 60, lambda: saving(run), 0.0005)


class Table:
    """Runs cases one after the other, each within its bound, and remembers how they ended."""

    def __init__(self, cluster: Cluster, only: list[str]):
        self.cluster, self.only, self.failed, self.rows = cluster, only, 0, []
        self.config = make_material(cluster.folder)
        self.unbroken: dict[tuple[int, int], str] = {}

    def reference(self, processes: int, steps: int = STEPS) -> str:
        """SHA-256 of the adapter of a run that nothing happens to, of as many processes, by `scripts/launch/local`."""
        key = (processes, steps)
        if key not in self.unbroken:
            run = self.cluster.folder / f"runs/unbroken-{processes}-{steps}"
            command = [
                self.cluster.folder / "bin/python",
                self.cluster.code / "scripts/launch/local",
                "--processes",
                str(processes),
            ]
            command += ["--cpu-devices", "1", "--", "--config", self.config, f"output_dir={run}"]
            done = subprocess.run(
                [*command, f"training.max_steps={steps}"], stdout=subprocess.PIPE, text=True, timeout=300
            )
            if done.returncode:
                raise SystemExit(f"error: the unbroken run ended with {done.returncode}: {done.stdout[-3000:]}")
            self.unbroken[key] = digest(run)
            print(f"unbroken run of {processes} processes, {steps} steps: {self.unbroken[key][:12]}", flush=True)
        return self.unbroken[key]

    def case(self, name: str, bound: float, body: Callable[[Path], tuple[str, int, int] | str]) -> None:
        """Run a case in a new run folder and print its line.

        Args:
          bound: seconds; a case that takes longer has failed.
          body: gets the run's folder; returns what was seen, and the processes and steps of the unbroken run whose
            adapter the run must have made. Without those two there is no adapter to compare.
        """
        if self.only and not any(word in name for word in self.only):
            return
        run = self.cluster.folder / "runs" / name.replace(" ", "-").replace(",", "")
        began = time.monotonic()
        try:
            seen = body(run)
            seconds = time.monotonic() - began
            sha = "-"
            if not isinstance(seen, str):
                seen, processes, steps = seen
                sha = digest(run)
                if sha != self.reference(processes, steps):
                    raise Late(f"{seen}; the adapter {sha[:12]} is not the unbroken run's")
                if saving(run):
                    raise Late(f"{seen}; a half-written checkpoint is left")
                sha = f"{sha[:12]} equal"
            if seconds > bound:
                raise Late(f"{seen}; took longer than its bound of {bound} s")
            row = ("ok", name, f"{seconds:.0f} s", sha, seen)
        except (Late, subprocess.TimeoutExpired) as late:
            self.failed += 1
            row = ("FAILED", name, f"{time.monotonic() - began:.0f} s", "-", str(late))
            self.show_logs(run)
            self.cluster.clear()
        self.rows.append(row)
        print(" | ".join(row), flush=True)

    def show_logs(self, run: Path) -> None:
        """What the jobs of a failed case printed."""
        for log in sorted(self.cluster.folder.glob(f"logs/{run.name}*")):
            print(f"--- {log.name}\n{log.read_text(encoding='utf-8', errors='replace')[-6000:]}", flush=True)

    def end(self, bound: str) -> int:
        """Print the table; the exit code of the whole."""
        print(f"\n| case | outcome | time | adapter | what was seen |\n| {' | '.join(['---'] * 5)} |")
        for outcome, name, seconds, sha, seen in self.rows:
            print(f"| {name} | {outcome} | {seconds} | {sha} | {seen} |")
        ok = len(self.rows) - self.failed
        print(f"\n{ok} of {len(self.rows)} cases as they have to be; {bound}")
        return 1 if self.failed else 0
