"""Weights made from a tensor's name, and the reference outputs in `goldens/` computed with them.

The rule gives the same numbers on every machine, so that a golden carries inputs and outputs only.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "goldens"
# Constants that no importer needs: a noise schedule, and powers of two.
NOT_MADE = ("diffusion_processor.scheduler.", "lfq.mask")
# BiGR's checkpoints hold one module under two names; both have the values of the second.
ALIASES = (("diffusion_processor._denoise_fn.", "denoise_mlp."),)


def synthetic_tensor(
    name: str, shape: tuple[int, ...], dtype: str = "float32", seed: int = 0
) -> np.ndarray:
    """The value of PyTorch tensor `name`: depends on name, shape and seed only.

    Matrices and kernels are normal with variance 1 / fan in; vectors are near one, but biases and
    running means near zero and running variances at least one. Integers are all one.
    """
    shape = tuple(shape)
    if "int" in dtype:
        return np.ones(shape, dtype)
    for alias, original in ALIASES:
        name = name.replace(alias, original)
    generator = np.random.default_rng([zlib.crc32(name.encode()), seed])
    normal = np.asarray(generator.standard_normal(shape, np.float32))
    if len(shape) > 1:
        return (normal.astype(np.float64) / math.sqrt(math.prod(shape[1:]))).astype(np.float32)
    tenth = np.float32(0.1) * normal
    if name.endswith("running_var"):
        return 1 + np.abs(tenth)
    if name.endswith("bias") or name.endswith("running_mean"):
        return tenth
    return 1 + tenth


def synthetic_state_dict(spec: dict) -> dict[str, np.ndarray]:
    """All tensors of a specification: `tensors` {name: [shape, dtype]}, maybe `seed`.

    Its `synthetic_key_prefix_removed`, if any, is part of the tensors' names but not of the rule's.
    """
    prefix = spec.get("synthetic_key_prefix_removed", "")
    seed = spec.get("seed", 0)
    return {
        name: synthetic_tensor(name.removeprefix(prefix), shape, dtype, seed)
        for name, (shape, dtype) in spec["tensors"].items()
        if not name.startswith(NOT_MADE[0]) and not name.endswith(NOT_MADE[1])
    }


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Specification and arrays of one golden: hyper-parameters and tensors; inputs and outputs."""
    spec = json.loads((GOLDENS / f"{name}.json").read_text())
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return spec, dict(arrays)
