"""Gated feed-forward blocks."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.nn.matmul import DotGeneral
from bitgen.nn.norms import Dtype


def swiglu_width(width: int, multiple: int) -> int:
    """Returns Llama's hidden size: two thirds of four widths, rounded up to a multiple."""
    hidden = int(2 * 4 * width / 3)
    return -(-hidden // multiple) * multiple


class SwiGLU(nn.Module):
    """The gated feed-forward block of Llama (Shazeer 2020).

    `fused` computes the gate and the projection that it gates by one matrix, `gate_up`.
    """

    hidden: int
    features: int
    fused: bool = False
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b features"]:
        """Returns down(silu(gate(x)) * up(x))."""
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            dot_general_cls=DotGeneral,
        )
        if not self.fused:
            y = nn.silu(dense(self.hidden, name="gate")(x)) * dense(self.hidden, name="up")(x)
            return dense(self.features, name="down")(y)
        y = dense((2, self.hidden), name="gate_up")(x)  # [..., 2, hidden]
        y = nn.silu(y[..., 0, :]) * y[..., 1, :]
        return dense(self.features, name="out")(y)
