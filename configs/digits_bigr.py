"""A small BiGR on the digits' bits.

    python -m bitgen.main --config=configs/digits_bigr.py --workdir=runs/digits/bigr

It reads runs/digits/bits, which --mode=tokenize makes; launch/quickstart.sh runs all of it.
Measured on 2 CPU cores: 4 minutes for the 3,000 steps, 20 seconds for 100 samples, of which a
classifier recognises 100 (tests/digits.py).
"""

from bitgen import config


def get_config():
    """Returns the settings."""
    c = config.generator(
        "bigr",
        width=96,
        layers=4,
        heads=4,
        bits=24,
        grid=(4, 4),
        num_classes=10,
        denoiser_width=128,
        denoiser_layers=2,
        diffusion_steps=64,
        mlp_multiple=64,
        dropout=0.0,
    )
    recipe(c)
    c.optim.weight_decay = 2e-2
    c.optim.no_decay = ("bias$", "scale$", "^denoiser/")
    c.sampler.iterations = 16
    c.sampler.denoiser_steps = 32
    return c


def recipe(c):
    """Sets the data and the training of any generator on the digits' bits."""
    c.tokenizer = "runs/digits/tokenizer/model"
    c.data.source = "bits"
    c.data.path = "runs/digits/bits"
    c.data.flip = False
    c.train.batch_size = 32
    c.train.steps = 3000
    c.train.log_every = 100
    c.train.preview_every = 1000
    c.train.preview_images = 40
    c.train.checkpoint_every = 1000
    c.optim.lr = 2e-3
    c.optim.warmup = 50
    c.optim.schedule = "cosine"
    c.optim.b2 = 0.95
    c.optim.clip = 1.0
    c.optim.ema = 0.99
    c.sampler.guidance = 2.0
    c.sample.per_label = 10
