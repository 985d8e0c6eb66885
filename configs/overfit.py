r"""A check of a tokenizer's recipe: 64 tiles, learned by heart.

    python -m bitgen.main --config=configs/overfit.py:gfq_ae --workdir=runs/overfit/gfq_ae \
        --config.data.path=tiles.npz

Every family has its usual losses and optimiser, without LPIPS and GAN, and a narrow network of 8x8
cells per tile: 64 bits per cell (4,096 per tile, 4 per pixel) for gfq_ae and bitvae, 128 for
binary_ae, whose bits are drawn at random in training, and 32 numbers per cell for dcae. The data is
an npz file with `image`, uint8 [64, 32, 32, 3].

Measured with --mode=reconstruct on 64 tiles of games after the steps below, with batches of 16:
PSNR 36.4 dB (binary_ae, 4,000), 35.5 (gfq_ae, 800), 34.2 (bitvae, 1,600), 30.4 (dcae, 600), and no
dead bits except one of gfq_ae. After 150 steps on 2,136 tiles, gfq_ae has one dead bit of 64 too,
and none with --config.optim.lr=5e-4 (PSNR 19.3 dB in both). A step takes 0.3 to 0.6 s on 2 cores,
and a fifth less with XLA_FLAGS=--xla_force_host_platform_device_count=2.
"""

from bitgen import config
from bitgen.errors import choose

_LEVELS = {"width": 32, "multipliers": (1, 2, 4), "blocks": 1, "bits": 64, "image_size": 32}
_WIDTHS, _BLOCKS = (64, 64, 128), ("res", "res", "attention")
SIZES = {
    "binary_ae": {**_LEVELS, "bits": 128, "embed_dim": 128, "attention_resolutions": ()},
    "gfq_ae": {**_LEVELS, "width": 64, "multipliers": (1, 1, 2), "groups": 8},
    "bitvae": {**_LEVELS, "schedule": "same1"},
    "dcae": {
        "image_size": 32,
        "latent_channels": 32,
        "encoder_widths": _WIDTHS,
        "encoder_depths": (0, 1, 2),
        "encoder_blocks": _BLOCKS,
        "encoder_norms": ("rms",) * 3,
        "encoder_activations": ("silu",) * 3,
        "decoder_widths": _WIDTHS,
        "decoder_depths": (0, 2, 2),
        "decoder_blocks": _BLOCKS,
        "decoder_norms": ("batch", "batch", "rms"),
        "decoder_activations": ("relu", "relu", "silu"),
    },
}
STEPS = {"binary_ae": 4_000, "gfq_ae": 800, "bitvae": 1_600, "dcae": 600}


def get_config(family: str = "binary_ae"):
    """Returns the settings of a family."""
    c = config.small_tokenizer(family, **choose("family", family, SIZES))
    c.data.source = "npz"
    c.data.holdout = 0.0
    c.train.batch_size = 16
    c.train.steps = STEPS[family]
    c.train.preview_every = 0
    c.train.checkpoint_every = 1_000
    c.optim.lr = 1e-3
    c.optim.warmup = 50
    c.optim.clip = 1.0
    c.optim.ema = 0.99
    c.loss.l2 = 1.0
    c.reconstruct.split = "all"
    return c
