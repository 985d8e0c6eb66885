"""DC-AE, the deep-compression autoencoder (arXiv 2410.10733; mit-han-lab/efficientvit).

Each halving of the resolution has a skip that moves pixels to channels and averages those, each
doubling the reverse, so that compression of 32 to 128 times a side can be trained. Latents are
continuous; with a `quantizer` they are bits, which the original does not have.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError, choose
from bitgen.nn.conv import conv
from bitgen.nn.norms import Dtype
from bitgen.nn.shuffle import average_channels, pixel_shuffle, repeat_channels
from bitgen.tokenizers.dcae_blocks import (
    ACTIVATIONS,
    BLOCKS,
    DOWN,
    HEAD_DIM,
    NORMS,
    UP,
    down,
    normalize,
    repeat_pixels,
    stage,
    up,
)
from bitgen.tokenizers.latent import LatentTokenizer

_RES, _ATTENTION = ("res",) * 3, ("attention",) * 3


class DCAE(LatentTokenizer):
    """Images to latents or bits and back; see `encode`, `decode` and `__call__`.

    The defaults are the released f32c32. `encoder_*` and `decoder_*` have an entry a stage, from
    the images down; each stage has half the resolution of the one before. A first stage without
    blocks costs nothing: the first convolution makes half the resolution at once, and the last one
    undoes it. Raises UserError, when first used, for settings that fit no model.
    """

    channels: int = 3
    image_size: int = 512
    latent_channels: int = 32
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (0, 4, 8, 2, 2, 2)
    encoder_blocks: tuple[str, ...] = _RES + _ATTENTION
    encoder_norms: tuple[str, ...] = ("rms",) * 6
    encoder_activations: tuple[str, ...] = ("silu",) * 6
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_depths: tuple[int, ...] = (0, 5, 10, 2, 2, 2)
    decoder_blocks: tuple[str, ...] = _RES + _ATTENTION
    decoder_norms: tuple[str, ...] = ("batch",) * 3 + ("rms",) * 3
    decoder_activations: tuple[str, ...] = ("relu",) * 3 + ("silu",) * 3
    downsample: str = "unshuffle"  # or conv
    upsample: str = "shuffle"  # or interpolate
    downsample_shortcut: bool = True
    upsample_shortcut: bool = True
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_out_norm: str = "rms"
    decoder_out_activation: str = "relu"
    remat: bool = False
    dtype: Dtype = jnp.float32

    @property
    def latents(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    @property
    def factor(self) -> int:
        """Pixels of a cell's side."""
        return 2 ** (len(self.encoder_widths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Cells of the grid for square images of `image_size`."""
        return self.image_size // self.factor, self.image_size // self.factor

    @property
    def last_layer(self) -> tuple[str, ...]:
        """Path of the convolution that makes the pixels, where GAN losses are balanced."""
        return "decoder", "conv_out"

    @property
    def last_shuffle(self) -> int:
        """Pixels a side that `last_layer` makes at once, as channels that are then shuffled."""
        return 2 if self.decoder_depths[0] == 0 and self.upsample == "shuffle" else 1

    def setup(self):
        check(self)
        self._check_quantizer()
        self.encoder = Encoder(**_fields(self, Encoder, "encoder_"))
        self.decoder = Decoder(**_fields(self, Decoder, "decoder_"))

    def _latents(self, images: Array, train: bool) -> Float[Array, "b h w c"]:
        if images.shape[1] % self.factor or images.shape[2] % self.factor:
            raise UserError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels do not divide into cells of "
                f"{self.factor}x{self.factor}: resize them"
            )
        return self.encoder(images, train).astype(jnp.float32)

    def _pixels(self, values: Array, train: bool) -> tuple[Array, Array]:
        images, last_input = self.decoder(values, train)
        return images.astype(jnp.float32), last_input


class Encoder(nn.Module):
    """Images to latents: a convolution, the stages with a halving after each, a convolution."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    latent_channels: int
    downsample: str
    downsample_shortcut: bool
    out_shortcut: bool
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"], train: bool) -> Float[Array, "b h w latents"]:
        """Returns the latents of images in [-1, 1]."""
        last = len(self.widths) - 1
        x = x.astype(self.dtype)
        if self.depths[0]:
            x = conv(self.widths[0], 3, "conv_in", self.dtype)(x)
        else:
            x = down(x, self.widths[1], self.downsample, False, "conv_in", self.dtype)
        for i, depth in enumerate(self.depths):
            if depth:
                kind = (depth, self.blocks[i], self.norms[i], self.activations[i])
                x = stage(x, f"stage_{i}", *kind, train, self.remat, self.dtype)
            if depth and i < last:
                options = (self.downsample, self.downsample_shortcut, f"stage_{i}_down")
                x = down(x, self.widths[i + 1], *options, self.dtype)
        y = conv(self.latent_channels, 3, "conv_out", self.dtype)(x)
        return y + average_channels(x, self.latent_channels) if self.out_shortcut else y


class Decoder(nn.Module):
    """Latents to images: a convolution, the stages with a doubling before each, a convolution."""

    channels: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    blocks: tuple[str, ...]
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    upsample: str
    upsample_shortcut: bool
    in_shortcut: bool
    out_norm: str
    out_activation: str
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w latents"], train: bool
    ) -> tuple[Float[Array, "b H W c"], Array]:
        """Returns the images and the activation that enters the last convolution."""
        last = len(self.widths) - 1
        x = x.astype(self.dtype)
        y = conv(self.widths[last], 3, "conv_in", self.dtype)(x)
        x = y + repeat_channels(x, self.widths[last]) if self.in_shortcut else y
        for i in range(last, -1, -1):
            depth = self.depths[i]
            if depth and i < last:
                options = (self.upsample, self.upsample_shortcut, f"stage_{i}_up")
                x = up(x, self.widths[i], *options, self.dtype)
            if depth:
                kind = (depth, self.blocks[i], self.norms[i], self.activations[i])
                x = stage(x, f"stage_{i}", *kind, train, self.remat, self.dtype)
        x = normalize(self.out_norm, "norm_out", x, train)
        x = ACTIVATIONS[self.out_activation](x)
        whole = bool(self.depths[0])  # else the last convolution doubles the resolution too
        shuffle = not whole and self.upsample == "shuffle"
        if not whole and not shuffle:
            x = repeat_pixels(x)
        y = conv(self.channels * (4 if shuffle else 1), 3, "conv_out", self.dtype)(x)
        return pixel_shuffle(y, 2) if shuffle else y, x


def _fields(module: DCAE, part: type[nn.Module], prefix: str) -> dict[str, Any]:
    """The settings that a part has, under its own names."""
    names = [name for name in part.__dataclass_fields__ if name not in ("parent", "name")]
    return {n: getattr(module, prefix + n, getattr(module, n, None)) for n in names}


def check(c: Any) -> None:
    """Raises UserError unless the settings `c`, with the fields of DCAE, make a model."""
    choose("downsample", c.downsample, DOWN)
    choose("upsample", c.upsample, UP)
    choose("norm", c.decoder_out_norm, NORMS)
    choose("activation", c.decoder_out_activation, ACTIVATIONS)
    for side in ("encoder", "decoder"):
        _check_side(c, side)
    if len(c.encoder_widths) != len(c.decoder_widths):
        raise UserError(
            f"encoder_widths has {len(c.encoder_widths)} stages and decoder_widths "
            f"{len(c.decoder_widths)}: give both as many, or images change their size"
        )
    for side, shortcut in (("encoder", c.encoder_out_shortcut), ("decoder", c.decoder_in_shortcut)):
        width = getattr(c, f"{side}_widths")[-1]
        if c.latent_channels < 1 or (shortcut and width % c.latent_channels):
            raise UserError(
                f"latent_channels {c.latent_channels} must divide the last of {side}_widths, "
                f"{width}, for the shortcut beside the latents"
            )
    if c.image_size < 1 or c.image_size % 2 ** (len(c.encoder_widths) - 1):
        raise UserError(
            f"image_size {c.image_size} is no multiple of {2 ** (len(c.encoder_widths) - 1)}, "
            f"what {len(c.encoder_widths)} stages make one cell of"
        )


def _check_side(c: Any, side: str) -> None:
    widths, depths, blocks, norms, activations = (
        getattr(c, f"{side}_{name}")
        for name in ("widths", "depths", "blocks", "norms", "activations")
    )
    for name in ("depths", "blocks", "norms", "activations"):
        value = getattr(c, f"{side}_{name}")
        if isinstance(value, str) or len(value) != len(widths):
            raise UserError(
                f"{side}_{name} {value!r} does not have one entry for each of the {len(widths)} "
                f"stages of {side}_widths {tuple(widths)}"
            )
    for kind, values, choices in (
        ("block", blocks, BLOCKS),
        ("norm", norms, NORMS),
        ("activation", activations, ACTIVATIONS),
    ):
        for value in values:
            choose(f"{kind} of {side}_{kind}s", value, choices)
    if len(widths) < 2 or depths[0] < 0 or min(depths[1:]) < 1:
        raise UserError(
            f"{side}_depths {tuple(depths)} needs two stages or more, and blocks in each but the "
            "first"
        )
    for width, depth, block in zip(widths, depths, blocks, strict=True):
        multiple = 4 if BLOCKS[block] is None else HEAD_DIM
        if depth and (width < 1 or width % multiple):
            raise UserError(
                f"{side}_widths {tuple(widths)}: {width} of a stage of {block!r} blocks is no "
                f"multiple of {multiple}"
            )
    first = 0 if depths[0] else 1
    shortcut = c.downsample_shortcut if side == "encoder" else c.upsample_shortcut
    for narrow, wide in zip(widths[first:], widths[first + 1 :], strict=False):
        if shortcut and (narrow * 4) % wide:
            raise UserError(
                f"{side}_widths {tuple(widths)}: the shortcut between {narrow} and {wide} channels "
                f"needs a divisor of {4 * narrow}"
            )
