"""Several processes as one job: joining, agreeing, stopping together, and noticing who is lost.

JAX's own runtime does the joining and the heartbeats. Where it gives up it aborts the process from C++, so a
process of a job has a parent that outlives it and says what happened. Knows nothing of models or training.

Every command imports this, so JAX is imported where it is used.
"""

import faulthandler
import glob
import importlib.util
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from jlora.config import DistributedSection
from jlora.errors import ConfigError, HostLost, Stopped, UserError
from jlora.runtime import private_jax, streams
from jlora.runtime.supervise import stands

POLL_SECONDS = 1.0
SHARED_SECONDS = 30.0  # as late as network file systems may be
# How the collectives of CPUs and GPUs say that a peer is gone.
LOST_PEER = ("Gloo", "NCCL", "coordination service", "heartbeat", "Connection closed by peer", "Socket closed")


def detected() -> bool:
    """Whether a scheduler started several processes that JAX can join by itself.

    Asked in JAX's order: Open MPI, SLURM, TPU hosts on GKE, TPU VMs, Kubernetes. On a TPU VM and on Kubernetes
    only JAX's own look at the metadata tells how many there are, so being there counts.
    """
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:
        return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        # An interactive shell is one task, and inherits its allocation's SLURM_NTASKS.
        return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")) > 1
    if importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
        if hosts is not None:
            return len(hosts.split(",")) * int(env.get("MEGASCALE_NUM_SLICES", "1")) > 1
        if "TPU_SKIP_MDS_QUERY" not in env:  # JAX sets it too, where it sees no TPU
            return True
    in_job = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    return in_job and importlib.util.find_spec("kubernetes") is not None


def expected(cfg: DistributedSection) -> bool:
    """Whether this process is one of several."""
    return cfg.num_processes > 1 if cfg.num_processes is not None else detected()


def start(cfg: DistributedSection) -> None:
    """Join the job, if this process is one of several; before JAX is first asked for devices.

    Raises:
      ConfigError: the coordinator's port is taken, or JAX refuses to join.
    """
    if not expected(cfg):
        return
    import jax

    if jax.distributed.is_initialized():
        return
    where = cfg.coordinator or "the address that the scheduler gives"
    stands(f"while joining the job at {where} (all processes must start within {cfg.start_timeout} s)")
    if cfg.coordinator is not None and cfg.process_id == 0:
        _require_free_port(int(cfg.coordinator.rpartition(":")[2]))
    try:
        jax.distributed.initialize(
            cfg.coordinator,
            cfg.num_processes,
            cfg.process_id,
            local_device_ids=None if cfg.coordinator else _slurm_gpus(),
            cluster_detection_method="deactivate" if cfg.coordinator else None,
            initialization_timeout=cfg.start_timeout,
            heartbeat_timeout_seconds=cfg.host_timeout,
            shutdown_timeout_seconds=cfg.host_timeout,
        )
    except Exception as error:  # JAX asks metadata servers and Kubernetes, whose libraries have errors of their own
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"cannot join the job at {where} ({reason}); set distributed.coordinator, num_processes and process_id"
        ) from None
    stands("while reading model and data")
    streams.keep_stdout()  # Gloo, the collectives of CPUs, reports its connections there


def _require_free_port(port: int) -> None:
    # gRPC would share the port with another job's coordinator (SO_REUSEPORT), and mix up the two jobs.
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"distributed.coordinator: port {port} cannot be used on {socket.gethostname()} ({error.strerror}); "
                "choose a free one, the same for all processes"
            ) from None


def _slurm_gpus() -> list[int] | None:
    """The GPUs of this SLURM task, counted among those that it sees; None leaves the choice to JAX.

    JAX takes the one GPU of the task's number on its node. That is wrong for a task that has its node alone, and
    where SLURM shows every task only its own GPUs (--gpus-per-task).
    """
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:  # mpirun's own step is one task a node
        return None
    on_node = int(env.get("SLURM_GPUS_ON_NODE", "0"))
    seen = len([gpu for gpu in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]) or on_node
    alone = re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return list(range(seen)) if seen and (alone or seen == 1 or seen < on_node) else None


def is_main() -> bool:
    """Whether this process writes what the job writes once."""
    return process_index() == 0


def process_index() -> int:
    """The number of this process in the job, from 0."""
    import jax

    return jax.process_index()


def several() -> bool:
    """Whether the job has other processes; a process without JAX has joined none."""
    if "jax" not in sys.modules:
        return False
    job = private_jax.job()
    return job.client is not None and job.num_processes > 1


def wait_for_all(name: str, seconds: float = 24 * 3600.0) -> None:
    """Until every process has come to the point of that name; each name counts once."""
    if several():
        private_jax.job().client.wait_at_barrier(f"jlora/{name}", int(seconds * 1000))


def stop_agreed(step: int) -> bool:
    """Whether all processes stop after this step, since one of them was told to (SIGTERM); asked every step."""
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def least(value: int) -> int:
    """The least of what the processes hold; each has to ask."""
    if not several():
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    found = multihost_utils.process_allgather(np.asarray([value // 2**20], np.int32))  # JAX has no wider one
    return int(found.min()) * 2**20


def from_first(name: str, make: Callable[[], Any]) -> Any:
    """What process 0 makes, a JSON value, in every process; each name counts once."""
    if not several():
        return make()
    client, key = private_jax.job().client, f"jlora/first/{name}"
    if is_main():
        value = make()
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, 24 * 3600 * 1000))


def require_agreement(stage: str, error: type[UserError], items: dict[str, Any]) -> None:
    """Refuse to start where a process has another config, library, data or base than process 0.

    Args:
      stage: a name for this comparison. error: what to raise.
      items: name -> what must be the same, such as a version or a hash.

    Raises:
      error: naming this host and what differs; the other processes end with the same sentence.
    """
    if not several():
        return
    first = from_first(f"agree/{stage}", lambda: {"host": socket.gethostname(), "items": items})
    mine, theirs = json.loads(json.dumps(items)), first["items"]
    differences = [
        f"{name} is {_short(mine.get(name))} here, {_short(theirs.get(name))} there"
        for name in sorted(theirs.keys() | mine.keys())
        if mine.get(name) != theirs.get(name)
    ]
    if differences and not is_main():
        raise error(
            f"{_me()} differs from process 0 ({first['host']}): {'; '.join(differences)}; give all hosts the same"
        )
    wait_for_all(f"agreed/{stage}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def require_shared_folder(folder: Path) -> None:
    """Refuse an output folder that the processes do not share: each would save its own part of a checkpoint.

    Raises:
      ConfigError: naming the host that does not see what process 0 wrote there.
    """
    if not several():
        return
    mark = folder / ".shared"
    if is_main():
        mark.touch()
    wait_for_all("shared/written")
    deadline = time.monotonic() + SHARED_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"output_dir {folder}: {_me()} does not see it as process 0 does; use a shared folder")
        time.sleep(0.1)
    wait_for_all("shared/seen")
    if is_main():
        mark.unlink()


def _me() -> str:
    return f"process {process_index()} ({socket.gethostname()})"


def is_lost_peer(error: Exception) -> bool:
    """Whether an error of a computation means that another process is gone.

    If that one has left word of why, this process ends here with its sentence.
    """
    if not several():
        return False
    import jax

    lost = isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in LOST_PEER)
    if lost:
        time.sleep(3 * POLL_SECONDS)  # `Watch` looks meanwhile
    return lost


def end(code: int, sentence: str) -> NoReturn:
    """End this process at once; those of its job, who would wait for it otherwise, are told why and end, too."""
    if several() and (job := private_jax.job()).preemption_sync_manager is not None:  # made last: all have joined
        import jax

        with suppress(jax.errors.JaxRuntimeError):  # process 0 is gone already
            job.client.key_value_set(f"jlora/failed/{job.process_id}", json.dumps([code, sentence]))
        if job.process_id == 0:
            time.sleep(3 * POLL_SECONDS)  # the store that they read ends with this process
    _leave(code)


def _leave(code: int) -> NoReturn:
    # Not sys.exit: JAX would wait at its end for the processes that still wait for this one.
    streams.flush()
    os._exit(code)


class Watch(threading.Thread):
    """Ends this process when another has failed, or when no step is finished any more; idle in a job of one."""

    def __init__(self, step_timeout: int):
        """Begin to watch at the first beat.

        Args:
          step_timeout: seconds from one `beat` to the next that are too many; none before the first.
        """
        super().__init__(name="watch", daemon=True)
        self._step_timeout, self._step, self._beat = step_timeout, 0, math.inf
        if several():
            self.start()

    def beat(self, step: int) -> None:
        """The job is alive, and this many steps are done."""
        self._step, self._beat = step, time.monotonic()
        stands(f"after step {step}")
        if several():
            # Of the interpreter's C code, so that it works even where a thread never lets go of Python's lock.
            faulthandler.dump_traceback_later(self._step_timeout + 60, exit=True)

    def run(self) -> None:
        """The thread's loop."""
        import jax

        # Its own failure is left to `end`, which waits for the others to read of it: this process may hold the store.
        # Not `process_index()`: as Python ends, JAX drops its devices, and asking would make them anew in this thread.
        client, own = private_jax.job().client, private_jax.job().process_id
        while True:
            time.sleep(POLL_SECONDS)
            try:
                client.key_value_set(f"jlora/step/{own}", str(self._step), allow_overwrite=True)
                failures = [
                    told for told in client.key_value_dir_get("jlora/failed/") if told[0] != f"jlora/failed/{own}"
                ]
                entries = client.key_value_dir_get("jlora/step/")
            except jax.errors.JaxRuntimeError:  # process 0 is gone, and JAX ends this process for it
                continue
            steps = {int(key.rpartition("/")[2]): int(step) for key, step in entries}
            if failures:
                key, text = failures[0]
                code, sentence = json.loads(text)
                if code == HostLost.exit_code:  # was it this one that it waited for?
                    faulthandler.dump_traceback(sys.stderr, all_threads=True)
                what = "" if code == Stopped.exit_code else "failed: "
                print(f"error: process {key.rpartition('/')[2]} of the job {what}{sentence}", file=sys.stderr)
                _leave(code)
            if time.monotonic() - self._beat > self._step_timeout:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                sentence = (
                    f"{_me()}: no step was finished for {self._step_timeout} s (distributed.step_timeout); "
                    f"{_stragglers(steps)}; where each thread stands is above; run the same command again to resume "
                    "from the last checkpoint"
                )
                print(f"error: {sentence}", file=sys.stderr)
                end(HostLost.exit_code, sentence)


def _stragglers(steps: dict[int, int]) -> str:
    least = min(steps.values())
    behind = [str(process) for process, step in sorted(steps.items()) if step == least]
    if len(behind) == len(steps):
        return f"all processes stand after step {least}"
    return f"process {', '.join(behind)} stands after step {least}, the others after step {max(steps.values())}"
