"""Chat templates run in a sandbox whose time and memory are bounded.

The numbers are those of the fault cases in docs/reliability.md.
"""

import time
from pathlib import Path

import pytest
from command_line import sentence_of
from data_files import write

from jlora.data.tokens import load_tokenizer
from jlora.errors import ConfigError, DataError
from jlora.files import sandbox

TEMPLATES = {
    "range": "{{ range(10**9) }}",
    "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch planted') }}",
    "change": "{{ messages.append(1) }}",
}
GREEDY = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x > 1 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "repeat": "{{ 'a' * 10 ** 11 }}",
    "width": "{{ '{:>99999999999}'.format(1) }}",
    "filter": "{{ 'a' | center(10 ** 11) }}",
    "text": "{{ 'a' * 10 ** 8 }}",
}
MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.long
@pytest.mark.parametrize("name", [*TEMPLATES, *GREEDY])
def test_case_28_chat_template_runs_in_a_bounded_sandbox(smallest_base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    template = write(tmp_path / "evil.jinja", (TEMPLATES.get(name) or GREEDY[name]).encode())
    tokenizer = load_tokenizer(smallest_base, str(template))
    began = time.monotonic()
    error, words = (DataError, "refuses the messages") if name in TEMPLATES else (ConfigError, "takes more than")
    message = sentence_of(error, tokenizer.render, MESSAGES, add_generation_prompt=True)
    assert f"the chat template {words}" in message
    assert time.monotonic() - began < 20 and not Path("planted").exists()
    assert load_tokenizer(smallest_base, "llama2").render(MESSAGES, add_generation_prompt=True) == "<s>[INST] a [/INST]"
