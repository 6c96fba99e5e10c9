"""FLOPs of a step, counted over its jaxpr; loops are taken as often as they run. Knows nothing of models or devices."""

import math
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
        if equation.primitive.name == "shard_map":  # each device's share of what is cut
            (body,) = subjaxprs(equation.params)
            pairs = zip([*equation.invars, *equation.outvars], [*body.invars, *body.outvars], strict=True)
            inner = [inner[0] * max((_size(whole) / _size(part) for whole, part in pairs), default=1)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def _size(variable: Any) -> int:
    return max(1, variable.aval.size)


def subjaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The jaxprs within an equation, by its parameters: bodies of loops, branches, calls, kernels."""
    kinds = core.ClosedJaxpr, core.Jaxpr
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: isinstance(leaf, kinds))
    return [x.jaxpr if isinstance(x, core.ClosedJaxpr) else x for x in leaves if isinstance(x, kinds)]
