"""Settings that train in seconds, for tests of everything around the models."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitgen import build, config
from bitgen.hub import model_directory

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

# Family -> the fields that make a model of any size small.
SHRUNK = {
    "bigr": {name: value for name, value in GENERATOR.items() if name != "bits"},
    "bitdance": {
        **{name: BITDANCE[name] for name in ("width", "layers", "heads", "num_classes")},
        **{name: BITDANCE[name] for name in ("class_tokens", "head_width", "mlp_multiple")},
        "grid": (8, 8),
    },
    "binary_ae": {
        "width": 32,
        "multipliers": (1, 1),
        "blocks": 1,
        "embed_dim": 32,
        "image_size": 16,
        "attention_resolutions": (),
    },
    "bitvae": {"width": 32, "multipliers": (1, 2), "blocks": 1, "image_size": 32},
    "gfq_ae": {"width": 32, "multipliers": (1, 2), "blocks": 1, "image_size": 16},
    "conv_ae": {"widths": (8, 8), "code": 8},
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
    """Returns the settings of a tokenizer of 8x8 digits."""
    c = _common(config.tokenizer("binary_ae", **TOKENIZER))
    c.loss.perceptual_weight = 0.0
    c.loss.gan_weight = 0.0
    return c


def generator(tokenizer_directory) -> Any:
    """Returns the settings of a generator that encodes digits while it trains."""
    c = _common(config.generator("bigr", **GENERATOR))
    c.sampler.iterations = 3
    c.sampler.denoiser_steps = 3
    c.tokenizer = str(tokenizer_directory)
    return c


def bitdance(tokenizer_directory) -> Any:
    """Returns the settings of two steps of a BitDance that draws four tokens together."""
    c = _common(config.generator("bitdance", **BITDANCE))
    c.train.steps = 2
    c.sampler.head_steps = 2
    c.sampler.guidance = 2.0
    c.tokenizer = str(tokenizer_directory)
    return c


def shrunk(kind, family, fields):
    """Returns the fields of a small model of the same family and variant."""
    fields = {**fields, **SHRUNK.get(family, {})}
    if family == "dcae":
        for side in ("encoder", "decoder"):
            count = len(fields[f"{side}_widths"])
            fields[f"{side}_widths"] = (32,) * count
            fields[f"{side}_depths"] = tuple(min(d, 1) for d in fields[f"{side}_depths"])
        fields["image_size"] = 2 ** max(5, count - 1)
        fields["latent_channels"] = 32
    if family == "bitdance":  # layers must be a multiple of modulations
        fields["head_layers"] = fields["head_modulations"]
    return {name: value for name, value in fields.items() if name in build.fields_of(kind, family)}


def shrink_model(c: Any) -> None:
    """Makes the model, the batches and the images of a training config small."""
    family, kind = c.model.family, c.train.task
    fields = {name: value for name, value in c.model.to_dict().items() if name != "family"}
    c.model = build.model_config(kind, family, **shrunk(kind, family, fields))
    c.train.batch_size = 2 * c.train.accumulate
    if kind == "tokenizer":
        c.data.image_size = c.model.image_size
        c.loss.discriminator_width, c.loss.discriminator_layers = 8, 1


def rows(workdir: Path) -> list[dict[str, Any]]:
    """Returns what a run logged at each step, except for what depends on the machine."""
    speed = ("images_per_second", "data_wait", "mfu")
    text = (workdir / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in speed} for row in found]


def random_params(module: Any) -> Any:
    """Returns parameters without zeros, so that labels, steps and neighbours matter."""
    rng = np.random.default_rng(0)

    def values(leaf):
        return jnp.asarray(
            rng.normal(0, 1.5 / max(leaf.shape[-1], 2) ** 0.5, leaf.shape), leaf.dtype
        )

    return jax.tree.map(values, build.param_shapes(module))


def write_models(folder: Path, generator: str = "bigr") -> tuple[Path, Path]:
    """Writes a random generator and its tokenizer to FOLDER/KIND/model; returns both paths."""
    fields = {"bigr": GENERATOR, "bitdance": BITDANCE}[generator]
    origin, paths = {}, []
    for kind, family, hparams in (
        ("tokenizer", "binary_ae", TOKENIZER),
        ("generator", generator, fields),
    ):
        module = build.make_module(kind, family, hparams)
        info = {"kind": kind, "family": family, "hparams": hparams, "origin": origin}
        path = folder / kind / "model"
        model_directory.write(path, info, random_params(module))
        origin = {"tokenizer": model_directory.identity(path)}
        paths.append(path)
    return paths[1], paths[0]
