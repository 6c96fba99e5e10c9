"""What stands above a run's figures."""

import json
import re
import sys

import pytest
import yaml
from report_pages import SUMMARY, Page, make_run, train_line

from jlora.reports.run import heading, write_report
from jlora.reports.run_files import read_run
from jlora.training.summary import origin

CONFIG = {
    "model": {"path": "meta-llama/Llama-2-7b-hf", "quantization": "nf4"},
    "method": "lora",
    "lora": {"rank": 8, "alpha": 16.0, "use_dora": True},
    "objective": {"name": "dpo"},
    "optimizer": {"learning_rate": 2e-4, "schedule": "cosine"},
    "training": {"epochs": 3, "max_steps": None},
}


def written(folder, config, summary, lines=()):
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def test_a_run_is_told_in_a_few_words(tmp_path):
    told = {"started": "2026-11-29T10:01:12", "command": "jlora train run.yaml lora.rank=8", "epochs": 0.5185}
    rows = {"rows": {"read": 500, "used": 432, "eval": 60}}
    run = written(tmp_path, CONFIG, SUMMARY | told | rows)
    assert heading(read_run(run)) == {
        "Base": "Llama-2-7b-hf in nf4",
        "Method": "DoRA, rank 8, alpha 16, DPO",
        "Learning rate": "0.0002, cosine",
        "Rows": "432 trained on, 60 held out",
        "Epochs": "0.52 of 3",
        "Date": "2026-11-29 10:01",
        "Command": "jlora train run.yaml lora.rank=8",
    }
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.problems == [] and page.text.index("Llama-2-7b-hf in nf4") < page.text.index("Key figures")


def test_a_resumed_run_tells_of_all_its_starts(tmp_path):
    """The first one's date and command, where and why the others began, and the time of all together."""
    first, second = "jlora train run.yaml", "jlora train run.yaml lora.rank=8"
    starts = [
        {"step": 0, "started": "2026-11-29T16:36:01", "command": first},
        {"step": 35, "started": "2026-11-29T16:47:17", "command": second, "changes": {"config.a.b": [60, 42]}},
    ]
    lines = [train_line(1, wall_seconds=5.0), train_line(40, wall_seconds=702.0)]
    run = written(tmp_path, CONFIG, None, lines)

    def told(starts):
        (run / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts), encoding="utf-8")
        return heading(read_run(run))

    facts = told(starts)
    assert facts["Date"] == "2026-11-29 16:36"
    assert facts["Resumed"] == "at step 35, 2026-11-29 16:47, a.b 60 → 42"
    assert (facts["Command"], facts["Command at step 35"]) == (first, second)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.problems == [] and "11 min 42 s" in page.text and "stopped, can be resumed" in page.text
    many = [starts[1] | {"step": 35 + number} for number in range(9)]
    for start in many[1:]:
        del start["changes"]
    facts = told([starts[0], *many])
    assert facts["Resumed"].startswith("9 times; at step 35, ") and "at step 43" in facts["Resumed"]
    assert facts["Resumed"].count("at step") == 4 and list(facts)[-2:] == ["Command", "Command at step 35"]
    hostile = [{"step": "x", "started": [], "command": {}}, {"step": 3, "changes": {"a": 1, "b": [{}, "<i>"]}}, 5]
    assert told(hostile)["Resumed"] == "at step 3, b {} → <i>"
    assert Page(write_report(run).read_text(encoding="utf-8")).problems == []


def test_a_run_that_goes_on_has_what_is_known(tmp_path):
    full = {"method": "full", "training": {"epochs": 3, "max_steps": 50}}
    facts = heading(read_run(written(tmp_path, full, None, [train_line(1) | {"epoch": 0.25}])))
    assert facts.keys() == {"Method", "Epochs", "Date"}
    assert facts["Method"] == "full fine-tuning" and facts["Epochs"] == "0.25"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", facts["Date"])


def test_a_folder_that_says_nothing_has_no_facts(tmp_path):
    assert heading(read_run(tmp_path)) == {}
    hostile = {"model": [], "method": {"a": 1}, "optimizer": {"learning_rate": "<b>"}, "training": {"epochs": "x"}}
    summary = {"rows": {"used": "<i>", "eval": []}, "epochs": [], "started": 3, "command": {}}
    run = written(tmp_path, hostile, summary, [{"step": 1}])
    assert Page(write_report(run).read_text(encoding="utf-8")).problems == []


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"eval_loss": 3.5}, "training raised the held-out loss"),
        ({"exported_step": 20}, "the adapter is that of step 20"),
        ({"stopped_early": True}, "stopped early: the held-out loss fell no more"),
    ],
)
def test_what_a_reader_has_to_know_stands_above_the_figures(changes, note, tmp_path):
    def text():
        return Page(write_report(tmp_path / "run").read_text(encoding="utf-8")).text

    make_run(tmp_path / "run", 2, 4)
    assert note not in text()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(SUMMARY | changes), encoding="utf-8")
    assert note in text()


def test_a_run_knows_its_command(monkeypatch):
    began = origin(0.0)["started"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", began)
    monkeypatch.setenv("MY_API_KEY", "sesame-open-now")
    for program, named in (("jlora train", "jlora train"), ("/x/jlora/train.py", "jlora train"), ("/x/mine.py", None)):
        monkeypatch.setattr(sys, "argv", [program, "my run.yaml", "output_dir=sesame-open-now"])
        wanted = named and f"{named} 'my run.yaml' output_dir=[secret]"
        assert origin(0.0)["command"] == wanted
