"""Model directories: `model.json`, which describes the model, beside its Orbax parameters.

Training exports them, conversion writes them, every mode reads them.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

from bitgen import __version__, build
from bitgen.errors import UserError

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model directory."""

    module: nn.Module
    params: dict[str, Any]
    info: dict[str, Any]  # model.json: format, kind, family, hparams, origin, digest
    path: str


def write(directory: str | os.PathLike, info: dict[str, Any], params: Any) -> None:
    """Writes a model directory; it appears, or replaces the one before, only when complete.

    Args:
      directory: where to.
      info: kind ('tokenizer' or 'generator'), family, hparams and origin.
      params: nested dict of arrays.
    """
    directory = Path(directory).absolute()
    temporary = directory.with_name(directory.name + ".writing")
    if jax.process_index() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save(temporary / "params", args=ocp.args.StandardSave(params))
    if jax.process_index() == 0:
        info = {"format": FORMAT, "bitgen": __version__, **info, "digest": digest(params)}
        (temporary / "model.json").write_text(json.dumps(info, indent=2) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        os.replace(temporary, directory)


def read_info(path: str | os.PathLike) -> dict[str, Any]:
    """Returns model.json; raises UserError if `path` is not a model directory."""
    file = Path(path) / "model.json"
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


def load(path: str | os.PathLike, kind: str, sharding: Any = None, **fields: Any) -> Model:
    """Returns the model in a directory, its parameters placed by `sharding`.

    Args:
      path: the directory.
      kind: 'tokenizer' or 'generator'; anything else there is a UserError.
      sharding: of every parameter; the first device by default.
      **fields: of the module that are not part of the model, such as dtype.
    """
    if not str(path):
        raise UserError(f"no {kind} given: set --config.{kind}=DIR to a model directory")
    info = read_info(path)
    if info["kind"] != kind:
        raise UserError(f"{path} holds a {info['kind']} ({info['family']}), not a {kind}")
    module = build.make_module(kind, info["family"], {**info["hparams"], **fields})
    shapes = build.param_shapes(module)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            params = checkpointer.restore(
                Path(path).absolute() / "params", args=ocp.args.StandardRestore(target)
            )
    except (ValueError, KeyError, FileNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(f"the parameters in {path} do not match its model.json: {reason}") from None
    return Model(module, params, info, str(path))


def identity(path: str | os.PathLike) -> dict[str, Any]:
    """Returns what names a model beyond its path: family and digest."""
    info = read_info(path)
    return {"family": info["family"], "digest": info["digest"]}


def digest(params: Any) -> str:
    """Returns a short hash of names, shapes, dtypes and values."""
    h = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        h.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        h.update(array.data if array.dtype.kind != "V" else array.tobytes())
    return h.hexdigest()


def check_fit(generator: Model, tokenizer: Model) -> None:
    """Raises UserError unless the generator makes the bits that the tokenizer reads."""
    for what, made, read in (
        ("bits a token", generator.module.bits, tokenizer.module.bits),
        ("grid", tuple(generator.module.grid), tuple(tokenizer.module.grid)),
    ):
        if made != read:
            raise UserError(
                f"generator {generator.path} and tokenizer {tokenizer.path} do not fit: "
                f"{what} {made} against {read}; use the tokenizer that it was trained with"
            )
