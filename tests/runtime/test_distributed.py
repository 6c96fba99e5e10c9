"""Real processes on this machine as one job: the same run as in one process, whoever is killed, stopped or stuck."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import make_completions, make_llama, make_tokenizer, write_config

from jlora.config import load_config
from jlora.errors import Stopped
from jlora.runtime import distributed, supervise
from jlora.training.metrics import read_metrics
from jlora.training.run import train

ROOT = Path(__file__).parents[2]
NUM_STEPS, SAVE_EVERY, HOST_TIMEOUT = 9, 3, 10
TRAIN = "from jlora.train import main; main()"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with a base, rows and run.yaml."""
    folder = tmp_path_factory.mktemp("job")
    make_llama(folder / "base", num_attention_heads=4, head_dim=12)
    make_tokenizer(folder / "base")
    rows = make_completions(folder / "rows.jsonl", 48)
    write_config(
        folder / "run.yaml",
        folder / "base",
        rows,
        folder / "run",
        lora={"target_modules": "all-linear", "dropout": 0.1},
        data={"format": "completion", "max_length": 64, "eval": 0.25},
        training={
            **{"batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": NUM_STEPS},
            **{"save_every": SAVE_EVERY, "eval_every": 4},
        },
    )
    return folder


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory) -> Path:
    """The run folder of the same run in one process on one device."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(load_config(material / "run.yaml", [f"output_dir={run_dir}"]), quiet=True)
    return run_dir


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """Processes that run `code` with the arguments of a training job, and their output once they have ended."""

    def __init__(self, config, count, devices, *overrides, code=TRAIN, own=None, folders=None, env=None):
        job = [f"distributed.coordinator=127.0.0.1:{free_port()}", f"distributed.num_processes={count}"]
        job += [f"distributed.host_timeout={HOST_TIMEOUT}", "distributed.start_timeout=60"]
        cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, "--config", str(config), *job, f"distributed.process_id={i}"]
                + [*overrides, *(own[i] if own else [])],
                cwd=folders[i] if folders else ROOT,
                env=os.environ | cpu | (env[i] if env else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]

    def end(self, seconds=240):
        """Wait; (exit codes, what each wrote to stderr)."""
        errors = [process.communicate(timeout=seconds)[1] for process in self.processes]
        return [process.returncode for process in self.processes], errors

    def wait_for(self, condition, seconds=240):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            for process in self.processes:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)


def last_error(text):
    return [line for line in text.splitlines() if line.startswith("error:")][-1]


def committed(run_dir):
    folder = run_dir / "checkpoints"
    return sorted(int(f.name) for f in folder.iterdir() if f.name.isdigit()) if folder.is_dir() else []


def steps_done(run_dir):
    return max((line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line), default=0)


def require_the_same(run_dir, alone):
    """Losses, tokens and the exported adapter are those of the run in one process."""
    for key in ("loss", "grad_norm", "eval_loss"):
        curves = [
            [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line] for folder in (run_dir, alone)
        ]
        np.testing.assert_allclose(*curves, rtol=1e-5, err_msg=key)
    for key in ("step", "tokens", "epoch"):
        curves = [
            [line[key] for line in read_metrics(folder / "metrics.jsonl") if key in line] for folder in (run_dir, alone)
        ]
        assert curves[0] == curves[1]
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run_dir, alone))
    assert found.keys() == expected.keys() and len(found) == 3 * 7 * 2
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=2e-6, err_msg=name)


# The first process takes longer over what it alone does at the end than a silent one may.
LATE_REPORT = f"""
import time
from jlora import train
from jlora.training import run
write = run.write_report
run.write_report = lambda run_dir: (time.sleep({HOST_TIMEOUT + 5}), write(run_dir))
train.main()
"""


# The last process takes longer to leave, all being done, than a silent one may.
LATE_LEAVE = f"""
import atexit, time
from jlora import train
late = lambda: atexit.register(time.sleep, {HOST_TIMEOUT + 10})
train.signals.ignore_signals = lambda: train.distributed.is_main() or late()
train.main()
"""


@pytest.mark.slow
def test_a_job_that_one_process_leaves_late_ends_well(material, alone, tmp_path):
    run_dir = tmp_path / "run"
    codes, errors = Job(material / "run.yaml", 2, 1, f"output_dir={run_dir}", "mesh.fsdp=2", code=LATE_LEAVE).end()
    assert codes == [0, 0], errors
    require_the_same(run_dir, alone)


@pytest.mark.slow
def test_a_job_whose_report_takes_long_ends_well(material, alone, tmp_path):
    run_dir = tmp_path / "run"
    codes, errors = Job(material / "run.yaml", 2, 1, f"output_dir={run_dir}", "mesh.fsdp=2", code=LATE_REPORT).end()
    assert codes == [0, 0], errors
    require_the_same(run_dir, alone)
    assert (run_dir / "report.html").is_file()


@pytest.mark.long
def test_two_processes_one_is_killed_and_the_job_goes_on(material, alone, tmp_path):
    config, run_dir = material / "run.yaml", tmp_path / "run"
    overrides = (f"output_dir={run_dir}", "mesh.fsdp=2", "mesh.tensor=2", "-q")
    job = Job(config, 2, 2, *overrides)
    job.wait_for(lambda: committed(run_dir) and steps_done(run_dir) > committed(run_dir)[-1])
    job.processes[1].kill()
    began = time.monotonic()
    codes, errors = job.end()
    assert time.monotonic() - began < HOST_TIMEOUT + 10
    assert codes == [7, -signal.SIGKILL]
    assert "process of the job was lost" in last_error(errors[0]) and "same command again" in last_error(errors[0])
    assert committed(run_dir)[-1] < NUM_STEPS and not (run_dir / "adapter").exists()

    codes, errors = Job(config, 2, 2, *overrides).end()
    assert codes == [0, 0], errors
    require_the_same(run_dir, alone)


@pytest.mark.slow
def test_four_processes_the_first_is_killed_and_one_process_goes_on(material, alone, tmp_path):
    """The coordinator goes, and the checkpoint is read onto another mesh."""
    config, run_dir = material / "run.yaml", tmp_path / "run"
    job = Job(config, 4, 1, f"output_dir={run_dir}", "mesh.data=2", "mesh.fsdp=2", "-q")
    job.wait_for(lambda: committed(run_dir))
    job.processes[0].kill()
    began = time.monotonic()
    codes, errors = job.end()
    assert time.monotonic() - began < HOST_TIMEOUT + 15
    assert codes == [-signal.SIGKILL, 7, 7, 7]
    assert all("was lost" in last_error(text) for text in errors[1:])

    summary = train(load_config(config, [f"output_dir={run_dir}"]), quiet=True)
    assert summary["status"] == "finished"
    require_the_same(run_dir, alone)


# As if the rows were many.
READS_LONG = """
import time
from jlora import train
from jlora.training import opening
opening.read_data = lambda *args: (print("reading", flush=True), time.sleep(300))
train.main()
"""


@pytest.mark.long
def test_a_signal_before_the_first_step_ends_all_at_once(material, tmp_path):
    job = Job(material / "run.yaml", 2, 1, f"output_dir={tmp_path / 'run'}", "mesh.fsdp=2", code=READS_LONG)
    for process in job.processes:
        while "reading" not in (line := process.stdout.readline()):
            assert line or process.poll() is None, process.communicate()[1]
    job.processes[1].send_signal(signal.SIGTERM)
    codes, errors = job.end(seconds=20)
    assert codes == [75, 75], errors
    assert last_error(errors[0]) == f"error: process 1 of the job {Stopped()}" and str(Stopped()) in errors[1]
    assert committed(tmp_path / "run") == []


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(material, alone, tmp_path):
    config, run_dir = material / "run.yaml", tmp_path / "run"
    job = Job(config, 2, 1, f"output_dir={run_dir}", "mesh.fsdp=2", "training.save_every=null")
    job.wait_for(lambda: steps_done(run_dir) >= 1)
    job.processes[1].send_signal(signal.SIGINT)
    job.processes[1].send_signal(signal.SIGTERM)
    codes, errors = job.end()
    assert codes == [75, 75], errors
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "preempted" and committed(run_dir) == [summary["steps"]]

    # The launcher, with other processes and another mesh.
    command = [ROOT / "scripts" / "launch" / "local", "--processes", "2", "--cpu-devices", "2", "--"]
    command += ["--config", config, f"output_dir={run_dir}", "mesh.fsdp=4", "training.save_every=null", "--json"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout
    printed = [line for line in done.stdout.splitlines() if '"status"' in line]
    assert len(printed) == 1 and printed[0].startswith("[0] ")
    require_the_same(run_dir, alone)


@pytest.mark.slow
def test_a_stuck_process_is_noticed_and_named(material, tmp_path):
    # The first step compiles, for longer than this test wants to wait for the third.
    stuck = """
import sys, time
import jlora.train, jlora.training.run
beat = jlora.training.run.Watch.beat
def soon(self, step):
    self._step_timeout = 8 if step >= 2 else 600
    beat(self, step)
jlora.training.run.Watch.beat = soon
put_batch, calls = jlora.training.run.put_batch, []
def hang(*args):
    calls.append(1)
    if len(calls) == 3 and "distributed.process_id=1" in sys.argv:
        time.sleep(1000)
    return put_batch(*args)
jlora.training.run.put_batch = hang
jlora.train.main()
"""
    run_dir = tmp_path / "run"
    job = Job(
        material / "run.yaml",
        2,
        1,
        *(f"output_dir={run_dir}", "mesh.fsdp=2", "-q", "data.eval=null"),
        code=stuck,
    )
    codes, errors = job.end(120)
    assert codes == [7, 7]
    assert any("in hang" in text and "most recent call first" in text for text in errors)
    assert any("no step was finished for 8 s" in last_error(text) for text in errors)
    assert any(re.search("process 1 stands after step 2, the others after step 3", last_error(text)) for text in errors)


def test_a_stopped_child_is_ended():
    """By SIGSTOP, for longer than the job waits for it; one that goes on in time is let be."""
    started = time.monotonic()
    child = subprocess.Popen(["sleep", "1"])
    child.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, child.send_signal, (signal.SIGCONT,)).start()
    assert supervise._wait_for(child.pid, 5.0) == (0, False)
    child.wait()  # so that it knows of its end, too
    child = subprocess.Popen(["sleep", "100"])
    child.send_signal(signal.SIGSTOP)
    assert supervise._wait_for(child.pid, 0.5) == (-signal.SIGKILL, True)
    child.wait()
    assert time.monotonic() - started < 10


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("config", 2, "optimizer.learning_rate is 0.5 here, 0.005 there"),
        ("data", 3, "data is "),
        ("base", 4, "base is "),
        ("library", 2, 'optax is "0.0.1" here'),
        pytest.param("folder", 2, "does not see it as process 0 does", marks=pytest.mark.slow),
        ("bad row", 3, "rows.jsonl:3"),
    ],
)
def test_a_host_that_differs_is_refused_by_all(material, tmp_path, name, code, words):
    """The same config file on every host, but not the same things behind it."""
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
        (folder / "rows.jsonl").write_bytes((material / "rows.jsonl").read_bytes())
    own, body, output = None, TRAIN, tmp_path / "run"
    rows = (folders[1] / "rows.jsonl").read_text(encoding="utf-8")
    match name:
        case "config":
            own = [[], ["optimizer.learning_rate=0.5"]]
        case "base":
            for folder, seed in zip(folders, (0, 1), strict=True):
                make_llama(folder / "base", seed=seed, num_attention_heads=4, head_dim=12)
                make_tokenizer(folder / "base")
        case "data":
            (folders[1] / "rows.jsonl").write_text(rows.replace("a", "e", 1), encoding="utf-8")
        case "bad row":
            lines = rows.splitlines()
            lines[2] = "{"
            (folders[1] / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        case "library":
            body = (
                "import sys, jlora.training.summary as s; v = s.importlib.metadata.version\n"
                "if 'distributed.process_id=1' in sys.argv:\n"
                "    s.importlib.metadata.version = lambda name: '0.0.1' if name == 'optax' else v(name)\n" + TRAIN
            )
        case "folder":
            output, body = Path("run"), f"import jlora.runtime.distributed as d; d.SHARED_SECONDS = 2.0; {TRAIN}"
    overrides = (f"output_dir={output}", "data.train=rows.jsonl", "mesh.fsdp=2", "-q")
    overrides += ("model.path=base",) if name == "base" else ()
    job = Job(material / "run.yaml", 2, 1, *overrides, own=own, folders=folders, code=body)
    codes, errors = job.end(90)
    assert codes == [code, code], errors
    assert words in last_error(errors[1]) and words in last_error(errors[0])
    assert "process 1 of the job failed" in last_error(errors[0]) and "Traceback" not in "".join(errors)
    if name != "bad row":
        assert "process 1 (" in last_error(errors[0])


@pytest.mark.long
def test_a_taken_port_is_refused(material, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "jlora.train", "--config", str(material / "run.yaml")]
        command += [f"distributed.coordinator=127.0.0.1:{port}", "distributed.num_processes=2"]
        done = subprocess.run([*command, "distributed.process_id=0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"port {port} cannot be used" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.long
def test_nobody_else_starts(material):
    command = [sys.executable, "-m", "jlora.train", "--config", str(material / "run.yaml")]
    command += [f"distributed.coordinator=127.0.0.1:{free_port()}", "distributed.num_processes=2"]
    command += ["distributed.start_timeout=3", "distributed.process_id=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 7
    assert "while joining the job at 127.0.0.1" in last_error(done.stderr) and "within 3 s" in last_error(done.stderr)


JOIN = """
import sys
from jlora.runtime import distributed
from jlora.config import DistributedSection
assert distributed.expected(DistributedSection())
distributed.start(DistributedSection(start_timeout=60, host_timeout=10))
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
placed = NamedSharding(Mesh(np.asarray(jax.devices()), "x"), PartitionSpec("x"))
ones = jax.make_array_from_callback((jax.device_count(),), placed, lambda index: np.ones(4)[index])
print(jax.process_index(), jax.process_count(), float(jax.jit(lambda a: a.sum())(ones)))
"""


@pytest.mark.long
@pytest.mark.parametrize("scheduler", ["slurm", "open mpi"])
def test_schedulers_are_detected(material, scheduler):
    job = free_port() % 2**12  # both make the coordinator's port of the job's number
    env = []
    for process in range(2):
        number = {"PROCID": str(process), "LOCALID": str(process), "JOB_ID": str(job), "NTASKS": "2"}
        slurm = number | {"STEP_NODELIST": "localhost", "STEP_NUM_NODES": "1", "STEP_TASKS_PER_NODE": "2"}
        mpi = {"COMM_WORLD_SIZE": "2", "COMM_WORLD_RANK": str(process), "COMM_WORLD_LOCAL_RANK": str(process)}
        mpi |= {"MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1,10.0.0.1:34911"}
        kind = {
            "slurm": {f"SLURM_{k}": v for k, v in slurm.items()},
            "open mpi": {f"OMPI_{k}": v for k, v in mpi.items()},
        }
        env.append(kind[scheduler])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)} | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in env
    ]
    printed = [process.communicate(timeout=120) for process in started]
    assert [out.split()[:3] for out, _ in printed] == [["0", "2", "4.0"], ["1", "2", "4.0"]], printed


def test_a_watch_asks_for_no_devices(monkeypatch):
    """As Python ends, JAX drops its devices; asked by this thread, it made them anew, which ended in a traceback."""

    class Written(Exception):
        pass

    def written(key, *_, **__):
        raise Written(key)

    def asked():
        raise AssertionError("JAX was asked for its devices")

    job = SimpleNamespace(client=SimpleNamespace(key_value_set=written), process_id=3, num_processes=1)
    monkeypatch.setattr(distributed.private_jax, "job", lambda: job)
    monkeypatch.setattr(distributed, "process_index", asked)
    monkeypatch.setattr(distributed, "POLL_SECONDS", 0)
    with pytest.raises(Written, match="^jlora/step/3$"):
        distributed.Watch(60).run()


def test_a_watch_leaves_its_own_failure_to_end(monkeypatch, capsys):
    """Process 0 holds the store: it left before the others had read why, and they ended with 7 instead of its code."""

    class Left(Exception):
        pass

    def leave(code):
        raise Left(code)

    told = [
        [("jlora/failed/0", '[2, "mine"]')],
        [("jlora/failed/0", '[2, "mine"]'), ("jlora/failed/1", '[3, "theirs"]')],
    ]

    def read(folder):
        return told.pop(0) if folder == "jlora/failed/" else [("jlora/step/0", "1")]

    client = SimpleNamespace(key_value_set=lambda *_, **__: None, key_value_dir_get=read)
    job = SimpleNamespace(client=client, process_id=0, num_processes=1)
    monkeypatch.setattr(distributed.private_jax, "job", lambda: job)
    monkeypatch.setattr(distributed, "_leave", leave)
    monkeypatch.setattr(distributed, "POLL_SECONDS", 0)
    with pytest.raises(Left, match="^3$"):
        distributed.Watch(60).run()
    assert capsys.readouterr().err == "error: process 1 of the job failed: theirs\n"


def test_half_an_address_is_refused(material):
    for overrides, words in (
        (["distributed.num_processes=2"], "set coordinator, num_processes and process_id, or none"),
        (
            ["distributed.coordinator=a:1", "distributed.num_processes=2", "distributed.process_id=2"],
            "process_id 2 must be below num_processes 2",
        ),
        (
            ["distributed.coordinator=here", "distributed.num_processes=2", "distributed.process_id=0"],
            "must be host:port",
        ),
    ):
        with pytest.raises(Exception, match=words):
            load_config(material / "run.yaml", overrides)
