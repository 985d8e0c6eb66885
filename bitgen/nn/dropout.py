"""Dropout with half the random numbers."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

KEPT = "dropout"  # the name of what is kept, for remat


class Dropout(nn.Module):
    """Sets a share of the numbers to 0 and makes up for it in the others; the rng is 'dropout'.

    Each random word serves two numbers, so that the rate is a multiple of 2^-16.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Any) -> Any:
        """Returns x [..., d] after dropout."""
        dropped = round(self.rate * 2**16)
        if not dropped:
            return x
        *shape, d = x.shape
        words = jax.random.bits(self.make_rng("dropout"), (*shape, -(-d // 2)), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(words, jnp.uint16)  # [..., d/2, 2]
        kept = checkpoint_name(halves.reshape(*shape, -1)[..., :d] >= dropped, KEPT)
        return jnp.where(kept, x / (1 - dropped / 2**16), jnp.zeros((), x.dtype))
