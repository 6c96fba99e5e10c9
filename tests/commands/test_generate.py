"""`jlora generate`: prompts from flags, files and a chat; what it prints, and which prompts it refuses."""

import json
import shutil

import pytest
from command_line import one_sentence, shell


def generate(here, world, *arguments, stdin=""):
    code, out, err = here(
        *("generate", "--base", world / "base", "--dtype", "float32", "--max-new-tokens", 8, "-q", *arguments),
        stdin=stdin,
    )
    assert (code, err) == (0, ""), err
    return out


def test_greedy_text_is_the_same_each_time_and_no_seed_matters(world, here):
    texts = {generate(here, world, "--prompt", "Say blue", "--seed", seed) for seed in (0, 0, 1)}
    assert len(texts) == 1 and texts.pop().strip()


@pytest.mark.long
def test_sampled_text_follows_the_seed(world, here):
    def text(seed, top_p):
        common = ("--prompt", "Say blue", "--temperature", 5.0)
        return generate(here, world, *common, "--seed", seed, "--top-p", top_p)

    assert text(3, 0.9) == text(3, 0.9)
    assert len({text(seed, 0.9) for seed in (3, 4, 5)}) == 3
    # The likeliest token alone is greedy decoding.
    assert text(3, 1e-6) == generate(here, world, "--prompt", "Say blue")


def test_adapter_changes_the_text(world, here):
    prompts = world / "eval.jsonl"
    common = ("--prompts", prompts, "--json", "--format", "alpaca")
    assert generate(here, world, *common) != generate(here, world, *common, "--adapter", world / "run")


def test_an_adapter_knows_its_base(world, here, tmp_path):
    """As a run folder, as its adapter/ and as a PEFT folder alone; one that has moved is asked for."""
    common = ("--prompt", "Say blue", "--dtype", "float32", "--max-new-tokens", 8, "--format", "alpaca", "-q")
    told = here("generate", "--base", world / "base", "--adapter", world / "run", *common)
    shutil.copytree(world / "run" / "adapter", tmp_path / "peft")
    for adapter in (world / "run", world / "run" / "adapter", tmp_path / "peft"):
        assert here("generate", "--adapter", adapter, *common) == told, adapter
    config = tmp_path / "peft" / "adapter_config.json"
    tree = json.loads(config.read_text(encoding="utf-8"))
    for base, words in ((str(tmp_path / "gone"), "if the base of"), (None, "names no base")):
        config.write_text(json.dumps(tree | {"base_model_name_or_path": base}), encoding="utf-8")
        code, _, err = here("generate", "--adapter", tmp_path / "peft", *common)
        assert code == 4 and words in one_sentence(err) and "--base" in err


def test_prompts_of_a_file_as_json_rows_in_order(world, here):
    lines = (world / "eval.jsonl").read_text().splitlines()
    common = ("--adapter", world / "run", "--json")
    printed = generate(here, world, "--prompts", world / "eval.jsonl", *common).splitlines()
    answers = [json.loads(line) for line in printed]
    assert [answer["prompt"] for answer in answers] == [json.loads(line) for line in lines]
    for answer in answers:
        assert answer.keys() == {"prompt", "text", "tokens", "ended"}
        assert answer["tokens"] <= 8 and answer["ended"] == (answer["tokens"] < 8)
    # Neighbours and padding in the batch change nothing.
    alone = generate(here, world, "--prompts", world / "eval.jsonl", "--batch-size", 1, *common)
    assert alone.splitlines() == printed


def test_answers_to_many_prompts_stand_below_them(world, here, tmp_path):
    """Each prompt as text, without its row's own answer; an answer of the most tokens is marked as cut."""
    rows = [{"instruction": "Say blue.", "input": "Twice.", "output": "SECRET"}, {"instruction": "Say tree."}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = ("--adapter", world / "run", "--prompts", tmp_path / "two.jsonl")
    printed = generate(here, world, *common)
    answers = [json.loads(line) for line in generate(here, world, *common, "--json").splitlines()]
    marks = ["" if answer["ended"] else " … cut here (--max-new-tokens)" for answer in answers]
    heads = ["--- Say blue.\n\nTwice.\n", "--- Say tree.\n"]
    parts = zip(heads, answers, marks, strict=True)
    assert printed == "".join(f"{head}{answer['text']}{mark}\n" for head, answer, mark in parts)
    assert any(marks) and "SECRET" not in printed


def test_prompt_is_the_instruction_of_an_alpaca_run(world, here, tmp_path):
    row = {"instruction": "Say blue 3 times."}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    common = ("--adapter", world / "run" / "adapter", "--json")  # the run is found from its adapter/ too
    by_flag = json.loads(generate(here, world, "--prompt", row["instruction"], *common))
    by_file = json.loads(generate(here, world, "--prompts", tmp_path / "one.jsonl", *common))
    assert by_flag == by_file and by_flag["prompt"] == row


def test_generate_says_its_format_on_stderr_alone(world, here):
    code, out, err = here("generate", "--base", world / "base", "--prompt", "a", "--max-new-tokens", 1)
    cut = "the answer is cut at --max-new-tokens 1\n"
    assert (code, err) == (0, f"format completion\n{cut}") and "format" not in out and "cut" not in out


@pytest.mark.long
def test_chat_over_a_pipe(world):
    """Single instructions to an alpaca run, which has no chat template."""
    done = shell(
        *("generate", "--base", world / "base", "--adapter", world / "run", "--chat", "--max-new-tokens", 8, "-q"),
        stdin="Say blue.\nSay tree.\n\nnot reached\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") >= 2 and "> " not in done.stdout


def test_chat_remembers_its_turns(world, here):
    def chat(stdin, *arguments):
        return generate(here, world, "--chat", "--chat-template", "llama2", *arguments, stdin=stdin)

    first, both = chat("Say blue.\n"), chat("Say blue.\nSay tree.\n")
    assert both.startswith(first) and len(both) > len(first)
    assert both.removeprefix(first) != chat("Say tree.\n")
    assert chat("") == "" and chat("\n") == ""


def test_chat_goes_on_after_an_empty_answer(world, here, monkeypatch):
    """An answer that ends at once is no turn that a template would accept."""
    from jlora.inference import prompting

    seen = []

    def silent(model, prompts, **options):
        seen.append(prompts[0])
        yield [[]]

    monkeypatch.setattr(prompting, "generate", silent)
    out = generate(here, world, "--chat", "--chat-template", "llama2", stdin="one\none\n")
    assert out == "\n\n" and len(seen) == 2 and seen[0] == seen[1]


def test_a_base_with_a_chat_template_is_talked_to(world, here, tmp_path):
    """Such as a merged model: a bare text is what a user says, unless another format is asked for."""
    shutil.copytree(world / "base", tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    given = ("generate", "--base", tmp_path / "base", "--prompt", "a", "--max-new-tokens", 2)
    assert here(*given)[2].splitlines()[0] == "format messages"
    assert here(*given, "--format", "completion")[2].splitlines()[0] == "format completion"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("{tmp}/none.jsonl", "none.jsonl: no such file"),
        ("{tmp}", "no such file"),
        ("{world}/config.yaml", "files ending in '.yaml'"),
        ("{tmp}/second.jsonl", 'second.jsonl:3: the field "prompt" is missing'),
        ("{tmp}/empty.jsonl", "empty.jsonl: holds no prompt"),
        ("{tmp}/torn.jsonl", "torn.jsonl:2: malformed JSON"),
        ("{tmp}/bytes.jsonl", "bytes.jsonl:1: not valid UTF-8"),
    ],
)
def test_bad_prompts(world, here, tmp_path, prompts, words):
    (tmp_path / "second.jsonl").write_text('{"prompt": "a"}\n\n{"text": "a"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    path = prompts.format(world=world, tmp=tmp_path)
    code, out, err = here("generate", "--base", world / "base", "--prompts", path, "-q")
    assert (code, out) == (3, "") and words in one_sentence(err)


def test_empty_prompt(world, here):
    code, _, err = here("generate", "--base", world / "base", "--prompt", " ", "-q")
    assert code == 3 and "--prompt" in one_sentence(err)


def test_a_prompt_beyond_the_positions_of_the_base_is_warned_of(world, here, tmp_path):
    shutil.copytree(world / "base", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8}))
    ask = ("generate", "--base", tmp_path / "base", "--prompt", "0123456789", "--max-new-tokens", 1)
    code, _, err = here(*ask)
    assert code == 0 and "tokens is beyond the base's 8 positions" in err
    assert here(*ask, "-q")[2] == ""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "0123456789", "completion": "abc"}\n', encoding="utf-8")
    rows = ("--data", tmp_path / "rows.jsonl", "--format", "completion", "--max-length", 64)
    assert "is beyond the base's 8 positions" in here("evaluate", "--base", tmp_path / "base", *rows)[2]
