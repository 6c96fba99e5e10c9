"""The hub: asked only for what can be its name, not in silence, and for no more than is needed."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import one_sentence, sentence_of
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from tiny import make_llama, make_tokenizer

from jlora.data.rows import read_rows
from jlora.data.tokens import load_tokenizer
from jlora.errors import DataError, ModelError
from jlora.files import hub
from jlora.hf.planned import model_shape
from jlora.hf.pretrained import open_pretrained, tokenizer_of
from jlora.hf.source import resolve

ROW = '{"prompt": "a", "completion": "b"}\n'


class Hub:
    """Stands in for the hub: one repository, and what was taken from it, call by call."""

    def __init__(self, repository: Path, cache: Path):
        self.repository, self.snapshot, self.taken = repository, cache / "snapshots" / "c0ffee", []
        self.snapshot.mkdir(parents=True)

    def __call__(self, name, *, allow_patterns, ignore_patterns, revision):
        assert revision in (None, self.snapshot.name)
        files = [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.taken.append(sorted(wanted))
        for file in self.taken[-1]:
            shutil.copyfile(self.repository / file, self.snapshot / file)
        return str(self.snapshot)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with weights in Meta's form, and of another library, beside its own."""
    folder = tmp_path / "repository"
    make_llama(folder, hidden_size=24, intermediate_size=24, num_hidden_layers=1)
    make_tokenizer(folder)
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "consolidated-00001-of-00001.safetensors", "original/x.safetensors"):
        shutil.copyfile(folder / "model.safetensors", folder / name)
    (folder / "original" / "params.json").write_text("{}")
    found = Hub(folder, tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.snapshot_download", found)
    monkeypatch.setattr(hub, "_said", set())
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def deaf(tmp_path, monkeypatch):
    """Whoever asks the hub fails the test; the folder `models` is here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("snapshot_download", "HfApi.dataset_info"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *_, **__: pytest.fail("the hub was asked"))
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)


def rows_of(source: str) -> list:
    return list(read_rows(source, "train"))


READERS = [
    (ModelError, resolve, "folder or GGUF file"),
    (ModelError, lambda path: load_tokenizer(path, None), "folder with a tokenizer"),
    (DataError, rows_of, "file or folder"),
]


@pytest.mark.parametrize(("error", "read", "what"), READERS)
def test_path_into_a_local_folder_is_not_sent_to_the_hub(deaf, capsys, error, read, what):
    wanted = f"models/stories: no such {what} in the folder models, and so the hub is not asked; check the path"
    assert sentence_of(error, read, "models/stories") == wanted
    Path("models/storys").mkdir()
    near = wanted.replace("check the path", "did you mean models/storys?")
    assert sentence_of(error, read, "models/stories") == near
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "path",
    [
        *("stories", "my model/x", "a/b/c", "a/b--c", "ä/b", "a/" + "b" * 100, "a/", "/a", "~/a"),
        *("./a", "../a", "quickstart/base.gguf", "a/B.GGUF"),
    ],
)
@pytest.mark.parametrize(("error", "read", "what"), READERS)
def test_what_cannot_be_a_hub_name_is_not_sent_there(deaf, capsys, error, read, what, path):
    assert sentence_of(error, read, path).startswith(f"{path}: no such ")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("error", "read", "what"), READERS)
def test_hub_is_asked_after_a_word_about_it(monkeypatch, capsys, error, read, what):
    said = []

    def refuse(*_, **__):
        said.append(capsys.readouterr().err)
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("retries for half a minute"))
    monkeypatch.setattr(hub, "_said", set())
    for _ in range(2):
        assert f"nobody/stories: no such {what}, and the hub did not deliver it (no route)" in sentence_of(
            error, read, "nobody/stories"
        )
    assert said == [f"nobody/stories is no {what}; asking the Hugging Face hub\n", ""]


def test_data_set_without_a_network_is_read_from_what_was_downloaded(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([json.loads(ROW)]))
    assert [row.value for row in rows_of("nobody/stories")] == [json.loads(ROW)]


def test_small_files_of_a_base_come_first_and_its_own_weights_alone(repository):
    opened = open_pretrained("someone/base", None, None)
    small, weights = repository.taken
    assert "config.json" in small and "tokenizer.json" in small
    assert not any("safetensors" in name or "/" in name for name in small)
    assert weights == ["model.safetensors"] and opened.path == repository.snapshot


def test_architecture_that_is_not_read_is_refused_before_its_weights_come(repository):
    config = json.loads((repository.repository / "config.json").read_text())
    (repository.repository / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "mamba" in sentence_of(ModelError, open_pretrained, "someone/base", None, None)
    assert len(repository.taken) == 1


def test_rows_are_shown_and_shapes_planned_without_the_weights(repository, here, tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW)
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: someone/base}\ndata: {train: rows.jsonl, format: completion}\noutput_dir: run\n")
    code, out, err = here("data", config)
    assert code == 0 and "rows.jsonl" in out
    assert err == "someone/base is no folder or GGUF file; asking the Hugging Face hub\n"
    assert model_shape("someone/base").hidden_size == 24
    assert tokenizer_of("someone/base", None, None)[1]["hidden_size"] == 24
    assert not any("safetensors" in name for taken in repository.taken for name in taken)


def test_folder_without_weights_shows_its_rows(repository, here, tmp_path):
    (tmp_path / "rows.jsonl").write_text(ROW)
    (repository.repository / "model.safetensors").unlink()
    config = tmp_path / "config.yaml"
    config.write_text("model: {path: repository}\ndata: {train: rows.jsonl, format: completion}\noutput_dir: run\n")
    assert here("data", config)[0] == 0
    code, _, err = here("train", config)
    assert code == 4 and "holds no model.safetensors" in one_sentence(err)
