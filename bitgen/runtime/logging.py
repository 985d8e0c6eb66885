"""One line at a time to the console."""

import logging
import os
import sys

import jax
from tqdm import tqdm


def log_info(message: str) -> None:
    """Prints one line to standard error on the first process, above a bar that may be there."""
    if jax.process_index() == 0:
        with tqdm.external_write_mode(file=sys.stderr):
            print(message, file=sys.stderr, flush=True)


def quiet() -> None:
    """Keeps the libraries' own chatter out of the console; warnings still show."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it announces itself, and is not used
    for name in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(name).setLevel(logging.WARNING)
