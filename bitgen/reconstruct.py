"""Mode `reconstruct`: images through a tokenizer and back, with the error."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitgen import data, model_directory
from bitgen.data.images import paired_grid, write_png
from bitgen.distributed import check_single
from bitgen.figures import bit_planes
from bitgen.logging import say
from bitgen.mesh import even_batch, make_mesh, replicated
from bitgen.pixels import from_uint8, to_uint8


def run(config: Any, workdir: Path) -> None:
    """Writes `reconstructions.png` (images above reconstructions) and `reconstructions.json`.

    Of a tokenizer with bits also `bit_planes.png`: those of the first image, at its finest scale.
    The tokenizer is `config.tokenizer`, or the one that was trained in the workdir.
    """
    check_single("--mode=reconstruct")
    settings, mesh = config.reconstruct, make_mesh(**config.mesh)
    tokenizer = model_directory.load(
        config.tokenizer or workdir / "model", "tokenizer", replicated(mesh)
    )
    source = config.data.copy_and_resolve_references()
    source.split, source.image_size = settings.split, tokenizer.module.image_size
    size = even_batch(settings.batch_size, mesh)
    batches = data.make_batches(source, batch_size=size, seed=config.seed, training=False)

    @jax.jit
    def reconstruct(params, images):
        bits = tokenizer.module.apply({"params": params}, from_uint8(images), method="encode")
        recon = to_uint8(tokenizer.module.apply({"params": params}, bits, method="decode"))
        # PSNR of what is seen: 8-bit pixels, mean over images of each one's own.
        mse = jnp.mean(jnp.square(recon.astype(jnp.float32) - images), axis=(1, 2, 3))
        return recon, 10 * jnp.log10(255.0**2 / jnp.maximum(mse, 1e-3)), bits

    psnr, ones, shown, count, tokens = [], [], [], 0, 0
    for batch in batches:
        images = batch["image"]
        real = len(images)
        padded = np.concatenate([images, np.repeat(images[-1:], size - real, axis=0)])
        recon, each, bits = jax.device_get(reconstruct(tokenizer.params, padded))
        psnr.append(each[:real])
        if tokenizer.module.bits:
            scales = jax.tree.leaves(bits)  # several, or one
            if not count and jax.process_index() == 0:
                write_png(workdir / "bit_planes.png", bit_planes(scales[-1][0], recon[0]))
            ones.append(sum(x[:real].sum((0, 1, 2)) for x in scales))
            tokens = sum(x.shape[1] * x.shape[2] for x in scales)
        if count < 4 * settings.columns:
            shown.append((images, recon[:real]))
        count += real
        if settings.images and count >= settings.images:
            break
    result = {
        "tokenizer": str(tokenizer.path),
        "images": count,
        "psnr": float(np.concatenate(psnr).mean()),
    }
    if tokenizer.module.bits:  # not for continuous latents
        share = sum(ones) / (count * tokens)
        result["bits_used"] = float(np.mean((share > 0) & (share < 1)))
        result["bits_per_image"] = tokens * tokenizer.module.bits
    if jax.process_index() == 0:
        above, below = (
            np.concatenate(part)[: 4 * settings.columns] for part in zip(*shown, strict=True)
        )
        write_png(workdir / "reconstructions.png", paired_grid(above, below, settings.columns))
        (workdir / "reconstructions.json").write_text(json.dumps(result, indent=2) + "\n")
    say(
        f"{count} images of split {settings.split!r}: PSNR {result['psnr']:.2f} dB, "
        + (f"{result['bits_used']:.0%} of the bits in use; " if "bits_used" in result else "")
        + str(workdir / "reconstructions.png")
    )
