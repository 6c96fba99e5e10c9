"""Many runs over one base: each is that of its separate run, with its folder, whatever becomes of the others."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from shared_data import SHARED, needs_data
from tiny import make_completions, make_llama, make_tokenizer, write_config

import jlora.train
import jlora.training.run
from jlora.config import load_config, variants
from jlora.errors import ConfigError, NonFiniteError
from jlora.training.metrics import read_metrics
from jlora.training.opening import Shared
from jlora.training.run import train
from jlora.training.sweep import require_all, train_together

ROOT = Path(__file__).parents[2]
SWEEP = [
    {"name": "rate", "optimizer.learning_rate": 1e-3},
    {"name": "rank", "lora.rank": 2, "lora.use_rslora": True, "training.seed": 3, "training.save_every": 3},
    {
        "name": "data",
        "optimizer.weight_decay": 0.1,
        "optimizer.schedule": "linear",
        "optimizer.warmup_steps": 1,
        "training.max_steps": 2,
    },
    {"name": "wild", "optimizer.learning_rate": 1e30, "training.max_nonfinite_steps": 0},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    make_llama(folder / "base")
    make_tokenizer(folder / "base")
    make_completions(folder / "rows.jsonl")
    make_completions(folder / "other.jsonl", 17, first=100)
    make_completions(folder / "held.jsonl", 17, first=200)
    return folder


def configure(tiny, sweep, name="run.yaml", **sections):
    sections["data"] = {"format": "completion", "max_length": 64, "eval": str(tiny / "held.jsonl")}
    sections["training"] = {"max_steps": 4, "batch_size": 4, "gradient_accumulation_steps": 2}
    sections["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.1}
    path = write_config(tiny / name, tiny / "base", tiny / "rows.jsonl", tiny / "together", **sections)
    tree = yaml.safe_load(path.read_text()) | {"sweep": sweep}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def together(tiny):
    """The config of a finished sweep, of which one run has failed."""
    sweep = [entry | ({"data.train": str(tiny / "other.jsonl")} if entry["name"] == "data" else {}) for entry in SWEEP]
    cfg = load_config(configure(tiny, sweep))
    summary = train_together(cfg, quiet=True)
    with pytest.raises(NonFiniteError, match="^wild: step 2: "):
        require_all(summary)
    return cfg


def file_digest(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def curve(folder):
    names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "tokens", "trained_tokens", "epoch")
    return [{name: line[name] for name in names if name in line} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1, 2], ids=["rate", "rank", "data"])
def test_each_adapter_is_that_of_its_separate_run(tiny, together, number):
    cfg = variants(together)[number]
    folder, alone = Path(cfg.output_dir), tiny / "alone" / SWEEP[number]["name"]
    summary = train(cfg.model_copy(update={"output_dir": str(alone)}), quiet=True)
    assert max(np.abs(x).max() for x in weights(folder).values()) > 1e-3
    assert file_digest(folder) == file_digest(alone)
    for found, right in zip(curve(folder), curve(alone), strict=True):
        assert found == pytest.approx(right, abs=1e-5)
    mine = json.loads((folder / "summary.json").read_text())
    assert mine.keys() == summary.keys() and mine["steps"] == summary["steps"] == cfg.training.max_steps
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in alone.iterdir())
    # What it left is a run folder: the same command alone finds it finished.
    assert train(cfg, quiet=True)["hashes"] == summary["hashes"]


def test_a_run_that_fails_ends_alone(together):
    summary = json.loads((Path(together.output_dir) / "summary.json").read_text())
    states = {name: run["status"] for name, run in summary["runs"].items()}
    assert states == {"rate": "finished", "rank": "finished", "data": "finished", "wild": "failed"}
    assert summary["runs"]["wild"]["steps"] == 2
    assert not (Path(together.output_dir) / "wild" / "adapter").exists()


def test_a_sweep_goes_on_from_each_runs_checkpoint(tiny, together):
    shutil.copytree(together.output_dir, tiny / "resumed")
    shutil.rmtree(tiny / "resumed" / "rank" / "checkpoints" / "4")
    shutil.rmtree(tiny / "resumed" / "rate" / "checkpoints")
    for name in ("rank", "rate"):
        (tiny / "resumed" / name / "summary.json").unlink()
    sweep = [entry for entry in together.sweep if entry["name"] != "wild"]
    cfg = together.model_copy(update={"output_dir": str(tiny / "resumed"), "sweep": sweep})
    assert train_together(cfg, quiet=True)["status"] == "finished"
    for name in ("rank", "rate"):
        ours, theirs = weights(tiny / "resumed" / name), weights(Path(together.output_dir) / name)
        assert max(np.abs(ours[key] - theirs[key]).max() for key in ours) <= 1e-6
        assert curve(tiny / "resumed" / name)[-1] == pytest.approx(
            curve(Path(together.output_dir) / name)[-1], abs=1e-5
        )


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([{"name": "a"}, {"name": "a"}], "duplicate name 'a'"),
        ([{"name": "a", "optimizer.learning_rte": 1}], "unknown key 'optimizer.learning_rte'; did you mean"),
        ([{"name": "a", "model.path": "x"}], "'model.path' is the same for all runs"),
        ([{"name": "a", "mesh.fsdp": 1}], "'mesh.fsdp' is the same for all runs"),
        ([{"name": "a", "lora": {"rank": 1}}], "'lora' is the same for all runs"),
        ([{"lora.rank": 1}], "sweep entry 1: needs a name"),
        ([{"name": "../a"}], "needs a name"),
        ([{"name": "a", "lora.rank": 0}], "sweep entry 'a': lora.rank: Input should be greater than 0"),
        ([{"name": "a", "data.format": "preference"}], "sweep entry 'a': data.format=preference holds pairs"),
        (["a"], "sweep"),
    ],
)
def test_a_bad_entry_is_one_sentence(tiny, entries, says, capsys):
    path = configure(tiny, entries, "bad.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_sweep_that_cannot_be_is_refused(tiny, capsys, monkeypatch):
    path = configure(tiny, [{"name": "a"}, {"name": "b", "lora.rank": 2}], "bad.yaml")
    refused = {"method=full": "set method=lora"}
    for override, says in refused.items():
        monkeypatch.setattr("sys.argv", ["train", "--config", str(path), override])
        with pytest.raises(SystemExit) as ended:
            jlora.train.main()
        assert ended.value.code == 2 and says in capsys.readouterr().err
    with pytest.raises(ConfigError, match="sweep_halving compares runs by their held-out loss; set data.eval"):
        load_config(path, ["sweep_halving=true", "data.eval=null"])


@pytest.mark.long
def test_halving_stops_the_worse_half_at_each_rung(tiny):
    """Four runs of 8 steps: two stop at 2, one at 4, and the one left ends as it would have alone."""
    sweep = [{"name": f"r{i}", "optimizer.learning_rate": rate} for i, rate in enumerate((1e-2, 1e-5, 1e-6, 1e-3))]
    cfg = load_config(configure(tiny, sweep, "halving.yaml"), ["sweep_halving=true", "training.max_steps=8"])
    cfg = cfg.model_copy(update={"output_dir": str(tiny / "halving")})
    runs = train_together(cfg, quiet=True)["runs"]
    assert {name: run["steps"] for name, run in runs.items()} == {"r0": 8, "r1": 2, "r2": 2, "r3": 4}
    assert runs["r0"]["status"] == "finished" and runs["r3"]["status"] == "preempted"
    alone = tiny / "halving_alone"
    train(variants(cfg)[0].model_copy(update={"output_dir": str(alone)}), quiet=True)
    assert file_digest(alone) == file_digest(tiny / "halving" / "r0")


@pytest.mark.long
def test_halving_resumes_where_it_stopped(tiny):
    """A run beyond a rung that its sweep comes back to stays where it is."""
    sweep = [{"name": "a"}, {"name": "b", "optimizer.learning_rate": 1e-6}]
    cfg = load_config(configure(tiny, sweep, "again.yaml"), ["sweep_halving=true", "training.max_steps=4"])
    cfg = cfg.model_copy(update={"output_dir": str(tiny / "again")})
    b = variants(cfg)[1]
    assert train(b, quiet=True, until=3)["steps"] == 3
    runs = train_together(cfg, quiet=True)["runs"]
    assert {name: run["steps"] for name, run in runs.items()} == {"a": 4, "b": 3}


def test_fewer_steps_than_were_taken_leave_the_results_alone(tiny):
    sweep = [{"name": "a"}, {"name": "b"}]
    folder = tiny / "fewer"
    path = configure(tiny, sweep, "fewer.yaml")
    cfg = load_config(path, ["training.max_steps=2", f"output_dir={folder}"])
    train_together(cfg, quiet=True)
    before = (folder / "summary.json").read_bytes()
    allowed = ["training.max_steps=1", "resume.allow_changes=[config.training.max_steps]"]
    with pytest.raises(ConfigError, match="fewer/a: is at step 2 already, past the 1 asked for; raise training.max"):
        train_together(load_config(path, [*allowed, f"output_dir={folder}"]), quiet=True)
    assert (folder / "summary.json").read_bytes() == before


def test_a_signal_after_the_last_step_of_a_run_stops_the_sweep(tiny, monkeypatch):
    export = jlora.training.run.export_adapter
    kill = partial(os.kill, os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(jlora.training.run, "export_adapter", lambda *args: [export(*args), kill()][0])
    cfg = load_config(configure(tiny, [{"name": "a"}, {"name": "b"}], "late.yaml"), ["training.max_steps=1"])
    summary = train_together(cfg.model_copy(update={"output_dir": str(tiny / "late")}), quiet=True)
    assert summary["status"] == "preempted" and summary["runs"]["a"]["status"] == "finished"
    assert summary["runs"]["b"]["status"] == "not started"


def test_one_program_serves_runs_of_one_shape(tiny, monkeypatch):
    """Rates, schedules, decay, alpha and seeds change no program; a rank does. Arguments alone are not lowered anew."""
    shared, lowered = [], []
    make = jlora.training.run.make_train_step
    monkeypatch.setattr(jlora.training.run, "make_train_step", lambda *args: lowered.append(args) or make(*args))
    monkeypatch.setattr("jlora.training.sweep.Shared", lambda: shared.append(Shared()) or shared[0])
    same = {"optimizer.schedule": "linear", "optimizer.weight_decay": 0.1, "lora.alpha": 3, "training.seed": 5}
    sweep = [{"name": "a"}, {"name": "b", "optimizer.learning_rate": 1e-4, **same}, {"name": "c", "lora.rank": 2}]
    sweep += [{"name": "d", "optimizer.learning_rate": 2e-4, "optimizer.warmup_steps": 3, "training.seed": 9}]
    cfg = load_config(configure(tiny, sweep, "programs.yaml"), ["training.max_steps=1"])
    train_together(cfg.model_copy(update={"output_dir": str(tiny / "programs")}), quiet=True)
    assert len({id(program) for program in shared[0].programs.values()}) == 2 and len(lowered) == 3


@pytest.mark.long
def test_runs_may_differ_in_what_no_single_step_could_hold(tiny):
    """Ranks by layer, Adafactor, samples, another batch and rematerialisation: each as its separate run."""
    sweep = [
        {"name": "plain"},
        {"name": "apart", "lora.rank_pattern": {"q_proj": 2}, "lora.layers_to_transform": [1], "training.samples": 1},
        {"name": "other", "optimizer.name": "adafactor", "training.batch_size": 2, "model.remat": "none"},
    ]
    cfg = load_config(configure(tiny, sweep, "unlike.yaml"), ["training.max_steps=2"])
    cfg = cfg.model_copy(update={"output_dir": str(tiny / "unlike")})
    assert train_together(cfg, quiet=True)["status"] == "finished"
    for each in variants(cfg)[1:]:
        alone = Path(f"{each.output_dir}_alone")
        train(each.model_copy(update={"output_dir": str(alone)}), quiet=True)
        assert file_digest(alone) == file_digest(Path(each.output_dir))
    assert (tiny / "unlike" / "apart" / "samples.json").is_file()


@pytest.mark.slow
@needs_data
def test_eight_adapters_take_less_time_together(tmp_path):
    """Eight processes after another, on the real small model: each adapter the same, in less wall time."""
    sweep = [{"name": f"r{i}", "optimizer.learning_rate": 1e-3 * (i + 1), "training.seed": i} for i in range(8)]
    data = {"max_length": 256, "on_bad_row": "skip"}
    rows = SHARED / "reviews" / "sephora_reviews.jsonl"
    path = write_config(tmp_path / "run.yaml", SHARED / "stories260K", rows, tmp_path / "run", data=data)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"sweep": sweep}), encoding="utf-8")
    script = ROOT / "scripts" / "sweep_side_by_side"
    done = subprocess.run([sys.executable, script, "--config", path, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["adapters"] == 8 and found["largest_difference"] <= 1e-5 and found["ratio"] > 1.0


@pytest.mark.slow
def test_on_a_mesh(tiny):
    """Each adapter is that of its separate run on the same mesh."""
    config = configure(tiny, SWEEP[:2], "mesh.yaml")
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    command = [sys.executable, ROOT / "scripts" / "sweep_side_by_side", "--config", config, "--json"]
    done = subprocess.run([*command, "mesh.fsdp=2", "mesh.tensor=2"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout)["largest_difference"] <= 1e-5
