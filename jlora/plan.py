"""`python -m jlora.plan`: what a run takes on hardware that is not there, before anything is rented.

Prints and draws what `jlora.planning` finds, with its price; `--search` looks for a faster layout.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jlora import cli
from jlora.config import Config, load_config
from jlora.errors import ConfigError, MemoryExceeded
from jlora.planning.compiled import plan
from jlora.planning.cost import add_time, count_data
from jlora.planning.search import search
from jlora.planning.suggest import find_remedy, sentence
from jlora.planning.topology import KNOWN, Target, compiler_logs_off, prepare
from jlora.planning.topology import resolve as resolve_topology
from jlora.reports.memory import draw, require_matplotlib

UTILIZATIONS = (0.2, 0.3, 0.4, 0.5)
COMPILATIONS = 16


def print_plan(result: dict[str, Any]) -> None:
    """Tables for people: memory, then time and cost."""
    console = Console(highlight=False)
    word = "fits" if result["fits"] else "DOES NOT FIT"
    table = Table(title=f"{result['topology']}: {word}", title_justify="left")
    table.add_column("GiB per device")
    table.add_column("", justify="right")
    for name in ("base", "adapter", "optimizer", "batch", "argument", "temp", "peak", "capacity", "offloaded"):
        if name == "offloaded" and not result["offloaded_bytes"]:
            continue
        table.add_row(name, _gib(result[f"{name}_bytes"]))
    console.print(table)
    naive_gb = {name: value / 1e9 for name, value in result["naive"].items()}
    console.print(
        f"full fine-tuning would take {naive_gb['total_min']:,.0f}-{naive_gb['total']:,.0f} GB over all devices: "
        f"weights {naive_gb['weights']:,.0f}, gradients {naive_gb['gradients']:,.0f}, optimizer "
        f"{naive_gb['optimizer_min']:,.0f}-{naive_gb['optimizer']:,.0f}"
    )
    console.print(
        f"{result['trainable_params']:,} trained of {result['frozen_params'] + result['trainable_params']:,} "
        f"parameters; {result['flops_per_step']:.3g} FLOPs and {result['tokens_per_step']:,} tokens a step; "
        f"attention {result['attention']}; remat {result['remat']}; compiled in {result['compile_seconds']:.0f} s"
    )
    if result["seconds_per_epoch_at"]:
        console.print(time_table(result))


def time_table(result: dict[str, Any]) -> Table:
    """Hours and dollars of an epoch, by how rows are batched and at which speed."""
    cost, counts = result["cost_usd_at"], result["data"]
    rows = f" of {counts['rows']:,} rows and {counts['tokens']:,} tokens" if counts else ""
    table = Table(title=f"an epoch{rows} on {result['topology']}", title_justify="left")
    table.add_column("batches")
    table.add_column("tokens with padding", justify="right")
    table.add_column("speed")
    table.add_column("hours", justify="right")
    if cost:
        table.add_column("US dollars", justify="right")
    for name, times in result["seconds_per_epoch_at"].items():
        for at, seconds in times.items():
            tokens = f"{result['epoch_tokens'][name]:,.0f}"
            how = at if "tokens" in at else f"{float(at):.0%} of the peak"
            table.add_row(name, tokens, how, f"{seconds / 3600:,.2f}", *([f"{cost[name][at]:,.2f}"] if cost else []))
    return table


def print_search(found: dict[str, Any]) -> None:
    """A table of what was compiled, and the overrides of the fastest that fits."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=f"{found['topology']}: {len(found['tried'])} of {found['layouts']} layouts compiled")
    for name in ("data", "fsdp", "tensor", "remat", "batch", "accum."):
        table.add_column(name, justify="left" if name == "remat" else "right")
    for name in ("quantization", "peak GiB", "tokens/s per device"):
        table.add_column(name, justify="right")
    for tried in sorted(found["tried"], key=lambda tried: (not tried["fits"], -_speed(tried), tried["peak_bytes"])):
        values = [override.partition("=")[2] for override in tried["overrides"]]
        speed = "too large" if not tried["fits"] else f"{_speed(tried):,.0f}" if tried["estimate"] else "-"
        best = tried["fits"] and tried["overrides"] == found["overrides"]
        table.add_row(*values, _gib(tried["peak_bytes"]), speed, style="bold" if best else None)
    console.print(table)
    if not found["fits"]:
        return
    console.print(
        "Tokens per second are an estimate, for ranking: FLOPs counted from the step, weights and temporaries "
        "through memory, and the collectives of the compiled program, each at its published peak, nothing overlapped."
        if found["best"]["estimate"]
        else "No peak is published for this hardware: fewest FLOPs and fewest bytes sent count as fastest."
    )
    if not found["batch_size_kept"]:
        console.print("No layout fits with training.batch_size as configured, so the fastest changes it.")
    console.print(f"fastest that fits: {' '.join(found['overrides'])}")


def _speed(tried: dict[str, Any]) -> float:
    return tried["estimate"]["tokens_per_second_per_device"] if tried["estimate"] else 0.0


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:,.2f}"


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(prog="python -m jlora.plan", description="Compile a run for hardware that is not there.")
    parser.add_argument("--config", help="YAML file of the run")
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
    parser.add_argument("--plot", metavar="FILE.png", help="memory bars of all topologies; needs jlora[plot]")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a dotted config key")
    parser.add_argument("-q", "--quiet", action="store_true", help="no table; the exit code alone")
    parser.add_argument("--json", action="store_true", help="one JSON object a topology")
    parser.add_argument("--nth", type=int, help=argparse.SUPPRESS)  # of the topologies: the one of this child
    return parser


def main() -> None:
    """Command line."""
    args = make_parser().parse_intermixed_args()

    def body() -> int:
        if "list" in args.topology:
            print(KNOWN)
            return 0
        if args.config is None or not args.topology:
            raise ConfigError("--config and --topology are needed (--topology list names the topologies)")
        if args.compilations < 1:
            raise ConfigError(f"--compilations must be at least 1, not {args.compilations}")
        if args.plot:
            require_matplotlib()
        cfg = load_config(args.config, args.overrides)
        if args.nth is not None:
            args.topology, args.plot = [args.topology[args.nth]], None
        elif len(args.topology) > 1:
            return each_in_its_own_process(args)
        prepare()
        with compiler_logs_off():
            target = resolve_topology(args.topology[0])
        found = searched(cfg, target, args) if args.search else planned(cfg, target, args)
        show([found], args)
        if not found["fits"]:
            raise MemoryExceeded(nothing_fits(found) if args.search else sentence(found, found["remedy"]))
        return 0

    cli.run(body)


def planned(cfg: Config, target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """The plan of the config as it is, with time and cost, and a remedy where it does not fit."""
    with compiler_logs_off():
        result = plan(cfg, target)
        remedy = None if result["fits"] else find_remedy(cfg, target, result)
    priced(result, cfg, target, args)
    return result | {"remedy": remedy}


def searched(cfg: Config, target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """The result of a search, its best with time and cost."""
    with compiler_logs_off():
        found = search(cfg, target, args.compilations)
    priced(found["best"], cfg, target, args)
    return found


def priced(result: dict[str, Any], cfg: Config, target: Target, args: argparse.Namespace) -> None:
    """Adds time and cost as the command line asks for them."""
    add_time(
        result,
        target,
        None if args.tokens else count_data(cfg),
        tokens=args.tokens,
        tokens_per_second=args.tokens_per_second,
        utilization=args.utilization,
        price=args.price,
    )


def nothing_fits(found: dict[str, Any]) -> str:
    """Why a search ended without a layout that fits."""
    best = found["best"]
    over = (best["peak_bytes"] - best["capacity_bytes"]) / 2**30
    return (
        f"{found['topology']}: nothing fits; the smallest of the layouts compiled ({' '.join(found['overrides'])}) "
        f"needs {best['peak_bytes'] / 2**30:.2f} GiB a device, {over:.2f} too much; take more devices or a shorter "
        "data.max_length"
    )


def show(found: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print as the command line asks for, and draw."""
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
