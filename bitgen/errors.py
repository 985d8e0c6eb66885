"""The one error that a user sees as a single line, without a traceback."""


class UserError(Exception):
    """Bad input: the message says what was wrong and what to do, in one line."""


def choose(kind: str, name: str, choices) -> object:
    """Returns `choices[name]`; raises UserError that names the choices if there is none."""
    if name not in choices:
        raise UserError(f"unknown {kind} {name!r}, have {sorted(choices)}")
    return choices[name]
