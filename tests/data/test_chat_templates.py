"""Published templates x rows of every shape: ids as transformers', masks as transformers' and TRL's."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from chat_templates import (
    DROPPING,
    PUBLISHED,
    REFUSED,
    SHAPES,
    accepted,
    answer,
    encode,
    ours,
    shown,
    theirs,
    user,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jlora.data.row import BadRow

CASES = list(itertools.product(PUBLISHED, SHAPES))
# Templates that read no `reasoning_content`: here it stands in the last answer, between tags, where they would lose it.
NO_REASONING = {
    *("llama3", "qwen2_5", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "phi3_5", "deepseek_r1_distill"),
    *("deepseekv3", "lfm2", "cohere2"),
}


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


# Of the answers of "turns", in order; the last two shapes of the matrix.
WEIGHTS = (0.5, 0.0, 2.0)


def answers_of(name, row):
    """What transformers marks of each answer by TRL's training template, as a mask of its own."""
    expected = by_transformers(f"{name}_training", row, return_assistant_tokens_mask=True)
    tokens = [theirs(name).decode([token]) for token in expected.input_ids]
    found = np.zeros((len(row["messages"]) // 2, len(tokens)), bool)
    for mask, (start, end) in zip(found, runs(expected.assistant_masks), strict=True):
        mask[without_empty_thought(tokens, start, end) : end] = True
    return found


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("marked", [True, False])
def test_weights_of_turns_and_the_last_answer_alone(name, marked):
    row = SHAPES["turns"]
    tokenizer = ours(f"{name}_training" if marked else name)
    if marked:
        answers = answers_of(name, row)
    else:  # `test_located_turns_are_those_that_trl_marks` has shown which they are
        trained = encode(tokenizer, row).trained
        answers = np.stack([(np.arange(len(trained)) >= a) & (np.arange(len(trained)) < b) for a, b in runs(trained)])
    turns = [dict(turn) for turn in row["messages"]]
    for turn, weight in zip(turns[1::2], WEIGHTS, strict=True):
        turn["weight"] = weight
    np.testing.assert_array_equal(encode(tokenizer, {"messages": turns}).weights, np.array(WEIGHTS) @ answers)
    np.testing.assert_array_equal(encode(tokenizer, row, train_on="last").weights, answers[-1])


# Ways of templates, made small: `[role]` begins a turn and `<|end|>` ends it, which is a token.
HEAD = "{{ '[' + m.role + ']' + (m.content or '') "
ASKED = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # The end of a turn is written by what follows it, so that of the last turn is not.
        (
            "{% for m in messages %}{{ '<|end|>' if not loop.first }}" + HEAD + "}}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|end|>[assistant]' }}{% endif %}",
            "[user] a \n<|end|>[assistant]⟦ b \n⟧<|end|>[user]c<|end|>[assistant]⟦d⟧",
        ),
        # A user's turn is ended otherwise if it is the last.
        (
            "{% for m in messages %}" + HEAD + "+ ('' if loop.last and m.role == 'user' else '<|end|>') }}{% endfor %}"
            + ASKED,
            "[user] a \n<|end|>[assistant]⟦ b \n<|end|>⟧[user]c<|end|>[assistant]⟦d<|end|>⟧",
        ),
        # The last turn alone has another end, and white space stands behind every end.
        (
            "{% for m in messages %}" + HEAD + "+ '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '[assistant]' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
            "[user] a \n<|end|>\n[assistant]⟦ b \n<|end|>⟧\n[user]c<|end|>\n[assistant]⟦d<|end|>\n<|endoftext|>⟧",
        ),
        # The generation prompt begins something that is not in the text.
        (
            "{% for m in messages %}" + HEAD + "+ '<|end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '[assistant] <think>\n' }}{% endif %}",
            "[user] a \n<|end|>[assistant]⟦ b \n<|end|>⟧[user]c<|end|>[assistant]⟦d<|end|>⟧",
        ),
        # Contents are looked at by their ends.
        (
            "{% for m in messages %}{% if m.content.endswith('c') %}{{ '!' }}{% endif %}" + HEAD + "+ '<|end|>' }}"
            "{% endfor %}" + ASKED,
            "[user] a \n<|end|>[assistant]⟦ b \n<|end|>⟧![user]c<|end|>[assistant]⟦d<|end|>⟧",
        ),
        # No turn is headed, and nothing is added to ask with.
        (
            "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}",
            " a \n<|end|>⟦ b \n<|end|>⟧c<|end|>⟦d<|end|>⟧",
        ),
        # The generation prompt stands behind every conversation, so that no answer shows where it begins.
        ("{% for m in messages %}" + HEAD + "+ '<|end|>' }}{% endfor %}{{ '[assistant]?' }}", None),
    ],
)  # fmt: skip
def test_ways_of_templates(template, expected):
    row = {"messages": [user(" a \n"), answer(" b \n"), user("c"), answer("d")]}
    tokenizer = replace(ours("phi3"), chat_template=template)
    if expected is None:
        with pytest.raises(BadRow) as caught:
            encode(tokenizer, row)
        assert caught.value.reason == "unstable_template" and "{% generation %}" in caught.value.message
    else:
        assert shown("phi3", encode(tokenizer, row)) == expected


def test_a_template_that_wants_a_user_before_anything_else():
    """So a first turn of the assistant's cannot be rendered alone, nor be asked for."""
    template = (
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('none') }}{% endif %}"
        "{% for m in messages %}" + HEAD + "+ '<|end|>' }}{% endfor %}" + ASKED
    )
    row = {"messages": [{"role": "system", "content": "x"}, answer(" a "), user("b"), answer("c")]}
    found = shown("phi3", encode(replace(ours("phi3"), chat_template=template), row))
    assert found == "[system]x<|end|>[assistant]⟦ a <|end|>⟧[user]b<|end|>[assistant]⟦c<|end|>⟧"


def test_a_tag_that_the_template_writes_is_not_written_twice():
    template = (
        "{% for m in messages %}{{ '[' + m.role + ']' + ('<think>\n' if m.role == 'assistant' and loop.last else '') "
        "+ m.content.split('</think>')[-1] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]<think>\n' }}{% endif %}"
    )
    tokenizer = replace(ours("phi3"), chat_template=template)
    for message in (answer("4", reasoning_content="two"), answer("<think>\ntwo\n</think>\n\n4")):
        example = encode(tokenizer, {"messages": [user("2+2?"), message]})
        assert shown("phi3", example) == "[user]2+2?<|end|>[assistant]<think>\n⟦two\n</think>\n\n4<|end|>⟧"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_whatever_stands_in_the_turns(rounds):
    """What is trained decodes to the answers, however they look, and the text is that of transformers."""
    rounds = [pair for pair in rounds if all(text.strip() and not ERRATIC.search(text) for text in pair)]
    assume(rounds)
    turns = [turn for asked, told in rounds for turn in (user(asked), answer(told))]
    example = encode(ours("qwen2_5"), {"messages": turns})
    assert example.ids.tolist() == by_transformers("qwen2_5", {"messages": turns}).input_ids
    answers = [shown_part(example, start, end) for start, end in runs(example.trained.tolist())]
    assert answers == [told + "<|im_end|>" for _, told in rounds]


# What `check_text` refuses, and reasoning, which is another test's.
ERRATIC = re.compile("[\ufdd0-\ufdef]|think>|<[|]")


def shown_part(example, start, end):
    return theirs("qwen2_5").decode(example.ids[start:end].tolist())
