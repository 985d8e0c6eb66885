"""Opens checkpoints of several files: a folder, or the index that says which shard holds a tensor.

The index is `*.index.json` with a `weight_map`, as Hugging Face's libraries write it.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

from bitgen.convert.files import TORCH_SUFFIXES, Tensors, open_tensors, without_prefix
from bitgen.errors import UserError, first_line

_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".bin", *TORCH_SUFFIXES)


def open_checkpoint(path: str | os.PathLike, weights: str | None = None) -> Tensors:
    """Returns the tensors of a checkpoint file, of an index of shards, or of a folder with either.

    Args:
      path: the file, the index or the folder; a folder must hold one index or one checkpoint file.
      weights: 'ema' or 'model', for a file with several sets; by default 'ema' if there is one.

    Raises UserError as `open_tensors` does, and for shards that are missing or hold other tensors
    than the index says.
    """
    path = Path(path)
    if path.is_dir():
        path = _of_folder(path)
    if not path.name.endswith(_INDEX) or not path.is_file():
        return open_tensors(path, weights)
    if weights is not None:
        raise UserError(f"{path} names one set of weights: leave out --weights")
    return _open_index(path)


def _of_folder(folder: Path) -> Path:
    """Returns the index of a folder or, if it has none, its checkpoint file."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    found = [name for name in names if name.endswith(_INDEX)]
    found = found or [name for name in names if name.endswith(_SUFFIXES)]
    if len(found) == 1:
        return folder / found[0]
    if not found:
        raise UserError(f"{folder} holds no checkpoint, which would end in {', '.join(_SUFFIXES)}")
    if any("-of-" in name for name in found):
        raise UserError(
            f"{folder} holds shards without their index, *{_INDEX}: download it as well"
        )
    raise UserError(f"{folder} holds several checkpoints: give one of {', '.join(found)}")


def _open_index(path: Path) -> Tensors:
    names: dict[str, list[str]] = defaultdict(list)  # of each shard
    try:
        for name, shard in json.loads(path.read_bytes())["weight_map"].items():
            if Path(shard).name != shard:
                raise ValueError(f"{shard!r} is no name of a file beside it")
            names[shard].append(name)
    except Exception as e:  # whatever is not as it should be
        reason = first_line(e)[:200]
        raise UserError(f"{path} is no index of shards, or damaged ({reason})") from None
    if not names:
        raise UserError(f"{path} names no tensors")
    if missing := sorted(shard for shard in names if not (path.parent / shard).is_file()):
        raise UserError(
            f"{path} names {len(names)} shards, of which {len(missing)} are missing: "
            f"{', '.join(missing[:5])}; download them to {path.parent}"
        )
    shards = {shard: open_tensors(path.parent / shard) for shard in sorted(names)}
    owners: dict[str, str] = {}
    for shard, tensors in shards.items():
        promised = without_prefix({name: name for name in names[shard]})
        if lacking := sorted(set(promised) - set(tensors)):
            raise UserError(
                f"{tensors.path} lacks {len(lacking)} tensors that {path.name} says it has, such "
                f"as {lacking[0]}: it is another shard or another model's"
            )
        owners |= dict.fromkeys(promised, shard)
    return Tensors(
        path,
        sum(tensors.bytes for tensors in shards.values()),
        None,
        {name: shards[shard].shapes[name] for name, shard in owners.items()},
        {name: (shard, shards[shard].places[name]) for name, shard in owners.items()},
        lambda name: shards[owners[name]].read(name),
        _unnamed(path, shards, owners),
    )


def _unnamed(path: Path, shards: dict[str, Tensors], owners: dict[str, str]) -> tuple[str, ...]:
    """Returns the shards beside an index, and the tensors in its shards, that it does not name."""
    stem = Path(path.name.removesuffix(_INDEX))  # model.safetensors
    others = sorted(
        f"{entry.name} (not in {path.name})"
        for entry in path.parent.glob(f"{stem.stem}*-of-*{stem.suffix}")
        if entry.name not in shards
    )
    extra = [name for tensors in shards.values() for name in tensors if name not in owners]
    return (*others, *(f"{name} (not in {path.name})" for name in extra))
