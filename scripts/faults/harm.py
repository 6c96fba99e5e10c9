"""The campaigns: each does one kind of harm, again and again, and returns what it did as one line."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trials import ROOT, Campaign, Lost, apart, began_at, committed, final_state, trained, wait

from jlora.files import manifest
from jlora.training.metrics import read_metrics


def kills(campaign: Campaign, count: int) -> str:
    """kill -9 at random moments, over run after run."""
    killed = runs = while_saving = resumed = 0
    while killed < count and not campaign.over():
        runs += 1
        run_dir = campaign.folder / f"run{runs}"
        before, code = 0, -1
        while code:
            pid = campaign.start(run_dir)
            if killed < count:
                time.sleep(campaign.random.uniform(0.0, campaign.unbroken_seconds))
                os.kill(pid, signal.SIGKILL)  # the process is not waited for yet, so the number is still its own
            code = wait(pid)
            killed += code == -signal.SIGKILL
            if code not in (0, -signal.SIGKILL):
                raise Lost(f"{run_dir}: exit code {code}: {campaign.log(run_dir).read_text(encoding='utf-8')}")
            began = began_at(campaign.log(run_dir))
            if began not in (None, before):
                raise Lost(f"{run_dir}: checkpoint {before} was committed, the next start went on from {began}")
            resumed += bool(began)
            steps = committed(run_dir)
            if max(steps, default=0) < before or (run_dir / "quarantine").exists():
                raise Lost(f"{run_dir}: checkpoint {before} was committed, and now there are {steps}")
            before = max(steps, default=0)
            if code and (run_dir / "checkpoints").is_dir():
                while_saving += any(not path.name.isdecimal() for path in (run_dir / "checkpoints").iterdir())
        campaign.require_equal(run_dir)
    if not resumed:
        raise Lost(f"none of {killed} starts said from which step it resumed, so nothing was shown")
    return (
        f"{killed} kills over {runs} runs, {while_saving} while a checkpoint was written or deleted, {resumed} resumes"
    )


CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


def dies_before(number: int, run_dir: Path, count_to: Path | None, body: Callable[[], None]) -> Callable[[], None]:
    """The body with a hook: kill -9 as the numbered change of a file or folder below the run's is about to happen."""

    def hooked() -> None:
        seen = [0]

        def hook(event: str, args: tuple) -> None:
            path = args[0] if event in CHANGES or (event == "open" and writes(args)) else None
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(run_dir)):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            body()
        finally:
            if count_to is not None:
                count_to.write_text(str(seen[0]), encoding="utf-8")

    return hooked


def writes(args: tuple) -> bool:
    """Whether an `open` of Python's is for writing."""
    _, mode, flags = args
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else bool(set(mode or "r") & set("wax+"))


def boundaries(campaign: Campaign, count: int) -> str:
    """kill -9 before every change in the run folder that Python makes, or a hand of `count` of them."""
    total_file, run_dir = campaign.folder / "total", campaign.folder / "counted"
    body = trained(campaign.config, run_dir)
    if wait(apart(dies_before(0, run_dir, total_file, body), campaign.folder / "counted.log")):
        raise Lost("the counted run did not end well")
    total = int(total_file.read_text(encoding="utf-8"))
    done = late = 0
    for number in campaign.hand(list(range(1, total + 1)), count):
        if campaign.over():
            break
        run_dir = campaign.folder / f"boundary{number}"
        body = dies_before(number, run_dir, None, trained(campaign.config, run_dir))
        code = wait(apart(body, campaign.log(run_dir)))
        late += code == 0  # threads of Orbax come in another order each time, and the count is off by a few
        if code not in (0, -signal.SIGKILL):
            raise Lost(f"{run_dir}: exit code {code} at boundary {number}")
        before = max(committed(run_dir), default=0)
        campaign.finish(run_dir)
        began = began_at(campaign.log(run_dir))
        if began not in (None, before) or (run_dir / "quarantine").exists():
            raise Lost(f"{run_dir}: {before} was committed at boundary {number}, the next start went on from {began}")
        campaign.require_equal(run_dir)
        done += 1
    return f"{done} of {total} boundaries killed at ({late} of them came after the end)"


def damage(campaign: Campaign, count: int) -> str:
    """Each file of the newest checkpoint with a bit flipped or its end cut off: noticed, and resumed without it."""
    source = campaign.folder / "unbroken"
    last, earlier = committed(source)[-1], committed(source)[-2]
    folder = source / "checkpoints" / str(last)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    cases = [(file, kind) for file in files for kind in ("flip", "cut")]
    done = 0
    for file, kind in campaign.hand(cases, count):
        if campaign.over():
            break
        run_dir = campaign.folder / f"damaged{done}"
        shutil.copytree(source, run_dir)
        path = run_dir / "checkpoints" / str(last) / file
        content = bytearray(path.read_bytes())
        if kind == "flip":
            content[campaign.random.randrange(len(content))] ^= 1 << campaign.random.randrange(8)
        else:
            del content[campaign.random.randrange(len(content)) :]
        path.write_bytes(content)
        campaign.finish(run_dir)
        log = campaign.log(run_dir).read_text(encoding="utf-8")
        if began_at(campaign.log(run_dir)) != earlier or f"/{last}: the checkpoint is damaged" not in log:
            raise Lost(f"{run_dir}: {kind} of {file} was not noticed: {log}")
        if not (run_dir / "quarantine" / str(last)).is_dir():
            raise Lost(f"{run_dir}: {last} is not in quarantine")
        campaign.require_equal(run_dir)
        done += 1
    # Without a run each: many more bits of each file.
    copy = campaign.folder / "bits"
    shutil.copytree(folder, copy)
    tried = 0
    for file in files:
        content = (copy / file).read_bytes()
        for _ in range(200):
            bit = campaign.random.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (copy / file).write_bytes(flipped)
            if manifest.fault(copy) is None:
                raise Lost(f"bit {bit} of {file} flipped, and nobody noticed")
            tried += 1
        (copy / file).write_bytes(content)
    return (
        f"{done} of {len(cases)} damages of {len(files)} files run to the end; {tried} flipped bits noticed of {tried}"
    )


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A tmpfs of that size."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        print(f"skipped: a tmpfs cannot be mounted here ({made.stderr.strip()})")
        sys.exit(0)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(campaign: Campaign, count: int) -> str:
    """The disk fills up while a run writes; once there is room again, the same command goes on."""
    stopped = done = 0
    sentences = set()
    with small_disk(campaign.folder / "disk", 16) as disk:
        while done < count and not campaign.over():
            run_dir, ballast = disk / f"run{done}", disk / "ballast"
            wanted = campaign.random.randrange(campaign.steps)
            pid = campaign.start(run_dir)
            while (
                max(committed(run_dir), default=0) < wanted
                and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.01)
            free = shutil.disk_usage(disk).free
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as stream:
                stream.write(bytes(max(0, free - campaign.random.randrange(200 * 1024))))
            code = wait(pid)
            log = campaign.log(run_dir).read_text(encoding="utf-8")
            errors = [line for line in log.splitlines() if line.startswith("error:")]
            if code not in (0, 2) or "Traceback" in log or (code == 2 and len(errors) != 1):
                raise Lost(f"{run_dir}: exit code {code}: {log}")
            stopped += code == 2
            sentences |= {" ".join(line.split()[:6]) for line in errors}
            before = max(committed(run_dir), default=0)
            ballast.unlink()
            campaign.finish(run_dir)
            began = began_at(campaign.log(run_dir))
            if began not in (None, before):
                raise Lost(f"{run_dir}: {before} was whole, the next start went on from {began}")
            campaign.require_equal(run_dir)
            done += 1
    return f"{done} runs on a disk that filled up, {stopped} stopped with exit code 2 and one sentence"


def real(campaign: Campaign, run_dir: Path, *overrides: str) -> subprocess.Popen:
    """`python -m jlora.train` itself, not a fork: its start and its end count too."""
    command = [
        sys.executable,
        "-m",
        "jlora.train",
        "--config",
        str(campaign.config),
        f"output_dir={run_dir}",
        *overrides,
    ]
    with open(campaign.log(run_dir), "w", encoding="utf-8") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def signals(campaign: Campaign, count: int) -> str:
    """SIGTERM, SIGINT and SIGHUP, again and again until the process is gone."""
    sent = preempted = done = 0
    while done < count and not campaign.over():
        run_dir = campaign.folder / f"stormed{done}"
        process = real(campaign, run_dir)
        # From its first save on, or from before its first step, where it ends at once.
        while not (committed(run_dir) if done % 2 == 0 else (run_dir / "checkpoints").exists()):
            if process.poll() is not None:
                raise Lost(f"{run_dir}: exit code {process.returncode} before it began")
            time.sleep(0.005)
        time.sleep(campaign.random.uniform(0.0, campaign.unbroken_seconds / 4))
        while process.poll() is None:
            process.send_signal(campaign.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
            sent += 1
            time.sleep(campaign.random.uniform(0.0, 0.01))
        log = campaign.log(run_dir).read_text(encoding="utf-8")
        if process.returncode not in (0, 75) or "Traceback" in log:
            raise Lost(f"{run_dir}: exit code {process.returncode} in a storm of signals: {log}")
        preempted += process.returncode == 75
        steps = [line["step"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
        if max(committed(run_dir), default=0) != max(steps, default=0):
            raise Lost(f"{run_dir}: exit code 75, but step {max(steps)} is not saved")
        campaign.finish(run_dir)
        campaign.require_equal(run_dir)
        done += 1
    return f"{done} storms of {sent} signals, {preempted} exits with 75"


BOUND = 45.0  # seconds: heartbeats are missed for 10, and JAX and the launching processes take some more


def stuck(campaign: Campaign, count: int) -> str:
    """One of four processes is stopped for good; the job ends in time, and the same command ends as if nothing was."""
    overrides = ("mesh.fsdp=4", "distributed.host_timeout=10", "distributed.start_timeout=120")

    def job(run_dir: Path) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        own = (f"distributed.coordinator=127.0.0.1:{port}", "distributed.num_processes=4")
        folders = [run_dir.with_name(f"{run_dir.name}-{i}") for i in range(4)]
        return [
            real(campaign, folders[i], *overrides, *own, f"distributed.process_id={i}", f"output_dir={run_dir}")
            for i in range(4)
        ]

    def end(processes: list[subprocess.Popen], seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise Lost(f"the job did not end in {seconds:.0f} s") from None
        finally:
            for process in processes:
                process.kill()

    unbroken = campaign.folder / "four"
    codes = end(job(unbroken), 300)
    if codes != [0] * 4:
        raise Lost(f"the unbroken job ended with {codes}")
    campaign.state = final_state(unbroken)
    done, longest = 0, 0.0
    while done < count and not campaign.over():
        run_dir = campaign.folder / f"stuck{done}"
        processes = job(run_dir)
        wanted, victim = campaign.random.randrange(1, campaign.steps - 10), campaign.random.randrange(4)
        while max(committed(run_dir), default=0) < wanted:
            if any(process.poll() is not None for process in processes):
                raise Lost(f"{run_dir}: ended before it was harmed: {[process.returncode for process in processes]}")
            time.sleep(0.02)
        children = Path(f"/proc/{processes[victim].pid}/task/{processes[victim].pid}/children")
        os.kill(int(children.read_text(encoding="utf-8").split()[0]), signal.SIGSTOP)
        began = time.monotonic()
        codes = end(processes, BOUND)
        longest = max(longest, time.monotonic() - began)
        if codes != [7] * 4:
            raise Lost(f"{run_dir}: process {victim} was stopped, and the job ended with {codes}")
        codes = end(job(run_dir), 300)
        if codes != [0] * 4:
            raise Lost(f"{run_dir}: the same command again ended with {codes}")
        campaign.require_equal(run_dir)
        done += 1
    return f"{done} jobs of four processes with one stopped, all ended within {longest:.0f} s (bound {BOUND:.0f})"
