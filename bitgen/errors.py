"""The error that a user sees as a single line, without a traceback."""

import errno
import os
from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Bad input: the message says what was wrong and what to do, in one line."""

    status = 2  # exit status of the program


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether an error, or a cause of it, is a full disk."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        # TensorStore's errors have no number.
        if any(os.strerror(e) in str(error) for e in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False


def choose(kind: str, name: str, choices: Any) -> Any:
    """Returns `choices[name]` of a mapping, or the name itself if choices is another collection.

    Raises UserError with all choices if the name is not one of them.
    """
    if name not in choices:
        raise UserError(f"unknown {kind} {name!r}, have {sorted(choices)}")
    return choices[name] if isinstance(choices, Mapping) else name
