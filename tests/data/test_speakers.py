"""Prompts of several templates as turns."""

import pytest
from tiny import make_tokenizer

from jlora.data.alpaca import stanford_prompt
from jlora.data.speakers import turns
from jlora.data.tokens import load_tokenizer

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]"),
]
PROMPTS = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi,\n\nyou<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi,\n\nyou<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<s><start_of_turn>user\nHi,\n\nyou<end_of_turn>\n<start_of_turn>model\n",
    "phi": "<|user|>\nHi,\n\nyou<|end|>\n<|assistant|>\n",
    "mistral": "<s>[INST] Hi,\n\nyou[/INST]",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = make_tokenizer(folder)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL})
    fast.save_pretrained(folder)
    return load_tokenizer(folder, None)


@pytest.mark.parametrize("name", PROMPTS)
def test_roles_of_chat_templates(name, tokenizer):
    asked = ("user", "Hi,\n\nyou")
    wanted = [("system", "Be kind."), asked] if "Be kind" in PROMPTS[name] else [asked]
    assert turns(tokenizer, tokenizer.encode(PROMPTS[name])) == wanted


def test_a_conversation_keeps_its_order(tokenizer):
    text = "".join(f"<|im_start|>{role}\n{role} {i}<|im_end|>\n" for i in (1, 2) for role in ("user", "assistant"))
    found = [tuple(turn) for turn in turns(tokenizer, tokenizer.encode(text))]
    assert found == [(role, f"{role} {i}") for i in (1, 2) for role in ("user", "assistant")]


def test_parts_of_a_stanford_prompt(tokenizer):
    text = stanford_prompt({"instruction": "Say it.\nTwice.", "input": "blue"})
    before, *rest = turns(tokenizer, tokenizer.encode(text))
    assert before.role == "" and before.text.startswith("Below is an instruction")
    assert rest == [("Instruction", "Say it.\nTwice."), ("Input", "blue")]


@pytest.mark.parametrize("text", ["user\nis a word here", "### Notes:\nmine", "<|im_end|>and on"])
def test_other_text_has_no_role(text, tokenizer):
    ((role, said),) = turns(tokenizer, tokenizer.encode(text))
    assert role == "" and said == text.removeprefix("<|im_end|>")


def test_nothing_has_no_turn(tokenizer):
    assert turns(tokenizer, []) == [] == turns(tokenizer, tokenizer.encode("<s><|im_start|>assistant\n"))
