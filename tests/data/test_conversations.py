"""Rows of turns: what their fields mean, what is trained of them, and with what weight."""

import json

import numpy as np
import pytest
from chat_templates import SHAPES, TOOLS, answer, call, encode, ours, shown, user

from jlora.config import DataSection
from jlora.data.encoding import tokenize
from jlora.data.prompts import encode_pair, encode_prompt, reference_answer, shown_prompt, with_shots
from jlora.data.row import BadRow
from jlora.errors import DataError

TWO = [user("Say 0."), answer("BAD."), user("No, kindly."), answer("Dear.")]
KIND = "user\nNo, kindly.<|im_end|>\n<|im_start|>assistant\n"
QWEN = "qwen3_instruct_2507"


def text(row, name=QWEN, **counted):
    return shown(name, encode(ours(name), row, **counted))


def told(answer_0, answer_1):
    """How ChatML writes `TWO`, with what is trained of its answers."""
    return f"<|im_start|>user\nSay 0.<|im_end|>\n<|im_start|>assistant\n{answer_0}\n<|im_start|>{KIND}{answer_1}\n"


BOTH = told("⟦BAD.<|im_end|>⟧", "⟦Dear.<|im_end|>⟧")
SECOND = told("BAD.<|im_end|>", "⟦Dear.<|im_end|>⟧")


# What is trained


@pytest.mark.parametrize(
    "flag",
    [
        *({"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"masked": True}, {"masked": 1}),
        *({"loss_mask": 0}, {"trainable": False}, {"loss": False}),
    ],
)
def test_a_turn_that_is_not_to_be_trained(flag):
    turns = [TWO[0], TWO[1] | flag, *TWO[2:]]
    sharegpt = [{"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in turns]
    sharegpt[1] |= flag
    for row, format in (({"messages": turns}, "messages"), ({"conversations": sharegpt}, "sharegpt")):
        assert text(row, format=format) == SECOND
    everything = encode(ours(QWEN), {"messages": turns}, train_on="all")
    left_out = encode(ours(QWEN), {"messages": TWO}).trained & ~encode(ours(QWEN), {"messages": turns}).trained
    assert (everything.trained[1:] == ~left_out[1:]).all() and left_out.sum() == 5
    with pytest.raises(BadRow, match="none of its turns is to be trained"):
        encode(ours(QWEN), {"messages": [turn | flag for turn in TWO]})


@pytest.mark.parametrize(
    "flag", [{"weight": 1}, {"train": True}, {"masked": False}, {"masked": None}, {"weight": None}]
)
def test_a_turn_that_says_that_it_is_trained(flag):
    assert text({"messages": [turn | flag for turn in TWO]}) == BOTH


def test_a_mask_beside_the_turns():
    for mask in ([0, 1], [0, 0, 1, 1], [1, 0, 1, 1], [False, True]):
        assert text({"messages": TWO, "loss_mask": mask}) == SECOND
    with pytest.raises(BadRow, match='"loss_mask" holds 3 values for 4 turns'):
        encode(ours(QWEN), {"messages": TWO, "loss_mask": [0, 1, 1]})


def test_weights_of_turns_and_rows_multiply():
    turns = [TWO[0], TWO[1] | {"weight": 0.25}, TWO[2], TWO[3] | {"weight": 2, "loss_mask": 1}]
    whole = encode(ours(QWEN), {"messages": TWO})
    example = encode(ours(QWEN), {"messages": turns, "weight": 0.5})
    assert whole.weights.dtype == bool and example.weights.dtype == np.float32
    trained = np.flatnonzero(whole.weights)
    assert example.weights[trained].tolist() == [0.125] * 5 + [1.0] * 6
    assert (example.trained == whole.weights).all() and (example.ids == whole.ids).all()
    for row, format in (
        ({"prompt": "a", "completion": "bc"}, "completion"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"text": "abc"}, "text"),
    ):
        plain, weighted = (
            encode(ours(QWEN), row, format=format),
            encode(ours(QWEN), row | {"weight": "0.5"}, format=format),
        )
        assert (weighted.weights == plain.weights * np.float32(0.5)).all() and weighted.weights.dtype == np.float32
        assert encode(ours(QWEN), row | {"weight": 1}, format=format).weights.dtype == bool


@pytest.mark.parametrize("weight", [-1, "heavy", float("nan"), float("inf"), [1]])
def test_a_weight_that_is_none(weight):
    for row in ({"messages": [user("a"), answer("b", weight=weight)]}, {"messages": TWO, "weight": weight}):
        with pytest.raises(BadRow, match='the field "weight" is .*, not true, false or a number of 0 or more'):
            encode(ours(QWEN), row)


def test_the_last_answer_alone():
    assert text({"messages": TWO}, train_on="last") == SECOND
    assert text({"messages": [*TWO, user("And?")]}, train_on="last").startswith(SECOND)
    with pytest.raises(BadRow):  # it is the last one that counts, not the last with a weight
        encode(ours(QWEN), {"messages": [*TWO[:3], TWO[3] | {"weight": 0}]}, train_on="last")


def test_roles():
    row = SHAPES["results"]
    assert text(row, train_on=["assistant"]) == text(row)
    asked = text(row, train_on=["user", "tool"])
    assert asked.count("⟦") == 3 and "user\n⟦Rome?⟧<|im_end|>" in asked and "user\n⟦Thanks⟧<|im_end|>" in asked
    assert "<tool_response>\n⟦22 C⟧\n</tool_response>" in asked
    everyone = encode(ours(QWEN), row, train_on=["assistant", "user", "tool"]).trained
    assert (
        everyone == encode(ours(QWEN), row).trained | encode(ours(QWEN), row, train_on=["user", "tool"]).trained
    ).all()
    with pytest.raises(BadRow, match="writes the content of turn 3 otherwise.*leave tool out of data.train_on"):
        turns = [*row["messages"][:2], {"role": "tool", "content": 'a "b"'}, answer("c")]
        encode(ours("gptoss"), {"messages": turns, "tools": TOOLS}, train_on=["tool"])


def test_ends_of_turns():
    assert text({"messages": TWO}, train_on_eos="last") == told("⟦BAD.⟧<|im_end|>", "⟦Dear.<|im_end|>⟧")
    assert text({"messages": TWO}, train_on_eos="none") == told("⟦BAD.⟧<|im_end|>", "⟦Dear.⟧<|im_end|>")
    assert text({"messages": [user("a"), answer("b \n")]}, train_on_eos="none").endswith(
        "assistant\n⟦b \n⟧<|im_end|>\n"
    )
    assert text({"messages": [user("a"), answer("b")]}, "phi3", train_on_eos="none").endswith(
        "\n⟦b⟧<|end|>\n<|endoftext|>"
    )
    training = text({"messages": TWO}, f"{QWEN}_training", train_on_eos="none")
    assert training == told("⟦BAD.⟧<|im_end|>", "⟦Dear.⟧<|im_end|>")
    for row in ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b<|im_end|>"}):
        assert text(row, format="completion", train_on_eos="none") == "<s>a⟦b⟧<|im_end|>"
        assert text(row, format="completion") == "<s>a⟦b<|im_end|>⟧"
    with pytest.raises(ValueError, match="train_on=all trains every token"):
        DataSection(train="-", train_on="all", train_on_eos="none")


# Reasoning


def test_reasoning_is_kept_stripped_or_not_trained():
    row, inline = SHAPES["reasoning"], SHAPES["inline"]
    for each in (row, inline):
        kept, masked = text(each, "qwen3"), text(each, "qwen3", reasoning="mask")
        assert "one, one" not in kept and kept.endswith("assistant\n⟦<think>\ntwo, two\n</think>\n\n4<|im_end|>⟧\n")
        assert (
            masked.endswith("assistant\n<think>\ntwo, two\n</think>\n\n⟦4<|im_end|>⟧\n") and "⟦2<|im_end|>⟧" in masked
        )
    # A template that writes what it is given: kept in history but where it is stripped.
    kept, stripped, masked = (text(inline, reasoning=way) for way in ("keep", "strip", "mask"))
    assert "⟦<think>\none, one\n</think>\n\n2<|im_end|>⟧" in kept
    assert "one, one" not in stripped and "⟦2<|im_end|>⟧" in stripped and stripped.endswith(kept[kept.index("2+2?") :])
    assert "<think>\none, one\n</think>\n\n⟦2<|im_end|>⟧" in masked
    # One that begins the reasoning in its prompt, and one whose reasoning is a channel.
    assert text(row, "deepseek_r1_distill", reasoning="mask").endswith(
        "<think>\ntwo, two\n</think>\n\n⟦4<｜end▁of▁sentence｜>⟧"
    )
    channels = text(row, "gptoss", reasoning="mask")
    assert channels.endswith(
        "analysis<|message|>two, two<|end|><|start|>assistant⟦<|channel|>final<|message|>4<|return|>⟧"
    )


def test_an_answer_that_is_reasoning_alone_cannot_be_stripped():
    turns = [user("a"), answer("<think>hm</think>"), user("b"), answer("c")]
    assert "⟦<think>hm</think>" in text({"messages": turns})
    with pytest.raises(BadRow, match="message 2 is reasoning alone"):
        encode(ours(QWEN), {"messages": turns}, reasoning="strip")


def test_a_reasoning_that_the_template_would_drop_is_in_the_text():
    """R1's template takes the reasoning out of every answer, which would train answers without any."""
    for message in (answer("4", reasoning_content="two"), answer("<think>\ntwo\n</think>\n\n4")):
        found = text({"messages": [user("2+2?"), message]}, "deepseek_r1_distill")
        assert found == "<s><｜User｜>2+2?<｜Assistant｜><think>\n⟦two\n</think>\n\n4<｜end▁of▁sentence｜>⟧"


# Tools


def test_tool_calls_in_every_form():
    """OpenAI's JSON strings, one call without a list, ShareGPT's turns and tools as JSON are one and the same row."""
    wanted = text(SHAPES["results"])
    arguments = {"city": "Rome", "days": 2}
    openai = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}
    turns = SHAPES["results"]["messages"]
    for message in (
        answer(None, tool_calls=[openai]), {"role": "assistant", "tool_calls": [openai]},
        answer("", tool_calls=[{"name": "weather", "arguments": arguments}]),
        answer(None, function_call={"name": "weather", "arguments": json.dumps(arguments)}),
    ):  # fmt: skip
        assert text({"messages": [turns[0], message, *turns[2:]], "tools": json.dumps(TOOLS)}) == wanted
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    sharegpt[1] = {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": arguments})}
    row = {"conversations": sharegpt, "tools": json.dumps(TOOLS)}
    assert text(row, format="sharegpt") == wanted
    assert (
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call><|im_end|>⟧' in wanted
    )
    assert "⟦22 C" not in wanted and "<tools>" in wanted


def test_a_template_of_json_arguments():
    """DeepSeek-V3's puts arguments together as strings, and takes null for no content."""
    found = text({"messages": [user("Rome?"), answer(None, tool_calls=[call("Rome")])]}, "deepseekv3")
    assert "⟦<｜tool▁calls▁begin｜>" in found and '```json\n{"city": "Rome", "days": 2}\n```' in found


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": TWO, "tools": "[{"}, 'the field "tools" is a text that is not JSON'),
        ({"messages": TWO, "tools": '{"a": 1}'}, 'the field "tools" is dict in JSON, not list'),
        ({"messages": TWO, "tools": [3]}, 'the field "tools" holds int, not objects'),
        ({"messages": [user("a"), answer(None, tool_calls=[{"function": {}}])]}, 'the field "name" is missing'),
        ({"messages": [user("a"), answer(None, tool_calls=["f"])]}, 'the field "name" is missing'),
        (
            {"messages": [user("a"), answer(None, tool_calls=[{"name": "f", "arguments": "{"}])]},
            'the field "arguments" is a text that is not JSON',
        ),
        (
            {"messages": [user("a"), answer(None, tool_calls=[{"name": "f", "arguments": "[1]"}])]},
            'the "arguments" of a tool call are list, not an object',
        ),
        (
            {"messages": [user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}]), answer("b")]},
            'a turn holds a part of type "image_url", and text alone is read',
        ),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, *TWO]}, 'another text in "system"; keep one'),
        ({"messages": [user("a\ufdd0"), answer("b")]}, 'the field "content" holds U.FDD0, which is no character'),
        ({"messages": [{"role": "ipython", "content": "x"}, *TWO]}, "does not write turn 1, of the role ipython"),
    ],
)
def test_rows_that_are_refused(row, words):
    with pytest.raises(BadRow, match=words):
        encode(ours(QWEN), row)


# Other ways of writing the same


def test_the_same_conversation_in_every_form():
    parts = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in TWO]
    cut = [turn | {"content": [{"type": "text", "text": part} for part in turn["content"]]} for turn in TWO]
    sharegpt = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in TWO]
    nulls = [turn | {"tool_calls": None, "name": None, "weight": None, "reasoning_content": None} for turn in TWO]
    for row, format in (
        ({"messages": parts}, "messages"), ({"messages": cut}, "messages"), ({"messages": sharegpt}, "messages"),
        ({"messages": json.dumps(TWO)}, "messages"), ({"conversations": json.dumps(sharegpt)}, "sharegpt"),
        ({"conversations": TWO}, "messages"), ({"conversations": TWO}, "sharegpt"),
        ({"messages": nulls, "tools": [], "images": []}, "messages"),
        ({"messages": TWO, "system": None}, "messages"), ({"messages": TWO, "system": " "}, "messages"),
    ):  # fmt: skip
        assert text(row, format=format) == BOTH
    system = {"role": "system", "content": "Be brief."}
    wanted = text({"messages": [system, *TWO]})
    assert wanted.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert (
        text({"messages": TWO, "system": "Be brief."})
        == text({"messages": [system, *TWO], "system": "Be brief."})
        == wanted
    )


def test_pairs_have_tools_but_no_weight():
    pair = {"prompt": [user("Rome?")], "chosen": [answer(None, tool_calls=[call("Rome")])], "rejected": [answer("Hm.")]}
    chosen, rejected = encode_pair(ours(QWEN), pair | {"tools": TOOLS})
    assert shown(QWEN, chosen) == text({"messages": SHAPES["tools"]["messages"], "tools": TOOLS})[:-2] + "\n⟧"
    assert shown(QWEN, rejected).endswith(
        "</tool_call><|im_end|>\n<|im_start|>user\nRome?<|im_end|>\n<|im_start|>assistant\n⟦Hm.<|im_end|>\n⟧"
    )
    with pytest.raises(BadRow, match="a pair has no weight"):
        encode_pair(ours(QWEN), pair | {"weight": 0.5})


def test_prompt_and_completion_in_turns():
    """As TRL has them: earlier answers belong to the prompt."""
    row = {"prompt": TWO[:3], "completion": TWO[3:]}
    assert text(row, format="completion") == SECOND
    asked = encode_prompt(ours(QWEN), {"prompt": TWO[:3]}, format="completion", prompt="stanford")
    assert asked == encode(ours(QWEN), row, format="completion").ids[: len(asked)].tolist()
    assert reference_answer(row, format="completion") == "Dear."
    assert shown_prompt(row, format="completion") == "user: Say 0.\n\nassistant: BAD.\n\nuser: No, kindly."
    with pytest.raises(BadRow, match='the field "completion" is str, not list'):
        encode(ours(QWEN), {"prompt": TWO[:3], "completion": "Dear."}, format="completion")


def test_prompts_of_rows_with_tools():
    row = SHAPES["results"]
    ids = encode(ours(QWEN), row).ids.tolist()
    asked = encode_prompt(ours(QWEN), row, format="messages", prompt="stanford")
    assert asked == ids[: len(asked)] and shown_prompt(row, format="messages") == "user: Rome?"
    with pytest.raises(BadRow, match="its first answer is a call of a tool"):
        reference_answer(row, format="messages")
    later = {"messages": row["messages"][:3], "tools": TOOLS}
    asked = encode_prompt(ours(QWEN), later, format="messages", prompt="stanford")
    assert asked == ids[: len(asked)] and ours(QWEN).decode(asked[-20:]).endswith("assistant\n")
    bare, format = with_shots(row, [{"messages": TWO[:2]}], format="messages", prompt="chat", answered=False)
    assert format == "messages" and bare == {"messages": [*TWO[:2], row["messages"][0]], "tools": TOOLS}


# In a data set


def section(**changes):
    return DataSection(**({"train": "-", "format": "messages", "max_length": 128} | changes))


@pytest.fixture
def weighted_rows(tmp_path):
    rows = [{"messages": TWO}, {"messages": TWO, "weight": 0.25}, {"messages": [*TWO[:3], TWO[3] | {"weight": 0}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def test_weights_survive_the_disk(weighted_rows, tmp_path):
    in_memory = tokenize(str(weighted_rows), ours(QWEN), section())
    for _ in range(2):  # written, then read
        stored = tokenize(str(weighted_rows), ours(QWEN), section(cache_dir=str(tmp_path / "cache")))
        assert stored.digest == in_memory.digest
        for found, wanted in zip(stored.examples, in_memory.examples, strict=True):
            assert found.ids.tolist() == wanted.ids.tolist() and found.weights.tolist() == wanted.weights.tolist()
            assert found.weights.dtype == wanted.weights.dtype
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert (entry / "weights").stat().st_size == 4 * len(in_memory.examples[1].ids)
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"messages": TWO}) + "\n")
    tokenize(str(plain), ours(QWEN), section(cache_dir=str(tmp_path / "plain")))
    (entry,) = (path for path in (tmp_path / "plain").iterdir() if path.is_dir())
    assert {file.name for file in entry.iterdir()} == {"tokens", "lengths", "places", "place_lengths", "manifest.json"}


def test_damaged_weights_are_made_again(weighted_rows, tmp_path, capsys):
    cfg = section(cache_dir=str(tmp_path / "cache"))
    digest = tokenize(str(weighted_rows), ours(QWEN), cfg).digest
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    weights = np.fromfile(entry / "weights", np.float32)
    (weights * 2).tofile(entry / "weights")
    assert tokenize(str(weighted_rows), ours(QWEN), cfg).digest == digest
    assert "are tokenised again" in capsys.readouterr().err
    assert (np.fromfile(entry / "weights", np.float32) == weights).all()


def test_what_counts_is_part_of_an_entry(weighted_rows, tmp_path):
    digests = set()
    for changes in ({}, {"train_on": "last"}, {"train_on_eos": "none"}, {"reasoning": "mask"}, {"train_on": ["user"]}):
        cfg = section(cache_dir=str(tmp_path / "cache"), on_bad_row="skip", **changes)
        digests.add(tokenize(str(weighted_rows), ours(QWEN), cfg).digest)
    assert len(digests) == 4  # no row has a reasoning
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 5


def test_a_row_without_weight_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TWO, "weight": 0}) + "\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: no token of it would be trained"):
        tokenize(str(tmp_path / "rows.jsonl"), ours(QWEN), section())


def test_a_row_with_images_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TWO, "images": ["a.png"]}) + "\n")
    with pytest.raises(DataError, match='rows.jsonl:1: the field "images" holds no text'):
        tokenize(str(tmp_path / "rows.jsonl"), ours(QWEN), section())
