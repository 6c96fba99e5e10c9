"""A cluster on one machine: every node has processes, a network card and a host name of its own (Linux namespaces).

Nothing of the machine is changed but its packages: the network and the mounts are in a namespace, too, and end with it.
A killed node is one that lost its power: its link goes first, so that nobody is told.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD = "head"  # where jobs are submitted; this script's own namespace
NODES = ("n1", "n2", "n3", "n4")
ADDRESS = "10.77.0."
ENTERED = "JLORA_CLUSTER_PYTHON"


class Late(Exception):
    """Something did not happen within its bound, or not as it has to; the message says what."""


def prepare(packages: Sequence[str]) -> None:
    """Install what is missing, then go on in a namespace of this script's own; returns in there."""
    if ENTERED in os.environ:
        return
    if os.geteuid() != 0:
        sys.exit("error: only root can install packages and make network namespaces; run it as root")
    missing = [name for name in packages if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode]
    if missing:
        print(f"installing {' '.join(missing)}", flush=True)
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=True)
        command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    # --kill-child, --pid: whatever way this ends, all processes of the cluster end with it.
    own = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    os.execvpe("unshare", [*own, sys.executable, *sys.argv], os.environ | {ENTERED: environment()})


def environment() -> str:
    """A Python with this checkout's jlora: PYTHON, or build/venv-clusters, made where it is missing."""
    if "PYTHON" in os.environ:
        found = shutil.which(os.environ["PYTHON"]) or sys.exit("error: PYTHON is not a program")
        return os.path.abspath(found)  # nodes run it from other folders
    python = ROOT / "build/venv-clusters/bin/python"
    if not (python.parent / "jlora").exists():
        print(f"making {python.parents[1].relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", python.parents[1]], check=True)
        chosen = [ROOT / "scripts/constraints", sys.executable]
        constraints = (
            ROOT / subprocess.run(chosen, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.strip()
        )
        install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, "--editable", ROOT]
        subprocess.run(install, check=True)
    return str(python)


def until(what: str, seconds: float, ready: Callable[[], object], pause: float = 0.1) -> None:
    """Wait until something is so.

    Raises:
      Late: it is not, after that many seconds.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise Late(f"not within {seconds:.0f} s: {what}")
        time.sleep(pause)


class Cluster:
    """A head, nodes, and a folder that all of them see; `shell` runs on each node."""

    def __init__(self, shell: str):
        """Bring up the head's network, then every node.

        Args:
          shell: what a node does once it is up, for bash; $HOSTNAME is its name. It must not return.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="jlora-cluster-"))
        atexit.register(self.close)
        self.shell = shell.replace("@FOLDER@", str(self.folder))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        hosts = "".join(f"{ADDRESS}{number} {name}\n" for number, name in enumerate((*NODES, HEAD), 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}", encoding="utf-8")
        # Its own copy: a checkout that changes meanwhile would train a case and its unbroken run by different code.
        self.code = self.folder / "code"
        for name in ("jlora", "scripts/launch"):
            shutil.copytree(ROOT / name, self.code / name, ignore=shutil.ignore_patterns("__pycache__"))
        (self.folder / "bin").mkdir()
        python = os.environ[ENTERED]
        (self.folder / "bin/python").write_text(f'#!/bin/sh\nexec {python} "$@"\n', encoding="utf-8")
        (self.folder / "bin/python").chmod(0o755)
        self.variables = {
            **{
                "PYTHONPATH": str(self.code),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "OMP_NUM_THREADS": "1",
            },
            # A start takes seconds fewer: nothing is compiled twice, no process is replaced for its huge pages.
            **{"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"},
            **{"JAX_COMPILATION_CACHE_DIR": f"{self.folder}/cache", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        }
        os.environ |= self.variables | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        for line in (
            f"hostname {HEAD}",
            f"mount --bind {self.folder}/hosts /etc/hosts",
            "ip link set lo up",
            "ip link add bridge type bridge",
            f"ip addr add {ADDRESS}{len(NODES) + 1}/24 dev bridge",
            "ip link set bridge up",
        ):
            subprocess.run(line.split(), check=True)
        for name in NODES:
            self.start(name)

    def start(self, name: str) -> None:
        """Bring a node up."""
        number = NODES.index(name) + 1
        boot = f"""
            hostname {name}; export HOSTNAME={name}
            until ip link show eth0; do sleep 0.05; done
            ip addr add {ADDRESS}{number}/24 dev eth0; ip link set eth0 up; ip link set lo up
            {self.shell}"""
        own = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.folder / f"{name}.boot", "ab") as log:
            process = subprocess.Popen([*own, "bash", "-c", boot], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.processes[name] = process
        mine = os.readlink("/proc/self/ns/net")
        until(f"{name} has a namespace", 10, lambda: os.readlink(f"/proc/{process.pid}/ns/net") != mine, 0.01)
        link = ["ip", "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(process.pid)]
        subprocess.run(link, check=True)
        subprocess.run(["ip", "link", "set", f"to-{name}", "master", "bridge", "up"], check=True)

    def kill(self, name: str) -> None:
        """Take a node's power away."""
        subprocess.run(["ip", "link", "set", f"to-{name}", "down"], check=True)
        self.processes[name].kill()
        self.processes[name].wait()
        subprocess.run(["ip", "link", "del", f"to-{name}"], capture_output=True)  # it goes with the node, too

    def clear(self) -> None:
        """After a failed case: end what it left."""

    def close(self) -> None:
        """All nodes down, and the folder gone."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
