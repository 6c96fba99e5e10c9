"""Files and folders are whole or not there, whatever happens meanwhile, and nothing of anybody else's is touched."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jlora.errors import ModelError
from jlora.files import atomic

ROOT = Path(__file__).parents[2]


def contents(folder):
    """What lies below a folder: text of files, targets of links, None for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name] = str(path.readlink()) if path.is_symlink() else path.read_text() if path.is_file() else None
    return found


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_replaced_whole_under_the_umask(tmp_path, monkeypatch):
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        atomic.write_text(path, "one")
        atomic.write_text(path, "two\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"))
    finally:
        os.umask(old)
    assert contents(tmp_path) == {"a": "two\N{GRINNING FACE}"} and path.stat().st_mode & 0o777 == 0o640
    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError) as error:
        atomic.write_text(path, "three")
    assert error.value.filename == str(path) and list(contents(tmp_path)) == ["a"]


def test_a_name_that_can_be_foreseen_is_not_used(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("a.partial", "a.tmp", ".a.partial", f".a.{os.getpid()}.tmp", "a.old"):
        (tmp_path / name).symlink_to(victim)
    before = contents(tmp_path)
    atomic.write_text(tmp_path / "a", "text")
    assert contents(tmp_path) == before | {"a": "text"}
    assert len({atomic.beside(tmp_path / "a") for _ in range(100)}) == 100


@pytest.mark.parametrize("name", ["x" * 255, "\N{GRINNING FACE}" * 63], ids=["ascii", "four bytes each"])
def test_the_longest_names_can_be_written(tmp_path, name):
    atomic.write_text(tmp_path / name, "text")
    assert contents(tmp_path) == {name: "text"}


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_file_is_not_written_over(tmp_path, kind):
    victim, path = tmp_path / "victim", tmp_path / "a"
    victim.write_text("precious")
    match kind:
        case "link":
            path.symlink_to(victim)
        case "dangling link":
            path.symlink_to(tmp_path / "none")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
    before = os.listdir(tmp_path)
    for write in (lambda: atomic.write_text(path, "text"), lambda: atomic.open_own(path, os.O_RDWR | os.O_CREAT)):
        with pytest.raises(OSError) as error:
            write()
        assert error.value.filename == str(path)
    assert os.listdir(tmp_path) == before and victim.read_text() == "precious"


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "m"
    with atomic.new_folder(target) as folder:
        (folder / "a").touch(0o600)
        assert not target.exists()
    assert contents(tmp_path / "deep") == {"m": None, "m/a": ""}
    assert (target / "a").stat().st_mode & 0o777 == target.stat().st_mode & 0o666


@pytest.mark.parametrize("failure", [ModelError, OSError, KeyboardInterrupt])
def test_a_folder_that_fails_is_gone_and_its_errors_name_the_target(tmp_path, failure):
    for name in ("m.old", "m.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    before = contents(tmp_path)
    with pytest.raises(failure) as error, atomic.new_folder(tmp_path / "m") as folder:
        (folder / "half").write_text("written")
        if failure is OSError:
            full()
        raise failure(f"{folder}/half: is wrong")
    assert contents(tmp_path) == before
    if failure is ModelError:
        assert str(error.value) == f"{tmp_path}/m/half: is wrong"
    if failure is OSError:
        assert error.value.filename == str(tmp_path / "m")


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_came_there_meanwhile_stays(tmp_path, kind):
    target = tmp_path / "m"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError) as error, atomic.new_folder(target) as folder:
        (folder / "a").touch()
        match kind:
            case "folder":
                target.mkdir()
                (target / "theirs").write_text("precious")
            case "file":
                target.write_text("precious")
            case "link":
                target.symlink_to("empty")
        before = contents(tmp_path)
    after = {name: text for name, text in before.items() if not name.startswith(f"{folder.name}")}
    assert contents(tmp_path) == after and error.value.filename == str(target)


def test_an_empty_folder_gives_way_also_behind_a_link(tmp_path):
    (tmp_path / "disk" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/m")
    with atomic.new_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("new")
    assert contents(tmp_path) == {"disk": None, "disk/m": None, "disk/m/a": "new", "link": "disk/m"}


def replace(target, **files):
    with atomic.new_folder(target, ours=("a", "b")) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def test_one_of_ours_is_replaced_and_one_of_others_too_is_kept(tmp_path, capsys):
    target = tmp_path / "adapter"
    replace(target, a="1", b="1")
    replace(target, a="2")
    assert contents(tmp_path) == {"adapter": None, "adapter/a": "2"} and capsys.readouterr().err == ""
    (target / "NOTES").write_text("mine")
    replace(target, a="3")
    [kept] = [path for path in tmp_path.iterdir() if path != target]
    assert contents(kept) == {"NOTES": "mine", "a": "2"} and contents(target) == {"a": "3"}
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {target}: ") and "NOTES" in line and str(kept) in line


# kill -9 as the numbered change of the file system is about to happen.
KILLED = """
import os, signal, sys
from pathlib import Path
from jlora.files import atomic
number, target, seen = int(sys.argv[1]), Path(sys.argv[2]), []
def hook(event, args):
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (event == "open" and "x" in str(args[1]))
    changes = changes or (event == "open" and "w" in str(args[1]))
    if changes and str(args[0]).startswith(str(target.parent)):
        seen.append(event)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
with atomic.new_folder(target, ours=("a", "b")) as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
"""


def test_killed_at_any_change_a_whole_folder_is_there_and_the_next_one_works(tmp_path):
    """Old or new under its name; between the two renames both, whole, beside it."""
    old, new = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}
    seen = []
    for number in range(1, 20):
        target = tmp_path / str(number) / "adapter"
        replace(target, **old)
        mine = target.with_name("adapter.old")
        replace(mine, a="precious")
        command = [sys.executable, "-c", KILLED, str(number), str(target)]
        code = subprocess.run(command, cwd=ROOT, timeout=60).returncode
        there = [contents(path) for path in target.parent.iterdir() if path != mine]
        if target.exists():
            assert contents(target) in (old, new)
            seen.append(contents(target) == new)
        else:
            assert old in there and new in there
            seen.append(None)
        replace(target, a="next")
        assert contents(target) == {"a": "next"} and contents(mine) == {"a": "precious"}
        left = [path for path in target.parent.iterdir() if path not in (target, mine)]
        assert all(path.name.startswith((".adapter.", "adapter.before-")) for path in left)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    # Made, two files, not yet in place, the old one aside; in place, and the old one goes, two files and the folder.
    assert seen == [False] * 5 + [None] + [True] * 4


def test_leftovers_are_known_by_their_names(tmp_path):
    (tmp_path / ".a.0123456789abcdef.partial").mkdir()
    for name in (".a.0123.partial", "a.partial", ".b.0123456789abcdef.partial", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / ".a.fedcba9876543210.partial").symlink_to("a")
    assert [path.name for path in atomic.leftovers(tmp_path / "a")] == [".a.0123456789abcdef.partial"]
