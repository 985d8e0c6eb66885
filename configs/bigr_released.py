r"""Sampling with the released BiGR models, a row of the authors' tables each, at their settings.

    python -m bitgen.main --config=configs/bigr_released.py:L_d24 --workdir=runs/bigr --mode=sample

Rows: L_d24, XL_d24, XXL_d24 (FID 2.71, 2.49, 2.36 in the paper), XXL_d32, and L_d32_512 (512 px).
The weights are downloaded and converted on first use. 50,000 images for a score:

    --config.sample.labels=all --config.sample.per_label=50 --config.sample.output=samples.npz

Not run here with the released weights: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose

TOKENIZERS = {
    "L_d24": "bigr_bae_d24",
    "XL_d24": "bigr_bae_d24",
    "XXL_d24": "bigr_bae_d24",
    "XXL_d32": "bigr_bae_d32",
    "L_d32_512": "bigr_bae_d32_512",
}


def get_config(row: str = "L_d24"):
    """Returns the settings of a row."""
    c = config.base()
    c.tokenizer = "zoo:" + choose("row", row, TOKENIZERS)
    c.generator = f"zoo:bigr_{row}"
    c.sampler.iterations = 20
    c.sampler.guidance = 3.0
    c.sampler.gumbel = 0.01
    c.sample.labels = "207,360,387,974,88,979,417,279"
    c.sample.columns = 4
    return c
