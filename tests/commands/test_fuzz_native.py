"""Made-up files for libraries in C++ and Rust: whatever they do to those, a command ends well or in one sentence.

Files are opened in processes of their own, many in each; one that a process dies of is named. A few inputs by default;
the campaign of ten thousand of each kind, in four parts with a seed each, is

    [JLORA_FUZZ_SEED=N] [JLORA_FUZZ_COUNT=N] pytest tests/commands/test_fuzz_native.py -m slow

and prints a line for each part.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import opens_files
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from made_up import FEW, MANY, PARTS, SEED, campaign, changed, damaged, peak
from tiny import make_tokenizer

from jlora import errors
from jlora.data import tables, tokens
from jlora.errors import DataError, ModelError
from jlora.files import sandbox


class Opener:
    """A process that opens files, and another one after its death.

    Attributes:
      deaths: how often it died where a command would not, having tried the file in a process of its own.
    """

    def __init__(self, kind: str, log: Path):
        self._kind, self._log, self._process = kind, log, None
        self.deaths = 0

    def __call__(self, path: Path) -> None:
        """Open a file as a command does; raises what the command would."""
        if self._process is None:
            command = [sys.executable, opens_files.__file__, self._kind]
            environment = os.environ | {"PYTHONFAULTHANDLER": "", "RAYON_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
                )
        self._process.stdin.write(json.dumps(str(path)).encode() + b"\n")
        self._process.stdin.flush()
        last = None
        for line in self._process.stdout:
            match json.loads(line):
                case ["read"]:
                    return
                case ["refused", name, words]:
                    raise getattr(errors, name)(words)
                case ["raised", trace]:
                    raise AssertionError(f"{path}: {trace}")
                case [last]:
                    continue
        code = self.close()
        kept = path.with_name(f"killer-{path.name}")
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, kept)
        assert last == "trying", f"{kept}: the process that opened it ended with {code}; {self._log.read_text()[-500:]}"
        shutil.rmtree(kept, ignore_errors=True)
        self.deaths += 1
        opens_files.USES[self._kind](str(path))  # the command itself, which tries it apart and lives on

    def close(self) -> int:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return 0
        process.stdin.close()
        process.stdout.close()
        return process.wait()


@st.composite
def flipped(draw, content: bytes) -> bytes:
    """Bytes with a few replaced, so that lengths still fit, or cut; half of them near the end, where a footer is."""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        last = len(content) - 1
        at = draw(st.integers(0, last) | st.integers(max(0, last - 1500), last))
        new = draw(st.sampled_from([bytes([content[at] ^ 1 << bit]) for bit in range(8)]) | NEW_BYTES)
        content = content[:at] + new + content[at + len(new) :]
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 29)) == 0 else content


NEW_BYTES = st.binary(min_size=1, max_size=4) | st.sampled_from(
    [number.to_bytes(size, "little", signed=number < 0) for size in (4, 8) for number in (-1, 0, 1, 255, 2**31 - 1)]
)


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def of(*kinds: str) -> list[dict]:
    return [{"type": kind} for kind in kinds]


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 30}
SPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True}
NAMED = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
SPECIAL = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
# What a tokenizer.json may consist of, and what it calls several in a row.
NORMALIZERS = [
    REPLACE, *of("NFC", "NFKD", "Nmt", "Lowercase", "StripAccents"), {"type": "Prepend", "prepend": "▁"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Strip", "strip_left": True, "strip_right": True},
]  # fmt: skip
PRE_TOKENIZERS = [
    BYTES, SPACE, split("(a+)+$"), split("\\s+|\\d"), *of("BertPreTokenizer", "Whitespace", "UnicodeScripts"),
    {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"},
]  # fmt: skip
DECODERS = [
    REPLACE, SPACE, BYTES, *of("ByteFallback", "Fuse"), {"type": "WordPiece", "prefix": "#", "cleanup": True},
    {"type": "Strip", "content": "a", "start": 1, "stop": 1},
]  # fmt: skip
PROCESSORS = [
    BYTES, ROBERTA | {"add_prefix_space": True},
    {"type": "TemplateProcessing", "single": NAMED, "pair": NAMED, "special_tokens": SPECIAL},
]  # fmt: skip
MODELS = [
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁", -2.0]], "byte_fallback": True},
    {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}
    | {"vocab": {"a": 0}},
    {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 0, "b": 1}},
]
PARTS_OF = {
    "normalizer": ("normalizers", NORMALIZERS), "pre_tokenizer": ("pretokenizers", PRE_TOKENIZERS),
    "decoder": ("decoders", DECODERS), "post_processor": ("processors", PROCESSORS), "model": ("", MODELS),
}  # fmt: skip


def tokenizers(folder: Path):
    good = folder / "good"
    make_tokenizer(good)
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    content = {name: (good / name).read_bytes() for name in names if (good / name).is_file()}
    trees = {name: json.loads(text) for name, text in content.items()}
    specials = trees["tokenizer.json"]["added_tokens"]

    @st.composite
    def inputs(draw):
        name = draw(st.sampled_from(["tokenizer.json"] * 3 + list(trees)))
        tree = trees[name]
        if name == "tokenizer.json":
            tree = dict(tree)
            for key in draw(st.sets(st.sampled_from(list(PARTS_OF)), max_size=2)):
                several, parts = PARTS_OF[key]
                some = draw(st.lists(st.sampled_from(parts), min_size=1, max_size=4))
                tree[key] = some[0] if key == "model" else {"type": "Sequence", several: some}
            tree["added_tokens"] = draw(st.sampled_from([specials, specials, specials[1:], specials * 2]))
        tree = draw(st.just(tree) | changed(tree))
        written = json.dumps(tree, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        return name, draw(st.just(written) | damaged(written))

    def write(drawn) -> Path:
        shutil.rmtree(folder / "bad", ignore_errors=True)
        (folder / "bad").mkdir()
        for name, text in (content | dict([drawn])).items():
            (folder / "bad" / name).write_bytes(text)
        return folder / "bad"

    return "tokenizer", inputs(), write, ModelError


def some_rows() -> pyarrow.Table:
    """Texts, numbers, lists and structs, some of them missing, and a dictionary."""
    turns = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * i}] for i in range(8)]
    return pyarrow.table({
        "prompt": [f"{i}:" for i in range(8)],
        "completion": pyarrow.array(["x", None, "é", "", "x", "y", "☃", "x"]).dictionary_encode(),
        "messages": turns,
        "id": [1, None, 3, 4, 5, 6, 7, 8],
        "score": [0.5] * 8,
        "good": [True, False] * 4,
    })  # fmt: skip


def arrow(folder: Path):
    datasets.Dataset(some_rows()).save_to_disk(folder / "bad")
    names = [path.name for path in (folder / "bad").iterdir()]
    content = {name: (folder / "bad" / name).read_bytes() for name in names}
    trees = {name: json.loads(text) for name, text in content.items() if name.endswith(".json")}
    (file,) = (name for name in names if name.endswith(".arrow"))

    @st.composite
    def inputs(draw):
        if draw(st.integers(0, 3)):
            return file, draw(flipped(content[file]))
        name = draw(st.sampled_from(list(trees)))
        return name, draw(damaged(json.dumps(draw(changed(trees[name]))).encode("utf-8", "surrogatepass")))

    def write(drawn) -> Path:
        for name, text in (content | dict([drawn])).items():
            (folder / "bad" / name).unlink(missing_ok=True)  # it may be mapped
            (folder / "bad" / name).write_bytes(text)
        return folder / "bad"

    return "rows", inputs(), write, DataError


def parquet(folder: Path):
    contents = []
    for options in ({}, {"compression": "zstd"}, {"use_dictionary": False, "data_page_version": "2.0"}):
        pyarrow.parquet.write_table(some_rows(), folder / "good.parquet", row_group_size=5, **options)
        contents.append((folder / "good.parquet").read_bytes())

    def write(drawn) -> Path:
        (folder / "bad.parquet").write_bytes(drawn)
        return folder / "bad.parquet"

    return "rows", st.sampled_from(contents).flatmap(flipped), write, DataError


TARGETS: dict[str, Callable] = {"tokenizers": tokenizers, "arrow": arrow, "parquet": parquet}


@pytest.fixture
def used(tmp_path, monkeypatch):
    """A campaign of a target, and its line of figures."""
    monkeypatch.setattr(sandbox, "FILE_SECONDS", int(opens_files.SECONDS))
    monkeypatch.setattr(tokens, "_survived", set())
    monkeypatch.setattr(tables, "_survived", set())
    opened = []

    def use(name: str, count: int, number: int = 0) -> str:
        kind, inputs, write, error = TARGETS[name](tmp_path)
        opener = Opener(kind, tmp_path / "log")
        opened.append(opener)
        line = campaign(name, (inputs, lambda drawn: opener(write(drawn)), error), count, number)
        return f"{line}; {opener.deaths} crashes, each in a process apart"

    yield use
    for opener in opened:
        opener.close()


def test_file_that_a_process_dies_of_is_kept_and_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(AssertionError, match=r"killer-a\.parquet: the process that opened it ended with -6"):
        Opener("abort", tmp_path / "log")(tmp_path / "a.parquet")
    assert (tmp_path / "killer-a.parquet").read_bytes() == b"x"


@pytest.mark.long
@pytest.mark.parametrize("name", TARGETS)
def test_made_up_file_ends_well_or_in_one_sentence(name, used):
    used(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", TARGETS)
def test_campaign(name, part, used, capsys):
    line = used(name, MANY // PARTS, SEED * PARTS + part)
    with capsys.disabled():
        print(f"\n{line}, peak {peak()} MiB")
