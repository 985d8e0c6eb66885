"""Mode `sample`: labels and a seed to images, any number of them."""

import hashlib
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitgen import model_directory
from bitgen.errors import UserError
from bitgen.labels import class_names_of, parse_labels
from bitgen.logging import say
from bitgen.mesh import even_batch, make_mesh, replicated
from bitgen.outputs import make_output
from bitgen.samplers.images import image_keys, image_sampler, make_plan


def run(config: Any, workdir: Path) -> None:
    """Writes `config.sample.output` below the workdir; a folder or npz goes on where it stopped.

    The generator is `config.generator`, or the one that was trained in the workdir. An image
    depends on its index, label, seed and sampler settings, not on batch size or devices. Raises
    UserError for a label out of range, or a generator and tokenizer that do not fit.
    """
    if jax.process_count() > 1:
        raise UserError("sample runs in one process: start it on one host")
    settings, mesh = config.sample, make_mesh(**config.mesh)
    everywhere = replicated(mesh)
    generator, tokenizer = model_directory.load_pair(config, workdir, everywhere)
    classes = parse_labels(
        settings.labels, generator.module.num_classes, class_names_of(generator.info)
    )
    labels = np.repeat(classes, settings.per_label)
    plan = make_plan(generator.module, config.sampler)
    columns = settings.columns or max(settings.per_label, 1)
    if columns == 1:
        columns = int(np.ceil(np.sqrt(len(labels))))
    output = make_output(
        workdir / settings.output,
        labels,
        columns,
        {
            "generator": generator.info["digest"],
            "tokenizer": tokenizer.info["digest"],
            "labels": hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()[:16],
            "seed": config.seed,
            "dtype": settings.dtype,
            "sampler": config.sampler.to_dict(),
        },
    )

    # Every batch has the same shape, so that there is one program; the last is filled up.
    sampler = image_sampler(generator.module, tokenizer.module, plan, mesh, settings.decode_batch)
    first = output.next_index
    size = even_batch(min(settings.batch_size, len(labels)), mesh)
    if first:
        say(f"going on at image {first} of {len(labels)}")
    started = time.monotonic()
    for start in range(first, len(labels), size):
        indices = np.arange(start, start + size)
        batch = sampler(
            generator.params,
            tokenizer.params,
            labels[np.minimum(indices, len(labels) - 1)],
            image_keys(config.seed, indices),
        )
        output.add(np.asarray(batch)[: len(labels) - start])
        done = output.next_index
        rate = (done - first) / (time.monotonic() - started)
        say(f"sampled {done}/{len(labels)}, {rate:.2f} images/s")
    say(output.finish())
