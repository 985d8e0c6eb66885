"""BitVAE, Infinity's tokenizer (FoundationVision/BitVAE, arXiv 2412.04431).

A convolutional autoencoder without attention; its latents are quantised to points of a sphere at
many scales, coarse to fine, each of what the scales before it left.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError
from bitgen.nn.conv import Downsample, ResBlock, Upsample, conv
from bitgen.nn.norms import Dtype, group_norm
from bitgen.tokenizers.multiscale import Bits, MultiScale, Size, scales_of
from bitgen.tokenizers.quantizers import Spherical


class BitVAE(nn.Module):
    """Images to a tuple of bits, one array a scale, and back; see `encode` and `decode`.

    A token of a scale is a cell of its grid, or a patch of `patch` x `patch` cells. Images need not
    be of `image_size`: any size will do whose grid the schedule has.
    """

    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    blocks: int = 2
    bits: int = 32  # of a token
    patch: int = 1  # cells along the side of a token; 2 in Infinity's "spatial patchify"
    image_size: int = 256
    schedule: str | Sequence[Sequence[int]] = "dynamic"  # see `scales_of`; in tokens
    decay: bool = False  # these to `flip_scales`: see MultiScale
    detach_residual: bool = True
    drop_rate: float = 0.0
    keep_first: bool = True
    keep_last: bool = False
    flip_prob: float = 0.0
    flip_scales: int = 1
    inverse_temperature: float = 100.0  # of the entropy loss
    diversity: float = 1.0  # weight of the batch's entropy in it
    remat: bool = False
    dtype: Dtype = jnp.float32

    @property
    def stride(self) -> int:
        """Pixels along the side of a token."""
        return 2 ** (len(self.multipliers) - 1) * self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of the finest scale for square images of `image_size`."""
        side = self.image_size // self.stride
        return side, side

    @property
    def scales(self) -> tuple[Size, ...]:
        """Tokens (h, w) of every scale for square images of `image_size`, coarse to fine."""
        return scales_of(self.schedule, self.grid)

    @property
    def bits_per_scale(self) -> tuple[int, ...]:
        """Bits of every scale of an image of `image_size`."""
        return tuple(h * w * self.bits for h, w in self.scales)

    @property
    def last_layer(self) -> tuple[str, ...]:
        """Path of the convolution that makes the pixels, where GAN losses are balanced."""
        return "decoder", "conv_out"

    @property
    def image_scale(self) -> float:
        """What the last convolution's output is multiplied by to be pixels in [-1, 1]."""
        return 1.0

    @property
    def code_channels(self) -> int:
        """Bits of a cell of the latents; raises UserError if a token's do not fill its patch."""
        if self.bits % self.patch**2:
            raise UserError(f"{self.bits} bits do not fill a patch of {self.patch}x{self.patch}")
        return self.bits // self.patch**2

    def setup(self):
        self.encoder = Encoder(
            encoder_blocks(self), self.width, self.code_channels, self.remat, self.dtype
        )
        self.decoder = Decoder(decoder_blocks(self), self.channels, self.remat, self.dtype)
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

        Raises UserError if the sides are no multiple of the stride.
        """
        if images.shape[1] % self.stride or images.shape[2] % self.stride:
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels do not fit a grid of "
                f"{self.stride} pixels a token: crop or resize them"
            )
        return self.encoder(images.astype(self.dtype)).astype(jnp.float32)

    def encode(self, images: Float[Array, "b H W 3"]) -> Bits:
        """Returns the bits of every scale, bool [b, h_s, w_s, k] each, for images in [-1, 1].

        Raises UserError if the schedule has no scales for the images' size.
        """
        z = self.hidden(images)
        return self._tokens(self.quantizer.bits(z, self._cells(z)))

    def codes(self, bits: Bits, grid: Size | None = None) -> Float[Array, "b h w c"]:
        """Returns the sum of the codes of the scales given, which the decoder reads.

        `grid` has the tokens of the whole image, by default those of the last scale given; it is
        needed where only the first scales of a schedule are. Raises UserError if the sizes are not
        the first of the grid's schedule.
        """
        sizes = [(scale.shape[1], scale.shape[2]) for scale in bits]
        scales = scales_of(self.schedule, grid or (sizes or [self.grid])[-1])
        if not sizes or [*scales[: len(sizes)]] != sizes:
            raise UserError(
                f"bits of scales {sizes} are not the first of the schedule {list(scales)}; "
                "give `grid`, the tokens of the whole image, to decode its first scales"
            )
        p = self.patch
        cells = tuple(
            rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=p, j=p) for x in bits
        )  # PyTorch's pixel shuffle
        return self.quantizer.codes(cells, (scales[-1][0] * p, scales[-1][1] * p))

    def decode(self, bits: Bits, grid: Size | None = None) -> Float[Array, "b H W 3"]:
        """Returns images in about [-1, 1], not clipped, from all scales or, with `grid`, the first.

        See `codes`.
        """
        return self._pixels(self.codes(bits, grid))[0]

    def __call__(
        self, images: Float[Array, "b H W 3"], *, train: bool
    ) -> tuple[Float[Array, "b H W 3"], dict[str, Any]]:
        """Returns the reconstruction and what the losses need, gradients straight through the bits.

        The second value holds `losses` (entropy and commitment, mean over scales), `bits` and
        `last_input`, the activation that enters `last_layer`. In training, scales are dropped and
        bits flipped with the rng named 'bits', if the settings say so.
        """
        z = self.hidden(images)
        random = train and (self.drop_rate > 0 or self.flip_prob > 0)
        key = self.make_rng("bits") if random else None
        quantized = self.quantizer(z, self._cells(z), key)
        recon, last_input = self._pixels(quantized.codes)
        bits = self._tokens(quantized.bits)
        return recon, {"losses": quantized.losses, "bits": bits, "last_input": last_input}

    def _cells(self, z) -> list[Size]:
        """Cells (h, w) of every scale of the latents z."""
        p = self.patch
        scales = scales_of(self.schedule, (z.shape[1] // p, z.shape[2] // p))
        return [(h * p, w * p) for h, w in scales]

    def _tokens(self, cells: Bits) -> Bits:
        p = self.patch
        return tuple(
            rearrange(x, "b (h i) (w j) c -> b h w (c i j)", i=p, j=p) for x in cells
        )  # PyTorch's pixel unshuffle

    def _pixels(self, codes):
        """-> images [b,H,W,3] and the activation that enters the last convolution."""
        pixels, last_input = self.decoder(codes.astype(self.dtype))
        return pixels.astype(jnp.float32), last_input


class Encoder(nn.Module):
    """Residual blocks, halved in between: [b,H,W,3] -> [b,h,w,codes]."""

    layout: list[tuple[str, int, int]]
    width: int
    codes: int
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w codes"]:
        """Returns the latents."""
        x = conv(self.width, 3, "conv_in", self.dtype)(x)
        for name, _, features in self.layout:
            x = _block(name, features, self.remat, self.dtype)(x)
        x = nn.silu(group_norm("norm_out", self.dtype)(x))
        return conv(self.codes, 3, "conv_out", self.dtype)(x)


class Decoder(nn.Module):
    """Residual blocks, doubled in between: [b,h,w,codes] -> [b,H,W,3]."""

    layout: list[tuple[str, int, int]]
    channels: int
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w codes"]
    ) -> tuple[Float[Array, "b H W 3"], Float[Array, "b H W w0"]]:
        """Returns the pixels, and the activation that the last convolution makes them of."""
        x = conv(self.layout[0][1], 3, "conv_in", self.dtype)(x)
        for name, _, features in self.layout:
            x = _block(name, features, self.remat, self.dtype)(x)
        x = nn.silu(group_norm("norm_out", self.dtype)(x))
        return conv(self.channels, 3, "conv_out", self.dtype)(x), x


def _block(name: str, features: int, remat: bool, dtype: Dtype) -> nn.Module:
    if name.endswith("downsample"):
        return Downsample(dtype, name=name)
    if name.endswith("upsample"):
        return Upsample(dtype, name=name)
    return (nn.remat(ResBlock) if remat else ResBlock)(features, dtype, name=name)


def encoder_blocks(config: Any) -> list[tuple[str, int, int]]:
    """Returns (name, input channels, output channels) of each block between the convolutions.

    `config` is anything with the fields of BitVAE. A name ends in block_N or downsample.
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
    """Returns (name, input channels, output channels) of each block, as `encoder_blocks` does.

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
