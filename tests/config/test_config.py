"""The configuration: what is refused, with which words, and that every default stands once."""

import pwd
from pathlib import Path

import pytest
import yaml

from jlora import config
from jlora.config import Config, load_config
from jlora.config.reference import reference
from jlora.config.sections import SECTIONS
from jlora.errors import ConfigError

ROOT = Path(__file__).parents[2]
MINIMAL = {"model": {"path": "base"}, "data": {"train": "rows.jsonl"}, "output_dir": "run"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return path


def refused(path, *overrides):
    """The message, after the checks that hold for all of them."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sections():
    """Name and class of every section, the top level first."""
    return [("", Config), *((f"{name}.", section) for name, section in SECTIONS.items())]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.name=lion", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("ouput_dir=x", "unknown key 'ouput_dir'; did you mean 'output_dir'?"),
        ("lora.rnak=8", "unknown key 'lora.rnak'; did you mean 'lora.rank'?"),
        ("training.max_step=8", "unknown key 'training.max_step'; did you mean 'training.max_steps'?"),
        ("rank=8", "unknown key 'rank'; did you mean 'lora.rank'?"),
        ("training.learning_rate=1", "unknown key 'training.learning_rate'; did you mean 'optimizer.learning_rate'?"),
        ("mesh.zzz=1", "unknown key 'mesh.zzz'; known are data, fsdp, tensor"),
        ("data.seed.deep=1", "unknown key 'data.seed'; did you mean 'training.seed'?"),
        ("lora.r=8", "unknown key 'lora.r'; in jlora: lora.rank"),
        ("lora_target_modules=all-linear", "unknown key 'lora_target_modules'; in jlora: lora.target_modules"),
        ("num_train_epochs=3", "unknown key 'num_train_epochs'; in jlora: training.epochs"),
        ("load_in_4bit=true", "unknown key 'load_in_4bit'; in jlora: model.quantization=nf4"),
        ("group_by_length=true", "unknown key 'group_by_length'; jlora has none (rows are drawn in a random order"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(file, override, words):
    message = refused(file, override)
    assert message.startswith(f"the command line: {words}")


def test_unknown_key_in_the_file_itself(file):
    tree = MINIMAL | {"lora": {"rank": 4, "dropuot": 0.1}}
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert "unknown key 'lora.dropuot'; did you mean 'lora.dropout'?" in refused(file)


def test_all_problems_are_told_each_with_its_place(file):
    tree = MINIMAL | {"lora": {"r": 4, "lora_alpha": 8}, "training": {"epochs": "many"}}
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    assert refused(file, "training.seed=-1", "num_train_epochs=2") == (
        f"{file}: (1) unknown key 'lora.r'; in jlora: lora.rank; (2) unknown key 'lora.lora_alpha'; in jlora: "
        "lora.alpha; the command line: (3) unknown key 'num_train_epochs'; in jlora: training.epochs; "
        f"{file}: (4) training.epochs: should be a valid number, but it is 'many'; "
        "the command line: (5) training.seed: should be greater than or equal to 0, but it is -1"
    )
    message = refused(file, *(f"key{number}=1" for number in range(20)))
    assert "(10) unknown key" in message and "(11)" not in message and message.endswith("; and 13 more")


def test_file_of_another_tool_is_told_as_such(file):
    file.write_text("base_model: some/base\nlora_r: 8\n", encoding="utf-8")
    assert refused(file).endswith(f"this looks like a file of Axolotl, which jlora config --from {file} converts")


def test_near_name_of_a_file_that_is_not_there_is_told(file):
    other = file.with_suffix(".yml" if file.suffix == ".yaml" else ".yaml")
    assert refused(other) == f"{other}: no such file; did you mean {file}?"
    assert refused(file.with_name("entirely-else")).endswith("no such file; check the path")


@pytest.mark.parametrize("key", ["model", "model.path", "data", "data.train", "output_dir"])
def test_missing_key_is_named(file, key):
    tree = {name: dict(value) if isinstance(value, dict) else value for name, value in MINIMAL.items()}
    *parents, leaf = key.split(".")
    del (tree[parents[0]] if parents else tree)[leaf]
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert f"key '{key}' is missing" in refused(file)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.rank=0", ["lora.rank", "greater than 0", "0"]),
        ("lora.rank=many", ["lora.rank", "integer", "'many'"]),
        ("lora.rank=2.5", ["lora.rank", "integer", "2.5"]),
        ("lora.rank=null", ["lora.rank", "integer", "None"]),
        ("lora.alpha=-1", ["lora.alpha", "greater than 0"]),
        ("lora.dropout=1", ["lora.dropout", "less than 1"]),
        ("lora.target_modules=[q_proj, k_prj]", ["target_modules", "'k_prj'", "did you mean 'k_proj'"]),
        ("lora.target_modules=[]", ["target_modules is empty"]),
        ("lora.target_modules=q_proj", ["lora.target_modules", "list", "'all-linear'", "'q_proj'"]),
        ("lora=3", ["lora", "rank, alpha", "3"]),
        ("data=null", ["data", "train, eval", "None"]),
        ("data.format=alpca", ["data.format", "'sharegpt' or 'preference'", "'alpca'"]),
        ("data.eval=1.5", ["data.eval", "string", "less than 1", "1.5"]),
        ("data.eval=0", ["data.eval", "greater than 0"]),
        ("data.train=", ["data.train", "string", "None"]),
        ("data.max_length=1", ["data.max_length", "greater than or equal to 2"]),
        ("model.quantization=nf8", ["model.quantization", "'nf4' or 'int4'", "'nf8'"]),
        ("model.dtype=float16", ["model.dtype", "'bfloat16' or 'float32'"]),
        ("optimizer.learning_rate=fast", ["optimizer.learning_rate", "number", "'fast'"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate", "finite"]),
        ("optimizer.learning_rate=.nan", ["optimizer.learning_rate"]),
        ("optimizer.learning_rate=1e-40", ["optimizer.learning_rate", "beyond what float32 holds"]),
        ("lora.alpha=7e38", ["lora.alpha", "beyond what float32 holds"]),
        ("lora.alpha_pattern={q_proj: 7e38}", ["lora.alpha_pattern", "beyond what float32 holds"]),
        ("training.seed=-1", ["training.seed", "greater than or equal to 0"]),
        ("training.gradient_accumulation_steps=3", ["batch_size 8", "3 equal parts", "divisor"]),
        ("mesh.tensor=0", ["mesh", "positive"]),
        ("mesh.data=-1", ["mesh", "at most one is -1"]),
        ("output_dir=''", ["output_dir", "at least 1 character"]),
    ],
)
def test_bad_value_is_refused_by_name(file, override, words):
    message = refused(file, override)
    section = override.startswith(("training.gradient", "mesh.", "lora.target_modules=[")) and "greater" not in message
    assert message.startswith(f"{file}: " if section else "the command line: ")
    assert [word for word in words if word not in message] == []
    assert "Section" not in message and "Input" not in message  # our words, not the library's


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: [", "line 1"),
        (b"model:\n\tpath: x\n", "line 2"),
        (b"\xff\xfe", "not valid YAML"),
        (b"model: {path: a}\nmodel: {path: b}\n", "duplicate key 'model'"),
        (b"lora:\n  rank: 4\n  alpha: 8\n  rank: 8\n", "duplicate key 'rank'"),
        (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"null: 1\n", "key None is not text"),
        (b"model: {path: a, 1: b}\n", "key 1 is not text"),
        (b"", "must hold keys such as model and data, not NoneType"),
        (b"- model\n", "not list"),
    ],
)
def test_bad_yaml(file, content, words):
    file.write_bytes(content)
    message = refused(file)
    assert words in message and str(file) in message and "unicode string" not in message


def test_file_that_can_not_be_read(tmp_path):
    assert "no such file" in refused(tmp_path / "none.yaml")
    assert "directory" in refused(tmp_path)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=2e-4", 2e-4),
        ("optimizer.learning_rate=3", 3.0),
        ("optimizer.max_grad_norm=null", None),
        ("training.max_steps=1e3", 1000),
        ("training.max_steps=null", None),
        ("training.batch_size=16", 16),
        ("lora.use_rslora=true", True),
        ("lora.target_modules=[q_proj, up_proj]", ["q_proj", "up_proj"]),
        ("lora.target_modules=all-linear", "all-linear"),
        ("data.eval=0.25", 0.25),
        ("data.eval=1e-1", 0.1),
        ("data.eval=held_out.jsonl", "held_out.jsonl"),
        ("data.train=a=b.jsonl", "a=b.jsonl"),
        ("model.path=some/hub-name", "some/hub-name"),
        ("output_dir=elsewhere", "elsewhere"),
        ("mesh={data: 2, fsdp: 1}", config.MeshSection(data=2, fsdp=1)),
    ],
)
def test_override(file, override, value):
    found = load_config(file, [override])
    for name in override.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_override_makes_the_section_and_the_last_one_wins(file):
    assert "lora" not in MINIMAL
    assert load_config(file, ["lora.rank=4", "lora.alpha=7", "lora.rank=5"]).lora == config.LoraSection(rank=5, alpha=7)


def test_override_adds_to_what_the_file_says(file):
    file.write_text(yaml.safe_dump(MINIMAL | {"lora": {"rank": 4, "alpha": 9}}), encoding="utf-8")
    lora = load_config(file, ["lora.rank=5"]).lora
    assert (lora.rank, lora.alpha) == (5, 9.0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.rank", "'lora.rank' is not of the form dotted.key=value"),
        ("=3", "'=3' is not of the form"),
        ("output_dir.x=3", "'output_dir' is not a section"),
        ("lora.rank=[1", "override 'lora.rank=[1'"),
    ],
)
def test_malformed_override(file, override, words):
    assert words in refused(file, override)


def test_yaml_numbers_of_the_file(file):
    file.write_text(file.read_text(encoding="utf-8") + "optimizer: {learning_rate: 1e-5, eps: 1.E-6}\n")
    optimizer = load_config(file).optimizer
    assert (optimizer.learning_rate, optimizer.eps) == (1e-5, 1e-6)


def test_resolved_config_loads_back_equal(file, tmp_path):
    cfg = load_config(file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(cfg.dump_yaml(), encoding="utf-8")
    assert load_config(resolved) == cfg
    # The dump says every key, so that a run does not change when a default does.
    tree = yaml.safe_load(cfg.dump_yaml())
    for name, section in sections():
        keys = tree if name == "" else tree[name.rstrip(".")]
        assert set(keys) == set(section.model_fields)


def test_contract_of_defaults(file):
    cfg = load_config(file).model_dump()
    assert cfg["model"] | {"path": None} == {
        **{"path": None, "tokenizer": None, "dtype": "bfloat16", "quantization": None},
        **{"attention": "auto", "remat": "full", "resize_embeddings": False},
        **{"compute": None, "compute_max_loss_gap": 0.1, "compute_fallback": False, "scan_layers": True},
    }
    assert cfg["lora"] == {
        **{"rank": 16, "alpha": 32.0, "dropout": 0.0, "init_from": None, "use_rslora": False},
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        **{"use_dora": False, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"},
        **{"layers_to_transform": None, "modules_to_save": [], "trainable_tokens": []},
    }
    assert cfg["mesh"] == {"data": 1, "fsdp": -1, "tensor": 1, "context": 1}
    assert cfg["method"] == "lora"
    expected = {
        **{"data.eval": None, "data.format": "alpaca", "data.max_length": 1024, "data.packing": True},
        **{"data.train_on": "response", "data.on_bad_row": "error", "training.batch_size": 8},
        **{"training.gradient_accumulation_steps": 1, "training.epochs": 1, "training.max_steps": None},
        **{"training.seed": 0, "training.log_every": 1, "training.eval_every": None, "training.save_every": None},
        **{"training.keep_checkpoints": 2, "optimizer.name": "adamw", "optimizer.learning_rate": 2e-4},
        **{"optimizer.weight_decay": 0.0, "optimizer.schedule": "cosine", "optimizer.warmup_steps": 0},
        "optimizer.max_grad_norm": 1.0,
    }
    found = {key: cfg[key.partition(".")[0]][key.partition(".")[2]] for key in expected}
    assert found == expected


def test_values_do_not_change_once_validated(file):
    cfg = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        cfg.lora.rank = 3


@pytest.mark.parametrize(("name", "section"), sections())
def test_every_field_has_a_description(name, section):
    for key, field in section.model_fields.items():
        if (key + ".", field.annotation) not in sections():
            assert field.description, name + key


def test_reference_page_is_current():
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m jlora.config > docs/config.md"
    for prefix, section in sections():
        for key, field in section.model_fields.items():
            if (key + ".", field.annotation) not in sections():
                assert f'| <a id="{prefix}{key}"></a>[`{key}`](#{prefix}{key}) |' in page, key


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configs_of_the_repository_validate(path):
    cfg = load_config(path)
    assert isinstance(cfg.output_dir, str)


@pytest.mark.parametrize("name", ["2026-11-28", "2026-99-99", "2026-11-28 10:00:00"])
def test_a_date_is_a_name(file, name):
    """YAML 1.1 would make a date of it, which no key takes."""
    assert load_config(file, [f"output_dir={name}"]).output_dir == name
    file.write_text(file.read_text().replace("output_dir: run", f"output_dir: {name}"))
    assert load_config(file).output_dir == name


@pytest.mark.parametrize("name", ["20261128", "on", "1.5"])
def test_what_yaml_takes_for_no_text_is_told_to_be_quoted(file, name):
    assert "write output_dir='\"...\"'" in refused(file, f"output_dir={name}")
    assert load_config(file, [f'output_dir="{name}"']).output_dir == name


def test_paths_begin_in_the_home_folder(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    keys = (
        "model.path",
        "model.tokenizer",
        "data.train",
        "data.eval",
        "data.cache_dir",
        "lora.init_from",
        "output_dir",
    )
    cfg = load_config(file, [f"{key}=~/x" for key in keys])
    found = [cfg.model.path, cfg.model.tokenizer, cfg.data.train, cfg.data.eval, cfg.data.cache_dir]
    assert {*found, cfg.lora.init_from, cfg.output_dir} == {"/home/someone/x"}
    assert load_config(file, ["data.train=[{path: ~/a}]"]).data.sources[0].path == "/home/someone/a"
    assert load_config(file, ["output_dir=a~b"]).output_dir == "a~b"


def test_an_unknown_home_folder_is_said(file, monkeypatch):
    """As of a user without an entry in passwd, and without HOME; else a folder of the name `~` would be made."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert "output_dir: '~/x': the home folder is not known" in refused(file, "output_dir=~/x")


@pytest.mark.parametrize(
    "override",
    [
        "training.epochs=1" + "0" * 30,
        "training.epochs=1e30",
        f"lora.rank={2**70}",
        "optimizer.warmup_steps=1" + "0" * 23,
    ],
)
def test_numbers_beyond_all_use_are_refused_by_name(file, override):
    """They would take for ever, or end in a library's own error."""
    said = refused(file, override)
    assert f"{override.partition('=')[0]}: should be " in said and "Unable" not in said
