"""What a part of the accelerator's run is."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

READY = "ready"  # what a part says once it has compiled, before it measures


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part is given."""

    rehearse: bool  # tiny sizes, on the CPU
    scratch: Path  # for files that no one keeps; the same for all parts of a run
    originals: Path | None  # folder of the originals' checkouts
    jobs: int = 1  # processes that may run beside each other


@dataclasses.dataclass(frozen=True)
class Part:
    """A process of its own. `run` yields rows; READY, if it measures time, before it does so."""

    name: str
    what: str
    run: Callable[[Context], Iterator[Any]]
    prepare: float = 180.0  # seconds until it is ready, or has ended
    measure: float = 45.0  # seconds from then on
    flags: str = ""  # of XLA
