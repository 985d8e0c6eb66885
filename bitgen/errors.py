"""The error that a user sees as a single line, without a traceback."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Bad input: the message says what was wrong and what to do, in one line."""

    status = 2  # exit status of the program


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def choose(kind: str, name: str, choices: Any) -> Any:
    """Returns `choices[name]` of a mapping, or the name itself if choices is another collection.

    Raises UserError with all choices if the name is not one of them.
    """
    if name not in choices:
        raise UserError(f"unknown {kind} {name!r}, have {sorted(choices)}")
    return choices[name] if isinstance(choices, Mapping) else name
