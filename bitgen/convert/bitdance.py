"""Conversion table of BitDance (shallowdream204/BitDance `imagenet_gen/`).

Released files hold `{"model": ..., "ema": ...}`, state dicts that repeat the tokenizer as `vae.*`.
"""

import math
from collections.abc import Mapping
from typing import Any

from bitgen import build
from bitgen.convert import gfq_ae
from bitgen.convert.entries import (
    LINEAR,
    Carry,
    Entry,
    Rule,
    Shape,
    Transform,
    attention_kernels,
    count_numbered,
    dense,
    norm,
    renamed,
    shape_votes,
    squeeze,
    transformer_layers,
)
from bitgen.convert.rules import torch_shapes
from bitgen.generators.bitdance import BitDance
from bitgen.nn.mlp import swiglu_width

_REFERENCE_NAMES = {
    "dim": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "latent_dim": "bits",
    "num_classes": "num_classes",
    "cls_token_num": "class_tokens",
    "parallel_num": "together",
    "patch_size": "cells",
    "diff_dim": "head_width",
    "diff_layers": "head_layers",
    "diff_adanln_layers": "head_modulations",
    "diff_adaln_layers": "head_modulations",
    "diff_batch_mul": "draws",
    "P_mean": "time_mean",
    "P_std": "time_std",
    "perturb_rate": "flip_rate",
    "drop_rate": "dropout",
}
_HEAD_DIM = 64  # of every released size
_MLP_MULTIPLE = 256
_GATE_UP = Transform(
    lambda x: x.reshape(2, -1, x.shape[-1]).transpose(2, 0, 1),
    lambda x: x.transpose(1, 2, 0).reshape(-1, len(x)),
)
_MLP = {"w1": ("gate_up", _GATE_UP), "w2": ("out", LINEAR)}
_VAE = "the tokenizer that the original keeps in the same file"


def hparams_from_reference(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Returns BitDance's settings from the original's hyper-parameters.

    The head is as wide as the transformer unless `diff_dim` says otherwise.
    """
    found = renamed(reference, _REFERENCE_NAMES)
    side = reference.get("resolution", 256) // reference.get("down_size", 16)
    found["grid"] = (side, side)
    found.setdefault("head_width", found.get("width", 768))
    found["patch_order"] = reference.get("parallel_mode", "patch") == "patch"
    return found


def table(hparams: Mapping[str, Any], vae: Mapping[str, Any] | None = None) -> list[Entry]:
    """Returns the entries between a PyTorch file and the parameters of BitDance.

    `hparams` are its settings; `vae` has those of the tokenizer that the file repeats, if any,
    which is carried along.
    """
    config = BitDance(**hparams)
    tokens = (config.class_tokens, config.width)
    classes = Transform(lambda x: x.reshape(-1, *tokens), lambda x: x.reshape(len(x), -1))
    entries: list[Entry] = [
        Rule("cls_embedding.weight", "class_embedding", classes),
        Rule("pos_for_diff.weight", "position_embedding"),
        Rule("emb_norm.weight", "input_norm/scale"),
        Rule("norm.weight", "norm/scale"),
        *_gated("proj_in", "bits_in"),
        *transformer_layers(config.width, config.heads, _MLP),
        *_head(config),
    ]
    if config.together > 1:
        entries.append(Rule("query_token", "query_tokens", squeeze(0)))
    if vae is not None:
        target = build.param_shapes(build.make_module("tokenizer", "gfq_ae", dict(vae)))
        shapes = torch_shapes(gfq_ae.table(vae), target)
        entries += [Carry(f"vae.{name}", _VAE, shape) for name, shape in shapes.items()]
    return entries


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Returns BitDance's settings from a file's names and shapes, or None if it has none.

    What no shape tells is taken from the released models: 64 channels per head, tokens of one cell
    in a square grid, groups in patch order.
    """
    width = shape_votes(shapes, r"layers\.\d+\.(attention|ffn)_norm\.weight", 0)
    hidden = shape_votes(shapes, r"layers\.\d+\.feed_forward\.w2\.weight", 1)
    head_width = shape_votes(shapes, r"head\.net\.res_blocks\.\d+\.norm\d?\.(weight|bias)", 0)
    bits = shape_votes(shapes, r"head\.net\.final_layer\.linear\.(weight|bias)", 0)
    if width is None or hidden is None or bits is None or head_width is None:
        return None
    classes = shape_votes(shapes, r"cls_embedding\.weight", 0) or 1001
    front = shape_votes(shapes, r"cls_embedding\.weight", 1) or 64 * width
    side = math.isqrt(shape_votes(shapes, r"pos_for_diff\.weight", 0) or 256)
    attends = any(".attn." in name for name in shapes)  # a head of several tokens
    found = {
        "width": width,
        "layers": count_numbered(shapes, r"layers\.(\d+)(\..+)?"),
        "heads": max(1, width // _HEAD_DIM),
        "bits": bits,
        "grid": (side, side),
        "num_classes": classes - 1,
        "class_tokens": front // width,
        "together": 1 + (shape_votes(shapes, "query_token", 1) or (3 if attends else 0)),
        "patch_order": True,
        "cells": 1,
        "head_width": head_width,
        "head_layers": count_numbered(shapes, r"head\.net\.res_blocks\.(\d+)(\..+)?"),
        "head_modulations": count_numbered(shapes, r"head\.net\.ada_ln_blocks\.(\d+)(\..+)?"),
        "draws": 4,
        "time_mean": -0.8,
        "time_std": 0.8,
    }
    if swiglu_width(width, _MLP_MULTIPLE) != hidden:
        multiples = [m for m in (128, 64, 32, 16, 8) if swiglu_width(width, m) == hidden]
        found["mlp_multiple"] = next(iter(multiples), _MLP_MULTIPLE)
    return found


def wrapping(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns what `table` needs besides the settings: the tokenizer in the file."""
    inner = {n.removeprefix("vae."): shape for n, shape in shapes.items() if n.startswith("vae.")}
    return {"vae": gfq_ae.recognise(inner)}


def _gated(torch: str, ours: str) -> list[Entry]:
    """Returns a gated MLP's rules; w1 stacks gate and input: [2 hidden, d] -> [d, 2, hidden]."""
    bias = Transform(lambda x: x.reshape(2, -1), lambda x: x.reshape(-1))
    return [
        Rule(f"{torch}.w1.weight", f"{ours}/gate_up/kernel", _GATE_UP),
        Rule(f"{torch}.w1.bias", f"{ours}/gate_up/bias", bias),
        *dense(f"{torch}.w2", f"{ours}/out"),
    ]


def _head(config: BitDance) -> list[Entry]:
    net, block = "head.net.", "head.net.res_blocks.{block}."
    entries: list[Entry] = []
    for torch, ours in {
        "time_embed.mlp.0": "time_in",
        "time_embed.mlp.2": "time_out",
        "cond_embed": "cond_in",
        "input_proj": "bits_in",
        "ada_ln_blocks.{group}": "modulation_{group}",
        "final_layer.ada_ln_modulation": "final_modulation",
        "final_layer.linear": "final",
    }.items():
        entries += dense(net + torch, f"head/{ours}")
    norms = {"norm": "norm"}
    if config.together > 1:
        norms = {"norm1": "attention_norm", "norm2": "norm"}
    for torch, ours in norms.items():
        entries += norm(block + torch, f"head/blocks_{{block}}/{ours}")
    entries += _gated(block.rstrip("."), "head/blocks_{block}/mlp")
    if config.together > 1:
        heads = max(1, config.head_width // _HEAD_DIM)
        qkv, out = attention_kernels(config.head_width, heads)
        biases = Transform(lambda x: x.reshape(3, heads, -1), lambda x: x.reshape(-1))
        attention = "head/blocks_{block}/attention/"
        entries += [
            Rule(f"{block}attn.wqkv.weight", f"{attention}qkv/kernel", qkv),
            Rule(f"{block}attn.wqkv.bias", f"{attention}qkv/bias", biases),
            Rule(f"{block}attn.wo.weight", f"{attention}out/kernel", out),
            Rule(f"{block}attn.wo.bias", f"{attention}out/bias"),
        ]
    return entries
