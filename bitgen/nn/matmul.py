"""Kernels prepared for a sampler's loops: cast once and, on CPU, transposed once.

XLA's CPU backend packs the right operand of every product, which takes longer than the product
itself while the rows are few. With the transposed kernel as the left operand it packs the rows
instead: 1.3 times as fast at 128 rows, 1.5 times at 2 (768x2304 kernels, two cores).
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

FEATURES_FIRST = "features_first"
_ROWS = 160  # with more rows, transposing the output costs more than it saves


def cast_kernels(params: Mapping[str, Any], dtype: Any) -> Any:
    """Returns parameters with kernels, and the biases beside them, in `dtype`.

    A layer casts its kernel at every call: before a loop of calls this does it once.
    """
    if "kernel" in params:
        return jax.tree.map(lambda x: x.astype(dtype), params)
    return {
        name: cast_kernels(value, dtype) if isinstance(value, Mapping) else value
        for name, value in params.items()
    }


class DotGeneral(nn.Module):
    """The matrix product of `nn.Dense(dot_general_cls=DotGeneral)`.

    A call in which the collection `features_first` is mutable stores transposed kernels there; a
    call that is given the collection uses them where rows are few.
    """

    @nn.compact
    def __call__(self, x: Any, kernel: Any, dimensions: Any, **options: Any) -> Any:
        """Returns `jax.lax.dot_general` of the arguments; the last axes of x are contracted."""
        inputs = len(dimensions[0][0])
        rows, features = x.shape[: x.ndim - inputs], kernel.shape[inputs:]
        flat = math.prod(kernel.shape[:inputs])
        if self.is_mutable_collection(FEATURES_FIRST) and not self.is_initializing():
            # Without the barrier the compiler undoes the transposition where the kernel is read.
            stored = jax.lax.optimization_barrier(kernel.reshape(flat, -1).T)
            self.put_variable(FEATURES_FIRST, "kernel", stored)
        elif self.has_variable(FEATURES_FIRST, "kernel") and math.prod(rows) <= _ROWS:
            stored = self.get_variable(FEATURES_FIRST, "kernel")
            dims = (((1,), (len(rows),)), ((), ()))
            y = jax.lax.dot_general(stored, x.reshape(*rows, flat), dims, **options)
            y = jnp.moveaxis(jax.lax.optimization_barrier(y), 0, -1)
            return y.reshape(*rows, *features)
        return jax.lax.dot_general(x, kernel, dimensions, **options)
