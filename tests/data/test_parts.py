"""Which tokens of a chat are of tools and which are reasoning, and how the page shows them."""

import itertools
import re

import pytest
from chat_templates import DROPPING, PUBLISHED, SHAPES, TOOLS, accepted, answer, call, ours, theirs, user
from data_files import jsonl, section, write
from rich.console import Console

from jlora.data.parts import parts_of
from jlora.data.preview import Shown, show_rows
from jlora.reports.data import print_report, render

CASES = itertools.product(PUBLISHED, ("tools", "results", "reasoning", "inline", "one", "system"))


def words(name, shape, **row):
    """The words of tools and of reasoning."""
    text, parts = parts_of(ours(name), SHAPES[shape] | row, "messages", "keep")
    assert all(0 <= start < end <= len(text) for start, end, _ in parts)
    return [[text[start:end] for start, end, kind in sorted(parts) if kind == wanted] for wanted in ("tool", "thought")]


@pytest.mark.parametrize(("name", "shape"), [case for case in CASES if accepted(*case)])
def test_tools_and_reasoning_are_told_apart(name, shape):
    tools, thoughts = words(name, shape)
    told = "".join(tools)
    if shape in ("tools", "results"):
        offered, called, *result = tools
        assert "The weather of a city." in offered and "weather" in called and "Rome" in called and "Rome?" not in told
        assert offered.count("weather") >= 1 and result == (["22 C"] if shape == "results" else [])
        assert "It is 22 C." not in told and "Thanks" not in told
    else:
        assert tools == []
    if shape in ("reasoning", "inline"):
        assert "two, two" in thoughts[-1] and "4" not in "".join(thoughts)
    elif not (name == "deepseek_r1_distill" or name in DROPPING):
        assert re.sub(r"</?think>|\s", "", "".join(thoughts)) == ""


def test_what_is_said_before_a_call_is_no_call():
    turns = [user("Rome?"), answer("I look it up.", tool_calls=[call("Rome")])]
    (_, called), _ = words("qwen2_5", "tools", messages=turns)
    assert called.strip().startswith("<tool_call>")


def shown_rows(tmp_path, rows, name="qwen3", **changes):
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    return show_rows(str(path), 9, ours(name), section(format="messages", **{"max_length": 2000} | changes))


def text_of(row, kind):
    return "".join(piece.text for piece in row.sequences[0] if piece.kind == kind)


def test_tokens_have_the_kind_of_their_characters(tmp_path):
    thinking = [user("1+1?"), answer("Zwei 🙂", reasoning_content="eins 🤔 und eins")]
    rows = [SHAPES["results"], {"messages": thinking}, SHAPES["one"]]
    tools, thought, plain = shown_rows(tmp_path, rows)
    assert text_of(tools, "tool").startswith("<|im_start|>system\n# Tools") and text_of(tools, "tool").endswith("22 C")
    assert '"city"' in text_of(tools, "tool")
    assert text_of(thought, "thought") == "<think>\neins 🤔 und eins\n</think>\n\n"
    assert "Zwei 🙂<|im_end|>" in text_of(thought, "") and text_of(thought, "tool") == ""
    assert {piece.kind for piece in plain.sequences[0]} <= {"", "thought"}
    whole = "".join(piece.text for piece in thought.sequences[0])
    assert whole == theirs("qwen3").apply_chat_template(thinking, tokenize=False)


def test_cut_rows_and_rows_of_other_formats(tmp_path):
    (row,) = shown_rows(tmp_path, [SHAPES["results"]], max_length=600, train_on="all")
    assert row.cut and {piece.part for piece in row.sequences[0] if piece.kind == "tool"} >= {"trained"}
    path = write(tmp_path / "texts.jsonl", jsonl([{"prompt": "<think>a</think>", "completion": "b"}]))
    (row,) = show_rows(str(path), 1, ours("qwen3"), section())
    assert {piece.kind for piece in row.sequences[0]} == {""}


WEIGHTED = [user("1+1?"), answer("2", weight=0.5), user("2+2?"), answer("4", weight=2), user("3+3?"), answer("6")]


def page_of(rows):
    report = {
        "checks": [], "near": [], "eval": None,
        "train": {
            "rows": 1, "examples": 1, "dropped": {}, "truncated": 0, "tokens": 2, "trained_tokens": 1, "duplicates": 0,
            "lengths": dict.fromkeys(("min", "median", "p90", "p99", "max"), 2), "histogram": [(0, 5, 1)],
            "batches": dict.fromkeys(("tokens", "packed", "packed_tokens", "padded", "padded_tokens"), 1),
            "sources": [],
        },
    }  # fmt: skip
    return render("c", report, rows), report | {"steps": 1}


def test_a_weight_is_a_shade(tmp_path):
    (row,) = shown_rows(tmp_path, [{"messages": WEIGHTED}], "qwen2_5")
    weights = {
        piece.text: piece.weight for piece in row.sequences[0] if piece.part == "trained" and len(piece.text) == 1
    }
    assert weights == {"2": 0.5, "4": 2.0, "6": 1.0}
    assert row.as_json()["sequences"][0][-2]["weight"] == 1.0
    page, _ = page_of([row])
    shades = re.findall(r'<span class="trained"(?: style="--shade:(\d+)%")?>', page.partition("<section")[2])
    assert shades == ["44", "", "62"]  # 25 and three quarters of the share of the largest
    assert ', weight 0.5">2' in page and "trained with less weight" in page
    (even,) = shown_rows(tmp_path, [SHAPES["turns"]], "qwen2_5")
    assert "--shade:" not in page_of([even])[0].partition("<main")[2]


@pytest.mark.parametrize(("shape", "says"), [("results", "tools"), ("reasoning", "reasoning"), ("one", "")])
def test_what_colours_mean_is_said_where_they_are(tmp_path, shape, says):
    page, report = page_of(shown_rows(tmp_path, [SHAPES[shape]], "qwen3_instruct_2507"))
    key = re.search(r'<p class="key">.*?</p>', page, re.DOTALL)[0]
    assert [name for name in ("tools", "reasoning") if name in key] == [name for name in [says] if name]
    rows = [Shown("a", [])] + shown_rows(tmp_path, [SHAPES[shape]], "qwen3_instruct_2507")
    console = Console(force_terminal=True, color_system="standard", width=400, record=True)
    print_report(report, rows, console)
    out = console.export_text(styles=True)
    # Bold where the answer is trained; cyan and magenta as ANSI has them.
    assert ("\x1b[36m" in out, "\x1b[1;36m" in out) == ((shape == "results",) * 2)
    assert ("\x1b[1;35m" in out) == (shape == "reasoning")


def test_tools_in_another_place_of_the_template():
    """What stands before them and at their end alike is not cut within a word of the template."""
    offered = words("qwen3", "tools")[0][0]
    assert offered.startswith("<|im_start|>system\n# Tools") and offered.endswith("<|im_end|>\n")
    assert words("qwen3", "tools", tools=TOOLS * 2)[0][0].count('"name": "weather"') == 2
