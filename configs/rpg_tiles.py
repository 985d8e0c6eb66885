r"""Autoencoders of 32x32 tiles of role-playing games: a baseline, DC-AEs and bit tokenizers.

    python -m bitgen.main --config=configs/rpg_tiles.py:dcae-04 --workdir=runs/rpg/dcae-04 \
        --config.data.path=tiles.npz

The data is an npz file with `image`, uint8 [n, 32, 32, 3]; a tenth is held out. With a folder of
images, one sub-folder per class:

    python -m bitgen.main --config=configs/rpg_tiles.py:dcae-04 --workdir=runs/rpg/dcae-04 \
        --config.data.source=folder --config.data.path=tiles

The experiment follows defgsus/nn-experiments: a million tiles, L1, AdamW, batch 64, cosine.

Continuous latents: baseline (128 latents, a compression ratio of 24), dcae-03 (32 latents, 96),
dcae-04 (64 latents, 48), and also with 64 latents dcae-05 and dcae-06 (wider) and dcae-07 (deeper).
The author reports, on 47,579 tiles of his own, a validation L1 of 0.0414 for dcae-04, better than
the baseline; 05 to 07 were no better. Bit tokenizers of the same images: dcae-04-bits (64 bits per
tile); bits-sign, bits-spherical and bits-bernoulli (a DC-AE with 4x4 cells of 32 bits, 512 bits per
tile); binary-ae (B-AE with the same grid).

L1 is of pixels in [0, 1], as the author's. Not run here at full length. After 240 steps with 16 of
1,922 tiles of games (--config.train.steps=240 --config.train.batch_size=16 --config.optim.lr=2e-4
--config.optim.ema=0.98 --config.optim.warmup=20; 2.3 s per step of dcae on 2 cores), the L1 of 214
held-out tiles is 0.125 for the baseline, 0.0851 for dcae-03, 0.0847 for dcae-04, 0.0976 for
bits-sign and 0.117 for binary-ae (neither has a dead bit): they have learned colours and little
else yet.
"""

from bitgen import config
from bitgen.errors import choose
from bitgen.hub import zoo

_CELLS = {
    "image_size": 32,
    "latent_channels": 32,
    "encoder_widths": (64, 128, 256, 512),
    "encoder_depths": (0, 4, 2, 2),
    "encoder_blocks": ("res", "res", "attention", "attention"),
    "encoder_norms": ("rms",) * 4,
    "encoder_activations": ("silu",) * 4,
    "decoder_widths": (64, 128, 256, 512),
    "decoder_depths": (0, 5, 2, 2),
    "decoder_blocks": ("res", "res", "attention", "attention"),
    "decoder_norms": ("batch", "batch", "rms", "rms"),
    "decoder_activations": ("relu", "relu", "silu", "silu"),
}
SIZES = {
    "baseline": ("conv_ae", {}),
    **{name.replace("_", "-"): ("dcae", fields) for name, fields in zoo.TILES.items()},
    "dcae-04-bits": ("dcae", {**zoo.TILES["dcae_04"], "quantizer": "sign"}),
    "bits-sign": ("dcae", {**_CELLS, "quantizer": "sign"}),
    "bits-spherical": ("dcae", {**_CELLS, "quantizer": "spherical"}),
    "bits-bernoulli": ("dcae", {**_CELLS, "quantizer": "bernoulli"}),
    "binary-ae": (
        "binary_ae",
        {
            "width": 64,
            "multipliers": (1, 2, 4, 4),
            "bits": 32,
            "image_size": 32,
            "attention_resolutions": (),
        },
    ),
}


def get_config(variant: str = "dcae-04"):
    """Returns the settings of a variant."""
    family, fields = choose("variant", variant, SIZES)
    c = config.small_tokenizer(family, **fields)
    c.data.source = "npz"
    c.train.batch_size = 64
    c.train.steps = 1_000_000 // 64
    c.train.preview_every = 1_000
    c.train.checkpoint_every = 1_000
    c.train.validate_every = 500
    c.optim.lr = 3e-4 if family in ("conv_ae", "binary_ae") else 9.375e-5
    c.optim.weight_decay = 0.01
    c.optim.no_decay = ("mean$", "var$")
    c.optim.ema = 0.999
    c.loss.pixel_range = (0.0, 1.0)
    return c
