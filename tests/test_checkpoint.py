"""Checkpoints: bitwise round trips, which ones are kept, and what a damaged one says."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.checkpoint import Checkpoints, flatten
from jlora.errors import ModelError
from jlora.identity import FREE_KEYS, check_identity, flatten_config
from jlora.step import TrainState

IDENTITY = {"config": {"lora.rank": 4}, "hashes": {"base": "abc", "eval": None}}


def make_state(seed=0, rank=4):
    """A state with everything that is awkward to write: tiny dtypes, odd bits, empty parts."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(3, 8, rank)).astype(np.float32)
    a[0, 0, :4] = [np.nan, np.inf, -0.0, 1e-45]
    trained = {"adapter": {"q_proj": {"lora_a": jnp.asarray(a), "lora_b": jnp.zeros((3, rank, 2, 4))}}, "base": None}
    moments = (jax.tree.map(lambda x: x * 2, trained), jnp.asarray(7, jnp.int32), ())
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.asarray(5, jnp.int32), jnp.zeros((), jnp.int32), trained, moments, key)


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
    assert_bitwise(restored.state, state)
    assert isinstance(restored.state, TrainState) and restored.step == 5
    assert restored.data == {"next": [1, "two"]} and restored.identity == IDENTITY == again.identity(5)
    again.close()


def test_names_do_not_depend_on_classes():
    names = list(flatten(make_state()))
    assert names[:4] == [
        "step", "skipped", "trained/adapter/q_proj/lora_a", "trained/adapter/q_proj/lora_b"
    ]  # fmt: skip
    assert len(set(names)) == len(names)


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
        assert_bitwise(checkpoints.restore(step, make_state()).state, make_state(seed=step))
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


def test_half_written_checkpoint_is_not_seen(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 4)
    checkpoints.close()
    shutil.copytree(tmp_path / "4", tmp_path / "8.orbax-checkpoint-tmp-1700000000000000")
    (tmp_path / "notes.txt").write_text("a stray file", encoding="utf-8")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [4]
    save(checkpoints, 8, seed=8)
    checkpoints.wait()
    assert_bitwise(checkpoints.restore(8, make_state()).state, make_state(seed=8))
    checkpoints.close()


def damage_nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_arrays(folder):
    for file in (folder / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_position(folder):
    (folder / "data" / "metadata").write_text("{", encoding="utf-8")


def damage_item(folder):
    shutil.rmtree(folder / "identity")


@pytest.mark.parametrize("damage", [damage_nothing, damage_arrays, damage_position, damage_item])
def test_damaged_checkpoint_is_named_and_can_be_deleted(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 4)
    save(checkpoints, 8)
    checkpoints.close()
    damage(tmp_path / "8")
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(ModelError, match=r"/8: the checkpoint can not be restored .* delete this") as error:
        checkpoints.identity(8)
        checkpoints.restore(8, make_state())
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
    checkpoints.close()
    shutil.rmtree(tmp_path / "8")
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.steps() == [4]
    assert_bitwise(checkpoints.restore(4, make_state(seed=1)).state, make_state())
    checkpoints.close()


def test_another_shape_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 4)
    checkpoints.wait()
    with pytest.raises(ModelError, match="/4: the checkpoint can not be restored"):
        checkpoints.restore(4, make_state(rank=8))
    other = make_state()
    other.trained["adapter"]["k_proj"] = other.trained["adapter"].pop("q_proj")
    with pytest.raises(ModelError, match="/4: the checkpoint can not be restored"):
        checkpoints.restore(4, other)
    checkpoints.close()


def test_identity_names_every_difference(tmp_path):
    check_identity(tmp_path, IDENTITY, json.loads(json.dumps(IDENTITY)))
    other = {"config": {"lora.rank": 8, "new.key": 1}, "hashes": {"base": "abc", "eval": "def"}}
    with pytest.raises(ModelError) as error:
        check_identity(tmp_path, IDENTITY, other)
    message = str(error.value)
    assert str(tmp_path) in message and "config.lora.rank: 4 -> 8" in message
    assert "config.new.key: None -> 1" in message and "hashes.eval: None -> 'def'" in message
    assert "hashes.base" not in message


def test_free_keys_are_keys_of_the_config():
    from jlora.config import Config

    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "output_dir": "o"}
    assert FREE_KEYS <= flatten_config(Config.model_validate(tree).model_dump()).keys()
