r"""Sampling with the released BitDance models, one for each row of the authors' table.

    python -m bitgen.main --config=configs/bitdance_released.py:B_16x --workdir=runs/bitdance \
        --mode=sample

Rows: B_1x, B_4x, B_16x, L_1x, H_1x (the authors report FID 1.68, 1.69, 1.91, 1.31, 1.24). The
settings are those of their evaluation. The weights are downloaded and converted on first use.
50,000 images for a score, 50 of each class:

    --config.sample.labels=all --config.sample.per_label=50 --config.sample.output=samples.npz

Not run here with the released weights: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose

SIZES = config.BITDANCE_GUIDANCE


def get_config(row: str = "B_16x"):
    """Returns the settings of a row."""
    guidance = choose("row", row, SIZES)
    c = config.released(f"bitdance_{row}")
    c.sampler.guidance = guidance
    c.sample.labels = config.SHOWN_CLASSES
    c.sample.columns = 4
    c.sample.decode_batch = 32
    c.sample.dtype = "bfloat16"  # as in the authors' evaluation
    return c
