"""Configs, rows, bases, adapters and runs that are wrong: one sentence, and the exit code of its kind."""

import json
import shutil
import sys

import pytest
from command_line import one_sentence, shell
from shared_data import SHARED, needs_data
from tiny import copy_folder, make_llama, make_tokenizer

from jlora.files import manifest

# Configs and rows

CONFIG_ERRORS = [
    ("lora.rnak=4", ["the command line", "unknown key 'lora.rnak'", "did you mean 'lora.rank'"]),
    ("lora.rank=0", ["the command line", "lora.rank", "greater than 0"]),
    ("training.gradient_accumulation_steps=3", ["batch_size 4", "3 equal parts", "divisor"]),
    ("mesh.data=1009", ["mesh data=1009", "devices"]),
    ("training.wandb=project", ["training.wandb", "pip install wandb"]),
    ("training.comet=project", ["unknown key 'training.comet'"]),
    ("output_dir={world}/rows.jsonl", ["output_dir", "rows.jsonl", "set another"]),
    ("output_dir={world}/rows.jsonl/run", ["output_dir", "rows.jsonl/run", "set another"]),
    ("data.prompt=chat", ["no chat template", "data.chat_template"]),
    ("data.chat_template=none.jinja", ["none.jinja", "llama2, chatml"]),
    ("data.chat_template=chatml", ["<|im_end|>"]),
    ("training.batch_size", ["'training.batch_size'", "dotted.key=value"]),
]
ROW_ERRORS = [
    (b'{"instruction": "a", "output": "b"}\n{"instruction"\n', ["rows.jsonl:2", "malformed JSON"]),
    (b'\n{"instruction": "a", "output": "\xff"}\n', ["rows.jsonl:2", "not valid UTF-8"]),
    (b'{"instruction": "a", "output": ""}\n', ["rows.jsonl:1", '"output" is empty']),
    (b'{"instruction": "a"}\n', ["rows.jsonl:1", '"output" is missing']),
    (b'{"instruction": "' + b"a" * 300 + b'", "output": "b"}\n', ["rows.jsonl:1", "320 tokens"]),
    (b"", ["rows.jsonl", "no usable row"]),
]


@pytest.mark.parametrize(("override", "words"), CONFIG_ERRORS, ids=[override for override, _ in CONFIG_ERRORS])
def test_bad_config(world, here, tmp_path, monkeypatch, override, words):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    code, out, err = here(
        "train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run", override.format(world=world)
    )
    assert (code, out) == (2, "")
    message = one_sentence(err)
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(("content", "words"), ROW_ERRORS, ids=[words[-1] for _, words in ROW_ERRORS])
def test_bad_rows(world, here, tmp_path, command, content, words):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(content)
    arguments = {
        "train": ["--config", world / "config.yaml", f"output_dir={tmp_path}/run", f"data.train={rows}"],
        "evaluate": ["--base", world / "base", "--adapter", world / "run", "--data", rows],
    }[command]
    code, out, err = here(command, *arguments, "-q")
    assert (code, out) == (3, "")
    message = one_sentence(err)
    assert [word for word in words if word not in message] == []


def test_rows_that_are_all_dropped(world, here, tmp_path):
    code, _, err = here(
        *("train", "--config", world / "config.yaml", "-q", f"output_dir={tmp_path}/run"),
        *("data.max_length=16", "data.on_bad_row=skip"),
    )
    message = one_sentence(err)
    assert code == 3 and "all 24 are bad" in message and "rows.jsonl:1" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.train=missing.jsonl", ["missing.jsonl: no such file"]),
        ("data.eval=missing.jsonl", ["missing.jsonl: no such file"]),
        ("data.train=no-such-owner/no-such-data", ["no-such-owner/no-such-data: no such file", "data set"]),
        ("data.train={world}/base", ["base: holds no"]),
        ("data.train={world}/config.yaml", ["config.yaml: files ending in '.yaml'"]),
    ],
)
def test_bad_data_source(world, here, tmp_path, override, words):
    code, _, err = here(
        *("train", "--config", world / "config.yaml", "-q", f"output_dir={tmp_path}/run", override.format(world=world))
    )
    message = one_sentence(err)
    # A folder of a model holds .json files, which are then read as rows.
    assert code == 3 and ([w for w in words if w not in message] == [] or "base/config.json:1" in message)


def damage(world, tmp_path, how):
    """A copy of the base with one thing wrong."""
    base = copy_folder(world / "base", tmp_path / "damaged")
    weights, config = base / "model.safetensors", json.loads((base / "config.json").read_text())
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "missing weights":
        weights.unlink()
    elif how == "missing config":
        (base / "config.json").unlink()
    elif how == "torn config":
        (base / "config.json").write_text("{")
    elif how == "another size":
        (base / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif how == "another architecture":
        (base / "config.json").write_text(json.dumps(config | {"architectures": ["BloomForCausalLM"]}))
    elif how == "torn tokenizer":
        (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text()[:200])
    elif how == "no tokenizer":
        (base / "tokenizer.json").unlink()
    return base


BASE_ERRORS = [
    ("truncated", ["model.safetensors", "cut short or damaged"]),
    ("empty", ["model.safetensors", "cut short or damaged"]),
    ("missing weights", ["no model.safetensors"]),
    ("missing config", ["config.json: missing"]),
    ("torn config", ["config.json: cannot be read as JSON"]),
    ("another size", ["misshapen", "embed_tokens"]),
    ("another architecture", ["BloomForCausalLM", "LlamaForCausalLM"]),
    ("torn tokenizer", ["tokenizer"]),
    ("no tokenizer", ["tokenizer.json", "tokenizer.model"]),
]


@pytest.mark.parametrize(("how", "words"), BASE_ERRORS, ids=[how for how, _ in BASE_ERRORS])
def test_damaged_base(world, here, tmp_path, how, words):
    base = damage(world, tmp_path, how)
    code, out, err = here("generate", "--base", base, "--prompt", "a", "-q")
    assert (code, out) == (4, "")
    message = one_sentence(err)
    assert str(base) in message and [word for word in words if word not in message] == []


def test_damaged_base_as_a_program(world, tmp_path):
    base = damage(world, tmp_path, "truncated")
    done = shell("train", "--config", world / "config.yaml", f"model.path={base}", f"output_dir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (4, "")
    assert "cut short or damaged" in one_sentence(done.stderr)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("/no/such/folder", "no such folder or GGUF file"),
        ("nowhere", "not a hub name"),
        ("no-such-owner/no-such-model", "the hub did not deliver it"),
    ],
)
def test_missing_base(world, here, tmp_path, base, words):
    for arguments in (
        ("generate", "--base", base, "--prompt", "a"),
        ("evaluate", "--base", base, "--data", world / "eval.jsonl"),
        ("train", "--config", world / "config.yaml", f"model.path={base}", f"output_dir={tmp_path}/run"),
    ):
        code, _, err = here(*arguments)
        message = one_sentence(err)
        assert code == 4 and base in message and words in message


def test_tokenizer_of_another_model(world, here, tmp_path):
    """Too large for the embedding, and far too small for it."""
    make_tokenizer(tmp_path / "large", vocab_size=400)
    code, _, err = here("generate", "--base", world / "base", "--tokenizer", tmp_path / "large", "--prompt", "a")
    message = one_sentence(err)
    assert code == 4 and "400 tokens" in message and "300" in message and str(tmp_path / "large") in message
    make_llama(tmp_path / "base", vocab_size=500)
    code, _, err = here(
        *("train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run"),
        *(f"model.path={tmp_path}/base", f"model.tokenizer={world}/base"),
    )
    message = one_sentence(err)
    assert code == 4 and "300 tokens" in message and "500" in message


@needs_data
def test_llama_2_tokenizer_on_a_small_model(here):
    base, tokenizer = SHARED / "stories260K", SHARED / "llama2_tokenizer"
    code, _, err = here("generate", "--base", base, "--tokenizer", tokenizer, "--prompt", "a")
    message = one_sentence(err)
    assert code == 4 and "32000 tokens" in message and "512" in message


# Adapters and runs


def test_adapter_of_another_base(world, here, tmp_path):
    make_llama(tmp_path / "base", seed=1)
    make_tokenizer(tmp_path / "base")
    for arguments in (
        ("generate", "--base", tmp_path / "base", "--adapter", world / "run", "--prompt", "a"),
        ("evaluate", "--base", tmp_path / "base", "--adapter", world / "run", "--data", world / "eval.jsonl"),
    ):
        code, _, err = here(*arguments, "-q")
        assert code == 4 and "was trained on another base" in one_sentence(err)


def change_adapter(world, tmp_path, **changes):
    folder = copy_folder(world / "run" / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8}, ["does not fit", "lora_A", "[4, 48] instead of [8, 48]"]),
        ({"r": "x"}, ["rank", "'x'"]),
        ({"target_modules": ["q_proj"]}, ["does not fit", "is not known"]),
        ({"target_modules": ["c_attn"]}, ["['c_attn'] selects no module of this base"]),
        ({"target_modules": 7}, ["target_modules=7 is not a list of names"]),
        ({"lora_alpha": None}, ["not a usable LoRA configuration", "alpha"]),
        ({"lora_alpha": 7e38}, ["not a usable LoRA configuration", "beyond what float32 holds"]),
        ({"peft_type": "IA3"}, ["'IA3'", "LORA"]),
        ({"use_dora": True}, ["does not fit", "lora_magnitude_vector is missing"]),
        ({"rank_pattern": {"q_proj": 2}}, ["does not fit", "q_proj.lora_A", "[4, 48] instead of [2, 48]"]),
        ({"use_qalora": True}, ["use_qalora", "not supported"]),
    ],
)
def test_adapter_that_does_not_fit(world, here, tmp_path, changes, words):
    folder = change_adapter(world, tmp_path, **changes)
    code, _, err = here("generate", "--base", world / "base", "--adapter", folder, "--prompt", "a", "-q")
    message = one_sentence(err)
    assert code == 4 and str(folder) in message and [word for word in words if word not in message] == []
    assert "pydantic" not in message


def test_damaged_adapter(world, here, tmp_path):
    folder = change_adapter(world, tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    arguments = ("generate", "--base", world / "base", "--adapter", folder, "--prompt", "a", "-q")
    code, _, err = here(*arguments)
    assert code == 4 and "cut short or damaged" in one_sentence(err)
    weights.unlink()
    code, _, err = here(*arguments)
    assert code == 4 and "adapter_model.safetensors: missing" in one_sentence(err)


def test_folder_that_is_no_adapter(world, here, tmp_path):
    (tmp_path / "stopped" / "checkpoints").mkdir(parents=True)
    says = {
        tmp_path: "neither a PEFT adapter folder nor a run folder with a finished adapter/",
        world / "base": "neither a PEFT adapter folder nor a run folder with a finished adapter/",
        world / "runn": f"no such folder; did you mean {world / 'run'}?",
        tmp_path / "stopped": "a run that has no adapter yet; train it to its end, or write what its newest checkpoint "
        f"holds with `jlora export --adapter {tmp_path / 'stopped'} --out NAME` and name that folder",
    }
    for folder, wanted in says.items():
        code, _, err = here("generate", "--base", world / "base", "--adapter", folder, "--prompt", "a", "-q")
        assert code == 4 and f"{folder}: {wanted}" in one_sentence(err)


def test_adapter_to_go_on_from_must_be_the_configs(world, here, tmp_path):
    common = ("train", "--config", world / "config.yaml", f"output_dir={tmp_path}/run", "-q")
    for folder in (world / "run", world / "run" / "adapter"):
        code, _, err = here(*common, f"lora.init_from={folder}", "lora.rank=8")
        assert code == 4 and "set lora.rank=4" in one_sentence(err)


def test_run_of_another_config_is_not_gone_on_with(world, here):
    code, _, err = here("train", "--config", world / "config.yaml", "optimizer.learning_rate=1e-3", "-q")
    message = one_sentence(err)
    assert code == 4 and "optimizer.learning_rate: 0.005 -> 0.001" in message and "output_dir" in message


@pytest.mark.long
def test_damaged_checkpoint_as_a_program(world, tmp_path):
    """One that was written wrong: Orbax's threads have much to say then, and none of it may reach the user."""
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    (run / "summary.json").unlink()  # as if it had been stopped before its end
    for file in (run / "checkpoints" / "4" / "state" / "d").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    manifest.write(run / "checkpoints" / "4", manifest.read(run / "checkpoints" / "4"))
    done = shell("train", "--config", world / "config.yaml", f"output_dir={run}", "-q")
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    message = one_sentence(done.stderr)
    assert "checkpoints/4" in message and "cannot be restored" in message
