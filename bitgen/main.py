"""python -m bitgen.main --config=FILE --workdir=DIR [--mode=MODE] [--config.KEY=VALUE ...].

FILE is one of configs/ or your own; a size may follow after a colon (configs/bigr.py:XL). Every
setting can be changed: bitgen/config.py lists and explains them.
"""

import errno
import importlib
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from bitgen.errors import UserError, choose
from bitgen.runtime import distributed
from bitgen.runtime.logging import quiet

# Each runs bitgen.modes.<name>.run(config, workdir).
MODES = ("train", "tokenize", "sample", "edit", "reconstruct", "evaluate", "benchmark")

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, or your own.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory that the run writes to.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")


def main(argv: Sequence[str] = tuple(sys.argv)) -> int:
    """Runs one mode; returns the exit status: 0, or 2 after one line about bad input.

    The process ends with status 75 if it or another process of the run is lost or stuck.
    """
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nMODE is one of {', '.join(MODES)}; train by default.")
        return 0
    try:
        config, workdir, mode = _parse(list(argv))
        quiet()
        distributed.start()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot make --workdir={workdir}: {e.strerror}") from None
        distributed.check_shared(workdir)
        _keep_compiled(config.compile_cache, workdir)
        importlib.import_module(f"bitgen.modes.{mode}").run(config, workdir)
    except UserError as e:
        return _end(f"error: {e}", e.status)
    except Exception as e:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            where = e.filename or _WORKDIR.value
            return _end(f"error: {e.strerror}: {where}; free some space", 2)
        if not jax.distributed.is_initialized():
            raise
        return _end(traceback.format_exc(), 1)
    return 0


def _parse(argv: list[str]) -> tuple[ConfigDict, Path, str]:
    """Returns config, workdir and mode; raises UserError for anything wrong with them."""
    path, arguments = _config_file(argv)
    if path:
        _check_keys(_load(path, arguments), argv)
    try:
        rest = flags.FLAGS(argv)[1:]
    except (flags.Error, config_flags.config_flags.FlagOrderError) as e:
        raise UserError(str(e).splitlines()[0]) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; settings look like --config.seed=1")
    choose("mode", _MODE.value, MODES)
    if not path:
        raise UserError("no --config=FILE given; the shipped ones are in configs/")
    if _WORKDIR.value is None:
        raise UserError("no --workdir=DIR given: the directory that the run writes to")
    return _CONFIG.value.lock(), Path(_WORKDIR.value), _MODE.value


def _config_file(argv: list[str]) -> tuple[str, list[str]]:
    """Returns the path of --config, and what follows its colon as arguments of get_config."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            value = value if equals else "".join(argv[i + 1 : i + 2])
            path, colon, rest = value.partition(":")
            return path, [rest] if colon else []
    return "", []


def _load(path: str, arguments: list[str]) -> ConfigDict:
    """Returns what get_config of a file returns; raises UserError with the error if it fails."""
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}; the shipped ones are in configs/")
    try:
        config = runpy.run_path(path)["get_config"](*arguments)
    except UserError:
        raise
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        raise UserError(f"the config {where} fails: {type(e).__name__}: {e}") from None
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} returns {config!r}, not a ConfigDict")
    return config


def _check_keys(root: ConfigDict, argv: list[str]) -> None:
    """Raises UserError for the first --config.KEY that the config does not have."""
    for argument in argv:
        if not argument.startswith("--config."):
            continue
        node, seen = root, "config"
        for key in argument.split("=", 1)[0].removeprefix("--config.").split("."):
            if not isinstance(node, ConfigDict):
                raise UserError(f"{seen} is a value, it has no {key!r}")
            choose(f"key in {seen}:", key, node)
            node, seen = node[key], f"{seen}.{key}"


def _keep_compiled(directory: Any, workdir: Path) -> None:
    """Makes jax keep compiled programs for the next start; the environment takes precedence."""
    if directory and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / directory))


def _end(message: str, status: int) -> int:
    """Prints the message and returns the status; one of several processes exits at once instead.

    A normal exit would wait for the other processes, which may still be running.
    """
    if not jax.distributed.is_initialized():
        print(message, file=sys.stderr, flush=True)
        return status
    index = jax.process_index()
    print(f"[process {index}] {message}" if index else message, file=sys.stderr, flush=True)
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
