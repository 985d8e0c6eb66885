r"""A check of a tokenizer's recipe: 64 tiles, learned by heart.

    python -m bitgen.main --config=configs/overfit.py:gfq_ae --workdir=runs/overfit/gfq_ae \
        --config.data.path=tiles.npz

Each family's losses and optimiser as shipped, without LPIPS and GAN, on a narrow network of 8x8
cells a tile: 64 bits a cell (4,096 a tile, 4 a pixel) for gfq_ae and bitvae, 128 for binary_ae,
whose bits are drawn at random in training, 32 numbers a cell for dcae. The data is an npz file with
`image`, uint8 [64, 32, 32, 3].

Measured on 64 tiles of games, by --mode=reconstruct after the steps here, of 16 tiles:
PSNR 36.4 dB (binary_ae, 4,000), 35.5 (gfq_ae, 800), 34.2 (bitvae, 1,600), 30.4 (dcae, 600), and no
dead bits but one of gfq_ae's. On 2,136 tiles, 150 steps, gfq_ae has one dead bit of 64 as well, and
none with --config.optim.lr=5e-4 (PSNR 19.3 dB in both). On 2 cores 0.3 to 0.6 s a step, with
XLA_FLAGS=--xla_force_host_platform_device_count=2 a fifth less.
"""

from bitgen import config
from bitgen.errors import choose

_LEVELS = {"width": 32, "multipliers": (1, 2, 4), "blocks": 1, "bits": 64, "image_size": 32}
_WIDTHS, _RES = (64, 64, 128), ("res",) * 3
FAMILIES = {
    "binary_ae": {**_LEVELS, "bits": 128, "embed_dim": 128, "attention_resolutions": ()},
    "gfq_ae": {**_LEVELS, "width": 64, "multipliers": (1, 1, 2), "groups": 8},
    "bitvae": {**_LEVELS, "schedule": "same1"},
    "dcae": {
        "image_size": 32,
        "latent_channels": 32,
        "encoder_widths": _WIDTHS,
        "encoder_depths": (0, 1, 2),
        "encoder_blocks": ("res", "res", "attention"),
        "encoder_norms": ("rms",) * 3,
        "encoder_activations": ("silu",) * 3,
        "decoder_widths": _WIDTHS,
        "decoder_depths": (0, 2, 2),
        "decoder_blocks": ("res", "res", "attention"),
        "decoder_norms": ("batch", "batch", "rms"),
        "decoder_activations": ("relu", "relu", "silu"),
    },
}
STEPS = {"binary_ae": 4_000, "gfq_ae": 800, "bitvae": 1_600, "dcae": 600}


def get_config(family: str = "binary_ae"):
    """Returns the settings of a family."""
    c = config.tokenizer(family, **choose("family", family, FAMILIES))
    c.data.source = "npz"
    c.data.holdout = 0.0
    c.data.flip = False
    c.train.batch_size = 16
    c.train.steps = STEPS[family]
    c.train.log_every = 100
    c.train.preview_every = 0
    c.train.checkpoint_every = 1_000
    c.optim.lr = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup = 50
    c.optim.clip = 1.0
    c.optim.ema = 0.99
    c.loss.perceptual_weight = 0.0
    c.loss.gan_weight = 0.0
    c.loss.l2 = 1.0
    c.reconstruct.split = "all"
    return c
