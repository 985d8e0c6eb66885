"""Mode `tokenize`: a dataset to packed bits on disk, once, so that generators train on bits."""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bitgen import data, model_directory
from bitgen.data.packed import PackedWriter, pack_bits
from bitgen.errors import UserError
from bitgen.logging import say
from bitgen.mesh import BATCH, batch_sharding, even_batch, make_mesh, replicated
from bitgen.pixels import from_uint8


def run(config: Any, workdir: Path) -> None:
    """Writes `workdir/bits`: packed bits, labels and the tokenizer's identity; resumes by shard."""
    if jax.process_count() > 1:
        raise UserError("tokenize runs in one process: start it on one host")
    settings, mesh = config.tokenize, make_mesh(**config.mesh)
    tokenizer = model_directory.load(config.tokenizer, "tokenizer", replicated(mesh))
    model_directory.check_bits(tokenizer.module, tokenizer.path)
    source = config.data.copy_and_resolve_references()
    source.split, source.image_size = settings.split, tokenizer.module.image_size
    size = even_batch(settings.batch_size, mesh)
    batches = data.make_batches(source, batch_size=size, seed=config.seed, training=False)
    module, total = tokenizer.module, batches.num_examples
    writer = PackedWriter(
        workdir / "bits",
        {
            "grid": list(module.grid),
            "bits": module.bits,
            "views": settings.views,
            "num_classes": batches.num_classes,
            "class_names": list(batches.class_names),
            "count": total,
            "examples_per_shard": settings.shard,
            "tokenizer": model_directory.identity(config.tokenizer),
            "source": {k: source[k] for k in ("source", "path", "builder", "split", "holdout")},
        },
    )

    def encode(params, images):
        images = from_uint8(images)
        views = [images, images[:, :, ::-1]][: settings.views]
        bits = [module.apply({"params": params}, view, method="encode") for view in views]
        return jnp.stack([pack_bits(b) for b in bits], axis=1)

    program = jax.jit(
        jax.shard_map(encode, mesh=mesh, in_specs=(P(), BATCH), out_specs=BATCH, check_vma=False)
    )
    if writer.next_index:
        say(f"{workdir / 'bits'} goes on at image {writer.next_index} of {total}")
        batches.close()
        batches = data.make_batches(
            source, batch_size=size, seed=config.seed, training=False, start=writer.next_index
        )
    sharding, done, started, told = batch_sharding(mesh), 0, time.monotonic(), 0.0
    for batch in batches:
        images = batch["image"]
        real = len(images)
        padded = np.zeros((size, *images.shape[1:]), np.uint8)
        padded[:real] = images
        packed = program(tokenizer.params, jax.device_put(padded, sharding))
        writer.add(np.asarray(packed)[:real], batch["label"], batch["index"])
        done += real
        elapsed = time.monotonic() - started
        if elapsed - told > 10:
            told = elapsed
            say(f"tokenized {batch['index'][-1] + 1}/{total}, {done / elapsed:.0f} images/s")
    writer.finish(batches.counts()["broken"])
    say(f"wrote {workdir / 'bits'}: {total} images, {settings.views} view(s) each")
