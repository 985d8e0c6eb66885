"""Conversion table of BitVAE, Infinity's tokenizer.

Released files are {"vae": state dict}. Names of convolutions and norms are `conv1.conv.weight` and
`norm1.norm.weight`, or plain `conv1.weight` and `norm1.weight`. Both are read, and written back as
they were.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitgen.convert.entries import (
    POINTWISE,
    Constant,
    Entry,
    Ignore,
    Rule,
    Shape,
    conv,
    count_numbered,
    norm,
    renamed,
    shape_votes,
    weights,
)
from bitgen.errors import UserError
from bitgen.tokenizers.bitvae import BitVAE, decoder_blocks, encoder_blocks

_REFERENCE_NAMES = {
    "base_ch": "width",
    "ch_mult": "multipliers",
    "num_res_blocks": "blocks",
    "schedule_mode": "schedule",
    "use_decay_factor": "decay",
}
# Settings that would change the tensors or their meaning; no released file has them.
_UNSUPPORTED = {
    "use_vae": False,
    "ln_before_quant": False,
    "use_out_phi": False,
    "use_out_phi_res": False,
    "preserve_norm": False,
    "use_pxsf": False,
    "cnn_type": "2d",
    "cnn_attention": "no",
    "norm_type": "group",
}
_TRAINING_ONLY = {
    "flux_image_encoder": "frozen network of a training loss",
    "perceptual_model": "frozen network of the perceptual loss",
    "image_disc": "discriminator, in a file of its own when released",
    "video_disc": "discriminator for videos",
}
# Endings of names of convolutions and norms that have the additional level.
_LEVELS = {
    "conv_level": re.compile(r"((?:.*\.)?(?:conv\w*|nin_shortcut))\.conv\.(weight|bias)"),
    "norm_level": re.compile(r"((?:.*\.)?norm\w*)\.norm\.(weight|bias)"),
}


def hparams_from_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns BitVAE's settings from the original's arguments.

    A stride of 8 stands for Infinity's spatial patchify, where 2x2 cells make a token. Raises
    UserError for settings that cannot be imported.
    """
    for name, needed in _UNSUPPORTED.items():
        if reference.get(name, needed) != needed:
            raise UserError(f"{name}={reference[name]!r} cannot be imported, only {needed!r}")
    multipliers = reference.get("encoder_ch_mult", reference.get("ch_mult", (1, 2, 4, 4, 4)))
    stride = reference.get("patch_size", 16)
    if tuple(reference.get("decoder_ch_mult", multipliers)) != tuple(multipliers):
        raise UserError("encoder_ch_mult and decoder_ch_mult differ: this cannot be imported")
    if stride != 2 ** (len(multipliers) - 1):
        raise UserError(
            f"patch_size {stride} with {len(multipliers)} levels cannot be imported, only "
            f"{2 ** (len(multipliers) - 1)}"
        )
    found = renamed({**reference, "ch_mult": multipliers}, _REFERENCE_NAMES)
    return {**found, **_patches(reference["codebook_dim"], stride)}


def table(
    hparams: Mapping[str, Any], conv_level: bool = True, norm_level: bool = True
) -> list[Entry]:
    """Returns the entries between a PyTorch file and the parameters of BitVAE.

    `hparams` are its settings. `conv_level` and `norm_level` say whether names of convolutions and
    norms have the level `.conv` and `.norm`; `wrapping` finds both.
    """
    config = BitVAE(**hparams)
    # The level of names in convolutions and in norms.
    c, n = ".conv" if conv_level else "", ".norm" if norm_level else ""
    entries: list[Entry] = []
    for side, blocks in (("encoder", encoder_blocks(config)), ("decoder", decoder_blocks(config))):
        for name in ("conv_in", "conv_out"):
            entries += conv(f"{side}.{name}{c}", f"{side}/{name}")
        entries += norm(f"{side}.norm_out{n}", f"{side}/norm_out")
        for block, inputs, outputs in blocks:
            torch, ours = f"{side}.{_torch_name(block)}", f"{side}/{block}"
            if block.endswith("sample"):
                entries += conv(f"{torch}.conv{c}", f"{ours}/conv")
                continue
            for i in (1, 2):
                entries += norm(f"{torch}.norm{i}{n}", f"{ours}/norm{i}")
                entries += conv(f"{torch}.conv{i}{c}", f"{ours}/conv{i}")
            if inputs != outputs:
                entries += weights(f"{torch}.nin_shortcut{c}", f"{ours}/conv_out", POINTWISE)
    # One module under two names, with the place values of the bits in a number.
    for name in ("quantizer", "quantize"):
        size = (config.code_channels,)
        entries.append(Constant(f"{name}.lfq.mask", _place_values, size))
    entries += [Ignore(f"{name}.{{name*}}", reason) for name, reason in _TRAINING_ONLY.items()]
    return entries


def wrapping(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns what `table` needs besides the settings: the form of the names."""
    return {key: any(map(level.fullmatch, shapes)) for key, level in _LEVELS.items()}


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Returns BitVAE's settings from a file's names and shapes, or None if it has none.

    What no tensor tells is assumed: the schedule is 'dynamic', as in all of Infinity, and a stride
    of 8 means patches of 2x2 cells.
    """
    shapes = {_plain(name): tuple(shape) for name, shape in shapes.items()}
    width = shape_votes(shapes, r"encoder\.conv_in\.(weight|bias)", 0)
    channels = shape_votes(shapes, r"encoder\.conv_out\.(weight|bias)", 0)
    levels = count_numbered(shapes, r"encoder\.down\.(\d+)\..+")
    blocks = count_numbered(shapes, r"encoder\.down\.\d+\.block\.(\d+)\..+")
    if not width or not channels or not levels or not blocks:
        return None
    multipliers = tuple(
        (shape_votes(shapes, rf"encoder\.down\.{i}\.block\.\d+\.(conv|norm)2\.bias", 0) or 0)
        // width
        for i in range(levels)
    )
    if not all(multipliers):
        return None
    hparams = {
        "width": width,
        "multipliers": multipliers,
        "blocks": blocks,
        "schedule": "dynamic",
        **_patches(channels, 2 ** (levels - 1)),
    }
    rules = [e.torch for e in table(hparams, False, False) if isinstance(e, Rule)]
    missing = sum(name not in shapes for name in rules)
    others = [n for n in shapes if n.startswith(("encoder.", "decoder.")) and n not in set(rules)]
    # The import names a few faults.
    return hparams if missing + len(others) <= len(rules) // 20 else None


def _patches(channels: int, stride: int) -> dict[str, int]:
    """Returns the settings that follow from the latents' channels and their stride in pixels."""
    patch = 2 if stride == 8 else 1
    # 16x16 tokens, the smallest square of the schedules.
    return {"bits": channels * patch**2, "patch": patch, "image_size": 16 * stride * patch}


def _torch_name(block: str) -> str:
    """Returns a block's name there: down_1_block_0 -> down.1.block.0, mid_block_1 as it is."""
    return block.replace("_", ".", 1 if block.startswith("mid_") else -1)


def _plain(name: str) -> str:
    for level in _LEVELS.values():
        if found := level.fullmatch(name):
            return f"{found[1]}.{found[2]}"
    return name


def _place_values(hparams: Mapping[str, Any]) -> np.ndarray:
    """Returns powers of two, int64 [c], the highest first."""
    channels = BitVAE(**hparams).code_channels
    return np.left_shift(np.int64(1), np.arange(channels)[::-1])
