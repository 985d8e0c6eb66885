r"""BiGR on ImageNet, every published size.

    python -m bitgen.main --config=configs/bigr.py:L --workdir=runs/bigr_L \
        --config.data.path=/data/imagenet/train

Sizes: L, XL, XXL (256 px, 24 bits), XXL_d32 (256 px, 32 bits), L_512 (512 px, 32 bits). The
tokenizer is the released one, or yours: --config.tokenizer=runs/bae_d24/model. To train on stored
bits: --config.data.source=bits --config.data.path=BITS --config.tokenizer=. For long runs on GPUs
that each hold the whole model, --config.model.unroll=True compiles longer and makes steps shorter
(docs/speed.md).

The recipe is the authors': batch 512 and bfloat16. They train L and XL on 8 A800 GPUs and XXL on
32, to FID 2.71, 2.49 and 2.36. The sampler's defaults are those of their sampling script. Not run
here at this size: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose

SIZES = {
    "L": "bigr_L_d24",
    "XL": "bigr_XL_d24",
    "XXL": "bigr_XXL_d24",
    "XXL_d32": "bigr_XXL_d32",
    "L_512": "bigr_L_d32_512",
}


def get_config(size: str = "L"):
    """Returns the settings of a size."""
    c = config.imagenet_generator(choose("size", size, SIZES))
    c.train.batch_size = 512
    c.train.steps = 1_000_000
    c.optim.lr = 1e-4
    c.optim.ema = 0.9999
    return c
