"""What to change where a run does not fit: the cheapest change that, compiled, does.

In order of cost: smaller micro-batches, more recomputation, activations in the host's memory, another mesh over the
same devices, a quantised base, a shorter row, more devices.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jlora.config import Config
from jlora.hf.pretrained import model_shape
from jlora.planning.compiled import Plan
from jlora.planning.layouts import as_overrides, layouts, quantizations, smallest, with_settings
from jlora.planning.search import Compiler
from jlora.planning.topology import Target, larger
from jlora.training.layout import Layout, current

COMPILATIONS = 6  # at most, before more devices are tried; and then half as many again
MIN_LENGTH = 128  # what the attention kernels take is a multiple of it


@dataclass(frozen=True)
class Remedy:
    """A change of a run that fits: on which devices, the words of a command line, and the peak of a device then."""

    topology: str
    devices: int
    overrides: list[str]
    peak_bytes: int


def dominant(result: Plan) -> tuple[str, int]:
    """What takes most of a device, and its bytes."""
    parts = {
        "base weights": result.base_bytes,
        "adapter and optimizer": result.adapter_bytes + result.optimizer_bytes,
        "batch": result.batch_bytes,
        "temporaries (activations)": result.temporaries,
    }
    name = max(parts, key=lambda part: parts[part])
    return name, parts[name]


def find_remedy(cfg: Config, target: Target, result: Plan) -> Remedy | None:
    """The cheapest change that fits; None where a bounded search finds none.

    Args:
      result: what `jlora.planning.compiled.plan` says of the run as it is.
    """
    model = model_shape(cfg.model.path)
    compiler = Compiler(cfg, target, model)
    now = current(cfg, result.mesh, result.remat)
    compiler.results[now] = result
    limit = 1 + COMPILATIONS
    for layout in _cheaper_first(compiler, now):
        if len(compiler.results) < limit and layout not in compiler.results:
            if compiler.least(layout) <= target.capacity and compiler.compile(layout).fits:
                return _answer(compiler.results[layout], _difference(now, layout))
    best = smallest(min(compiler.results, key=lambda layout: compiler.results[layout].peak_bytes))
    shorter = _shorter_rows(compiler, now, best)
    if shorter is not None:
        return shorter
    for bigger in larger(target):
        compiler = Compiler(cfg, bigger, model)
        kept = list(layouts(model, cfg, len(bigger.devices), keep_batch=True))
        found = {smallest(x) for x in kept} or {
            smallest(x) for x in layouts(model, cfg, len(bigger.devices), keep_batch=False)
        }
        plausible = [x for x in found if x.quantization == now.quantization and compiler.least(x) <= bigger.capacity]
        for layout in sorted(plausible, key=compiler.guess)[: COMPILATIONS // 2]:
            if compiler.compile(layout).fits:
                return _answer(compiler.results[layout], layout.settings())
    return None


def _cheaper_first(compiler: Compiler, now: Layout) -> Iterator[Layout]:
    """Layouts over the same devices, cheapest change first."""
    kept = list(layouts(compiler.model, compiler.cfg, len(compiler.target.devices), keep_batch=True))
    offload = () if compiler.target.platform == "cpu" else ("offload",)
    for remat in dict.fromkeys((now.remat, "full", *offload)):
        # The largest micro-batch that may fit, and the smallest.
        rows = [x.rows for x in kept if x.place == now.place and x.remat == "full" and x.rows <= now.rows]
        possible = [r for r in sorted(rows, reverse=True) if _may_fit(compiler, replace(now, remat=remat, rows=r))]
        for chosen in dict.fromkeys(possible[:1] + possible[-1:]):
            yield replace(now, remat=remat, rows=chosen)
    for quantization in quantizations(compiler.cfg):
        others = {smallest(x) for x in kept if x.quantization == quantization}
        yield from sorted((x for x in others if x != now and _may_fit(compiler, x)), key=compiler.guess)


def _may_fit(compiler: Compiler, layout: Layout) -> bool:
    return compiler.least(layout) <= compiler.target.capacity


def _shorter_rows(compiler: Compiler, now: Layout, layout: Layout) -> Remedy | None:
    """The longest half, quarter, ... of `data.max_length` that fits in a layout."""
    length, target = compiler.cfg.data.max_length, compiler.target
    held = compiler.held(layout)
    known = compiler.results.get(layout)
    temporaries = known.temporaries if known else 0
    tries = 0
    while length // 2 >= MIN_LENGTH and held <= target.capacity and tries < COMPILATIONS // 2:
        length = length // 2 // MIN_LENGTH * MIN_LENGTH
        if held + temporaries * length / compiler.cfg.data.max_length > target.capacity:
            continue
        tries += 1
        cfg = with_settings(compiler.cfg, {"data.max_length": length})
        result = Compiler(cfg, target, compiler.model).compile(layout)
        if result.fits:
            return _answer(result, _difference(now, layout) | {"data.max_length": length})
    return None


def _difference(before: Layout, after: Layout) -> dict[str, Any]:
    old = before.settings()
    return {key: value for key, value in after.settings().items() if old[key] != value}


def _answer(result: Plan, settings: dict[str, Any]) -> Remedy:
    return Remedy(result.topology, result.devices, as_overrides(settings), result.peak_bytes)


def sentence(result: Plan, remedy: Remedy | None) -> str:
    """Why a run does not fit, by how much, and the cheapest change that fits."""
    name, size = dominant(result)
    over = (result.peak_bytes - result.capacity_bytes) / 2**30
    says = (
        f"{result.topology}: does not fit by {over:.2f} GiB a device; {name} take {size / 2**30:.2f} of "
        f"{result.peak_bytes / 2**30:.2f} GiB"
    )
    if remedy is None:
        return f"{says}, and no change that was tried fits; take more devices, or ones with more memory"
    fits = f"fits with {remedy.peak_bytes / 2**30:.2f} GiB a device"
    if remedy.topology == result.topology:
        return f"{says}; set {' '.join(remedy.overrides)}, the cheapest change that {fits}"
    return (
        f"{says}, and no change on {result.devices} device{'s' * (result.devices > 1)} fits; "
        f"{remedy.topology} ({remedy.devices} devices) with {' '.join(remedy.overrides)} {fits}"
    )
