"""Normalisation layers that compute in float32 whatever the activations are."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Dtype = jnp.dtype | type


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (Zhang & Sennrich 2019, as in Llama)."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Returns x divided by its root mean square over d, times the scale, in x's dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (y * scale).astype(x.dtype)


def layer_norm(x: Float[Array, "*b d"], epsilon: float = 1e-6) -> Float[Array, "*b d"]:
    """Returns x with zero mean and unit variance over d, no learned parameters, in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype)


def group_norm(name: str | None, dtype: Dtype) -> nn.GroupNorm:
    """Returns the 32-group norm of the VQGAN family (epsilon 1e-6, statistics in float32)."""
    return nn.GroupNorm(32, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)
