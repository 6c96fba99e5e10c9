"""`plan --search`: compile layouts of a run, the promising ones first, until the fastest that fits is known.

Memory grows with the rows of a micro-batch and with what is not rematerialised, so one answer of the compiler
rules out many layouts; the others are left out where even their arithmetic takes longer than the best found.
"""

from dataclasses import dataclass
from typing import Any

import jax

from jlora.config import Config
from jlora.hf.pretrained import model_shape
from jlora.model.config import ModelConfig
from jlora.model.sharding import make_mesh
from jlora.planning.compiled import Plan, held_bytes, plan, step_flops
from jlora.planning.layouts import HEAVIER, as_overrides, guess_seconds, layouts, smallest, with_settings
from jlora.planning.topology import Target
from jlora.training.layout import Layout, saved_bytes
from jlora.training.step import make_forward

ENOUGH = 4  # layouts that fit, met in the guessed order, after which the guessed order is trusted for the rest


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
            one = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "model.remat": remat}
            cfg = with_settings(self.cfg, one)
            mesh = make_mesh(cfg.mesh, self.target.devices[:1])
            with jax.set_mesh(mesh):
                self._flops[remat] = step_flops(cfg, self.model, mesh, make_forward(cfg, self.model, mesh)[1])
        return self._flops[remat]

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
    """The fastest layout that fits, by `jlora.planning.roofline`.

    The batch of an optimizer step stays as configured, so a run's result does; only where no such layout fits
    are meshes tried that need another batch.

    Args:
      limit: compilations at most.
    """
    compiler = Compiler(cfg, target, model_shape(cfg.model.path))
    everything: list[Layout] = []
    for keep_batch in (True, False):
        found = list(layouts(compiler.model, cfg, len(target.devices), keep_batch=keep_batch))
        everything += found
        _walk(compiler, found, limit)
        if any(result.fits for result in compiler.results.values()):
            break
    fitting = [layout for layout, result in compiler.results.items() if result.fits]
    if fitting:
        chosen = min(fitting, key=compiler.speed)
    else:
        if not compiler.results:  # the arguments alone are too much everywhere
            everything = [
                x for keep in (True, False) for x in layouts(compiler.model, cfg, len(target.devices), keep_batch=keep)
            ]
            compiler.compile(min({smallest(x) for x in everything}, key=compiler.held))
        chosen = min(compiler.results, key=lambda layout: compiler.results[layout].peak_bytes)
    kept = chosen.batch_size == cfg.training.batch_size
    return Found(chosen, bool(fitting), kept, len(everything), compiler.results)


def _walk(compiler: Compiler, queue: list[Layout], limit: int) -> None:
    """Compile from the most promising on, until enough fit, nothing better can be left, or the limit is reached."""
    capacity = compiler.target.capacity
    queue, in_order = sorted(queue, key=compiler.guess), 0
    while queue and len(compiler.results) < limit:
        layout, *queue = queue
        if compiler.least(layout) > capacity:
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
