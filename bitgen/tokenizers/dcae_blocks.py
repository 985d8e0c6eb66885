"""Blocks of DC-AE (arXiv 2410.10733; mit-han-lab/efficientvit), NHWC.

Residual blocks, EfficientViT blocks (arXiv 2205.14756) of ReLU linear attention and a gated
depthwise MLP, and convolutions that halve or double the resolution. Functions that take a `name`
are called in a compact method, whose submodules they make.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.nn.conv import Depthwise, Grouped, conv, dense, unrolled
from bitgen.nn.norms import BatchNorm, Dtype, RMSNorm
from bitgen.nn.shuffle import (
    average_channels,
    pixel_shuffle,
    pixel_unshuffle,
    repeat_channels,
    repeat_pixels,
)

HEAD_DIM = 32
EXPANSION = 4  # the MLP's hidden width over its input's, before the gate
EPSILON = 1e-15  # added to the attention's denominator

DOWN = ("unshuffle", "conv")
UP = ("shuffle", "interpolate")
NORMS = ("rms", "batch")
ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=True),
}
# Block -> sizes of the depthwise kernels of the attention's further scales; None: no attention.
BLOCKS: dict[str, tuple[int, ...] | None] = {
    "res": None,
    "attention": (),
    "attention_5": (5,),
}


class Stage(NamedTuple):
    """The blocks of one resolution."""

    width: int
    depth: int  # number of blocks
    block: str  # of BLOCKS
    norm: str  # of NORMS
    activation: str  # of ACTIVATIONS


def normalize(kind: str, name: str, x: Float[Array, "b h w c"], train: bool):
    """Returns x after one of the NORMS."""
    if kind == "batch":
        return BatchNorm(name=name)(x, train=train)
    return RMSNorm(use_bias=True, name=name)(x)


def apply_stage(
    x: Float[Array, "b h w c"], name: str, stage: Stage, train: bool, remat: bool, dtype: Dtype
) -> Float[Array, "b h w c"]:
    """Returns x after the blocks of a stage, at least one.

    Residual blocks are many and are scanned as `name`, their parameters stacked. Attention blocks
    are few and not scanned: `name`_block_0, `name`_block_1, ...
    """
    scales, kind = BLOCKS[stage.block], (stage.norm, stage.activation, train, dtype)
    if scales is not None:
        attention = nn.remat(AttentionBlock) if remat else AttentionBlock
        for j in range(stage.depth):
            x = attention(scales, *kind, name=f"{name}_block_{j}")(x)
        return x
    res = nn.remat(ResBlock, prevent_cse=False) if remat else ResBlock
    layers = nn.scan(
        res,
        variable_axes={"params": 0, "moved": 0},
        split_rngs={"params": True},
        length=stage.depth,
        unroll=unrolled(stage.depth),
    )
    return layers(*kind, name=name)(x)[0]


class ResBlock(nn.Module):
    """A residual block of two 3x3 convolutions and a norm, the body of a scan."""

    norm: str
    activation: str
    train: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], None]:
        """Returns x plus the residual branch, and no output to stack."""
        c = x.shape[-1]
        y = ACTIVATIONS[self.activation](conv(c, 3, "conv1", self.dtype)(x))
        y = conv(c, 3, "conv2", self.dtype, use_bias=False)(y)
        return x + normalize(self.norm, "norm", y, self.train), None


class AttentionBlock(nn.Module):
    """EfficientViT's block: linear attention and a gated depthwise MLP, each with a skip."""

    scales: tuple[int, ...]
    norm: str
    activation: str
    train: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x plus both residual branches."""
        x = x + LinearAttention(self.scales, self.norm, self.train, self.dtype, name="attention")(x)
        mlp = GatedConvMLP(self.norm, self.activation, self.train, self.dtype, name="mlp")
        return x + mlp(x)


class LinearAttention(nn.Module):
    """Multi-head attention with ReLU instead of softmax, linear in the number of tokens.

    Queries, keys and values are a 1x1 projection; each of `scales` adds as many heads, whose
    queries, keys and values pass a depthwise convolution of that size and a grouped 1x1 one.
    The kernel `qkv` [3, c, d] holds the thirds of a matrix whose columns are ordered by head (q, k
    and v of head 0, of head 1, ...), as in files of diffusers.
    """

    scales: tuple[int, ...]
    norm: str
    train: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns the attention's output after the norm."""
        b, h, w, c = x.shape
        heads = c // HEAD_DIM
        width = 3 * heads * HEAD_DIM
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
        kernel = self.param("qkv", init, (3, c, width // 3), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        qkv = jnp.einsum("bhwc,tcd->bhwtd", x, kernel).reshape(b, h, w, width)
        parts = [qkv]
        for i, size in enumerate(self.scales):
            y = Depthwise(size, use_bias=False, dtype=self.dtype, name=f"scale_{i}_depth")(qkv)
            parts.append(Grouped(3 * heads, self.dtype, name=f"scale_{i}_mix")(y))
        qkv = jnp.stack(parts, 3).reshape(b, h * w, len(parts) * heads, 3, HEAD_DIM)
        q, k, v = (qkv[:, :, :, i] for i in range(3))  # [b, n, heads, d]
        read = relu_attention(q, k, v).reshape(b, h, w, -1).astype(self.dtype)
        y = dense(c, "out", self.dtype, use_bias=False)(read)
        return normalize(self.norm, "norm", y, self.train)


def relu_attention(
    q: Float[Array, "b n heads d"], k: Float[Array, "b n heads d"], v: Float[Array, "b n heads d"]
) -> Float[Array, "b n heads d"]:
    """Returns the averages of v with weights relu(q) · relu(k), in float32.

    Computes all pairs for up to d tokens, where that is less work, else sums over tokens.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q, k = nn.relu(q), nn.relu(k)
    return quadratic(q, k, v) if q.shape[1] <= q.shape[-1] else linear(q, k, v)


# Sums over all tokens need full float32 products, which are not the default on all accelerators.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def quadratic(q, k, v):
    """Returns the attention by all pairs of tokens; float32, q and k are not negative."""
    weights = _einsum("bnhd,bmhd->bhnm", q, k)
    weights = weights / (jnp.sum(weights, -1, keepdims=True) + EPSILON)
    return _einsum("bhnm,bmhd->bnhd", weights, v)


def linear(q, k, v):
    """Returns the attention by one d x d matrix a head; float32, q and k are not negative."""
    values = _einsum("bnhd,bnhe->bhde", k, v)
    total = _einsum("bnhd,bhd->bnh", q, jnp.sum(k, 1))
    return _einsum("bnhd,bhde->bnhe", q, values) / (total[..., None] + EPSILON)


class GatedConvMLP(nn.Module):
    """A feed-forward block with a 3x3 depthwise convolution, half of whose output is the gate."""

    norm: str
    activation: str
    train: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns the block's output after the norm."""
        c, act = x.shape[-1], ACTIVATIONS[self.activation]
        hidden = 2 * EXPANSION * c
        y = act(dense(hidden, "in", self.dtype)(x))
        y = Depthwise(3, dtype=self.dtype, name="depth")(y)
        y, gate = jnp.split(y, 2, axis=-1)
        y = dense(c, "out", self.dtype, use_bias=False)(y * act(gate))
        return normalize(self.norm, "norm", y, self.train)


def down(
    x: Float[Array, "b H W c"], features: int, kind: str, shortcut: bool, name: str, dtype: Dtype
) -> Float[Array, "b h w features"]:
    """Returns x at half the resolution: a convolution and a pixel unshuffle, or one of stride 2."""
    if kind == "unshuffle":
        y = pixel_unshuffle(conv(features // 4, 3, name, dtype)(x), 2)
    else:
        y = conv(features, 3, name, dtype, strides=2)(x)
    return y + average_channels(x, features, 2) if shortcut else y


def up(
    x: Float[Array, "b h w c"], features: int, kind: str, shortcut: bool, name: str, dtype: Dtype
) -> Float[Array, "b H W features"]:
    """Returns x at twice the resolution: a convolution and a pixel shuffle, or repeated pixels."""
    if kind == "shuffle":
        y = pixel_shuffle(conv(4 * features, 3, name, dtype)(x), 2)
    else:
        y = conv(features, 3, name, dtype)(repeat_pixels(x))
    return y + repeat_channels(x, features, 2) if shortcut else y
