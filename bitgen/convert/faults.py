"""What is wrong with a conversion, all of it in one error."""

import re
from collections import defaultdict
from collections.abc import Iterable

from bitgen.errors import UserError

_SHOWN = 6  # faults of one kind that an error spells out
_KINDS = {
    "unknown": "unknown tensors",
    "missing": "missing tensors",
    "misshaped": "misshaped tensors",
    "used twice": "tensors used twice",
    "unequal": "unequal tensors",
    "unfillable": "tensors without a place in our model",
    "unfilled": "leaves of our model without a rule",
    "filled twice": "leaves of our model with two rules",
}


class Faults:
    """Faults by kind, collected to be raised together."""

    def __init__(self):
        self.found = defaultdict(list)

    def add(self, kind: str, line: str) -> None:
        """Notes a fault of one of the kinds above."""
        self.found[kind].append(line)

    def raise_if_any(self, what: str) -> None:
        """Raises UserError that begins with `what` and has one line a kind, if there are faults."""
        lines = []
        for kind, title in _KINDS.items():
            if found := sorted(self.found[kind], key=_natural):
                more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                lines.append(f"  {len(found)} {title}: {'; '.join(found[:_SHOWN])}{more}")
        if lines:
            raise UserError("\n".join([f"{what}:", *lines]))


def _natural(line: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", line)]


def show(shape: Iterable[int]) -> str:
    """Returns a shape as errors print it."""
    return str([int(n) for n in shape])
