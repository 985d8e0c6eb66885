"""DC-AE, the deep-compression autoencoder (arXiv 2410.10733; mit-han-lab/efficientvit).

Shortcuts without parameters around every down- and upsampling, between pixels and channels, make
compression by 32 to 128 times a side trainable. Latents are continuous; a `quantizer`, which the
original does not have, makes them bits.
"""

import itertools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from bitgen.errors import UserError, choose
from bitgen.nn.conv import conv
from bitgen.nn.norms import Dtype
from bitgen.nn.shuffle import average_channels, pixel_shuffle, repeat_channels, repeat_pixels
from bitgen.tokenizers.dcae_blocks import (
    ACTIVATIONS,
    BLOCKS,
    DOWN,
    HEAD_DIM,
    NORMS,
    UP,
    Stage,
    apply_stage,
    down,
    normalize,
    up,
)
from bitgen.tokenizers.latent import LatentTokenizer

_RES, _ATTENTION = ("res",) * 3, ("attention",) * 3


class DCAE(LatentTokenizer):
    """Images to latents or bits and back; see `encode`, `decode` and `__call__`.

    The defaults are the released f32c32. `encoder_*` and `decoder_*` have an entry a stage, from
    the images down, each at half the resolution of the stage before. If the first stage has no
    blocks, the first convolution halves the resolution and the last one doubles it. Raises
    UserError when first used with settings that fit no model.
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

    last_layer = ("decoder", "conv_out")  # path of the last convolution, for GAN losses

    @property
    def latents(self) -> int:
        """Channels of the latents."""
        return self.latent_channels

    @property
    def factor(self) -> int:
        """Pixels along the side of a cell."""
        return 2 ** (len(self.encoder_widths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Cells (h, w) of images of `image_size`."""
        return self.image_size // self.factor, self.image_size // self.factor

    @property
    def last_shuffle(self) -> int:
        """Factor of the pixel shuffle that follows `last_layer`."""
        return 2 if self.decoder_depths[0] == 0 and self.upsample == "shuffle" else 1

    def setup(self):
        check(self)
        self._check_quantizer()
        self.encoder = Encoder(
            stages(self, "encoder"),
            self.latent_channels,
            self.downsample,
            self.downsample_shortcut,
            self.encoder_out_shortcut,
            self.remat,
            self.dtype,
        )
        self.decoder = Decoder(
            stages(self, "decoder"),
            self.channels,
            self.upsample,
            self.upsample_shortcut,
            self.decoder_in_shortcut,
            self.decoder_out_norm,
            self.decoder_out_activation,
            self.remat,
            self.dtype,
        )

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
    """Images to latents: a convolution, stages with downsampling between, a convolution."""

    stages: tuple[Stage, ...]
    latent_channels: int
    downsample: str
    downsample_shortcut: bool
    out_shortcut: bool
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"], train: bool) -> Float[Array, "b h w latents"]:
        """Returns the latents of images in [-1, 1]."""
        x = x.astype(self.dtype)
        first, second, *_ = self.stages
        if first.depth:
            x = conv(first.width, 3, "conv_in", self.dtype)(x)
        else:
            x = down(x, second.width, self.downsample, False, "conv_in", self.dtype)
        for i, stage in enumerate(self.stages):
            if not stage.depth:
                continue
            x = apply_stage(x, f"stage_{i}", stage, train, self.remat, self.dtype)
            if i + 1 < len(self.stages):
                options = (self.downsample, self.downsample_shortcut, f"stage_{i}_down")
                x = down(x, self.stages[i + 1].width, *options, self.dtype)
        y = conv(self.latent_channels, 3, "conv_out", self.dtype)(x)
        return y + average_channels(x, self.latent_channels) if self.out_shortcut else y


class Decoder(nn.Module):
    """Latents to images: a convolution, stages with upsampling between, a convolution."""

    stages: tuple[Stage, ...]
    channels: int
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
        """Returns the images and the input of the last convolution."""
        x, width = x.astype(self.dtype), self.stages[-1].width
        y = conv(width, 3, "conv_in", self.dtype)(x)
        x = y + repeat_channels(x, width) if self.in_shortcut else y
        for i, stage in reversed(list(enumerate(self.stages))):
            if not stage.depth:
                continue
            if i + 1 < len(self.stages):
                options = (self.upsample, self.upsample_shortcut, f"stage_{i}_up")
                x = up(x, stage.width, *options, self.dtype)
            x = apply_stage(x, f"stage_{i}", stage, train, self.remat, self.dtype)
        x = normalize(self.out_norm, "norm_out", x, train)
        x = ACTIVATIONS[self.out_activation](x)
        doubles = not self.stages[0].depth  # the last convolution doubles the resolution
        shuffle = doubles and self.upsample == "shuffle"
        if doubles and not shuffle:
            x = repeat_pixels(x)
        y = conv(self.channels * (4 if shuffle else 1), 3, "conv_out", self.dtype)(x)
        return pixel_shuffle(y, 2) if shuffle else y, x


def stages(c: Any, side: str) -> tuple[Stage, ...]:
    """Returns the stages of the side 'encoder' or 'decoder' of settings with the fields of DCAE.

    Raises UserError unless the fields have as many entries.
    """
    names = ("widths", "depths", "blocks", "norms", "activations")
    widths, *others = values = [getattr(c, f"{side}_{name}") for name in names]
    for name, value in zip(names[1:], others, strict=True):
        if isinstance(value, str) or len(value) != len(widths):
            raise UserError(
                f"{side}_{name} {value!r} does not have one entry for each of the {len(widths)} "
                f"stages of {side}_widths {tuple(widths)}"
            )
    return tuple(itertools.starmap(Stage, zip(*values, strict=True)))


def check(c: Any) -> None:
    """Raises UserError unless settings with the fields of DCAE make a model."""
    choose("downsample", c.downsample, DOWN)
    choose("upsample", c.upsample, UP)
    choose("norm", c.decoder_out_norm, NORMS)
    choose("activation", c.decoder_out_activation, ACTIVATIONS)
    for side in ("encoder", "decoder"):
        _check_side(c, side)
    if len(c.encoder_widths) != len(c.decoder_widths):
        raise UserError(
            f"encoder_widths has {len(c.encoder_widths)} stages and decoder_widths "
            f"{len(c.decoder_widths)}: give both as many, or images change size"
        )
    for side, shortcut in (("encoder", c.encoder_out_shortcut), ("decoder", c.decoder_in_shortcut)):
        width = getattr(c, f"{side}_widths")[-1]
        if c.latent_channels < 1 or (shortcut and width % c.latent_channels):
            raise UserError(
                f"latent_channels {c.latent_channels} must divide the last of {side}_widths, "
                f"{width}, for the shortcut beside the latents"
            )
    if c.image_size < 1 or c.image_size % c.factor:
        raise UserError(
            f"image_size {c.image_size} is not a multiple of {c.factor}, the pixels along the side "
            f"of a cell with {len(c.encoder_widths)} stages"
        )


def _check_side(c: Any, side: str) -> None:
    parts = stages(c, side)
    widths, depths = [part.width for part in parts], [part.depth for part in parts]
    for kind, choices in (("block", BLOCKS), ("norm", NORMS), ("activation", ACTIVATIONS)):
        for part in parts:
            choose(f"{kind} of {side}_{kind}s", getattr(part, kind), choices)
    if len(parts) < 2 or depths[0] < 0 or min(depths[1:]) < 1:
        raise UserError(
            f"{side}_depths {tuple(depths)} needs two stages or more, and blocks in each but the "
            "first"
        )
    for part in parts:
        multiple = 4 if BLOCKS[part.block] is None else HEAD_DIM
        if part.depth and (part.width < 1 or part.width % multiple):
            raise UserError(
                f"{side}_widths {tuple(widths)}: {part.width} of a stage of {part.block!r} blocks "
                f"is not a multiple of {multiple}"
            )
    shortcut = c.downsample_shortcut if side == "encoder" else c.upsample_shortcut
    for narrow, wide in itertools.pairwise(widths if depths[0] else widths[1:]):
        if shortcut and (narrow * 4) % wide:
            raise UserError(
                f"{side}_widths {tuple(widths)}: the shortcut between {narrow} and {wide} channels "
                f"needs a divisor of {4 * narrow}"
            )
