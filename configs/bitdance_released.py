r"""Sampling with the released BitDance models, a row of the authors' table each, at their settings.

    python -m bitgen.main --config=configs/bitdance_released.py:B_16x --workdir=runs/bitdance \
        --mode=sample

Rows: B_1x, B_4x, B_16x, L_1x, H_1x (FID 1.68, 1.69, 1.91, 1.31, 1.24 by their account). The weights
are downloaded and converted on first use. 50,000 images for a score, 50 of each class:

    --config.sample.labels=all --config.sample.per_label=50 --config.sample.output=samples.npz

Not run here with the released weights: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose

# Guidance of the authors' evaluation.
SIZES = {"B_1x": 3.2, "B_4x": 3.9, "B_16x": 6.1, "L_1x": 4.0, "H_1x": 4.55}


def get_config(row: str = "B_16x"):
    """Returns the settings of a row."""
    c = config.base("bitdance")
    c.sampler.guidance = choose("row", row, SIZES)
    c.sampler.guidance_schedule = "linear"
    c.sampler.head_steps = 100
    c.generator = f"zoo:bitdance_{row}"
    c.tokenizer = "zoo:bitdance_ae_d16c32"
    c.sample.labels = "207,360,387,974,88,979,417,279"
    c.sample.columns = 4
    c.sample.decode_batch = 32
    c.sample.dtype = "bfloat16"  # as the authors evaluate
    return c
