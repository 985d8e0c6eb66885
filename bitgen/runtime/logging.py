"""Log lines and tables for the console."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm


def log_info(message: str) -> None:
    """Prints a line to standard error on process 0, above a progress bar if there is one."""
    if jax.process_index() == 0:
        with tqdm.external_write_mode(file=sys.stderr):
            print(message, file=sys.stderr, flush=True)


def quiet() -> None:
    """Silences the libraries' log messages except warnings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it announces itself, and is not used
    for name in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns rows as a text table; cells that a row lacks are empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names]
    for row in rows:
        values = (row.get(name, "") for name in names)
        cells.append([f"{v:.5g}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(lines)
