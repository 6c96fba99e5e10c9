"""Checkpoints: bitwise round trips, which ones are kept, what is cleaned, and what a damaged one says."""

import errno
import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.config.sections import dotted
from jlora.errors import ConfigError, ModelError
from jlora.files import manifest
from jlora.training.checkpoint import Checkpoints, flatten
from jlora.training.identity import FIXED_KEYS, FREE_KEYS, check_identity
from jlora.training.step import TrainState

IDENTITY = {"config": {"lora.alpha": 4}, "hashes": {"base": "abc", "eval": None}}


def make_state(seed=0, rank=4):
    """A state with everything that is awkward to write: tiny dtypes, odd bits, empty parts."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(3, 8, rank)).astype(np.float32)
    a[0, 0, :4] = [np.nan, np.inf, -0.0, 1e-45]
    trained = {"adapter": {"q_proj": {"lora_a": jnp.asarray(a), "lora_b": jnp.zeros((3, rank, 2, 4))}}, "base": None}
    moments = (jax.tree.map(lambda x: x * 2, trained), jnp.asarray(7, jnp.int32), ())
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(
        jnp.asarray(5, jnp.int32),
        jnp.zeros((), jnp.int32),
        trained,
        moments,
        key,
        jnp.asarray(4),
        jnp.full(32, jnp.nan),
    )


def assert_bitwise(a, b):
    a, b = flatten(a), flatten(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


def save(checkpoints, step, eval_loss=None, seed=0):
    checkpoints.save(step, make_state(seed), {"next": step}, IDENTITY, eval_loss)


def snapshot(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_round_trip_is_bitwise(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(5, state, {"next": [1, "two"]}, IDENTITY, None)
    checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", keep=2)
    assert again.steps() == [5]
    restored = again.restore(5, make_state(seed=1))
    assert_bitwise(restored, state)
    assert isinstance(restored, TrainState) and restored.step == state.step
    assert again.position(5) == {"next": [1, "two"]} and again.identity(5) == IDENTITY
    again.close()


def test_names_do_not_depend_on_classes():
    names = list(flatten(make_state()))
    assert names[:4] == [
        "step", "skipped", "trained/adapter/q_proj/lora_a", "trained/adapter/q_proj/lora_b"
    ]  # fmt: skip
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints 4 and 8; to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, 4)
    save(checkpoints, 8, seed=8)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(two, tmp_path):
    """A copy of it, with other modules' run folder around it."""
    return shutil.copytree(two, tmp_path / "run" / "checkpoints")


@pytest.mark.long
@pytest.mark.parametrize("reopened", [False, True], ids=["one process", "resumed each time"])
@pytest.mark.parametrize(
    "losses, kept",
    [
        ([None] * 6, [5, 6]),
        ([3.0, 1.0, 2.0, 4.0, 5.0, 6.0], [2, 5, 6]),
        ([3.0, None, 2.0, None, None, None], [3, 5, 6]),
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [5, 6]),
    ],
    ids=["never evaluated", "early best", "evaluated now and then", "always better"],
)
def test_newest_and_best_are_kept(tmp_path, losses, kept, reopened):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, loss in enumerate(losses, 1):
        save(checkpoints, step, loss)
        if reopened:
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.wait()
    assert checkpoints.steps() == kept
    checkpoints.close()
    assert sorted(int(folder.name) for folder in tmp_path.iterdir()) == kept


def test_saves_are_never_left_out(tmp_path):
    """In quick succession too, at any step numbers."""
    checkpoints = Checkpoints(tmp_path, keep=10)
    steps = [1, 2, 3, 5, 8, 1000, 1001]
    for step in steps:
        save(checkpoints, step, seed=step)
    checkpoints.wait()
    assert checkpoints.steps() == steps
    for step in steps:
        assert_bitwise(checkpoints.restore(step, make_state()), make_state(seed=step))
    checkpoints.close()


def test_read_only_writes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        save(checkpoints, step, 1.0 * step)
    checkpoints.close()
    leftover = tmp_path / "c" / "9.orbax-checkpoint-tmp-1"
    leftover.mkdir()
    (leftover / "half").write_text("written", encoding="utf-8")
    before = snapshot(tmp_path)
    reader = Checkpoints(tmp_path / "c", keep=1, read_only=True)
    assert reader.steps() == [1, 2, 3]
    reader.restore(2, make_state())
    reader.identity(1)
    reader.close()
    assert snapshot(tmp_path) == before
    assert leftover.is_dir()

    missing = Checkpoints(tmp_path / "none", keep=1, read_only=True)
    assert missing.steps() == []
    missing.close()
    assert not (tmp_path / "none").exists()


def test_debris_of_a_killed_save_is_cleaned(copy):
    """Cut short before Orbax's commit, before ours, or while it was deleted."""
    for name in ("12.saving.orbax-checkpoint-tmp", "12.saving", "0.deleting", "8.orbax-checkpoint-tmp-1700000000"):
        shutil.copytree(copy / "4", copy / name)
    (copy / "12.saving" / manifest.NAME).unlink()
    (copy / "notes.txt").write_text("a stray file", encoding="utf-8")
    for name in ("8.saving.mine", "before.deleting"):  # the user's own
        shutil.copytree(copy / "4", copy / name)
    checkpoints = Checkpoints(copy, keep=2)
    assert sorted(path.name for path in copy.iterdir()) == ["4", "8", "8.saving.mine", "before.deleting", "notes.txt"]
    assert checkpoints.steps() == [4, 8] and checkpoints.newest_whole() == 8
    save(checkpoints, 12, seed=12)
    checkpoints.wait()
    assert_bitwise(checkpoints.restore(12, make_state()), make_state(seed=12))
    checkpoints.close()


def test_the_manifest_names_every_file(two):
    text = json.loads((two / "8" / manifest.NAME).read_text(encoding="utf-8"))
    files = {str(f.relative_to(two / "8")): f for f in (two / "8").rglob("*") if f.is_file()}
    assert text["content"]["files"].keys() == files.keys() - {manifest.NAME}
    for name, entry in text["content"]["files"].items():
        assert entry["bytes"] == files[name].stat().st_size
    assert manifest.read(two / "8") == {"step": 8, "eval_loss": None}


def damages(folder):
    """Every file of a checkpoint, each with every kind of harm: (name, file, content before)."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            before = file.read_bytes()
            for name in ("flipped", "cut", "longer", "emptied", "missing"):
                if before or name in ("longer", "missing"):
                    yield name, file, before


def test_every_damage_of_every_file_is_noticed(copy):
    """No file of a checkpoint can change by a bit or a byte, and the one before it is taken."""
    rng = np.random.default_rng(0)
    reader = Checkpoints(copy, keep=2, read_only=True)
    count = 0
    for name, file, before in damages(copy / "8"):
        match name:
            case "flipped":
                bits = rng.integers(8 * len(before), size=5)
                contents = [bytearray(before) for _ in bits]
                for content, bit in zip(contents, bits, strict=True):
                    content[bit // 8] ^= 1 << bit % 8
            case "missing":
                contents = [None]
            case _:
                contents = [{"cut": before[:-1], "longer": before + b"\0", "emptied": b""}[name]]
        for content in contents:
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            assert reader.fault(8) is not None, (name, file)
            count += 1
        assert reader.newest_whole() == 4
        file.write_bytes(before)
    assert reader.fault(8) is None and reader.newest_whole() == 8
    assert count > 100
    reader.close()


def test_a_damaged_checkpoint_goes_to_quarantine_and_the_one_before_is_taken(copy, capsys):
    for again in range(2):
        [array] = [file for file in (copy / "8" / "state").rglob("d/*") if file.stat().st_size > 1000][:1]
        content = bytearray(array.read_bytes())
        content[500] ^= 4
        array.write_bytes(content)
        checkpoints = Checkpoints(copy, keep=2)
        assert checkpoints.newest_whole() == 4
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: ") and f"{copy}/8: the checkpoint is damaged" in line
        assert "SHA-256 differs" in line and "step 4 is taken" in line
        where = copy.parent / "quarantine" / ("8.1" if again else "8")
        assert where.is_dir() and str(where) in line
        assert_bitwise(checkpoints.restore(4, make_state(seed=1)), make_state())
        save(checkpoints, 8, seed=8)
        checkpoints.close()
        assert checkpoints.steps() == [4, 8]


def test_one_whose_manifest_is_not_its_own_is_damaged(copy):
    shutil.copytree(copy / "4", copy / "16")
    reader = Checkpoints(copy, keep=2, read_only=True)
    assert reader.fault(16) == "it is that of step 4" and reader.newest_whole() == 8
    (copy / "8" / manifest.NAME).unlink()
    assert reader.fault(8) == f"{manifest.NAME} is missing" and reader.newest_whole() == 4
    os.mkfifo(copy / "8" / manifest.NAME)  # reading it would wait for ever
    assert reader.fault(8) == f"{manifest.NAME} is damaged"
    reader.close()


@pytest.mark.parametrize("facts", [{}, {"step": "8"}, {"step": 8, "eval_loss": "low"}, {"eval_loss": [1.0]}])
def test_facts_of_another_kind_are_not_believed(copy, facts):
    """Under a manifest that is right to the bit."""
    manifest.write(copy / "4", {"step": 4, "eval_loss": 2.5})
    manifest.write(copy / "8", facts)
    reader = Checkpoints(copy, keep=2, read_only=True)
    assert reader.newest_whole() == (8 if facts.get("step") == 8 else 4) and reader.best() == 4
    reader.close()


def test_none_whole_is_refused_and_nothing_moves(copy):
    (copy / "4" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(copy / "8")
    (copy / "8").mkdir()
    before = snapshot(copy.parent)
    for _ in range(2):
        checkpoints = Checkpoints(copy, keep=2)
        with pytest.raises(
            ModelError, match=r"no checkpoint is whole \(8: manifest.json is missing; 4: _CHECK"
        ) as error:
            checkpoints.newest_whole()
        assert error.value.exit_code == 4 and "\n" not in str(error.value)
        checkpoints.close()
    assert snapshot(copy.parent) == before
    shutil.rmtree(copy)
    checkpoints = Checkpoints(copy, keep=2)
    assert checkpoints.newest_whole() == 0
    checkpoints.close()


def test_old_ones_stay_until_the_new_one_is_verified(copy, monkeypatch):
    """A disk that gives back something else than was written: the save fails, and nothing was deleted for it."""
    before = snapshot(copy)
    digest = manifest._digest
    monkeypatch.setattr(manifest, "_digest", lambda path, cached=True: digest(path) if cached else "0" * 64)
    checkpoints = Checkpoints(copy, keep=1)
    save(checkpoints, 12)
    with pytest.raises(
        ConfigError, match=r"/12: the checkpoint could not be saved .* reading it back.*checkpoint 8 stay"
    ):
        checkpoints.wait()
    assert snapshot(copy) == before and (copy.parent / "quarantine" / "12").is_dir()
    monkeypatch.undo()
    save(checkpoints, 12)
    checkpoints.close()
    assert checkpoints.steps() == [12]


def full(*args, **kwargs):
    """Instead of Orbax's last act, of our manifest, or of what follows our commit."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("where", ["finalize", "write", "sync_folder"])
def test_a_failed_background_save_surfaces_at_the_next_step(copy, monkeypatch, where):
    """Disk full while it is written: one sentence, exit code 2, and what was there is whole."""
    checkpoints = Checkpoints(copy, keep=2)
    owner = {"write": manifest, "sync_folder": manifest, "finalize": checkpoints._checkpointer.handler}[where]
    monkeypatch.setattr(owner, where, full)
    checkpoints.check()
    save(checkpoints, 12)
    saved = checkpoints._pending[1]
    assert isinstance(saved.exception(timeout=60), OSError)
    with pytest.raises(ConfigError) as error:
        checkpoints.check()
    message = str(error.value)
    assert f"{copy}/12: the checkpoint could not be saved (No space left on device); checkpoint 8 stays" in message
    assert error.value.exit_code == 2 and "\n" not in message
    checkpoints.check()
    monkeypatch.undo()
    checkpoints.close()
    again = Checkpoints(copy, keep=2)
    assert again.newest_whole() == (12 if where == "sync_folder" else 8)
    again.close()


def test_a_save_that_can_not_begin_says_so(copy, monkeypatch):
    checkpoints = Checkpoints(copy, keep=2)
    monkeypatch.setattr(checkpoints._checkpointer, "save", full)
    with pytest.raises(ConfigError, match=r"/12: the checkpoint could not be saved \(No space left on device\)"):
        save(checkpoints, 12)
    monkeypatch.setattr(checkpoints._checkpointer, "save", lambda *args, **kwargs: [].pop())
    with pytest.raises(IndexError):  # a bug of ours stays one
        save(checkpoints, 12)
    monkeypatch.undo()
    checkpoints.close()


def test_room_is_asked_for_before(copy, monkeypatch):
    """Free bytes against what the rest of the run still adds: up to `keep`, the best, and the one being written."""
    state = make_state()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    checkpoints = Checkpoints(copy, keep=2)

    def require(saves, free):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free))
        checkpoints.require_room(state, saves)

    spare = 4 * 2**20
    for saves, more in ((1, 1), (2, 2), (100, 2)):  # two are there already
        require(saves, (more + 1) * size + spare)
        with pytest.raises(ConfigError, match=f"{more} more checkpoints of .* make room"):
            require(saves, (more + 1) * size + spare - 1)
    require(0, 0)
    checkpoints.close()


def test_another_shape_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 4)
    checkpoints.wait()
    refused = "/4: the checkpoint cannot be restored "
    with pytest.raises(ModelError, match=refused + r"\(leaves 'opt_state/.*lora_a': shapes: .* != .*\); delete"):
        checkpoints.restore(4, make_state(rank=8))
    other = make_state()
    other.trained["adapter"]["k_proj"] = other.trained["adapter"].pop("q_proj")
    with pytest.raises(ModelError, match=refused + r"\(it holds no trained/adapter/k_proj/lora_a\); delete"):
        checkpoints.restore(4, other)
    other = make_state()
    other = replace(other, losses=other.losses.astype(jnp.bfloat16))
    with pytest.raises(ModelError, match=refused + r"\(leaves 'losses': types: float32 != bfloat16\); delete"):
        checkpoints.restore(4, other)
    checkpoints.close()


def test_identity_names_every_difference(tmp_path):
    assert check_identity(tmp_path, 4, IDENTITY, json.loads(json.dumps(IDENTITY)), []) == []
    other = {"config": {"lora.alpha": 8, "new.key": 1}, "hashes": {"base": "abc", "eval": "def"}}
    with pytest.raises(ModelError) as error:
        check_identity(tmp_path, 4, IDENTITY, other, [])
    message = str(error.value)
    assert str(tmp_path) in message and "config.lora.alpha: 4 -> 8" in message
    assert "config.new.key: None -> 1" in message and "hashes.eval: None -> 'def'" in message
    assert "hashes.base" not in message and "resume.allow_changes" in message


def test_allowed_changes_are_recorded_and_others_refused(tmp_path):
    other = {"config": {"lora.alpha": 8}, "hashes": {"base": "abc", "eval": "def"}}
    with pytest.raises(ModelError, match=r"\(hashes.eval: None -> 'def'\)"):
        check_identity(tmp_path, 4, IDENTITY, other, ["config.lora.alpha"])
    history = check_identity(tmp_path, 4, IDENTITY, other, ["hashes.eval", "config.lora.alpha"])
    assert history == [{"step": 4, "changes": {"config.lora.alpha": [4, 8], "hashes.eval": [None, "def"]}}]
    saved = other | {"history": history}
    assert check_identity(tmp_path, 6, saved, other, ["hashes.eval"]) == history
    again = check_identity(tmp_path, 9, saved, IDENTITY, ["hashes.eval", "config.lora.alpha"])
    assert again[0] == history[0] and again[1]["changes"]["config.lora.alpha"] == [8, 4]
    with pytest.raises(ConfigError, match="'config.lora.alpa'; did you mean 'config.lora.alpha'") as error:
        check_identity(tmp_path, 4, IDENTITY, other, ["config.lora.alpa"])
    assert error.value.exit_code == 2


def test_free_keys_are_keys_of_the_config():
    from jlora.config import Config

    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": "o"}
    cfg = Config.model_validate(tree)
    assert FREE_KEYS <= dotted(cfg.model_dump()).keys()
    others = {"method", "model.resize_embeddings", "optimizer.name"}
    assert {*FIXED_KEYS} <= others | {f"lora.{key}" for key in cfg.lora.model_dump()}


def test_a_key_that_came_with_a_newer_version_counts_as_its_default(tmp_path):
    newer = {**IDENTITY, "config": IDENTITY["config"] | {"training.samples": 0, "sweep_halving": False}}
    assert check_identity(tmp_path, 4, IDENTITY, newer, []) == []
    newer["config"]["training.samples"] = 3
    with pytest.raises(ModelError, match="config.training.samples: 0 -> 3"):
        check_identity(tmp_path, 4, IDENTITY, newer, [])


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_for_the_moment_is_not_damaged(copy, number, monkeypatch, capsys):
    """Another user's umask, or a network file system that is away: the next start finds it as it was."""

    def unreadable(path, cached=True):
        raise OSError(number, os.strerror(number), str(path))

    before = snapshot(copy.parent)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_digest", unreadable)
        with pytest.raises(ConfigError, match="nothing was moved") as refused:
            Checkpoints(copy, keep=3).newest_whole()
    assert os.strerror(number) in str(refused.value) and "damaged" not in capsys.readouterr().err
    assert snapshot(copy.parent) == before
    assert Checkpoints(copy, keep=3).newest_whole() == max(int(path.name) for path in copy.iterdir())


def test_a_damaged_checkpoint_leaves_a_file_system_of_its_own(copy, monkeypatch, capsys):
    """`checkpoints` may be a mounted disk, and nothing is renamed across two file systems."""
    newest = max(int(path.name) for path in copy.iterdir())
    (copy / str(newest) / "manifest.json").write_text("no manifest", encoding="utf-8")

    def across(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source)

    monkeypatch.setattr(os, "rename", across)
    assert 0 < Checkpoints(copy, keep=3).newest_whole() < newest
    assert "moved to" in capsys.readouterr().err
    assert (copy.parent / "quarantine" / str(newest) / "manifest.json").is_file() and not (copy / str(newest)).exists()


@pytest.mark.parametrize("name", ["config.lora.rank", "config.optimizer.name", "config.lora.rank_pattern.q_proj"])
def test_what_shapes_the_trained_leaves_is_never_allowed_to_change(tmp_path, name):
    saved = {"config": {name.removeprefix("config."): 4}, "hashes": {}}
    now = {"config": {name.removeprefix("config."): 8}, "hashes": {}}
    with pytest.raises(ConfigError, match=f"{name}'.*lora.init_from"):
        check_identity(tmp_path, 3, saved, now, [name])
    with pytest.raises(ModelError, match="4 -> 8"):
        check_identity(tmp_path, 3, saved, now, [])


def test_another_adapter_to_start_from_is_another_run(tmp_path):
    """Its tensors are the reference of an objective on pairs, and no part of the checkpoint."""
    saved, now = ({"config": {}, "hashes": {"base": "b", "init_from": digest}} for digest in ("one", "two"))
    with pytest.raises(ModelError, match="hashes.init_from: 'one' -> 'two'"):
        check_identity(tmp_path, 3, saved, now, [])
    older = {"config": {}, "hashes": {"base": "b"}}  # of a version that did not know
    assert check_identity(tmp_path, 3, older, now, []) == []
