"""What a process is told before JAX starts, seen in processes of their own."""

import importlib.util
import json
import os
import pwd
import subprocess
import sys

import pytest
from command_line import one_sentence

from jlora.errors import ConfigError
from jlora.runtime import xla
from jlora.runtime.xla import FLAGS

SHOW = """
import json, os
from jlora.errors import ConfigError
from jlora.runtime import xla
xla.prepare()
import jax
print(json.dumps([os.environ["XLA_FLAGS"], os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"],
                  jax.config.jax_compilation_cache_dir, jax.device_count()]))
"""
(FLAG,) = FLAGS


def prepared(**given: str) -> list:
    names = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    env = {key: value for key, value in os.environ.items() if key not in names} | given
    done = subprocess.run([sys.executable, "-c", SHOW], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_defaults_are_set_and_xla_knows_the_flags(tmp_path):
    """XLA aborts at a flag that it does not know; it registers those of GPUs on CPUs too."""
    assert prepared(HOME=str(tmp_path)) == [f"{FLAG}=true", "0.95", f"{tmp_path}/.cache/jlora/jax", 1]
    assert prepared(XDG_CACHE_HOME=str(tmp_path))[2] == f"{tmp_path}/jlora/jax"
    with pytest.raises(AssertionError, match="xla_no_such_flag"):
        prepared(XLA_FLAGS="--xla_no_such_flag=1")


def test_the_environment_wins(tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    ours = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "JAX_COMPILATION_CACHE_DIR": elsewhere}
    count = "--xla_force_host_platform_device_count=2"
    assert prepared(XLA_FLAGS=count, **ours) == [f"{FLAG}=true {count}", "0.5", elsewhere, 2]
    assert prepared(XLA_FLAGS=f"{FLAG}=false {count}")[0] == f"{FLAG}=false {count}"
    (tmp_path / "flags").write_text(count)
    assert prepared(XLA_FLAGS=str(tmp_path / "flags"))[0::3] == [str(tmp_path / "flags"), 2]


def test_without_a_home_folder_nothing_is_cached(monkeypatch):
    """As of a user without an entry in passwd, in a container."""
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    xla.prepare()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


HUGE = """
import ctypes, os, sys
from jlora.errors import ConfigError
from jlora.runtime import xla
xla.use_huge_pages()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
block = libc.malloc(ctypes.c_size_t(64 << 20))
ctypes.memset(block, 1, 64 << 20)
held = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages"))
print(int(held.split()[1]) // 1024, os.environ.get("GLIBC_TUNABLES", ""), *sys.argv[1:])
"""


@pytest.mark.skipif(
    not xla.PAGE_POLICY.is_file() or "[madvise]" not in xla.PAGE_POLICY.read_text(),
    reason="this kernel gives huge pages to all or to nobody",
)
def test_a_process_starts_again_with_huge_pages():
    """Once, with its arguments; not where the user has decided, nor where something else than a CPU is to train."""

    def started(**given: str) -> list[str]:
        env = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")}
        command = [sys.executable, "-c", HUGE, "--config", "a b"]
        done = subprocess.run(command, env=env | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    megabytes, setting, *arguments = started(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.check=0")
    assert int(megabytes) >= 60
    assert (setting, arguments) == ("glibc.malloc.check=0:glibc.malloc.hugetlb=1", ["--config", "a", "b"])
    assert started(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")[1] == "glibc.malloc.hugetlb=0"
    if any(map(importlib.util.find_spec, xla.ACCELERATORS)):
        assert started()[1] == "--config"


@pytest.mark.parametrize("name", ["JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"])
def test_programs_are_read_from_no_folder_that_others_may_write_to(tmp_path, here, monkeypatch, name):
    """JAX runs what it finds there."""
    folder = tmp_path if name.startswith("JAX") else tmp_path / "jlora" / "jax"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv(name, str(tmp_path))
    code, _, err = here("runs", tmp_path)
    message = one_sentence(err)
    assert code == 2 and f"JAX_COMPILATION_CACHE_DIR {folder}: may be written to by others" in message
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    xla.prepare()
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE")
    folder.chmod(0o755)
    xla.prepare()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        xla.prepare()


def test_new_folder_of_programs_is_its_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "new"))
    before = os.umask(0)
    try:
        xla.prepare()
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/programs")
    xla.prepare()
    assert not (tmp_path / "gs:").exists() and not os.path.exists("gs:")
