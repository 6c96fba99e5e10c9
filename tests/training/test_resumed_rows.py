"""A run that resumes with another batch size, or other rows: which rows it takes, and what it counts."""

import json
import os
import signal

import pytest
from tiny import make_llama, make_rows, make_tokenizer, write_config

import jlora.training.run
from jlora.config import load_config
from jlora.data.packing import Epochs, Origin, batches
from jlora.errors import ModelError
from jlora.training.metrics import read_metrics
from jlora.training.run import train

ALLOWED = "resume.allow_changes=[config.training.batch_size,config.data.train,hashes.data]"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_llama(folder / "base", hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl", 26)
    return folder


def configure(tiny, run, *overrides):
    sections = {
        "data": {"max_length": 320, "packing": False},
        "training": {"batch_size": 4, "epochs": 2, "max_steps": None, "seed": 3},
    }
    path = write_config(tiny / "c.yaml", tiny / "base", tiny / "rows.jsonl", run, **sections)
    return load_config(path, [*overrides, ALLOWED])


def stopped_after(monkeypatch, config, step):
    """The rows that a run of this config takes until it is told to stop after a step; to its end without one."""
    opened, took = [], jlora.training.run.StepMeter.took

    def stop(self, now, *args):
        opened.append((self._epochs, now))
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return took(self, now, *args)

    with monkeypatch.context() as patch:
        patch.setattr(jlora.training.run.StepMeter, "took", stop)
        summary = train(config, quiet=True)
    return [place for epochs, now in opened for place in epochs.places_in(now - 1)], summary


@pytest.mark.long
def test_another_batch_size_takes_each_row_once_an_epoch(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    whole, straight = stopped_after(monkeypatch, configure(tiny, tmp_path / "whole"), None)
    first, summary = stopped_after(monkeypatch, configure(tiny, run), 5)
    assert (summary["steps"], len(first)) == (5, 20)
    second, summary = stopped_after(monkeypatch, configure(tiny, run, "training.batch_size=8"), 7)
    assert summary["steps"] == 7
    third, summary = stopped_after(monkeypatch, configure(tiny, run, "training.batch_size=8"), 8)
    last, summary = stopped_after(monkeypatch, configure(tiny, run, "training.batch_size=2"), None)
    taken = [*first, *second, *third, *last]
    assert taken == whole and len({*taken[:26]}) == 26 == len({*taken[26:]})
    assert summary["status"] == "finished" and summary["epochs"] == straight["epochs"] == 2.0
    assert summary["tokens"]["total"] == straight["tokens"]["total"]
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, summary["steps"] + 1))
    assert lines[-1]["tokens"] == summary["tokens"]["total"]
    passed = [line["epoch"] for line in lines]
    assert passed == sorted(passed) and passed[4] == pytest.approx(20 / 28) and passed[-1] == 2.0


@pytest.mark.long
def test_other_rows_go_on_in_the_epoch_where_the_others_stopped(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    first, before = stopped_after(monkeypatch, configure(tiny, run), 8)  # a row into the second epoch
    make_rows(tiny / "more.jsonl", 40)
    rest, summary = stopped_after(monkeypatch, configure(tiny, run, f"data.train={tiny / 'more.jsonl'}"), None)
    assert len(first) == 26 + 4 and len(rest) == 40 - 4 == len({*rest})
    assert summary["epochs"] == 2.0 and summary["steps"] == 8 + 9
    assert summary["tokens"]["total"] > before["tokens"]["total"] + sum(1 for _ in rest)


@pytest.mark.long
def test_nothing_changed_is_as_before_to_the_bit(tiny, tmp_path, monkeypatch):
    """Batches are counted from the run's start, and a change that is taken back leaves them as they were."""
    curves = []
    for name, stop in (("whole", None), ("broken", 5)):
        config = configure(tiny, tmp_path / name)
        if stop:
            stopped_after(monkeypatch, config, stop)
        train(config, quiet=True)
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        curves.append([(line["step"], line["loss"], line["epoch"], line["tokens"]) for line in lines])
    assert curves[0] == curves[1]


@pytest.mark.long
def test_a_checkpoint_of_earlier_versions_resumes(tiny, tmp_path, monkeypatch):
    """It has the position of the iterator alone."""
    position = jlora.training.opening.Run.position
    with monkeypatch.context() as patch:
        patch.setattr(jlora.training.opening.Run, "position", lambda run, _: run.batches.get_state())
        stopped_after(monkeypatch, configure(tiny, tmp_path / "old"), 5)
    assert jlora.training.opening.Run.position is position
    rest, summary = stopped_after(monkeypatch, configure(tiny, tmp_path / "old"), None)
    whole, straight = stopped_after(monkeypatch, configure(tiny, tmp_path / "new"), None)
    assert rest == whole[20:] and summary["tokens"] == straight["tokens"] and summary["epochs"] == straight["epochs"]


def test_a_place_is_an_origin_for_any_batch_size(tiny):
    from jlora.data.encoding import read_data
    from jlora.hf.pretrained import open_tokenizer

    config = configure(tiny, tiny / "none")
    dataset, _ = read_data(config, open_tokenizer(str(tiny / "base"), None))
    four = Epochs(dataset, config.data, 4, 3)
    for step in (0, 1, 6, 7, 9, 14):
        for size in (1, 2, 8, 5):
            other = Epochs(dataset, config.data, size, 3, four.place(step))
            assert int(other.epoch_at(step)) == int(four.epoch_at(step))
            assert other.tokens_at(step) == four.tokens_at(step)
            taken = [place for batch in range(step, step + 12) for place in other.places_in(batch)]
            straight = [place for batch in range(step, step + 30) for place in four.places_in(batch)]
            assert taken == straight[: len(taken)], (step, size)
            batch = next(batches(other, size))
            assert batch["tokens"].shape == (size, 320)
    assert four.place(0) == Origin()


@pytest.mark.long
def test_a_template_that_writes_the_day(tiny, tmp_path, capsys):
    """As Llama 3.2's does: the run resumes on another day if the config holds the first, and its start says so."""
    turns = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    (tmp_path / "day.jinja").write_text("{{ strftime_now('%d %b %Y') }}: " + turns, encoding="utf-8")
    pair = [{"role": "user", "content": "q:"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': pair})}\n" * 4, encoding="utf-8")
    data = {"format": "messages", "max_length": 64, "chat_template": str(tmp_path / "day.jinja")}
    path = write_config(
        tmp_path / "c.yaml",
        *(tiny / "base", tmp_path / "rows.jsonl", tmp_path / "run"),
        data=data,
        training={"max_steps": 2, "batch_size": 2},
    )
    cfg = load_config(path, ["data.date=2024-07-26"])
    assert train(cfg, quiet=True, until=1)["steps"] == 1
    capsys.readouterr()
    with pytest.raises(ModelError, match=r"config\.data\.date: '2024-07-26' -> None"):
        train(load_config(path), until=2)
    with pytest.raises(ModelError, match=r"hashes\.data"):
        train(load_config(path, ["resume.allow_changes=[config.data.date]"]), until=2)
    assert "does not resume tomorrow, when its rows are others; set data.date=20" in capsys.readouterr().err
    assert train(cfg)["status"] == "finished"
    assert "tomorrow" not in capsys.readouterr().err
