"""Multi-head attention with rotary positions."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from bitgen.errors import UserError, choose, first_line
from bitgen.nn.embeddings import rotate
from bitgen.nn.matmul import DotGeneral
from bitgen.nn.norms import Dtype

Implementation = Literal["auto", "xla", "cudnn"]
# The sequence length must be a multiple of these for gradients, without and with a mask.
LENGTH_MULTIPLES = {"cudnn": (2, 64)}
_HALVES = (jnp.bfloat16, jnp.float16)
_LARGEST_HEAD = 128  # head_dim of cuDNN's fused kernels on every GPU that has them


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions and no biases.

    `implementation` 'auto' is cuDNN's fused kernels where the GPU has them, else XLA's.
    """

    heads: int
    implementation: Implementation = "auto"
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
        """Returns the attention's output; token i attends to the tokens j where mask[i, j].

        With a `cache`, keys and values [b, heads, N, head_dim] of earlier tokens, the n tokens are
        stored from position `start` on and attend to all positions up to their last; returns a
        pair of the output and the new cache.
        """
        width = x.shape[-1]
        dense = functools.partial(
            nn.DenseGeneral,
            use_bias=False,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            dot_general_cls=DotGeneral,
        )
        qkv = dense((3, self.heads, width // self.heads), name="qkv")(x)
        q, k, v = (qkv[:, :, i] for i in range(3))  # [b, n, heads, head_dim]
        q, k = rotate(q, rotations), rotate(k, rotations)
        if cache is None:
            y = attend(q, k, v, mask, self.implementation)
        else:
            y, cache = _attend_cached(q, k, v, cache, start, mask)
        y = dense(width, axis=(-2, -1), name="out")(y)
        return y if cache is None else (y, cache)


def attend(
    q: Float[Array, "b n heads c"],
    k: Float[Array, "b n heads c"],
    v: Float[Array, "b n heads c"],
    mask: Bool[np.ndarray, "n n"] | None,
    implementation: Implementation,
) -> Float[Array, "b n heads c"]:
    """Returns softmax(q k / sqrt(c)) v under a mask; a causal one uses the causal kernel.

    Raises UserError for an unknown implementation, or one that this machine does not have.
    """
    choose("config.model.attention", implementation, get_args(Implementation))
    if implementation == "auto":
        fused = q.dtype in _HALVES and q.shape[-1] <= _LARGEST_HEAD and q.shape[-1] % 8 == 0
        implementation = "cudnn" if fused and _gpu_fuses() else "xla"
    n = q.shape[1]
    multiple = LENGTH_MULTIPLES.get(implementation, (1, 1))[mask is not None]
    pad = -n % multiple
    if pad:
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    options: dict[str, Any] = {}
    if mask is None:
        if pad:
            real = jnp.full((len(q),), n, jnp.int32)
            options = {"query_seq_lengths": real, "key_value_seq_lengths": real}
    elif (mask == np.tri(n, dtype=bool)).all():
        options = {"is_causal": True}
    else:
        # Padding comes last and no real token attends to it. Padded rows are causal: an empty row
        # would make gradients NaN.
        padded = np.tri(n + pad, dtype=bool)
        padded[:n, :n] = mask
        options = {"mask": padded[None, None]}
    try:
        y = jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)
    except (RuntimeError, NotImplementedError) as e:  # no cuDNN, or no kernel of it for the sizes
        if implementation != "cudnn":
            raise
        raise UserError(f"config.model.attention=cudnn: {first_line(e)} Set auto or xla") from None
    return y[:, :n]


def _gpu_fuses() -> bool:
    """Returns whether the devices are NVIDIA GPUs of the Ampere generation or later."""
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version:
        return False
    return int(device.compute_capability.split(".")[0]) >= 8


def _attend_cached(q, k, v, cache, start, mask):
    """Returns the output and the cache with the new keys and values; scores are float32."""
    at = (0, 0, start, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), at)
        for old, new in zip(cache, (k, v), strict=True)
    )
    n, scale = q.shape[1], q.shape[-1] ** -0.5
    logits = jnp.einsum("bqhc,bhkc->bhqk", q * scale, keys, preferred_element_type=jnp.float32)
    if mask is None:  # the n tokens are drawn in parallel and attend to each other
        seen = jnp.arange(keys.shape[2]) < start + n
        seen = seen[None, None, None]
    else:  # the start of the sequence
        seen = np.zeros((n, keys.shape[2]), bool)
        seen[:, :n] = mask
        seen = seen[None, None]
    probs = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1).astype(values.dtype)
    y = jnp.einsum("bhqk,bhkc->bhqc", probs, values)
    # Without the barrier XLA transposes the product, which takes four times as long on CPU.
    return jax.lax.optimization_barrier(y).swapaxes(1, 2), (keys, values)
