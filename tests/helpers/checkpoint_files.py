"""Checkpoint files like the released ones, of models that take milliseconds."""

from pathlib import Path

import jax
import numpy as np
import torch

from bitgen import build
from bitgen.convert import bigr, binary_ae
from bitgen.convert.rules import export_tensors

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
    return _random(bigr.table(BIGR), "generator", "bigr", BIGR, seed)


def binary_ae_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The state dict of a binary autoencoder with its discriminator and the perceptual network."""
    table = binary_ae.table(BINARY_AE)
    tensors = _random(table, "tokenizer", "binary_ae", BINARY_AE, seed)
    rng = np.random.default_rng(seed + 1)
    layout = binary_ae.table(BINARY_AE, discriminator=DISCRIMINATOR)
    for entry in layout:
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


def _random(table, kind: str, family: str, hparams: dict, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    target = build.param_shapes(build.make_module(kind, family, hparams))
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), target)
    return dict(export_tensors(table, params, {}, hparams, target))
