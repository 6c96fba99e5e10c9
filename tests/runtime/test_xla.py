"""What a process is told before JAX starts, seen in processes of their own."""

import importlib.util
import json
import os
import pwd
import subprocess
import sys

import pytest

from jlora.runtime import xla
from jlora.runtime.xla import FLAGS

SHOW = """
import json, os
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
    ours = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    count = "--xla_force_host_platform_device_count=2"
    assert prepared(XLA_FLAGS=count, **ours) == [f"{FLAG}=true {count}", "0.5", "elsewhere", 2]
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
