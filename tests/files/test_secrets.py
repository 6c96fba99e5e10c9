"""Secrets are in nothing that is written or said.

The numbers are those of the fault cases in docs/reliability.md.
"""

import sys

import pytest
from command_line import sentence_of
from tiny import make_completions, write_config

import jlora.train
from jlora import cli
from jlora.config import load_config
from jlora.errors import ConfigError, ModelError
from jlora.files.text import HIDDEN, find_secret, redact

SECRETS = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted01",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret",
    "DATABASE_PASSWORD": "planted-password",
}


@pytest.mark.long
def test_case_30_secrets_of_the_environment_are_in_nothing_that_a_run_writes(
    smallest_base, tmp_path, monkeypatch, capfd
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    data = {"format": "completion", "max_length": 32}
    rows = make_completions(tmp_path / "rows.jsonl", 8)
    config = write_config(
        tmp_path / "run.yaml", smallest_base, rows, tmp_path / "run", data=data, training={"max_steps": 1}
    )
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(config), "data.eval=0.2", "--json"])
    with pytest.raises(SystemExit) as ended:
        jlora.train.main()
    assert ended.value.code == 0
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"config.yaml", "summary.json", "metrics.jsonl", "report.html"} <= {path.name for path in written}
    out, err = capfd.readouterr()
    for value in SECRETS.values():
        assert value not in out + err
        assert not [path for path, content in written.items() if value.encode() in content]


@pytest.mark.parametrize(
    "value",
    [
        "https://user:planted-pass@host/rows.jsonl",
        "https://host/rows.jsonl?x=1&X-Amz-Signature=planted",
        "https://host/rows.jsonl?token=planted",
        "hf_abcdefghijklmnopqrstuvwxyz0123",
        f"s3://{SECRETS['AWS_SECRET_ACCESS_KEY']}/rows",
    ],
)
@pytest.mark.parametrize("key", ["data.train", "data.eval", "model.path", "output_dir", "training.wandb"])
def test_case_30_config_that_holds_a_secret_is_refused_without_telling_it(
    smallest_base, tmp_path, monkeypatch, key, value
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS_SECRET_ACCESS_KEY"])
    config = write_config(tmp_path / "run.yaml", smallest_base, tmp_path / "rows.jsonl", tmp_path / "run")
    message = sentence_of(ConfigError, load_config, config, [f"{key}={value}"])
    assert message.split(": ")[1] == key and "which would be written to config.yaml" in message
    assert "planted" not in message and "hf_abc" not in message


def test_case_30_errors_are_told_without_secrets(monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])

    def body():
        raise ModelError(f"https://me:planted@hub/x?sig=planted has no answer to {SECRETS['HF_TOKEN']}")

    with pytest.raises(SystemExit):
        cli.run(body)
    err = capfd.readouterr().err
    assert err == f"error: https://{HIDDEN}@hub/x?{HIDDEN} has no answer to {HIDDEN}\n"


@pytest.mark.parametrize(
    "text",
    [
        "runs/mine", "meta-llama/Llama-2-7b-hf", "/data/hf_token_stats/rows.jsonl", "a@b", "user@host:rows.jsonl",
        "https://host/a@b", "rows?tokens=3", "sk-1b",
    ],
)  # fmt: skip
def test_case_30_what_is_no_secret(text, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "a")  # too short to be told from other text
    assert find_secret(text) is None and redact(text) == text


SHAPES = [
    "github_" + "pat_" + "a1" * 20,
    "glp" + "at-" + "a1b2c3d4" * 3,
    "xo" + "xb-" + "1234567890-" * 2 + "abc",
    "AI" + "za" + "Sy" * 16 + "abc",
    "AS" + "IA" + "ABCDEFGH12345678",
    "ey" + "JhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + "abcdef123",
    "https://bucket/x?X-Goog-Credential=abcdefgh&a=1",
]
NAMES = ["OPENAI_KEY", "DB_PASS", "MYSQL_PWD", "GITHUB_PAT", "AWS_ACCESS_KEY_ID", "DOCKER_AUTH", "CREDENTIALS"]
NAMES += ["AZURE_STORAGE_CONNECTION_STRING"]


@pytest.mark.parametrize("text", SHAPES, ids=lambda text: text[:4])
def test_tokens_of_other_services_are_known(text):
    assert find_secret(text) is not None and "[secret]" in redact(f"a {text} b")


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_calls_a_secret_by_many_names(name, monkeypatch):
    monkeypatch.setenv(name, "correct-horse-battery")
    assert name in (find_secret("db://u:correct-horse-battery") or "")


@pytest.mark.parametrize("text", ["runs/2026-11-28", "meta-llama/Llama-2-7b-hf", "eyJ", "AIza", "sk-learn"])
def test_what_looks_alike_is_none(text):
    assert find_secret(text) is None
