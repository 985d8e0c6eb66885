"""The autoencoder of BitDance (shallowdream204/BitDance), which follows Open-MAGVIT2.

A convolutional encoder, the grouped lookup-free quantiser "GFQ", and a decoder whose levels start
with a group norm that takes scale and shift from the statistics of the code.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.nn.conv import ResBlock, conv, dense
from bitgen.nn.norms import Dtype, group_norm
from bitgen.tokenizers.quantizers import Sign


class GFQAutoencoder(nn.Module):
    """Images to k bits a cell and back; see `encode`, `decode` and `__call__`.

    Raises UserError when first used if the width is not a multiple of the norms' 32 groups, images
    have a single cell, or, in training, bits do not split into groups.
    """

    channels: int = 3
    width: int = 256
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 4  # residual blocks a level, and in the middle
    bits: int = 32
    groups: int = 4  # groups of bits, each a code of the entropy loss
    image_size: int = 256
    noise_decoder: bool = False  # the decoder reads noise beside the code; "gan_decoder"
    remat: bool = False
    dtype: Dtype = jnp.float32

    last_layer = ("conv_out",)  # path of the last convolution, for GAN losses
    image_scale = 1.0  # the last convolution's output to images in [-1, 1]

    @property
    def grid(self) -> tuple[int, int]:
        """Cells (h, w) of images of `image_size`."""
        side = self.image_size // 2 ** (len(self.multipliers) - 1)
        return side, side

    def setup(self):
        if self.width % 32:
            raise UserError(f"gfq_ae needs a width that is a multiple of 32, got {self.width}")
        if self.grid[0] < 2:
            raise UserError(
                f"gfq_ae needs at least 2x2 cells, for the variance of the code: image_size "
                f"{self.image_size} with {len(self.multipliers)} levels has fewer"
            )
        sizes = (self.width, self.multipliers, self.blocks, self.bits, self.remat, self.dtype)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)
        self.conv_out = conv(self.channels, 3, None, self.dtype)

    @property
    def quantizer(self) -> Sign:
        """The quantiser, which has no parameters."""
        return Sign(self.groups)

    def hidden(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k"]:
        """Returns the encoder's output, whose signs are the bits, for images in [-1, 1]."""
        return self.encoder(images).astype(jnp.float32)

    def encode(self, images: Float[Array, "b H W c"]) -> Bool[Array, "b h w k"]:
        """Returns the bits of images in [-1, 1]."""
        return self.quantizer.bits(self.hidden(images))

    def decode(
        self, bits: Bool[Array, "b h w k"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "b H W c"]:
        """Returns images in about [-1, 1], not clipped.

        `key` draws the noise of a `noise_decoder`; without one, all images get the same fixed
        noise, so that an image does not depend on its batch.
        """
        return self._pixels(self.quantizer.codes(bits), key)[0]

    def __call__(
        self, images: Float[Array, "b H W c"], *, train: bool
    ) -> tuple[Float[Array, "b H W c"], dict[str, Any]]:
        """Returns the reconstruction, with straight-through gradients, and a dict for the losses.

        The dict holds `losses` ('entropy' and 'commitment', scalars), `bits` and `last_input`, the
        input of `last_layer`. Training draws the noise of a `noise_decoder` with the rng 'bits'.
        """
        codes, bits, losses = self.quantizer(self.hidden(images))
        key = self.make_rng("bits") if train and self.noise_decoder else None
        recon, last_input = self._pixels(codes, key)
        return recon, {"losses": losses, "bits": bits, "last_input": last_input}

    def _pixels(self, codes, key):
        x = codes
        if self.noise_decoder:
            if key is None:
                noise = jax.random.normal(jax.random.key(0), (1, *codes.shape[1:]))
                noise = jnp.broadcast_to(noise, codes.shape)
            else:
                noise = jax.random.normal(key, codes.shape)
            x = jnp.concatenate([codes, noise], axis=-1)
        last_input = self.decoder(x, codes)
        return self.conv_out(last_input).astype(jnp.float32), last_input


class _Levels(nn.Module):
    """The sizes of an encoder or decoder."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    bits: int
    remat: bool
    dtype: Dtype

    def _level(self, name: str, x: jax.Array, features: int) -> jax.Array:
        """Returns x after the residual blocks `name_0`, `name_1`, ..."""
        block = nn.remat(ResBlock) if self.remat else ResBlock
        for i in range(self.blocks):
            x = block(features, self.dtype, use_bias=False, name=f"{name}_{i}")(x)
        return x


class Encoder(_Levels):
    """Levels of residual blocks, each but the last followed by a convolution of stride 2."""

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k"]:
        """Returns k values a cell."""
        x = conv(self.width, 3, "conv_in", self.dtype, use_bias=False)(images)
        for level, multiplier in enumerate(self.multipliers):
            x = self._level(f"down_{level}", x, self.width * multiplier)
            if level < len(self.multipliers) - 1:
                x = conv(x.shape[-1], 3, f"downsample_{level}", self.dtype, strides=2)(x)
        x = self._level("mid", x, x.shape[-1])
        x = nn.silu(group_norm("norm_out", self.dtype)(x))
        return dense(self.bits, "conv_out", self.dtype)(x)


class Decoder(_Levels):
    """The encoder mirrored; each level starts with a norm that depends on the style."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], style: Float[Array, "b h w k"]
    ) -> Float[Array, "b H W d"]:
        """Returns the input of the last convolution."""
        x = conv(self.width * self.multipliers[-1], 3, "conv_in", self.dtype)(x)
        x = self._level("mid", x, x.shape[-1])
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            x = AdaptiveGroupNorm(self.dtype, name=f"adaptive_{level}")(x, style)
            x = self._level(f"up_{level}", x, self.width * multiplier)
            if level > 0:
                x = conv(4 * x.shape[-1], 3, f"upsample_{level}", self.dtype)(x)
                x = rearrange(x, "b h w (y x c) -> b (h y) (w x) c", y=2, x=2)
        return nn.silu(group_norm("norm_out", self.dtype)(x))


class AdaptiveGroupNorm(nn.Module):
    """Group norm with scale and shift linear in the style's standard deviation and mean."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], style: Float[Array, "b y x k"]
    ) -> Float[Array, "b h w c"]:
        """Returns x after the norm, in float32 until the end; statistics are over cells."""
        style = style.astype(jnp.float32)
        deviation = jnp.sqrt(jnp.var(style, axis=(1, 2), ddof=1, keepdims=True) + 1e-6)
        mean = jnp.mean(style, axis=(1, 2), keepdims=True)
        scale = dense(x.shape[-1], "gamma", jnp.float32)(deviation)
        shift = dense(x.shape[-1], "beta", jnp.float32)(mean)
        how: Any = {"use_bias": False, "use_scale": False, "use_fast_variance": False}
        norm = nn.GroupNorm(32, epsilon=1e-6, dtype=jnp.float32, **how)
        return (scale * norm(x) + shift).astype(self.dtype)
