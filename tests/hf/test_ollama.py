"""A Modelfile's template writes what the chat template does: by our own reading, and by Go's text/template."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import PUBLISHED, ours
from tiny import make_tokenizer

from jlora.data.alpaca import stanford_prompt
from jlora.data.tokens import CHAT_TEMPLATES, load_tokenizer
from jlora.hf.ollama import STANFORD, Pieces, modelfile, pieces_of

# As Ollama runs a template (ollama/ollama, template/template.go): on messages, and on a round without them.
PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var asked struct {
		Template string
		Values   []map[string]any
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	made := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	for _, values := range asked.Values {
		if err := made.Execute(os.Stdout, values); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("\\x00")
	}
}
"""
ROUNDS = [("user", "Wer\n\n {{ x }}?"), ("assistant", 'I "am".'), ("user", "<b>"), ("assistant", "d\\e"), ("user", "y")]
CHATS = [[{"role": role, "content": text} for role, text in ROUNDS[:end]] for end in (1, 3, 5)]
SYSTEM = [{"role": "system", "content": "Be\nkind."}]

GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEFAULT_SYSTEM = (  # as Qwen2's
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou are helpful, \"so\"."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TEMPLATES = {"llama2": CHAT_TEMPLATES["llama2"], "chatml": CHAT_TEMPLATES["chatml"], "gemma": GEMMA}
TEMPLATES["default system"] = DEFAULT_SYSTEM


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder, None)


@pytest.fixture(scope="module")
def go(tmp_path_factory):
    """What Go makes of a template and of some values."""
    program = shutil.which("go", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if program is None:
        pytest.skip("Go is not installed")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    settings = os.environ | {"GOCACHE": str(folder / "cache")}
    subprocess.run([program, "build", "-o", "made", "main.go"], cwd=folder, check=True, env=settings)

    def run(template, values):
        asked = json.dumps({"Template": template, "Values": values})
        done = subprocess.run([folder / "made"], input=asked, capture_output=True, text=True, check=True)
        return done.stdout.split("\0")[:-1]

    return run


def expected(tokenizer, chat):
    text = tokenizer.render(chat, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token) if tokenizer.add_bos else text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_template(name):
    """Those that TRL ships have default system prompts, some in the first turn, and reasoning that is to come."""
    tokenizer = ours(name)
    pieces = pieces_of(tokenizer)
    chats = CHATS + [SYSTEM + chat for chat in CHATS] * (pieces.system is not None)
    assert [pieces.written(chat) for chat in chats] == [expected(tokenizer, chat) for chat in chats]
    assert (pieces.system is None) == (name == "gemma")


@pytest.mark.parametrize("name", TEMPLATES)
def test_template(tokenizer, name):
    tokenizer = replace(tokenizer, chat_template=TEMPLATES[name])
    pieces = pieces_of(tokenizer)
    chats = CHATS + [SYSTEM + chat for chat in CHATS] * (name != "gemma")
    assert [pieces.written(chat) for chat in chats] == [expected(tokenizer, chat) for chat in chats]
    assert (pieces.system is None) == (name == "gemma") and tokenizer.add_bos
    assert not pieces.before.startswith(tokenizer.bos_token)


@pytest.mark.long
@pytest.mark.parametrize("name", TEMPLATES)
def test_template_in_go(tokenizer, go, name):
    tokenizer = replace(tokenizer, chat_template=TEMPLATES[name])
    chats = CHATS + [SYSTEM + chat for chat in CHATS] * (name != "gemma")
    values = [
        {
            "System": "".join(m["content"] for m in chat if m["role"] == "system"),
            "Messages": [{"Role": m["role"], "Content": m["content"]} for m in chat],
        }
        for chat in chats
    ]
    assert go(pieces_of(tokenizer).template(), values) == [expected(tokenizer, chat) for chat in chats]


@pytest.mark.long
def test_an_answer_that_was_begun_is_gone_on_with(tokenizer, go):
    pieces = pieces_of(replace(tokenizer, chat_template=CHAT_TEMPLATES["chatml"]))
    messages = [{"Role": "user", "Content": "a"}, {"Role": "assistant", "Content": "b"}]
    (text,) = go(pieces.template(), [{"System": "", "Messages": messages}])
    assert text.endswith(f"a{pieces.answer}b")


@pytest.mark.long
def test_stanford_prompt_in_go(go):
    rows = [{"instruction": "Say {{ blue }}"}, {"instruction": "a", "system": "Be kind."}]
    values = [{"System": row.get("system", ""), "Prompt": row["instruction"]} for row in rows]
    assert go(STANFORD, values) == [stanford_prompt(row) for row in rows]


def test_template_that_is_not_so_simple(tokenizer):
    assert pieces_of(replace(tokenizer, chat_template=COUNTING)) is None
    assert pieces_of(replace(tokenizer, chat_template="{{ raise_exception('never') }}")) is None
    assert pieces_of(replace(tokenizer, chat_template=None)) is None


def test_file():
    template = Pieces("", None, "B", "", "B").template()
    assert modelfile("m.gguf", template, ["</s>", "<|end|>"], 4096) == (
        f'FROM ./m.gguf\nTEMPLATE """{template}"""\nPARAMETER stop "</s>"\nPARAMETER stop "<|end|>"\n'
        "PARAMETER num_ctx 4096\n"
    )
    assert "TEMPLATE" not in modelfile("m.gguf", None, [], 4096)
