r"""BitDance on ImageNet at 256 px, every published size.

    python -m bitgen.main --config=configs/bitdance.py:B_1x --workdir=runs/bitdance_B_1x \
        --config.data.path=/data/imagenet/train

Sizes: B_1x, B_4x, B_16x (1, 4 or 16 tokens drawn together), L_1x, H_1x. The tokenizer is the
released one, or yours: --config.tokenizer=runs/gfq_ae/model. To read ImageNet's archive in place:
--config.data.source=tar --config.data.path=ILSVRC2012_img_train.tar. To train on stored bits
(--mode=tokenize), which are flipped but not augmented otherwise: --config.data.source=bits
--config.data.path=BITS --config.tokenizer=. To save memory: --config.train.accumulate=4
--config.model.remat=True. For long runs on GPUs that each hold the whole model,
--config.model.unroll=True compiles longer and makes steps shorter (docs/speed.md).

The recipe is the authors': batch 1024, 800 epochs, bfloat16. They train B on 16, L on 32 and H on
64 H100 GPUs, to FID 1.68, 1.69, 1.91, 1.31 and 1.24. Not run here at this size: no time or quality
was measured.
"""

from bitgen import config
from bitgen.errors import choose

EPOCHS = 800
STEPS_PER_EPOCH = 1_281_167 // 1024
SIZES = {"B_1x": 0.1, "B_4x": 0.1, "B_16x": 0.1, "L_1x": 0.05, "H_1x": 0.05}  # size -> flip rate


def get_config(size: str = "B_1x"):
    """Returns the settings of a size."""
    flip_rate = choose("size", size, SIZES)
    c = config.imagenet_generator(f"bitdance_{size}", flip_rate=flip_rate)
    c.data.crop = "random"
    c.data.crop_fade_start = 700
    c.data.crop_fade_end = 750
    c.train.batch_size = 1024
    c.train.steps = EPOCHS * STEPS_PER_EPOCH
    c.optim.lr = 6e-4
    c.optim.warmup = 20_000
    c.optim.schedule = "cosine"
    c.optim.final_lr = 1e-5
    c.optim.ema = 0.9999
    c.sampler.guidance = config.BITDANCE_GUIDANCE[size]
    return c
