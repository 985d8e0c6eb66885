r"""DC-AE: the released sizes, and small ones for 32x32 images; continuous latents or bits.

    python -m bitgen.main --config=configs/dcae.py:f32c32 --workdir=runs/dcae_f32c32 \
        --config.data.path=/data/imagenet/train

Released (mit-han-lab/efficientvit): f32c32 (323M parameters), f64c128 (677M), f128c512 (1.12B) and
sana (312M). Small (defgsus/nn-experiments, 32x32 pixels to a single cell): 03 (81M, 32 latents, a
compression ratio of 96), and with 64 latents, a ratio of 48: 04 (82M), 05 (111M), 06 (143M), 07
(107M).

`--config.model.quantizer=sign` (or spherical, bernoulli) makes any of them a bit tokenizer with as
many bits per cell as latents. The authors released no training code, so the recipe is ours: L1,
LPIPS, a PatchGAN from step 100,001, and AdamW. Published for f64c128 at 512 px: rFID 0.217, PSNR
26.15, SSIM 0.71, LPIPS 0.080. Not run here at these sizes: no time or quality was measured.
"""

from bitgen import config
from bitgen.errors import choose
from bitgen.hub import zoo

SIZES = {
    "f32c32": {},
    "f64c128": zoo.ZOO["dc_ae_f64c128_in"].hparams,
    "f128c512": zoo.ZOO["dc_ae_f128c512_in"].hparams,
    "sana": zoo.ZOO["dc_ae_f32c32_sana"].hparams,
    **{name.removeprefix("dcae_"): fields for name, fields in zoo.TILES.items()},
}


def get_config(size: str = "f32c32"):
    """Returns the settings of a size."""
    c = config.imagenet_tokenizer("dcae", **choose("size", size, SIZES))
    c.model.remat = c.model.image_size > 32
    c.train.batch_size = 64
    c.train.steps = 200_000
    c.optim.lr = 1e-4
    c.optim.schedule = "cosine"
    c.optim.warmup = 1_000
    c.optim.no_decay = ("bias$", "scale$", "mean$", "var$")
    c.loss.gan_start = 100_001
    return c
