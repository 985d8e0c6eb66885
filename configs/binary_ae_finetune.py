r"""Fine-tuning the released C64 and C128 binary autoencoders on your own pictures.

    python -m bitgen.main --config=configs/binary_ae_finetune.py:c64 --workdir=runs/c64_mine \
        --config.data.path=/data/mine

The counterpart of the authors' commands: 8 GPUs with 4 images each, from their weights at step
8,100,000 (c64) or 10,200,000 (c128). The file also has the discriminator's weights, so it takes
part from the first step. Not run here at this size: no time or quality was measured.
"""

import runpy
from pathlib import Path

from bitgen.errors import choose

SIZES = ("c64", "c128")


def get_config(size: str = "c64"):
    """Returns the settings for c64 or c128."""
    recipe = runpy.run_path(str(Path(__file__).with_name("binary_ae.py")))
    c = recipe["get_config"](choose("size", size, SIZES))
    c.init_from = f"zoo:bld_bae_{size}"
    c.train.steps = 100_000
    c.optim.schedule = "constant"
    c.loss.gan_start = 0
    return c
