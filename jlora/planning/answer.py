"""What `python -m jlora.plan` answers for one target: a plan or a search, with time and cost."""

import argparse
from typing import Any

from jlora.config import Config
from jlora.planning.compiled import plan
from jlora.planning.cost import add_time, count_data
from jlora.planning.search import search
from jlora.planning.suggest import find_remedy
from jlora.planning.topology import Target, compiler_logs_off


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
