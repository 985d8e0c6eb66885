"""Progress of long work: a bar on a terminal, sparse lines in a log."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
from tqdm import tqdm

T = TypeVar("T")

_EVERY = 10.0  # seconds between lines


class ProgressBar:
    """A context that reports how many of `total` items are done.

    A terminal shows a bar, which disappears at the end. A log gets a line every ten seconds, unless
    `lines` is False. Both get a last line. Only process 0 reports.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        unit: str = "images",
        first: int = 0,
        lines: bool = True,
    ):
        """Takes the verb of the report, the total if known, the unit (`B`: bytes) and a start."""
        self.what, self.total, self.unit, self.lines = what, total, unit, lines
        self.first = self.done = self.said = first

    def __enter__(self) -> "ProgressBar":
        alone = jax.process_index() == 0
        shown, self.lines = alone and sys.stderr.isatty(), alone and self.lines
        self.started = self.told = time.monotonic()
        self.bar = tqdm(
            total=self.total,
            initial=self.first,
            desc=self.what,
            unit=self.unit if self.unit == "B" else f" {self.unit}",
            unit_scale=self.unit == "B",
            file=sys.stderr,
            ncols=_columns() - 1 if shown else None,
            nrows=2,
            leave=False,
            disable=not shown,
        )
        return self

    def add(self, count: int) -> None:
        """Adds to the number of items done."""
        self.to(self.done + count)

    def to(self, done: int) -> None:
        """Sets the number of items done, at most the total."""
        done = done if self.total is None else min(done, self.total)
        self.bar.update(done - self.done)
        self.done = done
        if self.bar.disable and self.lines and time.monotonic() - self.told > _EVERY:
            self._tell()

    def _tell(self) -> None:
        self.told, self.said = time.monotonic(), self.done
        rate = (self.done - self.first) / max(self.told - self.started, 1e-9)
        of = "" if self.total is None else f"/{self.total}"
        line = f"{self.what} {self.done}{of} {self.unit}, {rate:.3g} a second"
        print(line, file=sys.stderr, flush=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.bar.close()
        if self.lines and kind is None and self.done > self.said:
            self._tell()


def _columns() -> int:
    """Returns the terminal's width, for tqdm, which shows no bar where it is unknown."""
    return os.get_terminal_size(sys.stderr.fileno()).columns or 80


def with_progress(
    items: Iterable[T], what: str, total: int | None, size: Callable[[T], int]
) -> Iterator[T]:
    """Yields the items under a `ProgressBar`; `size` returns the number of images of an item."""
    with ProgressBar(what, total) as bar:
        for item in items:
            yield item
            bar.add(size(item))


def with_progress_of_shares(
    batches: Iterable[dict[str, Any]], what: str, total: int
) -> Iterator[dict[str, Any]]:
    """Yields a process's rows of batches of data, and reports the progress of all processes."""
    several = jax.process_count()
    return with_progress(batches, what, total, lambda batch: len(batch["label"]) * several)
