"""What `jlora plan` answers for one target: a plan or a search, with time and cost."""

import argparse
from dataclasses import asdict
from typing import Any

from jlora.config import Config
from jlora.planning.compiled import plan
from jlora.planning.cost import time_and_cost
from jlora.planning.search import search
from jlora.planning.suggest import find_remedy, sentence
from jlora.planning.topology import Target, compiler_logs_off


def planned(cfg: Config, target: Target, args: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """The JSON of the config as it is, with time and cost; and why it does not fit, with a remedy."""
    with compiler_logs_off():
        found = plan(cfg, target)
        remedy = None if found.fits else find_remedy(cfg, target, found)
    tree = found.as_json() | time_and_cost(found, cfg, target, args)
    return tree | {"remedy": remedy and asdict(remedy)}, None if found.fits else sentence(found, remedy)


def searched(cfg: Config, target: Target, args: argparse.Namespace) -> tuple[dict[str, Any], str | None]:
    """The JSON of a search, its best with time and cost; and why nothing fits."""
    with compiler_logs_off():
        found = search(cfg, target, args.compilations)
    tree, best = found.as_json(), found.best
    tree["best"] |= time_and_cost(best, cfg, target, args)
    if found.fits:
        return tree, None
    over = (best.peak_bytes - best.capacity_bytes) / 2**30
    return tree, (
        f"{best.topology}: nothing fits; the smallest of the layouts compiled ({' '.join(found.overrides)}) needs "
        f"{best.peak_bytes / 2**30:.2f} GiB a device, {over:.2f} too much; take more devices or a shorter "
        "data.max_length"
    )
