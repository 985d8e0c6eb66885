"""A small BitDance on the digits' bits: one token at a time, or 4 or 16 together.

    python -m bitgen.main --config=configs/digits_bitdance.py:1x --workdir=runs/digits/bitdance_1x

It reads runs/digits/bits, which launch/quickstart.sh makes; then --mode=sample with the same config
and workdir writes samples.png. A classifier recognises 99, 99 and 98 of the 100 digits that 1x, 4x
and 16x draw (tests/digits.py). Measured on 2 busy CPU cores: 17 minutes for 4x, half an hour
for 16x.
"""

from bitgen import config
from bitgen.errors import choose

SIZES = {"1x": 1, "4x": 4, "16x": 16}


def get_config(size: str = "1x"):
    """Returns the settings for so many tokens together."""
    c = config.generator(
        "bitdance",
        width=96,
        layers=4,
        heads=4,
        bits=24,
        grid=(4, 4),
        num_classes=10,
        class_tokens=4,
        together=choose("size", size, SIZES),
        head_width=128,
        head_layers=3,
        head_modulations=1,
        flip_rate=0.1,
        mlp_multiple=64,
    )
    c.tokenizer = "runs/digits/tokenizer/model"
    c.data.source = "bits"
    c.data.path = "runs/digits/bits"
    c.data.flip = False
    c.train.batch_size = 32
    c.train.steps = 3000
    c.train.log_every = 100
    c.train.preview_every = 1000
    c.train.preview_images = 40
    c.train.checkpoint_every = 1000
    c.optim.lr = 2e-3
    c.optim.warmup = 50
    c.optim.schedule = "cosine"
    c.optim.b2 = 0.95
    c.optim.weight_decay = 0.05
    c.optim.no_decay = ("bias$", "scale$", "^bits_in/", "class_embedding", "query_tokens")
    c.optim.clip = 1.0
    c.optim.ema = 0.99
    c.sampler.guidance = 2.0
    c.sampler.head_steps = 32
    c.sample.per_label = 10
    return c
