"""YAML that means harm runs nothing and is refused in one sentence.

The numbers are those of the fault cases in docs/reliability.md.
"""

import time
from pathlib import Path

import pytest
import yaml
from command_line import sentence_of
from data_files import write
from tiny import write_config

from jlora.config import Config, config_of, load_config
from jlora.errors import ConfigError, ModelError
from jlora.hf.adapters import run_config

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("!!python/object/apply:os.system ['touch planted']", "could not determine a constructor for the tag"),
        ("model: !!python/name:os.system", "could not determine a constructor for the tag"),
        (LAUGHS, "*a: write the value itself"),
        ("a: &a {<<: [*a, *a]}", "*a: write the value itself"),
        ("[" * 20_000, "nested too deep"),
        ("{a: " * 10_000, "nested too deep"),
        ("- " * 20_000, "nested too deep"),
        ("a: !!int x", "a value that cannot be read"),
        ("a: !!timestamp x", "a value that cannot be read"),
        ("a: " + "7" * 5000, "a value that cannot be read"),
        ("a: " + "x" * 70_000, "more than 64 KiB"),
        ("".join(f"k{i}: 1\n" for i in range(5_000)), "unknown key"),
        ("a: \0", "special characters are not allowed"),
        (b"a: \xff", "invalid start byte"),
        ('output_dir: "a\\0b"\nmodel: {path: a}\ndata: {train: a}', "output_dir: holds a NUL character"),
        ("output_dir: a\nmodel: {path: a, dtype: " + "x" * 9999 + "}\ndata: {train: a}", "model.dtype: should be"),
    ],
)
def test_case_28_hostile_yaml_is_one_sentence_and_nothing_runs(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "run.yaml", content if isinstance(content, bytes) else content.encode())
    began = time.monotonic()
    assert words in sentence_of(ConfigError, load_config, path)
    assert time.monotonic() - began < 10 and not Path("planted").exists()
    # The config that a run folder carries is somebody else's too.
    (tmp_path / "config.yaml").write_bytes(path.read_bytes())
    sentence_of(ModelError, run_config, tmp_path)


def test_resolved_config_of_the_tests_still_loads(smallest_base, tmp_path):
    """The dump that a run writes is read back by the same rules."""
    config = load_config(write_config(tmp_path / "run.yaml", smallest_base, tmp_path / "rows.jsonl", tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(config.dump_yaml())
    assert isinstance(config, Config) and run_config(tmp_path) == config
    assert yaml.safe_load(config.dump_yaml()) == config.model_dump()


@pytest.mark.parametrize("name", ["2e-4", "12e3", "1e5", "0x10", "1_000", "2026-01-01", "on", "null", "1:30", "~"])
def test_name_that_looks_like_another_value_is_read_back(tmp_path, name):
    """A commit of only digits and an `e` is a number to YAML: what a run writes has to say that it is text."""
    config = config_of({"model": {"path": name}, "data": {"train": name}, "output_dir": name}, {})
    path = write(tmp_path / "config.yaml", config.dump_yaml().encode())
    assert load_config(path) == config and run_config(tmp_path) == config
