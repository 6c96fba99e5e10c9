"""Input made up at random: whatever stands in a file, a command ends well or with one sentence and its exit code.

Each target calls what the commands call. A hundred inputs each, always the same ones, by default; the campaign of
ten thousand each, in four parts with a seed each, is

    [JLORA_FUZZ_SEED=N] [JLORA_FUZZ_COUNT=N] pytest tests/commands/test_fuzz.py -m slow

and prints a line for each part.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from gguf_families import make as make_gguf
from gguf_files import SPM
from gguf_files import write as write_gguf
from hypothesis import strategies as st
from made_up import EVIL_BYTES, FEW, MANY, PARTS, SEED, campaign, changed, damaged, peak, values, words
from report_pages import SUMMARY, make_run
from tiny import make_llama, make_tokenizer

from jlora.config import Config, DataSection, LoraSection, load_config
from jlora.data.encoding import tokenize
from jlora.data.tokens import CHAT_TEMPLATES, load_tokenizer
from jlora.errors import ConfigError, DataError, ModelError
from jlora.files import manifest
from jlora.hf.adapters import find_adapter, run_config
from jlora.hf.architecture import parse_config
from jlora.hf.peft import load_adapter, save_adapter
from jlora.hf.pretrained import open_tokenizer
from jlora.hf.source import base_fingerprint, check_names, open_source
from jlora.model.adapter_init import new_adapter
from jlora.reports.page import write_page
from jlora.reports.run import write_report
from jlora.reports.runs import compare, described
from jlora.training.checkpoint import Checkpoints

# The targets: a strategy of inputs, and what a command does with one; the second returns nothing or raises.


def rows(base: Path, folder: Path):
    plain = load_tokenizer(base, None)
    chat = replace(plain, chat_template=CHAT_TEMPLATES["llama2"])
    names = ("prompt", "completion", "text", "messages", "role", "content", "instruction", "output", "input")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = {
        "completion": {"prompt": "a", "completion": "b"},
        "text": {"text": "a"},
        "alpaca": {"instruction": "a", "input": "", "output": "b"},
        "messages": {"messages": turns},
    }

    @st.composite
    def inputs(draw):
        kind, format = draw(st.sampled_from(["jsonl", "json", "csv"])), draw(st.sampled_from(list(good)))
        row = st.just(good[format]) | changed(good[format]) | values(*names)
        drawn = draw(st.lists(row, min_size=1, max_size=5))
        if kind == "csv":
            lines = [
                ",".join(good[format]),
                *(",".join(map(str, r.values())) for r in drawn if isinstance(r, dict)),
            ]
            content = "\n".join(lines).encode("utf-8", "surrogatepass")
        elif kind == "json" and draw(st.booleans()):
            content = json.dumps(drawn, indent=draw(st.none() | st.just(1))).encode()
        else:
            ends = st.sampled_from([b"\n", b"\r\n", b" \n\n"])
            content = b"".join(json.dumps(r).encode() + draw(ends) for r in drawn)
        content = draw(st.binary(max_size=60) if draw(st.integers(0, 19)) == 0 else damaged(content))
        section = {"train": "unused", "format": format, "max_length": draw(st.sampled_from([2, 8, 64, 512]))}
        for key, choices in (
            ("prompt", ["stanford", "chat"]), ("on_bad_row", ["error", "skip"]), ("train_on", ["response", "all"])
        ):  # fmt: skip
            section[key] = draw(st.sampled_from(choices))
        return kind, content, section

    def use(drawn):
        kind, content, section = drawn
        (folder / f"rows.{kind}").write_bytes(content)
        try:
            dataset = tokenize(str(folder / f"rows.{kind}"), chat, DataSection.model_validate(section))
            used = len(set(dataset.places))  # a long text is several examples of one place
            assert dataset.read == used + sum(dataset.dropped.values()) and len(dataset.places) == len(dataset.examples)
            assert all(example.trained[1:].any() for example in dataset.examples)
        except DataError as error:
            # It names the file, and a line or row of it unless there is none.
            assert re.search(rf"rows\.{kind}(:\d+| ?: row \d+)?", str(error))
            raise

    return inputs(), use, DataError


def configs(base: Path, folder: Path):
    root = Path(__file__).parents[2]
    trees = [yaml.safe_load(path.read_text()) for path in sorted((root / "configs").glob("*.yaml"))]
    whole = Config.model_validate({"model": {"path": "a"}, "data": {"train": "b"}, "output_dir": "c"}).model_dump()

    @st.composite
    def inputs(draw):
        tree = draw(st.sampled_from([*trees, whole]).flatmap(changed))
        tree = tree if draw(st.integers(0, 9)) else draw(values(*whole))
        text = json.dumps(tree) if draw(st.booleans()) else yaml.safe_dump(tree, allow_unicode=draw(st.booleans()))
        content = draw(damaged(text.encode("utf-8", "surrogatepass")))
        key = (
            st.sampled_from(["model.path", "lora.rank", "training", "data.eval", "a", "lora.rank.x", "", "."]) | words()
        )
        value = values().map(json.dumps) | words() | st.sampled_from(EVIL_BYTES).map(lambda b: b.decode("latin-1"))
        good = st.sampled_from(["lora.rank=2", "data.eval=0.1", "training={}", "training.max_steps=null"])
        overrides = draw(st.lists(good | good | st.tuples(key, value).map("=".join) | words(), max_size=2))
        return content, overrides

    def use(drawn):
        content, overrides = drawn
        (folder / "run.yaml").write_bytes(content)
        config = load_config(folder / "run.yaml", overrides)
        (folder / "config.yaml").write_text(config.dump_yaml(), encoding="utf-8")
        assert load_config(folder / "config.yaml") == config

    return inputs(), use, ConfigError


def header_of(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@st.composite
def tensor_file(draw, content: bytes) -> bytes:
    """A safetensors file with its header changed as JSON, its bytes damaged, its length or its end cut."""
    header, data = header_of(content)
    how = draw(st.integers(0, 3))
    text = json.dumps(draw(changed(header)) if how else header).encode("utf-8", "surrogatepass")
    if how in (0, 3):
        text = draw(damaged(text))
    length = draw(st.sampled_from([len(text)] * 50 + [0, 1, len(text) - 1, len(text) + 1, 2**27, 2**63, 2**64 - 1]))
    data = data if draw(st.integers(0, 9)) else draw(damaged(data[:200]))
    return max(0, length).to_bytes(8, "little") + text + data


def headers(base: Path, folder: Path):
    content, model = (base / "model.safetensors").read_bytes(), json.loads((base / "config.json").read_text())
    shard = "model-00001-of-00001.safetensors"  # beside model.safetensors no index is read
    index = {"weight_map": dict.fromkeys(header_of(content)[0], shard)}

    @st.composite
    def inputs(draw):
        files = {"model.safetensors": draw(tensor_file(content))}
        if draw(st.integers(0, 3)) == 0:
            files["config.json"] = draw(damaged(json.dumps(draw(changed(model))).encode("utf-8", "surrogatepass")))
        if draw(st.integers(0, 3)) == 0:
            files[shard] = files.pop("model.safetensors")
            files["model.safetensors.index.json"] = draw(damaged(json.dumps(draw(changed(index))).encode()))
        return files

    def use(drawn):
        for name in ("model.safetensors", shard, "model.safetensors.index.json"):
            (folder / name).unlink(missing_ok=True)
        for name, written in ({"config.json": json.dumps(model).encode()} | drawn).items():
            (folder / name).write_bytes(written)
        source = open_source(folder)
        cfg = parse_config(source.config, str(folder))
        base_fingerprint(source)
        for name, entry in check_names(cfg, source.shapes, str(folder)).items():
            assert source.read(name).shape == entry.hf_shape

    return inputs(), use, ModelError


def adapters(base: Path, folder: Path):
    model = parse_config(open_source(base).config, "base")
    lora = LoraSection(rank=2, target_modules=["q_proj", "v_proj"])
    made = new_adapter(lora, model, 0)
    save_adapter(folder / "good", made, lora, "base", "f" * 64)
    weights = (folder / "good" / "adapter_model.safetensors").read_bytes()
    config = json.loads((folder / "good" / "adapter_config.json").read_text())

    @st.composite
    def inputs(draw):
        both = draw(st.integers(0, 2))
        written = json.dumps(draw(changed(config)) if both != 1 else config).encode()
        return draw(damaged(written)) if both == 2 else written, draw(tensor_file(weights)) if both != 0 else weights

    def use(drawn):
        for name, content in zip(("adapter_config.json", "adapter_model.safetensors"), drawn, strict=True):
            (folder / name).write_bytes(content)
        load_adapter(find_adapter(str(folder)), model, "f" * 64, 0.0)

    return inputs(), use, ModelError


def ggufs(base: Path, folder: Path):
    """Of a plain Llama and of families whose metadata say more."""
    write_gguf(folder / "plain.gguf", tokenizer=SPM)
    families = ("llama3", "gemma3", "phi3_longrope")
    for name in families:
        make_gguf(folder / f"{name}.gguf", name)
    goods = []
    for name in ("plain", *families):
        content = (folder / f"{name}.gguf").read_bytes()
        end = content.index(b"output_norm.weight") + 2000  # behind it there is little but data
        goods.append((content[:end], content[end:]))

    def use(drawn):
        number, head = drawn
        (folder / "bad.gguf").write_bytes(head + goods[number][1])  # here: hypothesis holds on to all that was drawn
        source = open_source(folder / "bad.gguf")
        check_names(source.model, source.shapes, "bad.gguf")
        base_fingerprint(source)
        open_tokenizer(str(folder / "bad.gguf"), None).encode("hello é")

    return st.one_of(*(st.tuples(st.just(i), damaged(head)) for i, (head, _) in enumerate(goods))), use, ModelError


def runs(base: Path, folder: Path):
    """Run folders, for all that reads them but a run that goes on; the facts of a right manifest are believed."""
    run, kept = make_run(folder / "run", 1.0, 8), folder / "run" / "checkpoints"
    config = {"model": {"path": "base"}, "data": {"train": "rows.jsonl"}, "output_dir": "run"}
    (run / "config.yaml").write_text(Config.model_validate(config).dump_yaml(), encoding="utf-8")
    (run / "samples.json").write_text(json.dumps({"samples": SUMMARY["samples"]}), encoding="utf-8")
    for step in (1, 2):
        (kept / str(step) / "state").mkdir(parents=True)
        (kept / str(step) / "state" / "a").write_bytes(b"array")
        manifest.write(kept / str(step), {"step": step, "eval_loss": 1.0 / step})
    checkpoints = Checkpoints(kept, 1, read_only=True)
    names = ("config.yaml", "metrics.jsonl", "summary.json", "samples.json", "checkpoints/2/manifest.json")
    good = {name: (run / name).read_bytes() for name in names}
    tree = {
        "config.yaml": yaml.safe_load(good["config.yaml"]),
        "metrics.jsonl": json.loads(good["metrics.jsonl"].splitlines()[3]),
        **{name: json.loads(good[name]) for name in names[2:]},
    }

    @st.composite
    def inputs(draw):
        name = draw(st.sampled_from(names))
        written = json.dumps(draw(changed(tree[name]))).encode("utf-8", "surrogatepass")
        if name == names[-1] and draw(st.booleans()):  # of right form, and with a digest that is right
            content = json.loads(good[name])["content"]
            content["files"] = draw(changed(content["files"]) | values(*content["files"]))
            written = manifest._render(content).encode("utf-8", "surrogatepass")
        if name == "metrics.jsonl":
            written = good[name] + written + b"\n"
        return name, draw(damaged(written))

    def use(drawn):
        for name, content in (good | dict([drawn])).items():
            (run / name).write_bytes(content)
        described(run)
        write_page(folder / "report.html", compare([run, run]))
        write_report(run, folder / "report.html")
        assert checkpoints.newest_whole() in (1, 2) and checkpoints.best() in (1, 2)
        assert run_config(run) is not None

    return inputs(), use, ModelError


TARGETS: dict[str, Callable] = {
    "rows": rows, "configs": configs, "headers": headers, "adapters": adapters, "ggufs": ggufs, "runs": runs,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The smallest base, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "base"
    make_llama(folder, hidden_size=24, intermediate_size=24, num_hidden_layers=1, vocab_size=270)
    make_tokenizer(folder, 270)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_made_up_input_ends_well_or_in_one_sentence(name, base, tmp_path):
    campaign(name, TARGETS[name](base, tmp_path), FEW)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", TARGETS)
def test_campaign(name, part, base, tmp_path, capsys):
    line = campaign(name, TARGETS[name](base, tmp_path), MANY // PARTS, SEED * PARTS + part)
    with capsys.disabled():
        print(f"\n{line}, peak {peak()} MiB")
