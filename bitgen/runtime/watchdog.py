"""Detects a run that hangs or has lost a process, and says which process it is.

A thread of every process writes `heartbeats/00001.json` in the workdir, with what its main thread
is doing. Process 0 reads all of these files, the others read that of process 0. A fault ends the
process with one line and status 75, whatever its main thread waits for.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from bitgen.errors import UserError, first_line
from bitgen.runtime import lock
from bitgen.runtime.distributed import RESTART, leave, on_abort, on_first

T = TypeVar("T")

HEARTBEAT_SECONDS = 2.0  # seconds between signs of life

SILENT = lock.SILENT  # seconds without one after which a process counts as gone

SLOW_FACTOR = 10  # times the usual, for what takes long by nature

# Seconds after which C ends a process whose Python is held still, or which was suspended so long.
_LAST_RESORT = 15 * SILENT

_SIZE = 1024  # bytes of a file of heartbeats: written in place, so that a full disk does not matter

_RUNNING = -1

_UNKNOWN = lock.Process("an unknown host", "", 0, "")


@dataclasses.dataclass
class Heartbeat:
    """What a process reports about itself."""

    process: int
    where: lock.Process
    count: int = 0  # rises while the process lives
    progress: int = 0  # rises while its main thread goes on
    activity: str = "starting"
    slow: bool = True  # that this may take long
    status: int = _RUNNING  # with which it ended
    why: str = ""

    def __str__(self) -> str:
        return f"process {self.process} on {self.where.host}"


class StallDetector:
    """Finds faults in heartbeats; all times are those of one clock, given by the caller."""

    def __init__(self, stuck_after: float, silent_after: float = SILENT):
        self.stuck_after, self.silent_after = stuck_after, silent_after
        self.seen: dict[tuple[int, str], tuple[int, float]] = {}

    def unchanged(self, beat: Heartbeat, what: str, now: float) -> float:
        """Returns for how long a counter of a process has not changed."""
        value, key = getattr(beat, what), (beat.process, what)
        if self.seen.get(key, (None, 0.0))[0] != value:
            self.seen[key] = (value, now)
        return now - self.seen[key][1]

    def pause(self, seconds: float) -> None:
        """Excludes a time in which the detector itself did not run."""
        self.seen = {key: (value, at + seconds) for key, (value, at) in self.seen.items()}

    def check(self, heartbeats: Mapping[int, Heartbeat], now: float) -> tuple[str, int] | None:
        """Returns what is wrong and the exit status, or None if nothing is."""
        for beat in heartbeats.values():
            silent = self.unchanged(beat, "count", now)
            if beat.status == 0:
                continue
            if beat.status != _RUNNING:
                return f"{beat} ended: {beat.why}", beat.status
            if beat.where.runs() is False:
                return (
                    f"{beat} is gone: its process {beat.where.pid} was killed, or was out of "
                    f"memory (its last: {beat.activity})"
                ), RESTART
            if silent > self.silent_after:
                return (
                    f"{beat} has sent no heartbeat for {silent:.0f} s: {beat.activity}",
                    RESTART,
                )
        running = [beat for beat in heartbeats.values() if beat.status == _RUNNING]
        return self._stuck(running, now) if self.stuck_after > 0 and running else None

    def _stuck(self, heartbeats: list[Heartbeat], now: float) -> tuple[str, int] | None:
        """Returns the fault of the processes with the least progress; the others wait for them."""
        idle = {beat.process: self.unchanged(beat, "progress", now) for beat in heartbeats}
        least = min(beat.progress for beat in heartbeats)
        last = [beat for beat in heartbeats if beat.progress == least]
        limits = (self.stuck_after * (SLOW_FACTOR if beat.slow else 1) for beat in last)
        if not all(idle[b.process] > limit for b, limit in zip(last, limits, strict=True)):
            return None
        names = ", ".join(map(str, last[:3])) + (f" and {len(last) - 3} more" if last[3:] else "")
        seconds = min(idle[beat.process] for beat in last)
        others = "; the others wait for it" if len(last) < len(heartbeats) else ""
        return f"{names}: stuck for {seconds:.0f} s at: {last[0].activity}{others}", RESTART


class Watchdog:
    """Publishes this process's heartbeat, and ends the process if the run is stuck."""

    def __init__(self, workdir: Path, stuck_after: float, held: lock.Lock | None):
        index, self.count = jax.process_index(), jax.process_count()
        self.folder, self.held = workdir / "heartbeats", held
        self.own = Heartbeat(index, lock.this_process())
        self.heartbeats = {0: self.own} if index == 0 else {}  # as last read
        self.detector = StallDetector(
            stuck_after, min(SILENT, stuck_after) if stuck_after > 0 else SILENT
        )
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def report(self, what: str, slow: bool = False) -> None:
        """Records progress and the activity; a `slow` one may take ten times as long."""
        self.own.activity, self.own.slow = what, slow
        self.own.progress += 1

    def check(self) -> tuple[str, int] | None:
        """Returns what is wrong with the run, or None."""
        if self.count == 1:
            return self.detector.check({0: self.own}, time.monotonic())
        for i in range(1, self.count) if self.own.process == 0 else [0]:
            self.heartbeats[i] = self._read(i) or self.heartbeats.get(i) or Heartbeat(i, _UNKNOWN)
        return self.detector.check(self.heartbeats, time.monotonic())

    def end(self, status: int, why: str = "") -> None:
        """Tells the other processes that this one ends, and stops watching."""
        self.stopped.set()
        faulthandler.cancel_dump_traceback_later()
        if self.thread.is_alive():
            self.thread.join(5 * HEARTBEAT_SECONDS)  # not for ever: storage may hang
        self.own.status, self.own.why = status, why[: _SIZE // 2]
        self._write()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self.stopped.wait(HEARTBEAT_SECONDS):
            # A process that was suspended, or whose storage hung, has not watched.
            away = time.monotonic() - last - 5 * HEARTBEAT_SECONDS
            if away > 0:
                self.detector.pause(away)
            last = time.monotonic()
            self.own.count += 1
            self._write()
            if self.count > 1:  # for a main thread that waits without letting this one run
                faulthandler.dump_traceback_later(_LAST_RESORT, exit=True)
            if self.held and not self.held.touch():
                self._leave(f"another run has taken {self.held.path.parent} over", 2)
            if found := self.check():
                self._leave(*found)

    def _leave(self, why: str, status: int) -> None:
        self.own.status, self.own.why = status, why[: _SIZE // 2]
        self._write()
        if self.held:
            self.held.release()
        leave(_with_advice(why, status), status)

    def _file(self, process: int) -> Path:
        return self.folder / f"{process:05d}.json"

    def _write(self) -> None:
        if self.count == 1:
            return
        text = json.dumps(dataclasses.asdict(self.own)).encode().ljust(_SIZE - 1) + b"\n"
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT
            file = os.open(self._file(self.own.process), flags, 0o644)
            try:
                os.write(file, text)
            finally:
                os.close(file)

    def _read(self, process: int) -> Heartbeat | None:
        try:
            found: dict[str, Any] = json.loads(self._file(process).read_text())
            return Heartbeat(**{**found, "where": lock.Process(**found["where"])})
        except (OSError, ValueError, TypeError, KeyError):  # not there yet, or half written
            return None


def _with_advice(why: str, status: int) -> str:
    return f"{why}; the same command resumes the run" if status == RESTART else why


def explain_abort(watch: Watchdog) -> tuple[str, int]:
    """Returns why JAX aborts this process, as far as the heartbeats tell, and the exit status."""
    watch.detector.silent_after = min(5 * HEARTBEAT_SECONDS, watch.detector.silent_after)
    end = time.monotonic() + 3 * watch.detector.silent_after
    while time.monotonic() < end:
        if found := watch.check():
            return _with_advice(*found), found[1]
        time.sleep(0.5)
    lost = "lost touch with the other processes of this run"
    return _with_advice(lost, RESTART), RESTART


@contextlib.contextmanager
def guard(workdir: Path, name: str, stuck_after: float) -> Iterator[Watchdog]:
    """Holds `workdir/NAME.lock` and watches the run in this context.

    Raises UserError if another run holds the lock. If a lost process causes an error in this one,
    the process ends with a line about the lost one.
    """
    held: list[lock.Lock] = []
    workdir.mkdir(parents=True, exist_ok=True)
    on_first(lambda: held.append(lock.acquire(workdir / f"{name}.lock")))
    mine = held[0] if held else None
    watch = Watchdog(workdir, stuck_after, mine)
    with contextlib.ExitStack() as stack:
        if mine:
            stack.callback(mine.release)
        if watch.count > 1:
            on_first(lambda: _fresh(watch.folder))
            watch._write()
            stack.enter_context(on_abort(lambda: explain_abort(watch)))
        watch.thread.start()
        try:
            yield watch
        except UserError as e:
            watch.end(e.status, str(e))
            raise
        except jax.errors.JaxRuntimeError as e:
            if watch.count > 1:  # most often another process is gone: the thread will say which
                watch.thread.join(watch.detector.silent_after + 5 * HEARTBEAT_SECONDS)
            watch.end(1, first_line(e))
            raise
        except BaseException as e:
            watch.end(1, f"{type(e).__name__}: {e}")
            raise
        watch.end(0)


def with_heartbeats(items: Iterable[T], watch: Watchdog) -> Iterator[T]:
    """Yields the items, and reports each as progress."""
    for i, item in enumerate(items):
        watch.report(f"batch {i}", slow=i == 0)  # the first compiles
        yield item
    watch.report("the last batch", slow=True)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
