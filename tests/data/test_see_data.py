"""`python -m jlora.data`: what is shown is what is trained on, and what would train nothing or wrongly fails."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from tiny import make_llama, make_rows, make_tokenizer, write_config

from jlora.__main__ import main
from jlora.config import load_config
from jlora.data.checks import check_run, histogram
from jlora.data.encoding import read_data
from jlora.data.packing import plan_steps
from jlora.data.preview import SHOWN, SHOWN_CUT, show_rows
from jlora.data.tokens import load_tokenizer
from jlora.errors import DataError
from jlora.reports.data import look

GOOD = [{"prompt": f"{i}:", "completion": " " + "abc" * (1 + i % 3)} for i in range(6)]
# A template that ends no turn with EOS, as that of another model may.
ENDLESS = "{% for m in messages %}{{ bos_token if loop.first else '' }}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llama(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def config(base, tmp_path):
    """A function: rows, and keys of data -> the path of a config for them."""

    def write(rows, **keys):
        if isinstance(keys.get("eval"), list):
            keys["eval"] = str(_jsonl(tmp_path / "eval.jsonl", keys["eval"]))
        section = {"format": "completion", "max_length": 32} | keys
        rows = rows if not isinstance(rows, list) else _jsonl(tmp_path / "rows.jsonl", rows)
        return write_config(tmp_path / "c.yaml", base, rows, tmp_path / "run", data=section)

    return write


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def look_at(path, rows=5):
    return look(load_config(path), rows)


# What the config of these tests is warned of, whatever its rows.
OF_RUN = {"few_steps", "no_held_out"}


def levels(seen):
    return {found["name"]: found["level"] for found in seen.report["checks"] if found["name"] not in OF_RUN}


def test_notes_are_said_and_drawn_and_nothing_wrong(config, here, tmp_path):
    """Columns under other names, which a row of a question and an answer has."""
    path = config([{"question": f"{i}?", "answer": " " + "abc" * (1 + i % 3)} for i in range(6)])
    code, out, err = here("data", path, "--html", tmp_path / "page.html")
    assert (code, err) == (0, "") and 'note: data.train: the column "question" is read as prompt (in 6 rows)' in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<b class="note">note</b>' in page
    assert page.index('class="warning">warning') < page.index('class="note">note')


@pytest.mark.parametrize(
    ("overrides", "positions", "expected"),
    [
        ([], None, {"few_steps": "raise training.epochs", "no_held_out": "data.eval"}),
        (["data.eval=0.5", "training.max_steps=9"], 32, {"few_steps": "raise training.max_steps"}),
        (["data.eval=0.5", "training.max_steps=10"], 31, {"positions": "the base's 31 positions"}),
        (["data.eval=0.5", "training.epochs=30", "optimizer.warmup_steps=30"], 32, {"all_warmup": "warmup_ratio"}),
        (["data.eval=0.5", "training.epochs=30", "optimizer.warmup_steps=29"], 32, {}),
    ],
)
def test_a_run_that_trains_or_shows_less_than_it_seems(config, overrides, positions, expected):
    cfg = load_config(config(GOOD), ["training.max_steps=null", *overrides, "data.packing=false"])
    dataset = read_data(cfg, load_tokenizer(cfg.model.path, None))[0]
    found = check_run(cfg, plan_steps(cfg, dataset)[1], positions, True)
    assert {check.name: check.level for check in found} == dict.fromkeys(expected, "warning")
    for check in found:
        assert expected[check.name] in check.sentence


def test_rows_that_are_not_written_in_the_bases_chat_template_are_named(config, base, tmp_path):
    path = make_rows(tmp_path / "alpaca.jsonl")
    for prompt, template, noted in (("stanford", "llama2", 1), ("chat", "llama2", 0), ("stanford", None, 0)):
        seen = look_at(config(path, format="alpaca", max_length=320, prompt=prompt, chat_template=template))
        assert [check["name"] for check in seen.report["checks"]].count("no_template") == noted


def test_figures_are_those_of_the_batches(config, base, tmp_path):
    path = config(make_rows(tmp_path / "alpaca.jsonl"), format="alpaca", max_length=320, eval=0.2)
    seen, cfg = look_at(path), load_config(path)
    train_data, eval_data = read_data(cfg, load_tokenizer(base, None))
    lengths = [len(example.ids) for example in train_data.examples]
    found = seen.report["train"]
    assert found["held_out"] == len(eval_data.examples)
    assert found["rows"] == 24 and found["examples"] == len(lengths) == 24 - len(eval_data.examples)
    assert found["tokens"] == sum(lengths) and found["lengths"]["max"] == max(lengths)
    assert found["trained_tokens"] == sum(int(example.trained.sum()) for example in train_data.examples)
    assert sum(count for *_, count in found["histogram"]) == len(lengths)
    assert found["batches"]["rows"] == len(lengths) and found["batches"]["tokens"] == sum(lengths)
    assert found["batches"]["padded"] == -(-len(lengths) // cfg.training.batch_size)
    assert found["batches"]["packed"] <= found["batches"]["padded"]
    assert seen.report["eval"]["examples"] == len(eval_data.examples)


def test_held_out_rows_that_are_cut_are_not_said_to_be_whole(config, here, tmp_path):
    """Which rows were cut is counted before some are held out."""
    path = config([*GOOD, *({"prompt": f"{i}", "completion": "b" * 60} for i in range(6))], eval=0.5)
    code, out, _ = here("data", path, "--html", tmp_path / "page.html")
    train, held_out = (line for line in out.splitlines() if "exact copies " in line and "tokens a sequence" in line)
    assert code == 0 and train.startswith("  cut 6, ") and "cut" not in held_out
    assert look_at(path).report["eval"]["truncated"] is None


def test_rows_are_shown_as_they_are_trained_on(config, base):
    rows = [*GOOD, {"prompt": "naïve 日本 \x1b[31m:", "completion": "x" * 40}]
    cfg = load_config(config(rows))
    tokenizer = load_tokenizer(base, None)
    train_data, _ = read_data(cfg, tokenizer)
    shown = show_rows(cfg.data.train, 9, tokenizer, cfg.data)
    assert [row.where for row in shown] == train_data.places
    for row, example in zip(shown, train_data.examples, strict=True):
        kept = [piece for piece in row.sequences[0] if piece.part in ("context", "trained")]
        np.testing.assert_array_equal([piece.id for piece in kept], example.ids)
        assert [piece.part == "trained" for piece in kept] == example.trained.tolist()
        assert (row.tokens, row.trained) == (len(example.ids), example.trained.sum())
        assert [piece.text for piece in kept if piece.special][0] == "<s>"
    text = "".join(piece.text for piece in shown[0].sequences[0])
    assert text == f"<s>{GOOD[0]['prompt']}{GOOD[0]['completion']}</s>"
    last = shown[-1]
    assert "".join(piece.text for piece in last.sequences[0]).startswith("<s>naïve 日本 �[31m:x")
    cut = [piece for piece in last.sequences[0] if piece.part == "cut"]
    assert last.cut == len(cut) == 1 + 40 - (32 - 1 - len("naïve 日本 \x1b[31m:".encode()))


def test_long_sequences_are_shown_in_part(config, base):
    rows = [{"prompt": "a", "completion": "b" * (SHOWN + 900)}]
    cfg = load_config(config(rows, max_length=SHOWN + 100))
    (row,) = show_rows(cfg.data.train, 1, load_tokenizer(base, None), cfg.data)
    pieces = row.sequences[0]
    assert [piece.text for piece in pieces if piece.part == "gap"] == ["100 more tokens", "739 more tokens"]
    assert len(pieces) == SHOWN + SHOWN_CUT + 2 and row.tokens == SHOWN + 100 and row.cut == 803


def test_both_answers_of_a_pair_are_shown(config, base):
    rows = [{"prompt": "a", "chosen": " b", "rejected": " cc"}]
    path = config(rows, format="preference")
    path.write_text(path.read_text(encoding="utf-8") + "objective: {name: dpo}\n", encoding="utf-8")
    seen = look_at(path)
    texts = ["".join(piece.text for piece in pieces) for pieces in seen.rows[0].sequences]
    assert texts == ["<s>a b</s>", "<s>a cc</s>"] and not seen.errors


@pytest.mark.parametrize(
    ("rows", "keys", "name", "level", "words"),
    [
        ([*GOOD, {"prompt": "<s><s>a", "completion": "b"}], {}, "double_bos", "error", "two BOS in a row"),
        (GOOD, {"max_length": 6}, "end_never_trained", "error", "data.max_length=6; raise it"),
        ([{"text": "x" * 50}], {"format": "text", "split_long": False}, "end_never_trained", "warning", "all are cut"),
        ([*GOOD, {"prompt": "a", "completion": ""}], {}, "bad_rows", "error", 'rows.jsonl:7: the field "completion"'),
        ([*GOOD, {"prompt": "a"}], {"on_bad_row": "skip"}, "dropped", "warning", "missing_field 1"),
        ([*GOOD, {"prompt": "a", "completion": "b" * 60}], {}, "truncated", "warning", "1 of 7 rows (14 %) are cut"),
        ([*GOOD, GOOD[2]], {}, "duplicates", "warning", "the first at rows.jsonl:7"),
        (GOOD, {"eval": GOOD[:2]}, "overlap", "error", "2 of 2 sequences are in data.train too"),
        (GOOD, {"eval": [GOOD[3], {"prompt": "q", "completion": "r"}]}, "overlap", "warning", "1 of 2 sequences"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(config, rows, keys, name, level, words):
    seen = look_at(config(rows, **keys))
    beside = {"end_never_trained": {"truncated": "warning"}, "bad_rows": {}}.get(name, {})
    assert levels(seen) == {name: level} | beside
    sentence = next(found["sentence"] for found in seen.report["checks"] if found["name"] == name)
    assert words in sentence and "\n" not in sentence
    assert seen.errors == ([sentence] if level == "error" else [])


def test_a_run_whose_held_out_rows_are_all_trained_on_does_not_begin(config, here, tmp_path):
    code, _, err = here("train", config(GOOD, eval=GOOD[:2]), "-q")
    assert code == 3 and err.startswith("error: data.eval: 2 of 2 sequences are in data.train too"), err
    assert err.count("\n") == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_chat_template_that_ends_no_turn(config, tmp_path):
    template = tmp_path / "endless.jinja"
    template.write_text(ENDLESS)
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": f"b{i}"}]} for i in range(3)]
    seen = look_at(config(rows, format="sharegpt", max_length=64, chat_template=str(template)))
    assert levels(seen) == {"end_never_trained": "error"} and "chat template ends no turn" in seen.errors[0]
    template.write_text(ENDLESS.replace("\n{%", "{{ eos_token }}\n{%"))
    assert not levels(look_at(config(rows, format="sharegpt", max_length=64, chat_template=str(template))))


def test_good_rows_pass_and_no_usable_row_fails(config):
    seen = look_at(config(GOOD, eval=[{"prompt": "q", "completion": "r"}]))
    assert levels(seen) == {} and len(seen.rows) == 5
    with pytest.raises(DataError, match="no usable row"):
        look_at(config([{"prompt": "a" * 50, "completion": "b"}]))


def test_bad_rows_come_before_what_is_wrong_with_the_rest(config):
    with pytest.raises(DataError, match="^rows.jsonl:2: the field .* missing.*; rows.jsonl:3: .*fix them"):
        look_at(config([GOOD[0], {"prompt": "a"}, {"prompt": "a", "completion": ""}], eval=0.1))


def test_bad_rows_of_every_file_are_told_and_none_is_called_dropped(config, capsys, monkeypatch):
    path = config([*GOOD, {"prompt": "a"}], eval=[{"prompt": "q", "completion": "r"}, {"completion": "b"}])
    seen = look_at(path)
    found = seen.report["checks"][0]
    assert (found["name"], found["count"]) == ("bad_rows", 2) and levels(seen) == {"bad_rows": "error"}
    assert "rows.jsonl:7: " in found["sentence"] and "; and eval.jsonl:2: " in found["sentence"]
    assert run(monkeypatch, "--config", path, "--rows", 0) == 3
    out = capsys.readouterr().out
    assert "train would stop at the bad rows" in out and "bad rows 1" in out and "dropped" not in out


@pytest.mark.parametrize(("longest", "width"), [(1, 1), (19, 1), (20, 2), (99, 5), (512, 50), (8191, 500)])
def test_histogram(longest, width):
    found = histogram(np.array([0, longest, longest // 2]))
    assert {high - low for low, high, _ in found} == {width} and len(found) <= 20
    assert found[0][0] == 0 and found[-1][0] <= longest < found[-1][1] and sum(count for *_, count in found) == 3


class Page(HTMLParser):
    """The text of each token by its class, and what does not balance or would be fetched."""

    def __init__(self, markup):
        super().__init__()
        self.open, self.problems, self.parts = [], [], {}
        self.feed(markup)
        self.problems += [f"never closed: {tag}" for tag, _ in self.open]

    def handle_starttag(self, tag, attrs):
        self.problems += [f"fetches {name}" for name, _ in attrs if name in ("src", "href", "onload", "onclick")]
        if tag not in ("meta", "br", "wbr"):
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        if self.open.pop()[0] != tag:
            self.problems.append(f"unexpected </{tag}>")

    def handle_data(self, data):
        classes = [name for _, name in self.open] if "pre" in [tag for tag, _ in self.open] else []
        if part := next((name for name in classes if name in ("context", "trained", "cut", "gap")), None):
            self.parts[part] = self.parts.get(part, "") + data


def test_page_is_whole_and_colours_what_is_trained(config, monkeypatch, tmp_path):
    rows = [{"prompt": "<b>&amp;\u202e\n:", "completion": "x" * 40}, {"prompt": "a"}, *GOOD]
    page = tmp_path / "page.html"
    assert run(monkeypatch, "--config", config(rows, eval=0.3, on_bad_row="skip"), "--html", page, "-q") == 0
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert found.problems == [] and "script" not in text and "@import" not in text and "url(" not in text
    assert found.parts["context"].strip().startswith("<s><b>&amp;\ufffd↵\n:") and "\u202e" not in text
    assert found.parts["cut"] == "x" * 22 + "</s>" and found.parts["trained"].startswith("x" * 18 + " abc</s>")
    assert text.count("<svg") == 2 and text.count('<section class="row">') == 5
    assert "1 of 8 rows (12 %) are dropped (missing_field 1)" in text and "nothing found wrong" not in text
    for chart in re.findall(r"<svg.*?</svg>", text, re.S):
        names = ET.fromstring(chart).itertext()
        assert {"sequences", "tokens in a sequence"} <= set(names)


def run(monkeypatch, *arguments):
    """The command in this process: its exit code."""
    monkeypatch.setattr("sys.argv", ["jlora", "data", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_command(config, capsys, monkeypatch):
    path = config([*GOOD, {"prompt": "<s><s>\u202ea", "completion": "b" * 60}])
    assert run(monkeypatch, "--config", path, "--rows", 7) == 3
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("error: data.train: 1 of 7 sequences (14 %) have two BOS")
    assert "warning: data.train: 1 of 7 rows (14 %) are cut" in out and "7 rows, 7 sequences" in out
    assert f"<s>{GOOD[1]['prompt']}⟦{GOOD[1]['completion']}</s>⟧" in out and "✂" in out

    assert run(monkeypatch, "--config", path, "--rows", 2, "--json") == 3
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and len(found["first_rows"]) == 2 and found["checks"][0]["name"] == "double_bos"

    assert run(monkeypatch, "--config", config(GOOD), "-q", "data.max_length=16") == 0
    assert capsys.readouterr() == ("", "")
    assert run(monkeypatch, "--config", path, "--rows", -1) == 2
    assert "error: --rows" in capsys.readouterr().err
