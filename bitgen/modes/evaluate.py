"""Mode `evaluate`: metrics of generated images, reconstructions, or representations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitgen import __version__
from bitgen.errors import UserError, choose
from bitgen.evaluation import comparison, generation, probe
from bitgen.evaluation.features import PROTOCOLS, make_extractor
from bitgen.evaluation.image_sets import read_images, read_share
from bitgen.evaluation.reconstruction import make_metrics, measure_data
from bitgen.evaluation.statistics import write_statistics
from bitgen.files import write_json
from bitgen.hub import model_directory
from bitgen.images.output import write_png
from bitgen.images.plots import plot_curves, plot_points
from bitgen.labels import parse_labels
from bitgen.runtime.distributed import check_mesh, is_first
from bitgen.runtime.logging import format_table, log_info
from bitgen.runtime.mesh import make_mesh, replicated, round_up_batch
from bitgen.runtime.progress import with_progress_of_shares
from bitgen.runtime.watchdog import Watchdog, guard, with_heartbeats

Rows = list[dict[str, Any]]


def run(config: Any, workdir: Path) -> None:
    """Writes `workdir/evaluation.json` and prints it as a table.

    `config.evaluate.kind` chooses what is measured; `configs/evaluate.py` has the commands. Raises
    UserError for files that are missing or do not fit.
    """
    kind = choose("kind of evaluation", config.evaluate.kind, KINDS)
    check_mesh(make_mesh(**config.mesh))
    with guard(workdir, "evaluate", config.train.stuck_after) as watch:
        watch.report(f"evaluating: {config.evaluate.kind}", slow=True)
        kind(config, workdir, watch)


def _finish(workdir: Path, kind: str, report: dict[str, Any]) -> None:
    if not is_first():
        return
    report = {"kind": kind, "bitgen": __version__, **report}
    write_json(workdir / "evaluation.json", report)
    print(format_table(report["results"]))
    log_info(f"wrote {workdir / 'evaluation.json'}")


def _generation(config: Any, workdir: Path, watch: Watchdog) -> None:
    """Measures images of a file or folder, or of a generator at one or more scales of guidance."""
    settings, mesh = config.evaluate, make_mesh(**config.mesh)
    scales = _numbers(settings.scales)
    if settings.samples and scales:
        raise UserError("config.evaluate.scales is for a generator: leave out evaluate.samples")
    run = None if settings.samples else generation.open_generator(config, workdir)
    extractor = make_extractor(settings.protocol, settings.weights, mesh, settings.batch_size)
    images = read_images(settings.samples, extractor.rows) if run is None else None
    size = run.tokenizer.module.image_size if run else config.data.image_size
    reference = generation.measure_reference(config, extractor, size, watch)
    if settings.save_reference:
        path = workdir / settings.save_reference
        if is_first():
            write_statistics(path, reference, extractor.protocol, extractor.digest)
        log_info(f"wrote {path}: statistics of {reference.count} images")
    rows: Rows = []
    if images is not None:
        sample = generation.measure_images(settings.samples, *images, extractor, watch)
        rows = [{"samples": settings.samples, **generation.compare(sample, reference, extractor)}]
    if run is not None:
        for scale in scales or [config.sampler.guidance]:
            sample = run.measure(scale, extractor, watch)
            rows.append({"guidance": scale, **generation.compare(sample, reference, extractor)})
    if len(rows) > 1 and "inception_score" in rows[0]:
        points = [(row["inception_score"], row["fid"]) for row in rows]
        labels = [f"{row['guidance']:g}" for row in rows]
        if is_first():
            write_png(
                workdir / "guidance.png", plot_points(points, "Inception score", "FID", labels)
            )
    kept = 0 if reference.features is None else len(reference.features)
    report = {
        "protocol": settings.protocol,
        "compare_with": PROTOCOLS[settings.protocol].compare_with,
        "weights": extractor.digest,
        "reference": settings.reference or config.data.to_dict(),
        "counts": {
            "samples": rows[0]["images"],
            "reference": reference.count,  # 0: the file does not say
            "reference_features": kept,
        },
        "settings": settings.to_dict(),
        "results": rows,
    }
    if run:
        report["sampling"] = {
            "generator": model_directory.identity(run.generator.path),
            "tokenizer": model_directory.identity(run.tokenizer.path),
            "seed": config.seed,
            "sampler": config.sampler.to_dict(),
            "labels": config.sample.labels,
            "per_label": config.sample.per_label,
        }
    _finish(workdir, "generation", report)
    if run:
        run.remove_stores()


def _reconstruction(config: Any, workdir: Path, watch: Watchdog) -> None:
    """Measures a tokenizer on a split of the data."""
    settings, mesh = config.evaluate, make_mesh(**config.mesh)
    path = config.tokenizer or workdir / "model"
    tokenizer = model_directory.load(path, "tokenizer", replicated(mesh))
    metrics = make_metrics(settings, mesh)
    found = measure_data(tokenizer, config.data, settings, mesh, metrics, watch).values
    report = {
        "protocol": settings.protocol,
        "weights": metrics.digest,
        "tokenizer": model_directory.identity(tokenizer.path),
        "counts": {"images": found["images"]},
        "data": {**config.data.to_dict(), "image_size": tokenizer.module.image_size},
        "settings": settings.to_dict(),
        "results": [{"tokenizer": tokenizer.path, **found}],
    }
    _finish(workdir, "reconstruction", report)


def _comparison(config: Any, workdir: Path, watch: Watchdog) -> None:
    """Compares tokenizers on the same images: table, page, and curves of those trained here."""
    settings, mesh = config.evaluate, make_mesh(**config.mesh)
    paths = comparison.parse_tokenizers(settings.tokenizers)
    metrics = make_metrics(settings, mesh)
    results, shown, originals = [], [], np.empty(0)
    for name, path in paths.items():
        tokenizer = model_directory.load(path, "tokenizer", replicated(mesh))
        columns = config.reconstruct.columns
        found = measure_data(tokenizer, config.data, settings, mesh, metrics, watch, show=columns)
        results.append(
            {"tokenizer": name, **comparison.code_size(tokenizer.module), **found.values}
        )
        originals = originals if shown else found.shown["original"]
        shown.append((comparison.caption(name, results[-1]), found.shown["reconstruction"]))
        log_info(shown[-1][0])
    lines = {name: comparison.validation_curve(path) for name, path in paths.items()}
    lines = {name: points for name, points in lines.items() if points}
    if is_first():
        write_png(workdir / "comparison.png", comparison.page(originals, shown))
        if lines:
            write_png(workdir / "curves.png", plot_curves(lines, "step", "validation L1"))
    report = {
        "protocol": settings.protocol,
        "weights": metrics.digest,
        "tokenizers": {name: model_directory.identity(path) for name, path in paths.items()},
        "counts": {"images": results[0]["images"]},
        "data": config.data.to_dict(),
        "settings": settings.to_dict(),
        "results": results,
    }
    _finish(workdir, "comparison", report)


def _probe(config: Any, workdir: Path, watch: Watchdog) -> None:
    """Fits a linear probe to each layer of a generator on one split, and tests it on the other."""
    settings, mesh = config.evaluate, make_mesh(**config.mesh)
    everywhere, packed = replicated(mesh), config.data.source == "bits"
    path = config.generator or workdir / "model"
    generator = model_directory.load(path, "generator", everywhere)
    tokenizer = None
    source = config.data.copy_and_resolve_references()
    if not packed:
        tokenizer = model_directory.load(config.tokenizer, "tokenizer", everywhere)
        model_directory.check_fit(generator, tokenizer)
        source.image_size = tokenizer.module.image_size
    layers = np.asarray(parse_labels(settings.layers, generator.module.layers)).tolist()
    program = probe.layer_features(
        generator.module, tokenizer and tokenizer.module, mesh, layers, packed=packed
    )
    rows = round_up_batch(settings.batch_size, mesh) // jax.process_count()
    sets, num_classes = [], 0
    for split in ("train", "test"):
        batches = read_share(source, split, limit=settings.images, rows=rows)
        params = (generator.params, tokenizer and tokenizer.params)
        told = with_progress_of_shares(batches, f"features of {split!r}:", batches.num_examples)
        sets.append(probe.collect(program, params, with_heartbeats(told, watch), rows))
        num_classes = batches.num_classes
        log_info(f"features of {len(sets[-1][1])} images of split {split!r}")
    train, test = sets
    accuracies = probe.accuracy_by_layer(
        train, test, num_classes, l2=settings.probe_l2, steps=settings.probe_steps
    )
    found = [
        {"layer": layer + 1, "accuracy": accuracy}
        for layer, accuracy in zip(layers, accuracies, strict=True)
    ]
    points = [(float(row["layer"]), 100 * row["accuracy"]) for row in found]
    if is_first():
        write_png(workdir / "probe.png", plot_points(points, "layer", "accuracy (%)"))
    report = {
        "generator": model_directory.identity(generator.path),
        "counts": {"train": len(sets[0][1]), "test": len(sets[1][1]), "classes": num_classes},
        "data": source.to_dict(),
        "settings": settings.to_dict(),
        "results": found,
    }
    _finish(workdir, "probe", report)


KINDS: dict[str, Callable[[Any, Path, Watchdog], None]] = {
    "generation": _generation,
    "reconstruction": _reconstruction,
    "comparison": _comparison,
    "probe": _probe,
}


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in str(text).split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"cannot read config.evaluate.scales={text!r}: write numbers, 1,1.5,2"
        ) from None
