"""A lock file for a workdir, which also works on storage that several machines share.

flock does not hold on NFS. This lock is a file that only one process can create, and that its
holder touches regularly.
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
    """Identifies a process, so that another one can tell whether it is still running."""

    host: str
    machine: str  # the boot and the space of process ids: equal where ids can be compared
    pid: int
    started: str  # tells successive processes with the same id apart

    def runs(self) -> bool | None:
        """Returns whether the process is running, or None if this machine cannot tell."""
        if self.machine != this_process().machine:
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # somebody else's
            pass
        return _start_ticks(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Process:
    """Returns the identity of the current process."""
    return Process(socket.gethostname(), _machine(), os.getpid(), _start_ticks(os.getpid()))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {uuid.getnode()}"


def _start_ticks(pid: int) -> str:
    """Returns the start of a process in kernel ticks; '' if it is gone, a zombie, or unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class Lock:
    """A lock file held by this process; `acquire` creates it."""

    def __init__(self, path: Path, token: str):
        self.path, self.token = path, token

    def touch(self) -> bool:
        """Marks the holder as alive; returns False if another run has taken over the lock."""
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
        """Removes the file if this process still holds the lock."""
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

    The lock of a dead process on this machine is taken over at once. That of a process on another
    machine is taken over after `silent` seconds without a touch, so no clocks are compared.
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
        runs = holder.runs() if isinstance(holder.started, str) else None
        if runs is None:
            log_info(f"{path} belongs to {holder}: checking for {silent:.0f} s whether it is alive")
            runs = _touches(path, touched, silent, clock, sleep)
        if runs:
            raise UserError(
                f"{path.parent} is in use: {holder} has been running there since "
                f"{held.get('since')}; choose another --workdir or end that run first"
            )
        log_info(f"{path.name}: {holder} is gone, taking over its lock")
        _remove(path, held)
    return Lock(path, token)


def _create(path: Path, text: str) -> bool:
    """Creates the file with its content atomically; returns False if it exists."""
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
        # Storage without hard links, such as a mounted bucket.
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
    # Stat the open file: NFS answers `stat` of a path from its cache.
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _touches(path: Path, before: int, silent: float, clock, sleep) -> bool:
    """Returns whether the file is touched within `silent` seconds."""
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
    """Removes an abandoned lock, unless another process has replaced it meanwhile."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    if _read(aside) != expected:
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
