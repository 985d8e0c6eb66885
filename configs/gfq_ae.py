r"""BitDance's autoencoder (GFQ, 460M): 256 px to 16x16 tokens of 32 bits.

    python -m bitgen.main --config=configs/gfq_ae.py --workdir=runs/gfq_ae \
        --config.data.path=/data/imagenet/train

The authors released no training code, so the recipe is ours: L1 + LPIPS + PatchGAN, as for the
other tokenizers here, + entropy and commitment of the code, with the weights of the latter two and
the Adam of Open-MAGVIT2, whose network this is. It is meant for 8 GPUs of 80 GB, 16 images each, in
bfloat16, with residual blocks recomputed in the backward pass; where that is too much memory,
--config.train.accumulate=2. Set config.loss.perceptual_weights to a file where there is no network,
or config.loss.perceptual_weight=0. Not run here at this size: no time or quality was measured.
"""

from bitgen import config

PER_DEVICE, DEVICES = 16, 8


def get_config():
    """Returns the settings of the released size, d16c32."""
    c = config.tokenizer("gfq_ae", dtype="bfloat16", remat=True)
    config.train_on_folder(c)
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
    c.optim.ema = 0.9999
    c.loss.entropy_weight = 0.1
    c.loss.commitment_weight = 0.25
    c.loss.gan_start = 50_001
    c.loss.pixel_range = (-1.0, 1.0)  # of the model
    return c
