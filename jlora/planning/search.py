"""Compile layouts of a run: the fastest that fits (`plan --search`), or the cheapest change of a run that does not.

A search takes the promising ones first. Memory grows with the rows of a micro-batch and with what is not
rematerialised, so one answer of the compiler rules out many layouts; the others are left out where even their
arithmetic takes longer than the best found. A remedy is sought in order of cost: smaller micro-batches, more
recomputation, activations in the host's memory, another mesh over the same devices, a quantised base, a shorter row,
more devices.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from jlora.config import Config
from jlora.hf.planned import shape_of
from jlora.model.config import ModelConfig
from jlora.model.sharding import make_mesh
from jlora.planning.compiled import Plan, held_bytes, plan, step_flops
from jlora.planning.layouts import HEAVIER, as_overrides, guess_seconds, layouts, quantizations, smallest, with_settings
from jlora.planning.topology import Target, larger
from jlora.training.auto_remat import Layout, current, saved_bytes
from jlora.training.step import make_forward

ENOUGH = 4  # layouts that fit, met in the guessed order, after which the guessed order is trusted for the rest
COMPILATIONS = 6  # of a remedy, at most, before more devices are tried; and then half as many again
MIN_LENGTH = 128  # what the attention kernels take is a multiple of it


class Compiler:
    """Compiles layouts of one run on one target, and remembers what that says of the others.

    Attributes:
      results: layout -> what `jlora.planning.compiled.plan` says of it.
    """

    def __init__(self, cfg: Config, target: Target, model: ModelConfig):
        self.cfg, self.target, self.model = cfg, target, model
        self.results: dict[Layout, Plan] = {}
        self._held: dict[Any, int] = {}
        self._flops: dict[str, float] = {}

    def flops(self, remat: str) -> float:
        """FLOPs of a step with the config's own batch: the same on every mesh."""
        if remat not in self._flops:
            one = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.context": 1}
            cfg = with_settings(self.cfg, one | {"model.remat": remat})
            mesh = make_mesh(cfg.mesh, self.target.devices[:1])
            with jax.set_mesh(mesh):
                self._flops[remat] = step_flops(cfg, self.model, mesh, make_forward(cfg, self.model, mesh)[1])
        return self._flops[remat]

    def layouts(self, *, keep_batch: bool) -> list[Layout]:
        """See `jlora.planning.layouts.layouts`."""
        return list(layouts(self.model, self.cfg, len(self.target.devices), keep_batch=keep_batch))

    def guess(self, layout: Layout) -> tuple[float, float, float]:
        """See `guess_seconds`."""
        return guess_seconds(self.model, self.cfg, self.target, layout, self.flops(layout.remat))

    def compile(self, layout: Layout) -> Plan:
        """The plan of a layout; compiled once."""
        if layout not in self.results:
            flops = self.flops(layout.remat) * layout.batch_size / self.cfg.training.batch_size
            self.results[layout] = plan(with_settings(self.cfg, layout.settings()), self.target, self.model, flops)
        return self.results[layout]

    def held(self, layout: Layout) -> int:
        """Bytes of a device before any temporary."""
        if layout.place not in self._held:
            cfg = with_settings(self.cfg, smallest(layout).settings())
            self._held[layout.place] = held_bytes(cfg, self.target, self.model)
        return self._held[layout.place]

    def least(self, layout: Layout) -> float:
        """Bytes of a device that a layout needs at the least, from its arguments and from what was compiled.

        Of the arithmetic on what is saved only half counts: compilers recompute a little by themselves.
        """
        bounds = [saved_bytes(self.model, self.cfg, layout) / 2]
        for other, result in self.results.items():
            if other.place == layout.place and layout.remat in HEAVIER.get(other.remat, (other.remat,)):
                bounds.append(result.temporaries * min(1.0, layout.rows / other.rows))
        return self.held(layout) + max(bounds)

    def may_fit(self, layout: Layout) -> bool:
        """Whether nothing known says that a layout does not fit."""
        return self.least(layout) <= self.target.capacity

    def speed(self, layout: Layout) -> tuple[float, float, float]:
        """Like `guess`, from the compiled program."""
        result, tokens = self.results[layout], self.results[layout].tokens_per_step
        seconds = result.estimate["seconds_per_step"] if result.estimate else 0.0
        return seconds / tokens, result.flops_per_step / tokens, (result.sent_bytes_per_step or 0.0) / tokens


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      chosen: the fastest layout that fits, or the smallest where none does; of `tried`, which has what was compiled.
      batch_size_kept: whether it has the config's own batch.
      layouts: how many there are.
    """

    chosen: Layout
    fits: bool
    batch_size_kept: bool
    layouts: int
    tried: dict[Layout, Plan]

    @property
    def best(self) -> Plan:
        """The plan of the chosen layout."""
        return self.tried[self.chosen]

    @property
    def overrides(self) -> list[str]:
        """The chosen layout as words of a command line."""
        return as_overrides(self.chosen.settings())

    def as_json(self) -> dict[str, Any]:
        """The search as JSON values."""
        keys = ("fits", "peak_bytes", "capacity_bytes", "estimate", "sent_bytes_per_step", "compile_seconds")
        tried = [
            {"overrides": as_overrides(layout.settings())} | {key: getattr(each, key) for key in keys}
            for layout, each in self.tried.items()
        ]
        return {
            "topology": self.best.topology,
            "fits": self.fits,
            "best": self.best.as_json() | {"overrides": self.overrides},
            "overrides": self.overrides,
            "batch_size_kept": self.batch_size_kept,
            "layouts": self.layouts,
            "tried": tried,
        }


def search(cfg: Config, target: Target, limit: int) -> Found:
    """The fastest layout that fits, by `jlora.planning.layouts`.

    The batch of an optimizer step stays as configured, so a run's result does; only where no such layout fits
    are meshes tried that need another batch.

    Args:
      limit: compilations at most.
    """
    compiler = Compiler(cfg, target, shape_of(cfg))
    everything: list[Layout] = []
    for keep_batch in (True, False):
        found = compiler.layouts(keep_batch=keep_batch)
        everything += found
        _walk(compiler, found, limit)
        if any(result.fits for result in compiler.results.values()):
            break
    fitting = [layout for layout, result in compiler.results.items() if result.fits]
    if fitting:
        chosen = min(fitting, key=compiler.speed)
    else:
        if not compiler.results:  # the arguments alone are too much everywhere
            compiler.compile(min({smallest(x) for x in everything}, key=compiler.held))
        chosen = min(compiler.results, key=lambda layout: compiler.results[layout].peak_bytes)
    kept = chosen.batch_size == cfg.training.batch_size
    return Found(chosen, bool(fitting), kept, len(everything), compiler.results)


def _walk(compiler: Compiler, queue: list[Layout], limit: int) -> None:
    """Compile from the most promising on, until enough fit, nothing better can be left, or the limit is reached."""
    queue, in_order = sorted(queue, key=compiler.guess), 0
    while queue and len(compiler.results) < limit:
        layout, *queue = queue
        if not compiler.may_fit(layout):
            continue
        if in_order >= ENOUGH:
            return
        fitting = [other for other, result in compiler.results.items() if result.fits]
        if any(_is_slower(compiler, layout, other) for other in fitting):
            continue
        if compiler.compile(layout).fits:
            in_order += 1
            continue
        if layout == smallest(layout):
            continue
        if len(compiler.results) < limit and not compiler.compile(smallest(layout)).fits:
            queue = [other for other in queue if other.place != layout.place]


def _is_slower(compiler: Compiler, layout: Layout, other: Layout) -> bool:
    """Whether `layout` cannot beat `other`, which was compiled: more work in smaller parts, or too much work."""
    more_work = compiler.flops(layout.remat) >= compiler.flops(other.remat)
    if layout.place == other.place and layout.rows <= other.rows and more_work:
        return True
    known, peak = compiler.results[other].estimate, compiler.target.peak_flops
    if known is None or peak is None:
        return False
    row = compiler.flops(layout.remat) / compiler.cfg.training.batch_size
    return row / (len(compiler.target.devices) * peak) >= known["seconds_per_step"] / other.batch_size


@dataclass(frozen=True)
class Remedy:
    """A change of a run that fits: on which devices, the words of a command line, and the peak of a device then."""

    topology: str
    devices: int
    overrides: list[str]
    peak_bytes: int


def find_remedy(cfg: Config, target: Target, result: Plan) -> Remedy | None:
    """The cheapest change that fits; None where a bounded search finds none.

    Args:
      result: what `jlora.planning.compiled.plan` says of the run as it is.
    """
    model = shape_of(cfg)
    compiler = Compiler(cfg, target, model)
    now = current(cfg, result.mesh, result.remat)
    compiler.results[now] = result
    for layout in _cheaper_first(compiler, now):
        if len(compiler.results) <= COMPILATIONS and layout not in compiler.results:
            if compiler.may_fit(layout) and compiler.compile(layout).fits:
                return _answer(compiler.results[layout], _difference(now, layout))
    best = smallest(min(compiler.results, key=lambda layout: compiler.results[layout].peak_bytes))
    if (shorter := _shorter_rows(compiler, now, best)) is not None:
        return shorter
    for bigger in larger(target):
        compiler = Compiler(cfg, bigger, model)
        found = {smallest(x) for x in compiler.layouts(keep_batch=True) or compiler.layouts(keep_batch=False)}
        plausible = [x for x in found if x.quantization == now.quantization and compiler.may_fit(x)]
        for layout in sorted(plausible, key=compiler.guess)[: COMPILATIONS // 2]:
            if compiler.compile(layout).fits:
                return _answer(compiler.results[layout], layout.settings())
    return None


def _cheaper_first(compiler: Compiler, now: Layout) -> Iterator[Layout]:
    """Layouts over the same devices, cheapest change first."""
    kept = compiler.layouts(keep_batch=True)
    offload = () if compiler.target.platform == "cpu" else ("offload",)
    for remat in dict.fromkeys((now.remat, "full", *offload)):
        # The largest micro-batch that may fit, and the smallest.
        rows = [x.rows for x in kept if x.place == now.place and x.remat == "full" and x.rows <= now.rows]
        possible = [r for r in sorted(rows, reverse=True) if compiler.may_fit(replace(now, remat=remat, rows=r))]
        for chosen in dict.fromkeys(possible[:1] + possible[-1:]):
            yield replace(now, remat=remat, rows=chosen)
    row = compiler.results.get(smallest(now))
    for quantization in quantizations(compiler.cfg):
        others = [x for x in {smallest(x) for x in kept if x.quantization == quantization} if x != now]
        others = sorted((x for x in others if compiler.may_fit(x)), key=compiler.guess)
        if row is not None:
            # One row takes about so much on another mesh, by how it is split; those that would not hold it come last.
            takes = {x: row.temporaries * now.tensor * now.context / (x.tensor * x.context) for x in others}
            others.sort(key=lambda x: compiler.held(x) + takes[x] > compiler.target.capacity)
        yield from others


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
    parts = {
        "base weights": result.base_bytes,
        "adapter and optimizer": result.adapter_bytes + result.optimizer_bytes,
        "batch": result.batch_bytes,
        "temporaries (activations)": result.temporaries,
    }
    name, size = max(parts.items(), key=lambda part: part[1])
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
