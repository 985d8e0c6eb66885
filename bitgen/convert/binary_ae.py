"""Conversion table of the binary autoencoder of Binary Latent Diffusion and BiGR.

Released files hold a state dict of the whole GAN: `ae.*`, `disc.*`, `perceptual.*`. Files of the
autoencoder alone have the names without `ae.`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitgen.convert import patchgan
from bitgen.convert.entries import (
    POINTWISE,
    Carry,
    Entry,
    Ignore,
    Rule,
    Shape,
    conv,
    norm,
    renamed,
    shape_votes,
    weights,
)
from bitgen.errors import UserError
from bitgen.tokenizers.binary_ae import BinaryAutoencoder, decoder_layout, encoder_layout

_REFERENCE_NAMES = {
    "n_channels": "channels",
    "nf": "width",
    "ch_mult": "multipliers",
    "res_blocks": "blocks",
    "codebook_size": "bits",
    "emb_dim": "embed_dim",
    "img_size": "image_size",
    "attn_resolutions": "attention_resolutions",
    "gen_mul": "decoder_multiplier",
    "norm_first": "norm_first",
    "deterministic": "deterministic",
    "use_tanh": "signed",
}
_BLOCK = re.compile(r"(?P<prefix>.*?)(?P<side>encoder|generator)\.blocks\.(?P<index>\d+)\..+")


def hparams_from_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns BinaryAutoencoder's settings from the original's hyper-parameters.

    Raises UserError for a quantizer other than 'binary'.
    """
    quantizer = reference.get("quantizer", "binary")
    if quantizer != "binary":
        raise UserError(f"quantizer {quantizer!r} cannot be imported, only 'binary'")
    # The original's default, where ours is that of the released files.
    return {"norm_first": False, **renamed(reference, _REFERENCE_NAMES)}


def table(
    hparams: Mapping[str, Any],
    prefix: str = "ae.",
    discriminator: Mapping[str, Any] | None = None,
) -> list[Entry]:
    """Returns the entries between a PyTorch file and the parameters of BinaryAutoencoder.

    `hparams` are its settings, `prefix` stands before the autoencoder's names, and `discriminator`
    has the settings of the file's PatchDiscriminator, if any, which is carried along. `wrapping`
    finds both.
    """
    config = BinaryAutoencoder(**hparams)
    entries: list[Entry] = []
    for theirs, ours, layout in (
        ("encoder", "encoder", encoder_layout(config)),
        ("generator", "decoder", decoder_layout(config)),
    ):
        for i, block in enumerate(layout):
            entries += _block(*block, f"{prefix}{theirs}.blocks.{i}", f"{ours}/blocks_{i}")
    entries += [
        *weights(f"{prefix}quantize.proj.0", "quantizer/proj", POINTWISE),
        Rule(f"{prefix}quantize.embed.weight", "quantizer/embedding"),
        *_log_sigma(f"{prefix}generator.logsigma", config),
    ]
    if prefix.endswith("ae."):
        gan = prefix.removesuffix("ae.")
        reason = "VGG16 of the perceptual loss, a fixed network with a file of its own"
        entries.append(Ignore(f"{gan}perceptual.{{name*}}", reason))
        if discriminator is not None:
            entries += patchgan.carried(discriminator, f"{gan}disc.")
    return entries


def wrapping(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns what `table` needs besides the settings: prefix and discriminator."""
    blocks = (_BLOCK.fullmatch(name) for name in shapes)
    prefix = next((block["prefix"] for block in blocks if block), "ae.")
    gan = prefix.removesuffix("ae.")
    return {"prefix": prefix, "discriminator": patchgan.recognise(shapes, f"{gan}disc.")}


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Returns BinaryAutoencoder's settings from a file's names and shapes, or None if it has none.

    What no shape tells is assumed. Attention is at 16x16, so that attention inside a level gives
    the image size; without it, the smallest map is taken to be 32x32, as in BiGR's model for 512
    pixels. `deterministic` and `signed` are false, as in all released files.
    """
    prefix = wrapping(shapes)["prefix"]
    shapes = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    encoder, decoder = _kinds(shapes, "encoder"), _kinds(shapes, "generator")
    bits = shape_votes(shapes, r"quantize\.(embed\.weight|proj\.0\.(weight|bias))", 0)
    width = shape_votes(shapes, r"encoder\.blocks\.0\.(weight|bias)", 0)
    embed_dim = shape_votes(shapes, rf"encoder\.blocks\.{len(encoder) - 1}\.(weight|bias)", 0)
    if not encoder or not decoder or not width or bits is None or embed_dim is None:
        return None

    levels, multipliers, start = encoder.split("c"), [], 0
    for level in levels:
        block = rf"encoder\.blocks\.{start + level.find('r')}\.(conv2|norm2)\.bias"
        multipliers.append((shape_votes(shapes, block, 0) or 0) // width)
        start += len(level) + 1
    levels[-1] = levels[-1].rstrip(".").removesuffix("rar")  # in the middle of the model
    blocks, decoder_blocks = levels[0].count("r"), (decoder.count("r") - 2) // len(levels)
    # The first level with attention, if any, has a map of 16x16.
    attended = [i for i, level in enumerate(levels) if "a" in level]
    image_size = 16 * 2 ** attended[-1] if attended else 32 * 2 ** (len(levels) - 1)
    hparams = {
        "channels": shape_votes(shapes, r"encoder\.blocks\.0\.weight", 1, 3),
        "width": width,
        "multipliers": tuple(multipliers),
        "blocks": blocks,
        "bits": bits,
        "embed_dim": embed_dim,
        "image_size": image_size,
        "attention_resolutions": tuple(image_size // 2**i for i in attended) or (16,),
        "decoder_multiplier": _multiplier(blocks, decoder_blocks),
        "norm_first": decoder.find("r") == 2,
        "deterministic": False,
        "signed": False,
    }
    config = BinaryAutoencoder(**hparams)
    letters = {"res": "r", "attn": "a", "down": "c", "up": "c", "norm": ".", "conv": "."}
    for found, layout in ((encoder, encoder_layout(config)), (decoder, decoder_layout(config))):
        if found != "".join(letters[kind] for kind, _, _ in layout):
            return None
    return hparams


def _block(kind: str, inputs: int, outputs: int, torch: str, ours: str) -> list[Entry]:
    if kind == "norm":
        return norm(torch, ours)
    if kind == "conv":
        return conv(torch, ours)
    if kind in ("down", "up"):
        return conv(f"{torch}.conv", f"{ours}/conv")
    if kind == "attn":
        entries = norm(f"{torch}.norm", f"{ours}/norm")
        for name in ("q", "k", "v", "proj_out"):
            entries += weights(f"{torch}.{name}", f"{ours}/{name}", POINTWISE)
        return entries
    entries = []
    for i in (1, 2):
        entries += norm(f"{torch}.norm{i}", f"{ours}/norm{i}")
        entries += conv(f"{torch}.conv{i}", f"{ours}/conv{i}")
    if inputs != outputs:
        return [*entries, *weights(f"{torch}.conv_out", f"{ours}/conv_out", POINTWISE)]
    reason = "projection of a skip whose width does not change, used by no computation"
    shapes = {"weight": (outputs, inputs, 1, 1), "bias": (outputs,)}
    return [*entries, *_unused(f"{torch}.conv_out", reason, shapes)]


def _unused(torch: str, reason: str, shapes: Mapping[str, Shape]) -> list[Entry]:
    return [Carry(f"{torch}.{name}", reason, shape, np.float32) for name, shape in shapes.items()]


def _log_sigma(torch: str, config: BinaryAutoencoder) -> list[Entry]:
    reason = "noise level for a likelihood bound, used by no computation"
    width, channels = config.width * config.multipliers[0], config.channels
    shapes = {
        "0.weight": (width, width, 3, 3),
        "0.bias": (width,),
        "2.weight": (channels, width, 1, 1),
        "2.bias": (channels,),
    }
    return _unused(torch, reason, shapes)


def _kinds(shapes: Mapping[str, Shape], side: str) -> str:
    """Returns a letter per block: r residual, a attention, c resampling, or a dot for others."""
    tensors: dict[int, set[str]] = {}
    for name in shapes:
        if (found := _BLOCK.fullmatch(name)) and found["side"] == side and not found["prefix"]:
            tensors.setdefault(int(found["index"]), set()).add(name.split(".")[3])
    kinds = ""
    for i in range(max(tensors, default=-1) + 1):
        parts = tensors.get(i, set())
        if parts & {"conv1", "conv2", "norm1", "norm2", "conv_out"}:
            kinds += "r"
        elif parts & {"q", "k", "v", "proj_out"}:
            kinds += "a"
        else:
            kinds += "c" if "conv" in parts else "."
    return kinds


def _multiplier(blocks: int, decoder_blocks: int) -> float:
    """Returns the factor with which int(blocks * factor) gives the decoder's blocks."""
    factor = decoder_blocks / max(blocks, 1)
    return factor if int(blocks * factor) == decoder_blocks else math.nextafter(factor, math.inf)
