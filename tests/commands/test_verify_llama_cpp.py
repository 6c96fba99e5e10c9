"""`jlora verify` against llama.cpp's own server, or llama-cpp-python's: the right file passes, each fault is named."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from command_line import ROOT, one_sentence
from served_runs import make_served_runs

from jlora.data.tokens import CHAT_TEMPLATES
from jlora.hf.gguf_vocabulary import vocabulary_of
from jlora.hf.gguf_writer import write_gguf
from jlora.hf.pretrained import open_tokenizer
from jlora.hf.source import open_source
from jlora.hf.weights import Stored
from jlora.training.export import export
from jlora.training.gguf_export import export_gguf, export_gguf_adapter

LLAMA2 = CHAT_TEMPLATES["llama2"]
BINARY = os.environ.get("JLORA_LLAMA_SERVER") or shutil.which("llama-server")
SERVERS = {
    "llama-server": BINARY,
    "xllamacpp": importlib.util.find_spec("xllamacpp"),
    "llama-cpp-python": importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("starlette_context"),
}
# A row of more than 256 tokens, the shortest context of llama-server, is among them.
FEW = ("--rows", "6", "--max-new-tokens", "16")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:::llama_cpp")]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def served(kind, model, *, context=512, lora=None, template=None, endless=False):
    """The address of a server of a GGUF file."""
    port = free_port()
    if kind == "llama-server":
        command = [
            BINARY,
            "-m",
            model,
            "--port",
            port,
            "-c",
            context,
            "--threads",
            "1",
            "-np",
            "1",
            "--jinja",
            "--no-webui",
        ]
        command += ["-ctk", "f32", "-ctv", "f32", "--alias", "mine"]
        command += ["--lora", lora] if lora else []
        command += ["--chat-template-file", template] if template else []
        command += ["--ignore-eos"] if endless else []
    elif kind == "xllamacpp":
        command = [sys.executable, ROOT / "tests" / "llama_server.py", model, port, "--context", context]
        command += ["--lora", lora] if lora else []
        command += ["--template", template] if template else []
        command += ["--endless"] if endless else []
    else:
        command = [sys.executable, "-m", "llama_cpp.server", "--model", model, "--port", port, "--n_ctx", context]
        command += ["--logits_all", "true", "--n_threads", "1", "--model_alias", "mine", "--verbose", "false"]
        command += ["--lora_path", lora] if lora else []
        command += ["--chat_format", "chatml"] if template else []
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(300):
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"{url}/models", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(params=SERVERS)
def kind(request):
    if not SERVERS[request.param]:
        pytest.skip(f"{request.param} is not installed")
    return request.param


@pytest.fixture(scope="module")
def files(tmp_path_factory, optimized):
    """The runs, their merged files, the bases, and files that are wrong in what they say of the tokenizer."""
    if not any(SERVERS.values()):
        pytest.skip("no server of llama.cpp is installed")
    folder = tmp_path_factory.mktemp("llama_cpp")
    make_served_runs(folder)
    for name in ("plain", "chat"):
        run = folder / name
        for kind in ("F32", "Q4_0"):
            export_gguf(run, folder / f"{name}-{kind}.gguf", None, kind, None, 0.0)
        export_gguf_adapter(run, folder / f"{name}-lora.gguf", None, None)
        export(run, folder / f"{name}-merged", None, True, None, False)

    def write(name, base, template, **changed):
        source, tokenizer = open_source(base), open_tokenizer(str(base), template)
        keys = vocabulary_of(tokenizer, None, 300, [], name) | {f"tokenizer.{k}": v for k, v in changed.items()}
        write_gguf(folder / f"{name}.gguf", source.model, source.config, Stored(source), keys, "F32")

    write("plain-base", folder / "base", None)
    write("chat-base", folder / "base", "llama2")
    write("plain-other", folder / "other", None)
    write("chat-other", folder / "other", "llama2")
    write("plain-no_bos", folder / "plain-merged", None, **{"ggml.add_bos_token": False})
    write(
        "chat-double_bos",
        folder / "chat-merged",
        "llama2",
        chat_template=LLAMA2.replace("bos_token +", "bos_token + bos_token +"),
    )
    (folder / "other.jinja").write_text(LLAMA2.replace("[INST]", "<<USER>>"), encoding="utf-8")
    return folder


@pytest.fixture
def verified(here, files, kind):
    """The command on a run against a file that is served: (exit code, result, stderr)."""

    def run(name, file, **options):
        with served(kind, files / file, **options) as url:
            code, out, err = here(
                "verify", "--endpoint", url, "--model", "mine", "--run", files / name, "--json", "-q", *FEW
            )
        print(kind, name, file, options, out, err)
        return code, json.loads(out), err

    return run


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_right_files_pass(verified, files, name):
    code, found, err = verified(name, f"{name}-F32.gguf")
    assert (code, err, found["faults"]) == (0, "", [])
    assert found["difference"] < 1e-3 and found["compared"] == "log-probabilities"
    code, found, err = verified(name, f"{name}-base.gguf", lora=files / f"{name}-lora.gguf")
    assert (code, err, found["faults"]) == (0, "", []) and found["difference"] < 1e-3


def named(result):
    code, found, err = result
    assert code == 4 and found["faults"][0]["says"] in one_sentence(err)
    return [fault["fault"] for fault in found["faults"]]


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_no_adapter_and_another_base(verified, name):
    assert named(verified(name, f"{name}-base.gguf")) == ["adapter"]
    assert named(verified(name, f"{name}-other.gguf")) == ["other_base"]


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_a_base_in_four_bits(verified, name):
    assert named(verified(name, f"{name}-Q4_0.gguf")) == ["rounded"]


def test_bos(verified):
    assert named(verified("plain", "plain-no_bos.gguf")) == ["bos_missing"]
    assert named(verified("chat", "chat-double_bos.gguf")) == ["bos_double"]


@pytest.mark.parametrize("name", ["plain", "chat"])
def test_a_stop_token_that_is_none(verified, kind, name):
    if kind == "llama-cpp-python":
        pytest.skip("llama-cpp-python's server knows no --ignore-eos")
    assert named(verified(name, f"{name}-F32.gguf", endless=True)) == ["stop"]


def test_another_template(verified, files):
    assert named(verified("chat", "chat-F32.gguf", template=files / "other.jinja")) == ["template"]


def test_a_context_that_is_too_short(verified):
    code, found, err = verified("plain", "plain-F32.gguf", context=256)
    assert "context" in named((code, found, err))
