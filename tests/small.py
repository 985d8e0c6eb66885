"""Settings small enough to train in seconds, for tests of everything around the models."""

from typing import Any

from bitgen import config

TOKENIZER = {
    "width": 32,
    "multipliers": (1, 1),
    "blocks": 1,
    "bits": 4,
    "embed_dim": 32,
    "image_size": 8,
    "attention_resolutions": (),
}
GENERATOR = {
    "width": 32,
    "layers": 2,
    "heads": 2,
    "bits": 4,
    "grid": (4, 4),
    "num_classes": 10,
    "denoiser_width": 32,
    "denoiser_layers": 1,
    "diffusion_steps": 8,
    "mlp_multiple": 32,
}
BITDANCE = {
    "width": 32,
    "layers": 1,
    "heads": 2,
    "bits": 4,
    "grid": (4, 4),
    "num_classes": 10,
    "class_tokens": 2,
    "together": 4,
    "head_width": 64,
    "head_layers": 1,
    "head_modulations": 1,
    "flip_rate": 0.1,
    "mlp_multiple": 32,
}


def _common(c: Any) -> Any:
    c.data.image_size = 8
    c.data.threads = 2
    c.train.steps = 6
    c.train.batch_size = 8
    c.train.log_every = 1
    c.train.preview_every = 0
    c.train.checkpoint_every = 2
    c.optim.lr = 1e-3
    c.optim.ema = 0.9
    return c


def tokenizer() -> Any:
    """Settings of a tokenizer on 8x8 digits."""
    c = _common(config.tokenizer("binary_ae", **TOKENIZER))
    c.loss.perceptual_weight = 0.0
    c.loss.gan_weight = 0.0
    return c


def generator(tokenizer_directory) -> Any:
    """Settings of a generator that encodes digits as it goes."""
    c = _common(config.generator("bigr", **GENERATOR))
    c.sampler.iterations = 3
    c.sampler.denoiser_steps = 3
    c.tokenizer = str(tokenizer_directory)
    return c


def bitdance(tokenizer_directory) -> Any:
    """Settings of a BitDance that draws four tokens together, for two steps."""
    c = _common(config.generator("bitdance", **BITDANCE))
    c.train.steps = 2
    c.sampler.head_steps = 2
    c.sampler.guidance = 2.0
    c.tokenizer = str(tokenizer_directory)
    return c
