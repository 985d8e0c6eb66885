"""Conversion table of DC-AE, in the layouts of mit-han-lab/efficientvit and of diffusers.

They name the same tensors differently and agree on almost all shapes. In diffusers, 1x1
convolutions around the attention are matrices, and the projection to queries, keys and values is
cut in three. Both give the same parameters.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bitgen.convert.entries import (
    CONV,
    LINEAR,
    POINTWISE,
    Entry,
    Rule,
    Shape,
    Transform,
    batch_counter,
    conv,
    shape_votes,
    weights,
)
from bitgen.errors import UserError, choose
from bitgen.tokenizers.dcae import DCAE
from bitgen.tokenizers.dcae_blocks import BLOCKS

LAYOUTS = ("efficientvit", "diffusers")
_SCALE = "attn.to_qkv_multiscale.0"
# The parts of a block -> their names in efficientvit and in diffusers.
_PARTS = {
    "conv1": ("main.conv1.conv", "conv1"),
    "conv2": ("main.conv2.conv", "conv2"),
    "norm": ("main.conv2.norm", "norm"),
    "attention/qkv": ("context_module.main.qkv.conv", "attn.to_{third}"),
    "attention/scale_0_depth": ("context_module.main.aggreg.0.0", f"{_SCALE}.proj_in"),
    "attention/scale_0_mix": ("context_module.main.aggreg.0.1", f"{_SCALE}.proj_out"),
    "attention/out": ("context_module.main.proj.conv", "attn.to_out"),
    "attention/norm": ("context_module.main.proj.norm", "attn.norm_out"),
    "mlp/in": ("local_module.main.inverted_conv.conv", "conv_out.conv_inverted"),
    "mlp/depth": ("local_module.main.depth_conv.conv", "conv_out.conv_depth"),
    "mlp/out": ("local_module.main.point_conv.conv", "conv_out.conv_point"),
    "mlp/norm": ("local_module.main.point_conv.norm", "conv_out.norm"),
}
_STAGES = {
    "efficientvit": re.compile(r"(?P<side>encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.+)"),
    "diffusers": re.compile(r"(?P<side>encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)"),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# [3 t, c, 1, 1] -> [3, c, t], and back.
_THIRDS = Transform(
    lambda x: np.squeeze(x, (2, 3)).reshape(3, -1, x.shape[1]).swapaxes(1, 2),
    lambda x: x.swapaxes(1, 2).reshape(-1, x.shape[1], 1, 1),
)
_BLOCK_WORDS = {"ResBlock": "res", "EViT_GLU": "attention", "EViTS5_GLU": "attention_5"}
_NORM_WORDS = {"trms2d": "rms", "bn2d": "batch"}
_DOWN_WORDS = {"ConvPixelUnshuffle": "unshuffle", "Conv": "conv"}
_UP_WORDS = {"ConvPixelShuffle": "shuffle", "InterpolateConv": "interpolate"}


def hparams_from_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns DCAE's settings from the original's configuration with its `encoder` and `decoder`.

    Missing settings have the original's defaults. Raises UserError for settings that no released
    model uses and bitgen does not have: a norm or activation before the latents, doubled latents,
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
            encoder.get("downsample_block_type", "ConvPixelUnshuffle"), _DOWN_WORDS
        ),
        "upsample": _word(decoder.get("upsample_block_type", "ConvPixelShuffle"), _UP_WORDS),
        "downsample_shortcut": encoder.get("downsample_shortcut", "averaging") is not None,
        "upsample_shortcut": decoder.get("upsample_shortcut", "duplicating") is not None,
        "encoder_out_shortcut": encoder.get("out_shortcut", "averaging") is not None,
        "decoder_in_shortcut": decoder.get("in_shortcut", "duplicating") is not None,
        "decoder_out_norm": _word(decoder.get("out_norm", "trms2d"), _NORM_WORDS),
        "decoder_out_activation": _word(decoder.get("out_act", "relu")),
    }
    for side, words in (("encoder", encoder), ("decoder", decoder)):
        widths = tuple(words.get("width_list", (128, 256, 512, 512, 1024, 1024)))
        found[f"{side}_widths"] = widths
        found[f"{side}_depths"] = tuple(words.get("depth_list", (2,) * len(widths)))
        for ours, theirs, default, choices in (
            ("blocks", "block_type", "ResBlock", _BLOCK_WORDS),
            ("norms", "norm", "trms2d", _NORM_WORDS),
            ("activations", "act", "silu", None),
        ):
            value = words.get(theirs, default)
            value = (value,) * len(widths) if isinstance(value, str) else value
            found[f"{side}_{ours}"] = tuple(_word(x, choices) for x in value)
    return found


def _word(theirs: Any, choices: Mapping[str, str] | None = None) -> str:
    """Returns our word for one of a configuration; without `choices`, for an activation."""
    if choices is None:
        return "hard_swish" if theirs == "hswish" else theirs
    if isinstance(theirs, list | tuple):
        raise UserError(f"a stage of mixed blocks, {theirs!r}, cannot be imported")
    return choose("word of a DC-AE configuration", theirs, choices)


def table(hparams: Mapping[str, Any], layout: str = "efficientvit") -> list[Entry]:
    """Returns the entries between a file of a layout and the parameters of DCAE.

    `hparams` are its settings; `wrapping` finds the layout.
    """
    choose("layout", layout, LAYOUTS)
    c, theirs, column = DCAE(**hparams), layout == "efficientvit", LAYOUTS.index(layout)
    into = "main." if c.encoder_out_shortcut else ""
    out_of = "main." if c.decoder_in_shortcut else ""
    # The convolutions at the pixels and at the latents: their names in both layouts.
    ends = {
        "encoder": (("project_in", "conv_in"), (f"project_out.{into}op_list.0.conv", "conv_out")),
        "decoder": (("project_out.op_list.2", "conv_out"), (f"project_in.{out_of}conv", "conv_in")),
    }
    entries = []
    for side, name, nested, shortcut in (
        ("encoder", "down", c.downsample == "unshuffle", c.downsample_shortcut),
        ("decoder", "up", True, c.upsample_shortcut),
    ):
        pixels, latents = ends[side]
        stages = list(enumerate(getattr(c, f"{side}_depths")))
        resample = "conv.conv" if theirs and nested else "conv"
        # Without blocks in the first stage, the convolution at the pixels is one that resamples.
        level = f".{resample}" if not stages[0][1] else ".conv" if theirs else ""
        entries += conv(f"{side}.{pixels[column]}{level}", f"{side}/{pixels[1]}")
        entries += conv(f"{side}.{latents[column]}", f"{side}/{latents[1]}")
        main = "main." if theirs and shortcut else ""
        for i, depth in stages if side == "encoder" else reversed(stages):
            stage = f"{side}.stages.{i}.op_list" if theirs else f"{side}.{name}_blocks.{i}"
            resampled = depth > 0 and i < len(stages) - 1
            start = int(resampled and side == "decoder")  # number of the first block
            entries += _stage(c, side, i, f"{stage}.", start, layout)
            if resampled:
                number = 0 if start else depth
                entries += conv(f"{stage}.{number}.{main}{resample}", f"{side}/stage_{i}_{name}")
    last_norm = "decoder.project_out.op_list.0" if theirs else "decoder.norm_out"
    return [*entries, *_norm(last_norm, "decoder/norm_out", c.decoder_out_norm)]


def _stage(c: DCAE, side: str, i: int, torch: str, start: int, layout: str) -> list[Entry]:
    """Returns the entries of a stage's blocks below `torch`; `start` numbers the first one."""
    depth, block, norm = (getattr(c, f"{side}_{name}")[i] for name in ("depths", "blocks", "norms"))
    ours = f"{side}/stage_{i}"
    numbers = tuple(str(start + j) for j in range(depth))
    if BLOCKS[block] is not None:
        return [
            entry
            for j, number in enumerate(numbers)
            for entry in _attention_block(
                torch + number, f"{ours}_block_{j}", bool(BLOCKS[block]), norm, layout
            )
        ]
    if not depth:
        return []
    names = {part: f"{torch}{{n}}.{words[LAYOUTS.index(layout)]}" for part, words in _PARTS.items()}
    stacked: dict[str, Any] = {"stack": "n", "slices": numbers}
    return [
        *weights(names["conv1"], f"{ours}/conv1", CONV, **stacked),
        Rule(f"{names['conv2']}.weight", f"{ours}/conv2/kernel", CONV, **stacked),
        *_norm(names["norm"], f"{ours}/norm", norm, numbers),
    ]


def _attention_block(torch: str, ours: str, scaled: bool, norm: str, layout: str) -> list[Entry]:
    theirs = layout == "efficientvit"
    names = {part: f"{torch}.{words[LAYOUTS.index(layout)]}" for part, words in _PARTS.items()}
    thirds: dict[str, Any] = {} if theirs else {"stack": "third", "slices": ("q", "k", "v")}
    qkv = f"{names['attention/qkv']}.weight"
    entries: list[Entry] = [
        Rule(qkv, f"{ours}/attention/qkv", _THIRDS if theirs else LINEAR, **thirds)
    ]
    matrices = {"attention/out": POINTWISE if theirs else LINEAR, "mlp/out": POINTWISE}
    if scaled:
        matrices |= {"attention/scale_0_depth": CONV, "attention/scale_0_mix": CONV}
    for part, transform in matrices.items():
        entries.append(Rule(f"{names[part]}.weight", f"{ours}/{part}/kernel", transform))
    entries += weights(names["mlp/in"], f"{ours}/mlp/in", POINTWISE)
    entries += conv(names["mlp/depth"], f"{ours}/mlp/depth")
    for part in ("attention/norm", "mlp/norm"):
        entries += _norm(names[part], f"{ours}/{part}", norm)
    return entries


def _norm(torch: str, ours: str, kind: str, numbers: tuple[str, ...] = ()) -> list[Entry]:
    """Returns the entries of a norm, or of those whose numbers stand in place of {n}."""
    stacked: dict[str, Any] = {"stack": "n", "slices": numbers} if numbers else {}
    entries = weights(torch, ours, kernel="scale", **stacked)
    if kind == "batch":
        for theirs, leaf in (("running_mean", "mean"), ("running_var", "var")):
            entries.append(Rule(f"{torch}.{theirs}", f"{ours}/{leaf}", **stacked))
        entries += [batch_counter(torch.replace("{n}", n)) for n in numbers or ("",)]
    return entries


def wrapping(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns what `table` needs besides the settings: the layout."""
    votes = {layout: sum(bool(_STAGES[layout].fullmatch(n)) for n in shapes) for layout in LAYOUTS}
    return {"layout": max(LAYOUTS, key=lambda layout: votes[layout])}


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Returns DCAE's settings from a file's names and shapes, or None if it has none.

    What no tensor tells is assumed as in all released files: activations are relu after batch
    norms, silu after others, and relu before the pixels; the layout of diffusers has all shortcuts;
    a first stage without blocks has the settings of the second, at half its width.
    """
    layout = wrapping(shapes)["layout"]
    sides = {side: _stages(shapes, layout, side) for side in ("encoder", "decoder")}
    count = max(max(stages, default=-1) for stages in sides.values()) + 1
    if count < 2 or not all(sides.values()):
        return None
    # Convolutions at the ends, whatever the layout and the shortcuts.
    first = r"encoder\.(project_in|conv_in)(\.conv){0,2}\.weight"
    latent = r"encoder\.(project_out\.(main\.)?op_list\.0\.conv|conv_out)\.(weight|bias)"
    latents = shape_votes(shapes, latent, 0)
    if latents is None:
        return None
    channels = shape_votes(shapes, first, 1, 3)
    found: dict[str, Any] = {"channels": channels, "latent_channels": latents}
    for side, stages in sides.items():
        words = [_stage_words(side, stages.get(i, [])) for i in range(count)]
        if words[0]["depths"] == 0:
            words[0] = {**words[1], "depths": 0, "widths": words[1]["widths"] // 2}
        for name in ("widths", "depths", "blocks", "norms", "activations"):
            found[f"{side}_{name}"] = tuple(stage[name] for stage in words)
    down_is_conv = _keeps_width(sides["encoder"], found["encoder_widths"][1:])
    up_is_conv = _keeps_width(sides["decoder"], found["decoder_widths"][:-1])
    running = r"decoder\.(project_out\.op_list\.0|norm_out)\.running_(mean|var)"
    batch = any(re.fullmatch(running, name) for name in shapes)

    def shortcut(plain: str) -> bool:
        return not any(re.match(plain, name) for name in shapes)

    return {
        **found,
        "downsample": "conv" if down_is_conv else "unshuffle",
        "upsample": "interpolate" if up_is_conv else "shuffle",
        "downsample_shortcut": shortcut(r"encoder\.stages\.\d+\.op_list\.\d+\.conv\."),
        "upsample_shortcut": shortcut(r"decoder\.stages\.\d+\.op_list\.\d+\.conv\."),
        "encoder_out_shortcut": shortcut(r"encoder\.project_out\.op_list\."),
        "decoder_in_shortcut": shortcut(r"decoder\.project_in\.conv\."),
        "decoder_out_norm": "batch" if batch else "rms",
        "decoder_out_activation": "relu",
    }


class _Tensor(NamedTuple):
    """A tensor of a stage."""

    op: int  # number in the stage
    part: str  # of a block, as in _PARTS, or "resample"
    tensor: str  # weight, bias, ...
    shape: Shape


def _stages(shapes: Mapping[str, Shape], layout: str, side: str) -> dict[int, list[_Tensor]]:
    """Returns the tensors of each stage."""
    column = LAYOUTS.index(layout)
    parts = {words[column]: part for part, words in _PARTS.items()}
    parts |= {f"attn.to_{third}": "attention/qkv" for third in "qkv"}
    stages: dict[int, list[_Tensor]] = {}
    for name, shape in shapes.items():
        match = _STAGES[layout].fullmatch(name)
        if match is None or match["side"] != side:
            continue
        stage, op, rest = match.groups()[1:]
        module, _, tensor = rest.rpartition(".")
        resample = re.fullmatch(r"(main\.)?conv(\.conv)?", module)
        part = "resample" if resample else parts.get(module)
        if part is not None and tensor in _TENSORS:
            stages.setdefault(int(stage), []).append(_Tensor(int(op), part, tensor, shape))
    return stages


def _stage_words(side: str, tensors: list[_Tensor]) -> dict[str, Any]:
    """Returns our settings of a stage with these tensors."""
    blocks = [t for t in tensors if t.part != "resample"]
    parts = {t.part for t in blocks}
    depth = 0
    if blocks:
        # In the decoder the resampling comes first.
        before = side == "decoder" and any(t.part == "resample" and t.op == 0 for t in tensors)
        depth = max(t.op for t in blocks) + 1 - before
    if parts <= {"conv1", "conv2", "norm"}:
        block = "res"
    else:
        block = "attention_5" if any("scale" in part for part in parts) else "attention"
    widths = Counter(t.shape[0] for t in blocks if t.part.endswith("norm") and len(t.shape) == 1)
    batch = any(t.tensor.startswith("running_") for t in blocks)
    return {
        "depths": depth,
        "blocks": block,
        "widths": int(widths.most_common(1)[0][0]) if widths else 0,
        "norms": "batch" if batch else "rms",
        "activations": "relu" if batch else "silu",
    }


def _keeps_width(stages: Mapping[int, list[_Tensor]], widths: tuple[int, ...]) -> bool:
    """Returns whether the resampling convolutions keep the width of the next stage."""
    return any(
        tensor.part == "resample" and tensor.shape[:1] == (width,)
        for i, width in enumerate(widths)
        for tensor in stages.get(i, ())
    )
