"""A run folder from others, and what lies beside it: jlora writes and deletes what is its own, and nothing else."""

import errno
import importlib
import json
import os
import shutil
import sys

import pytest
from command_line import sentence_of
from safetensors.numpy import load_file
from tiny import make_completions, make_llama, make_tokenizer, write_config

import jlora.training.run
from jlora.config import load_config
from jlora.errors import ConfigError, ModelError
from jlora.files.paths import RUN_FILES, RUN_FOLDERS, short_names
from jlora.hf import verify
from jlora.hf.adapters import find_adapter, run_config
from jlora.reports.run import write_report
from jlora.training.metrics import MetricsLog
from jlora.training.run import train
from jlora.training.summary import seconds_before
from jlora.training.sweep import train_together
from jlora.training.trackers import open_trackers

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a config and the finished run of it, `run`; to be copied."""
    folder = tmp_path_factory.mktemp("world")
    make_llama(folder / "base", hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder / "base")
    rows = make_completions(folder / "rows.jsonl", 8)
    data, training = {"format": "completion", "max_length": 32}, {"max_steps": 2, "save_every": 1}
    config = write_config(folder / "c.yaml", folder / "base", rows, folder / "run", data=data, training=training)
    train(load_config(config), quiet=True)
    return folder


@pytest.fixture
def run_dir(world, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(world / "run", tmp_path / "run")


@pytest.fixture
def command(monkeypatch, capfd):
    """A command in this process: (exit code, stderr)."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"jlora.{name}", *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(f"jlora.{name}").main()
        return ended.value.code, capfd.readouterr().err

    return run


def config_of(world, run_dir):
    return load_config(world / "c.yaml", [f"output_dir={run_dir}"])


def snapshot(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def earlier(path):
    """A folder that the user keeps."""
    path.mkdir()
    (path / "mine").write_text("precious", encoding="utf-8")


@pytest.mark.parametrize("more", [[], ["--merge"]], ids=["adapter", "merged"])
def test_an_export_leaves_what_lies_beside_it(run_dir, tmp_path, command, more):
    (tmp_path / "m").mkdir()
    for name in ("m.old", "m.partial"):
        earlier(tmp_path / name)
    code, err = command("export", "--adapter", run_dir, "--out", tmp_path / "m", "-q", *more)
    assert code == 0, err
    for name in ("m.old", "m.partial"):
        assert (tmp_path / name / "mine").read_text(encoding="utf-8") == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.old", "m.partial", "run"]
    assert any((tmp_path / "m").glob("*.safetensors"))


def test_two_exports_into_one_folder(run_dir, tmp_path, command, monkeypatch):
    """The first to be done has it; the other is refused, and takes with it what it wrote."""
    equal = verify.require_equal

    def other_is_faster(*args, **kwargs):
        if not (tmp_path / "m").exists():
            earlier(tmp_path / "m")
        return equal(*args, **kwargs)

    monkeypatch.setattr(verify, "require_equal", other_is_faster)
    code, err = command("export", "--adapter", run_dir, "--out", tmp_path / "m", "--merge", "-q")
    assert code == 2 and err.startswith(f"error: {tmp_path}/m: something is there by now") and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "run"]


def test_an_export_on_a_full_disk_leaves_nothing(run_dir, tmp_path, command, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("jlora.hf.peft.serialize", full)
    code, err = command("export", "--adapter", run_dir, "--out", tmp_path / "m", "-q")
    assert code == 2 and err.startswith(f"error: {tmp_path}/m: No space left on device; make room"), err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def unfinished(run_dir):
    """As if the run had died before it wrote its summary."""
    path = run_dir / "summary.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"finished"', '"failed"'), encoding="utf-8")


def test_an_adapter_written_anew_leaves_the_users_copies(world, run_dir, capsys):
    for name in ("adapter.old", "adapter.partial", "adapter.mine"):
        shutil.copytree(run_dir / "adapter", run_dir / name)
        (run_dir / name / "NOTES").write_text("mine", encoding="utf-8")
    (run_dir / "adapter" / "CARD.md").write_text("mine, too", encoding="utf-8")
    before = snapshot(run_dir)
    unfinished(run_dir)
    assert train(config_of(world, run_dir), quiet=True)["status"] == "finished"
    after = snapshot(run_dir)
    [kept] = run_dir.glob("adapter.before-*")
    assert (kept / "CARD.md").read_text(encoding="utf-8") == "mine, too" and str(kept) in capsys.readouterr().err
    for name in before:
        if "/adapter." in name:
            assert after[name] == before[name]
    assert sorted(path.name for path in (run_dir / "adapter").iterdir()) == [
        "adapter_config.json",
        WEIGHTS,
        "provenance.json",
    ]
    unfinished(run_dir)
    train(config_of(world, run_dir), quiet=True)  # of what jlora alone wrote nothing is kept
    assert list(run_dir.glob("adapter.before-*")) == [kept]


def test_an_adapter_that_fails_its_proof_leaves_the_one_before(world, run_dir, monkeypatch):
    unfinished(run_dir)
    before = load_file(run_dir / "adapter" / WEIGHTS)

    def wrong(*_, **__):
        raise ModelError("logits differ")

    monkeypatch.setattr(verify, "require_equal", wrong)
    with pytest.raises(ModelError):
        train(config_of(world, run_dir), quiet=True)
    assert load_file(run_dir / "adapter" / WEIGHTS).keys() == before.keys()
    assert not list(run_dir.glob(".adapter*"))


# A run folder from others


def plant(path, kind, victim):
    """A link to a file or folder of the user's, or a pipe, which opening would wait for."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(victim)


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", [*RUN_FILES, *RUN_FOLDERS])
def test_a_link_or_pipe_in_a_run_folder_is_refused(world, run_dir, tmp_path, command, name, kind):
    victim = tmp_path / "victim"
    if name in RUN_FOLDERS:
        earlier(victim)
    else:
        victim.write_text("precious", encoding="utf-8")
    plant(run_dir / name, kind, victim)
    before = snapshot(tmp_path) if kind == "link" else {}
    words = f"{run_dir / name}: is a link to {victim}" if kind == "link" else f"{run_dir / name}: is not a "
    with pytest.raises(ConfigError) as refused:
        train(config_of(world, run_dir), quiet=True)
    assert str(refused.value).startswith(words)
    code, err = command("report", run_dir)
    assert code == 2 and err.startswith(f"error: {words}")
    if (run_dir / "config.yaml").is_file():
        code, err = command("export", "--adapter", run_dir, "--out", tmp_path / "m")
        assert code == 4 and err.startswith(f"error: {words}")
        with pytest.raises(ModelError, match="link|is not a "):
            run_config(run_dir)
    with pytest.raises(ModelError, match="link|is not a "):
        find_adapter(str(run_dir))
    assert kind == "pipe" or snapshot(tmp_path) == before


def test_a_link_among_the_checkpoints_is_refused(world, run_dir, tmp_path):
    earlier(tmp_path / "victim")
    (run_dir / "checkpoints" / "3.deleting").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match="checkpoints/3.deleting: is a link"):
        train(config_of(world, run_dir), quiet=True)
    assert (tmp_path / "victim" / "mine").is_file()


def test_a_link_for_the_folder_of_a_sweeps_run_is_refused(world, tmp_path):
    earlier(tmp_path / "victim")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "victim")
    config = tmp_path / "sweep.yaml"
    text = (world / "c.yaml").read_text(encoding="utf-8")
    config.write_text(text + "\nsweep: [{name: a, optimizer.learning_rate: 1.0e-3}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="out/a: is a link"):
        train_together(load_config(config, [f"output_dir={tmp_path / 'out'}"]), quiet=True)
    assert os.listdir(tmp_path / "victim") == ["mine"]


def test_links_at_names_of_old_temporaries_are_not_followed(world, tmp_path):
    run_dir, victim = tmp_path / "run", tmp_path / "victim"
    run_dir.mkdir()
    victim.write_text("precious", encoding="utf-8")
    names = [f"{name}.partial" for name in ("metrics", "config.yaml", "summary.json", "samples.json")]
    for name in (*names, f".report.html.{os.getpid()}.tmp"):
        (run_dir / name).symlink_to(victim)
    train(config_of(world, run_dir), quiet=True)
    assert victim.read_text(encoding="utf-8") == "precious"
    for name in ("metrics.jsonl", "config.yaml", "summary.json", "report.html"):
        assert (run_dir / name).is_file() and not (run_dir / name).is_symlink()


def test_a_hard_link_is_not_written_through(world, run_dir, tmp_path):
    """As `cp -al` makes them of a whole run folder."""
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy, copy_function=os.link)
    shutil.rmtree(copy / "checkpoints")  # so the run begins anew
    before = snapshot(run_dir)
    train(load_config(world / "c.yaml", [f"output_dir={copy}", "optimizer.learning_rate=1e-3"]), quiet=True)
    assert snapshot(run_dir) == before
    assert (copy / "metrics.jsonl").read_bytes() != (run_dir / "metrics.jsonl").read_bytes()


def test_the_run_folder_itself_may_be_a_link(world, run_dir, tmp_path):
    run_dir.rename(tmp_path / "disk")
    run_dir.symlink_to("disk")
    unfinished(run_dir)
    assert train(config_of(world, run_dir), quiet=True)["status"] == "finished"
    assert run_dir.is_symlink() and (tmp_path / "disk" / "adapter" / WEIGHTS).is_file()


def test_starts_within_a_second_have_their_own_events(world, tmp_path):
    for _ in range(2):
        log = MetricsLog(tmp_path, 0, open_trackers(config_of(world, tmp_path), tmp_path, 0))
        log.write({"step": 1, "loss": 1.0})
        log.close()
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 2 and all(path.stat().st_size > 0 for path in events)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.0}
    ]


def test_a_page_replaces_a_page_and_nothing_else(run_dir, tmp_path, command):
    out = tmp_path / "page.html"
    for _ in range(2):
        write_report(run_dir, out)
    (tmp_path / "notes.html").write_text("<!DOCTYPE html>\n<p>mine</p>", encoding="utf-8")
    code, err = command("report", run_dir, "--out", tmp_path / "notes.html")
    assert code == 2 and "is not a page that jlora wrote; name another file" in err
    assert (tmp_path / "notes.html").read_text(encoding="utf-8") == "<!DOCTYPE html>\n<p>mine</p>"
    (tmp_path / "link.html").symlink_to(out)
    code, err = command("report", run_dir, "--out", tmp_path / "link.html")
    assert code == 2 and "link.html: cannot be written (is there and is no regular file)" in err


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a", "hub/model", "/data/b/"], ["a", "model", "b"]),
        (["x/a/run", "x/b/run", "x/c"], ["a/run", "b/run", "c"]),
        (["x/a/run", "y/a/run", "a/run", "run"], ["x/a/run", "y/a/run", "a/run", "run"]),
        (["x/run", "x/run"], ["x/run", "x/run"]),
    ],
)
def test_names_are_short_and_none_is_anothers(paths, names):
    assert short_names(paths) == names


@pytest.mark.parametrize("another", [False, True], ids=["removed", "replaced"])
def test_a_run_folder_that_goes_while_it_trains_ends_the_run(world, tmp_path, monkeypatch, another):
    """With one sentence, at the next save; nothing is made there again, nor written into another run's."""
    config = load_config(world / "c.yaml", [f"output_dir={tmp_path}/run", "training.save_every=null"])
    put, batches = jlora.training.run.put_batch, []

    def remove(*args):
        batches.append(args)
        if len(batches) == 2:
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            if another:
                shutil.copytree(world / "run", tmp_path / "run")
        return put(*args)

    monkeypatch.setattr(jlora.training.run, "put_batch", remove)
    message = sentence_of(ConfigError, train, config, quiet=True)
    assert f"output_dir {tmp_path}/run: was removed or replaced" in message
    assert (tmp_path / "run").exists() == another
    if another:
        names = {path.relative_to(world / "run") for path in (world / "run").rglob("*")}
        assert {path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")} == names


def test_seconds_of_earlier_starts_are_counted(tmp_path):
    assert seconds_before(tmp_path, 4) == 0.0
    (tmp_path / "summary.json").write_text('{"wall_seconds": 12.5}')
    assert (seconds_before(tmp_path, 4), seconds_before(tmp_path, 0)) == (12.5, 0.0)
    (tmp_path / "summary.json").write_text('{"wall_seconds": "a"')
    assert seconds_before(tmp_path, 4) == 0.0


DEEP = '{"a":' + "[" * 100_000


@pytest.mark.parametrize("summary", ['{"status": "finished"}', '["finished"]', DEEP, "", '{"adapter": 3'])
def test_a_damaged_summary_is_written_anew(summary, world, run_dir):
    whole = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    (run_dir / "summary.json").write_text(summary, encoding="utf-8")
    found = train(config_of(world, run_dir), quiet=True)
    assert found["status"] == "finished" and found["adapter"] == str(run_dir / "adapter")
    if summary != '{"status": "finished"}':
        assert json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["eval_loss"] == whole["eval_loss"]


def test_a_damaged_line_of_metrics_does_not_keep_a_run_from_going_on(world, run_dir):
    unfinished(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "2")
    with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(DEEP + "\n")
    found = train(config_of(world, run_dir), quiet=True)
    assert (found["status"], found["steps"]) == ("finished", 2)


def test_a_run_is_not_put_into_the_folder_of_its_base(world, tmp_path):
    base = shutil.copytree(world / "base", tmp_path / "base")
    before = snapshot(base)
    cfg = load_config(world / "c.yaml", [f"model.path={base}", f"output_dir={tmp_path}/./base/"])
    assert "is the base's own folder (model.path); set another" in sentence_of(ConfigError, train, cfg, quiet=True)
    assert snapshot(base) == before
