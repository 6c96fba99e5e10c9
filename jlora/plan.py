"""`jlora plan`: what a run takes on hardware that is not there, before anything is rented.

Prints and draws what `jlora.planning` finds, with its price; `--search` looks for a faster layout.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from jlora import cli
from jlora.config import load_config
from jlora.errors import ConfigError, MemoryExceeded
from jlora.planning.hardware import KNOWN

UTILIZATIONS = (0.2, 0.3, 0.4, 0.5)
COMPILATIONS = 16


def main() -> None:
    """Command line."""
    parser = cli.Parser(
        prog="jlora plan",
        description="Compile a run for hardware that is not there.",
        examples=(
            "jlora plan run.yaml --topology gpu:h100-80gb:2 --price 2.5",
            "jlora plan run.yaml --topology tpu:v5e:2x4 --search",
        ),
    )
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--topology", action="append", default=[], metavar="SPEC", help=f"{KNOWN}; repeat for more; 'list' names them"
    )
    parser.add_argument("--utilization", type=float, nargs="+", default=list(UTILIZATIONS), help="shares of the peak")
    parser.add_argument("--tokens", type=float, help="tokens of an epoch, instead of counting the config's rows")
    parser.add_argument("--tokens-per-second", type=float, help="a speed per device, instead of utilisations")
    parser.add_argument("--price", type=float, help="dollars per device-hour")
    parser.add_argument(
        "--search", action="store_true", help="find the mesh, remat and micro-batch that are fastest and fit"
    )
    parser.add_argument(
        "--compilations", type=int, default=COMPILATIONS, metavar="N", help="at most, of --search (default %(default)s)"
    )
    parser.add_argument(
        "--plot", type="path", metavar="FILE.png", help="memory bars of all topologies; needs jlora[plot]"
    )
    cli.add_output_arguments(parser, json="one JSON object a topology")
    parser.add_argument("--nth", type=int, help=argparse.SUPPRESS)  # of the topologies: the one of this child
    args = parser.parse_intermixed_args()

    def body() -> int:
        if "list" in args.topology:
            print(KNOWN)
            return 0
        config = cli.config_file(args)
        if not args.topology:
            raise ConfigError("name the hardware with --topology, such as gpu:h100-80gb:2 (--topology list names all)")
        if args.compilations < 1:
            raise ConfigError(f"--compilations must be at least 1, not {args.compilations}")
        check_numbers(args)
        if args.plot:
            from jlora.reports.plan import require_matplotlib

            require_matplotlib()
        cfg = load_config(config, args.overrides)
        if args.nth is not None:
            args.topology, args.plot = [args.topology[args.nth]], None
        elif len(args.topology) > 1:
            return each_in_its_own_process(args)

        from jlora.planning.answer import planned, searched
        from jlora.planning.topology import compiler_logs_off, prepare, resolve

        prepare()
        with compiler_logs_off():
            target = resolve(args.topology[0])
        found, why_not = searched(cfg, target, args) if args.search else planned(cfg, target, args)
        show([found], args)
        if why_not is not None:
            raise MemoryExceeded(why_not)
        return 0

    cli.run(body)


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse figures that time and cost cannot be computed from.

    Raises:
      ConfigError: naming the flag.
    """
    for flag in ("--tokens", "--tokens-per-second", "--price"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{flag} {value:g}: must be a positive number")
    for share in args.utilization:
        if not 0 < share <= 1:
            raise ConfigError(f"--utilization {share:g}: is a share of the peak, above 0 and at most 1, such as 0.4")


def show(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print as the command line asks for, and draw."""
    from jlora.reports.plan import draw, print_plan, print_search

    for one in found:
        if args.json:
            cli.print_json(one)
        elif not args.quiet:
            if args.search:
                print_search(one)
            print_plan(one["best"] if args.search else one)
    if args.plot and found:
        draw([one["best"] if args.search else one for one in found], Path(args.plot))


def each_in_its_own_process(args: argparse.Namespace) -> int:
    """One process a topology: the TPU and the CUDA compiler do not share one well. The highest exit code."""
    codes, found = [], []
    # The whole command line again: a child with --nth has no children, whatever stands there. Nor does it take modules
    # from the folder that it is started in, unless this process does.
    python = [sys.executable, *([] if {"", os.getcwd()} & {*sys.path} else ["-P"])]
    for nth in range(len(args.topology)):
        command = [*python, "-m", "jlora.plan", f"--nth={nth}", "--json", *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        codes.append(done.returncode)
        if done.stdout.strip():
            found.append(json.loads(done.stdout))
            show([found[-1]], argparse.Namespace(**vars(args) | {"plot": None}))
    show(found, argparse.Namespace(**vars(args) | {"json": False, "quiet": True}))
    return max(codes)


if __name__ == "__main__":
    main()
