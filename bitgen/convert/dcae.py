"""Conversion table of DC-AE, in the layout of mit-han-lab/efficientvit and in that of diffusers.

The two name the same tensors differently and agree on almost all shapes: 1x1 convolutions around
the attention are matrices in diffusers, and its projection to queries, keys and values is cut in
three. Both give the same parameters.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bitgen.convert.dcae_names import LAYOUTS, PARTS, recognise, wrapping
from bitgen.convert.entries import (
    CONV,
    LINEAR,
    POINTWISE,
    SAME,
    Entry,
    Rule,
    Transform,
    batch_counter,
    weights,
)
from bitgen.errors import UserError, choose
from bitgen.tokenizers.dcae import DCAE
from bitgen.tokenizers.dcae_blocks import BLOCKS

__all__ = ["hparams_from_reference", "recognise", "table", "wrapping"]

# [3 t, c, 1, 1] -> [3, c, t], and back.
_THIRDS = Transform(
    lambda x: np.squeeze(x, (2, 3)).reshape(3, -1, x.shape[1]).swapaxes(1, 2),
    lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1], 1, 1),
)
_BLOCK_WORDS = {"ResBlock": "res", "EViT_GLU": "attention", "EViTS5_GLU": "attention_5"}
_NORM_WORDS = {"trms2d": "rms", "bn2d": "batch"}
_ACTIVATION_WORDS = {"hswish": "hard_swish"}


# Settings


def hparams_from_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns DCAE's settings from the original's configuration, `encoder` and `decoder` nested.

    What a configuration leaves out has the original's default. Raises UserError for what no
    released model uses and is not here: a norm or activation before the latents, doubled latents,
    resampling that leaves the width to the blocks, and stages of mixed blocks.
    """
    encoder, decoder = dict(reference.get("encoder", {})), dict(reference.get("decoder", {}))
    for words, name, wanted in (
        (encoder, "out_norm", None),
        (encoder, "out_act", None),
        (encoder, "double_latent", False),
        (encoder, "downsample_match_channel", True),
        (decoder, "upsample_match_channel", True),
    ):
        if words.get(name, wanted) != wanted:
            raise UserError(f"{name} {words[name]!r} cannot be imported, only {wanted!r}")
    found: dict[str, Any] = {
        "channels": reference.get("in_channels", 3),
        "latent_channels": reference.get("latent_channels", 32),
        "downsample": _word(
            {"ConvPixelUnshuffle": "unshuffle", "Conv": "conv"},
            encoder.get("downsample_block_type", "ConvPixelUnshuffle"),
        ),
        "upsample": _word(
            {"ConvPixelShuffle": "shuffle", "InterpolateConv": "interpolate"},
            decoder.get("upsample_block_type", "ConvPixelShuffle"),
        ),
        "downsample_shortcut": encoder.get("downsample_shortcut", "averaging") is not None,
        "upsample_shortcut": decoder.get("upsample_shortcut", "duplicating") is not None,
        "encoder_out_shortcut": encoder.get("out_shortcut", "averaging") is not None,
        "decoder_in_shortcut": decoder.get("in_shortcut", "duplicating") is not None,
        "decoder_out_norm": _word(_NORM_WORDS, decoder.get("out_norm", "trms2d")),
        "decoder_out_activation": _activation(decoder.get("out_act", "relu")),
    }
    for side, words in (("encoder", encoder), ("decoder", decoder)):
        widths = tuple(words.get("width_list", (128, 256, 512, 512, 1024, 1024)))
        found[f"{side}_widths"] = widths
        found[f"{side}_depths"] = tuple(words.get("depth_list", (2,) * len(widths)))
        for ours, theirs, default, word in (
            ("blocks", "block_type", "ResBlock", lambda x: _word(_BLOCK_WORDS, x)),
            ("norms", "norm", "trms2d", lambda x: _word(_NORM_WORDS, x)),
            ("activations", "act", "silu", _activation),
        ):
            value = words.get(theirs, default)
            value = (value,) * len(widths) if isinstance(value, str) else value
            found[f"{side}_{ours}"] = tuple(word(x) for x in value)
    return found


def _word(words: Mapping[str, str], theirs: Any) -> str:
    if isinstance(theirs, list | tuple):
        raise UserError(f"a stage of mixed blocks, {theirs!r}, cannot be imported")
    return choose("word of a DC-AE configuration", theirs, words)


def _activation(theirs: str) -> str:
    return _ACTIVATION_WORDS.get(theirs, theirs)


# The table


def table(hparams: Mapping[str, Any], layout: str = "efficientvit") -> list[Entry]:
    """Returns the entries between a file of a layout and the parameters of DCAE.

    `hparams` are its settings; `wrapping` finds the layout.
    """
    choose("layout", layout, LAYOUTS)
    config = DCAE(**hparams)
    return [*_encoder(config, layout), *_decoder(config, layout)]


def _encoder(c: DCAE, layout: str) -> list[Entry]:
    theirs = layout == "efficientvit"
    names = _resamplers(layout, c.downsample == "unshuffle", c.downsample_shortcut)
    # Without blocks in the first stage, the first convolution is one that halves the resolution.
    first = names[0] if not c.encoder_depths[0] else "conv" if theirs else ""
    first = _join("encoder", "project_in" if theirs else "conv_in", first)
    entries = weights(first, "encoder/conv_in", CONV)
    last = len(c.encoder_widths) - 1
    for i, depth in enumerate(c.encoder_depths):
        entries += _stage(c, "encoder", i, 0, layout)
        if depth and i < last:
            place = f"{_stage_name('encoder', i, layout)}.{depth}.{names[1]}"
            entries += weights(place, f"encoder/stage_{i}_down", CONV)
    main = "main." if c.encoder_out_shortcut else ""
    out = f"project_out.{main}op_list.0.conv" if theirs else "conv_out"
    return [*entries, *weights(f"encoder.{out}", "encoder/conv_out", CONV)]


def _decoder(c: DCAE, layout: str) -> list[Entry]:
    theirs = layout == "efficientvit"
    main = "main." if c.decoder_in_shortcut else ""
    first = f"project_in.{main}conv" if theirs else "conv_in"
    entries = weights(f"decoder.{first}", "decoder/conv_in", CONV)
    names = _resamplers(layout, True, c.upsample_shortcut)
    last = len(c.decoder_widths) - 1
    for i in range(last, -1, -1):
        resampled = bool(c.decoder_depths[i]) and i < last
        if resampled:
            place = f"{_stage_name('decoder', i, layout)}.0.{names[1]}"
            entries += weights(place, f"decoder/stage_{i}_up", CONV)
        entries += _stage(c, "decoder", i, int(resampled), layout)
    norm = "decoder.project_out.op_list.0" if theirs else "decoder.norm_out"
    entries += _norm(norm, "decoder/norm_out", c.decoder_out_norm)
    final = names[0] if not c.decoder_depths[0] else "conv" if theirs else ""
    out = "project_out.op_list.2" if theirs else "conv_out"
    return [*entries, *weights(_join("decoder", out, final), "decoder/conv_out", CONV)]


def _stage(c: DCAE, side: str, i: int, start: int, layout: str) -> list[Entry]:
    """The blocks of a stage; `start` is the number of the first one in the file."""
    depth, block, norm = (getattr(c, f"{side}_{name}")[i] for name in ("depths", "blocks", "norms"))
    if not depth:
        return []
    column, place, ours = LAYOUTS.index(layout), _stage_name(side, i, layout), f"{side}/stage_{i}"
    entries: list[Entry] = []
    if BLOCKS[block] is None:
        numbers = tuple(str(start + j) for j in range(depth))
        names = {
            part: f"{place}.{{n}}.{PARTS[part][column]}" for part in ("conv1", "conv2", "norm")
        }
        stacked = {"stack": "n", "slices": numbers}
        entries.append(Rule(f"{names['conv1']}.weight", f"{ours}/conv1/kernel", CONV, **stacked))
        entries.append(Rule(f"{names['conv1']}.bias", f"{ours}/conv1/bias", **stacked))
        entries.append(Rule(f"{names['conv2']}.weight", f"{ours}/conv2/kernel", CONV, **stacked))
        entries += _norm(names["norm"], f"{ours}/norm", norm, numbers)
        return entries
    for j in range(depth):
        entries += _attention_block(
            f"{place}.{start + j}", f"{ours}_block_{j}", bool(BLOCKS[block]), norm, layout
        )
    return entries


def _attention_block(place: str, ours: str, scaled: bool, norm: str, layout: str) -> list[Entry]:
    names = {part: f"{place}.{words[LAYOUTS.index(layout)]}" for part, words in PARTS.items()}
    qkv = f"{names['attention/qkv']}.weight"
    if layout == "efficientvit":
        entries: list[Entry] = [Rule(qkv, f"{ours}/attention/qkv", _THIRDS)]
    else:
        thirds = {"stack": "third", "slices": ("q", "k", "v")}
        entries = [Rule(qkv, f"{ours}/attention/qkv", LINEAR, **thirds)]
    for part in ("attention/scale_0_depth", "attention/scale_0_mix") if scaled else ():
        entries.append(Rule(f"{names[part]}.weight", f"{ours}/{part}/kernel", CONV))
    matrix = POINTWISE if layout == "efficientvit" else LINEAR
    entries.append(Rule(f"{names['attention/out']}.weight", f"{ours}/attention/out/kernel", matrix))
    entries += _norm(names["attention/norm"], f"{ours}/attention/norm", norm)
    entries += weights(names["mlp/in"], f"{ours}/mlp/in", POINTWISE)
    entries += weights(names["mlp/depth"], f"{ours}/mlp/depth", CONV)
    entries.append(Rule(f"{names['mlp/out']}.weight", f"{ours}/mlp/out/kernel", POINTWISE))
    return [*entries, *_norm(names["mlp/norm"], f"{ours}/mlp/norm", norm)]


def _stage_name(side: str, i: int, layout: str) -> str:
    if layout == "efficientvit":
        return f"{side}.stages.{i}.op_list"
    return f"{side}.{'down' if side == 'encoder' else 'up'}_blocks.{i}"


def _resamplers(layout: str, nested: bool, shortcut: bool) -> tuple[str, str]:
    """The name of a resampling convolution at an end of the model, and of one between stages."""
    if layout == "diffusers":
        return "conv", "conv"
    name = "conv.conv" if nested else "conv"
    return name, f"main.{name}" if shortcut else name


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _norm(torch: str, ours: str, kind: str, numbers: Iterable[str] = ()) -> list[Entry]:
    """A norm, or those that `numbers` stand for in place of {n}."""
    numbers = tuple(numbers)
    stacked: dict[str, Any] = {"stack": "n", "slices": numbers} if numbers else {}
    leaves = {"weight": "scale", "bias": "bias"}
    if kind == "batch":
        leaves |= {"running_mean": "mean", "running_var": "var"}
    entries: list[Entry] = [
        Rule(f"{torch}.{theirs}", f"{ours}/{leaf}", SAME, **stacked)
        for theirs, leaf in leaves.items()
    ]
    if kind == "batch":
        entries += [batch_counter(torch.replace("{n}", n)) for n in numbers or ("",)]
    return entries
