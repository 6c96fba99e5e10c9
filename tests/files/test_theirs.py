"""A pipe or device where a file is meant is not waited for, and a file without end not read, wherever others' are."""

import hashlib
import json
import os

import pytest
from command_line import sentence_of
from report_pages import make_run

from jlora.errors import ConfigError, ModelError
from jlora.evaluation.effort import Results
from jlora.files import manifest
from jlora.files.theirs import open_theirs, read_theirs, text_of_theirs
from jlora.hf.gguf import GGUFFile
from jlora.hf.source import open_safetensors, read_json
from jlora.reports.run_files import read_records, read_run, read_text


@pytest.fixture(params=["pipe", "device", "folder", "sparse"])
def no_file(request, tmp_path):
    """Makes what is no file of a bounded size."""

    def make(path):
        path.unlink(missing_ok=True)
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "device":
            path.symlink_to("/dev/zero")
        elif request.param == "folder":
            path.mkdir()
        else:
            path.touch()
            os.truncate(path, 2**40)
        return path

    return make


def test_only_regular_files_of_bounded_size_are_read(no_file, tmp_path):
    path = no_file(tmp_path / "a")
    with pytest.raises((OSError, ValueError)):
        read_theirs(path, 1000)
    (tmp_path / "b").write_bytes(b"a\r\nb\xff")
    (tmp_path / "c").symlink_to("b")
    assert read_theirs(tmp_path / "c", 5) == b"a\r\nb\xff"
    assert text_of_theirs(tmp_path / "c", 5, "replace") == "a\nb\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="more than 0 MiB"):
        read_theirs(tmp_path / "c", 4)
    with open_theirs(tmp_path / "c") as file:
        assert file.read(1) == b"a"


def test_bases_that_are_no_files_are_refused(no_file, tmp_path):
    path = no_file(tmp_path / "a")
    for call in (read_json, GGUFFile):
        assert str(path) in sentence_of(ModelError, call, path)
    with pytest.raises(ModelError), open_safetensors(path):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "samples.json", "config.yaml"])
def test_run_folder_of_others_is_reported_without_them(no_file, tmp_path, name):
    run = make_run(tmp_path / "run", 1.0, 4)
    no_file(run / name)
    assert read_text(run / name) == "" and read_records(run / name) == ([], 0)
    read_run(run)


def test_manifest_that_is_no_file_is_damaged(no_file, tmp_path):
    (tmp_path / "a").write_text("a")
    manifest.write(tmp_path, {})
    assert manifest.fault(tmp_path) is None
    no_file(tmp_path / manifest.NAME)
    assert manifest.fault(tmp_path) == "manifest.json is damaged"


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {"facts": {}}, {"facts": {}, "files": []}, {"facts": 1, "files": {}}]
    + [{"facts": {}, "files": {"a": entry}} for entry in (None, [], {"bytes": 1}, {"bytes": "1", "sha256": "0"})],
)
def test_manifest_of_another_form_is_damaged_however_right_its_digest(tmp_path, content):
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    text = json.dumps({"content": content, "sha256": digest}, indent=1, sort_keys=True)
    (tmp_path / manifest.NAME).write_text(text + "\n", encoding="utf-8")
    assert manifest.fault(tmp_path) == "manifest.json is damaged"
    with pytest.raises(ValueError, match=manifest.NAME):
        manifest.read(tmp_path)


def test_manifest_nested_too_deep_is_damaged(tmp_path):
    (tmp_path / manifest.NAME).write_text("[" * 100_000)
    assert manifest.fault(tmp_path) == "manifest.json is damaged"


def test_results_of_others_that_are_no_file_are_refused(no_file, tmp_path):
    no_file(tmp_path / "effort.json")
    assert "move it away" in sentence_of(ConfigError, Results, tmp_path)
