"""Run folders of others, compared, and an index of them."""

import json
import re

import pytest
from report_pages import Page, make_run

import jlora.report
import jlora.runs
from jlora.errors import ConfigError
from jlora.files import lock
from jlora.reports import runs
from jlora.reports.run import write_report
from jlora.reports.runs import HEIGHT, WIDTH, compare, sparkline, write_index

ANCHORS = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} {{{', '.join(f'k{i}: *{chr(97 + n)}' for i in range(9))}}}\n" for n in range(9)
)
CONFIGS = {
    "anchors": ANCHORS,
    "a date": "a: 2020-99-99\n",
    "a long integer": "a: " + "9" * 5000 + "\n",
    "deep": "a: " + "[" * 20000,
    "long": "a: 1\n" * 20000,
    "a tag": "a: !!python/object/apply:os.system [true]\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_config_is_left_out_of_the_comparison(name, tmp_path):
    """Nine anchors of nine keys stand for 9^9 values."""
    for run, text in (("good", "lora: {rank: 4}\n"), ("bad", CONFIGS[name])):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text(text, encoding="utf-8")
        (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n', encoding="utf-8")
    assert "lora.rank" in compare([tmp_path / "good", tmp_path / "bad"])


def test_an_index_leads_to_each_run(tmp_path):
    folders = [make_run(tmp_path / "runs" / name, scale, rank) for name, scale, rank in (("a", 3, 4), ("b<i>", 2, 8))]
    write_report(folders[1])
    write_index(tmp_path / "index.html", folders)
    markup = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(markup)
    assert page.problems == [] and "b<i>" in page.text
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == ["./runs/b%3Ci%3E/report.html"]
    assert page.text.count("lora.rank 4") == page.text.count("lora.rank 8") == 1 and "lora.alpha" not in page.text
    assert markup.index("2.5000 → 1.0968") < markup.index('class="best"') < markup.index("2.5000 → 1.0645")
    assert len(re.findall('class="spark"', markup)) == 2


def test_an_index_of_broken_runs(tmp_path):
    for name, text in (("bad", CONFIGS["anchors"]), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text, encoding="utf-8")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n[', encoding="utf-8")
    write_index(tmp_path / "index.html", [tmp_path / "bad", tmp_path / "empty"])
    assert Page((tmp_path / "index.html").read_text(encoding="utf-8")).problems == []


SWEEP = "sweep:\n- {name: a_quarter_of_all_rows}\n- {name: b}\n- {name: ../b}\n- {name: later}\n"


def make_sweep(folder):
    for name, rank in (("b", 4), ("a_quarter_of_all_rows", 8)):
        make_run(folder / name, rank, rank)
    (folder / "config.yaml").write_text(SWEEP, encoding="utf-8")
    return folder


@pytest.fixture
def reported(capsys, monkeypatch):
    """`jlora report` in this process: exit code, stdout, stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["jlora report", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            jlora.report.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def test_the_page_of_a_sweep_compares_its_runs(tmp_path, reported, monkeypatch):
    """In the order of the sweep, those that have begun; too many for one page are listed."""
    folder = make_sweep(tmp_path / "sweep")
    assert reported(folder) == (0, f"{folder}/report.html\n", "")
    page = Page(markup := (folder / "report.html").read_text(encoding="utf-8"))
    assert page.problems == [] and "2 runs compared" in page.text and "lora.rank" in page.text
    assert page.text.count("a_quarter_of_all_rows") >= 2 and "<wbr>" in markup
    monkeypatch.setattr(runs, "MOST_RUNS", 1)
    assert reported(folder, "--out", tmp_path / "listed.html") == (0, f"{tmp_path}/listed.html\n", "")
    page = Page((tmp_path / "listed.html").read_text(encoding="utf-8"))
    assert page.problems == [] and "2 of them, as the sweep has them" in page.text


def test_a_sweep_without_a_page_is_refused(tmp_path, reported):
    folder = make_sweep(tmp_path / "sweep")
    code, _, err = reported(folder, "--watch")
    assert code == 2 and f"name one of its runs ({folder}/a_quarter_of_all_rows, {folder}/b)" in err
    for name in ("b", "a_quarter_of_all_rows"):
        (folder / name / "metrics.jsonl").rename(tmp_path / name)
    code, _, err = reported(folder)
    assert code == 2 and "no run of this sweep has begun" in err and not (folder / "report.html").exists()
    (folder / "b" / "metrics.jsonl").symlink_to(tmp_path / "b")
    with pytest.raises(ConfigError, match="links in a run folder"):
        runs.write_sweep(folder)


def test_a_run_that_trains_is_told_from_one_that_was_ended(tmp_path):
    folder = make_run(tmp_path / "run", 2, 4)
    (folder / "summary.json").unlink()
    assert runs.described(folder)["status"] == "stopped"
    with lock.locked(folder):
        assert runs.described(folder)["status"] == "training"
        write_report(folder)
    assert "training" in Page((folder / "report.html").read_text(encoding="utf-8")).text
    assert runs.described(folder)["status"] == "stopped"


def test_a_held_out_loss_before_training_is_listed(tmp_path, capsys):
    folder = make_run(tmp_path / "run", 2, 4)
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 4.2529, "wall_seconds": 61}\n', encoding="utf-8")
    runs.print_runs([runs.described(folder)])
    assert "4.2529 → –" in (out := capsys.readouterr().out) and "1 min 01 s" in out


def test_a_sparkline_fills_its_box():
    spots = sparkline([(float(step), 5.0 - step / 10) for step in range(1, 31)] + [(31.0, None)])
    assert spots[0] == (1.0, 1.0) and spots[-1] == (WIDTH - 1, HEIGHT - 1)
    assert sparkline([(1.0, 2.0)]) == [] and {y for _, y in sparkline([(1.0, 2.0), (2.0, 2.0)])} == {HEIGHT - 1.0}


def test_the_command_writes_the_index(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs" / "a", 2, 4)

    def listed(*arguments):
        monkeypatch.setattr("sys.argv", ["jlora runs", str(tmp_path / "runs"), *arguments])
        with pytest.raises(SystemExit) as ended:
            jlora.runs.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    page = tmp_path / "index.html"
    assert listed("--html", str(page)).strip() == str(page) and "Runs" in Page(page.read_text(encoding="utf-8")).text
    page.unlink()
    assert json.loads(listed("--html", str(page), "--json"))[0]["steps"] == 40 and page.is_file()
