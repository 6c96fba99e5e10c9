"""Published templates x rows of every shape: ids as transformers', masks as transformers' and TRL's."""

import itertools

import pytest
from chat_templates import PUBLISHED, SHAPES, answer, encode, ours, shown, theirs

from jlora.data.row import BadRow

CASES = list(itertools.product(PUBLISHED, SHAPES))
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
# Templates that read no `reasoning_content`: here it stands in the last answer, between tags, where they would lose it.
NO_REASONING = {
    *("llama3", "qwen2_5", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "phi3_5", "deepseek_r1_distill"),
    *("deepseekv3", "lfm2", "cohere2"),
}
# Templates that drop a reasoning in the last content as well.
DROPPING = {"deepseek_r1_distill", "deepseekv3"}


def accepted(name, shape):
    return shape not in REFUSED.get(name, {})


def by_transformers(name, row, **options):
    return theirs(name).apply_chat_template(row["messages"], tools=row.get("tools"), return_dict=True, **options)


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if accepted(*case)])
def test_ids_are_those_of_transformers(name, shape):
    row = SHAPES[shape]
    if (shape == "reasoning" and name in NO_REASONING) or (shape in ("inline", "empty_think") and name in DROPPING):
        *others, last = row["messages"]
        thought, _, content = last["content"].rpartition("</think>")
        thought = thought.removeprefix("<think>").strip() or last.get("reasoning_content", "")
        if not thought:
            assert shown(name, encode(ours(name), row)).endswith("⟦\n\n2<｜end▁of▁sentence｜>⟧")
            return
        # What the template writes of another content, with the reasoning put in its place.
        text = f"<think>\n{thought}\n</think>\n\n{content.strip()}"
        plain = theirs(name).apply_chat_template([*others, answer("ANSWER")], tokenize=False).replace("ANSWER", text)
        assert encode(ours(name), row).ids.tolist() == theirs(name)(plain, add_special_tokens=False).input_ids
        return
    assert encode(ours(name), row).ids.tolist() == by_transformers(name, row).input_ids


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if not accepted(*case)])
def test_what_a_template_would_lose_is_refused(name, shape):
    with pytest.raises(BadRow) as caught:
        encode(ours(name), SHAPES[shape])
    assert caught.value.reason == REFUSED[name][shape]


def runs(mask):
    """Where ones begin and end."""
    edges = [i for i in range(len(mask) + 1) if (i > 0 and mask[i - 1]) != (i < len(mask) and bool(mask[i]))]
    return list(zip(edges[::2], edges[1::2], strict=True))


def without_empty_thought(tokens, start, end):
    """Where an answer begins behind a reasoning in which nothing stands, two line breaks behind it at most."""
    at = start
    while tokens[at : at + 1] == ["\n"]:
        at += 1
    opened = next(token for token in reversed(tokens[:start]) if token != "\n") == "<think>"
    if tokens[at] != "<think>" and not opened:
        return start
    at += tokens[at] == "<think>"
    while tokens[at] == "\n":
        at += 1
    if tokens[at] != "</think>":
        return start
    at += 1
    return at + (tokens[at] == "\n") + (tokens[at : at + 2] == ["\n", "\n"])


# Where transformers loses the reasoning, and so has another text.
THOUGHTLESS = {(name, "reasoning") for name in NO_REASONING} | {("deepseekv3", "inline"), ("deepseekv3", "empty_think")}


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if accepted(*case) and case not in THOUGHTLESS])
def test_marks_of_a_template_are_taken_as_transformers_takes_them(name, shape):
    """Equal but for an empty reasoning, which is not trained."""
    training, row = f"{name}_training", SHAPES[shape]
    expected = by_transformers(training, row, return_assistant_tokens_mask=True)
    example = encode(ours(training), row)
    assert example.ids.tolist() == expected.input_ids
    tokens = [theirs(training).decode([token]) for token in expected.input_ids]
    mask = [False] * len(tokens)
    for start, end in runs(expected.assistant_masks):
        start = without_empty_thought(tokens, start, end)
        mask[start:end] = [True] * (end - start)
    assert example.trained.tolist() == mask


def corrected(name, row, tokens, mask):
    """TRL's mask without what the model would not generate, which each of its templates marks in a way of its own.

    That is what the generation prompt holds already (a line break for Qwen2.5, `<｜Assistant｜>`, `<|start|>assistant`,
    `<think>`), white space behind the token that ends a turn, an empty reasoning, and what stands in history alone:
    gpt-oss's `<|end|>` in place of `<|return|>`, and GLM's next turn.
    """
    asked = [{"role": "user", "content": "x"}]
    texts = [theirs(name).apply_chat_template(asked, tokenize=False, add_generation_prompt=on) for on in (True, False)]
    prompt = [theirs(name).decode([token]) for token in theirs(name)(texts[0].removeprefix(texts[1])).input_ids[1:]]
    found = [False] * len(mask)
    for start, end in runs(mask):
        ours = next((n for n in range(len(prompt), 0, -1) if tokens[start : start + n] == prompt[-n:]), 0)
        if not ours:
            while ours < len(prompt) and tokens[start + ours] == prompt[ours]:
                ours += 1
        start = without_empty_thought(tokens, start + ours, end)
        while tokens[end - 1] == "\n" and tokens[end - 2].endswith(">") and tokens[end - 2] != ">":
            end -= 1
        end -= (name, tokens[end - 1]) in {("gptoss", "<|end|>"), ("glm4moe", "<|user|>")}
        found[start:end] = [True] * (end - start)
    return found


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if accepted(*case)])
def test_located_turns_are_those_that_trl_marks(name, shape):
    row = SHAPES[shape]
    expected = by_transformers(f"{name}_training", row, return_assistant_tokens_mask=True)
    example = encode(ours(name), row)
    if example.ids.tolist() != expected.input_ids:
        # TRL's templates write another text: they keep all reasoning (Qwen3, DeepSeek), or end GLM's last turn.
        rewritten = {"qwen3", "qwen3_5_think", "glm4moe"} | (DROPPING if shape in ("inline", "empty_think") else set())
        assert name in rewritten or (shape == "reasoning" and name in NO_REASONING)
        return
    tokens = [theirs(name).decode([token]) for token in expected.input_ids]
    assert example.trained.tolist() == corrected(name, row, tokens, expected.assistant_masks)
