r"""Fine-tuning the released C64 and C128 binary autoencoders on your own pictures.

    python -m bitgen.main --config=configs/binary_ae_finetune.py:c64 --workdir=runs/c64_mine \
        --config.data.path=/data/mine

The counterpart of the authors' commands: 8 GPUs, 4 images each, from their weights at step
8,100,000 (c64) or 10,200,000 (c128), so the discriminator, whose weights the file carries too,
takes part from the first step. Not run here at this size: no time or quality was measured.
"""

import pathlib
import runpy

_BASE = runpy.run_path(str(pathlib.Path(__file__).parent / "binary_ae.py"))["get_config"]


def get_config(size: str = "c64"):
    """Returns the settings for c64 or c128."""
    c = _BASE(size)
    c.init_from = f"zoo:bld_bae_{size}"
    c.train.steps = 100_000
    c.optim.schedule = "constant"
    c.loss.gan_start = 0
    return c
