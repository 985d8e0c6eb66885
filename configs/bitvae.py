r"""BitVAE, Infinity's multi-scale tokenizer, in its authors' two stages: one scale, then many.

    python -m bitgen.main --config=configs/bitvae.py:d16_stage1 --workdir=runs/bitvae_d16_stage1 \
        --config.data.path=/data/imagenet/train
    python -m bitgen.main --config=configs/bitvae.py:d16_stage2 --workdir=runs/bitvae_d16_stage2 \
        --config.data.path=/data/imagenet/train

Sizes: d16_stage1, d16_stage2, d32_stage1, d32_stage2; stage 2 starts from
runs/bitvae_dN_stage1/model unless --config.init_from says otherwise.
From the authors' code: the network, 256 px, L1, LPIPS(VGG16), hinge PatchGAN, commitment 0.25,
entropy 0.1, Adam with rate 1e-4, betas 0.9 and 0.95, clipping at 1. Not known, so ours: the weights
of L1, LPIPS and GAN, the batch, and the steps. It is meant for 8 GPUs of 80 GB, 16 images each, in
bfloat16, with residual blocks recomputed in the backward pass. For the regularised sort (d32reg)
set config.model.drop_rate and config.model.flip_prob in stage 2; the authors' values are not known.
Set config.loss.perceptual_weights to a file where there is no network, or
config.loss.perceptual_weight=0. Not run here at this size: no time or quality was measured. The
authors report, at 256 px, rFID 1.22 and PSNR 20.9 for d16, 0.61 and 22.7 for d32.
"""

from bitgen import config
from bitgen.errors import choose

SIZES = {
    "d16_stage1": {"bits": 16, "schedule": "same1"},
    "d16_stage2": {"bits": 16, "schedule": "dynamic"},
    "d32_stage1": {"bits": 32, "schedule": "same1"},
    "d32_stage2": {"bits": 32, "schedule": "dynamic"},
}
PER_DEVICE, DEVICES = 16, 8


def get_config(size: str = "d16_stage1"):
    """Returns the settings of a size and stage."""
    fields = choose("size", size, SIZES)
    c = config.tokenizer("bitvae", dtype="bfloat16", remat=True, **fields)
    c.data.source = "folder"
    c.data.image_size = c.model.image_size
    c.data.crop = "random"
    c.data.holdout = 0.0
    c.train.batch_size = PER_DEVICE * DEVICES
    c.train.steps = 500_000
    c.train.log_every = 200
    c.train.checkpoint_every = 10_000
    c.optim.name = "adam"
    c.optim.lr = 1e-4
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.clip = 1.0
    c.loss.entropy_weight = 0.1
    c.loss.commitment_weight = 0.25
    c.loss.gan_start = 30_001
    if size.endswith("stage2"):
        c.init_from = f"runs/bitvae_{size.removesuffix('stage2')}stage1/model"
        c.train.steps = 200_000
        c.loss.gan_start = 5_001  # for the discriminator to begin with what it is to tell apart
    return c
