"""Other tools' configurations as ours: what converts, what is told, and that each result can be run.

`train` has no dry run; what stands for it is all that it checks of a config before it reads weights: the schema,
the entries of a sweep, the mesh, the split of a batch, the adapter's options on the model's shape, and the whole
training step's state and arguments made as shapes (`jlora.planning.compiled.held_bytes`, as the planner does).
"""

import json
from pathlib import Path

import jax
import pytest
import yaml
from command_line import one_sentence

from jlora.config import Config, load_config, variants
from jlora.config.convert.convert import convert, describe_notes
from jlora.config.reference import json_schema
from jlora.errors import ConfigError
from jlora.hf.architecture import parse_config
from jlora.planning.compiled import held_bytes
from jlora.planning.topology import Target

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "configs_of_peers").glob("*.yaml"))
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
BOTH = [{"path": "pairs.jsonl", "weight": None}, {"path": "more.jsonl", "weight": None}]
TWO = [{"path": "first.jsonl", "weight": None}, {"path": "second.jsonl", "weight": None}]
# Of each file: devices, keys of the config, and the peer's keys that change the result and are lost.
EXPECTED: dict[str, tuple[int, dict[str, object], list[str]]] = {
    "axolotl_alpaca_qlora_7b": (
        2,
        {
            "model": {"path": "meta-llama/Llama-2-7b-hf", "quantization": "nf4", "dtype": "bfloat16", "remat": "full"},
            "lora": {"rank": 64, "alpha": 128.0, "dropout": 0.1, "target_modules": "all-linear"},
            "data": {"train": "tatsu-lab/alpaca", "format": "alpaca", "eval": 0.02, "max_length": 2048},
            "training": {"batch_size": 16, "gradient_accumulation_steps": 2, "epochs": 3, "seed": 42},
            "optimizer": {"name": "adamw", "schedule": "linear", "learning_rate": 1e-4, "warmup_steps": 30},
            "output_dir": "out/alpaca",
        },
        [],
    ),
    "axolotl_lora_two_projections": (
        1,
        {
            "lora": {"target_modules": ["q_proj", "v_proj"]},
            "data": {"train": "rows/train.jsonl", "eval": "rows/held_out.jsonl", "packing": False, "max_length": 512},
            "training": {"max_steps": 500, "eval_every": 50, "save_every": 100, "keep_checkpoints": 3, "log_every": 10},
            "optimizer": {"warmup_steps": 25},
        },
        [],
    ),
    "axolotl_dora_rslora": (
        1,
        {
            "model": {"remat": "none"},
            "lora": {"use_dora": True, "use_rslora": True, "init_lora_weights": "gaussian"},
            "data": {"format": "text", "train": "rows.parquet"},
            "optimizer": {"schedule": "constant", "max_grad_norm": 0.3, "b2": 0.95, "eps": 1e-6, "weight_decay": 0.1},
        },
        [],
    ),
    "axolotl_chat_template_rows": (
        1,
        {
            "model": {"remat": "offload"},
            "data": {
                **{"format": "messages", "chat_template": "chatml", "packing": True},
                **{"train_on": ["assistant", "tool"], "train_on_eos": "last"},
            },
            "training": {"epochs": 2.5, "batch_size": 4},
            "optimizer": {"warmup_steps": 0, "warmup_ratio": 0.03},
        },
        [],
    ),
    "axolotl_int8_sharegpt": (
        1,
        {"model": {"quantization": "int8"}, "data": {"format": "sharegpt", "split": "train", "train_on": "response"}},
        ["early_stopping_patience", "load_in_8bit"],
    ),
    "axolotl_loraplus_neftune": (
        1,
        {
            "lora": {"layers_to_transform": [0, 1], "modules_to_save": ["embed_tokens", "lm_head"]},
            "optimizer": {"loraplus_lr_ratio": 16.0},
            "training": {"neftune_noise_alpha": 5.0},
        },
        [],
    ),
    "axolotl_dpo": (
        1,
        {
            "objective": {"name": "dpo", "beta": 0.2, "label_smoothing": 0.1},
            "data": {"format": "preference", "max_length": 4096},
        },
        ["datasets.type"],
    ),
    "axolotl_orpo_two_sources": (
        1,
        {"objective": {"name": "orpo", "beta": 0.1}, "data": {"train": BOTH, "format": "preference"}},
        [],
    ),
    "axolotl_own_columns_fp16": (
        1,
        {
            "lora": {"target_modules": ["q_proj", "v_proj"]},
            "training": {"batch_size": 16, "gradient_accumulation_steps": 16},
            "optimizer": {"name": "lion", "schedule": "cosine", "min_learning_rate_ratio": 0.1},
        },
        [
            *("datasets.type", "fp16", "lora_target_modules", "lr_scheduler", "plugins", "tokens"),
        ],
    ),
    "axolotl_full_fine_tuning": (
        1,
        {
            **{"method": "full", "model": {"dtype": "float32", "quantization": None}},
            **{"optimizer": {"name": "adafactor"}, "training": {"evals_per_epoch": 2, "saves_per_epoch": 1}},
        },
        [],
    ),
    "torchtune_llama2_7b": (
        2,
        {
            "model": {"path": "base", "quantization": None, "remat": "none"},
            "lora": {"rank": 16, "target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]},
            "data": {
                **{"train": "yahma/alpaca-cleaned", "eval": 0.1, "split": "train", "packing": True},
                **{"train_on": "all", "max_length": 2048},
            },
            "training": {"batch_size": 32, "gradient_accumulation_steps": 4, "epochs": 2, "seed": 11},
            "optimizer": {"max_grad_norm": None, "weight_decay": 0.01, "schedule": "cosine", "warmup_steps": 20},
            "output_dir": "runs/tuned",
        },
        [],
    ),
    "torchtune_llama2_13b_qlora": (
        1,
        {
            "model": {"quantization": "nf4", "remat": "full"},
            "lora": {"dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
            "training": {"max_steps": 200},
            "optimizer": {"name": "adamw", "max_grad_norm": 1.0, "schedule": "constant"},
        },
        ["max_steps_per_epoch", "tokenizer.max_seq_len"],
    ),
    "torchtune_llama3_own_rows": (
        1,
        {
            "data": {"train": "faq.csv", "format": "completion", "train_on": "response"},
            "training": {"log_every": 5, "eval_every": 100},
        },
        ["dataset._component_", "dataset.column_map", "shuffle"],
    ),
    "torchtune_llama3_1_chat": (
        1,
        {"model": {"remat": "offload"}, "lora": {"use_dora": True}, "data": {"format": "messages", "packing": True}},
        [],
    ),
    "torchtune_llama3_1_dpo": (
        1,
        {"objective": {"name": "dpo", "beta": 0.05}, "data": {"format": "preference", "max_length": 2048}},
        ["dataset._component_", "dataset.column_map"],
    ),
    "torchtune_llama3_2_text": (
        1,
        {"data": {"format": "text", "split_long": False}, "optimizer": {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1}},
        ["model.apply_lora_to_output"],
    ),
    "torchtune_mistral_qlora": (
        1,
        {"data": {"train": "Samsung/samsum", "format": "completion", "train_on": "all"}},
        ["dataset._component_", "tokenizer.max_seq_len"],
    ),
    "torchtune_qwen2_5_sgd": (
        1,
        {"model": {"dtype": "float32"}, "optimizer": {"name": "sgd", "b1": 0.9, "schedule": "constant"}},
        ["optimizer.nesterov", "tokenizer.max_seq_len"],
    ),
    "torchtune_qwen2_quantizer": (
        1,
        {"model": {"dtype": "bfloat16"}},
        ["dtype", "quantizer", "tokenizer.max_seq_len"],
    ),
    "torchtune_two_sources_mesh": (
        8,
        {"mesh": {"tensor": 2, "data": 2, "fsdp": 2}, "training": {"batch_size": 8}, "data": {"train": TWO}},
        [],
    ),
}


def test_twenty_files_are_here():
    assert sorted(EXPECTED) == [path.stem for path in FILES] and len(FILES) == 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_converts_to_what_can_be_run(path, tmp_path):
    devices, wanted, lost = EXPECTED[path.stem]
    peer, text, notes = convert(path, devices)
    assert peer.lower() == path.stem.split("_")[0]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    cfg = load_config(tmp_path / "run.yaml")
    found = cfg.model_dump()
    for name, values in wanted.items():
        if isinstance(values, dict):
            assert {key: found[name][key] for key in values} == values, name
        else:
            assert found[name] == values
    assert sorted({note.key for note in notes if note.effect == "result"}) == lost
    # As a dry run: see above. One device stands for those of a mesh.
    variants(cfg)
    single = cfg.model_copy(update={"mesh": Config.model_fields["mesh"].default})
    short = single.model_copy(update={"data": cfg.data.model_copy(update={"max_length": 16})})
    target = Target("cpu:1", "cpu", [jax.devices()[0]], 2**40)
    assert held_bytes(short, target, parse_config(SHAPE, "tiny")) > 0


def test_every_key_of_a_file_is_accounted_for():
    """A key is converted, told of, or says what jlora does anyway: nothing is lost in silence."""
    path = next(path for path in FILES if path.stem == "axolotl_own_columns_fp16")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    given |= {"a_key_of_next_year": 3, "lisa_n_layers": 4}
    from jlora.config.convert import axolotl

    out = axolotl.convert(given, 1)
    unknown = [note.key for note in out.notes if "does not know" in note.why]
    assert unknown == ["a_key_of_next_year", "lisa_n_layers"]
    for key in axolotl.JOINT:
        assert key not in axolotl.TABLE


def test_devices_that_share_rows_have_no_rows_of_their_own():
    """Of 8 devices 4 share each row, so there are rows for 2."""
    from jlora.config.convert import axolotl, torchtune

    rows = {"micro_batch_size": 3, "gradient_accumulation_steps": 1}
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        out = axolotl.convert({"base_model": "b", "adapter": "lora", key: 2, "tensor_parallel_size": 2} | rows, 8)
        assert out.tree["mesh"] == {"context": 2, "tensor": 2} and out.tree["training"]["batch_size"] == 3 * 2
        assert not [note for note in out.notes if note.key == key]
    given = yaml.safe_load(next(p for p in FILES if p.stem == "torchtune_two_sources_mesh").read_text(encoding="utf-8"))
    out = torchtune.convert(given | {"context_parallel_dim": 2}, 8)
    assert out.tree["mesh"]["context"] == 2 and out.tree["training"]["batch_size"] == 1 * 2 * 2


def test_gravest_notes_come_first_and_irrelevant_ones_apart():
    path = next(path for path in FILES if path.stem == "axolotl_own_columns_fp16")
    lines = describe_notes(convert(path, 1)[2])
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads[0].startswith("CHANGES THE RESULT") and heads[1].startswith("changes speed, memory")
    named = lines[1 : lines.index(heads[1])]
    assert any(line.startswith("  plugins: axolotl.integrations.spectrum") for line in named)
    assert not any("liger" in line for line in named)
    path = next(path for path in FILES if path.stem == "axolotl_alpaca_qlora_7b")
    lines = describe_notes(convert(path, 1)[2])
    apart = lines[lines.index("not needed here:") :]
    assert any(line.startswith("  wandb_name: first -- ") for line in apart)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {path: base}\n", "looks like no configuration of Axolotl (base_model) or torchtune"),
        ("- 1\n", "looks like no configuration"),
        ("base_model: [\n", "not valid YAML"),
        ("base_model: b\nadapter: lora\nlora_r: 0\nlearning_rate: 1\n", "converted, lora.rank: should be greater"),
        ("base_model: b\nmicro_batch_size: many\n", "not as Axolotl documents it"),
        ("model: {_component_: torchtune.models.gemma.lora_gemma_2b}\n", "not one of the families"),
        ("model: {_component_: torchtune.models.llama2.llama2_7b}\n", "is no LoRA recipe"),
    ],
)
def test_what_can_not_be_converted_is_one_sentence(tmp_path, text, words):
    (tmp_path / "peer.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / "peer.yaml", 1)
    assert words in str(caught.value) and "peer.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_command(here, tmp_path):  # noqa: F811
    source = FILES[0]
    code, out, err = here("config", "--from", source, "--devices", 2, "--out", tmp_path / "run.yaml")
    assert (code, out) == (0, "") and "not needed here:" in err
    assert load_config(tmp_path / "run.yaml").training.batch_size == 16
    code, out, _ = here("config", "--from", source, "--json")
    assert code == 0 and set(json.loads(out)) == {"peer", "config", "notes"}
    code, _, err = here("config", "--from", tmp_path / "none.yaml")
    assert code == 2 and "no such file" in one_sentence(err)
    assert here("config", "--json")[0] == 2 and here("config", "--schema", "--from", source)[0] == 2


def test_schema_is_up_to_date(here):  # noqa: F811
    shipped = (ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8")
    assert shipped == json_schema(), "python -m jlora.config --schema --out docs/config.schema.json"
    assert here("config", "--schema")[1] == shipped


def test_schema_takes_the_configs_and_describes_every_key():
    schema = json.loads(json_schema())
    import jsonschema

    for path in sorted((ROOT / "configs").glob("*.yaml")):
        jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": {"path": "b", "pth": 1}, "data": {"train": "r"}, "output_dir": "o"}, schema)
    for section in schema["$defs"].values():
        assert all("description" in field for field in section["properties"].values())
