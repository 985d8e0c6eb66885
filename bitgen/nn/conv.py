"""Convolution blocks of the VQGAN family (Esser et al. 2021), NHWC."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.nn import winograd
from bitgen.nn.norms import Dtype, group_norm
from bitgen.nn.shuffle import repeat_pixels

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
    """Returns a convolution, on CPU in the two cases where XLA's own is slow by other means.

    Large ones of many features are `winograd`. Where the kernel is larger than the image, XLA would
    swap the two and find no fast kernel; a matrix product of patches is used.
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
    """Returns how many steps of a scan over convolutions to unroll: on CPU all of them.

    XLA does not use its fast CPU convolutions inside loops: gradients take 50 times as long there.
    """
    # One more than the length, because JAX keeps a loop where `unroll` and the length are both 1.
    return length + 1 if jax.default_backend() == "cpu" else 1


def dense(features: int, name: str, dtype: Dtype, **options) -> nn.Dense:
    """Returns a 1x1 convolution as a dense layer, with PyTorch's initial scale."""
    return nn.Dense(features, kernel_init=torch_kernel_init, dtype=dtype, name=name, **options)


class Depthwise(nn.Module):
    """A depthwise convolution, computed as a sum of shifted images.

    Its parameters are those of `nn.Conv` with as many groups as channels, whose kernel gradient is
    slow on CPU.
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
    """A grouped 1x1 convolution without bias, computed as one matrix product a group.

    Its parameters are those of `nn.Conv` with `groups` feature groups.
    """

    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x after the convolution."""
        b, h, w, c = x.shape
        size = c // self.groups
        kernel = self.param("kernel", torch_kernel_init, (1, 1, size, c), jnp.float32)
        # [i, g o] -> one matrix a group
        kernel = kernel.astype(self.dtype).reshape(size, self.groups, size)
        x = x.astype(self.dtype).reshape(b, h, w, self.groups, size)
        return jnp.einsum("bhwgi,igo->bhwgo", x, kernel).reshape(b, h, w, c)


class ResBlock(nn.Module):
    """A residual block of two 3x3 convolutions; a 1x1 projects the skip where the width changes."""

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
    """A residual block of single-head attention over all positions."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x plus the attention's output."""
        b, h, w, c = x.shape
        y = group_norm("norm", self.dtype)(x).reshape(b, h * w, c)
        q, k, v = (dense(c, name, self.dtype)(y) for name in ("q", "k", "v"))
        logits = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(logits * c**-0.5, axis=-1).astype(v.dtype)
        y = jnp.einsum("bij,bjc->bic", probs, v)
        y = dense(c, "proj_out", self.dtype)(y)
        return x + y.reshape(b, h, w, c)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded on the right and bottom only."""

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
        return conv(x.shape[-1], 3, "conv", self.dtype)(repeat_pixels(x))
