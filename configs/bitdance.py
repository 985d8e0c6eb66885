r"""BitDance on ImageNet at 256 px, every published size.

    python -m bitgen.main --config=configs/bitdance.py:B_1x --workdir=runs/bitdance_B_1x \
        --config.data.path=/data/imagenet/train

Sizes: B_1x, B_4x, B_16x (so many tokens drawn together), L_1x, H_1x. The tokenizer is the released
one, or yours: --config.tokenizer=runs/gfq_ae/model. From ImageNet's own archive, read in place:
--config.data.source=tar --config.data.path=ILSVRC2012_img_train.tar. From stored bits
(--mode=tokenize), without augmentation but flips: --config.data.source=bits
--config.data.path=BITS --config.tokenizer=. Where memory is short:
--config.train.accumulate=4 --config.model.remat=True. For long runs on GPUs that each hold the
whole model, --config.model.unroll=True: longer compiling, shorter steps (docs/speed.md).

The recipe is the authors': batch 1024, 800 epochs, bfloat16; they train B on 16, L on 32 and H on
64 H100 GPUs, to FID 1.68, 1.69, 1.91, 1.31 and 1.24. Not run here at this size: no time or quality
was measured.
"""

from bitgen import config
from bitgen.errors import choose

EPOCHS = 800
STEPS_AN_EPOCH = 1_281_167 // 1024
L = {"width": 1024, "layers": 32, "heads": 16, "head_width": 1024, "head_layers": 8}
H = {"width": 1280, "layers": 40, "heads": 20, "head_width": 1280, "head_layers": 12}
SIZES = {
    "B_1x": {"flip_rate": 0.1},
    "B_4x": {"flip_rate": 0.1, "together": 4},
    "B_16x": {"flip_rate": 0.1, "together": 16},
    "L_1x": {"flip_rate": 0.05, **L},
    "H_1x": {"flip_rate": 0.05, "head_modulations": 3, **H},
}
GUIDANCE = {"B_1x": 3.2, "B_4x": 3.9, "B_16x": 6.1, "L_1x": 4.0, "H_1x": 4.55}


def get_config(size: str = "B_1x"):
    """Returns the settings of a size."""
    c = config.generator("bitdance", **choose("size", size, SIZES), dtype="bfloat16")
    c.tokenizer = "zoo:bitdance_ae_d16c32"
    c.data.source = "folder"
    c.data.image_size = 256
    c.data.holdout = 0.0
    c.data.crop = "random"
    c.data.crop_fade_start = 700
    c.data.crop_fade_end = 750
    c.train.batch_size = 1024
    c.train.steps = EPOCHS * STEPS_AN_EPOCH
    c.train.checkpoint_every = 10_000
    c.optim.lr = 6e-4
    c.optim.warmup = 20_000
    c.optim.schedule = "cosine"
    c.optim.final_lr = 1e-5
    c.optim.b2 = 0.95
    c.optim.weight_decay = 0.05
    c.optim.no_decay = ("bias$", "scale$", "^bits_in/", "class_embedding", "query_tokens")
    c.optim.clip = 1.0
    c.optim.ema = 0.9999
    c.sampler.guidance = GUIDANCE[size]
    c.sample.labels = "207,360,387,974,88,979,417,279"
    return c
