"""Ids and loss masks against references made here with transformers and sentencepiece directly."""

import datetime
import itertools
import json
import pickle
import shutil
from functools import cache

import numpy as np
import pytest
from shared_data import SHARED, needs_data, read_rows

from jlora.config import Counted
from jlora.data.prompts import encode_prompt, encode_row
from jlora.data.rows import BadRow
from jlora.data.tokens import CHAT_TEMPLATES, load_tokenizer
from jlora.errors import ConfigError, DataError, ModelError

pytestmark = needs_data

FOLDERS = ("llama2_tokenizer", "mistral_v1_tokenizer", "stories260K")
ODD_TEXTS = (
    " one space before", "   three", "two  and   three    four", "tab\tand\r\nreturn", "\n\nlines\n",
    " ", "\n",
    "naïve café, \u201cquotes\u201d \u2026", "\u65e5\u672c\u8a9e", "\U0001f999 \U0001f469\u200d\U0001f467",
    "e\u0301 combining, \u00a0 no-break, \u200b zero width", "العربية", "x" * 300, "a\x00b\x01",
    "\uff11\uff12 \ufb01 ligature", "if x:\n    return  [1, 2]\n", "ends with space ",
)  # fmt: skip
USER = {"role": "user", "content": "Name a colour."}
ANSWER = {"role": "assistant", "content": "Blue."}
HUMAN = {"from": "human", "value": USER["content"]}


@cache
def instruction_rows():
    return read_rows("instruct/alpaca_libre.jsonl") + read_rows("instruct/seed_tasks_alpaca.jsonl")


@cache
def texts():
    stories = [row["text"] for row in read_rows("tinystories/stories_valid.jsonl")]
    return [text for row in instruction_rows() for text in row.values()] + stories + list(ODD_TEXTS)


@cache
def conversations():
    """Every instruction row once, in one to three rounds, every other conversation with a system turn."""
    rows, found = iter(instruction_rows()), []
    for rounds in itertools.cycle((1, 2, 3)):
        turns = [{"role": "system", "content": " Answer shortly.\n"}] if len(found) % 2 else []
        for row in itertools.islice(rows, rounds):
            turns.append({"role": "user", "content": row["instruction"] + "\n" + row["input"]})
            turns.append({"role": "assistant", "content": row["output"]})
        if turns[-1:] != [] and turns[-1]["role"] == "assistant":
            found.append(turns)
        else:
            return found


@cache
def ours(name="llama2_tokenizer", chat_template=None):
    return load_tokenizer(SHARED / name, chat_template)


@cache
def theirs(name="llama2_tokenizer"):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / name)


@cache
def sentencepiece(name):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(SHARED / name / "tokenizer.model"))


@pytest.fixture(scope="module")
def model_only(tmp_path_factory):
    """Folders that hold nothing but a tokenizer.model."""
    folders = {}
    for name in FOLDERS:
        folders[name] = tmp_path_factory.mktemp(name)
        shutil.copy(SHARED / name / "tokenizer.model", folders[name])
    return folders


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """The Llama-2 tokenizer with ChatML's two tokens, of which <|im_end|> is EOS."""
    folder = tmp_path_factory.mktemp("chatml")
    content = json.loads((SHARED / "llama2_tokenizer/tokenizer.json").read_text(encoding="utf-8"))
    for i, token in enumerate(("<|im_start|>", "<|im_end|>"), 32000):
        content["added_tokens"].append(content["added_tokens"][2] | {"id": i, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATES["chatml"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder, None)


def encode(
    tokenizer, row, format="completion", prompt="stanford", train_on="response", train_on_eos="turn", reasoning="keep"
):
    counted = Counted(train_on, train_on_eos, reasoning)
    return encode_row(tokenizer, row, format=format, prompt=prompt, counted=counted)


def trained_text(tokenizer, example):
    return tokenizer.decode(example.ids[example.trained])


def assert_example(example, ids, trained):
    assert example.ids.dtype == np.int32 and example.trained.dtype == bool
    assert example.ids.tolist() == ids
    assert example.trained.tolist() == trained


# The whole of real data against a reference


def stanford_reference(tokenizer, row):
    source = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        if row["input"]
        else "Below is an instruction that describes a task. "
    )
    source += "Write a response that appropriately completes the request.\n\n"
    source += "### Instruction:\n" + row["instruction"]
    source += f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    source += "\n\n### Response:"
    ids = tokenizer(source + row["output"] + tokenizer.eos_token).input_ids
    masked = len(tokenizer(source).input_ids)
    return ids, masked


def test_stanford_rows_equal_the_reference():
    merged = 0
    for row in instruction_rows():
        ids, masked = stanford_reference(theirs(), row)
        example = encode(ours(), row, "alpaca")
        assert_example(example, ids, [False] * masked + [True] * (len(ids) - masked))
        prefix = encode_prompt(
            ours(), {k: row[k] for k in ("instruction", "input")}, format="alpaca", prompt="stanford"
        )
        assert len(prefix) == masked and prefix[:-1] == ids[: masked - 1]
        merged += prefix[-1] != ids[masked - 1]
    # The colon of "### Response:" and the first character of the response are one token in these.
    assert merged == 74 and len(instruction_rows()) == 823


@pytest.mark.long
def test_conversations_equal_apply_chat_template():
    template = CHAT_TEMPLATES["llama2"]

    def apply(messages, generation):
        return theirs().apply_chat_template(
            messages, chat_template=template, add_generation_prompt=generation, return_dict=False
        )

    assert sum(len(turns) // 2 for turns in conversations()) == 823
    for turns in conversations():
        ids, trained = apply(turns, False), []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                trained += [False] * (len(apply(turns[:i], True)) - len(trained))
                trained += [True] * (len(apply(turns[: i + 1], False)) - len(trained))
        assert_example(encode(ours(chat_template="llama2"), {"messages": turns}, "messages"), ids, trained)
        assert ids.count(1) == ids.count(2) == sum(turn["role"] == "assistant" for turn in turns)


def llama2_reference(turns):
    system = ""
    if turns[0]["role"] == "system":
        system, turns = f"<<SYS>>\n{turns[0]['content']}\n<</SYS>>\n\n", turns[1:]
    text = ""
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        text += f"<s>[INST] {(system + user['content']).strip()} [/INST] {assistant['content'].strip()} </s>"
        system = ""
    return text


def test_llama2_template_text():
    tokenizer = ours(chat_template="llama2")
    for turns in conversations():
        assert tokenizer.render(turns, add_generation_prompt=False) == llama2_reference(turns)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokenizer_model_alone_is_sentencepiece(name, model_only):
    tokenizer = load_tokenizer(model_only[name], None)
    for text in texts():
        expected = sentencepiece(name).encode(text)
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == sentencepiece(name).decode(expected)
    with_text = encode(tokenizer, {"text": "Once upon a time"}, "text").ids.tolist()
    assert with_text == [1, *sentencepiece(name).encode("Once upon a time"), 2]


@pytest.mark.long
@pytest.mark.parametrize("name", FOLDERS)
def test_tokenizer_json_and_model_agree(name, model_only):
    fast, alone = ours(name), load_tokenizer(model_only[name], None)
    for attribute in ("vocab_size", "bos_id", "eos_id", "add_bos", "bos_token", "eos_token", "chat_template"):
        assert getattr(fast, attribute) == getattr(alone, attribute), attribute
    literal = [
        "a</s>b <s> c  d",
        "<s>[INST] x [/INST] y </s><s>[INST] z",
        "<unk>",
        "</s></s> <s",
        "<<s>>",
        "▁ itself ▁▁",
    ]
    for text in [*texts(), *literal]:
        assert fast.encode(text) == alone.encode(text) == theirs(name).encode(text, add_special_tokens=False)
        assert fast.decode(fast.encode(text)) == alone.decode(alone.encode(text))


@pytest.mark.parametrize("name", FOLDERS)
def test_decode_undoes_encode(name):
    for text in texts():
        assert ours(name).decode(ours(name).encode(text)) == text


# BOS, EOS and the mask


def test_bos_and_eos_once():
    for text in ("<s>Hello", "Hello</s>", "<s>Hello</s>", "Hello"):
        example = encode(ours(), {"text": text}, "text")
        assert_example(example, [1, *ours().encode("Hello"), 2], [False, True, True])
    example = encode(ours(), {"prompt": "<s>Hi", "completion": " there</s>"})
    assert example.ids.tolist() == [1, *ours().encode("Hi there"), 2]
    assert example.trained.tolist() == [False, False, True, True]


def test_eos_is_trained_even_when_it_pads(tmp_path):
    shutil.copytree(SHARED / "llama2_tokenizer", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "</s>"}))
    padded = load_tokenizer(tmp_path, "llama2")
    for row in instruction_rows()[:50]:
        for prompt in ("stanford", "chat"):
            example = encode(padded, row, "alpaca", prompt)
            assert example.ids[-1] == padded.eos_id and example.trained[-1]


def test_row_without_bos(tmp_path):
    shutil.copy(SHARED / "llama2_tokenizer/tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tokenizer = load_tokenizer(tmp_path, None)
    assert not tokenizer.add_bos and tokenizer.bos_id == 1
    # Nothing comes before the first token, so it cannot be predicted.
    assert_example(encode(tokenizer, {"text": "Hello there"}, "text"), [15043, 727, 2], [False, True, True])


def test_train_on_all():
    rows = [
        ({"prompt": "a b", "completion": " c"}, "completion", "stanford"),
        (instruction_rows()[0], "alpaca", "stanford"),
        (instruction_rows()[0], "alpaca", "chat"),
        ({"messages": conversations()[2]}, "messages", "stanford"),
    ]
    for row, format, prompt in rows:
        example = encode(ours(chat_template="llama2"), row, format, prompt, "all")
        assert example.ids[0] == 1 and not example.trained[0] and example.trained[1:].all()
        assert example.ids.tolist() == encode(ours(chat_template="llama2"), row, format, prompt).ids.tolist()


def test_chatml_trains_the_end_of_turn_but_not_the_newline(chatml):
    system = {"role": "system", "content": "Be brief."}
    example = encode(chatml, {"messages": [system, USER, ANSWER, USER, ANSWER]}, "messages")
    turn = chatml.encode("<|im_start|>assistant\nBlue.<|im_end|>")
    response = turn[len(chatml.encode("<|im_start|>assistant\n")) :]
    assert example.ids[example.trained].tolist() == response * 2
    assert response[-1] == chatml.eos_id == 32001 and chatml.vocab_size == 32002
    assert 1 not in example.ids  # the template writes no BOS, and none is added
    assert not example.trained[-1]  # its newline


def test_alpaca_as_chat():
    tokenizer = ours(chat_template="llama2")
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    messages = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    expected = encode(tokenizer, {"messages": messages}, "messages")
    example = encode(tokenizer, row, "alpaca", "chat")
    assert_example(example, expected.ids.tolist(), expected.trained.tolist())
    assert tokenizer.decode(example.ids[~example.trained]).endswith("[/INST]")
    for blank in ("", " \n", None):
        bare = encode(tokenizer, row | {"input": blank}, "alpaca", "chat").ids
        assert tokenizer.decode(bare) == "[INST] Add. [/INST] 3 "
        stanford = ours().decode(encode(ours(), row | {"input": blank}, "alpaca").ids)
        assert "### Input" not in stanford and stanford.endswith("### Response:3")


def test_sharegpt_rows_are_the_same_conversations():
    tokenizer = ours(chat_template="llama2")
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    for turns in conversations()[:8]:
        other = [{"from": names[turn["role"]], "value": turn["content"], "weight": 1} for turn in turns]
        wanted = encode(tokenizer, {"messages": turns}, "messages")
        system = other[0]["value"] if other[0]["from"] == "system" else None
        for row in ({"conversations": other}, {"conversations": other[system is not None :], "system": system}):
            found = encode(tokenizer, row, "sharegpt")
            np.testing.assert_array_equal(found.ids, wanted.ids)
            np.testing.assert_array_equal(found.trained, wanted.trained)
            prompts = [
                encode_prompt(tokenizer, either, format=format, prompt="stanford")
                for either, format in ((row, "sharegpt"), ({"messages": turns}, "messages"))
            ]
            assert prompts[0] == prompts[1]


# Prompts


@pytest.mark.long
def test_prompt_is_the_untrained_prefix(chatml):
    llama2 = ours(chat_template="llama2")
    alpaca = instruction_rows()[::9]
    rows = [(llama2, row, "alpaca", "chat") for row in alpaca]
    rows += [(chatml, row, "alpaca", "chat") for row in alpaca]
    rows += [(llama2, {"messages": turns}, "messages", "stanford") for turns in conversations()[::9]]
    texts = [{"prompt": row["instruction"], "completion": " " + row["output"]} for row in alpaca]
    rows += [(llama2, row, "completion", "stanford") for row in texts]
    for tokenizer, row, format, prompt in rows:
        example = encode(tokenizer, row, format, prompt)
        ids = encode_prompt(tokenizer, row, format=format, prompt=prompt)
        assert ids == example.ids[: example.trained.argmax()].tolist()


def test_prompt_needs_no_response():
    tokenizer = ours(chat_template="llama2")
    asked = {"messages": [USER, ANSWER, USER]}
    text = "<s>[INST] Name a colour. [/INST] Blue. </s><s>[INST] Name a colour. [/INST]"
    assert encode_prompt(tokenizer, asked, format="messages", prompt="stanford") == tokenizer.encode(text)
    once = encode_prompt(tokenizer, {"instruction": USER["content"]}, format="alpaca", prompt="chat")
    assert once == tokenizer.encode("<s>[INST] Name a colour. [/INST]")
    for format, row in (("completion", {"prompt": "Once upon"}), ("text", {"text": "Once upon"})):
        ids = encode_prompt(tokenizer, row, format=format, prompt="stanford")
        assert ids == [1, *tokenizer.encode("Once upon")]


# Bad rows

BAD_ROWS = [
    ("missing_field", "alpaca", {"instruction": "x"}),
    ("missing_field", "alpaca", {"instruction": "x", "output": None}),
    ("missing_field", "alpaca", {"input": "x", "output": "y"}),
    ("missing_field", "completion", {"completion": "y"}),
    ("missing_field", "messages", {}),
    ("missing_field", "messages", {"messages": [{"role": "user"}]}),
    ("missing_field", "messages", {"messages": ["hello"]}),
    ("wrong_type", "alpaca", {"instruction": "x", "output": 5}),
    ("wrong_type", "alpaca", {"instruction": "x", "input": ["y"], "output": "z"}),
    ("wrong_type", "messages", {"messages": "hello"}),
    ("wrong_type", "messages", {"messages": '{"role": "user"}'}),
    ("wrong_type", "messages", {"messages": [USER | {"content": {"a": 1}}, ANSWER]}),
    ("not_unicode", "text", {"text": "half \ud83e"}),
    ("empty_prompt", "alpaca", {"instruction": " ", "input": "", "output": "x"}),
    ("empty_prompt", "completion", {"prompt": "", "completion": "x"}),
    ("empty_prompt", "messages", {"messages": [USER | {"content": ""}, ANSWER]}),
    ("empty_response", "alpaca", {"instruction": "x", "output": " \n"}),
    ("empty_response", "completion", {"prompt": "x", "completion": ""}),
    ("empty_response", "text", {"text": "\t"}),
    ("empty_response", "messages", {"messages": [USER, ANSWER | {"content": " "}]}),
    ("empty_messages", "messages", {"messages": []}),
    ("wrong_role", "messages", {"messages": [USER, ANSWER | {"role": "bot"}]}),
    ("no_assistant_turn", "messages", {"messages": [USER]}),
    ("missing_field", "sharegpt", {"messages": [USER, ANSWER]}),
    ("missing_field", "sharegpt", {"conversations": [{"from": "human"}]}),
    ("empty_messages", "sharegpt", {"conversations": []}),
    ("empty_response", "sharegpt", {"conversations": [HUMAN, {"from": "gpt", "value": " "}]}),
    ("wrong_role", "sharegpt", {"conversations": [HUMAN, {"from": "bot", "value": "x"}]}),
    ("no_assistant_turn", "sharegpt", {"conversations": [HUMAN]}),
    ("template_error", "messages", {"messages": [USER, USER, ANSWER]}),
    ("template_error", "messages", {"messages": [ANSWER]}),
]


@pytest.mark.parametrize(("reason", "format", "row"), BAD_ROWS)
@pytest.mark.parametrize("train_on", ["response", "all"])
def test_bad_row(reason, format, row, train_on):
    with pytest.raises(BadRow) as caught:
        encode(ours(chat_template="llama2"), row, format, train_on=train_on)
    assert caught.value.reason == reason and caught.value.message == str(caught.value)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("reason", "template"),
    [
        ("unstable_template", "{% for m in messages %}{{ m.content | length }} {{ m.content }}{% endfor %}"),
        ("unstable_template", "{% for m in messages | reverse %}{{ m.content }}{% endfor %}"),
        ("turn_ignored", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        ("template_error", "{{ messages[0].tool_calls[0].name }}"),
    ],
)
def test_template_that_cannot_be_masked(reason, template, tmp_path):
    (tmp_path / "it.jinja").write_text(template)
    tokenizer = load_tokenizer(SHARED / "llama2_tokenizer", str(tmp_path / "it.jinja"))
    with pytest.raises(BadRow) as caught:
        encode(tokenizer, {"messages": [USER, ANSWER]}, "messages")
    assert caught.value.reason == reason


# Loading


@pytest.mark.parametrize("alone", [False, True])
def test_folder_settings(alone, tmp_path):
    """Special tokens, added tokens and the template come from the folder's other files, by either library."""
    shutil.copy(SHARED / "llama2_tokenizer" / ("tokenizer.model" if alone else "tokenizer.json"), tmp_path)
    bos = {"__type": "AddedToken", "content": "<s>"}
    tokens = {"bos_token": bos, "eos_token": "</t>", "additional_special_tokens": ["<tool>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    ids = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "</t>", 32001: "<tool>"}
    added = {str(i): {"content": token, "special": True} for i, token in ids.items()}
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    config = tokens | {"added_tokens_decoder": added, "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path, None)
    assert (tokenizer.eos_id, tokenizer.eos_token, tokenizer.vocab_size) == (32000, "</t>", 32002)
    assert tokenizer.encode("a<tool>b</t>") == [263, 32001, 289, 32000]
    assert tokenizer.decode(np.array([263, 32001, 289, 32000, 2])) == "a b"
    assert tokenizer.chat_template == "A"
    assert {file.name for file in tokenizer.files} == {file.name for file in tmp_path.iterdir()}

    (tmp_path / "chat_template.jinja").write_text("C")
    changed = load_tokenizer(tmp_path, None)
    assert changed.chat_template == "C" and changed.digest != tokenizer.digest
    assert load_tokenizer(tmp_path, None).digest == changed.digest
    assert load_tokenizer(tmp_path, "llama2").chat_template == CHAT_TEMPLATES["llama2"]


def test_digests_differ(model_only):
    found = [ours(name).digest for name in FOLDERS]
    found += [load_tokenizer(folder, None).digest for folder in model_only.values()]
    assert len(set(found)) == len(found)
    assert load_tokenizer(SHARED / "stories260K", None).digest == ours("stories260K").digest


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    content = json.loads((SHARED / "stories260K/tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 4096}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "</s>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    text = texts()[0]
    assert load_tokenizer(tmp_path, None).encode(text) == ours("stories260K").encode(text)


def test_tokenizer_can_be_sent_to_a_worker(model_only):
    for tokenizer in (ours(), load_tokenizer(model_only["stories260K"], None)):
        assert pickle.loads(pickle.dumps(tokenizer)).encode("a</s>b") == tokenizer.encode("a</s>b")


def test_unusable_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="no such folder with a tokenizer, and not a hub name"):
        load_tokenizer(tmp_path / "absent", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ModelError, match="the hub did not deliver it"):
        load_tokenizer("nobody/nothing", None)
    with pytest.raises(ModelError, match="tokenizer.json or a tokenizer.model") as caught:
        load_tokenizer(tmp_path, None)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(ModelError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path, None)
    shutil.copy(SHARED / "llama2_tokenizer/tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_tokenizer(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ModelError, match="eos_token"):
        load_tokenizer(tmp_path, None)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path, None)
    shutil.copy(SHARED / "llama2_tokenizer/tokenizer.json", tmp_path)
    with pytest.raises(ModelError, match="eos_token"):
        load_tokenizer(tmp_path, None)


def test_hub_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(SHARED / "stories260K"))
    assert load_tokenizer("someone/stories260K", None).digest == ours("stories260K").digest


def test_unusable_chat_templates(tmp_path):
    with pytest.raises(ConfigError, match="llama2, chatml"):
        load_tokenizer(SHARED / "llama2_tokenizer", "llama3")
    with pytest.raises(ConfigError, match=r"<\|im_end\|>"):
        load_tokenizer(SHARED / "llama2_tokenizer", "chatml")
    with pytest.raises(ConfigError, match="no chat template"):
        encode(ours(), {"messages": [USER, ANSWER]}, "messages")
    with pytest.raises(DataError, match="take turns"):
        ours(chat_template="llama2").render([ANSWER], add_generation_prompt=True)
    for text, error in (("{% for %}", ConfigError), ("{{ ''.__class__.__mro__ }}", DataError)):
        (tmp_path / "it.jinja").write_text(text)
        tokenizer = load_tokenizer(SHARED / "llama2_tokenizer", str(tmp_path / "it.jinja"))
        with pytest.raises(error):
            tokenizer.render([USER], add_generation_prompt=True)


def test_a_template_writes_the_day_that_it_is_told(tmp_path):
    """So a run that goes on after midnight has the rows that it began with."""
    (tmp_path / "day.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}", encoding="utf-8")
    tokenizer = ours(chat_template=str(tmp_path / "day.jinja"))
    today = datetime.date.today()
    assert tokenizer.writes_day and not ours(chat_template="llama2").writes_day
    assert tokenizer.on("2024-07-26").render([USER], add_generation_prompt=True).startswith("26 Jul 2024: ")
    assert tokenizer.render([USER], add_generation_prompt=True)[:11] in {
        (today + datetime.timedelta(days=more)).strftime("%d %b %Y") for more in (0, 1)
    }
