"""Metrics of images against a reference: FID, sFID, Inception score, precision, recall, KID.

A reference is an npz file in ADM's format, a folder of images, or a split of a config's data.
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
from bitgen.hub.model_directory import Model, load_pair
from bitgen.labels import class_names_of, parse_labels
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.runtime.progress import ProgressBar, with_progress
from bitgen.runtime.watchdog import Watchdog, with_heartbeats
from bitgen.samplers.images import make_plan, prepare, sample_images

Row = dict[str, Any]


def compare(sample: Summary, reference: Summary, extractor: Extractor) -> Row:
    """Returns the metrics that the protocol defines and the reference allows, by name."""
    few = [n for n in (sample.count, reference.count) if 0 < n <= extractor.size]
    if few:
        log_info(f"{few[0]} images are few for FID: compare it only with FIDs of as many images")
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
    """Returns the summary of `count` images; `name` is for the progress line."""
    return summarise(_monitored(extractor.stream(batches), count, name, watch), count)


def measure_reference(
    config: Any, extractor: Extractor, image_size: int, watch: Watchdog
) -> Summary:
    """Returns the summary of `config.evaluate.reference`, or of `config.data` if it is empty.

    Precision, recall and KID use at most `config.evaluate.manifold` images of the data.
    """
    settings = config.evaluate
    path = settings.reference
    if not path:
        source = config.data.copy_and_resolve_references()
        source.image_size = image_size
        batches = read_share(source, settings.split, limit=settings.images, rows=extractor.rows)
        count = batches.num_examples
        features = extractor.stream(pixels(batches), shares=True)
        stream = _monitored(features, count, f"split {settings.split!r}", watch)
        keep_every = -(-count // settings.manifold) if settings.manifold else 0
        return summarise(stream, count, keep_every)
    known = None
    if not Path(path).is_dir():
        known = read_statistics(path, extractor.protocol, extractor.digest)
        if known is not None and not holds_images(path):
            return known
    measured = measure_images(path, *read_images(path, extractor.rows), extractor, watch)
    # ADM's files hold statistics of a large set beside some of its images.
    return measured if known is None else dataclasses.replace(known, features=measured.features)


def _monitored(
    features: Iterable[dict[str, np.ndarray]], count: int, name: str, watch: Watchdog
) -> Iterator[dict[str, np.ndarray]]:
    name = f"measured of {name}:"
    return with_progress(with_heartbeats(features, watch), name, count, lambda f: len(f["pool"]))


@dataclasses.dataclass
class GeneratorRun:
    """A generator, its tokenizer, and the labels of the images to measure."""

    config: Any
    folder: Path  # of features, so that a killed run resumes
    mesh: Mesh
    generator: Model
    tokenizer: Model
    labels: np.ndarray
    stores: list[FeatureStore] = dataclasses.field(default_factory=list)

    def measure(self, scale: float, extractor: Extractor, watch: Watchdog) -> Summary:
        """Returns the summary of the images at one scale of guidance; a killed run resumes."""
        sampler = {**self.config.sampler.to_dict(), "guidance": scale}
        name = f"guidance_{scale:g}_{self._digest(sampler, extractor)}"
        store = FeatureStore(self.folder / name, len(self.labels))
        self.stores.append(store)
        if store.next_index:
            log_info(f"guidance {scale:g}: resuming at image {store.next_index} of {store.count}")
        images = sample_images(
            self.generator,
            self.tokenizer,
            self.labels,
            make_plan(self.generator.module, sampler),
            self.mesh,
            seed=self.config.seed,
            first=store.next_index,
            batch_size=self.config.sample.batch_size,
            decode_batch=self.config.sample.decode_batch,
        )
        with ProgressBar(
            f"guidance {scale:g}: measured", store.count, first=store.next_index
        ) as bar:
            watch.report(f"guidance {scale:g} after {store.next_index} images", slow=True)
            for batch in images:
                for features in extractor.stream([batch]):
                    store.add(features)
                bar.to(store.next_index)
                watch.report(f"guidance {scale:g} after {store.next_index} images", slow=True)
        return summarise(store.read(), store.count)

    def remove_stores(self) -> None:
        """Deletes the features when they are no longer needed."""
        for store in self.stores:
            store.remove()

    def _digest(self, sampler: dict[str, Any], extractor: Extractor) -> str:
        """Returns a short hash of everything that the features depend on."""
        identity = {
            "generator": self.generator.info["digest"],
            "tokenizer": self.tokenizer.info["digest"],
            "labels": self.labels.tolist(),
            "seed": self.config.seed,
            "dtype": self.config.sample.dtype,
            "sampler": sampler,
            "protocol": extractor.protocol,
            "weights": extractor.digest,
        }
        text = json.dumps(identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_generator(config: Any, workdir: Path) -> GeneratorRun:
    """Returns the generator, tokenizer and labels of a config; UserError if they do not fit."""
    mesh = make_mesh(**config.mesh)
    generator, tokenizer = load_pair(config, workdir, replicated(mesh))
    names = class_names_of(generator.info)
    classes = parse_labels(config.sample.labels, generator.module.num_classes, names)
    labels = np.repeat(classes, config.sample.per_label)
    if len(labels) < 2:
        raise UserError("metrics need at least two images: raise config.sample.per_label")
    # Once for all scales of guidance.
    generator = dataclasses.replace(generator, params=prepare(generator.module, generator.params))
    return GeneratorRun(config, workdir / "evaluation.part", mesh, generator, tokenizer, labels)
