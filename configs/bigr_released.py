r"""Sampling with the released BiGR models, one for each row of the authors' tables.

    python -m bitgen.main --config=configs/bigr_released.py:L_d24 --workdir=runs/bigr --mode=sample

Rows: L_d24, XL_d24, XXL_d24 (FID 2.71, 2.49, 2.36 in the paper), XXL_d32, and L_d32_512 (512 px).
The sampler's defaults are those of the authors' sampling script. The weights are downloaded and
converted on first use. 50,000 images for a score:

    --config.sample.labels=all --config.sample.per_label=50 --config.sample.output=samples.npz

Not run here with the released weights: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose

SIZES = ("L_d24", "XL_d24", "XXL_d24", "XXL_d32", "L_d32_512")


def get_config(row: str = "L_d24"):
    """Returns the settings of a row."""
    c = config.released(f"bigr_{choose('row', row, SIZES)}")
    c.sample.labels = config.SHOWN_CLASSES
    c.sample.columns = 4
    return c
