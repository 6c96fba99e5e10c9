"""The launchers: what they set is known to jlora, JAX and XLA, and their answers to exit codes; who detects a job."""

import contextlib
import glob
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, cluster
from tiny import make_llama, make_rows, make_tokenizer, write_config

from jlora import cli
from jlora.config import Config, load_config
from jlora.errors import HostLost, UserError
from jlora.runtime import distributed

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scripts/launch"
FILES = sorted(LAUNCH.iterdir())
JOBSETS = [LAUNCH / "jobset-gpu.yaml", LAUNCH / "jobset-tpu.yaml"]
AGAIN = {HostLost.exit_code, cli.PREEMPTED}
FINAL = {1, *(error.exit_code for error in UserError.__subclasses__())} - AGAIN


def container(jobset: dict) -> dict:
    """The one container of a JobSet's pods."""
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


# What the files set.


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_name_is_known(path):
    """Config keys (in comments too) and config files; every distributed key needs a value of its own."""
    text = path.read_text(encoding="utf-8")
    for section, key in re.findall(r"\b([a-z]+)\.([a-z_]+)=", text):
        assert key in Config.model_fields[section].annotation.model_fields, f"{section}.{key}"
    for config in re.findall(r"configs/\w+\.yaml", text):
        assert (ROOT / config).is_file()


@pytest.mark.parametrize("name", ["mpirun", "slurm.sbatch", "tpu-vm.sh"])
def test_shell_parses(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset(path):
    jobset = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    # Codes that would come again fail the job for its PodFailurePolicy, and that fails the set; others restart it.
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    [workers] = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    [rule] = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["containerName"]) == ("FailJob", "In", container(jobset)["name"])
    assert set(codes["values"]) == FINAL
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"] > 1
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    mounted = {mount["name"] for mount in container(jobset)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    devices = [
        name for name in container(jobset)["resources"]["limits"] if name in ("nvidia.com/gpu", "google.com/tpu")
    ]
    assert [toleration["key"] for toleration in pod["tolerations"]] == devices


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
@pytest.mark.parametrize("index", [0, 1])
def test_jobset_command_is_a_config_that_loads(path, index):
    jobset = yaml.safe_load(path.read_text(encoding="utf-8"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    train = container(jobset)
    assert train["command"] == ["sh", "-c"]
    env = {entry["name"]: entry.get("value", jobset["metadata"]["name"]) for entry in train["env"]}
    shown = subprocess.run(
        ["sh", "-c", train["args"][0].replace("exec python", "printf '%s\\n'", 1)],
        env=env | {"PATH": os.environ["PATH"], "JOB_COMPLETION_INDEX": str(index)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert shown[:3] == ["-m", "jlora.train", "--config"]
    cfg = load_config(ROOT / shown[3], shown[4:])
    limits = train["resources"]["limits"]
    devices = job["parallelism"] * limits.get("nvidia.com/gpu", limits.get("google.com/tpu"))
    rows = cfg.training.batch_size // cfg.training.gradient_accumulation_steps
    assert cfg.mesh.fsdp == -1 and rows % (devices // cfg.mesh.tensor) == 0
    assert any(cfg.output_dir.startswith(mount["mountPath"]) for mount in train["volumeMounts"])
    if "nvidia.com/gpu" in limits:
        # The name that JobSet gives to pod 0 of replicated job `workers`.
        host, port = cfg.distributed.coordinator.split(":")
        assert host == "jlora-workers-0-0.jlora"
        assert int(port) in [entry["containerPort"] for entry in train["ports"]]
        assert (cfg.distributed.num_processes, cfg.distributed.process_id) == (job["parallelism"], index)
    else:
        assert cfg.distributed.coordinator is None
        topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert devices == math.prod(int(size) for size in topology.split("x"))


# What the files do, with their cluster's commands replaced.


def fake(folder: Path, name: str, body: str) -> None:
    """A command of that name, in a folder for PATH."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def run(command: Sequence[str | Path], folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a launcher with the fakes of a folder."""
    whole = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "XLA_FLAGS")}
    whole |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | env
    return subprocess.run(command, env=whole, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        *((code, "0", True) for code in sorted(AGAIN)),
        *((code, "0", False) for code in (0, 137, *FINAL)),
        (7, "20", False),
    ],
)
def test_slurm_requeues_what_can_go_on(tmp_path, code, restarts, requeued):
    fake(tmp_path, "srun", f'printf "%s\\n" "$@"; exit {code}')
    fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    command = ["bash", LAUNCH / "slurm.sbatch", "--config", "c.yaml", "data.train=my rows.jsonl"]
    done = run(command, tmp_path, SLURM_JOB_ID="17", SLURM_RESTART_COUNT=restarts)
    assert done.returncode == code
    assert ("scontrol requeue 17" in done.stdout) == requeued
    assert "python\n-m\njlora.train\n--config\nc.yaml\ndata.train=my rows.jsonl\n" in done.stdout


def test_slurm_array_elements_have_arguments_of_their_own(tmp_path):
    fake(tmp_path, "srun", 'printf "%s\\n" "$@"')
    command = ["bash", LAUNCH / "slurm.sbatch", "training.seed=%a", "output_dir=/r/a %a-%a"]
    assert "\ntraining.seed=%a\noutput_dir=/r/a %a-%a\n" in run(command, tmp_path).stdout
    assert "\ntraining.seed=3\noutput_dir=/r/a 3-3\n" in run(command, tmp_path, SLURM_ARRAY_TASK_ID="3").stdout


def test_slurm_requeues_one_element_of_an_array(tmp_path):
    """The last element's job number is the array's, of which a real SLURM starts all elements again."""
    fake(tmp_path, "srun", "exit 75")
    fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    array = {"SLURM_JOB_ID": "17", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "4"}
    assert "scontrol requeue 17_4\n" in run(["bash", LAUNCH / "slurm.sbatch"], tmp_path, **array).stdout


# Like the real one: signals the group of each process, hands on its environment, and ends with a process's code.
MPIRUN = """
echo "mpirun $*"
while [[ $1 != */launch/mpirun ]]; do shift; done
trap 'kill -USR1 -- -$!' USR1
trap 'echo mpirun got TERM; exit 1' TERM
OMPI_COMM_WORLD_RANK=0 setsid "$@" &
while kill -0 $! 2> /dev/null; do wait $!; code=$?; done
exit $code
"""


def test_mpirun_saves_on_sigterm_and_gives_the_exit_code(tmp_path):
    """mpirun itself would kill its processes a second after it got SIGTERM."""
    fake(tmp_path, "mpirun", MPIRUN)
    fake(tmp_path, "python", 'trap "echo saved; exit 75" TERM; echo "ready $*"; while true; do sleep 0.05; done')
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [LAUNCH / "mpirun", "--host", "a,b", "--", "--config", "my c.yaml"]
    job = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        said = [job.stdout.readline(), job.stdout.readline()]
        job.terminate()
        said.append(job.communicate(timeout=30)[0])
    finally:
        job.kill()
    assert said[0].startswith("mpirun -x PATH --host a,b ") and said[1] == "ready -m jlora.train --config my c.yaml\n"
    assert (said[2], job.returncode) == ("saved\n", cli.PREEMPTED)
    fake(tmp_path, "python", "exit 3")
    assert run([*command], tmp_path).returncode == 3
    refused = run([LAUNCH / "mpirun", "--config", "c.yaml"], tmp_path)
    assert refused.returncode == 2 and "before the two dashes" in refused.stderr


SRUN = """
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i setsid "$@" > ~/task$i.log 2>&1 &
    echo $! >> ~/pids
done
code=0
for pid in $(cat ~/pids); do
    wait $pid
    one=$?
    code=$((one > code ? one : code))
done
exit $code
"""


def signal_tasks(folder: Path, number: int) -> None:
    """What slurmstepd does: a signal to the process group of each task."""
    for pid in (folder / "pids").read_text(encoding="utf-8").split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid), number)


@pytest.mark.slow
def test_slurm_stops_in_time_and_goes_on(tmp_path):
    """Two tasks find each other by SLURM's variables; its SIGTERM, to all processes of each task, ends both saved."""
    make_llama(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    rows = make_rows(tmp_path / "rows.json")
    config = write_config(tmp_path / "c.yaml", tmp_path / "base", rows, tmp_path / "run", training={"max_steps": 5000})
    fake(tmp_path, "srun", SRUN)
    fake(tmp_path, "python", f'exec {sys.executable} "$@"')
    fake(tmp_path, "scontrol", 'echo "scontrol $*"')
    env = {"HOME": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "XLA_FLAGS": ""}  # the job's number makes the port
    command = ["bash", LAUNCH / "slurm.sbatch", "--config", config]
    with ThreadPoolExecutor() as pool:
        job = pool.submit(run, command, tmp_path, **env)
        try:
            metrics = tmp_path / "run/metrics.jsonl"
            while not (metrics.exists() and '"step": 2' in metrics.read_text(encoding="utf-8")):
                assert not job.done(), (tmp_path / "task0.log").read_text(encoding="utf-8")
                time.sleep(0.1)
            signal_tasks(tmp_path, signal.SIGTERM)
            done = job.result()
        finally:
            signal_tasks(tmp_path, signal.SIGKILL)
    logs = [(tmp_path / f"task{i}.log").read_text(encoding="utf-8") for i in (0, 1)]
    assert done.returncode == cli.PREEMPTED, logs
    assert f"scontrol requeue {os.getpid()}" in done.stdout
    [step] = [int(folder.name) for folder in (tmp_path / "run/checkpoints").iterdir() if folder.name.isdigit()]
    assert 2 <= step < 5000
    # JAX's runtime may log, as the first process ends, that it is gone; an error of ours has a line of its own.
    assert not any(line.startswith("error:") for log in logs for line in log.splitlines())


def test_tpu_vm_runs_everywhere_and_keeps_the_exit_code(tmp_path):
    """gcloud's ssh runs the command in a home of the layout that `install` leaves."""
    (tmp_path / "jlora").symlink_to(ROOT)
    (tmp_path / "jlora-venv/bin").mkdir(parents=True)
    fake(tmp_path / "jlora-venv/bin", "python", f'exec {sys.executable} "$@"')
    fake(tmp_path, "gcloud", 'echo "$*" >> ~/calls; for last; do :; done; cd; exec bash -c "${last#--command=}"')
    missing = tmp_path / "no such.yaml"
    done = run(
        ["bash", LAUNCH / "tpu-vm.sh", "run", "pod", "zone", "--config", missing],
        tmp_path,
        HOME=str(tmp_path),
        JAX_PLATFORMS="cpu",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.startswith("error: ") and str(missing) in done.stdout
    assert "--worker=all" in (tmp_path / "calls").read_text(encoding="utf-8")
    done = run(["bash", LAUNCH / "tpu-vm.sh", "go", "pod", "zone"], tmp_path)
    assert done.returncode == 2 and "not one of install, run, stop" in done.stderr


@pytest.mark.long
def test_local_gives_the_exit_code_of_its_processes(tmp_path):
    done = run([sys.executable, LAUNCH / "local", "--cpu-devices", "1", "--", "--config", tmp_path / "none"], tmp_path)
    assert done.returncode == 2
    assert "[0] error: " in done.stdout and "[1] error: " in done.stdout


def test_local_splits_the_gpus(tmp_path):
    """JAX is a stand-in here that shows what a process was given."""
    (tmp_path / "jlora").mkdir()
    show = "import os, sys; print(*(os.environ[k] for k in sys.argv[1].split()), *sys.argv[2:])"
    (tmp_path / "jlora/train.py").write_text(show, encoding="utf-8")

    def local(gpus: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, LAUNCH / "local", *args, "--", "CUDA_VISIBLE_DEVICES"]
        return run(command, tmp_path, CUDA_VISIBLE_DEVICES=gpus, PYTHONPATH=str(tmp_path), PYTHONSAFEPATH="1")

    done = local("4,5,6,7", "--processes", "2")
    assert done.returncode == 0, done.stdout
    assert "[0] 4,5 " in done.stdout and "[1] 6,7 " in done.stdout
    assert [f"distributed.num_processes=2 distributed.process_id={i}\n" in done.stdout for i in (0, 1)] == [True, True]
    assert [f"[{i}] {gpu} " in local("4,5,6,7").stdout for i, gpu in enumerate("4567")] == [True] * 4
    for gpus, args, sentence in (
        ("0,1,2", ("--processes", "2"), "3 GPUs cannot be shared by 2 processes"),
        ("", (), "no GPU is visible"),
        ("0", ("--processes", "0"), "0 is not a positive number"),
    ):
        done = local(gpus, *args)
        assert done.returncode == 2 and sentence in done.stderr


# Who detects a job.

SLURM = {"SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
OMPI = ORTE | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}
GKE = {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_ID": "0", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.fixture
def bare(monkeypatch):
    """No scheduler and no TPU; returns what sets a host's variables and device files."""
    for key in list(os.environ):
        if key.startswith(("SLURM", "OMPI", "TPU_", "MEGASCALE", "KUBERNETES", "JOB_", "CUDA_VISIBLE")):
            monkeypatch.delenv(key)
    installed = {"libtpu"}
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: name in installed or None if name in ("libtpu", "kubernetes") else found(name),
    )

    def host(env: dict[str, str], tpu: str | None = None) -> None:
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(glob, "glob", lambda pattern: [tpu] if tpu and tpu.startswith(pattern[:-1]) else [])
        for module in (cluster, cloud_tpu_cluster):
            monkeypatch.setattr(module, "running_in_cloud_tpu_vm", tpu is not None)
        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: ("", 404))

    return host


@pytest.mark.parametrize(
    ("env", "tpu", "processes"),
    [
        pytest.param(SLURM | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16"}, None, 16, id="srun"),
        pytest.param(SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None, 1, id="srun-one"),
        pytest.param(OMPI, None, 4, id="mpirun"),
        # A node that mpirun reached by a step of one task a node.
        pytest.param(OMPI | SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None, 4, id="mpirun-slurm"),
        pytest.param(GKE | {"TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a"}, "/dev/vfio/0", 2, id="gke-slice"),
        pytest.param(GKE | {"TPU_WORKER_HOSTNAMES": "a-0.a,a-1.a"}, "/dev/accel0", 2, id="gke-slice-v4"),
        pytest.param(GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}, "/dev/vfio/0", 1, id="gke-one-host"),
        pytest.param(
            GKE | {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"},
            "/dev/vfio/0",
            2,
            id="gke-addresses",
        ),
        pytest.param(
            GKE | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"},
            "/dev/vfio/0",
            2,
            id="gke-two-slices-of-one-host",
        ),
    ],
)
def test_detected_as_jax_does(bare, env, tpu, processes):
    bare(env, tpu)
    counted = ClusterEnv.auto_detect_unset_distributed_params("a:1", None, None, None, None, 1)[1]
    assert counted == processes
    assert distributed.detected() == (processes > 1)


@pytest.mark.parametrize(
    ("env", "tpu", "answer"),
    [
        pytest.param({}, None, False, id="laptop"),
        pytest.param({}, "/dev/accel0", True, id="tpu-vm"),
        pytest.param({"TPU_SKIP_MDS_QUERY": "1"}, "/dev/vfio/vfio", False, id="vfio-of-something-else"),
        # salloc -n 4: the shell is one task of its own step.
        pytest.param(SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None, False, id="salloc-shell"),
        pytest.param({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None, False, id="sbatch-script"),
        # Without the package `kubernetes`, JAX knows no Kubernetes job.
        pytest.param({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"}, None, False, id="k8s"),
    ],
)
def test_detected_where_jax_can_not_be_asked(bare, env, tpu, answer):
    bare(env, tpu)
    assert distributed.detected() is answer


@pytest.mark.parametrize(
    ("tasks", "on_node", "seen", "gpus"),
    [
        pytest.param("8(x2)", "8", "0,1,2,3,4,5,6,7", None, id="one-task-a-gpu"),
        pytest.param("1(x2)", "4", "0,1,2,3", [0, 1, 2, 3], id="one-task-a-node"),
        pytest.param("1", "4", "", [0, 1, 2, 3], id="one-task"),
        pytest.param("1(x2)", "2", "6,7", [0, 1], id="half-a-node"),
        pytest.param("4(x2)", "4", "2", [0], id="gpus-per-task-1"),
        pytest.param("2", "4", "2,3", [0, 1], id="gpus-per-task-2"),
        pytest.param("12,1", "4", "0,1,2,3", None, id="uneven"),
        pytest.param("2", "", "", None, id="no-gpus"),
    ],
)
def test_gpus_of_a_slurm_task(bare, tasks, on_node, seen, gpus):
    env = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": on_node, "CUDA_VISIBLE_DEVICES": seen}
    bare({key: value for key, value in env.items() if value})
    assert distributed._slurm_gpus() == gpus
    bare(OMPI)
    assert distributed._slurm_gpus() is None
