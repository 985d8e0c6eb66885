"""Losses of the tokenizers.

Discriminator and its training rule   adversarial: PatchDiscriminator, last_layer_gradients, ...
What the discriminator sees           augment: diff_augment
Perceptual distance                   lpips: load_lpips, lpips_distance
"""
