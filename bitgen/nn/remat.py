"""What a layer keeps for its gradient, and what is computed again."""

from typing import Any

import jax
from flax import linen as nn

from bitgen.nn.dropout import KEPT

Remat = bool | None
_POLICIES = jax.checkpoint_policies
_kept = _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable, _POLICIES.save_only_these_names(KEPT)
)


def remat_layer(layer: Any, remat: Remat, *, scanned: bool = False) -> Any:
    """Returns a Linen class that keeps of its forward pass what `remat` says.

    False: what products with kernels and fused attention give, and what dropout has drawn. Norms,
    gates and attention's probabilities take less time to compute again than to write and read.
    True: its input alone. None: all that the gradient reads. `scanned`: it is the body of a scan.
    """
    if remat is None:
        return layer
    return nn.remat(layer, policy=None if remat else _keeps, prevent_cse=not scanned)


def _keeps(primitive: Any, *values: Any, **params: Any) -> Any:
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or _kept(primitive, *values, **params)
