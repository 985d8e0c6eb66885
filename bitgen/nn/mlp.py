"""Feed-forward blocks."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

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
