"""`jlora reproduce`: an adapter comes out equal to the byte, or it is told where, and why, it parted."""

import json
import shutil

import pytest
from command_line import one_sentence
from safetensors.numpy import load_file

WEIGHTS = "adapter_model.safetensors"


def facts_of(folder):
    return json.loads((folder / "provenance.json").read_text())


def test_finished_run(world, here, tmp_path):
    code, out, err = here("reproduce", world / "run", "--out", tmp_path / "again")
    assert code == 0 and "equal to" in out and "byte for byte, after 4 steps" in out and " here and was " not in err
    assert (tmp_path / "again" / "adapter" / WEIGHTS).read_bytes() == (world / "run" / "adapter" / WEIGHTS).read_bytes()
    # Made again from the copy, too; and the same command finds it done.
    again = tmp_path / "again"
    assert facts_of(again / "adapter")["adapter"] == facts_of(world / "run" / "adapter")["adapter"]
    code, out, _ = here("reproduce", world / "run", "--out", again, "--json", "-q")
    assert code == 0 and json.loads(out)["equal"] is True


def test_export_of_a_step_on_the_way_from_a_folder_alone(world, here, tmp_path):
    """A folder that was carried elsewhere, of a checkpoint before the last, with the base moved."""
    carried, moved = tmp_path / "carried", tmp_path / "moved"
    assert here("export", "--adapter", world / "run", "--out", carried, "--step", "2", "-q")[0] == 0
    assert facts_of(carried)["step"] == 2 and len(facts_of(carried)["losses"]) == 2
    shutil.copytree(world / "base", moved)
    code, out, err = here("reproduce", carried, "--out", tmp_path / "again", f"model.path={moved}", "--json", "-q")
    found = json.loads(out)
    assert (code, err, found["equal"], found["step"]) == (0, "", True, 2)
    assert load_file(f"{found['made']}/{WEIGHTS}").keys() == load_file(carried / WEIGHTS).keys()


@pytest.mark.long
def test_other_rows_base_or_tokenizer_are_told_before_training(world, here, tmp_path):
    lines = (world / "rows.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(lines[3])
    row["output"] += "!"
    (tmp_path / "rows.jsonl").write_text("".join([*lines[:3], json.dumps(row) + "\n", *lines[4:]]))
    reproduce = ("reproduce", world / "run", "--out", tmp_path / "again")
    code, _, err = here(*reproduce, f"data.train={tmp_path / 'rows.jsonl'}")
    assert code == 3 and not (tmp_path / "again").exists()
    assert "rows.jsonl: the rows are not what" in one_sentence(err) and "name those of then by key=value" in err
    code, _, err = here(*reproduce, f"data.eval={tmp_path / 'rows.jsonl'}")
    assert code == 3 and "the held-out rows are not what" in one_sentence(err)
    shutil.copytree(world / "base", tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, _, err = here(*reproduce, f"model.path={tmp_path / 'other'}")
    assert code == 4 and "the base is not what" in one_sentence(err)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("override", ["optimizer.learning_rate=0.5", "training.max_steps=3", "lora.rank=2"])
def test_what_changes_the_training_is_refused(world, here, tmp_path, override):
    code, _, err = here("reproduce", world / "run", "--out", tmp_path / "again", override)
    assert code == 2 and "changes what is trained" in one_sentence(err) and override.split("=")[0] in err


def test_not_into_the_run_itself(world, here):
    for out in (world / "run", world / "run" / "adapter"):
        code, _, err = here("reproduce", world / "run", "--out", out)
        assert code == 2 and "is where the adapter lies" in one_sentence(err)


def carried(world, folder, **changes):
    """A copy of the adapter alone, whose provenance is changed."""
    shutil.copytree(world / "run" / "adapter", folder)
    facts = facts_of(folder)
    facts |= {key: change(facts[key]) for key, change in changes.items()}
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.long
def test_parted(world, here, tmp_path):
    """An adapter of another seed, as if it were this one's: from which step on the losses differ, and by how much."""
    folder = carried(
        world,
        tmp_path / "carried",
        config=lambda config: config | {"training": config["training"] | {"seed": 5}},
        versions=lambda versions: versions | {"jaxlib": "0.1"},
    )
    code, out, err = here("reproduce", folder, "--out", tmp_path / "again", "--json")
    found = json.loads(out)
    assert code == 4 and found["equal"] is False and found["parted_at_step"] == 1 and found["largest_difference"] > 0
    assert "warning: jaxlib is " in err and " here and was 0.1" in err
    assert "from step 1 on; what is not as it was: jaxlib 0.1 -> " in one_sentence(err)


def test_not_one_config(world, here, tmp_path):
    changed = [{"step": 2, "changes": {"config.optimizer.learning_rate": [1, 2]}}]
    folder = carried(world, tmp_path / "a", history=lambda _: changed)
    code, _, err = here("reproduce", folder, "--out", tmp_path / "again")
    assert code == 4 and "changed on the way (at step 2: config.optimizer.learning_rate)" in one_sentence(err)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}', '{"format": 1}'])
def test_broken_provenance(world, here, tmp_path, text):
    folder = carried(world, tmp_path / "a")
    (folder / "provenance.json").write_text(text)
    code, _, err = here("reproduce", folder, "--out", tmp_path / "again")
    assert code == 4 and "provenance.json: cannot be read" in one_sentence(err)
    (folder / "provenance.json").unlink()
    code, _, err = here("reproduce", folder, "--out", tmp_path / "again")
    assert code == 4 and "has no provenance.json" in one_sentence(err)
