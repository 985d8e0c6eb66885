"""A small BitDance on the digits' bits: one token at a time, or 4 or 16 together.

    python -m bitgen.main --config=configs/digits_bitdance.py:1x --workdir=runs/digits/bitdance_1x

It reads runs/digits/bits, which launch/quickstart.sh makes; then --mode=sample with the same config
and workdir writes samples.png. A classifier recognises 99, 99 and 98 of the 100 digits that 1x, 4x
and 16x draw (tests/digits.py). Measured on 2 busy CPU cores: 17 minutes for 4x, half an hour
for 16x.
"""

import pathlib
import runpy

from bitgen import config
from bitgen.errors import choose

_RECIPE = runpy.run_path(str(pathlib.Path(__file__).parent / "digits_bigr.py"))["recipe"]

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
    _RECIPE(c)
    c.optim.weight_decay = 0.05
    c.optim.no_decay = ("bias$", "scale$", "^bits_in/", "class_embedding", "query_tokens")
    c.sampler.head_steps = 32
    return c
