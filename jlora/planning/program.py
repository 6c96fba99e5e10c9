"""An optimised HLO module, read from its text: what one device does in one run, operation by operation.

FLOPs, bytes of memory and bytes sent of each, in the order of the schedule, and how often it runs. Knows how XLA writes
programs for CPUs, GPUs and TPUs; nothing of models, nor of how fast a device is.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# What moves nothing: names for a value, and the ends of what began before.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "reshape", "after-all", "partition-id"),
    *("replica-id", "opt-barrier", "iota", "add-dependency", "domain"),
}
SLICES = ("dynamic-slice", "slice", "gather")
# Within a fusion: read as often as what they give is.
VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{[^}]*?S\((\d)\)[^}]*\})?")
_BRANCHES = re.compile(r"\b(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+?),)")


class Shape(NamedTuple):
    """An array: bits of an element, its dims, and the memory that it lies in: the device's, or another by number."""

    kind: str
    bits: int
    dims: tuple[int, ...]
    space: str = ""

    @property
    def bytes(self) -> float:
        """What it takes."""
        return math.prod(self.dims) * self.bits / 8


def shapes(text: str) -> list[Shape]:
    """The arrays of a type as HLO writes it, a tuple's one after the other."""
    return [
        Shape(kind, int(bits or 8), tuple(int(dim) for dim in dims.split(",") if dim), space)
        for kind, bits, dims, space in _SHAPE.findall(text)
        if kind != "token"
    ]


def _bytes(found: list[Shape]) -> float:
    """In the device's memory: not in that of a TPU's core, nor in the host's."""
    return sum(shape.bytes for shape in found if not shape.space)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      type: of its result. arguments: between its brackets. attributes: behind them.
    """

    name: str
    opcode: str
    type: str
    arguments: str
    attributes: str
    is_root: bool

    @cached_property
    def result(self) -> list[Shape]:
        """The arrays that it gives."""
        return shapes(self.type)

    @cached_property
    def operands(self) -> list[str]:
        """Names of what it takes."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @cached_property
    def target(self) -> str:
        """Of a custom call, what is called; else nothing."""
        return self.word(r'custom_call_target="([^"]*)"')

    def word(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; nothing where they do not match."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    def numbers(self, pattern: str) -> list[int]:
        """Numbers in the first group of a pattern in the attributes, written `1,2` or `"1","2"`."""
        return [int(number) for number in re.findall(r"\d+", self.word(pattern))]

    @property
    def called(self) -> list[str]:
        """Computations that run within it, once each time."""
        return re.findall(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)", self.attributes)


Computation = dict[str, Instruction]


class Operation(NamedTuple):
    """What an instruction does each time, and how often it runs.

    Attributes:
      kind: "product", "coded_product" (of 8-bit numbers), "attention", "attention_backward", "collective", "host" (a
        copy to or from the host's memory), or "other".
      moved: bytes through the device's memory, read and written, or to or from the host's. sent: to other devices.
      cycles: the compiler's own estimate, of TPUs.
      starts: it goes on beside what follows, until an operation that `waits` for its name.
      channels: of the collectives in it, by which they are told from their repetitions.
    """

    name: str
    kind: str
    times: int
    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    cycles: float | None = None
    starts: bool = False
    waits: str | None = None
    channels: frozenset[str] = frozenset()


class Program:
    """An optimised HLO module."""

    def __init__(self, hlo: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in hlo.splitlines():
            if opened := _COMPUTATION.match(line):
                current = self.computations.setdefault(opened[2], {})
                self.entry = opened[2] if opened[1] else self.entry
            elif line.startswith("}") and not line.startswith("}}"):  # which ends what a kernel says of itself
                current = None
            elif current is not None and (found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))):
                root, name, type_, opcode, rest = found.groups()
                end = _closing(rest)
                current[name] = Instruction(name, opcode, type_, rest[:end], rest[end:], bool(root))

    def operations(self) -> list[Operation]:
        """What a run does, in order; a loop's body once, with the number of its turns.

        Of the branches of a condition the busiest counts, and of a collective that is written down several times the
        first: TPUs repeat it in each fusion that it runs beside.
        """
        found, seen = [], set[str]()
        for operation in self._run(self.entry, 1):
            found.append(operation._replace(sent=0.0) if operation.channels & seen else operation)
            seen |= operation.channels
        return found

    def _run(self, name: str, times: int) -> Iterator[Operation]:
        for instruction in self.computations.get(name, {}).values():
            match instruction.opcode:
                case "while":
                    for body in instruction.called:
                        yield from self._run(body, times * self._trips(instruction))
                case "conditional":
                    names = re.split(r"[,\s]+", ",".join(map(",".join, _BRANCHES.findall(instruction.attributes))))
                    branches = [list(self._run(each.lstrip("%"), times)) for each in names if each]
                    yield from max(branches, key=_work, default=[])
                case "call" | "async-start":
                    for body in instruction.called:
                        yield from self._run(body, times)
                case opcode if opcode not in FREE:
                    yield self._operation(self.computations[name], instruction, times)

    def _operation(self, within: Computation, instruction: Instruction, times: int) -> Operation:
        opcode, waits = instruction.opcode, None
        if opcode.endswith(("-done", "-update")):
            waits = instruction.operands[0] if instruction.operands else None
            return Operation(instruction.name, "other", times, waits=waits)
        kind, flops = self._arithmetic(within, instruction)
        inner = list(self._collectives(instruction))
        cycles = instruction.word(r'"estimated_cycles": ?"([1-9]\d*)')
        return Operation(
            instruction.name,
            "collective" if opcode.removesuffix("-start") in COLLECTIVES else kind,
            times,
            flops,
            self._moved(within, instruction),
            sum(sent for sent, _ in inner),
            float(cycles) if cycles else None,
            opcode.endswith("-start"),
            None,
            frozenset(channel for _, channel in inner if channel),
        )

    def _inner(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """The instructions of a fusion, and of fusions in it."""
        for name in instruction.called:
            body = self.computations.get(name, {})
            for each in body.values():
                yield body, each
                if each.opcode == "fusion":
                    yield from self._inner(each)

    def _collectives(self, instruction: Instruction) -> Iterator[tuple[float, str]]:
        """(bytes that a device sends, channel) of a collective, or of those in a fusion."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            channel = instruction.word(r"\bchannel_id=(\d+)")
            # Those of a shard_map have one channel, so what they come from counts, too.
            source = instruction.word(r'\bop_name="([^"]*)"') + instruction.word(r"\bstack_frame_id=(\d+)")
            yield _sent(kind, instruction), channel and f"{channel} {source}"
        elif kind == "fusion":
            # TPUs write a reduce-scatter as an all-reduce inside a fusion of this name.
            part = 0.5 if any(name.startswith("all-reduce-scatter") for name in instruction.called) else 1.0
            for name in instruction.called:
                for each in self.computations.get(name, {}).values():
                    yield from ((part * sent, channel) for sent, channel in self._collectives(each))

    def _arithmetic(self, within: Computation, instruction: Instruction) -> tuple[str, float]:
        """What kind of work an instruction is, and the FLOPs of the products in it."""
        kind, flops = "other", 0.0
        for body, each in ((within, instruction), *self._inner(instruction)):
            if each.opcode == "dot" or "cublas" in each.target:
                coded = body[each.operands[0]].result[0].bits == 8
                kind, flops = "coded_product" if coded else "product", flops + _product_flops(body, each)
            elif "fmha" in each.target:
                kind = "attention_backward" if "Backward" in each.target else "attention"
                flops += _cudnn_flops(body, each)
            elif each.name.startswith("splash_"):
                kind = "attention" if "_fwd" in each.name else "attention_backward"
                flops += _splash_flops(body, each)
        return "host" if _is_host_copy(instruction) else kind, flops

    def _moved(self, within: Computation, instruction: Instruction) -> float:
        """Bytes read and written: of what is sliced the slice alone, of what is updated in place the update."""
        result, opcode = instruction.result, instruction.opcode
        taken = [within[name] for name in instruction.operands if name in within]
        if instruction.target:  # a library's workspace is no result
            result = [shape for shape in result if shape.bits > 8 or len(shape.dims) > 1] or result
        if _is_host_copy(instruction):  # a slice of what stays there
            return min(each.bytes for each in result if each.dims)
        if opcode in SLICES:
            return 2 * _bytes(result)
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * _bytes(taken[-1 if opcode == "scatter" else 1].result)
        if opcode in ("copy-start", "slice-start"):
            return min(each.bytes for each in result[:2]) * sum(not each.space for each in result[:2])
        if opcode not in ("fusion", "fusion-start"):
            return _bytes(result) + sum(_bytes(each.result) for each in taken if each.opcode != "constant")
        (name,) = instruction.called
        return _fusion_moved(self.computations[name])

    def _trips(self, instruction: Instruction) -> int:
        """Turns of a loop: as its backend configuration says, or up to the constant in its condition."""
        if said := instruction.word(r'"known_trip_count": ?\{"n": ?"(\d+)"'):
            return int(said)
        condition = self.computations.get(instruction.word(r"\bcondition=%?([\w.\-]+)"), {})
        bounds = [x.arguments for x in condition.values() if x.opcode == "constant" and x.type.startswith("s32[]")]
        return int(bounds[0]) if bounds and bounds[0].isdigit() else 1


def sent_bytes(operations: list[Operation]) -> float:
    """Bytes that one device sends in a run."""
    return sum(operation.times * operation.sent for operation in operations)


def _work(operations: list[Operation]) -> tuple[float, float, float]:
    flops = sum(each.times * each.flops for each in operations)
    cycles = sum(each.times * (each.cycles or 0.0) for each in operations)
    return flops, cycles, sum(each.times * (each.moved + each.sent) for each in operations)


def _is_host_copy(instruction: Instruction) -> bool:
    """Whether it copies to or from the host's memory, which XLA numbers 5."""
    return instruction.opcode in ("copy", "copy-start", "fusion-start") and "S(5)" in instruction.type


def _closing(text: str) -> int:
    """Where the bracket ends that was opened before the text."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _fusion_moved(body: Computation) -> float:
    users = defaultdict(list)
    for each in body.values():
        for name in each.operands:
            users[name].append(each)

    def read(value: Instruction) -> float:
        total = 0.0
        for user in users[value.name]:
            first = user.operands[0] == value.name
            if user.opcode in SLICES and first:
                total += _bytes(user.result)
            elif user.opcode in VIEWS:
                total += read(user) * _bytes(value.result) / max(_bytes(user.result), 1)
            elif not (user.opcode == "dynamic-update-slice" and first):
                return _bytes(value.result)
        return min(total, _bytes(value.result))

    def written(value: Instruction) -> float:
        if value.opcode == "tuple":
            return sum(written(body[name]) for name in value.operands if name in body)
        inner = value
        while inner.opcode in VIEWS and inner.operands and inner.operands[0] in body:
            inner = body[inner.operands[0]]
        updated = inner.opcode == "dynamic-update-slice"
        return _bytes(body[inner.operands[1]].result) if updated else _bytes(value.result)

    return sum(read(x) for x in body.values() if x.opcode == "parameter") + sum(
        written(x) for x in body.values() if x.is_root
    )


def _product_flops(within: Computation, product: Instruction) -> float:
    """Of a dot, or of a call of cuBLAS, whose configuration has the same numbers."""
    summed = product.numbers(r"\blhs_contracting_dims=\{([\d,]*)\}")
    summed = summed or product.numbers(r'"lhs_contracting_dimensions": ?\[([^\]]*)\]')
    left = within[product.operands[0]].result[0]
    return 2.0 * math.prod(left.dims[dim] for dim in summed) * math.prod(product.result[0].dims)


def _cudnn_flops(within: Computation, call: Instruction) -> float:
    """Of cuDNN's attention: two products forward and five backward over what the mask lets it see."""
    *rows, queries, keys = call.numbers(r'"intermediate_tensor_shape": ?\{[^{}]*"dimensions": ?\[([^\]]*)\]')
    head_dim = within[call.operands[0]].result[0].dims[-1]
    window = int(call.word(r'"sliding_window_length": ?"?(\d+)') or 0)
    seen = keys / 2 if "CAUSAL" in call.attributes else keys
    if window:
        seen = min(seen, window)
    return (5 if "Backward" in call.target else 2) * 2.0 * math.prod(rows) * queries * seen * head_dim


def _splash_flops(within: Computation, call: Instruction) -> float:
    """Of splash attention, TPUs' kernel: each of its three calls makes the scores again; causal."""
    products = 2 if "_fwd" in call.name else 4 if "_dkv" in call.name else 3
    taken = [shape for name in call.operands if name in within for shape in within[name].result]
    queries, keys, *_ = (shape.dims for shape in taken if len(shape.dims) > 2 and shape.bits > 8)
    return products * 2.0 * math.prod(queries) * keys[-2] / 2


def _sent(kind: str, collective: Instruction) -> float:
    """Bytes that one device sends.

    A ring over the n devices of a group moves (n-1)/n of the whole for an all-gather, reduce-scatter or all-to-all
    and twice that for an all-reduce.
    """
    n, started = _group_size(collective), collective.opcode != kind
    size = sum(shape.bytes for shape in collective.result)
    if kind == "collective-permute":
        return size / 2 if started else size
    if kind == "reduce-scatter":  # the result is a device's share; a start carries its operand too
        return size * (n - 1) / ((n + 1) if started else 1)
    if kind == "all-gather" and started:
        size = size * n / (n + 1)
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group_size(collective: Instruction) -> int:
    """Devices of a group, in any of the three notations: listed, rows of an iota, axes of a mesh."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", collective.attributes)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    if listed := collective.word(r"replica_groups=\{\{([\d,]+)\}"):
        return listed.count(",") + 1
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", collective.attributes)
    return int(iota[2]) if iota else 1
