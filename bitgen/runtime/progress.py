"""How far long work is: a bar on the first process's terminal, a line now and then in a log."""

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
    """Tells how many of `total` are done, while it is entered; a context.

    A terminal gets a bar, which is gone at the end. A log gets a line every ten seconds, unless
    `lines` is False. Both get a last line. Processes but the first are silent.
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
        """Takes what is done, in words; how much there is of it, None if that is not known; its
        unit, `B` for bytes; and how much was done before.
        """
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
        """Says that so many more are done."""
        self.to(self.done + count)

    def to(self, done: int) -> None:
        """Says that so many are done in all; never more than there are."""
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
    """-> the terminal's width; tqdm shows no bar on one that does not know its own."""
    return os.get_terminal_size(sys.stderr.fileno()).columns or 80


def with_progress(
    items: Iterable[T], what: str, total: int | None, size: Callable[[T], int]
) -> Iterator[T]:
    """Yields the items under a `ProgressBar`; `size` returns how many images an item has."""
    with ProgressBar(what, total) as bar:
        for item in items:
            yield item
            bar.add(size(item))


def with_progress_of_shares(
    batches: Iterable[dict[str, Any]], what: str, total: int
) -> Iterator[dict[str, Any]]:
    """Passes on a process's rows of batches of data, and tells how many all processes have had."""
    several = jax.process_count()
    return with_progress(batches, what, total, lambda batch: len(batch["label"]) * several)
