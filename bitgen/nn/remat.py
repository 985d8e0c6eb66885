"""Stacked layers, dropout, and which activations are kept for the gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

Remat = bool | None
_DROPOUT = "dropout"
_POLICIES = jax.checkpoint_policies
_save_products = _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(_DROPOUT)
)


def remat_layer(layer: Any, remat: Remat, *, scanned: bool = False) -> Any:
    """Returns a Linen class that saves for its gradient what `remat` says.

    False saves the outputs of matrix products and of fused attention, and dropout's masks: norms,
    gates and attention probabilities are faster to recompute than to write and read. True saves
    the layer's input alone, None everything. `scanned` says that the layer is the body of a scan.
    """
    if remat is None:
        return layer
    return nn.remat(layer, policy=None if remat else _saveable, prevent_cse=not scanned)


def scan_layers(layer: Any, length: int, inputs: int, *, remat: Remat, unroll: bool) -> Any:
    """Returns a Linen class of `length` layers in a row, their parameters stacked [l, ...].

    Each layer maps (carry, *inputs) to (carry, output); the `inputs` are the same for all.
    """
    return nn.scan(
        remat_layer(layer, remat, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * inputs,  # pyright: ignore[reportArgumentType]
        length=length,
        unroll=length if unroll else 1,
    )


class Dropout(nn.Module):
    """Dropout with half the random numbers of flax's; the rng is named 'dropout'.

    Each 32-bit random word serves two activations, so the rate is a multiple of 2^-16.
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
        kept = checkpoint_name(halves.reshape(*shape, -1)[..., :d] >= dropped, _DROPOUT)
        return jnp.where(kept, x / (1 - dropped / 2**16), jnp.zeros((), x.dtype))


def _saveable(primitive: Any, *values: Any, **params: Any) -> Any:
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or _save_products(primitive, *values, **params)
