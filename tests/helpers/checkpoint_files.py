"""Checkpoint files like the released ones, of models that take milliseconds; and manifests.

`manifests/*.json.gz` hold the names and shapes of every tensor of a released checkpoint.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from bitgen import build
from bitgen.convert.directory import FAMILIES
from bitgen.convert.rules import export_tensors

MANIFESTS = Path(__file__).parents[1] / "manifests"

BIGR = {
    "width": 64,
    "layers": 3,
    "heads": 1,
    "bits": 5,
    "grid": (3, 3),
    "num_classes": 4,
    "denoiser_width": 16,
    "denoiser_layers": 2,
    "diffusion_steps": 40,
    "mlp_multiple": 64,
}
BINARY_AE = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "bits": 6,
    "embed_dim": 32,
    "image_size": 32,
    "attention_resolutions": (16,),
}
DISCRIMINATOR = {"layers": 2, "width": 4}


def bigr_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The state dict of a BiGR; a second name of a tensor is the same array."""
    return random_export("bigr", BIGR, seed)[1]


def binary_ae_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The state dict of a binary autoencoder with its discriminator and the perceptual network."""
    tensors = random_export("binary_ae", BINARY_AE, seed)[1]
    rng = np.random.default_rng(seed + 1)
    table = FAMILIES["binary_ae"].convert.table
    for entry in table(BINARY_AE, discriminator=DISCRIMINATOR):
        if entry.torch.startswith("disc."):
            tensors[entry.torch] = rng.standard_normal(entry.shape).astype(np.float32)
        if entry.torch.endswith("num_batches_tracked"):
            tensors[entry.torch] = np.array(7, np.int64)
    # Not the default, so that an export of these must come from the file.
    tensors["ae.generator.logsigma.0.bias"] = np.full((32,), 3, np.float32)
    tensors["perceptual.net.slice1.0.weight"] = rng.standard_normal((2, 3)).astype(np.float32)
    return tensors


def as_torch(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """PyTorch tensors; those of one array share their storage."""
    made = {id(x): torch.from_numpy(x) for x in tensors.values()}
    return {name: made[id(x)] for name, x in tensors.items()}


def save_bigr(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes the file as released and returns its tensors."""
    tensors = bigr_tensors(seed)
    torch.save({"ema": as_torch(tensors)}, path)
    return tensors


def save_binary_ae(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes the file as released and returns its tensors."""
    tensors = binary_ae_tensors(seed)
    torch.save(as_torch(tensors), path)
    return tensors


def target_of(family: str, hparams: dict[str, Any]) -> Any:
    """The shapes of a model's parameters."""
    return build.param_shapes(build.make_module(FAMILIES[family].kind, family, hparams))


def random_like(target: Any, seed: int = 0) -> Any:
    """Random float32 arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), target)


def random_export(
    family: str, hparams: dict[str, Any], seed: int = 0, **wrapping: Any
) -> tuple[Any, dict[str, np.ndarray]]:
    """Random parameters, and the PyTorch tensors that the family's table writes of them."""
    target = target_of(family, hparams)
    params = random_like(target, seed)
    table = FAMILIES[family].convert.table(hparams, **wrapping)
    return params, dict(export_tensors(table, params, {}, hparams, target))


def assert_same_trees(a: Any, b: Any) -> None:
    """Two trees have the same leaves, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def manifest(name: str) -> tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]:
    """Family, settings in our words, and shapes of a released file."""
    spec = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    hparams = FAMILIES[spec["family"]].convert.hparams_from_reference(spec["hparams"])
    shapes = {name: tuple(shape) for name, (shape, _) in spec["tensors"].items()}
    return spec["family"], hparams, shapes
