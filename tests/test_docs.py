"""The documentation: the site builds without a warning, links lead somewhere, and its commands run.

Commands on real bases and rows run here on tiny ones, in this process; those for hardware that is not there, or with
a config that the reader has yet to write, are parsed by the command's own parser and their keys validated.
"""

import argparse
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from load_script import load_script
from tiny import make_llama, make_rows, make_tokenizer, write_config

from jlora import cli
from jlora.__main__ import COMMANDS as TYPED
from jlora.config import load_config
from jlora.data.tokens import CHAT_TEMPLATES
from jlora.runtime import xla
from jlora.training.run import train

pytestmark = pytest.mark.prose

MODULES = TYPED | {"evaluation": "jlora.evaluation.__main__"}

ROOT = Path(__file__).parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Programs of others, which a machine that runs the tests need not have.
FOREIGN = (
    "git",
    "vllm",
    "kubectl",
    "llama.cpp/build/bin/llama-quantize",
    "llama.cpp/build/bin/llama-cli",
    "pip",
    "ollama",
)
# Commands whose first argument is a config.
CONFIGURED = ("jlora.train", "jlora.data", "jlora.plan", "jlora.effort")
PEER = ROOT / "tests" / "config" / "configs_of_peers" / "axolotl_alpaca_qlora_7b.yaml"


def build_site(folder, out):
    """mkdocs, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        timeout=120,
    )


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    done = build_site(ROOT, tmp_path / "site")
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent == ROOT / "docs" and f" {page.name}" not in nav] == []
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk|www.mkdocs)[^"]*\.(?:js|css|woff2?)"', home)


def test_a_link_or_an_anchor_to_nowhere_fails_the_build(tmp_path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    shutil.copyfile(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = tmp_path / "docs" / "cost.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n[a](memory.md#nowhere) [b](none.md)\n", encoding="utf-8")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "nowhere" in done.stderr and "none.md" in done.stderr


def test_one_address_of_the_repository():
    """Of a fork, `[project.urls]` and what CONTRIBUTING says to run change all of them."""
    texts = [*PAGES, ROOT / "mkdocs.yml", ROOT / "docs" / "quickstart.ipynb", ROOT / "pyproject.toml"]
    url = r"https://(?:github\.com|colab\.research\.google\.com/github)/([\w.-]+/jlora)\b"
    names = {name for path in texts for name in re.findall(url, path.read_text(encoding="utf-8"))}
    assert names == {REPOSITORY.removeprefix("https://github.com/")}


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        own = re.match(rf"{REPOSITORY}/(?:blob|raw)/main/(.*)", target)
        if page.name == "README.md":
            assert own or target.startswith(("https://", "#")), f"{target} is dead on PyPI"
            target = own[1] if own else target
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), target
        if anchor:
            there = found.read_text(encoding="utf-8")
            headings = [slug(heading) for heading in re.findall(r"^#+ (.*)$", there, re.MULTILINE)]
            assert anchor in {*headings, *re.findall(r'<a id="([^"]+)">', there)}, target


def commands():
    """(page, command) of every line of a bash block, continuation lines joined, comments cut off."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            for line in re.sub(r"\\\n\s*", " ", block).splitlines():
                words = shlex.split(line, comments=True)
                if words[:2] == ["python", "-P"]:
                    del words[1]
                if words[:1] == ["jlora"] and words[1] in MODULES:
                    words = ["python", "-m", f"jlora.{words[1]}", *words[2:]]
                if words and words[0] not in ("for", "done", "do", "cd"):
                    found.append((page.name, words))
    return found


COMMANDS = commands()
OURS = [(page, words) for page, words in COMMANDS if words[:2] == ["python", "-m"] and words[2].startswith("jlora.")]


def in_python(script):
    return script.startswith("scripts/") and "python" in (ROOT / script).read_text(encoding="utf-8").partition("\n")[0]


SCRIPTS = [words for _, words in COMMANDS if in_python(words[0])]


def test_every_other_command_is_known():
    """Scripts are there, extras too, and other programs are ones that are named here."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert len(OURS) > 30
    for page, words in COMMANDS:
        if (page, words) in OURS:
            continue
        script = words[1] if words[0] == "sbatch" else words[0]
        if script.startswith("scripts/"):
            assert os.access(ROOT / script, os.X_OK) or words[0] == "sbatch", words
            config = words[words.index("--config") + 1] if "--config" in words else "C"
            if config != "C":
                load_config(ROOT / config, [word for word in words if re.match(r"[a-z_]+(\.\w+)*=", word)])
        elif words[0] == "pip":
            for found in re.findall(r"(?:\.|jlora)\[([\w,]+)\]", " ".join(words)):
                assert set(found.split(",")) <= extras.keys(), words
            ours = [word for word in words if word.startswith("jlora")]
            assert all(word.endswith(f" @ git+{REPOSITORY}") for word in ours), "an index may hold another of that name"
        else:
            known = words[0] in FOREIGN or words[:3] == ["python3", "-m", "venv"]
            assert known or words[:2] == ["python", "llama.cpp/convert_hf_to_gguf.py"], (page, words)
        for word in words:
            if word.startswith(("scripts/", "configs/", "docs/img/")):
                assert (ROOT / word).exists(), (page, word)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with a chat template, rows, a config and a finished run, all tiny."""
    folder = tmp_path_factory.mktemp("docs")
    make_llama(folder / "base", max_position_embeddings=512, num_hidden_layers=1)
    tokenizer = make_tokenizer(folder / "base", merges=(("t", "h"),))  # for llama.cpp, which wants some
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    tokenizer.save_pretrained(folder / "base")
    make_rows(folder / "rows.jsonl")
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(lines[3:]), encoding="utf-8")
    training, data = {"max_steps": 1, "batch_size": 2, "eval_every": 1}, {"eval": str(folder / "few.jsonl")}
    write_config(
        folder / "config.yaml", folder / "base", folder / "rows.jsonl", folder / "run", training=training, data=data
    )
    train(load_config(folder / "config.yaml"), quiet=True)
    shutil.copytree(folder / "run", folder / "other")
    return folder


def parse(module, arguments, monkeypatch, capfd):
    """The command's own parser on its arguments; nothing is done. Fails with what it says of them."""
    monkeypatch.setattr(cli, "run", lambda body, **_: None)
    monkeypatch.setattr(xla, "use_huge_pages", lambda: None)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    try:
        importlib.import_module(MODULES.get(module.removeprefix("jlora."), module)).main()
    except SystemExit as exit:
        assert not exit.code, capfd.readouterr().err


@pytest.mark.parametrize(("page", "words"), OURS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(OURS)])
def test_command_is_as_the_parser_has_it(page, words, monkeypatch, capfd, world):
    module, arguments = words[2], [word.replace("$remat", "full") for word in words[3:]]
    assert "--config" not in arguments, "pages name the config first"
    parse(module, arguments, monkeypatch, capfd)
    if module in CONFIGURED and not arguments[0].startswith("-"):
        folder = ROOT / "jlora" / "quickstart" if arguments[0] == "quickstart.yaml" else ROOT
        config = folder / arguments[0]
        overrides = [word for word in arguments if re.match(r"[a-z_]+(\.\w+)*=", word)]
        load_config(config if config.is_file() else world / "config.yaml", overrides)


class Parsed(Exception):
    """A parser has taken all of its arguments."""


@pytest.mark.parametrize("words", SCRIPTS, ids=[f"{words[0]}-{i}" for i, words in enumerate(SCRIPTS)])
def test_script_is_called_as_its_parser_has_it(words, monkeypatch):
    """What a script then does its own test shows."""

    def stopping_after(method):
        def parse(*args, **kwargs):
            method(*args, **kwargs)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping_after(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed):
        load_script(words[0].removeprefix("scripts/")).main()


def on_tiny_inputs(words, world):
    """The arguments with everything real replaced, or None for what is only parsed."""
    module, arguments = words[2], words[3:]
    # Their own tests run them: a config, a training for each point of a curve, another program's tasks, servers.
    taken = ("distributed.", "objective.", "data.format=", "--push")
    if module in (
        "jlora.quickstart",
        "jlora.plan",
        "jlora.init",
        "jlora.effort",
        "jlora.verify",
        "jlora.reproduce",
        "jlora.evaluation",
    ) or any(word.startswith(taken) for word in words):
        return None
    if module in ("jlora.train", "jlora.data"):
        kept = [w for w in arguments[1:] if not w.startswith(("data.train=", "data.max_length=", "output_dir="))]
        return ["--config", str(world / "config.yaml"), *kept, *(["-q"] if module == "jlora.train" else [])]
    files = {
        "--base": "base",
        "--model": "base",
        "--adapter": "run",
        "--run": "run",
        "--data": "few.jsonl",
        "--prompts": "few.jsonl",
    }
    out: list[str] = []
    for word in arguments:
        last = out[-1] if out else ""
        if last in files:
            word = str(world / files[last])
        elif last == "--max-new-tokens":
            word = "4"
        elif last == "--generate":
            word = "1"
        elif word == "other-peft-folder":
            word = str(world / "other" / "adapter")
        elif last == "--from":
            word = str(PEER)
        elif re.match(r"runs/\w+(=|$)", word):
            name = "other" if re.match(r"runs/(b|rank4|other|second)\b", word) else "run"
            word = re.sub(r"^runs/\w+", str(world / name), word)
        out.append(word)
    if ("--generate" in out or module == "jlora.generate") and "--max-new-tokens" not in out:
        out += ["--max-new-tokens", "4"]
    return out


RUNS = {}
for _, _words in OURS:
    RUNS.setdefault(json.dumps([_words[2], on_tiny_inputs(_words, Path("WORLD"))]), _words)
RUNS = {key: words for key, words in RUNS.items() if json.loads(key)[1] is not None}
# Of commands that compile a program, one each by default; the others are left to the slow tests.
COMPILING = ("jlora.train", "jlora.generate", "jlora.evaluate")
FIRST = {words[2]: words for words in reversed(RUNS.values()) if words[2] in COMPILING}
TO_RUN = [
    pytest.param(
        words,
        id=f"{i}-{words[2]}",
        marks=[pytest.mark.slow] if words[2] in COMPILING and words is not FIRST[words[2]] else [],
    )
    for i, words in enumerate(RUNS.values())
]


@pytest.mark.parametrize("words", TO_RUN)
def test_command_runs_on_tiny_inputs(words, world, tmp_path, monkeypatch, capfd):
    module, arguments = words[2], on_tiny_inputs(words, world)
    for flag in ("--out", "--html", "--gguf", "--gguf-adapter"):
        if flag in arguments:
            at = arguments.index(flag) + 1
            arguments[at] = str(tmp_path / Path(arguments[at]).name)
    if module in ("jlora.train", "jlora.data"):
        arguments.append(f"output_dir={tmp_path / 'run'}")
    monkeypatch.setattr(xla, "use_huge_pages", lambda: None)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(MODULES.get(module.removeprefix("jlora."), module)).main()
    assert not exit.value.code, capfd.readouterr().err


def test_notebook_runs_on_the_tiny_model(world, tmp_path, monkeypatch, capfd):
    """Its code cells in order, with the settings' values replaced; the installation is left out."""
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and all(cell["id"] for cell in notebook["cells"])
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(tmp_path)
    shown = []
    fake = types.ModuleType("IPython.display")
    fake.IFrame = lambda *given: shown.append(given)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    few = str(world / "few.jsonl")
    tiny = {"BASE": str(world / "base"), "ROWS": few, "HELD_OUT": str(world / "rows.jsonl"), "STEPS": 2, "TOKENS": 3}
    scope: dict[str, object] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "".join(cells[0]["source"]).splitlines()[-1].startswith("%pip install ")
    for cell in cells[1:]:
        exec(compile("".join(cell["source"]), "cell", "exec"), scope)  # noqa: S102, our own cell
        if "parameters" in cell["metadata"].get("tags", ()):
            assert scope.keys() >= tiny.keys()
            scope |= tiny
    assert shown and shown[0][0].startswith("data:text/html;base64,")
    assert (tmp_path / "runs" / "notebook-peft" / "adapter_config.json").is_file()
    assert capfd.readouterr().out.count("AFTER: ") == 3
