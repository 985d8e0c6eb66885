"""Mode `sample`: labels and a seed to a grid of images."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitgen import model_directory
from bitgen.data.images import grid, write_png
from bitgen.errors import UserError
from bitgen.logging import say
from bitgen.mesh import make_mesh, replicated, shards_of_batch
from bitgen.samplers.images import image_keys, image_sampler
from bitgen.samplers.masked import MaskedPlan


def run(config: Any, workdir: Path) -> None:
    """Writes `config.sample.output` and the images' labels below the workdir.

    The generator is `config.generator`, or the one that was trained in the workdir. Raises UserError
    for a label out of range, or a generator and tokenizer that do not fit.
    """
    mesh = make_mesh(**config.mesh)
    everywhere = replicated(mesh)
    generator = model_directory.load(
        config.generator or workdir / "model", "generator", everywhere
    )
    tokenizer = model_directory.load(config.tokenizer, "tokenizer", everywhere)
    model_directory.check_fit(generator, tokenizer)
    labels = np.repeat(
        parse_labels(config.sample.labels, generator.module.num_classes), config.sample.per_label
    )
    sampler = image_sampler(generator.module, tokenizer.module, _plan(config), mesh)

    # Every batch has the same shape, so that there is one program; the last is filled up.
    shards = shards_of_batch(mesh)
    size = -(-min(config.sample.batch_size, len(labels)) // shards) * shards
    images, started = [], time.monotonic()
    for start in range(0, len(labels), size):
        indices = np.arange(start, start + size)
        batch = sampler(
            generator.params,
            tokenizer.params,
            labels[np.minimum(indices, len(labels) - 1)],
            image_keys(config.seed, indices),
        )
        images.append(np.asarray(batch)[: len(labels) - start])
        done = min(start + size, len(labels))
        say(f"sampled {done}/{len(labels)}, {done / (time.monotonic() - started):.2f} images/s")
    columns = config.sample.columns or max(config.sample.per_label, 1)
    if columns == 1:
        columns = int(np.ceil(np.sqrt(len(labels))))
    path = workdir / config.sample.output
    if jax.process_index() == 0:
        write_png(path, grid(np.concatenate(images), columns))
    say(f"wrote {path}: {len(labels)} images, {columns} a row")


def parse_labels(text: str, num_classes: int) -> np.ndarray:
    """Returns the labels of '3', '0-9', '207,360-362' or 'all'; UserError if one is not there."""
    if text == "all":
        return np.arange(num_classes)
    labels: list[int] = []
    for part in str(text).split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last.isdigit() or not last):
            raise UserError(f"cannot read the label {part!r}: write indices and ranges, 0-9,207")
        labels += range(int(first), int(last or first) + 1)
    for label in labels:
        if label >= num_classes:
            raise UserError(f"label {label} is out of range: the model has classes 0 to {num_classes - 1}")
    if not labels:
        raise UserError(f"no labels in {text!r}: write indices and ranges, 0-9,207")
    return np.array(labels)


def _plan(config: Any) -> MaskedPlan:
    return MaskedPlan(**config.sampler)
