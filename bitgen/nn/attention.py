"""Multi-head attention with rotary positions."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from bitgen.nn.matmul import DotGeneral
from bitgen.nn.norms import Dtype
from bitgen.nn.rope import rotate

Implementation = Literal["xla", "cudnn"] | None
# Of the length that a masked or causal kernel wants.
LENGTH_MULTIPLES = {"cudnn": 64}


class SelfAttention(nn.Module):
    """Attention over n tokens, no biases, queries and keys rotated by position.

    `implementation` is passed to `jax.nn.dot_product_attention`; None lets jax choose.
    """

    heads: int
    implementation: Implementation = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        rotations: Float[Array, "n c 2"],
        mask: Bool[np.ndarray, "n n"] | None = None,
        cache: tuple[Any, Any] | None = None,
        start: Any = 0,
    ) -> Any:
        """Returns what each token reads from all tokens, or from those that its mask row allows.

        With a `cache`, keys and values [b, heads, N, head_dim] of earlier tokens, the n tokens are
        stored from position `start` on and read all positions up to the last of them; the result
        is a pair with the new cache.
        """
        width = x.shape[-1]
        init = nn.initializers.normal(0.02)
        options = {
            "use_bias": False,
            "kernel_init": init,
            "dtype": self.dtype,
            "dot_general_cls": DotGeneral,
        }
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), name="qkv", **options)(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # [b, n, heads, head_dim]
        q, k = rotate(q, rotations), rotate(k, rotations)
        if cache is None:
            y = attend(q, k, v, mask, self.implementation)
        else:
            y, cache = _attend_cached(q, k, v, cache, start, mask)
        y = nn.DenseGeneral(width, axis=(-2, -1), name="out", **options)(y)
        return y if cache is None else (y, cache)


def attend(
    q: Float[Array, "b n heads c"],
    k: Float[Array, "b n heads c"],
    v: Float[Array, "b n heads c"],
    mask: Bool[np.ndarray, "n n"] | None,
    implementation: Implementation,
) -> Float[Array, "b n heads c"]:
    """Returns softmax(q k / sqrt(c)) v over what the mask allows; a causal one takes its kernel."""
    n = q.shape[1]
    if mask is None:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    causal = bool((mask == np.tri(n, dtype=bool)).all())
    pad = -n % LENGTH_MULTIPLES.get(implementation or "", 1)
    if pad:
        # The last real token comes before the padding, which nothing real reads; a padded row
        # reads what a causal one would, so that no row is empty and no gradient is NaN.
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        padded = np.tri(n + pad, dtype=bool)
        padded[:n, :n] = mask
        mask = padded
    options: dict[str, Any] = {"is_causal": True} if causal else {"mask": mask[None, None]}
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)[:, :n]


def _attend_cached(q, k, v, cache, start, mask):
    """New keys and values go into the cache in place; scores are float32."""
    at = (0, 0, start, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), at)
        for old, new in zip(cache, (k, v), strict=True)
    )
    n, scale = q.shape[1], q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhc,bhkc->bhqk", q * scale, keys, preferred_element_type=jnp.float32)
    if mask is None:  # the n tokens are drawn together and see each other
        seen = jnp.arange(keys.shape[2]) < start + n
        seen = seen[None, None, None]
    else:  # from the start of the sequence
        seen = np.zeros((n, keys.shape[2]), bool)
        seen[:, :n] = mask
        seen = seen[None, None]
    probs = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1).astype(values.dtype)
    y = jnp.einsum("bhqk,bhkc->bhqc", probs, values)
    # Without the barrier XLA turns the product around, which takes four times as long on a CPU.
    return jax.lax.optimization_barrier(y).swapaxes(1, 2), (keys, values)
