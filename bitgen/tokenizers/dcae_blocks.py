"""Blocks of DC-AE (arXiv 2410.10733; mit-han-lab/efficientvit), NHWC.

Residual blocks, EfficientViT blocks (arXiv 2205.14756) of ReLU linear attention and a gated
depthwise MLP, and convolutions that halve or double the resolution.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import choose
from bitgen.nn.conv import Depthwise, Grouped, conv, dense, unrolled
from bitgen.nn.norms import BatchNorm, Dtype, RMSNorm
from bitgen.nn.shuffle import average_channels, pixel_shuffle, pixel_unshuffle, repeat_channels

HEAD_DIM = 32
EXPANSION = 4  # of the MLP's hidden width, before the gate
EPSILON = 1e-15  # of the attention's denominator

NORMS = ("rms", "batch")
ACTIVATIONS: dict[str, Callable] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=True),
}
# Kind of block -> sides of the depthwise kernels of its further queries, keys and values.
# None: no attention at all.
BLOCKS: dict[str, tuple[int, ...] | None] = {
    "res": None,
    "attention": (),
    "attention_5": (5,),
}


def normalize(kind: str, name: str, x: Float[Array, "b h w c"], train: bool):
    """Returns x after a norm of a kind; to be called in a compact method."""
    if choose("norm", kind, NORMS) == "batch":
        return BatchNorm(name=name)(x, train=train)
    return RMSNorm(use_bias=True, name=name)(x)


def stage(
    x: Float[Array, "b h w c"],
    name: str,
    depth: int,
    block: str,
    norm: str,
    activation: str,
    train: bool,
    remat: bool,
    dtype: Dtype,
) -> Float[Array, "b h w c"]:
    """Returns x after `depth` equal blocks, one at least; to be called in a compact method.

    Residual blocks are many, so they are one scanned layer, `name`, with a leading axis in each
    parameter. Attention blocks are few and stay apart: `name`_block_0, `name`_block_1, ...
    """
    scales = BLOCKS[block]
    if scales is not None:
        attention = nn.remat(AttentionBlock) if remat else AttentionBlock
        for j in range(depth):
            layer = attention(scales, norm, activation, train, dtype, name=f"{name}_block_{j}")
            x = layer(x)
        return x
    res = nn.remat(ResBlock, prevent_cse=False) if remat else ResBlock
    layers = nn.scan(
        res,
        variable_axes={"params": 0, "moved": 0},
        split_rngs={"params": True},
        length=depth,
        unroll=unrolled(depth),
    )
    return layers(norm, activation, train, dtype, name=name)(x)[0]


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a norm around a skip: the body of a scan."""

    norm: str
    activation: str
    train: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], None]:
        """Returns x plus the residual branch, and nothing to stack."""
        c = x.shape[-1]
        y = ACTIVATIONS[self.activation](conv(c, 3, "conv1", self.dtype)(x))
        y = conv(c, 3, "conv2", self.dtype, use_bias=False)(y)
        return x + normalize(self.norm, "norm", y, self.train), None


class AttentionBlock(nn.Module):
    """EfficientViT's block: linear attention, then a gated depthwise MLP, each around a skip."""

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
    """Multi-head attention with ReLU in place of the softmax, linear in the number of tokens.

    The first heads read queries, keys and values of a 1x1 projection. For each of `scales`, as many
    more read them after a depthwise convolution of that size and a 1x1 convolution within each of
    a head's queries, keys and values. The projection `qkv` is three matrices, thirds of one whose
    columns go by head first (q, k and v of head 0, of head 1, ...), as in files of diffusers.
    """

    scales: tuple[int, ...]
    norm: str
    train: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns what each position reads from all others, normalised."""
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
            y = Grouped(3 * heads, self.dtype, name=f"scale_{i}_mix")(y)
            parts.append(y)
        qkv = jnp.stack(parts, 3).reshape(b, h * w, len(parts) * heads, 3, HEAD_DIM)
        q, k, v = (qkv[:, :, :, i] for i in range(3))  # [b, n, heads, d]
        read = relu_attention(q, k, v).reshape(b, h, w, -1).astype(self.dtype)
        y = dense(c, "out", self.dtype, use_bias=False)(read)
        return normalize(self.norm, "norm", y, self.train)


def relu_attention(
    q: Float[Array, "b n heads d"], k: Float[Array, "b n heads d"], v: Float[Array, "b n heads d"]
) -> Float[Array, "b n heads d"]:
    """Returns the means of v with the weights relu(q) · relu(k), all in float32.

    Up to d tokens are read through all pairs, which is less work; more through sums over tokens.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q, k = nn.relu(q), nn.relu(k)
    return quadratic(q, k, v) if q.shape[1] <= q.shape[-1] else linear(q, k, v)


# Sums over all tokens lose too much in less than float32, which is some accelerators' default.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def quadratic(q, k, v):
    """The sum over all pairs of tokens; float32, q and k not negative."""
    weights = _einsum("bnhd,bmhd->bhnm", q, k)
    weights = weights / (jnp.sum(weights, -1, keepdims=True) + EPSILON)
    return _einsum("bhnm,bmhd->bnhd", weights, v)


def linear(q, k, v):
    """The same through one matrix a head; float32, q and k not negative."""
    values = _einsum("bnhd,bnhe->bhde", k, v)
    total = _einsum("bnhd,bhd->bnh", q, jnp.sum(k, 1))
    return _einsum("bnhd,bhde->bnhe", q, values) / (total[..., None] + EPSILON)


class GatedConvMLP(nn.Module):
    """A feed-forward block with a 3x3 depthwise convolution, one half the gate of the other."""

    norm: str
    activation: str
    train: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns the normalised branch."""
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
    """Returns x at half the resolution; to be called in a compact method.

    Kinds: `unshuffle` convolves before it moves pixels to channels, `conv` has stride 2.
    """
    if choose("downsample", kind, DOWN) == "unshuffle":
        y = pixel_unshuffle(conv(features // 4, 3, name, dtype)(x), 2)
    else:
        y = conv(features, 3, name, dtype, strides=2)(x)
    return y + average_channels(x, features, 2) if shortcut else y


def up(
    x: Float[Array, "b h w c"], features: int, kind: str, shortcut: bool, name: str, dtype: Dtype
) -> Float[Array, "b H W features"]:
    """Returns x at twice the resolution; to be called in a compact method.

    Kinds: `shuffle` convolves and moves channels to pixels, `interpolate` repeats pixels first.
    """
    if choose("upsample", kind, UP) == "shuffle":
        y = pixel_shuffle(conv(4 * features, 3, name, dtype)(x), 2)
    else:
        y = conv(features, 3, name, dtype)(repeat_pixels(x))
    return y + repeat_channels(x, features, 2) if shortcut else y


DOWN = ("unshuffle", "conv")
UP = ("shuffle", "interpolate")


def repeat_pixels(x: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c"]:
    """Returns each pixel as a block of 2x2."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
