"""LPIPS: the perceptual distance of VGG16 features (Zhang et al., arXiv 1801.03924), version 0.1.

`load_lpips` reads the parameters from the published PyTorch files:

    {"features_0": {"kernel" [3, 3, 3, 64], "bias" [64]}, ...  # 13 layers, torchvision's index
     "lin_0": {"kernel" [64]}, ...}                            # channel weights of the 5 blocks
"""

import re
import zipfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bitgen.errors import UserError, first_line

# (channels, index of the convolutions in torchvision's `vgg16().features`) of each block.
BLOCKS = (
    (64, (0, 2)),
    (128, (5, 7)),
    (256, (10, 12, 14)),
    (512, (17, 19, 21)),
    (512, (24, 26, 28)),
)
# The ImageNet mean and standard deviation for images in [-1, 1], as rounded in the published file.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

VGG_FILE = "vgg16-397923af.pth"
LIN_FILE = "vgg.pth"
# A released B-AE, which holds the whole network as `perceptual.*`.
HUB_REPOSITORY = "haoosz/BiGR"
HUB_FILE = "bae/bae_d24/binaryae_ema_1000000.th"
HELP = (
    f"put torchvision's {VGG_FILE} and the lpips package's {LIN_FILE} (its folder weights/v0.1) in "
    "one directory and give that, or give a released B-AE checkpoint (binaryae_ema_*.th), or set "
    "config.loss.perceptual_weight=0"
)

# The prefix in a training checkpoint, `perceptual.` of a B-AE, `loss.perceptual_loss.` of a VQGAN.
_PREFIX = re.compile(r"(?:.*\.)?perceptual(?:_loss)?\.")
# Other names -> those of `_torch_name`; the lpips package lists each channel weight twice.
_SYNONYMS = (
    (re.compile(r"^net\.slice[1-5]\."), "features."),
    (re.compile(r"^lins?\.?([0-4])\.model\.[01]\."), r"lin\1.model.1."),
)
_SCALING = re.compile(r"scaling_layer\.(shift|scale)")
_CLASSIFIER = re.compile(r"(classifier|pre_logits|head)\..*")  # VGG16's last layers, not used


def lpips_distance(
    params: PyTree,
    images0: Float[Array, "b H W 3"],
    images1: Float[Array, "b H W 3"],
    *,
    dtype: Any = jnp.float32,
) -> Float[Array, " b"]:
    """Returns the LPIPS distance of each pair of images in [-1, 1], 0 for equal ones.

    Convolutions compute in `dtype`, the rest in float32. The gradient is finite where features are
    zero. Raises UserError if the shapes differ or a side is below 16 pixels.
    """
    if images0.shape != images1.shape or images0.ndim != 4 or images0.shape[-1] != 3:
        raise UserError(
            f"LPIPS needs two equal shapes [b, H, W, 3], got {images0.shape} and {images1.shape}"
        )
    if min(images0.shape[1:3]) < 16:
        raise UserError(
            f"LPIPS needs images of at least 16 pixels a side, got {images0.shape}: "
            "set config.loss.perceptual_weight=0 for smaller ones"
        )
    # Two passes, because concatenating the images would move a sharded batch between devices.
    x, y = _standardise(images0, dtype), _standardise(images1, dtype)
    distance = jnp.zeros(images0.shape[0], jnp.float32)
    for block, (_, layers) in enumerate(BLOCKS):
        if block > 0:
            x, y = (nn.max_pool(z, (2, 2), strides=(2, 2)) for z in (x, y))
        for layer in layers:
            x, y = (_conv_relu(params[f"features_{layer}"], z) for z in (x, y))
        difference = jnp.square(_unit_length(x) - _unit_length(y))
        weight = params[f"lin_{block}"]["kernel"].astype(jnp.float32).reshape(1, 1, 1, -1)
        distance += jnp.mean(jnp.sum(difference * weight, axis=-1), axis=(1, 2))
    return distance


def _standardise(images: Array, dtype: Any) -> Array:
    shift = jnp.array(SHIFT, jnp.float32).reshape(1, 1, 1, 3)
    scale = jnp.array(SCALE, jnp.float32).reshape(1, 1, 1, 3)
    return ((images.astype(jnp.float32) - shift) / scale).astype(dtype)


def _conv_relu(layer: PyTree, x: Array) -> Array:
    kernel, bias = layer["kernel"].astype(x.dtype), layer["bias"].astype(x.dtype)
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
    return nn.relu(y + bias.reshape(1, 1, 1, -1))


def _unit_length(features: Array) -> Array:
    x = features.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # The derivative of sqrt at zero is infinite, so it is kept out of both branches.
    positive = square > 0
    length = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
    return x / (length + 1e-10)


def lpips_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the parameter tree of `lpips_distance` with a shape for each leaf."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    inputs = 3
    for block, (channels, layers) in enumerate(BLOCKS):
        for layer in layers:
            shapes[f"features_{layer}"] = {"kernel": (3, 3, inputs, channels), "bias": (channels,)}
            inputs = channels
        shapes[f"lin_{block}"] = {"kernel": (channels,)}
    return shapes


def load_lpips(source: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of `lpips_distance`, float32 numpy arrays, from PyTorch files.

    `source` is one of
    - a .pth, .pt, .th, .bin or .safetensors file with VGG16 and the channel weights, under the
      names of taming-transformers, of the lpips package, or of torchvision (`features.N`) plus
      `linN.model.1`, alone or inside a training checkpoint as `perceptual.*` or
      `*.perceptual_loss.*`;
    - a directory with torchvision's vgg16-397923af.pth and vgg.pth of the lpips package or taming;
    - "hub", for the released B-AE of haoosz/BiGR, 332 MB, from the Hugging Face hub.

    Raises UserError if a file is absent or unreadable, or lists all tensors that are missing,
    unknown, misshaped, or given twice with different values.
    """
    if str(source) == "hub":
        paths = [_download()]
    elif Path(source).is_dir():
        paths = [Path(source) / VGG_FILE, Path(source) / LIN_FILE]
    else:
        paths = [Path(source)]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        raise UserError(f"LPIPS weights: no file {', '.join(absent)}: {HELP}")
    tensors = [item for path in paths for item in _lpips_tensors(_read(path)).items()]
    return params_from_tensors(tensors, " and ".join(str(path) for path in paths))


def _download() -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError as error:
        raise UserError("LPIPS from the hub: run pip install 'bitgen[convert]' first") from error
    logging.set_verbosity_error()  # our error replaces its warnings
    if jax.process_index():
        disable_progress_bars()
    try:
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE))
    except Exception as error:  # errors of the client, the network and the system
        reason = f"cannot get {HUB_FILE} of {HUB_REPOSITORY} ({first_line(error)})"
        raise UserError(f"LPIPS weights: {reason}: {HELP}") from error


def _read(path: Path) -> dict[str, Any]:
    """Returns all tensors of a file by name, as torch tensors or numpy arrays."""
    if path.suffix not in (".pth", ".pt", ".th", ".bin", ".safetensors"):
        raise UserError(
            f"LPIPS weights: {path} is not a .pth, .pt, .th, .bin or .safetensors file: {HELP}"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return load_file(path)
        import torch

        # Only zip files can be mapped; the published vgg.pth precedes that format.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except ImportError as error:
        raise UserError(f"to read {path} run pip install 'bitgen[convert]' first") from error
    except Exception as error:  # pickle, zip, safetensors and torch have their own types
        reason = first_line(error)
        raise UserError(f"LPIPS weights: cannot read {path} ({reason}): {HELP}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(hasattr(x, "shape") for x in content.values()):
        raise UserError(f"LPIPS weights: {path} is not a state dict of tensors: {HELP}")
    return content


def _lpips_tensors(tensors: dict[str, Any]) -> dict[str, Any]:
    """Returns the tensors of the LPIPS inside a training checkpoint, else all."""
    inside = {name: value for name, value in tensors.items() if _PREFIX.match(name)}
    return {_PREFIX.sub("", name, count=1): value for name, value in (inside or tensors).items()}


def params_from_tensors(
    tensors: list[tuple[str, Any]], origin: str
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors renamed and transposed; raises a UserError that lists all faults."""
    leaves = {
        _torch_name(module, leaf): (module, leaf, shape)
        for module, shapes in lpips_shapes().items()
        for leaf, shape in shapes.items()
    }
    tree: dict[str, dict[str, np.ndarray]] = {}
    filled_by: dict[str, str] = {}
    faults = []
    for name, value in tensors:
        if _CLASSIFIER.fullmatch(name):
            continue
        if scaling := _SCALING.fullmatch(name):
            constants = SHIFT if scaling[1] == "shift" else SCALE
            if not np.allclose(np.ravel(_to_numpy(value)), constants, atol=1e-6):
                faults.append(f"{name}: not the constants {constants}")
            continue
        key = name
        for pattern, replacement in _SYNONYMS:
            key = pattern.sub(replacement, key)
        if key not in leaves:
            faults.append(f"{name}: unknown")
            continue
        module, leaf, shape = leaves[key]
        array = _to_numpy(value)
        if module.startswith("lin_"):
            array = array.reshape(-1) if array.shape == (1, array.size, 1, 1) else array
        elif array.ndim == 4:
            array = np.ascontiguousarray(array.transpose(2, 3, 1, 0))
        if array.shape != shape:
            faults.append(f"{name}: shape {tuple(value.shape)} does not give {shape}")
        elif key in filled_by and not np.array_equal(tree[module][leaf], array):
            faults.append(f"{name}: differs from {filled_by[key]}")
        tree.setdefault(module, {})[leaf] = array
        filled_by[key] = name
    faults += [f"{key}: missing" for key in leaves if key not in filled_by]
    if not filled_by:
        raise UserError(f"LPIPS weights: {origin} holds no VGG16 or LPIPS tensor: {HELP}")
    if faults:
        raise UserError(f"LPIPS weights in {origin}: {'; '.join(faults)}. {HELP}")
    return tree


def _torch_name(module: str, leaf: str) -> str:
    kind, number = module.split("_")
    if kind == "lin":
        return f"lin{number}.model.1.weight"
    return f"features.{number}.{'weight' if leaf == 'kernel' else 'bias'}"


def _to_numpy(value: Any) -> np.ndarray:
    """Returns a float32 copy, which keeps no mapped file open."""
    if not isinstance(value, np.ndarray):
        value = value.detach().float().numpy()
    return np.array(value, dtype=np.float32)
