"""What the commands say of themselves, what they refuse to take, and the exit code of each kind of failure."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from command_line import one_sentence, shell

from jlora import cli
from jlora.__main__ import COMMANDS, PURPOSES
from jlora.errors import ConfigError, DataError, MemoryExceeded
from jlora.runtime import xla

ROOT = Path(__file__).parents[2]
ANSWERING = [
    *(
        "--base",
        "--adapter",
        "--tokenizer",
        "--chat-template",
        "--dtype",
        "--quantization",
        "--format",
        "--columns",
        "--split",
    ),
    *("--split", "--prompt-style", "--max-new-tokens", "--batch-size", "-q", "--json"),
]
FLAGS = {
    "quickstart": ["--base", "-q"],
    "train": ["--config", "--fresh", "-q", "--json"],
    "generate": [*ANSWERING, "--prompt", "--prompts", "--chat", "--temperature", "--top-p", "--seed"],
    "evaluate": [
        *(*ANSWERING, "--data", "--max-length", "--train-on", "--on-bad-row", "--generate", "--compare", "--html"),
    ],
    "effort": [
        *("--config", "--base", "--rows", "--shots", "--heldout", "--max-new-tokens", "--batch-size", "--price"),
        *("-q", "--json"),
    ],
    "export": [
        *("--adapter", "--adapters", "--base", "--combination", "--rank", "--step", "--out", "--merge", "--dtype"),
        *("--cost", "--verify", "--gguf", "--gguf-adapter", "--quantize", "--min-gain", "--card"),
        *("--samples", "--push", "--private", "-q", "--json"),
    ],
    "reproduce": ["--out", "-q", "--json"],
    "verify": [
        *("--endpoint", "--model", "--run", "--base", "--rows", "--max-new-tokens", "--bound", "--timeout", "--html"),
        *("-q", "--json"),
    ],
    "report": ["--out", "--watch", "--port", "-q"],
    "runs": ["--json", "--html"],
    "init": ["--data", "--base", "--eval", "--columns", "--out", "-q"],
    "config": ["--schema", "--from", "--devices", "--out", "--json"],
}


# Help


@pytest.mark.parametrize("command", FLAGS)
def test_help_lists_every_flag(here, command):
    code, out, err = here(command, "--help")
    assert (code, err) == (0, "")
    for flag in FLAGS[command]:
        assert f" {flag}" in out, flag


@pytest.mark.parametrize("command", PURPOSES)
def test_examples_of_the_help_are_command_lines(command, monkeypatch, capsys):
    """Two each at least, and what they name is known: all but what is done with it."""
    module = importlib.import_module(COMMANDS[command])
    monkeypatch.setattr(xla, "use_huge_pages", lambda: None)
    monkeypatch.setattr(cli, "run", lambda body, **_: None)
    monkeypatch.setattr(sys, "argv", [f"jlora {command}", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    examples = capsys.readouterr().out.split("examples:\n")[1].splitlines()
    assert len(examples) >= 2
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["jlora", command]
        monkeypatch.setattr(sys, "argv", [f"jlora {command}", *words[2:]])
        module.main()


def test_no_option_is_abbreviated(capsys):
    """What a script abbreviates would mean something else once an option is added; in scripts/ neither."""
    parser = cli.Parser(prog="jlora")
    parser.add_argument("--config")
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        with pytest.raises(SystemExit) as end:
            parse(["--conf", "c.yaml"])
        assert end.value.code == 2
        assert capsys.readouterr().err == "error: unrecognized arguments: --conf c.yaml; did you mean --config?\n"
    files = [path for folder in ("jlora", "scripts") for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", "")}
    made = {path: re.findall(r"argparse\.ArgumentParser\(\s*(\w*)", text) for path, text in texts.items()}
    assert {word for words in made.values() for word in words} == {"allow_abbrev"}


@pytest.mark.parametrize("command", FLAGS)
def test_every_flag_in_the_help_is_known_here(here, command):
    """A new flag belongs in the table above."""
    found = set(re.findall(r"(?<!\S)\W?(--[a-z-]+)", here(command, "--help")[1]))
    assert found <= {*FLAGS[command], "--help", "--quiet"}


@pytest.fixture
def options(here, monkeypatch):
    """Of a command, each flag with what the help says of it and its default."""

    def of(command):
        parsers = []
        with monkeypatch.context() as patch:
            patch.setattr(cli.Parser, "print_help", lambda self: parsers.append(self))
            here(command, "--help")
        return {action.option_strings[-1]: (action.help, action.default) for action in parsers[0]._actions[1:]
                if action.option_strings}  # fmt: skip

    return of


def test_quiet_means_the_same_in_all_commands(options):
    meant = {command: options(command).get("--quiet") for command in FLAGS}
    assert {command for command, what in meant.items() if what is None} == {"runs", "config"}
    assert len(set(meant.values())) == 2


def test_flags_of_generate_and_of_evaluate_are_the_same_with_the_same_defaults(options):
    ours, theirs = options("generate"), options("evaluate")
    both = ours.keys() & theirs.keys()
    assert both == {*ANSWERING, "--quiet"} - {"-q"}
    assert {flag for flag in both if ours[flag] != theirs[flag]} == {"--json"}


def test_earlier_names_of_flags_work(world, here, tmp_path):
    assert here("export", "--run", world / "run", "--out", tmp_path / "a", "-q") == (0, "", "")
    made = ("init", "--data", world / "rows.jsonl", "--out", tmp_path / "c.yaml", "-q")
    assert here(*made, "--model", world / "base") == (0, "", "") and (tmp_path / "c.yaml").is_file()


def test_console_script_carries_the_commands(here):
    code, out, _ = here("__main__", "--help")
    assert code == 0 and all(command in out for command in FLAGS)
    for command in FLAGS:
        code, out, _ = here("__main__", command, "--help")
        assert (code, all(f" {flag}" in out for flag in FLAGS[command])) == (0, True)
    code, out, _ = here("__main__", "config")
    assert code == 0 and out.startswith("# Configuration reference")


def test_command_list_without_a_command(here):
    code, out, err = here("__main__")
    assert (code, err) == (2, "") and out == here("__main__", "--help")[1]


@pytest.mark.parametrize("command", ["train", "data", "plan"])
def test_help_lists_the_config_by_position(here, command):
    _, out, _ = here(command, "--help")
    assert re.search(r"positional arguments:\n  CONFIG, key=value\n? +YAML file of the run", out)


def test_sentences_name_the_flags_of_a_command_without_a_config():
    sentence = "set data.on_bad_row=skip, data.format=messages, model.path or data.max_length; data.columns.a=b"
    assert cli.as_flags(sentence, ()) == sentence
    said = cli.as_flags(sentence, ("on_bad_row", "format", "base", "max_length", "data"))
    assert said == "set --on-bad-row skip, --format messages, --base or --max-length; data.columns.a=b"
    assert cli.as_flags("data.columns.a=b, (data.columns.c)", ["columns"]) == "--columns a=b, (--columns c)"


def test_console_script_as_a_program():
    done = shell("__main__", "export", "--adapter")
    assert done.returncode == 2 and one_sentence(done.stderr) == done.stderr.rstrip("\n")
    assert "argument --adapter" in done.stderr and "--help" in done.stderr


# Usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "config"),
        (["train", "{world}/none.yaml"], "none.yaml: no such file"),
        (["train", "{world}/config.yaml", "--lora.rank", "8"], "write lora.rank=8"),
        (["train", "{world}/config.yaml", "--learning_rate=1e-4"], "did you mean optimizer.learning_rate=VALUE?"),
        (["train", "{world}/config.yaml", "--batch-size", "8"], "did you mean training.batch_size=VALUE?"),
        (["train", "{world}/config.yaml", "--fersh"], "did you mean --fresh?"),
        (
            ["generate", "--base", "{world}/base", "--propmt", "a"],
            "unrecognized arguments: --propmt; did you mean --prompt?",
        ),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--dtype", "float23"], "did you mean float32?"),
        (["train", "{world}/config.yaml", "lora.rank=8", "--training.max_steps=3"], "write training.max_steps=3"),
        (["train", "--config", "{world}/config.yaml", "--bogus"], "--bogus"),
        (["train", "--config", "{world}/none.yaml"], "none.yaml: no such file"),
        (["train", "--config", "{world}"], "cannot be read"),
        (["generate", "--prompt", "a"], "--base"),
        (["generate", "--base", "{world}/base"], "--prompt"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--chat"], "not allowed with"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--temperature", "warm"], "--temperature"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--top-p", "0"], "--top-p"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--top-p", "1.1"], "--top-p"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--seed", "-1"], "--seed"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--seed", "1e30"], "--seed"),
        (["generate", "--base", "{world}/base", "--chat", "--json"], "--chat"),
        (["generate", "--base", "{world}/base", "--chat"], "--chat-template"),
        (["generate", "--base", "{world}/base", "--prompt", "a", "--format", "messages"], "no chat template"),
        (["evaluate", "--base", "{world}/base"], "--data"),
        (["evaluate", "--base", "{world}/base", "--data", "x", "--max-length", "1"], "--max-length"),
        (["evaluate", "--base", "{world}/base", "--data", "x", "--batch-size", "0"], "--batch-size"),
        (["evaluate", "--base", "{world}/base", "--data", "x", "--dtype", "int3"], "--dtype"),
        (["export", "--out", "x"], "--adapter"),
        (["__main__", "trian"], "trian"),
        (["config", "--bogus"], "--bogus"),
    ],
)
def test_bad_usage(world, here, arguments, words):
    code, out, err = here(*[argument.format(world=world) for argument in arguments])
    assert (code, out) == (2, "")
    assert words in one_sentence(err)


@pytest.mark.parametrize("command", ["train", "data", "plan", "effort"])
def test_a_config_is_named_by_position_or_by_flag(command, tmp_path, monkeypatch):
    module = importlib.import_module(COMMANDS[command])
    seen = []

    def stop(config, overrides):
        seen.append((config, overrides))
        raise ConfigError("seen")

    monkeypatch.setattr(module, "load_config", stop)
    monkeypatch.setattr(xla, "use_huge_pages", lambda: None)
    rest = ["--topology", "cpu:1"] if command == "plan" else []
    named = tmp_path / "lr=1e-4.yaml"
    named.write_text("", encoding="utf-8")
    lines = (
        ["c.yaml", "lora.rank=8", *rest],
        [*rest, "c.yaml", "-q", "lora.rank=8"],
        ["--config", "c.yaml", "lora.rank=8", *rest],
        [*rest, "lora.rank=8", "--config=c.yaml"],
        [str(named), "lora.rank=8", *rest],
    )
    for line in lines:
        monkeypatch.setattr(sys, "argv", [f"jlora {command}", *line])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        with pytest.raises(SystemExit) as end:
            module.main()
        assert end.value.code == 2
    assert seen == [("c.yaml", ["lora.rank=8"])] * 4 + [(str(named), ["lora.rank=8"])]


# Exit codes of what a test cannot bring about at will


def end_of(body, capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as exit:
        cli.run(body)
    return exit.value.code, capfd.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nBuffer 1:\n"),
        RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
        MemoryError("Unable to allocate 9 bytes"),
    ],
)
def test_out_of_memory(error, capfd, monkeypatch):
    def body():
        raise error

    code, err = end_of(body, capfd, monkeypatch)
    message = one_sentence(err)
    assert code == MemoryExceeded.exit_code == 5
    assert "9 bytes" in message and "training.batch_size" in message and "Buffer" not in message


def test_full_disk(capfd, monkeypatch):
    def body():
        raise OSError(28, "No space left on device", "/runs/a/metrics.jsonl")

    code, err = end_of(body, capfd, monkeypatch)
    assert code == 2 and "/runs/a/metrics.jsonl: No space left on device" in one_sentence(err)


def test_message_of_several_lines_becomes_one(capfd, monkeypatch):
    def body():
        raise DataError("first\nsecond")

    code, err = end_of(body, capfd, monkeypatch)
    assert (code, err) == (3, "error: first second\n")


def test_bug_of_ours_is_not_dressed_up(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def body():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(body)


def test_preemption_has_a_code_of_its_own(capfd, monkeypatch):
    assert end_of(lambda: cli.PREEMPTED, capfd, monkeypatch) == (75, "")


def test_paths_of_flags_begin_in_the_home_folder(monkeypatch):
    """Also behind `=`, where a shell leaves `~` as it is."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(xla, "use_huge_pages", lambda: None)
    parsers, tried = [], 0

    def keep(parser, *_, **__):
        parsers.append(parser)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Parser, "parse_args", keep)
    monkeypatch.setattr(cli.Parser, "parse_intermixed_args", keep)
    for command in PURPOSES:
        with pytest.raises(KeyboardInterrupt):
            importlib.import_module(COMMANDS[command]).main()
        for part in (*parsers[-1]._actions, *parsers[-1]._mutually_exclusive_groups):
            part.required = False
        for action in parsers[-1]._actions:
            if action.type == "path" and action.option_strings:
                found = getattr(parsers[-1].parse_known_args([f"{action.option_strings[-1]}=~/x"])[0], action.dest)
                assert found in ("/home/someone/x", ["/home/someone/x"]), f"{command} {action.option_strings}"
                tried += 1
    assert tried > 20
