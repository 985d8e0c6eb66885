r"""The binary autoencoder of Binary Latent Diffusion and BiGR, every released size.

    python -m bitgen.main --config=configs/binary_ae.py:d24 --workdir=runs/bae_d24 \
        --config.data.path=/data/imagenet/train

Sizes: d24, d32 (BiGR, 256 px), d32_512 (BiGR, 512 px), c32, c64, c128 (Binary Latent Diffusion).
The recipe is the authors': 8 GPUs with 4 images each, the discriminator from step 400,001, and a
million steps for d24. Without a network, set config.loss.perceptual_weights to a file, or
config.loss.perceptual_weight=0. Not run here at this size: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose

SIZES = {
    "d24": {"bits": 24},
    "d32": {"bits": 32},
    "d32_512": {"bits": 32, "image_size": 512},
    "c32": {"bits": 32},
    "c64": {"bits": 64},
    "c128": {"bits": 128, "decoder_multiplier": 3.0},
}
PER_DEVICE, DEVICES = 4, 8


def get_config(size: str = "d24"):
    """Returns the settings of a size."""
    c = config.imagenet_tokenizer("binary_ae", **choose("size", size, SIZES))
    c.data.crop = "resize"
    c.train.batch_size = PER_DEVICE * DEVICES
    c.train.steps = 1_000_000
    c.optim.name = "adam"
    # The authors scale the rate by the images of one device, not of all.
    c.optim.lr = 4.5e-6 * PER_DEVICE
    c.optim.schedule = "drop"
    c.optim.drop_step = 1_500_000
    c.optim.ema = 0.995
    c.optim.ema_every = 10
    c.loss.gan_start = 400_001
    return c
