"""Convolution blocks of the VQGAN family (Esser et al. 2021), NHWC."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.nn import winograd
from bitgen.nn.norms import Dtype, group_norm

# PyTorch's default for convolutions and linear layers, without the random bias.
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(features: int, kernel: int, name: str | None, dtype: Dtype, **options) -> nn.Conv:
    """Returns a convolution with 'same' padding of kernel // 2 and PyTorch's initial scale."""
    options = {"padding": kernel // 2, **options}
    return nn.Conv(
        features,
        (kernel, kernel),
        kernel_init=torch_kernel_init,
        dtype=dtype,
        name=name,
        conv_general_dilated=_convolve,
        **options,
    )


def _convolve(x, kernel, strides, padding, **options):
    """A convolution; on CPU by matrix products where the kernel is larger than the image.

    XLA would swap the two there, and have no fast convolution for what comes out. Large ones of
    many features are `winograd` there.
    """
    if winograd.suits(x, kernel, strides, padding, options):
        return winograd.convolve(x, kernel)
    larger = any(k > size for k, size in zip(kernel.shape[:2], x.shape[1:3], strict=True))
    if jax.default_backend() != "cpu" or not larger:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    (down, right), (kh, kw) = strides, kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    last_row, last_column = x.shape[1] - kh + 1, x.shape[2] - kw + 1
    columns = [
        x[:, i : i + last_row : down, j : j + last_column : right]
        for i in range(kh)
        for j in range(kw)
    ]
    kernel = kernel.reshape(-1, kernel.shape[-1])  # [kh kw i, o]
    return jnp.einsum("bhwi,io->bhwo", jnp.concatenate(columns, axis=-1), kernel)


def unrolled(length: int) -> int:
    """Returns how many turns of a loop over convolutions to unroll: on CPU all of them.

    XLA's fast convolutions for CPU do not work inside of its loops: a gradient takes 50 times as
    long there.
    """
    # One turn more than there are: of a loop over one layer JAX would make a loop.
    return length + 1 if jax.default_backend() == "cpu" else 1


def dense(features: int, name: str, dtype: Dtype, **options) -> nn.Dense:
    """Returns a 1x1 convolution, written as the matrix product that it is."""
    return nn.Dense(features, kernel_init=torch_kernel_init, dtype=dtype, name=name, **options)


class Depthwise(nn.Module):
    """A convolution of each channel by itself, as a sum of shifted images.

    The same parameters as `nn.Conv` with as many groups as channels; its own gradient with respect
    to the kernel is slow on CPU.
    """

    kernel: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x after the convolution, summed in float32."""
        _, h, w, c = x.shape
        side, pad = self.kernel, self.kernel // 2
        kernel = self.param("kernel", torch_kernel_init, (side, side, 1, c), jnp.float32)
        kernel = kernel.astype(self.dtype).astype(jnp.float32)
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        y = jnp.zeros(x.shape, jnp.float32)
        for i in range(side):
            for j in range(side):
                y += padded[:, i : i + h, j : j + w] * kernel[None, None, i, j]
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (c,), jnp.float32)[None, None, None]
        return y.astype(self.dtype)


class Grouped(nn.Module):
    """A 1x1 convolution within equal groups of channels, as the matrix products that it is.

    The same parameters as `nn.Conv` with `groups` groups and no bias.
    """

    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x with each group's channels mixed."""
        b, h, w, c = x.shape
        size = c // self.groups
        kernel = self.param("kernel", torch_kernel_init, (1, 1, size, c), jnp.float32)
        # [i, g o] -> one matrix a group
        kernel = kernel.astype(self.dtype).reshape(size, self.groups, size)
        x = x.astype(self.dtype).reshape(b, h, w, self.groups, size)
        return jnp.einsum("bhwgi,igo->bhwgo", x, kernel).reshape(b, h, w, c)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a skip, which a 1x1 projects where the width changes."""

    features: int
    dtype: Dtype = jnp.float32
    use_bias: bool = True  # of the convolutions

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w features"]:
        """Returns x plus the residual branch."""
        y = nn.silu(group_norm("norm1", self.dtype)(x))
        y = conv(self.features, 3, "conv1", self.dtype, use_bias=self.use_bias)(y)
        y = nn.silu(group_norm("norm2", self.dtype)(y))
        y = conv(self.features, 3, "conv2", self.dtype, use_bias=self.use_bias)(y)
        if x.shape[-1] != self.features:
            x = dense(self.features, "conv_out", self.dtype, use_bias=self.use_bias)(x)
        return x + y


class AttnBlock(nn.Module):
    """Single-head attention over all positions of the map, with a skip."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x plus what each position reads from all others."""
        b, h, w, c = x.shape
        y = group_norm("norm", self.dtype)(x).reshape(b, h * w, c)
        q, k, v = (dense(c, name, self.dtype)(y) for name in ("q", "k", "v"))
        logits = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(logits * c**-0.5, axis=-1).astype(v.dtype)
        y = jnp.einsum("bij,bjc->bic", probs, v)
        y = dense(c, "proj_out", self.dtype)(y)
        return x + y.reshape(b, h, w, c)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 that pads on the right and bottom only."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
        """Returns x at half the resolution."""
        padding = ((0, 1), (0, 1))
        return conv(x.shape[-1], 3, "conv", self.dtype, strides=2, padding=padding)(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c"]:
        """Returns x at twice the resolution."""
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return conv(x.shape[-1], 3, "conv", self.dtype)(x)
