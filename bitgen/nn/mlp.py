"""Feed-forward blocks."""

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
    """A gated feed-forward block without biases (Shazeer 2020)."""

    hidden: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Returns down(silu(gate(x)) * up(x))."""

        def dense(features, name):
            init = nn.initializers.normal(0.02)
            return nn.Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        y = nn.silu(dense(self.hidden, "gate")(x)) * dense(self.hidden, "up")(x)
        return dense(x.shape[-1], "down")(y)


class GatedMLP(nn.Module):
    """A gated feed-forward block whose gate and input are one matrix, with biases by choice."""

    hidden: int
    features: int
    use_bias: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b features"]:
        """Returns out(silu(gate(x)) * up(x))."""
        options = {
            "use_bias": self.use_bias,
            "kernel_init": self.kernel_init,
            "dtype": self.dtype,
            "dot_general_cls": DotGeneral,
        }
        y = nn.DenseGeneral((2, self.hidden), name="gate_up", **options)(x)  # [..., 2, hidden]
        y = nn.silu(y[..., 0, :]) * y[..., 1, :]
        return nn.Dense(self.features, name="out", **options)(y)
