"""Published chat templates, as TRL ships them, tokenizers that have their tokens, and rows of every shape."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from tiny import make_tokenizer

from jlora.config import Counted
from jlora.data.prompts import encode_row
from jlora.data.tokens import load_tokenizer

# Template -> its EOS. TRL ships each as the model's authors wrote it, and one with `{% generation %}` marks beside it.
PUBLISHED = {
    "llama3": "<|eot_id|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "gemma": "<eos>",
    "gemma3": "<eos>",
    "phi3": "<|endoftext|>",
    "phi3_5": "<|endoftext|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "glm4moe": "<|endoftext|>",
    "nemotron_3_nano": "<|im_end|>",
}
SPECIAL = (
    "<|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <|start_header_id|> <|end_header_id|> <start_of_turn> "
    "<end_of_turn> <eos> <|end|> <|user|> <|assistant|> <|system|> <|observation|> <｜end▁of▁sentence｜> <｜User｜> "
    "<｜Assistant｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> "
    "<｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> "
    "<｜tool▁output▁end｜> <|start|> <|message|> "
    "<|channel|> <|return|> <|call|> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> "
    "<|SYSTEM_TOKEN|> [gMASK] <sop>"
).split()
# Of one token each, though not special, as in Qwen's and DeepSeek's tokenizers.
STRINGS = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>".split()


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(city):
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city, "days": 2}}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SHAPES = {
    "one": {"messages": [user("Hi there."), answer("Hello, friend.")]},
    "turns": {
        "messages": [
            user("Hi"), answer("<b>Hello</b>"), user(" And you? "), answer(" Fine. \n"), user("Bye"), answer("Bye"),
        ],
    },
    "system": {
        "messages": [
            {"role": "system", "content": "Be brief."}, user("Hi"), answer("Yes."), user("No?"), answer("No."),
        ],
    },
    "tools": {"messages": [user("Rome?"), answer("", tool_calls=[call("Rome")])], "tools": TOOLS},
    "results": {
        "messages": [
            user("Rome?"), answer("", tool_calls=[call("Rome")]),
            {"role": "tool", "name": "weather", "content": "22 C"}, answer("It is 22 C."),
            user("Thanks"), answer("Welcome."),
        ],
        "tools": TOOLS,
    },
    "reasoning": {
        "messages": [
            user("1+1?"), answer("2", reasoning_content="one, one"),
            user("2+2?"), answer("4", reasoning_content="two, two"),
        ],
    },
    "inline": {
        "messages": [
            user("1+1?"), answer("<think>\none, one\n</think>\n\n2"),
            user("2+2?"), answer("<think>\ntwo, two\n</think>\n\n4"),
        ],
    },
    "empty_think": {"messages": [user("1+1?"), answer("<think>\n\n</think>\n\n2")]},
    "assistant_first": {"messages": [answer("I am here."), user("Say 0"), answer("It is 0.")]},
    "unanswered": {"messages": [user("Hi"), answer("Hello."), user("Bye")]},
}  # fmt: skip
# What a template cannot write, so that transformers refuses the row too, or would lose some of it without a word.
ALTERNATING = {"system": "template_error", "results": "template_error", "assistant_first": "template_error"}
LOST_TOOLS = {"tools": "tools_ignored", "results": "tools_ignored"}
REFUSED = {
    "llama3": LOST_TOOLS,
    "gemma": ALTERNATING | {"tools": "tools_ignored"},
    "gemma3": {"results": "template_error", "assistant_first": "template_error", "tools": "tools_ignored"},
    "phi3": LOST_TOOLS,
    "phi3_5": LOST_TOOLS,
    "deepseek_r1_distill": LOST_TOOLS,
    "deepseekv3": LOST_TOOLS,
    "lfm2": LOST_TOOLS,
    "cohere2": {"results": "template_error", "assistant_first": "template_error", "tools": "tools_ignored"},
}
# Templates that drop a reasoning in the last content as well.
DROPPING = {"deepseek_r1_distill", "deepseekv3"}


def accepted(name, shape):
    """Whether a template can write a row of a shape."""
    return shape not in REFUSED.get(name, {})


@cache
def tokenizer_folder(eos):
    """A folder with a tokenizer of bytes and of the tokens above."""
    folder = Path(mkdtemp(prefix="jlora-test-"))
    make_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    like = content["added_tokens"][-1]
    for i, token in enumerate([*SPECIAL, *STRINGS], 300):
        content["added_tokens"].append(like | {"id": i, "content": token, "special": token in SPECIAL})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": eos}))
    return folder


@cache
def source(name):
    """The text of a template that TRL ships."""
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def ours(name):
    """A tokenizer with a published template, or with TRL's training template of it."""
    eos = PUBLISHED[name.removesuffix("_training")]
    return replace(load_tokenizer(tokenizer_folder(eos), None), chat_template=source(name))


@cache
def theirs(name):
    """The same of transformers."""
    from transformers import PreTrainedTokenizerFast

    eos = PUBLISHED[name.removesuffix("_training")]
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder(eos), chat_template=source(name))


def encode(tokenizer, row, train_on="response", train_on_eos="turn", reasoning="keep", format="messages"):
    return encode_row(tokenizer, row, format=format, prompt="chat", counted=Counted(train_on, train_on_eos, reasoning))


def shown(name, example):
    """The text of an example, what is trained in ⟦ ⟧."""
    text, on = "", False
    for token, trained in zip(example.ids.tolist(), example.trained.tolist(), strict=True):
        text += ("⟦" if trained else "⟧") if trained != on else ""
        text, on = text + theirs(name).decode([token]), trained
    return text + "⟧" * on
