"""Input that is broken or means harm: bounded, refused in one sentence, or dropped and counted.

The numbers are those of the fault cases in docs/reliability.md.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tiny import copy_folder, make_completions, make_llama, make_tokenizer, write_config

import jlora.train
from jlora import cli
from jlora.config import Config, DataSection, LoraSection, load_config
from jlora.data import Epochs, tokenize
from jlora.data.rows import MAX_ROW_BYTES
from jlora.data.tokens import load_tokenizer
from jlora.errors import ConfigError, DataError, ModelError
from jlora.files import sandbox
from jlora.files.secrets import HIDDEN, find_secret, redact
from jlora.hf.architecture import parse_config
from jlora.hf.peft import load_adapter, save_adapter
from jlora.hf.pretrained import run_config
from jlora.hf.source import check_names, open_source
from jlora.model.adapter import init_adapter
from jlora.model.llama import projection_shapes

GOOD = b'{"prompt": "a", "completion": "b"}\n'
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MB = 2**20


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The smallest base, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    make_llama(folder, hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base, None)


def section(**changes):
    wanted = {"train": "unused", "format": "completion", "max_length": 32, "on_bad_row": "skip"}
    return DataSection.model_validate(wanted | changes)


def write(path, content):
    path.write_bytes(content)
    return path


def sentence_of(error, call, *arguments, **options):
    """The one sentence that a call is refused with."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


# Rows that train nothing (cases 3, 4, 25, 27)


def test_case_3_prompt_that_fills_the_length_is_dropped_and_counted_or_named(tmp_path, tokenizer):
    long = json.dumps({"prompt": "a" * 50, "completion": "b"}).encode() + b"\n"
    path = write(tmp_path / "rows.jsonl", GOOD + long + GOOD)
    dataset = tokenize(str(path), tokenizer, section())
    assert (dataset.read, len(dataset.examples), dict(dataset.dropped)) == (3, 2, {"prompt_too_long": 1})
    assert dataset.places == ["rows.jsonl:1", "rows.jsonl:3"]
    assert "rows.jsonl:2: " in sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))
    write(path, long * 2)
    assert "all 2 rows were dropped" in sentence_of(DataError, tokenize, str(path), tokenizer, section())


@pytest.mark.parametrize("response", ['""', "null", '" \\n\\t"'])
def test_case_4_empty_response_is_dropped_and_counted_or_named(tmp_path, tokenizer, response):
    bad = f'{{"prompt": "a", "completion": {response}}}\n'.encode()
    path = write(tmp_path / "rows.jsonl", GOOD + bad)
    assert sum(tokenize(str(path), tokenizer, section()).dropped.values()) == 1
    assert "rows.jsonl:2: " in sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))


def test_case_25_rows_over_the_length_are_cut_and_counted(tmp_path, tokenizer):
    long = json.dumps({"prompt": "a", "completion": "b" * 50}).encode() + b"\n"
    dataset = tokenize(str(write(tmp_path / "rows.jsonl", GOOD + long)), tokenizer, section())
    assert dataset.truncated == 1 and [len(example.ids) for example in dataset.examples] == [4, 32]


@pytest.mark.parametrize(("count", "batches"), [(0, None), (1, 1), (4, 1), (5, 2)])
def test_case_27_few_rows_and_rows_that_do_not_divide(tmp_path, tokenizer, count, batches):
    path = str(write(tmp_path / "rows.jsonl", GOOD * count))
    if batches is None:
        assert "holds no usable row" in sentence_of(DataError, tokenize, path, tokenizer, section())
        return
    epochs = Epochs(tokenize(path, tokenizer, section()), section(packing=False), batch_size=4, seed=0)
    assert epochs.num_batches(1) == batches  # the last is filled with empty rows, which train nothing
    weights = [epochs[row]["weights"].sum() for row in range(4 * batches)]
    assert sum(weight > 0 for weight in weights) == count


# Rows that are malformed (case 24)

BAD_ROWS = {
    "invalid UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "invalid_utf8"),
    "invalid UTF-8 outside a field": (b'{"prompt": "a", "completion": "b", "\xc3\x28": 1}', "invalid_utf8"),
    "not an object": (b'["a", "b"]', "wrong_type"),
    "wrong type": (b'{"prompt": ["a"], "completion": "b"}', "wrong_type"),
    "duplicate key": (b'{"prompt": "a", "completion": "b", "completion": "c"}', "duplicate_key"),
    "duplicate key inside": (b'{"prompt": "a", "completion": "b", "c": [{"d": 1, "d": 2}]}', "duplicate_key"),
    "half a surrogate pair": (b'{"prompt": "\\ud800", "completion": "b"}', "not_unicode"),
}
BROKEN_ROWS = {
    "malformed": b'{"prompt": "a", "completion": "b"',
    "NUL": b'{"prompt": "a\0", "completion": "b"}',
    "too deep": b'{"prompt": ' + b"[" * 100_000,
    "too many digits": b'{"prompt": ' + b"7" * 5000 + b"}",
}


@pytest.mark.parametrize("name", [*BAD_ROWS, *BROKEN_ROWS])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_case_24_malformed_row_is_named_by_its_physical_line(tmp_path, tokenizer, name, kind):
    row, reason = BAD_ROWS.get(name) or (BROKEN_ROWS[name], "malformed_json")
    path = tmp_path / f"rows.{kind}"
    good = GOOD.rstrip()
    # Blank lines and a byte order mark, so that rows and lines are not numbered alike.
    lines = [good, b"", row, good] if kind == "jsonl" else [b"[", good + b",", b"", row + b",", good, b"]"]
    write(path, b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")
    line = 3 if kind == "jsonl" else 5 if name == "malformed" else 4  # its comma is missed in the row after it
    message = sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))
    assert f"rows.{kind}:{line}: " in message
    if kind == "json" and name in BROKEN_ROWS:  # nobody knows where the next row begins
        assert f"rows.{kind}:{line}: " in sentence_of(DataError, tokenize, str(path), tokenizer, section())
        return
    dataset = tokenize(str(path), tokenizer, section())
    assert (dataset.read, len(dataset.examples), dict(dataset.dropped)) == (3, 2, {reason: 1})


def test_case_24_escaped_nul_is_text(tmp_path, tokenizer):
    row = b'{"prompt": "a\\u0000", "completion": "b\\u0000c"}\n'
    (example,) = tokenize(str(write(tmp_path / "rows.jsonl", row)), tokenizer, section()).examples
    assert tokenizer.decode(example.ids) == "a\0b\0c"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"prompt,prompt\na,b\n", "rows.csv:1: the column 'prompt' stands twice"),
        (b'prompt,completion\na,"b\n\n\n', "rows.csv:4: malformed CSV"),
        (b"prompt,completion\na,\xff\n", "rows.csv:2: not valid UTF-8"),
        (b'prompt,completion\n"two\nlines",""\n', "rows.csv:3: the field"),
    ],
)
def test_case_24_malformed_csv_is_named_by_its_physical_line(tmp_path, tokenizer, content, words):
    path = write(tmp_path / "rows.csv", content)
    assert words in sentence_of(DataError, tokenize, str(path), tokenizer, section(on_bad_row="error"))


def test_case_24_parquet_text_that_is_not_utf8(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": ["b"] * 3}), tmp_path / "rows.parquet")
    dataset = tokenize(str(tmp_path / "rows.parquet"), tokenizer, section())
    assert (len(dataset.examples), dict(dataset.dropped)) == (2, {"invalid_utf8": 1})


# Writes a file of the kind, reads it in a process of its own, and prints the memory that this took in MiB.
MEASURE = """
import resource, sys
from jlora.errors import DataError
from jlora.data.rows import read_rows
kind, path = sys.argv[1:]
with open(path, "wb") as file:
    if kind == "nested":
        file.write(b"[")
        for _ in range(15):
            file.write(b"{}," * (2**20 // 3))
        file.write(b"0]\\n")
    elif kind == "array":
        file.write(b'[{"text": "a"}')
        for _ in range(100):
            file.write(b',{"text": "%s"}' % (b"x" * 2**20))
        file.write(b"]")
    else:
        file.write({"jsonl": b'{"text": "', "json": b'[{"text": "', "csv": b"text\\n"}[kind])
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write({"jsonl": b'"}\\n{"text": "b"}\\n', "json": b'"}]', "csv": b"\\nb\\n"}[kind])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, rows, says = peak(), [], ""
try:
    rows = [f"{row.where}: {row.value}"[:60] for row in read_rows(path, "train")]
except DataError as error:
    says = str(error)
print(peak() - before, len(rows), rows[0] if rows else says, sep="|")
"""


@pytest.mark.parametrize(
    ("kind", "name", "rows", "says", "limit"),
    [
        ("jsonl", "a.jsonl", "2", "a.jsonl:1: the line is longer than 16 MiB", 80),
        ("json", "a.json", "0", "a.json:1: row 1 is longer than 16 MiB, or malformed JSON", 160),
        ("csv", "a.csv", "0", "a.csv:2: the row is longer than 16 MiB", 80),
        ("array", "a.json", "101", "a.json:1: row 1: {'text': 'a'}", 80),
        ("nested", "a.jsonl", "1", "a.jsonl:1: [{}, {}", 700),
    ],
)
def test_case_24_line_of_100_megabytes_takes_bounded_memory(tmp_path, kind, name, rows, says, limit):
    """An array may be one line of any length; a row may not. `nested` is the dearest JSON of the length allowed."""
    command = [sys.executable, "-c", MEASURE, kind, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    grown, count, first = done.stdout.strip().split("|")
    assert (count, first[: len(says)]) == (rows, says)
    assert int(grown) < limit
    assert MAX_ROW_BYTES == 16 * MB
    (tmp_path / name).unlink()


# Adapters that do not fit (cases 7, 8)


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter folder for the base, its model's shape, and the config section."""
    model = parse_config(open_source(base).config, "base")
    lora = LoraSection(rank=2, target_modules=["q_proj", "v_proj"])
    made = init_adapter(lora, projection_shapes(model), model.num_hidden_layers, seed=0)
    save_adapter(tmp_path / "adapter", made, lora, "base", "f" * 64)
    load_adapter(tmp_path / "adapter", model, "f" * 64, 0.0)
    return tmp_path / "adapter", model


def edit_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q.format("A")), f"{Q.format('A')} is missing"),
        (lambda t: t.update({"lm_head.lora_A.weight": t[Q.format("A")]}), "lm_head.lora_A.weight is not known"),
        (lambda t: t.update({"q_proj.lora_A": t.pop(Q.format("A"))}), f"{Q.format('A')} is missing (and 1 more)"),
        (lambda t: t.clear(), "is missing (and 3 more)"),
    ],
    ids=["missing", "extra", "misnamed", "empty"],
)
def test_case_7_adapter_with_wrong_keys_is_refused(adapter, change, words):
    folder, model = adapter
    edit_tensors(folder, change)
    assert words in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)


def test_case_8_adapter_of_wrong_rank_shape_or_base_is_refused(adapter):
    folder, model = adapter
    assert "another base" in sentence_of(ModelError, load_adapter, folder, model, "0" * 64, 0.0)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    assert "instead of [3, 24]" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    edit_tensors(folder, lambda t: t.update({Q.format("B"): np.zeros((7, 2), np.float32)}))
    assert "is [7, 2] instead of" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)


# Files of a base that lie (case 28)


def header_of(folder):
    content = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_header(folder, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + data)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "length"),
    [
        (lambda h: h[NORM].update(data_offsets=[0, 96]), None),
        (lambda h: h[NORM].update(data_offsets=[2**62, 2**62 + 96]), None),
        (lambda h: h[NORM].update(data_offsets=[-96, 0]), None),
        (lambda h: h[NORM].update(data_offsets=[96, 0]), None),
        (lambda h: h[NORM].update(shape=[2**63, 2**63]), None),
        (lambda h: h[NORM].update(dtype="F7"), None),
        (lambda h: h[NORM].update(dtype="I32"), None),
        (lambda h: h[NORM].pop("dtype"), None),
        (lambda h: h.update(x=[]), None),
        (lambda h: None, 2**63),
        (lambda h: None, 2**64 - 1),
        (lambda h: None, 2**27),
        (lambda h: b"[" * 100_000, None),
        (lambda h: b"\xff\xfe{}", None),
        (lambda h: b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}', None),
    ],
    ids=(
        "overlap out-of-file negative backwards overflow unknown-dtype integers no-dtype no-tensor "
        "length-2^63 length-2^64 length-128M deep not-utf8 torn"
    ).split(),
)
def test_case_28_safetensors_header_that_lies_is_refused(base, tmp_path, change, length):
    folder = copy_folder(base, tmp_path / "bad")
    header, data = header_of(folder)
    changed = change(header)
    write_header(folder, changed if isinstance(changed, bytes) else header, data, length)

    def read():
        source = open_source(folder)
        check_names(parse_config(source.config, "bad"), source.shapes, "bad")
        source.read(NORM)

    assert "bad/model.safetensors" in sentence_of(ModelError, read)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": ' + b"7" * 5000 + b"}", b"\xff", b"[]", b"", b'{"model_type": "llama"}']
)
def test_case_28_config_of_a_base_that_is_broken_is_refused(base, tmp_path, content):
    folder = copy_folder(base, tmp_path / "bad")
    write(folder / "config.json", content)
    sentence_of(ModelError, lambda: parse_config(open_source(folder).config, "bad"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**400), ("rms_norm_eps", 10**400), ("hidden_size", True),
        ("architectures", [[]]), ("architectures", [{}]), ("model_type", []), ("rope_scaling", {"rope_type": [1]}),
        ("vocab_size", -1), ("auto_map", {"AutoModel": "evil.Model"}),
    ],
)  # fmt: skip
def test_case_28_config_of_a_base_with_a_crafted_value_is_refused(base, key, value):
    source = open_source(base)
    began = time.monotonic()

    def read():
        check_names(parse_config(source.config | {key: value}, "bad"), source.shapes, "bad")

    sentence_of(ModelError, read)
    assert time.monotonic() - began < 1  # no table of a billion layers


def test_case_28_pickles_are_not_read(tmp_path, base):
    folder = copy_folder(base, tmp_path / "bad")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "convert it to safetensors" in sentence_of(ModelError, open_source, folder)


# Configs (case 28)

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
        ("a: 2020-99-99", "a value that can not be read"),
        ("a: !!int x", "a value that can not be read"),
        ("a: !!timestamp x", "a value that can not be read"),
        ("a: " + "7" * 5000, "a value that can not be read"),
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


# Chat templates (case 28)

TEMPLATES = {
    "range": "{{ range(10**9) }}",
    "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch planted') }}",
    "change": "{{ messages.append(1) }}",
}
GREEDY = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "repeat": "{{ 'a' * 10 ** 11 }}",
    "width": "{{ '{:>99999999999}'.format(1) }}",
    "filter": "{{ 'a' | center(10 ** 11) }}",
    "text": "{{ 'a' * 10 ** 8 }}",
}
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("name", [*TEMPLATES, *GREEDY])
def test_case_28_chat_template_runs_in_a_bounded_sandbox(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    template = write(tmp_path / "evil.jinja", (TEMPLATES.get(name) or GREEDY[name]).encode())
    tokenizer = load_tokenizer(base, str(template))
    began = time.monotonic()
    error, words = (DataError, "refuses the messages") if name in TEMPLATES else (ConfigError, "takes more than")
    message = sentence_of(error, tokenizer.render, MESSAGES, add_generation_prompt=True)
    assert f"the chat template {words}" in message
    assert time.monotonic() - began < 20 and not Path("planted").exists()
    assert load_tokenizer(base, "llama2").render(MESSAGES, add_generation_prompt=True) == "<s>[INST] a [/INST]"


# Paths that lead out (case 29)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", ".", "", "a\0b", "a/model"])
def test_case_29_index_that_names_a_file_elsewhere_is_refused(base, tmp_path, name):
    folder = copy_folder(base, tmp_path / "bad")
    (folder / WEIGHTS).rename(tmp_path / "secret")  # beside the weights the index would not be read
    (folder / INDEX).write_text(json.dumps({"weight_map": {NORM: name}}))
    sentence_of(ModelError, open_source, folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_case_29_link_out_of_the_folder_is_refused_but_the_hubs_cache_works(base, tmp_path, name):
    def read(folder):
        open_source(folder)
        load_tokenizer(folder, None)

    cache = tmp_path / "models--owner--name"
    snapshot = copy_folder(base, cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    (snapshot / name).rename(cache / "blobs" / "123")
    (snapshot / name).symlink_to("../../blobs/123")
    read(snapshot)
    (tmp_path / "link").symlink_to(snapshot)  # the folder itself is the user's to name
    read(tmp_path / "link")

    folder = copy_folder(base, tmp_path / "bad")
    for target in ("../secret", str(tmp_path / "secret"), name):
        (folder / name).rename(tmp_path / "secret") if not (tmp_path / "secret").exists() else None
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        assert f"bad/{name}: " in sentence_of(ModelError, read, folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_case_29_adapter_of_links_or_pipes_is_refused(adapter, tmp_path, name):
    folder, model = adapter
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    assert "outside its folder" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would wait for ever
    assert "not a regular file" in sentence_of(ModelError, load_adapter, folder, model, "f" * 64, 0.0)


# Secrets (case 30)

SECRETS = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted01",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret",
    "DATABASE_PASSWORD": "planted-password",
}


def test_case_30_secrets_of_the_environment_are_in_nothing_that_a_run_writes(base, tmp_path, monkeypatch, capfd):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    data = {"format": "completion", "max_length": 32}
    rows = make_completions(tmp_path / "rows.jsonl", 8)
    config = write_config(tmp_path / "run.yaml", base, rows, tmp_path / "run", data=data, training={"max_steps": 1})
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
def test_case_30_config_that_holds_a_secret_is_refused_without_telling_it(base, tmp_path, monkeypatch, key, value):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS_SECRET_ACCESS_KEY"])
    config = write_config(tmp_path / "run.yaml", base, tmp_path / "rows.jsonl", tmp_path / "run")
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


def test_resolved_config_of_the_tests_still_loads(base, tmp_path):
    """The dump that a run writes is read back by the same rules."""
    config = load_config(write_config(tmp_path / "run.yaml", base, tmp_path / "rows.jsonl", tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(config.dump_yaml())
    assert isinstance(config, Config) and run_config(tmp_path) == config
    assert yaml.safe_load(config.dump_yaml()) == config.model_dump()
