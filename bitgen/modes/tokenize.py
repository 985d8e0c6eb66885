"""Mode `tokenize`: stores a dataset as packed bits, so that generators train on the bits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bitgen import data
from bitgen.data.packed import PackedWriter, pack_bits
from bitgen.hub import model_directory
from bitgen.images.pixels import from_uint8
from bitgen.runtime.distributed import FirstProcessWriter, check_mesh, gather, gather_rows, pad_rows
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import BATCH, make_mesh, replicated, round_up_batch, to_device
from bitgen.runtime.progress import ProgressBar
from bitgen.runtime.watchdog import Watchdog, guard


def run(config: Any, workdir: Path) -> None:
    """Writes `workdir/bits`: packed bits, labels and the tokenizer's identity; resumes by shard."""
    with guard(workdir, "tokenize", config.train.stuck_after) as watch:
        _run(config, workdir, watch)


def _run(config: Any, workdir: Path, watch: Watchdog) -> None:
    settings, mesh = config.tokenize, make_mesh(**config.mesh)
    check_mesh(mesh)
    watch.report("loading the tokenizer", slow=True)
    tokenizer = model_directory.load(config.tokenizer, "tokenizer", replicated(mesh))
    model_directory.check_bits(tokenizer.module, tokenizer.path)
    source = config.data.copy_and_resolve_references()
    source.split, source.image_size = settings.split, tokenizer.module.image_size
    size = round_up_batch(settings.batch_size, mesh)
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = data.make_batches(
        source, batch_size=size, seed=config.seed, training=False, **processes
    )
    module, total = tokenizer.module, batches.num_examples
    meta = {
        "grid": list(module.grid),
        "bits": module.bits,
        "views": settings.views,
        "num_classes": batches.num_classes,
        "class_names": list(batches.class_names),
        "count": total,
        "examples_per_shard": settings.shard,
        "tokenizer": model_directory.identity(config.tokenizer),
        "source": {k: source[k] for k in ("source", "path", "builder", "split", "holdout")},
    }
    writer = FirstProcessWriter(lambda: PackedWriter(workdir / "bits", meta))
    first = writer.next_index

    def encode(params, images):
        images = from_uint8(images)
        views = [images, images[:, :, ::-1]][: settings.views]
        bits = [module.apply({"params": params}, view, method="encode") for view in views]
        return jnp.stack([pack_bits(b) for b in bits], axis=1)

    program = jax.jit(
        jax.shard_map(encode, mesh=mesh, in_specs=(P(), BATCH), out_specs=BATCH, check_vma=False)
    )
    if first:
        log_info(f"resuming {workdir / 'bits'} at image {first} of {total}")
        batches.close()
        batches = data.make_batches(
            source, batch_size=size, seed=config.seed, training=False, start=first, **processes
        )
    rows = size // jax.process_count()
    with ProgressBar("tokenized", total, first=first) as bar:
        for batch in batches:
            watch.report(f"encoding after {bar.done} images", slow=bar.done == first)
            real = len(batch["image"])
            placed = to_device({"image": pad_rows(batch["image"], rows)}, mesh)
            packed = program(tokenizer.params, placed["image"])
            label, index = (pad_rows(batch[name], rows) for name in ("label", "index"))
            packed, label, index = gather_rows((packed, label, index), real)
            writer.add(packed, label, index)
            bar.add(len(index))
    watch.report("completing the bits", slow=True)
    broken = int(gather(np.asarray([batches.counts()["broken"]])).sum())
    writer.finish(broken)
    log_info(f"wrote {workdir / 'bits'}: {total} images, {settings.views} view(s) each")
