"""BitVAE, Infinity's tokenizer (FoundationVision/BitVAE, arXiv 2412.04431).

A convolutional autoencoder without attention, whose latents are quantised to points of a sphere at
many scales, coarse to fine; each scale codes the residual of the scales before it.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError
from bitgen.nn.conv import Downsample, ResBlock, Upsample, conv
from bitgen.nn.norms import Dtype, group_norm
from bitgen.nn.shuffle import pixel_shuffle, pixel_unshuffle
from bitgen.tokenizers.multiscale import Bits, MultiScale, Size, scales_of
from bitgen.tokenizers.quantizers import Spherical


class BitVAE(nn.Module):
    """Images to a tuple of bits, one array a scale, and back; see `encode` and `decode`.

    A token is a patch of `patch` x `patch` cells of a scale's grid. Images may have any size whose
    grid the schedule has.
    """

    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    blocks: int = 2
    bits: int = 32  # bits a token
    patch: int = 1  # cells along the side of a token; 2 in Infinity's "spatial patchify"
    image_size: int = 256
    schedule: str | Sequence[Sequence[int]] = "dynamic"  # in tokens, see `scales_of`
    decay: bool = False  # see MultiScale for this field to `flip_scales`
    detach_residual: bool = True
    drop_rate: float = 0.0
    keep_first: bool = True
    keep_last: bool = False
    flip_prob: float = 0.0
    flip_scales: int = 1
    inverse_temperature: float = 100.0  # of the entropy loss
    diversity: float = 1.0  # weight of the batch's entropy in the entropy loss
    remat: bool = False
    dtype: Dtype = jnp.float32

    last_layer = ("decoder", "conv_out")  # path of the last convolution, for GAN losses
    image_scale = 1.0  # the last convolution's output to images in [-1, 1]

    @property
    def stride(self) -> int:
        """Pixels along the side of a token."""
        return 2 ** (len(self.multipliers) - 1) * self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (h, w) of the finest scale of images of `image_size`."""
        side = self.image_size // self.stride
        return side, side

    @property
    def scales(self) -> tuple[Size, ...]:
        """Tokens (h, w) of every scale of images of `image_size`, coarse to fine."""
        return scales_of(self.schedule, self.grid)

    @property
    def bits_per_scale(self) -> tuple[int, ...]:
        """Bits of every scale of an image of `image_size`."""
        return tuple(h * w * self.bits for h, w in self.scales)

    @property
    def code_channels(self) -> int:
        """Channels of the latents; raises UserError if a token's bits do not fill its patch."""
        if self.bits % self.patch**2:
            raise UserError(f"{self.bits} bits do not fill a patch of {self.patch}x{self.patch}")
        return self.bits // self.patch**2

    def setup(self):
        codes, how = self.code_channels, (self.remat, self.dtype)
        self.encoder = ConvStack(encoder_blocks(self), codes, *how)
        self.decoder = ConvStack(decoder_blocks(self), self.channels, *how)
        self.quantizer = MultiScale(
            Spherical(self.inverse_temperature, self.diversity),
            self.decay,
            self.detach_residual,
            self.drop_rate,
            self.keep_first,
            self.keep_last,
            self.flip_prob,
            self.flip_scales,
        )

    def hidden(self, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Returns the latents of images in [-1, 1], float32, before quantisation.

        Raises UserError if the sides are not multiples of the stride.
        """
        if images.shape[1] % self.stride or images.shape[2] % self.stride:
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels do not fit a grid of "
                f"{self.stride} pixels a token: crop or resize them"
            )
        return self.encoder(images.astype(self.dtype))[0].astype(jnp.float32)

    def encode(self, images: Float[Array, "b H W 3"]) -> Bits:
        """Returns the bits of every scale, bool [b, h_s, w_s, k] each, for images in [-1, 1].

        Raises UserError if the schedule has no scales for the images' size.
        """
        z = self.hidden(images)
        return self._tokens(self.quantizer.bits(z, self._cells(z)))

    def codes(self, bits: Bits, grid: Size | None = None) -> Float[Array, "b h w c"]:
        """Returns the decoder's input: the sum of the codes of the given scales.

        `grid`, the tokens (h, w) of the whole image, defaults to those of the last scale; give it
        with the first scales only. Raises UserError if the sizes are not the first of the grid's
        schedule.
        """
        sizes = [(scale.shape[1], scale.shape[2]) for scale in bits]
        scales = scales_of(self.schedule, grid or (sizes or [self.grid])[-1])
        if not sizes or [*scales[: len(sizes)]] != sizes:
            raise UserError(
                f"bits of scales {sizes} are not the first of the schedule {list(scales)}; "
                "give `grid`, the tokens of the whole image, to decode its first scales"
            )
        p = self.patch
        cells = tuple(pixel_shuffle(x, p) for x in bits)
        return self.quantizer.codes(cells, (scales[-1][0] * p, scales[-1][1] * p))

    def decode(self, bits: Bits, grid: Size | None = None) -> Float[Array, "b H W 3"]:
        """Returns images in about [-1, 1], not clipped; `bits` and `grid` are those of `codes`."""
        return self._pixels(self.codes(bits, grid))[0]

    def __call__(
        self, images: Float[Array, "b H W 3"], *, train: bool
    ) -> tuple[Float[Array, "b H W 3"], dict[str, Any]]:
        """Returns the reconstruction, with straight-through gradients, and a dict for the losses.

        The dict holds `losses` (entropy and commitment, mean over scales), `bits` and `last_input`,
        the input of `last_layer`. With `drop_rate` or `flip_prob`, training drops scales and flips
        bits with the rng named 'bits'.
        """
        z = self.hidden(images)
        random = train and (self.drop_rate > 0 or self.flip_prob > 0)
        key = self.make_rng("bits") if random else None
        quantized = self.quantizer(z, self._cells(z), key)
        recon, last_input = self._pixels(quantized.codes)
        bits = self._tokens(quantized.bits)
        return recon, {"losses": quantized.losses, "bits": bits, "last_input": last_input}

    def _cells(self, z) -> list[Size]:
        """Returns the cells (h, w) of every scale of latents z."""
        p = self.patch
        scales = scales_of(self.schedule, (z.shape[1] // p, z.shape[2] // p))
        return [(h * p, w * p) for h, w in scales]

    def _tokens(self, cells: Bits) -> Bits:
        return tuple(pixel_unshuffle(x, self.patch) for x in cells)

    def _pixels(self, codes):
        pixels, last_input = self.decoder(codes.astype(self.dtype))
        return pixels.astype(jnp.float32), last_input


class ConvStack(nn.Module):
    """The blocks of a layout between two convolutions: the encoder or the decoder."""

    layout: list[tuple[str, int, int]]
    features: int
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> tuple[Float[Array, "b y x features"], Array]:
        """Returns the output and the input of the last convolution."""
        x = conv(self.layout[0][1], 3, "conv_in", self.dtype)(x)
        for name, _, features in self.layout:
            x = _block(name, features, self.remat, self.dtype)(x)
        x = nn.silu(group_norm("norm_out", self.dtype)(x))
        return conv(self.features, 3, "conv_out", self.dtype)(x), x


def _block(name: str, features: int, remat: bool, dtype: Dtype) -> nn.Module:
    if name.endswith("downsample"):
        return Downsample(dtype, name=name)
    if name.endswith("upsample"):
        return Upsample(dtype, name=name)
    return (nn.remat(ResBlock) if remat else ResBlock)(features, dtype, name=name)


def encoder_blocks(config: Any) -> list[tuple[str, int, int]]:
    """Returns (name, input channels, output channels) of each block of the encoder.

    `config` has the fields of BitVAE. Names end in block_N or downsample.
    """
    layout, channels = [], config.width
    for level, multiplier in enumerate(config.multipliers):
        for i in range(config.blocks):
            layout.append((f"down_{level}_block_{i}", channels, config.width * multiplier))
            channels = config.width * multiplier
        if level < len(config.multipliers) - 1:
            layout.append((f"down_{level}_downsample", channels, channels))
    return layout + [(f"mid_block_{i}", channels, channels) for i in (1, 2)]


def decoder_blocks(config: Any) -> list[tuple[str, int, int]]:
    """Returns (name, input channels, output channels) of each block of the decoder.

    A level has one residual block more than the encoder's.
    """
    channels = config.width * config.multipliers[-1]
    layout = [(f"mid_block_{i}", channels, channels) for i in (1, 2)]
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        for i in range(config.blocks + 1):
            layout.append((f"up_{level}_block_{i}", channels, config.width * multiplier))
            channels = config.width * multiplier
        if level > 0:
            layout.append((f"up_{level}_upsample", channels, channels))
    return layout
