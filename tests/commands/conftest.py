"""A finished run, which the tests of commands share."""

import pytest
from command_line import shell
from tiny import make_llama, make_rows, make_tokenizer, write_config


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a base, rows, a config, and a finished run of it with what it printed; not to be written to."""
    folder = tmp_path_factory.mktemp("world")
    make_llama(folder / "base", max_position_embeddings=512)
    make_tokenizer(folder / "base")
    make_rows(folder / "rows.jsonl")
    make_rows(folder / "eval.jsonl", 6, first=100)
    write_config(
        folder / "config.yaml",
        folder / "base",
        folder / "rows.jsonl",
        folder / "run",
        data={"max_length": 320, "eval": str(folder / "eval.jsonl")},
        training={"save_every": 2, "eval_every": 2, "samples": 2},
    )
    done = shell("train", "--config", folder / "config.yaml", "-q", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    (folder / "stderr").write_text(done.stderr, encoding="utf-8")
    return folder
