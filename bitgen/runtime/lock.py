"""One run at a time in a workdir, also on storage that several machines share.

No flock, which does not hold on NFS: a file that only one process can make, and that its holder
touches while it lives.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitgen.errors import UserError
from bitgen.runtime.logging import log_info

SILENT = 60.0  # seconds without a touch after which a holder on another machine is gone


@dataclasses.dataclass(frozen=True)
class Process:
    """Names a process so that another one can tell whether it still runs."""

    host: str
    machine: str  # the boot and the space of process ids: equal where ids can be compared
    pid: int
    born: str  # tells processes apart that have the same id, one after another

    def runs(self) -> bool | None:
        """Returns whether it runs, None if that cannot be told from here."""
        if self.machine != this_process().machine:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # somebody else's
            pass
        return _born(self.pid) == self.born

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Process:
    """Returns the one that asks."""
    return Process(socket.gethostname(), _machine(), os.getpid(), _born(os.getpid()))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _born(pid: int) -> str:
    """-> the start of a process in the kernel's ticks; '' if it is gone, a zombie, or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Lock:
    """A lock file that this process holds; made by `acquire`."""

    def __init__(self, path: Path, token: str):
        self.path, self.token = path, token

    def touch(self) -> bool:
        """Shows that the holder lives; returns False if another run has taken the lock over."""
        try:
            if _read(self.path).get("token") != self.token:
                return False
            os.utime(self.path)
        except FileNotFoundError:
            return False
        except OSError:  # the storage is slow or full, which says nothing about the lock
            pass
        return True

    def release(self) -> None:
        """Removes the file, if it is still ours."""
        with contextlib.suppress(OSError):
            if _read(self.path).get("token") == self.token:
                self.path.unlink()


def acquire(
    path: Path,
    *,
    silent: float = SILENT,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Lock:
    """Returns the lock; raises UserError that names the holder if another run has it.

    A holder on this machine that is gone is taken over from at once, one on another machine after
    `silent` seconds in which it does not touch the file: no clocks are compared.
    """
    me = this_process()
    token = f"{me.host}-{me.pid}-{uuid.uuid4().hex}"
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    content = json.dumps({**dataclasses.asdict(me), "since": since, "token": token}) + "\n"
    while not _create(path, content):
        try:
            held, touched = _read(path), _touched(path)
        except FileNotFoundError:  # released between the two
            continue
        known: Any = [held.get(field.name) for field in dataclasses.fields(Process)]
        holder = Process(*known)
        runs = holder.runs() if isinstance(holder.pid, int) else None
        if runs is None:
            log_info(f"{path} is of {holder}: looking for a sign of life for {silent:.0f} s")
            runs = _touches(path, touched, silent, clock, sleep)
        if runs:
            raise UserError(
                f"{path.parent} is in use: {holder} runs there since {held.get('since')}; choose "
                "another --workdir or end that run first"
            )
        log_info(f"{path.name}: {holder} left it behind and is gone, taking over")
        _remove(path, held)
    return Lock(path, token)


def _create(path: Path, text: str) -> bool:
    """Makes the file with its content in one step; returns False if there is one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            own.write_text(text)
            os.link(own, path)
            return True
        except FileExistsError:
            return False
        except OSError:
            if path.exists():
                return False
        finally:
            own.unlink(missing_ok=True)
        # Storage without links, as of object stores.
        try:
            with path.open("x") as file:
                file.write(text)
            return True
        except FileExistsError:
            return False
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def _read(path: Path) -> dict[str, Any]:
    """Returns the content, {} if it is damaged; raises FileNotFoundError."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _touched(path: Path) -> int:
    # Of an open file: NFS answers `stat` of a path from its cache.
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _touches(path: Path, before: int, silent: float, clock, sleep) -> bool:
    """-> whether the file is touched within so many seconds."""
    end = clock() + silent
    while clock() < end:
        sleep(min(2.0, silent / 10))
        try:
            if _touched(path) != before:
                return True
        except FileNotFoundError:
            return False
    return False


def _remove(path: Path, expected: dict[str, Any]) -> None:
    """Removes a lock that was left behind, but not one that somebody made meanwhile."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != expected:
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
