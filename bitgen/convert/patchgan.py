"""Conversion table of the PatchGAN discriminator in Binary Latent Diffusion's files (`disc.*`)."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bitgen.convert.entries import CONV, Carry, Entry, Rule, Shape, batch_counter, shape_votes
from bitgen.convert.rules import torch_shapes
from bitgen.losses.adversarial import PatchDiscriminator, discriminator_layout

# Our names under {params, batch_stats} of each tensor of a block, and the layout.
_CONV_WEIGHT = ("weight", "params/{name}/kernel", CONV)
_BIAS = ("bias", "params/{name}/bias")
_TENSORS = {
    "conv": [_CONV_WEIGHT, _BIAS],
    "conv_no_bias": [_CONV_WEIGHT],
    "batch_norm": [
        ("weight", "params/{name}/scale"),
        _BIAS,
        ("running_mean", "batch_stats/{name}/mean"),
        ("running_var", "batch_stats/{name}/var"),
    ],
}


def table(hparams: Mapping[str, Any], prefix: str = "disc.") -> list[Entry]:
    """Returns the entries between a PyTorch file and PatchDiscriminator's {params, batch_stats}.

    `prefix` stands before the file's `main.N.*`; `hparams` has the `layers` and `width` of
    PatchDiscriminator (3 and 64 by default).
    """
    entries: list[Entry] = []
    for index, name, kind in discriminator_layout(PatchDiscriminator(**hparams).layers):
        torch = f"{prefix}main.{index}"
        for tensor, ours, *transform in _TENSORS[kind]:
            entries.append(Rule(f"{torch}.{tensor}", ours.format(name=name), *transform))
        if kind == "batch_norm":
            entries.append(batch_counter(torch))
    return entries


def carried(hparams: Mapping[str, Any], prefix: str = "disc.") -> list[Entry]:
    """Returns entries that keep the discriminator aside, for the table of a tokenizer alone.

    What they set aside is what `table` imports.
    """
    module, rules = PatchDiscriminator(**hparams), table(hparams, prefix)
    images = jnp.zeros((1, *[3 * 2**module.layers] * 2, 3))  # the smallest that it takes
    target = jax.eval_shape(lambda: module.init(jax.random.key(0), images))
    reason = "discriminator, used to train on"
    shapes = torch_shapes(rules, target)
    return [e if isinstance(e, Carry) else Carry(e.torch, reason, shapes[e.torch]) for e in rules]


def recognise(shapes: Mapping[str, Shape], prefix: str = "disc.") -> dict[str, Any] | None:
    """Returns PatchDiscriminator's `layers` and `width` from a file's names and shapes, or None."""
    shapes = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    width = shape_votes(shapes, r"main\.0\.(weight|bias)", 0)
    indices = [int(found[1]) for n in shapes if (found := re.match(r"main\.(\d+)\.", n))]
    if width is None or max(indices) < 5:
        return None
    return {"layers": -(-(max(indices) - 2) // 3), "width": width}  # the last index is 3 layers + 2
