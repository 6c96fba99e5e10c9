"""What a run folder tells of its starts: from any folder, after any end, and what is refused before it costs time."""

import json
import shutil
import sys

import pytest
import yaml
from tiny import write_config

from jlora.config import load_config, variants
from jlora.config.places import places_of, relocated
from jlora.errors import ConfigError, ModelError
from jlora.files.paths import RUN_FILES
from jlora.files.starts import NAME, read_starts
from jlora.hf.adapters import base_of, run_config
from jlora.training.evaluator import Evaluator
from jlora.training.metrics import Callbacks, read_metrics
from jlora.training.opening import Shared
from jlora.training.run import train
from jlora.training.summary import print_sweep, seconds_before
from jlora.training.sweep import train_together

DATA = {"format": "completion", "max_length": 32, "eval": 0.25}
TRAINING = {"max_steps": 4, "batch_size": 2, "save_every": 2, "export": "last"}


class Killed(Exception):
    """What ends a run as `kill -9` would, without its last words."""


def kill_at(step):
    def on_step(number, line):
        assert line == read_metrics_line(line)
        if number == step:
            raise Killed

    return Callbacks(on_step=on_step)


def read_metrics_line(line):
    """A callback is given what is in the log, its time too."""
    assert line["wall_seconds"] > 0
    return line


@pytest.fixture(scope="module")
def project(tmp_path_factory, smallest_base):
    """A folder with `base`, rows, and the run of a config that names them as they lie in it; killed, then resumed."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(smallest_base, folder / "models" / "base")
    from tiny import make_completions

    make_completions(folder / "rows.jsonl", 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["jlora train", "c.yaml"])
        write_config(folder / "c.yaml", "models/base", "rows.jsonl", "runs/mine", data=DATA, training=TRAINING)
        with pytest.raises(Killed):
            train(load_config("c.yaml"), quiet=True, callbacks=kill_at(3))
        killed = read_metrics(folder / "runs" / "mine" / "metrics.jsonl")
        patch.setattr(sys, "argv", ["jlora train", "c.yaml", "training.seed=1"])
        overrides = ["optimizer.learning_rate=1.0e-3", "resume.allow_changes=[config.optimizer.learning_rate]"]
        summary = train(load_config("c.yaml", overrides), quiet=True)
    return folder, killed, summary


def test_a_killed_start_counts(project):
    folder, killed, summary = project
    assert killed[-1]["step"] == 3 and read_metrics(folder / "runs/mine/metrics.jsonl")[-1]["step"] == 4
    first, second = read_starts(folder / "runs/mine")
    assert (first["step"], second["step"]) == (0, 2) and NAME in RUN_FILES
    assert (first["command"], second["command"]) == ("jlora train c.yaml", "jlora train c.yaml training.seed=1")
    assert first["changes"] == {} and second["changes"]["config.optimizer.learning_rate"][1] == 1.0e-3
    assert summary["started"] == first["started"] <= second["started"]
    last = read_metrics(folder / "runs/mine/metrics.jsonl")[-1]
    assert killed[-1]["wall_seconds"] < last["wall_seconds"] < summary["wall_seconds"]


def test_seconds_before_are_those_of_the_last_line(tmp_path):
    (tmp_path / "summary.json").write_text('{"wall_seconds": 12.5}', encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "wall_seconds": 20.5}\n{"step": 5, "wall_s', encoding="utf-8")
    assert (seconds_before(tmp_path, 4), seconds_before(tmp_path, 0)) == (20.5, 0.0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4}\n', encoding="utf-8")
    assert seconds_before(tmp_path, 4) == 12.5


def test_a_run_works_from_any_folder(project, tmp_path, monkeypatch, here):
    """What was typed is tried first, then where it lay; the hub is asked for neither."""
    folder, *_ = project
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    run, base = folder / "runs/mine", str(folder / "models/base")
    assert "path: models/base" in (run / "config.yaml").read_text(encoding="utf-8")
    cfg = run_config(run)
    assert (cfg.model.path, cfg.data.train) == (base, str(folder / "rows.jsonl"))
    assert json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == base
    shutil.copytree(run / "adapter", tmp_path / "peft")
    for adapter in (run, run / "adapter", tmp_path / "peft"):
        common = ("--prompt", "a", "--max-new-tokens", 2, "--dtype", "float32", "-q")
        assert here("generate", "--adapter", adapter, *common)[::2] == (0, ""), adapter
    code, out, _ = here("export", "--adapter", run, "--out", tmp_path / "out")
    assert code == 0 and f"its base, to load it on: {base}" in out
    shutil.copytree(base, tmp_path / "models/base")
    assert base_of(str(run)) == "models/base"  # moved together
    shutil.rmtree(tmp_path / "models")
    shutil.copytree(run, tmp_path / "moved")
    (tmp_path / "moved" / NAME).write_text("[]\n{\n" + '{"paths": {"models/base": 3}}\n', encoding="utf-8")
    assert base_of(str(tmp_path / "moved")) == "models/base"


def test_paths_are_kept_where_they_lead_to_something(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for name in ("one.jsonl", "held.jsonl", "t.jinja"):
        (tmp_path / "a" / name).write_text("", encoding="utf-8")
    (tmp_path / "a" / "llama2").mkdir()  # which is a template's name
    monkeypatch.chdir(tmp_path / "a")
    sources = [{"path": "one.jsonl"}, {"path": "someone/rows"}]
    section = {"train": sources, "eval": "held.jsonl", "chat_template": "t.jinja", "format": "completion"}
    write_config(tmp_path / "c.yaml", "someone/base", "-", "run", data=section)
    cfg = load_config(tmp_path / "c.yaml")
    places = places_of(cfg)
    assert places == {name: str(tmp_path / "a" / name) for name in ("one.jsonl", "held.jsonl", "t.jinja")}
    assert relocated(cfg, places) == cfg
    monkeypatch.chdir(tmp_path / "b")
    found = relocated(cfg, places)
    assert [source.path for source in found.data.train] == [places["one.jsonl"], "someone/rows"]
    assert (found.data.eval, found.data.chat_template) == (places["held.jsonl"], places["t.jinja"])
    assert found.model == cfg.model
    named = cfg.model_copy(update={"data": cfg.data.model_copy(update={"chat_template": "llama2"})})
    monkeypatch.chdir(tmp_path / "a")
    assert "llama2" not in places_of(named)


def test_a_change_is_refused_before_the_base_is_opened(project, monkeypatch):
    """And of rows before its weights are read."""
    folder, *_ = project
    monkeypatch.chdir(folder)
    monkeypatch.setattr("jlora.training.base.load_pretrained", lambda *_: pytest.fail("weights were read"))
    allowed = "resume.allow_changes=[config.optimizer.learning_rate]"
    rows = folder / "rows.jsonl"
    text = rows.read_text(encoding="utf-8")
    rows.write_text(text.replace("a", "b"), encoding="utf-8")
    try:
        with pytest.raises(ModelError, match="hashes.data: "):
            train(load_config("c.yaml", ["optimizer.learning_rate=1.0e-3", allowed]), quiet=True)
    finally:
        rows.write_text(text, encoding="utf-8")
    monkeypatch.setattr("jlora.training.opening.open_base", lambda *_: pytest.fail("the base was opened"))
    with pytest.raises(ModelError, match="another run .config.lora.alpha: "):
        train(load_config("c.yaml", ["lora.alpha=3", "optimizer.learning_rate=1.0e-3"]), quiet=True)
    with pytest.raises(ConfigError, match="did you mean"):
        train(load_config("c.yaml", ["resume.allow_changes=[config.lora.alpa]"]), quiet=True)


@pytest.mark.long
def test_a_sweep_measures_its_base_once_and_tells_the_best(project, monkeypatch, capsys):
    """Each run's figure before training is the one that it would have measured alone, to the bit."""
    folder, *_ = project
    monkeypatch.chdir(folder)
    sweep = [
        {"name": "low", "optimizer.learning_rate": 1e-5},
        {"name": "high", "optimizer.learning_rate": 1e-2, "lora.rank": 2},
        {"name": "apart", "lora.use_dora": True},
        {"name": "parts", "training.gradient_accumulation_steps": 2},
    ]
    training = TRAINING | {"max_steps": 1, "save_every": None, "samples": 1}
    path = write_config(folder / "s.yaml", "models/base", "rows.jsonl", "runs/sweep", data=DATA, training=training)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"sweep": sweep}), encoding="utf-8")
    cfg, counted, measure = load_config(path), [], Evaluator.measure
    monkeypatch.setattr(Evaluator, "measure", lambda *args: counted.append(1) or measure(*args))
    capsys.readouterr()
    summary = train_together(cfg)
    said = capsys.readouterr().err
    assert len(counted) == 4 + 3 and said.count("(the base, as measured before)") == 1
    assert [line for line in said.splitlines() if line.startswith("run ")] == [
        f"run {number} of 4: {entry['name']}" for number, entry in enumerate(sweep, 1)
    ]
    assert "12 sequences of 16 rows, 4 held out" in said and said.count("answering 1 sample before training") == 4
    assert "\na line every 10 s, and all of them in runs/sweep/low/metrics.jsonl" in said
    before = read_metrics(folder / "runs/sweep/high/metrics.jsonl")[0]
    alone = train(variants(cfg)[1].model_copy(update={"output_dir": "runs/alone"}), quiet=True, shared=Shared())
    assert before["eval_loss"] == alone["eval_loss_before"] == summary["runs"]["low"]["eval_loss_before"]
    samples = (json.loads((folder / "runs" / name / "samples.json").read_text()) for name in ("sweep/high", "alone"))
    assert next(samples) == next(samples)
    print_sweep(summary)
    said = capsys.readouterr().out.splitlines()
    best = min(summary["runs"], key=lambda name: summary["runs"][name]["eval_loss"])
    loss = summary["runs"][best]["eval_loss"]
    adapter, page = f"runs/sweep/{best}/adapter", "runs/sweep/report.html"
    assert said[-2:] == [f"best by held-out loss ({loss:.4f}): {best}, adapter: {adapter}", f"report: {page}"]
    assert "4 runs compared" in (folder / page).read_text(encoding="utf-8")
