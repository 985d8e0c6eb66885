"""Mode `sample`: labels and a seed to images, any number of them."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.hub import model_directory
from bitgen.images import animation
from bitgen.images.output import make_output
from bitgen.labels import class_names_of, parse_labels
from bitgen.runtime.distributed import check_mesh, check_single, fetch_global
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import make_mesh, replicated, round_up_batch
from bitgen.runtime.progress import ProgressBar
from bitgen.runtime.watchdog import Watchdog, guard
from bitgen.samplers.images import image_keys, image_sampler, make_plan, prepare
from bitgen.samplers.progressive import progressive_images

_ANIMATED = 16  # images


def run(config: Any, workdir: Path) -> None:
    """Writes `config.sample.output` below the workdir; a folder or npz goes on where it stopped.

    The generator is `config.generator`, or the one that was trained in the workdir. An image
    depends on its index, label, seed and sampler settings, not on batch size or devices. Raises
    UserError for a label out of range, or a generator and tokenizer that do not fit.
    """
    # By output: two runs may draw into one workdir.
    name = f"sample-{Path(config.sample.output).name}"
    with guard(workdir, name, config.train.stuck_after) as watch:
        _run(config, workdir, watch)


def _run(config: Any, workdir: Path, watch: Watchdog) -> None:
    settings, mesh = config.sample, make_mesh(**config.mesh)
    check_mesh(mesh)
    if settings.animation:
        check_single("config.sample.animation")
        animation.check_animation(Path(settings.animation))
    watch.report("loading models", slow=True)
    everywhere = replicated(mesh)
    generator, tokenizer = model_directory.load_pair(config, workdir, everywhere)
    names = class_names_of(generator.info)
    labels = np.repeat(
        parse_labels(settings.labels, generator.module.num_classes, names), settings.per_label
    )
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
        [names[i] if names else str(i) for i in labels] if settings.captions else [],
    )

    # Every batch has the same shape, so that there is one program; the last is filled up.
    sampler = image_sampler(generator.module, tokenizer.module, plan, mesh, settings.decode_batch)
    params = prepare(generator.module, generator.params)
    first = output.next_index
    size = round_up_batch(min(settings.batch_size, len(labels)), mesh)
    if first:
        log_info(f"going on at image {first} of {len(labels)}")
    with ProgressBar("sampled", len(labels), first=first) as bar:
        for start in range(first, len(labels), size):
            watch.report(f"sampling from image {start} on", slow=True)
            indices = np.arange(start, start + size)
            batch = sampler(
                params,
                tokenizer.params,
                labels[np.minimum(indices, len(labels) - 1)],
                image_keys(config.seed, indices),
            )
            output.add(fetch_global(batch)[: len(labels) - start])
            bar.to(output.next_index)
    watch.report("completing the output", slow=True)
    log_info(output.finish())
    if settings.animation:
        one, other = ((model.module, model.params) for model in (generator, tokenizer))
        shown = labels[:_ANIMATED]
        keys = image_keys(config.seed, np.arange(len(shown)))
        frames = animation.sampling_frames(progressive_images(one, other, shown, keys, plan), 8)
        animation.write_animation(workdir / settings.animation, frames)
        log_info(
            f"wrote {workdir / settings.animation}: {len(frames)} steps of {len(shown)} images"
        )
