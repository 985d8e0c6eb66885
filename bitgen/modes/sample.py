"""Mode `sample`: any number of images from labels and a seed."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.hub import model_directory
from bitgen.images.animation import check_animation, sampling_frames, write_animation
from bitgen.images.output import make_output
from bitgen.labels import class_names_of, parse_labels
from bitgen.runtime.distributed import FirstProcessWriter, check_mesh, check_single
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.runtime.progress import ProgressBar
from bitgen.runtime.watchdog import Watchdog, guard
from bitgen.samplers.images import make_plan, sample_images
from bitgen.samplers.progressive import progressive_images

_ANIMATED = 16  # images


def run(config: Any, workdir: Path) -> None:
    """Writes `config.sample.output` below the workdir; a folder or npz resumes where it stopped.

    The generator is `config.generator`, or the one trained in the workdir. An image depends on its
    index, label, seed and sampler settings, not on batch size or devices. Raises UserError for a
    label out of range, or a generator and tokenizer that do not fit.
    """
    # One lock per output: two runs may write into one workdir.
    name = f"sample-{Path(config.sample.output).name}"
    with guard(workdir, name, config.train.stuck_after) as watch:
        _run(config, workdir, watch)


def _run(config: Any, workdir: Path, watch: Watchdog) -> None:
    # ------------------------------------------------------------------------------------ load
    settings, mesh = config.sample, make_mesh(**config.mesh)
    check_mesh(mesh)
    if settings.animation:
        check_single("config.sample.animation")
        check_animation(Path(settings.animation))
    watch.report("loading models", slow=True)
    generator, tokenizer = model_directory.load_pair(config, workdir, replicated(mesh))

    # ------------------------------------------------------------------------------------ plan
    names = class_names_of(generator.info)
    classes = parse_labels(settings.labels, generator.module.num_classes, names)
    labels = np.repeat(classes, settings.per_label)
    captions = [names[i] if names else str(i) for i in labels] if settings.captions else []
    plan = make_plan(generator.module, config.sampler)
    identity = {
        "generator": generator.info["digest"],
        "tokenizer": tokenizer.info["digest"],
        "labels": hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()[:16],
        "seed": config.seed,
        "dtype": settings.dtype,
        "sampler": config.sampler.to_dict(),
    }
    path, columns = workdir / settings.output, _columns(settings, len(labels))
    output = FirstProcessWriter(lambda: make_output(path, labels, columns, identity, captions))
    if output.next_index:
        log_info(f"resuming at image {output.next_index} of {len(labels)}")

    # ------------------------------------------------------------------------- sample and write
    images = sample_images(
        generator,
        tokenizer,
        labels,
        plan,
        mesh,
        seed=config.seed,
        first=output.next_index,
        batch_size=settings.batch_size,
        decode_batch=settings.decode_batch,
    )
    watch.report(f"sampling from image {output.next_index} on", slow=True)
    with ProgressBar("sampled", len(labels), first=output.next_index) as bar:
        for batch in images:
            output.add(batch)
            bar.to(output.next_index)
            watch.report(f"sampling from image {output.next_index} on", slow=True)
    log_info(output.finish())
    if settings.animation:
        steps = progressive_images(
            generator, tokenizer, labels[:_ANIMATED], plan, mesh, seed=config.seed
        )
        frames = sampling_frames(steps, columns=8)
        write_animation(workdir / settings.animation, frames)
        log_info(f"wrote {workdir / settings.animation}: {len(frames)} steps")


def _columns(settings: Any, count: int) -> int:
    """Returns the config's columns, or one for each image of a label, or those of a square."""
    columns = settings.columns or settings.per_label
    return columns if columns > 1 else int(np.ceil(np.sqrt(count)))
