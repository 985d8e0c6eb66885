"""What DC-AE's tensors are called in two layouts, and the sizes that names and shapes tell."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from bitgen.convert.entries import Shape, shape_votes

# The parts of a block -> their names in efficientvit and in diffusers.
PARTS = {
    "conv1": ("main.conv1.conv", "conv1"),
    "conv2": ("main.conv2.conv", "conv2"),
    "norm": ("main.conv2.norm", "norm"),
    "attention/qkv": ("context_module.main.qkv.conv", "attn.to_{third}"),
    "attention/scale_0_depth": (
        "context_module.main.aggreg.0.0",
        "attn.to_qkv_multiscale.0.proj_in",
    ),
    "attention/scale_0_mix": (
        "context_module.main.aggreg.0.1",
        "attn.to_qkv_multiscale.0.proj_out",
    ),
    "attention/out": ("context_module.main.proj.conv", "attn.to_out"),
    "attention/norm": ("context_module.main.proj.norm", "attn.norm_out"),
    "mlp/in": ("local_module.main.inverted_conv.conv", "conv_out.conv_inverted"),
    "mlp/depth": ("local_module.main.depth_conv.conv", "conv_out.conv_depth"),
    "mlp/out": ("local_module.main.point_conv.conv", "conv_out.conv_point"),
    "mlp/norm": ("local_module.main.point_conv.norm", "conv_out.norm"),
}
LAYOUTS = ("efficientvit", "diffusers")
_STAGES = {
    "efficientvit": re.compile(r"(?P<side>encoder|decoder)\.stages\.(\d+)\.op_list\.(\d+)\.(.+)"),
    "diffusers": re.compile(r"(?P<side>encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(\d+)\.(.+)"),
}
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def wrapping(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns what `table` needs to know of a file besides the settings: its layout."""
    votes = {layout: sum(bool(_STAGES[layout].fullmatch(n)) for n in shapes) for layout in LAYOUTS}
    return {"layout": max(LAYOUTS, key=lambda layout: votes[layout])}


class _Tensor(NamedTuple):
    """A tensor of a stage."""

    op: int  # number in the stage
    part: str  # of a block, as in PARTS, or "resample"
    tensor: str  # weight, bias, ...
    shape: Shape


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Returns DCAE's settings from a file's names and shapes, or None if it has none.

    What no tensor tells is assumed to be as in all released files: activations are relu after batch
    norms and silu after others, relu before the pixels; in the layout of diffusers all shortcuts
    are there; and a first stage without blocks repeats the words of the second, at half its width.
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
    found: dict[str, Any] = {
        "channels": shape_votes(shapes, first, 1, 3),
        "latent_channels": latents,
    }
    for side, stages in sides.items():
        words = [_stage_words(side, stages.get(i, [])) for i in range(count)]
        if words[0]["depths"] == 0:
            words[0] = {**words[1], "depths": 0, "widths": words[1]["widths"] // 2}
        for name in ("widths", "depths", "blocks", "norms", "activations"):
            found[f"{side}_{name}"] = tuple(stage[name] for stage in words)
    down = [_resampled(sides["encoder"].get(i, ())) for i in range(count - 1)]
    up = [_resampled(sides["decoder"].get(i, ())) for i in range(count - 1)]
    down_is_conv = any(c == w for c, w in zip(down, found["encoder_widths"][1:], strict=True) if c)
    up_is_conv = any(c == w for c, w in zip(up, found["decoder_widths"], strict=False) if c)

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
        "decoder_out_norm": "rms" if not _has_running(shapes) else "batch",
        "decoder_out_activation": "relu",
    }


def _has_running(shapes: Mapping[str, Shape]) -> bool:
    pattern = r"decoder\.(project_out\.op_list\.0|norm_out)\.running_(mean|var)"
    return any(re.fullmatch(pattern, name) for name in shapes)


def _stages(shapes: Mapping[str, Shape], layout: str, side: str) -> dict[int, list[_Tensor]]:
    """The tensors of each stage."""
    column = LAYOUTS.index(layout)
    parts = {words[column]: part for part, words in PARTS.items()}
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
    """Our words for a stage of these tensors."""
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


def _resampled(tensors: Iterable[_Tensor]) -> int | None:
    """Output channels of a stage's resampling convolution."""
    return next((t.shape[0] for t in tensors if t.part == "resample" and t.shape), None)
