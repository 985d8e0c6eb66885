"""A small BitDance on the digits' bits that draws 1, 4 or 16 tokens together.

    python -m bitgen.main --config=configs/digits_bitdance.py:1x --workdir=runs/digits/bitdance_1x

It reads runs/digits/bits, which launch/quickstart.sh writes. With --mode=sample, the same command
writes samples.png. A classifier recognises 99, 99 and 98 of the 100 digits drawn by 1x, 4x and 16x
(tests/digits.py). Measured on 2 busy CPU cores: 17 minutes for 4x, half an hour for 16x.
"""

from bitgen import config
from bitgen.errors import choose

SIZES = {"1x": 1, "4x": 4, "16x": 16}


def get_config(size: str = "1x"):
    """Returns the settings for this many tokens together."""
    c = config.digits_generator(
        "bitdance",
        class_tokens=4,
        together=choose("size", size, SIZES),
        head_width=128,
        head_layers=3,
        head_modulations=1,
        flip_rate=0.1,
    )
    c.sampler.head_steps = 32
    return c
