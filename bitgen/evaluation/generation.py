"""Measures sets of images against a reference: FID, sFID, Inception score, precision, recall, KID.

A reference is an npz file of ADM's form, a folder of images, or a split of a config's data.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from bitgen.errors import UserError
from bitgen.evaluation.feature_store import FeatureStore
from bitgen.evaluation.features import Extractor
from bitgen.evaluation.frechet import frechet_distance, kernel_distance
from bitgen.evaluation.image_sets import holds_images, pixels, read_images, read_share
from bitgen.evaluation.precision_recall import precision_recall
from bitgen.evaluation.statistics import SPLIT, Summary, read_statistics, summarise
from bitgen.hub import model_directory
from bitgen.labels import class_names_of, parse_labels
from bitgen.runtime.distributed import fetch_global
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import make_mesh, replicated, round_up_batch
from bitgen.runtime.progress import ProgressBar, with_progress
from bitgen.runtime.watchdog import Watchdog, with_heartbeats
from bitgen.samplers.images import image_keys, image_sampler, make_plan, prepare

Row = dict[str, Any]


def compare(sample: Summary, reference: Summary, extractor: Extractor) -> Row:
    """Returns the metrics that the protocol defines and the reference allows, by name."""
    few = [n for n in (sample.count, reference.count) if 0 < n <= extractor.size]
    if few:
        log_info(f"{few[0]} images are few for FID: it is comparable only with that of as many")
    row: Row = {
        "images": sample.count,
        "fid": frechet_distance(sample.pool, reference.pool),
    }
    if extractor.protocol == "pytorch_fid":  # which defines nothing else
        return row
    if sample.spatial is not None and reference.spatial is not None:
        row["sfid"] = frechet_distance(sample.spatial, reference.spatial)
    row["inception_score"] = sample.score
    if sample.count > SPLIT:  # otherwise they are the same
        row["inception_score_in_order"] = sample.score_in_order
    if sample.features is not None and reference.features is not None:
        row["precision"], row["recall"] = precision_recall(reference.features, sample.features)
        row["kid"] = kernel_distance(sample.features, reference.features)[0]
    return row


def measure_images(
    name: str, count: int, batches: Iterable[np.ndarray], extractor: Extractor, watch: Watchdog
) -> Summary:
    """Returns the summary of `count` images, which the progress line calls `name`."""
    return summarise(told(extractor.stream(batches), count, name, watch), count)


def measure_reference(
    config: Any, extractor: Extractor, image_size: int, watch: Watchdog
) -> Summary:
    """Returns the summary of `config.evaluate.reference`, or of `config.data` if it is empty.

    Of data, `config.evaluate.manifold` images at most are kept for precision, recall and KID.
    """
    settings = config.evaluate
    path = settings.reference
    if not path:
        source = config.data.copy_and_resolve_references()
        source.image_size = image_size
        batches = read_share(source, settings.split, limit=settings.images, rows=extractor.rows)
        count = batches.num_examples
        features = extractor.stream(pixels(batches), shares=True)
        stream = told(features, count, f"split {settings.split!r}", watch)
        keep_every = -(-count // settings.manifold) if settings.manifold else 0
        return summarise(stream, count, keep_every)
    known = None
    if not Path(path).is_dir():
        known = read_statistics(path, extractor.protocol, extractor.digest)
        if known is not None and not holds_images(path):
            return known
    seen = measure_images(path, *read_images(path, extractor.rows), extractor, watch)
    # ADM's files: statistics of a large set beside some of its images.
    return seen if known is None else dataclasses.replace(known, features=seen.features)


@dataclasses.dataclass
class GeneratorRun:
    """A generator, its tokenizer, and what is to be drawn with them, as mode `sample` draws."""

    config: Any
    folder: Path  # of features, for a killed run to go on
    mesh: Mesh
    generator: model_directory.Model
    tokenizer: model_directory.Model
    labels: np.ndarray
    stores: list[FeatureStore] = dataclasses.field(default_factory=list)

    def measure(self, scale: float, extractor: Extractor, watch: Watchdog) -> Summary:
        """Returns the summary of the images at a scale of guidance; a killed run goes on."""
        store = FeatureStore(self.folder / self._name(scale, extractor), len(self.labels))
        self.stores.append(store)
        first = store.next_index
        if first:
            log_info(f"guidance {scale:g}: going on at image {first} of {store.count}")
        with ProgressBar(f"guidance {scale:g}: measured", store.count, first=first) as bar:
            for images in self._images(scale, first):
                watch.report(f"guidance {scale:g} after {store.next_index} images", slow=True)
                for features in extractor.stream([images]):
                    store.add(features)
                bar.to(store.next_index)
        return summarise(store.read(), store.count)

    def remove_stores(self) -> None:
        """Deletes the features, once they are not needed."""
        for store in self.stores:
            store.remove()

    def _name(self, scale: float, extractor: Extractor) -> str:
        identity = {
            "generator": self.generator.info["digest"],
            "tokenizer": self.tokenizer.info["digest"],
            "labels": self.labels.tolist(),
            "seed": self.config.seed,
            "dtype": self.config.sample.dtype,
            "sampler": {**self.config.sampler.to_dict(), "guidance": scale},
            "protocol": extractor.protocol,
            "weights": extractor.digest,
        }
        text = json.dumps(identity, sort_keys=True)
        return f"guidance_{scale:g}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _images(self, scale: float, first: int) -> Iterator[np.ndarray]:
        """Yields the images from index `first` on, in batches of one size, the last cut."""
        count, labels = len(self.labels), self.labels
        size = round_up_batch(min(self.config.sample.batch_size, count), self.mesh)
        settings = {**self.config.sampler.to_dict(), "guidance": scale}
        sampler = image_sampler(
            self.generator.module,
            self.tokenizer.module,
            make_plan(self.generator.module, settings),
            self.mesh,
            self.config.sample.decode_batch,
        )
        for start in range(first, count, size):
            indices = np.arange(start, start + size)
            images = sampler(
                self.generator.params,
                self.tokenizer.params,
                labels[np.minimum(indices, count - 1)],
                image_keys(self.config.seed, indices),
            )
            yield fetch_global(images)[: count - start]


def open_generator(config: Any, workdir: Path) -> GeneratorRun:
    """Returns what `config` asks for; raises UserError for models that do not fit."""
    mesh = make_mesh(**config.mesh)
    everywhere = replicated(mesh)
    generator, tokenizer = model_directory.load_pair(config, workdir, everywhere)
    names = class_names_of(generator.info)
    classes = parse_labels(config.sample.labels, generator.module.num_classes, names)
    labels = np.repeat(classes, config.sample.per_label)
    if len(labels) < 2:
        raise UserError("metrics need two images at least: raise config.sample.per_label")
    # Once for all scales of guidance.
    generator = dataclasses.replace(generator, params=prepare(generator.module, generator.params))
    return GeneratorRun(config, workdir / "evaluation.part", mesh, generator, tokenizer, labels)


def told(features: Iterable[dict], count: int, what: str, watch: Watchdog) -> Iterator[dict]:
    """Passes features on, and tells how many of `count` have come."""
    what = f"measured of {what}:"
    return with_progress(
        with_heartbeats(features, watch), what, count, lambda batch: len(batch["pool"])
    )
