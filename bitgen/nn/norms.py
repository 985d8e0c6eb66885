"""Normalisation layers that compute in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError

Dtype = jnp.dtype | type


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (Zhang & Sennrich 2019, as in Llama)."""

    epsilon: float = 1e-5
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        """Returns x divided by its root mean square over d, times the scale, in x's dtype."""
        shape = (1,) * (x.ndim - 1) + (-1,)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        y = y * scale.reshape(shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
            y = y + bias.reshape(shape)
        return y.astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation whose running statistics are parameters, as in a PyTorch file.

    Training normalises by the statistics of the global batch under `jit`, and sows the new running
    values at the paths of the parameters `mean` and `var` in the collection "moved"; the training
    step copies them into the parameters. As in PyTorch, `var` averages unbiased estimates.
    """

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], *, train: bool) -> Float[Array, "*b d"]:
        """Returns x normalised over all axes but the last, in x's dtype."""
        features = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        mean = self.param("mean", nn.initializers.zeros, features, jnp.float32)
        var = self.param("var", nn.initializers.ones, features, jnp.float32)
        y = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        if train:
            count = len(y)
            batch_mean = jnp.mean(y, axis=0)
            batch_var = jnp.mean(jnp.square(y - batch_mean[None]), axis=0)
            unbiased = batch_var * (count / max(count - 1, 1))
            self._move("mean", mean, batch_mean)
            self._move("var", var, unbiased)
            mean, var = batch_mean, batch_var
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        y = (y - mean[None]) * factor[None] + bias[None]
        return y.reshape(x.shape).astype(x.dtype)

    def _move(self, name: str, running: Array, batch: Array) -> None:
        if not self.is_initializing():
            moved = jax.lax.stop_gradient(running + self.momentum * (batch - running))
            self.sow("moved", name, moved, reduce_fn=lambda _, new: new, init_fn=lambda: running)


def layer_norm(x: Float[Array, "*b d"], epsilon: float = 1e-6) -> Float[Array, "*b d"]:
    """Returns x normalised to zero mean and unit variance over d, in x's dtype; no parameters."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + epsilon)
    return y.astype(x.dtype)


class GroupNorm(nn.GroupNorm):
    """Flax's group norm with a clear error where the groups do not divide the channels."""

    def __call__(self, x: Any, **options: Any) -> Any:
        """Returns x normalised; raises UserError unless the groups divide the channels."""
        if x.shape[-1] % (self.num_groups or 1):
            raise UserError(
                f"a layer has {x.shape[-1]} channels, its norm {self.num_groups} groups of them: "
                f"choose a width that is a multiple of {self.num_groups}"
            )
        return super().__call__(x, **options)


def group_norm(name: str | None, dtype: Dtype) -> GroupNorm:
    """Returns the 32-group norm of the VQGAN family (epsilon 1e-6, statistics in float32)."""
    return GroupNorm(32, epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)
