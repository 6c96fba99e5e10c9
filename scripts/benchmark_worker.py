"""A process of scripts/benchmark: opens one side, then answers each line of JSON with one; between them it waits.

Needs no more than NumPy and the packages of its own side, whose interpreter runs it.
"""

import argparse
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PEER_MODES = ("eager", "checkpointing", "compile")  # of transformers and PEFT
# Of packages with an interpreter of their own.
OTHER_MODES = {"tunix": "tunix", "torchtune": "torchtune", "torchtune-compile": "torchtune"}
# Whose versions are told, by role or package.
VERSIONS = {
    "ours": ("jax",),
    **dict.fromkeys(PEER_MODES, ("torch", "transformers", "peft")),
    "tunix": ("google-tunix", "qwix", "jax"),
    "torchtune": ("torchtune", "torch"),
}


def serve(role: str, folder: Path) -> int:
    """Answers until stdin ends; what is printed for people, by libraries too, goes to stderr."""
    given = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
    args = argparse.Namespace(**given, worker=role)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if cores:  # XLA makes as many threads as it may use cores
        os.sched_setaffinity(0, cores[: args.threads])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = _open(args, folder)
    versions = {package: version(package) for package in VERSIONS.get(OTHER_MODES.get(role, role), ())}
    idle_cpu = idle = 0.0
    while True:
        cpu, clock = time.process_time(), time.perf_counter()
        line = sys.stdin.readline()
        idle_cpu, idle = idle_cpu + time.process_time() - cpu, idle + time.perf_counter() - clock
        if not line:
            return 0
        cpu = time.process_time()
        said = answer(json.loads(line)) | {"cpu": time.process_time() - cpu}
        said |= {"idle_cpu": idle_cpu, "idle": idle, "versions": versions}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps(said | {"peak_rss": peak}), file=answers, flush=True)


def _open(args: argparse.Namespace, folder: Path) -> Callable[[Any], dict[str, Any]]:
    """What answers the questions to the role in `args.worker`; imports no other side."""
    if args.worker in OTHER_MODES:
        import benchmark_peers

        return benchmark_peers.open_side(args, folder)
    import benchmark_costs
    import benchmark_sides

    opened = {
        "prepare": lambda *_: lambda _: benchmark_sides.prepare(args, folder),
        "xla": benchmark_costs.open_products,
        "torch": benchmark_costs.open_products,
        "sweep": benchmark_costs.open_sweep,
    }
    return opened.get(args.worker, benchmark_sides.open_side)(args, folder)


if __name__ == "__main__":
    asked, shared = sys.argv[1], Path(sys.argv[2])
    if asked in OTHER_MODES:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it closes its stdin
        sys.exit(serve(asked, shared))
    from jlora import cli

    cli.run(lambda: serve(asked, shared))
