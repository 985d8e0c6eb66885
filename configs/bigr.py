r"""BiGR on ImageNet, every published size.

    python -m bitgen.main --config=configs/bigr.py:L --workdir=runs/bigr_L \
        --config.data.path=/data/imagenet/train

The tokenizer is the released one of its bits, or yours: --config.tokenizer=runs/bae_d24/model.
Sizes: L, XL, XXL (256 px, 24 bits), XXL_d32 (256 px, 32 bits), L_512 (512 px, 32 bits).
The recipe is the authors': batch 512 and bfloat16; they train L and XL on 8 A800 GPUs, XXL on 32,
to FID 2.71, 2.49 and 2.36. With config.data.source=bits, config.data.path=BITS and
config.tokenizer= empty, it trains on stored bits. For long runs on GPUs that each hold the whole
model, --config.model.unroll=True: longer compiling, shorter steps (docs/speed.md). Not run here at
this size: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose

XXL = {"width": 1536, "layers": 48, "heads": 24, "denoiser_width": 1536, "denoiser_layers": 8}
SIZES = {
    "L": {},
    "XL": {"width": 1280, "layers": 36, "heads": 20, "denoiser_width": 1280, "denoiser_layers": 6},
    "XXL": XXL,
    "XXL_d32": {**XXL, "bits": 32},
    "L_512": {"bits": 32, "grid": (32, 32), "denoiser_width": 1280, "denoiser_layers": 6},
}

TOKENIZERS = {"XXL_d32": "d32", "L_512": "d32_512"}


def get_config(size: str = "L"):
    """Returns the settings of a size."""
    c = config.generator("bigr", **choose("size", size, SIZES), dtype="bfloat16")
    c.tokenizer = "zoo:bigr_bae_" + TOKENIZERS.get(size, "d24")
    c.data.source = "folder"
    c.data.image_size = 16 * c.model.grid[0]
    c.data.holdout = 0.0
    c.train.batch_size = 512
    c.train.steps = 1_000_000
    c.train.checkpoint_every = 10_000
    c.optim.lr = 1e-4
    c.optim.b2 = 0.95
    c.optim.weight_decay = 2e-2
    c.optim.no_decay = ("bias$", "scale$", "^denoiser/")
    c.optim.clip = 1.0
    c.optim.ema = 0.9999
    # The authors' sampling script.
    c.sampler.iterations = 20
    c.sampler.guidance = 3.0
    c.sampler.gumbel = 0.01
    c.sample.labels = "207,360,387,974,88,979,417,279"
    return c
