"""The one entry: `python -m bitgen.main --config=FILE --workdir=DIR --mode=MODE`."""

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bitgen.errors import UserError, choose
from bitgen.logging import quiet, say

# Each is bitgen.<module>.run(config, workdir).
MODES = ("train", "tokenize", "sample", "reconstruct")

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of configs/, or your own.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")


def main(argv: Sequence[str] = tuple(sys.argv)) -> int:
    """Runs one mode; returns the exit status: 0, or 2 after one line about bad input."""
    try:
        config, workdir, mode = _parse(list(argv))
        quiet()
        workdir.mkdir(parents=True, exist_ok=True)
        importlib.import_module(f"bitgen.{mode}").run(config, workdir)
    except UserError as e:
        say(f"error: {e}")
        return 2
    return 0


def _parse(argv: list[str]) -> tuple[ConfigDict, Path, str]:
    try:
        rest = flags.FLAGS(argv)[1:]
    except (flags.Error, config_flags.config_flags.FlagOrderError) as e:
        raise UserError(str(e).splitlines()[0]) from None
    except (AttributeError, KeyError):
        _explain_keys(argv)
        raise
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; settings look like --config.seed=1")
    mode = _MODE.value
    choose("mode", mode, {m: m for m in MODES})
    if _WORKDIR.value is None:
        raise UserError("no --workdir=DIR given: the directory that the run writes to")
    if not isinstance(_CONFIG.value, ConfigDict):
        path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
        problem = f"cannot read --config={path}" if path else "no --config=FILE given"
        raise UserError(f"{problem}; the shipped ones are in configs/")
    config = _CONFIG.value.lock()
    return config, Path(_WORKDIR.value), mode


def _explain_keys(argv: list[str]) -> None:
    """Raises UserError for the first --config.KEY that the config file does not have."""
    path = next(a.split("=", 1)[1] for a in argv if a.startswith("--config="))
    root: Any = runpy.run_path(path)["get_config"]()
    for argument in argv:
        if not argument.startswith("--config."):
            continue
        node, seen = root, "config"
        for key in argument.split("=", 1)[0].removeprefix("--config.").split("."):
            if not isinstance(node, ConfigDict):
                raise UserError(f"{seen} is a value, it has no {key!r}")
            choose(f"key in {seen}:", key, node)
            node, seen = node[key], f"{seen}.{key}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
