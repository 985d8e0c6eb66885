"""Losses of the tokenizers: what a reconstruction is judged by."""

# The discriminator and its training rule.
from bitgen.losses.adversarial import (
    LastLayerGradients,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_layout,
    generator_loss,
    hinge_discriminator_loss,
    last_layer_gradients,
    lecam_loss,
    weighted_loss,
)

# What the discriminator sees.
from bitgen.losses.augment import diff_augment

# Perceptual distance.
from bitgen.losses.lpips import load_lpips, lpips_distance, lpips_shapes

__all__ = [
    "LastLayerGradients",
    "PatchDiscriminator",
    "adaptive_weight",
    "diff_augment",
    "discriminator_layout",
    "generator_loss",
    "hinge_discriminator_loss",
    "last_layer_gradients",
    "lecam_loss",
    "load_lpips",
    "lpips_distance",
    "lpips_shapes",
    "weighted_loss",
]
