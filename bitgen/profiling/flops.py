"""Floating-point operations and bytes of a traced program."""

import math
from collections.abc import Callable
from typing import Any

from jax.extend import core

_FUSED_ATTENTION = "dot_product_attention"  # cuDNN's, in jax's words


def count_flops(jaxpr: Any) -> int:
    """Returns the operations of all matrix products and convolutions of a jaxpr.

    Fused attention counts as two products, its gradient as four. Loops count as often as they run,
    unlike in the compiler's own count; a loop of unknown length counts once, and of a condition the
    larger branch. What `shard_map` maps counts on every device.
    """
    return _count(jaxpr, _flops_of_equation)


def count_bytes(jaxpr: Any) -> int:
    """Returns the bytes that matrix products and convolutions read and write, counted alike.

    Elementwise work is assumed to be fused into them.
    """
    return _count(jaxpr, _bytes_of_equation)


def _count(jaxpr: Any, of_equation: Callable[[Any], int]) -> int:
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated") or name.startswith(_FUSED_ATTENTION):
            total += of_equation(equation)
        elif name == "cond":
            total += max(_count(branch, of_equation) for branch in params["branches"])
        else:
            times = params["mesh"].size if name == "shard_map" else params.get("length", 1)
            inner = [value for value in params.values() if _is_jaxpr(value)]
            total += times * sum(_count(value, of_equation) for value in inner)
    return total


def _bytes_of_equation(equation: Any) -> int:
    avals = [var.aval for var in (*equation.invars, *equation.outvars)]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)


def _flops_of_equation(equation: Any) -> int:
    params = equation.params
    if equation.primitive.name.startswith(_FUSED_ATTENTION):
        b, n, heads, c = equation.invars[0].aval.shape
        products = 4 if "_bwd" in equation.primitive.name else 2
        return 2 * products * b * heads * n * equation.invars[1].aval.shape[1] * c
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    kernel = equation.invars[1].aval.shape
    features = kernel[params["dimension_numbers"].rhs_spec[0]]
    positions = math.prod(equation.outvars[0].aval.shape) // features
    # Gradients have a dilated input, whose zeros cost nothing.
    zeros = math.prod(params["lhs_dilation"])
    return 2 * positions * math.prod(kernel) // zeros


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)
