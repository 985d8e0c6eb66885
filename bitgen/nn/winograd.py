"""Winograd's F(2x2, 3x3) for 3x3 convolutions of many features on CPU (arXiv 1509.09308).

It takes 2.25 times fewer multiplications, in matrix products of tiles; rounding errors are about
ten times those of a plain convolution, whose gradients are used.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_KERNEL_TO_TILE = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float32) / 2
# Below either, the tiles' additions or the kernels' transform cost more than the products save.
_FEATURES, _PIXELS = 256, 64 * 64
# More pixels than _WHOLE are computed in strips of _ROWS rows, whose tiles stay in the cache.
_WHOLE, _ROWS = 128 * 128, 8


def suits(x: Any, kernel: Any, strides: Any, padding: Any, options: dict[str, Any]) -> bool:
    """Returns whether `convolve` is faster for these arguments of `lax.conv_general_dilated`.

    It is for large float32 3x3 convolutions of stride 1 that keep the image's even size.
    """
    (kh, kw, i, o), (h, w) = kernel.shape, x.shape[1:3]
    plain = all(d == 1 for d in (*strides, *_dilations(options))) and (kh, kw) == (3, 3)
    same = [tuple(sides) for sides in padding] == [(1, 1), (1, 1)]
    groups = options.get("feature_group_count", 1)
    large = min(i, o) >= _FEATURES and h * w >= _PIXELS
    return (
        plain and same and groups == 1 and large and x.dtype == jnp.float32 and h % 2 == w % 2 == 0
    )


def _dilations(options):
    for name in ("lhs_dilation", "rhs_dilation"):
        yield from options.get(name) or ()


@jax.custom_vjp
def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b h w o"]:
    """Returns the convolution of stride 1 and padding 1, by tiles on CPU and by XLA elsewhere."""
    return jax.lax.platform_dependent(x, kernel, cpu=by_tiles, default=_plain)


def _forward(x, kernel):
    return convolve(x, kernel), (x, kernel)


def _backward(inputs, gradient):
    x, kernel = inputs
    (to_x,) = jax.linear_transpose(lambda x: _plain(x, kernel), x)(gradient)
    (to_kernel,) = jax.linear_transpose(lambda kernel: _plain(x, kernel), kernel)(gradient)
    return to_x, to_kernel


convolve.defvjp(_forward, _backward)


def _plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def by_tiles(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b h w o"]:
    """Returns the convolution of stride 1 and padding 1 by F(2x2, 3x3); h and w are even."""
    b, h, w, _ = x.shape
    kernels = jnp.einsum("ap,cq,pqio->acio", _KERNEL_TO_TILE, _KERNEL_TO_TILE, kernel)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    if b * h * w <= _WHOLE or h % _ROWS:
        return _tiles(x, kernels)

    def strip(start):
        return _tiles(jax.lax.dynamic_slice_in_dim(x, start, _ROWS + 2, axis=1), kernels)

    y = jax.lax.map(strip, jnp.arange(0, h, _ROWS))  # [s, b, rows, w, o]
    return y.swapaxes(0, 1).reshape(b, h, w, -1)


def _tiles(x, kernels):
    """[b, h + 2, w + 2, i], [4, 4, i, o] -> [b, h, w, o], 2x2 outputs from each 4x4 tile."""
    (b, h, w, i), o = x.shape, kernels.shape[-1]
    h, w = h - 2, w - 2

    def to_tile(x0, x1, x2, x3):
        return x0 - x2, x1 + x2, x2 - x1, x1 - x3

    def from_tile(y0, y1, y2, y3):
        return y0 + y1 + y2, y1 - y2 - y3

    rows = to_tile(*(x[:, n : n + h : 2] for n in range(4)))
    tiles = [to_tile(*(row[:, :, n : n + w : 2] for n in range(4))) for row in rows]
    products = [
        from_tile(*(tile.reshape(-1, i) @ kernels[m, n] for n, tile in enumerate(line)))
        for m, line in enumerate(tiles)
    ]  # [4][2] of [t, o], t = b h/2 w/2
    pixels = [from_tile(*column) for column in zip(*products, strict=True)]  # [2 columns][2 rows]
    y = jnp.stack([jnp.stack(row, axis=1) for row in zip(*pixels, strict=True)])  # [2, t, 2, o]
    return y.reshape(2, b, h // 2, w, o).transpose(1, 2, 0, 3, 4).reshape(b, h, w, o)
