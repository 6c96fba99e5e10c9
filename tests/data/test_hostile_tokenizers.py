"""Tokenizer folders that mean harm end in one sentence, whatever they do to the library that reads them."""

import json
import os

import pytest
from command_line import sentence_of
from data_files import write
from tiny import copy_folder, make_tokenizer

from jlora.data import tokens
from jlora.data.tokens import load_tokenizer
from jlora.errors import ConfigError, DataError, ModelError
from jlora.files import sandbox


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def changed(good, tmp_path):
    """A copy of the good folder with another part of its tokenizer.json or tokenizer_config.json."""

    def make(config=None, **parts):
        folder = copy_folder(good, tmp_path / "bad")
        for name, new in (("tokenizer.json", parts), ("tokenizer_config.json", config or {})):
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            (folder / name).write_text(json.dumps(content | new), encoding="utf-8")
        return folder

    return make


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TENFOLD = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
TEMPLATE = [{"SpecialToken": {"id": "absent", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
KILLERS = {
    "memory": {"normalizer": {"type": "Sequence", "normalizers": [TENFOLD] * 14}},
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAAEAAAACAAAA"}},
    "regex": {"pre_tokenizer": split("(a+)+$|(?=(a|a|aa)+b)x")},
    "template": {
        "post_processor": {"type": "TemplateProcessing", "single": TEMPLATE, "pair": TEMPLATE, "special_tokens": {}}
    },
    "empty": {"model": {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}},
    "nonsense": {"model": []},
}


@pytest.mark.parametrize("name", KILLERS)
def test_tokenizer_that_aborts_or_panics_is_refused_in_one_sentence(changed, monkeypatch, name):
    monkeypatch.setattr(sandbox, "FILE_BYTES", 2**29)
    folder = changed(**KILLERS[name])
    assert str(folder) in sentence_of(ModelError, load_tokenizer, folder, None)


def test_tokenizer_that_hangs_is_stopped(changed, monkeypatch):
    monkeypatch.setattr(sandbox, "FILE_SECONDS", 1)
    folder = changed(normalizer={"type": "Sequence", "normalizers": [TENFOLD] * 7})
    assert "more than 1 seconds or 2 GiB" in sentence_of(ModelError, load_tokenizer, folder, None)


def test_tokenizer_that_panics_on_a_text_of_the_rows_alone_is_named(changed):
    """The text that is tried first cannot have everything in it."""
    tokenizer = load_tokenizer(changed(pre_tokenizer=split("(z+)+$|(?=(z|z|zz)+b)x")), None)
    for encode, text in ((tokenizer.encode, "z" * 40 + "!"), (tokenizer.encode_all, ["z" * 40 + "!"])):
        assert "the tokenizer fails on a text (" in sentence_of(ModelError, encode, text)
    assert tokenizer.encode("a b")


@pytest.mark.parametrize(
    "config", [{"model_max_length": "x"}, {"chat_template": 5}, {"chat_template": {"default": ["x"]}}], ids=str
)
def test_tokenizer_config_of_other_types_is_refused_in_one_sentence(changed, config):
    sentence_of(ModelError, load_tokenizer, changed(config), None)


def test_tokenizer_is_tried_once_in_a_process(good, monkeypatch):
    """By its content: a process each time would be felt."""
    calls = []
    monkeypatch.setattr(tokens, "tried", lambda *given, **more: calls.append(given))
    monkeypatch.setattr(tokens, "_survived", set())
    assert load_tokenizer(good, None).digest == load_tokenizer(good, None).digest
    assert len(calls) == 1


def test_tokens_drawn_at_random_are_switched_off_with_a_warning(changed, good, capsys):
    content = json.loads((good / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = content["vocab"] | {"ab": 300, "abc": 301, "abcd": 302}
    merges = [["a", "b"], ["ab", "c"], ["abc", "d"]]
    tokenizer = load_tokenizer(changed(model=content | {"vocab": vocab, "merges": merges, "dropout": 0.5}), None)
    assert "(dropout 0.5); taken as 0" in capsys.readouterr().err
    assert [tokenizer.encode("abcd") for _ in range(20)] == [[302]] * 20
    assert tokenizer.encode_all(["abcd"] * 20) == [[302]] * 20


def test_nothing_is_read_through_links_that_transformers_would_follow(changed, tmp_path):
    folder = changed()
    (folder / "additional_chat_templates").mkdir()
    write(tmp_path / "secret", b"SECRET")
    (folder / "additional_chat_templates" / "default.jinja").symlink_to(tmp_path / "secret")
    assert load_tokenizer(folder, None).chat_template is None


def test_pipe_among_the_templates_is_not_waited_for(changed):
    folder = changed()
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "default.jinja")
    assert load_tokenizer(folder, None).chat_template is None


def test_chat_template_is_a_regular_file_of_bounded_size(good, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    long = write(tmp_path / "long", b"x" * (2**20 + 1))
    for path in (tmp_path / "pipe", "/dev/zero", long, tmp_path):
        assert "chat template" in sentence_of(ConfigError, load_tokenizer, good, str(path))
    crlf = write(tmp_path / "crlf", b"a\r\nb")
    assert load_tokenizer(good, str(crlf)).chat_template == "a\nb"


def test_template_that_renders_half_a_surrogate_pair_is_refused(good, tmp_path):
    template = write(tmp_path / "half.jinja", b"{{ '\\ud800' }}")
    tokenizer = load_tokenizer(good, str(template))
    message = sentence_of(DataError, tokenizer.render, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert "the chat template refuses the messages" in message
