"""What a step computes and sends: FLOPs of a jaxpr, and bytes of the collectives in a compiled program's text.

Both take loops as often as they run. Knows nothing of models or devices.
"""

import math
import re
from typing import Any

import jax
from jax.extend import core


def count_flops(jaxpr: core.Jaxpr) -> float:
    """Multiplications and additions of every matrix product, loops taken as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            out: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(left.shape[dim] for dim in contracted) * out.size
            continue
        inner = [count_flops(sub) for sub in subjaxprs(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def subjaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs within an equation, by its parameters: bodies of loops, branches, calls, kernels."""
    kinds = core.ClosedJaxpr, core.Jaxpr
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: isinstance(leaf, kinds))
    return [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in leaves if isinstance(x, kinds)]


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OP = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+?),)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")


def collective_bytes(hlo: str) -> float:
    """Bytes that one device sends in one run of an optimised HLO module.

    A ring over the n devices of a group moves (n-1)/n of the whole for an all-gather, reduce-scatter or
    all-to-all and twice that for an all-reduce. A loop counts as often as the compiler says that it runs, or as
    its counter is compared with; of the branches of a condition the busiest counts.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            current = bodies.setdefault(opened[1], [])
            entry = opened[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    known: dict[str, float] = {}
    channels: set[str] = set()

    def sent_by(name: str) -> float:
        if name not in known:
            known[name] = 0.0
            total = sum(sent(line) for line in bodies.get(name, ()))
            # TPUs write a reduce-scatter as an all-reduce inside a fusion of this name.
            known[name] = total / 2 if name.startswith("all-reduce-scatter") else total
        return known[name]

    def sent(line: str) -> float:
        op = _OP.match(line)
        if op is None or op[2].endswith(("-done", "-update")):
            return 0.0
        kind = op[2].removesuffix("-start")
        if kind in COLLECTIVES:
            channel = _CHANNEL.search(line)
            if channel and channel[1] in channels:  # TPUs repeat a collective in each fusion that it runs beside
                return 0.0
            channels.update(channel.groups() if channel else ())
            return _sent_by_one(kind, op[2] != kind, op[1], line)
        if kind == "conditional":
            names = re.split(r"[,\s]+", ",".join(",".join(found) for found in _BRANCHES.findall(line)))
            return max((sent_by(name.lstrip("%")) for name in names if name), default=0.0)
        times = _trips(line, bodies) if kind == "while" else 1
        return sum(sent_by(name) for name in _CALLED.findall(line)) * times

    return sent_by(entry)


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as its backend configuration says, or up to the constant in its condition."""
    said = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if said:
        return int(said[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    body = "\n".join(bodies.get(condition[1], ())) if condition else ""
    bound = re.search(r"= s32\[\]\S* constant\((\d+)\)", body)
    return int(bound[1]) if bound else 1


def _sent_by_one(kind: str, started: bool, result: str, line: str) -> float:
    size, n = 0.0, _group_size(line)
    for name, dims in _SHAPE.findall(result):
        bits = re.search(r"\d+", name)
        size += math.prod(int(dim) for dim in dims.split(",") if dim) * (int(bits[0]) if bits else 8) / 8
    if kind == "collective-permute":
        return size / 2 if started else size
    if kind == "reduce-scatter":  # the result is a device's share; a start carries its operand too
        return size * (n - 1) / ((n + 1) if started else 1)
    if kind == "all-gather" and started:
        size = size * n / (n + 1)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(line: str) -> int:
    """Devices of a group, in any of the three notations: listed, rows of an iota, axes of a mesh."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    return int(iota[2]) if iota else 1
