"""Small tokenizers of every family, and what their tests share."""

import functools
from typing import Any

import jax
import numpy as np

from bitgen import build
from bitgen.nn.shuffle import pixel_shuffle

BINARY_AE = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "bits": 8,
    "embed_dim": 32,
    "image_size": 16,
    "attention_resolutions": (8,),
}
BITVAE = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "bits": 6,
    "image_size": 16,
    "schedule": ((1, 1), (2, 3), (5, 5), (8, 8)),
}
GFQ_AE = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "bits": 8,
    "groups": 2,
    "image_size": 16,
}
CONV_AE = {"image_size": 8, "widths": (4, 6), "kernel": 3, "code": 16}
DCAE = {
    "image_size": 8,
    "latent_channels": 8,
    "encoder_widths": (32, 32, 32),
    "encoder_depths": (0, 2, 1),
    "encoder_blocks": ("res", "res", "attention"),
    "encoder_norms": ("rms",) * 3,
    "encoder_activations": ("silu",) * 3,
    "decoder_widths": (32, 32, 32),
    "decoder_depths": (0, 2, 1),
    "decoder_blocks": ("res", "res", "attention"),
    "decoder_norms": ("batch", "batch", "rms"),
    "decoder_activations": ("relu", "relu", "silu"),
}
DCAE_OTHER = {  # every choice that DCAE does not take
    **DCAE,
    "encoder_depths": (1, 1, 1),
    "encoder_blocks": ("res", "attention", "attention_5"),
    "encoder_activations": ("hard_swish", "gelu", "relu6"),
    "decoder_depths": (1, 1, 2),
    "decoder_norms": ("rms", "rms", "batch"),
    "decoder_blocks": ("res", "attention_5", "attention"),
    "downsample": "conv",
    "upsample": "interpolate",
}


def make(family: str, fields: dict[str, Any], **changes: Any) -> Any:
    """Returns a family's module."""
    return build.make_module("tokenizer", family, {**fields, **changes})


def random_params(module: Any, seed: int = 0) -> Any:
    """Returns parameters with norms, biases and running statistics that are not 0 and 1."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name in ("kernel", "qkv"):
            start = -4 if leaf.ndim > 3 else -2
            return noise / np.float32(np.sqrt(np.prod(leaf.shape[start:-1])))
        noise *= np.float32(0.1)
        return 1 + np.abs(noise) if name == "var" else noise + (name == "scale")

    return jax.tree_util.tree_map_with_path(one, build.param_shapes(module))


def random_images(module: Any, n: int = 2) -> jax.Array:
    """Returns images of the module's size, uniform in [-1, 1]."""
    shape = (n, module.image_size, module.image_size, module.channels)
    return jax.random.uniform(jax.random.key(1), shape, minval=-1, maxval=1)


def case(family: str, fields: dict[str, Any], n: int = 2) -> tuple[Any, Any, jax.Array]:
    """Returns a module, its parameters and images."""
    module = make(family, fields)
    return module, random_params(module), random_images(module, n)


@functools.cache
def _compiled(module, options):
    call = functools.partial(module.apply, **dict(options))
    return jax.jit(lambda params, args, rngs: call({"params": params}, *args, rngs=rngs))


def apply(module: Any, params: Any, *args: Any, rngs: Any = None, **options: Any) -> Any:
    """Returns `module.apply` of the arguments, compiled once for each module and options."""
    return _compiled(module, tuple(options.items()))(params, args, rngs)


def last_layer(module: Any, params: Any, last_input: jax.Array) -> jax.Array:
    """Returns the images, up to a constant, that the last convolution makes of its input."""
    layer = functools.reduce(lambda tree, name: tree[name], module.last_layer, params)
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        last_input, layer["kernel"], (1, 1), "SAME", dimension_numbers=layout
    )
    y = pixel_shuffle(y + layer["bias"].reshape(1, 1, 1, -1), getattr(module, "last_shuffle", 1))
    return module.image_scale * y
