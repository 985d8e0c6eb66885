"""Conversion table of BitDance's autoencoder.

Released files hold `{"state_dict": ...}`: the names of the model, and maybe what only its training
used, which the authors' loader skips.
"""

import re
from collections.abc import Mapping
from typing import Any

from bitgen.convert.entries import (
    CONV,
    POINTWISE,
    Entry,
    Ignore,
    Rule,
    Shape,
    conv,
    count_numbered,
    dense,
    norm,
    renamed,
    shape_votes,
    weights,
)
from bitgen.errors import UserError
from bitgen.tokenizers.gfq_ae import GFQAutoencoder

_REFERENCE_NAMES = {
    "in_channels": "channels",
    "ch": "width",
    "ch_mult": "multipliers",
    "num_res_blocks": "blocks",
    "z_channels": "bits",
    "num_codebooks": "groups",
    "gan_decoder": "noise_decoder",
}
# Neither a tensor nor a setting that the original reads tells the size of the images.
_IMAGE_SIZE = 256
_GROUP = 8  # bits of a group in the released file
# Training code of this lineage (Open-MAGVIT2) saves the whole GAN, and averaged weights.
_TRAINING_ONLY = (
    Ignore("loss.{name*}", "discriminator and perceptual network of the authors' training"),
    Ignore("model_ema.{name*}", "averages of the authors' training, which their loader skips too"),
)


def hparams_from_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns GFQAutoencoder's settings from the original's hyper-parameters.

    Raises UserError for images of other channels in than out.
    """
    channels = reference.get("in_channels", 3)
    if reference.get("out_ch", channels) != channels:
        raise UserError(
            f"in_channels {channels} and out_ch {reference['out_ch']} cannot be imported, they "
            "must be equal"
        )
    defaults = {
        "channels": channels,
        "groups": 1,
        "image_size": _IMAGE_SIZE,
        "noise_decoder": False,
    }
    return {**defaults, **renamed(reference, _REFERENCE_NAMES)}


def table(hparams: Mapping[str, Any]) -> list[Entry]:
    """Returns the entries between a PyTorch file and the parameters of GFQAutoencoder.

    `hparams` are its settings.
    """
    config = GFQAutoencoder(**hparams)
    widths = [config.width * multiplier for multiplier in config.multipliers]
    last = len(widths) - 1
    entries: list[Entry] = [Rule("encoder.conv_in.weight", "encoder/conv_in/kernel", CONV)]
    for level, (inputs, outputs) in enumerate(zip([config.width, *widths], widths, strict=False)):
        torch, ours = f"encoder.down.{level}", f"encoder/down_{level}"
        entries += _blocks(f"{torch}.block", ours, config.blocks, inputs, outputs)
        if level < last:
            entries += conv(f"{torch}.downsample", f"encoder/downsample_{level}")
    for side in ("encoder", "decoder"):
        torch, ours = f"{side}.mid_block", f"{side}/mid"
        entries += _blocks(torch, ours, config.blocks, widths[-1], widths[-1])
        entries += norm(f"{side}.norm_out", f"{side}/norm_out")
    entries += weights("encoder.conv_out", "encoder/conv_out", POINTWISE)
    entries += conv("decoder.conv_in", "decoder/conv_in")
    for level, (inputs, outputs) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
        torch, ours = f"decoder.up.{level}", f"decoder/up_{level}"
        entries += _blocks(f"{torch}.block", ours, config.blocks, inputs, outputs)
        for name in ("gamma", "beta"):
            entries += dense(f"decoder.adaptive.{level}.{name}", f"decoder/adaptive_{level}/{name}")
        if level > 0:
            entries += conv(f"{torch}.upsample.conv1", f"decoder/upsample_{level}")
    return [*entries, *conv("decoder.conv_out", "conv_out"), *_TRAINING_ONLY]


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Returns GFQAutoencoder's settings from a file's names and shapes, or None if it has none.

    What no shape tells is assumed: images of 256 pixels, and the fewest groups of at most 8 bits,
    as in the released file.
    """
    adaptive = r"decoder\.adaptive\.\d+\.(gamma|beta)"
    if not any(re.fullmatch(rf"{adaptive}\.(weight|bias)", name) for name in shapes):
        return None
    levels = count_numbered(shapes, r"(?:encoder\.down|decoder\.up)\.(\d+)\..+")
    blocks = count_numbered(
        shapes, r"(?:encoder|decoder)\.(?:mid_block|(?:down|up)\.\d+\.block)\.(\d+)\..+"
    )
    bits = shape_votes(shapes, rf"{adaptive}\.weight", 1)
    first = r"encoder\.(conv_in\.weight|down\.0\.block\.0\.norm1\.(weight|bias))"
    width = shape_votes(shapes, first, 0)
    if not (levels and blocks and bits and width):
        return None
    multipliers = []
    for level in range(levels):
        block = rf"encoder\.down\.{level}\.block\.\d+\.(norm2\.(weight|bias)|conv[12]\.weight)"
        multipliers.append((shape_votes(shapes, block, 0) or 0) // width)
    code = shape_votes(shapes, r"decoder\.conv_in\.weight", 1, bits)
    return {
        "channels": shape_votes(shapes, r"decoder\.conv_out\.(weight|bias)", 0, 3),
        "width": width,
        "multipliers": tuple(multipliers),
        "blocks": blocks,
        "bits": bits,
        "groups": next(n for n in range(1, bits + 1) if bits % n == 0 and bits <= n * _GROUP),
        "image_size": _IMAGE_SIZE,
        "noise_decoder": code == 2 * bits,
    }


def _blocks(torch: str, ours: str, count: int, inputs: int, outputs: int) -> list[Entry]:
    """The residual blocks of one level, of which the first may change the width."""
    entries: list[Entry] = []
    for i in range(count):
        theirs, place = f"{torch}.{i}", f"{ours}_{i}"
        for j in (1, 2):
            entries += norm(f"{theirs}.norm{j}", f"{place}/norm{j}")
            entries.append(Rule(f"{theirs}.conv{j}.weight", f"{place}/conv{j}/kernel", CONV))
        if i == 0 and inputs != outputs:
            name = f"{theirs}.nin_shortcut.weight"
            entries.append(Rule(name, f"{place}/conv_out/kernel", POINTWISE))
    return entries
