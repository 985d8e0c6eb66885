r"""BitDance's autoencoder (GFQ, 460M): 256 px to 16x16 tokens of 32 bits.

    python -m bitgen.main --config=configs/gfq_ae.py --workdir=runs/gfq_ae \
        --config.data.path=/data/imagenet/train

The authors released no training code, so the recipe is ours: L1, LPIPS and PatchGAN as for other
tokenizers here, and entropy and commitment of the code. The weights of the latter two and Adam's
settings are from Open-MAGVIT2, whose network this is. The recipe is for 8 GPUs with 80 GB and 16
images each, in bfloat16, and recomputes residual blocks in the backward pass; to save memory, add
--config.train.accumulate=2. Without a network, set config.loss.perceptual_weights to a file, or
config.loss.perceptual_weight=0. Not run here at this size: no time or quality was measured.
"""

from bitgen import config

PER_DEVICE, DEVICES = 16, 8


def get_config():
    """Returns the settings of the released size, d16c32."""
    c = config.imagenet_tokenizer("gfq_ae", dtype="bfloat16", remat=True)
    c.data.crop = "random"
    c.train.batch_size = PER_DEVICE * DEVICES
    c.train.steps = 500_000
    c.optim.name = "adam"
    c.optim.lr = 1e-4
    c.optim.b1 = 0.5
    c.optim.b2 = 0.9
    c.optim.schedule = "cosine"
    c.optim.final_lr = 1e-5
    c.optim.warmup = 5_000
    c.optim.clip = 1.0
    c.loss.entropy_weight = 0.1
    c.loss.commitment_weight = 0.25
    c.loss.gan_start = 50_001
    return c
