"""The least that a program takes of a chip: its matrix products, and each of its arrays once."""

import math
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr


def least_flops(traced: Any) -> int:
    """FLOPs of the matrix products of a traced program that anything reads, over all devices."""
    jaxpr = traced.jaxpr.jaxpr
    read, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return product_flops(read)


def product_flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products of a traced program, over all devices.

    Loops of known length count as often as they run, of branches the largest, a loop whose length
    is found as it runs once; decompositions and element-wise work are left out.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        elif name == "cond":
            total += max(product_flops(branch.jaxpr) for branch in params["branches"])
        elif name == "scan":
            total += params["length"] * product_flops(params["jaxpr"].jaxpr)
        elif name == "shard_map":
            total += params["mesh"].size * product_flops(_plain(params["jaxpr"]))
        else:
            inner = (leaf for leaf in jax.tree.leaves(list(params.values())) if _is_jaxpr(leaf))
            total += sum(product_flops(_plain(leaf)) for leaf in inner)
    return total


def _is_jaxpr(leaf: Any) -> bool:
    return hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")


def _plain(leaf: Any) -> Any:
    return leaf if hasattr(leaf, "eqns") else leaf.jaxpr
