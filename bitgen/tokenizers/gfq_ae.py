"""The autoencoder of BitDance (shallowdream204/BitDance), of the lineage of Open-MAGVIT2.

A convolutional encoder, signs in groups as the code ("GFQ"), and a decoder whose every level first
takes scale and shift from the statistics of the code (adaptive group norm).
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

    Raises UserError, when first used, for a width that is no multiple of the norms' 32 groups,
    images of a single cell, or, in training, bits that do not split into groups.
    """

    channels: int = 3
    width: int = 256
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 4  # residual blocks a level, and in the middle
    bits: int = 32
    groups: int = 4  # of bits, whose codes the entropy loss spreads
    image_size: int = 256
    noise_decoder: bool = False  # the decoder reads noise beside the code; "gan_decoder"
    remat: bool = False
    dtype: Dtype = jnp.float32

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the bit grid for square images of `image_size`."""
        side = self.image_size // 2 ** (len(self.multipliers) - 1)
        return side, side

    @property
    def last_layer(self) -> tuple[str, ...]:
        """Path of the convolution that makes the pixels, where GAN losses are balanced."""
        return ("conv_out",)

    @property
    def image_scale(self) -> float:
        """What `last_layer`'s output is multiplied by to be images in [-1, 1]."""
        return 1.0

    def setup(self):
        _check(self)
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

        `key` draws the noise of a `noise_decoder`; without one, all images get the same, fixed
        noise, so that an image does not depend on the others of its batch.
        """
        return self._pixels(self._decoded(self.quantizer.codes(bits), key))

    def __call__(
        self, images: Float[Array, "b H W c"], *, train: bool
    ) -> tuple[Float[Array, "b H W c"], dict[str, Any]]:
        """Returns the reconstruction and what the losses need, gradients straight through the bits.

        The second value holds `losses` ('entropy' and 'commitment', scalars), `bits` and
        `last_input`, the activation that enters `last_layer`. In training, the noise of a
        `noise_decoder` is drawn with the rng named 'bits'.
        """
        codes, bits, losses = self.quantizer(self.hidden(images))
        key = self.make_rng("bits") if train and self.noise_decoder else None
        last_input = self._decoded(codes, key)
        return self._pixels(last_input), {"losses": losses, "bits": bits, "last_input": last_input}

    def _decoded(self, codes, key):
        """[b,h,w,k] -> the activation that enters the last convolution [b,H,W,d]."""
        if not self.noise_decoder:
            return self.decoder(codes, codes)
        if key is None:
            noise = jax.random.normal(jax.random.key(0), (1, *codes.shape[1:]))
            noise = jnp.broadcast_to(noise, codes.shape)
        else:
            noise = jax.random.normal(key, codes.shape)
        return self.decoder(jnp.concatenate([codes, noise], axis=-1), codes)

    def _pixels(self, x):
        return self.conv_out(x).astype(jnp.float32)


class Encoder(nn.Module):
    """Residual blocks level by level, each but the last ending in a convolution of stride 2."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    bits: int
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, images: Float[Array, "b H W c"]) -> Float[Array, "b h w k"]:
        """Returns k values a cell."""
        x = conv(self.width, 3, "conv_in", self.dtype, use_bias=False)(images)
        for level, multiplier in enumerate(self.multipliers):
            x = _blocks(self, f"down_{level}", x, self.width * multiplier)
            if level < len(self.multipliers) - 1:
                x = conv(x.shape[-1], 3, f"downsample_{level}", self.dtype, strides=2)(x)
        x = _blocks(self, "mid", x, x.shape[-1])
        x = nn.silu(group_norm("norm_out", self.dtype)(x))
        return dense(self.bits, "conv_out", self.dtype)(x)


class Decoder(nn.Module):
    """The encoder's mirror image; the style sets scale and shift at the start of each level."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    bits: int
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w i"], style: Float[Array, "b h w k"]
    ) -> Float[Array, "b H W d"]:
        """Returns the activation that enters the last convolution."""
        x = conv(self.width * self.multipliers[-1], 3, "conv_in", self.dtype)(x)
        x = _blocks(self, "mid", x, x.shape[-1])
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            x = AdaptiveGroupNorm(self.dtype, name=f"adaptive_{level}")(x, style)
            x = _blocks(self, f"up_{level}", x, self.width * multiplier)
            if level > 0:
                x = conv(4 * x.shape[-1], 3, f"upsample_{level}", self.dtype)(x)
                x = rearrange(x, "b h w (y x c) -> b (h y) (w x) c", y=2, x=2)
        return nn.silu(group_norm("norm_out", self.dtype)(x))


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift are linear in the style's deviation and mean over cells."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], style: Float[Array, "b y x k"]
    ) -> Float[Array, "b h w c"]:
        """Returns x normalised in 32 groups, then scaled and shifted, all in float32."""
        style = style.astype(jnp.float32)
        deviation = jnp.sqrt(jnp.var(style, axis=(1, 2), ddof=1, keepdims=True) + 1e-6)
        mean = jnp.mean(style, axis=(1, 2), keepdims=True)
        scale = dense(x.shape[-1], "gamma", jnp.float32)(deviation)
        shift = dense(x.shape[-1], "beta", jnp.float32)(mean)
        norm = nn.GroupNorm(
            32,
            epsilon=1e-6,
            use_bias=False,
            use_scale=False,
            use_fast_variance=False,
            dtype=jnp.float32,
        )
        return (scale * norm(x) + shift).astype(self.dtype)


def _blocks(stack: Encoder | Decoder, name: str, x: jax.Array, features: int) -> jax.Array:
    """Applies the residual blocks of one level, `name_0`, `name_1`, ..."""
    block = nn.remat(ResBlock) if stack.remat else ResBlock
    for i in range(stack.blocks):
        x = block(features, stack.dtype, use_bias=False, name=f"{name}_{i}")(x)
    return x


def _check(config: GFQAutoencoder) -> None:
    if config.width % 32:
        raise UserError(f"gfq_ae needs a width that is a multiple of 32, got {config.width}")
    if config.grid[0] < 2:
        raise UserError(
            f"gfq_ae needs at least 2x2 cells, for the variance of the code: image_size "
            f"{config.image_size} with {len(config.multipliers)} levels has fewer"
        )
