"""Compares tokenizers on the same images: a table, a page of pictures, and their curves."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from bitgen.errors import UserError

_CELL, _GAP, _CAPTION, _FLOAT_BITS = 96, 4, 22, 32


def parse_tokenizers(text: str) -> dict[str, str]:
    """Returns name -> model directory of 'NAME=DIR,DIR,...'; the default name is that of the DIR.

    Raises UserError for fewer than two, or two with one name.
    """
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, path = part.rpartition("=")
        directory = Path(path)
        # workdir/model is known by its workdir
        name = name or (directory.parent.name if directory.name == "model" else directory.name)
        if name in found:
            raise UserError(
                f"config.evaluate.tokenizers has two named {name!r}; write NAME=DIR,NAME=DIR"
            )
        found[name] = path
    if len(found) < 2:
        raise UserError(
            f"config.evaluate.tokenizers={text!r}: a comparison needs at least two, DIR,DIR or "
            "NAME=DIR,NAME=DIR"
        )
    return found


def code_size(tokenizer: Any) -> dict[str, Any]:
    """Returns `code`, in words, `bits_per_pixel`, and `ratio`: an image's numbers per code number.

    A continuous latent counts as 32 bits. The ratio of a bit tokenizer compares bits, with 8 per
    number of the image.
    """
    size = tokenizer.image_size
    images = jax.ShapeDtypeStruct((1, size, size, tokenizer.channels), jnp.float32)

    def encode(images):
        variables = tokenizer.init(jax.random.key(0), images, method="encode")
        return tokenizer.apply(variables, images, method="encode")

    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(encode, images)))
    whole = size * size * tokenizer.channels
    if tokenizer.bits:
        return {
            "code": f"{numbers} bits",
            "bits_per_pixel": numbers / size**2,
            "ratio": 8 * whole / numbers,
        }
    return {
        "code": f"{numbers} floats",
        "bits_per_pixel": numbers * _FLOAT_BITS / size**2,
        "ratio": whole / numbers,
    }


def page(
    originals: UInt8[np.ndarray, "n S S 3"],
    rows: Sequence[tuple[str, UInt8[np.ndarray, "n S S 3"]]],
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the originals in a row, and below each caption a row of reconstructions.

    Reconstructions are resized to the originals.
    """
    side = originals.shape[1] * max(1, _CELL // originals.shape[1])
    width = len(originals) * (side + _GAP) + _GAP
    every = [("original", originals), *rows]
    sheet = Image.new("RGB", (width, len(every) * (side + _CAPTION + _GAP)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for i, (caption, images) in enumerate(every):
        top = i * (side + _CAPTION + _GAP)
        pen.text((_GAP, top + _CAPTION - 4), caption, fill=(40, 40, 40), font=font, anchor="ls")
        for j, image in enumerate(images):
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (_GAP + j * (side + _GAP), top + _CAPTION))
    return np.asarray(sheet)


def caption(name: str, row: Mapping[str, Any]) -> str:
    """Returns a row's name, size of code and errors in one line."""
    parts = [f"{name}: {row['code']}, {row['bits_per_pixel']:.3g} bits a pixel"]
    parts.append(f"PSNR {row['psnr']:.2f}")
    parts += [f"{label} {row[key]:.3f}" for key, label in _ERRORS.items() if key in row]
    return ", ".join(parts)


_ERRORS = {"ssim": "SSIM", "lpips": "LPIPS", "l1": "L1"}


def validation_curve(directory: str, metric: str = "val_l1") -> list[tuple[float, float]]:
    """Returns (step, value) of a metric from the workdir of a model directory, if there is one."""
    path = Path(directory).parent / "metrics.jsonl"
    if Path(directory).name != "model" or not path.is_file():
        return []
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [(row["step"], row[metric]) for row in rows if metric in row]
