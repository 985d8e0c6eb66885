"""Floating-point operations of a traced program, counted where the time goes."""

import math
from typing import Any

from jax.extend import core


def count_flops(jaxpr: Any) -> int:
    """Returns the operations of all matrix products and convolutions of a jaxpr.

    A loop counts as often as it runs, which the compiler's own count does not; the larger branch
    of a condition counts, and a loop of unknown length counts once.
    """
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2 * depth * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        positions = math.prod(equation.outvars[0].aval.shape) // features
        # A gradient is written with a dilated input, whose added zeros cost nothing.
        zeros = math.prod(params["lhs_dilation"])
        return 2 * positions * math.prod(kernel) // zeros
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    inner = [value for value in params.values() if _is_jaxpr(value)]
    return params.get("length", 1) * sum(count_flops(value) for value in inner)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)
