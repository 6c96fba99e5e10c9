"""Rows and keys of public reports of other trainers: what is trained of each, or the sentence that refuses it.

docs/reliability.md has the list.
"""

import json

import pytest
from tiny import make_tokenizer

from jlora.config import DataSection, load_config
from jlora.data.encoding import tokenize
from jlora.data.tokens import load_tokenizer
from jlora.errors import ConfigError, DataError

# Every turn under its role, as plain templates have it.
PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Mistral's: the end of the user's turn is no end of the text.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def turns(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    make_tokenizer(folder)
    for name, template in (("plain", PLAIN), ("mistral", MISTRAL)):
        (folder / f"{name}.jinja").write_text(template, encoding="utf-8")
    return folder


def encoded(folder, row, **keys):
    """The tokenizer, and the rows of a file that holds one row twice, unless they are a list."""
    template = keys.pop("template", "plain")
    rows = row if isinstance(row, list) else [row, row]
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    tokenizer = load_tokenizer(folder, template if template == "llama2" else str(folder / f"{template}.jinja"))
    section = DataSection(train=str(folder / "rows.jsonl"), **({"max_length": 512} | keys))
    return tokenizer, tokenize(str(folder / "rows.jsonl"), tokenizer, section)


MULTI = {"from": "human", "value": "a"}, {"from": "gpt", "value": "one"}
MULTI = {"conversations": [{"from": "system", "value": "Be kind."}, *MULTI, MULTI[0], {"from": "gpt", "value": "two"}]}
# Report -> the row, keys of data, the trained text.
READ = {
    "ms-swift 2750: answers alone": (turns(("assistant", "I love music")), {}, ["I love music</s>"]),
    "ms-swift 5831: roles that take no turns": (
        turns(("user", "Hi"), ("user", "You?"), ("assistant", "Yes."), ("assistant", "Here.")),
        {},
        ["Yes.</s>Here.</s>"],
    ),
    "ms-swift 9843: a tool's turn that no call is before": (
        turns(("user", "Hi"), ("tool", "aqi 72"), ("assistant", "Fair.")),
        {},
        ["Fair.</s>"],
    ),
    "ms-swift 2314: system, query, response": (
        {"system": "Be kind.", "query": "Say 1", "response": "It is 1"},
        {"format": "alpaca"},
        ["It is 1</s>"],
    ),
    "torchtune 2096: question, answer": (
        {"question": "Say 1", "answer": "It is 1"},
        {"format": "alpaca"},
        ["It is 1</s>"],
    ),
    "axolotl 1761: every answer, not the last alone": (MULTI, {"format": "sharegpt"}, ["one</s>two</s>"]),
    "axolotl 2089: no turn but the assistant's": (
        MULTI,
        {"format": "sharegpt", "template": "mistral"},
        [" one</s> two</s>"],
    ),
    "FastChat 3061: the first letter of the answer": (
        turns(("user", "Who?"), ("assistant", "I'm built")),
        {"template": "llama2"},
        [" I'm built </s>"],
    ),
    "TRL 6548: the shorter answer is not cut with the longer": (
        {"prompt": "q:", "chosen": "x", "rejected": "y" * 100},
        {"format": "preference", "max_length": 64},
        ["x</s>", "y" * 29],
    ),
    "LLaMA-Factory 7696: pairs of turns": (
        {"conversations": [MULTI["conversations"][1]], "chosen": MULTI["conversations"][2], "rejected": {
            "from": "gpt", "value": "no"}},
        {"format": "preference"},
        ["one</s>", "no</s>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("report", READ)
def test_rows_of_reports_are_trained_right(report, folder):
    row, keys, trained = READ[report]
    tokenizer, found = encoded(folder, row, **({"format": "messages"} | keys))
    assert len(found.examples) == 2 and not found.dropped
    sequences = found.examples[0].sequences() if len(trained) == 2 else [found.examples[0]]
    assert [_trained(tokenizer, each) for each in sequences] == trained


def _trained(tokenizer, example):
    """The trained text, its ends of text written out."""
    ids = [int(token) for token, trains in zip(example.ids, example.trained, strict=True) if trains]
    return "".join(tokenizer.eos_token if token == tokenizer.eos_id else tokenizer.decode([token]) for token in ids)


REFUSED = {
    "LLaMA-Factory 1913: several outputs": (
        {"instruction": "Say", "input": "", "output": ["good", "bad"]},
        {"format": "alpaca"},
        'rows.jsonl:1, rows.jsonl:2: the field "output" is list, not str',
    ),
    "LLaMA-Factory 4717: answers that are objects": (
        {"prompt": "Say", "chosen": {"answer": "a", "score": 1.0}, "rejected": {"answer": "b"}},
        {"format": "preference"},
        'rows.jsonl:1, rows.jsonl:2: the field "chosen" is dict, not str',
    ),
    "unsloth 2900: nothing is left to train": (
        {"instruction": "Say", "output": "1"},
        {"format": "alpaca", "max_length": 8},
        "rows.jsonl:1, rows.jsonl:2: the prompt alone fills data.max_length=8 tokens",
    ),
    "TRL 5662: a prompt that fills the pair": (
        {"prompt": "once " * 30, "chosen": "a", "rejected": "b"},
        {"format": "preference", "max_length": 64},
        "the prompt alone fills half of data.max_length=64",
    ),
    "ms-swift 5831: of a template that wants turns": (
        turns(("user", "Hi"), ("user", "You?"), ("assistant", "Yes.")),
        {"format": "messages", "template": "llama2"},
        "the chat template refuses the messages: user and assistant must take turns",
    ),
}


@pytest.mark.parametrize("report", REFUSED)
def test_rows_of_reports_are_refused_by_place_and_reason(report, folder):
    row, keys, says = REFUSED[report]
    with pytest.raises(DataError) as caught:
        encoded(folder, row, **keys)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.max_steps=-1", "training.max_steps: should be greater than 0, but it is -1"),  # LLaMA-Factory 9466
        ("mask_prompt=true", "unknown key 'mask_prompt'"),  # mlx-examples 1313
        ("lora.target_modules=[lm_head]", "target_modules holds 'lm_head'"),  # PEFT 2018, llama.cpp 3651
        ("lora.target_modules=[q_proj,embed_tokens]", "target_modules holds 'embed_tokens'"),  # PEFT 436
    ],
)
def test_keys_of_reports_are_refused_by_name(override, says, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: base}\ndata: {train: rows.jsonl}\noutput_dir: run\n", encoding="utf-8")
    load_config(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert says in str(caught.value)
