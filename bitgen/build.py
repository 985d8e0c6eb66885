"""Builds modules from a config or a model.json, by the name of their family."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from bitgen.errors import UserError, choose
from bitgen.generators.bigr import BiGR
from bitgen.generators.bitdance import BitDance
from bitgen.tokenizers.binary_ae import BinaryAutoencoder
from bitgen.tokenizers.bitvae import BitVAE
from bitgen.tokenizers.conv_ae import ConvAutoencoder
from bitgen.tokenizers.dcae import DCAE
from bitgen.tokenizers.gfq_ae import GFQAutoencoder

TOKENIZERS: dict[str, type[nn.Module]] = {
    "binary_ae": BinaryAutoencoder,
    "bitvae": BitVAE,
    "conv_ae": ConvAutoencoder,
    "dcae": DCAE,
    "gfq_ae": GFQAutoencoder,
}
GENERATORS: dict[str, type[nn.Module]] = {"bigr": BiGR, "bitdance": BitDance}
FAMILIES = {"tokenizer": TOKENIZERS, "generator": GENERATORS}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Fields that change how a model runs and not what it computes; model.json does not have them.
RUN_FIELDS = ("dtype", "remat", "attention", "unroll")


def fields_of(kind: str, family: str) -> dict[str, Any]:
    """Returns the fields of a family's module with their defaults."""
    cls = choose(kind, family, FAMILIES[kind])
    fields = {
        f.name: f.default for f in dataclasses.fields(cls) if f.name not in ("parent", "name")
    }
    return {**fields, "dtype": "float32"}


def model_config(kind: str, family: str, **fields: Any) -> ConfigDict:
    """Returns `config.model` for a family: all fields, and the given ones changed.

    Raises UserError for an unknown family or field.
    """
    defaults = fields_of(kind, family)
    for name in fields:
        choose(f"field of {family}", name, defaults)
    return ConfigDict({"family": family, **defaults, **fields}, convert_dict=False)


def make_module(kind: str, family: str, fields: dict[str, Any]) -> Any:
    """Returns the module of a family with these fields; lists become tuples.

    Raises UserError for an unknown family, field or dtype, and for a width that does not fit heads.
    """
    defaults = fields_of(kind, family)
    values = {}
    for name, value in fields.items():
        choose(f"field of {family}", name, defaults)
        values[name] = tuple(value) if isinstance(value, list | tuple) else value
    if isinstance(values.get("dtype"), str):
        values["dtype"] = choose("dtype", values["dtype"], DTYPES)
    module = FAMILIES[kind][family](**values)
    if kind == "generator" and hasattr(module, "heads") and module.width % (4 * module.heads):
        raise UserError(
            f"{family} needs width / heads divisible by 4 for its 2-D rotary positions, "
            f"got width {module.width} and heads {module.heads}"
        )
    return module


def module_from_config(kind: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the module of `config.model`, and its description for model.json."""
    fields = config.to_dict()
    family = fields.pop("family")
    hparams = {name: value for name, value in fields.items() if name not in RUN_FIELDS}
    info = {"kind": kind, "family": family, "hparams": hparams}
    return make_module(kind, family, fields), info


def init_params(module: Any, key: jax.Array) -> Any:
    """Returns fresh parameters; jit-able."""
    params_key, other_key = jax.random.split(key)
    if isinstance(module, tuple(GENERATORS.values())):
        bits = jnp.zeros((1, *module.grid, module.bits), bool)
        rngs = {"params": params_key, "loss": other_key}
        labels = jnp.zeros((1,), jnp.int32)
        if getattr(module, "unroll", False):
            # The same numbers, but unrolled layers have thousands of kernels to compile.
            module = module.clone(unroll=False)
        return module.init(rngs, bits, labels, train=False, method="loss")["params"]
    size = module.image_size
    images = jnp.zeros((1, size, size, module.channels))
    rngs = {"params": params_key, "bits": other_key}
    return module.init(rngs, images, train=True)["params"]


def param_shapes(module: Any) -> Any:
    """Returns the shapes and dtypes of a module's parameters without computing them."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))


def shape_faults(there: Any, here: Any) -> list[str]:
    """Returns one line for each leaf whose shape differs between two trees or that one lacks."""
    one, other = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (there, here)
    )
    return [
        f"{name} is {one.get(name, 'missing')} there, {other.get(name, 'missing')} here"
        for name in sorted(one | other)
        if one.get(name) != other.get(name)
    ]
