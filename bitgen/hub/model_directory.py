"""Model directories: `model.json`, which describes the model, and its Orbax parameters.

Training and conversion write them, and every mode reads them. An imported model also has
`carried.npz` if its original file has tensors that the model does not use, such as the
discriminator of a tokenizer; they keep their original names. A path may be `zoo:NAME`, a released
model (`zoo`).
"""

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bitgen import build
from bitgen.errors import UserError, choose, first_line, is_disk_full
from bitgen.hub import streaming, zoo
from bitgen.hub.streaming import LazyArray
from bitgen.runtime.distributed import fetch_global, is_first, on_first
from bitgen.version import __version__

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model directory."""

    module: Any  # of flax.linen
    params: dict[str, Any]
    info: dict[str, Any]  # model.json: format, kind, family, hparams, origin, digest
    path: str


def write(
    directory: str | os.PathLike,
    info: dict[str, Any],
    params: Any,
    carried: Iterable[tuple[str, np.ndarray]] = (),
) -> None:
    """Writes a model directory; it appears, or replaces the one before, only when complete.

    Args:
      directory: where to; UserError if something other than a model directory is there.
      info: kind ('tokenizer' or 'generator'), family, hparams and origin.
      params: nested dict of arrays; or, in a single process, of LazyArray, one in memory at a time.
      carried: names and values of tensors to keep beside the model, no half types.
    """
    directory = Path(os.path.abspath(directory))
    primary = is_first()
    temporary = directory.with_name(directory.name + ".writing")
    on_first(lambda: check_replaceable(directory))
    try:
        on_first(lambda: _make_empty(temporary))
        if any(isinstance(leaf, LazyArray) for leaf in jax.tree.leaves(params)):
            hashed = streaming.save(temporary / "params", params)
        else:
            if jax.process_count() == 1:  # Orbax would slice what several devices hold whole
                params = jax.device_get(params)
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(temporary / "params", args=ocp.args.StandardSave(params))
            hashed = digest(params)
        if primary:
            _write_carried(temporary / "carried.npz", carried)
            info = {"format": FORMAT, "bitgen": __version__, **info, "digest": hashed}
            (temporary / "model.json").write_text(json.dumps(info, indent=2) + "\n")
            old = directory.with_name(directory.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            if directory.exists():
                os.replace(directory, old)
            os.replace(temporary, directory)
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, ValueError) as e:
        if is_disk_full(e):  # TensorStore's errors are ValueErrors
            raise UserError(f"the disk is full: {directory} was not written") from None
        raise
    finally:
        if primary:
            shutil.rmtree(temporary, ignore_errors=True)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def check_replaceable(directory: Path) -> None:
    """Raises UserError if something other than a model directory is there."""
    if directory.is_dir() and not (directory / "model.json").is_file() and any(directory.iterdir()):
        raise UserError(f"{directory} has other files in it, choose a new directory")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, choose a new directory")


def read_info(path: str | os.PathLike) -> dict[str, Any]:
    """Returns model.json; raises UserError if `path` is not a model directory."""
    file = zoo.resolve(path) / "model.json"
    if Path(path).is_file():
        raise UserError(
            f"{path} is a file: `python -m bitgen.convert {path} DIR` makes a model of it"
        )
    if not file.is_file():
        raise UserError(f"{path} is not a model directory: it has no model.json")
    try:
        info = json.loads(file.read_text())
    except ValueError as e:
        raise UserError(f"{file} is damaged: {e}") from None
    if info.get("format") != FORMAT:
        raise UserError(
            f"{file} has format {info.get('format')}, this version reads format {FORMAT}"
        )
    return info


def describe(path: str | os.PathLike, kind: str, **fields: Any) -> Any:
    """Returns the module of a model directory; zoo:NAME is not downloaded for it.

    Raises UserError if there is no model or it is of another kind.
    """
    info = _info(path, kind, fetch=False)
    return build.make_module(kind, info["family"], {**info["hparams"], **fields})


def _info(path: str | os.PathLike, kind: str, fetch: bool = True) -> dict[str, Any]:
    """Returns the model.json of a model of this kind, or the zoo's before it is downloaded."""
    if not str(path):
        raise UserError(f"no {kind} given: set --config.{kind}=DIR to a model directory")
    if str(path).startswith(zoo.PREFIX) and not fetch:
        entry = zoo.get(str(path))
        info = {"kind": entry.kind, "family": entry.family, "hparams": zoo.settings(entry)}
    else:
        info = read_info(path)
    if info["kind"] != kind:
        raise UserError(f"{path} holds a {info['kind']} ({info['family']}), not a {kind}")
    return info


def load(path: str | os.PathLike, kind: str, sharding: Any = None, **fields: Any) -> Model:
    """Returns the model in a directory, its parameters placed by `sharding`.

    Args:
      path: the directory, or zoo:NAME.
      kind: 'tokenizer' or 'generator'; UserError if it is the other.
      sharding: of every parameter; by default the first device of this process.
      **fields: of the module that are not part of the model, such as dtype.
    """
    info = _info(path, kind)
    module = build.make_module(kind, info["family"], {**info["hparams"], **fields})
    shapes = build.param_shapes(module)
    # Check before reading: a failed Orbax restore leaves threads behind.
    if faults := build.shape_faults(open_params(path), shapes):
        raise UserError(
            f"the parameters in {path} do not match its model.json: {faults[0]} "
            f"({len(faults)} differ)"
        )
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes
    )
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            params = checkpointer.restore(
                zoo.resolve(path).absolute() / "params", args=ocp.args.StandardRestore(target)
            )
    except (ValueError, KeyError, FileNotFoundError, OSError) as e:
        raise UserError(
            f"the parameters in {path} do not match its model.json: {first_line(e)}"
        ) from None
    return Model(module, params, info, str(path))


def identity(path: str | os.PathLike) -> dict[str, Any]:
    """Returns family and digest, which identify a model independently of its path."""
    info = read_info(path)
    return {"family": info["family"], "digest": info["digest"]}


def load_carried(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors that the import kept, by their original names; often none."""
    file = zoo.resolve(path) / "carried.npz"
    if not file.is_file():
        return {}
    try:
        # Opened here, because np.load leaves a damaged file open.
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, OSError, zipfile.BadZipFile) as e:
        raise UserError(f"{file} is damaged: {e}") from None


def open_params(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the parameters as a nested dict of arrays that are read one at a time."""
    try:
        return streaming.open_arrays(zoo.resolve(path).absolute() / "params")
    except (ValueError, KeyError, OSError) as e:
        raise UserError(f"the parameters in {path} cannot be read: {first_line(e)}") from None


def digest(params: Any) -> str:
    """Returns a short hash of names, shapes, dtypes and values; every process must call it."""
    running = streaming.Digest()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        running.add(path, fetch_global(leaf) if isinstance(leaf, jax.Array) else leaf)
    return running.value()


def _write_carried(path: Path, carried: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes an npz file, one array in memory at a time; no file if there are no arrays."""
    with zipfile.ZipFile(path, "w") as file:
        for name, value in carried:
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, value, allow_pickle=False)
    if not file.namelist():
        path.unlink()


def load_pair(config: Any, workdir: Path, sharding: Any) -> tuple[Model, Model]:
    """Returns the generator and the tokenizer of a config, to compute in `config.sample.dtype`.

    The generator is `config.generator`, or the one trained in the workdir. Raises UserError if one
    of them cannot be loaded, or they do not fit.
    """
    dtype = choose("dtype", config.sample.dtype, build.DTYPES)
    generator = load(config.generator or workdir / "model", "generator", sharding)
    tokenizer = load(config.tokenizer, "tokenizer", sharding)
    check_fit(generator, tokenizer)
    one, other = (
        dataclasses.replace(model, module=model.module.clone(dtype=dtype))
        for model in (generator, tokenizer)
    )
    return one, other


def check_bits(module: Any, path: str | os.PathLike) -> None:
    """Raises UserError unless the tokenizer has one grid of bits, which generators need."""
    if not module.bits:
        raise UserError(f"{path} gives continuous latents, no bits: set its quantizer in training")
    if scales := getattr(module, "scales", ()):
        raise UserError(
            f"{path} gives bits at {len(scales)} scales, and bits on disk and generators have one "
            "grid: choose a tokenizer with one grid"
        )


def check_fit(generator: Model, tokenizer: Model) -> None:
    """Raises UserError unless the generator makes the bits that the tokenizer reads."""
    check_bits(tokenizer.module, tokenizer.path)
    for what, made, read in (
        ("bits a token", generator.module.bits, tokenizer.module.bits),
        ("grid", tuple(generator.module.grid), tuple(tokenizer.module.grid)),
    ):
        if made != read:
            raise UserError(
                f"generator {generator.path} and tokenizer {tokenizer.path} do not fit: "
                f"{what} {made} against {read}; use the tokenizer that it was trained with"
            )
