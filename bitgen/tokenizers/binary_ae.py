"""The binary autoencoder, "B-AE", of Binary Latent Diffusion (arXiv 2304.04820) and BiGR.

A VQGAN-style encoder gives the probabilities of a cell's k bits, which are drawn in training and
rounded otherwise; the decoder reads the sum of the embeddings of the bits that are on.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from bitgen.nn.conv import AttnBlock, Downsample, ResBlock, Upsample, conv, dense
from bitgen.nn.norms import Dtype, group_norm
from bitgen.tokenizers.quantizers import straight_through

Layout = list[tuple[str, int, int]]


class BinaryAutoencoder(nn.Module):
    """Images to k bits a cell and back; see `encode`, `decode` and `__call__`."""

    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    bits: int = 24
    embed_dim: int = 256
    image_size: int = 256
    attention_resolutions: tuple[int, ...] = (16,)
    decoder_multiplier: float = 1.0  # the decoder's blocks a level over the encoder's, "gen_mul"
    norm_first: bool = True
    deterministic: bool = False  # bits are rounded in training too
    signed: bool = False  # bits enter the decoder as -1, 1 instead of 0, 1; "use_tanh"
    remat: bool = False
    dtype: Dtype = jnp.float32

    image_scale = 2.0  # pixels in [0, 1] of the last layer to images in [-1, 1]

    @property
    def grid(self) -> tuple[int, int]:
        """Cells (h, w) of images of `image_size`."""
        side = self.image_size // 2 ** (len(self.multipliers) - 1)
        return side, side

    @property
    def last_layer(self) -> tuple[str, ...]:
        """Path of the last convolution, where GAN losses are balanced."""
        return "decoder", f"blocks_{len(decoder_layout(self)) - 1}"

    @property
    def stochastic(self) -> bool:
        """Whether generators are trained on drawn bits."""
        return not self.deterministic

    def setup(self):
        self.encoder = BlockStack(encoder_layout(self), self.remat, self.dtype)
        self.quantizer = BinaryQuantizer(self.bits, self.embed_dim, self.signed, self.dtype)
        self.decoder = BlockStack(decoder_layout(self), self.remat, self.dtype)

    def hidden(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w e"]:
        """Returns the encoder's output for images in [-1, 1]."""
        return self.encoder((images.astype(self.dtype) + 1) / 2)[0]

    def probs(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w k"]:
        """Returns the probability of each bit for images in [-1, 1]."""
        return self.quantizer.probs(self.hidden(images))

    def encode(self, images: Float[Array, "b H W 3"]) -> Bool[Array, "b h w k"]:
        """Returns the more probable value of each bit for images in [-1, 1]."""
        return self.probs(images) > 0.5

    def decode(self, bits: Bool[Array, "b h w k"]) -> Float[Array, "b H W 3"]:
        """Returns images in about [-1, 1], not clipped."""
        return self._pixels(self.quantizer.codes(bits.astype(jnp.float32)))[0]

    def __call__(
        self, images: Float[Array, "b H W 3"], *, train: bool
    ) -> tuple[Float[Array, "b H W 3"], dict[str, Any]]:
        """Returns the reconstruction, with straight-through gradients, and a dict for the losses.

        The dict holds `losses` (name to scalar), `bits` and `last_input`, the input of
        `last_layer`. Training draws bits with the rng named 'bits'.
        """
        probs = self.probs(images)
        if train and not self.deterministic:
            bits = jax.random.bernoulli(self.make_rng("bits"), probs)
        else:
            bits = probs > 0.5
        codes, soft = self.quantizer.codes(bits.astype(jnp.float32)), self.quantizer.codes(probs)
        images, last_input = self._pixels(straight_through(codes, soft))
        # A second sigmoid, as in the reference.
        uncertain = jax.nn.sigmoid(soft) * jax.nn.sigmoid(-soft)
        return images, {
            "losses": {"code": jnp.mean(uncertain)},
            "bits": bits,
            "last_input": last_input,
        }

    def _pixels(self, codes):
        x, last_input = self.decoder(self.quantizer.embed(codes))
        return x.astype(jnp.float32) * self.image_scale - 1, last_input


class BinaryQuantizer(nn.Module):
    """The projection to bit probabilities and the embedding of each bit."""

    bits: int
    embed_dim: int
    signed: bool
    dtype: Dtype

    def setup(self):
        self.proj = dense(self.bits, "proj", self.dtype)
        shape = (self.bits, self.embed_dim)
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape, jnp.float32)

    def probs(self, hidden):
        """Returns the probability of each bit [b,h,w,k], float32, for hidden [b,h,w,e]."""
        logits = self.proj(hidden).astype(jnp.float32)
        # tanh(x) / 2 + 1 / 2 is sigmoid(2x).
        return jax.nn.sigmoid(2 * logits if self.signed else logits)

    def codes(self, values):
        """Returns the decoder's values for bits or probabilities in [0, 1]."""
        return values * 2 - 1 if self.signed else values

    def embed(self, codes):
        """Returns the sum [b,h,w,e] of each bit's embedding times its code [b,h,w,k]."""
        dtype = self.dtype
        return jnp.einsum("bhwk,ke->bhwe", codes.astype(dtype), self.embedding.astype(dtype))


class BlockStack(nn.Module):
    """The blocks of a layout in order, `blocks_0`, `blocks_1`, ..."""

    layout: Layout
    remat: bool
    dtype: Dtype

    def setup(self):
        self.blocks = [
            _block(kind, features, self.remat, self.dtype) for kind, _, features in self.layout
        ]

    def __call__(self, x):
        """Returns the output and the input of the last block."""
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](x), x


def _block(kind: str, features: int, remat: bool, dtype: Dtype) -> nn.Module:
    res, attn = (nn.remat(ResBlock), nn.remat(AttnBlock)) if remat else (ResBlock, AttnBlock)
    return {
        "conv": lambda: conv(features, 3, None, dtype),
        "res": lambda: res(features, dtype),
        "attn": lambda: attn(dtype),
        "down": lambda: Downsample(dtype),
        "up": lambda: Upsample(dtype),
        "norm": lambda: group_norm(None, dtype),
    }[kind]()


def encoder_layout(config: Any) -> Layout:
    """Returns (kind, input channels, output channels) of each encoder block, in order.

    `config` has the fields of BinaryAutoencoder. Kinds are conv, res, attn, down and norm.
    """
    width = config.width
    layout: Layout = [("conv", config.channels, width)]
    channels, resolution = width, config.image_size
    for level, multiplier in enumerate(config.multipliers):
        for _ in range(config.blocks):
            layout.append(("res", channels, width * multiplier))
            channels = width * multiplier
            if resolution in config.attention_resolutions:
                layout.append(("attn", channels, channels))
        if level < len(config.multipliers) - 1:
            layout.append(("down", channels, channels))
            resolution //= 2
    layout += [(kind, channels, channels) for kind in ("res", "attn", "res", "norm")]
    return [*layout, ("conv", channels, config.embed_dim)]


def decoder_layout(config: Any) -> Layout:
    """Returns (kind, input channels, output channels) of each decoder block, as above."""
    embed_dim = config.embed_dim
    channels = config.width * config.multipliers[-1]
    resolution = config.image_size // 2 ** (len(config.multipliers) - 1)
    layout: Layout = [("norm", embed_dim, embed_dim)] if config.norm_first else []
    layout.append(("conv", embed_dim, channels))
    layout += [(kind, channels, channels) for kind in ("res", "attn", "res")]
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        for _ in range(int(config.blocks * config.decoder_multiplier)):
            layout.append(("res", channels, config.width * multiplier))
            channels = config.width * multiplier
            if resolution in config.attention_resolutions:
                layout.append(("attn", channels, channels))
        if level > 0:
            layout.append(("up", channels, channels))
            resolution *= 2
    return [*layout, ("norm", channels, channels), ("conv", channels, config.channels)]
