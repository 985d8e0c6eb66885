"""Multi-head attention with rotary positions."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.nn.norms import Dtype
from bitgen.nn.rope import rotate

Implementation = Literal["xla", "cudnn"] | None


class SelfAttention(nn.Module):
    """Full attention over n tokens, no biases, queries and keys rotated by position.

    `implementation` is passed to `jax.nn.dot_product_attention`; None lets jax choose.
    """

    heads: int
    implementation: Implementation = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], rotations: Float[Array, "n c 2"]
    ) -> Float[Array, "b n d"]:
        """Returns what each token reads from all tokens."""
        width = x.shape[-1]
        init = nn.initializers.normal(0.02)
        options = {"use_bias": False, "kernel_init": init, "dtype": self.dtype}
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), name="qkv", **options)(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # [b, n, heads, head_dim]
        q, k = rotate(q, rotations), rotate(k, rotations)
        y = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        return nn.DenseGeneral(width, axis=(-2, -1), name="out", **options)(y)
