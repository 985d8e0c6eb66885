"""`zoo:NAME`: downloads and converts released checkpoints, and downloads the files of metrics.

Converted models are in the cache, `models/NAME` below $BITGEN_CACHE or ~/.cache/bitgen. A file that
cannot be downloaded has to be put where `placed` says. `zoo_entries` has the list.
"""

import fcntl
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from bitgen import build
from bitgen.errors import UserError, choose, first_line
from bitgen.hub.download import download
from bitgen.hub.zoo_entries import PARAMETERS, TILES, WEIGHTS, ZOO, Entry, WeightsFile
from bitgen.runtime.distributed import is_first

PREFIX = "zoo:"


def get(name: str) -> Entry:
    """Returns an entry by name; raises UserError if there is none."""
    return choose("model of the zoo", name.removeprefix(PREFIX), ZOO)


def settings(entry: Entry) -> dict[str, Any]:
    """Returns every setting of an entry's module."""
    return complete(entry.kind, entry.family, entry.hparams)


def complete(kind: str, family: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Returns every setting of a family's module, with defaults for those not given."""
    defaults = build.fields_of(kind, family)
    return {
        name: hparams.get(name, value)
        for name, value in defaults.items()
        if name not in build.RUN_FIELDS
    }


def find(family: str, hparams: Mapping[str, Any]) -> Entry | None:
    """Returns the entry of a family that has all the given settings, if there is one."""
    wanted = tuples(hparams).items()
    entries = (entry for entry in ZOO.values() if entry.family == family)
    return next((entry for entry in entries if wanted <= settings(entry).items()), None)


def tuples(value: Any) -> Any:
    """Returns settings read from JSON with tuples in place of lists."""
    if isinstance(value, Mapping):
        return {name: tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


def describe(family: str, hparams: Mapping[str, Any]) -> str:
    """Returns a model's size in few words: those of its entry, if it is in the zoo."""
    if entry := find(family, hparams):
        return entry.size
    if "latent_channels" in hparams:
        widths = hparams["encoder_widths"]
        return f"f{2 ** (len(widths) - 1)}c{hparams['latent_channels']}, width {widths[-1]}"
    if "bits" not in hparams or "width" not in hparams:
        sizes = [(name, value) for name, value in hparams.items() if type(value) is int]
        return ", ".join(f"{name} {value}" for name, value in sizes[:3])
    bits = f"d{hparams['bits']}"
    if "layers" in hparams:
        return f"{bits}, {hparams['layers']} layers of width {hparams['width']}"
    return f"{bits}, {hparams['image_size']} px, width {hparams['width']}"


def resolve(path: str | os.PathLike) -> Path:
    """Returns the model directory of zoo:NAME, downloaded and converted on first use, or the path.

    Raises UserError for an unknown name, and, if the file is missing and cannot be downloaded, with
    the file to get and where to put it.
    """
    if not str(path).startswith(PREFIX):
        return Path(path)
    entry = get(str(path))
    directory = cache() / "models" / entry.name
    _once(directory, directory / "model.json", lambda: _convert(_file(entry), directory, entry))
    return directory


def cache() -> Path:
    """Returns the directory of converted models and of files that were put there by hand."""
    return Path(os.environ.get("BITGEN_CACHE") or Path.home() / ".cache" / "bitgen").absolute()


def placed(entry: Entry | WeightsFile) -> Path:
    """Returns the path at which a file that was downloaded by hand is found."""
    folder = entry.family if isinstance(entry, WeightsFile) else entry.name
    return cache() / "files" / folder / entry.file


def fetch_weights(name: str) -> Path:
    """Returns the file of zoo:NAME that a metric reads, downloaded on first use.

    Raises UserError for an unknown name, and, if the file is missing and cannot be downloaded, with
    the file to get and where to put it.
    """
    entry = choose("file of the zoo", name.removeprefix(PREFIX), WEIGHTS)
    file = placed(entry)

    def fetch() -> None:
        try:
            download(entry.url, file, entry.sha256)
        except OSError as e:
            raise UserError(
                f"{entry.name} cannot be downloaded: {e}; get {entry.file} from {entry.url} and "
                f"put it at {file}"
            ) from None

    _once(file, file, fetch)
    return file


def table() -> str:
    """Returns the zoo as a table of text."""
    rows = [("NAME", "FAMILY", "SIZE", "PIXELS", "GB", "EXPECTED", "FROM")]
    for entry in ZOO.values():
        pixels = settings(ZOO.get(entry.tokenizer, entry))["image_size"]
        size = entry.size.removesuffix(f", {pixels} px")
        gigabytes = "" if entry.gigabytes is None else f"{entry.gigabytes:.2f}"
        rows.append(
            (entry.name, entry.family, size, str(pixels), gigabytes, entry.expected, entry.source)
        )
    for entry in WEIGHTS.values():
        size = f"{entry.gigabytes:.2f}"
        rows.append((entry.name, entry.family, "of metrics", "", size, "", entry.url))
    return _aligned(rows)


def parameter_table() -> str:
    """Returns the number of parameters of every known network, beside the published one.

    They are counted from shapes, which needs no weights but a few seconds per network. Running
    statistics of batch norms are not counted, as authors do not count them.
    """
    rows = [("NAME", "FAMILY", "PARAMETERS", "PUBLISHED")]
    networks = {e.name: (e.kind, e.family, dict(e.hparams)) for e in ZOO.values()}
    networks |= {name: ("tokenizer", "dcae", hparams) for name, hparams in TILES.items()}
    for name, (kind, family, hparams) in networks.items():
        module = build.make_module(kind, family, hparams)
        count = sum(
            math.prod(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(build.param_shapes(module))
            if path[-1].key not in ("mean", "var")
        )
        rows.append((name, family, f"{count / 1e6:.2f}M", PARAMETERS.get(name, "")))
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _file(entry: Entry) -> Path:
    """Returns the checkpoint file, which was put there by hand or is downloaded."""
    by_hand = placed(entry)
    if by_hand.parent.is_dir():
        for path in by_hand.parent.iterdir():
            # BitDance's authors renamed their files from 1X to 1x.
            if path.name.lower() == by_hand.name.lower() and path.is_file():
                return path
    help_ = f"get {entry.file} from {entry.source} and put it at {by_hand}"
    if not entry.repository:
        raise UserError(f"{entry.name} is on no hub: {help_}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError:
        raise UserError(
            f"downloading {entry.name} needs huggingface_hub: pip install 'bitgen[convert]', or "
            + help_
        ) from None
    logging.set_verbosity_error()  # our one line says what its lines for each try would
    if not is_first():
        disable_progress_bars()
    try:
        # The hub's own cache has what other programs downloaded, and resumes interrupted downloads.
        return Path(hf_hub_download(entry.repository, entry.path))
    except Exception as e:  # of three libraries, none of which has a class for all its errors
        raise UserError(f"{entry.name} cannot be downloaded: {first_line(e)}; {help_}") from None


def _convert(file: Path, directory: Path, entry: Entry) -> None:
    # In a process of its own: the caller may span several hosts and hold the accelerator.
    command = [sys.executable, "-m", "bitgen.convert", str(file), str(directory)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if not is_first():
        environment["TQDM_DISABLE"] = "1"
    if entry.family == "bitvae":  # some also hold an average, which the original does not read
        command.append("--weights=model")
    command.append(f"--model={entry.name}")
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{file} cannot be converted to {entry.name}: see the lines above")


def _once(path: Path, made: Path, make: Callable[[], None]) -> None:
    """Calls `make` for `path` of the cache, one process at a time, unless `made` exists."""
    if made.is_file():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"cannot write {path.parent} ({e.strerror}): set BITGEN_CACHE to a directory"
        ) from None
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():  # another process may have been faster
            make()
