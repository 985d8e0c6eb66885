r"""Proves and measures bitgen on the accelerator that is here, in one command of a few minutes.

    python -m tests.accelerator --out=build/accelerator --originals=build/originals

Each part is a process with time limits of its own. Those of a round prepare side by side, as
compiling needs no quiet machine, and then measure one after another, in the order of worth. A row
is written to OUT/results.jsonl and printed as soon as it is known; the table is OUT/table.txt, what
the processes said OUT/log.txt. The exit status is 1 if a part failed, 0 otherwise; parts that the
time did not reach or whose originals are not there are left out, and named.

--originals is a folder with checkouts of the originals' code, in BiGR/ and BitDance/; without it
their part is left out. docs/accelerator.md says what to install, or to carry to a machine without a
network.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from .part import READY, Context, Part
from .rounds import rounds

ROOT = Path(__file__).resolve().parents[2]
# Trying Triton's variants of every product takes most of the compiler's time, and they meet other
# processes where parts prepare side by side. A flag of the same name in XLA_FLAGS wins.
FLAGS = "--xla_gpu_enable_triton_gemm=false"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/accelerator", help="for results")
    parser.add_argument("--originals", type=Path, help="folder with BiGR/ and BitDance/")
    parser.add_argument("--only", default="", help="parts, or how their names begin: exact,train")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--jobs", type=int, default=0, help="parts that prepare at once")
    parser.add_argument(
        "--alone", action="store_true", help="one process at a time, which is all that a TPU takes"
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return work(options)
    words = tuple(filter(None, options.only.replace(" ", "").split(",")))
    names = [part.name for parts in rounds(options.rehearse) for part in parts]
    for word in words:
        if not any(name.startswith(word) for name in names):
            parser.error(f"--only={word} is none of {', '.join(names)}")
    chosen = choose(rounds(options.rehearse), words)
    if options.list:
        print("\n".join(f"{part.name}: {part.what}" for parts in chosen for part in parts))
        return 0
    if options.originals and not options.originals.is_dir():
        parser.error(f"--originals={options.originals} is no directory")
    options.jobs = 1 if options.alone else options.jobs or max(1, (os.cpu_count() or 1) // 2)
    if options.alone:
        chosen = [[part] for parts in chosen for part in parts]
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the parts
    with tempfile.TemporaryDirectory(prefix="bitgen-accelerator-") as scratch:
        options.scratch = Path(scratch)
        return Report(options).run(chosen)


def choose(all_rounds: list[list[Part]], words: tuple[str, ...]) -> list[list[Part]]:
    """Returns one round of the parts whose names begin with one of the words; all without words."""
    if not words:
        return all_rounds
    return [[part for parts in all_rounds for part in parts if part.name.startswith(words)]]


# ----------------------------------------------------------------------- a part's own process
def work(options: argparse.Namespace) -> int:
    """Runs one part: says that it is ready, waits to be asked, and says each row."""
    part = next(
        part for parts in rounds(options.rehearse) for part in parts if part.name == options.part
    )
    context = Context(options.rehearse, options.scratch, options.originals, options.jobs)
    for said in part.run(context):
        print(">", json.dumps(said, default=float), flush=True)
        if said == READY and not sys.stdin.readline():
            return 1  # nobody listens any more
    return 0


class Process:
    """One part at work, and what it has said."""

    def __init__(self, part: Part, options: argparse.Namespace, log: TextIO):
        self.part, self.started = part, time.monotonic()
        self.said: queue.Queue[Any] = queue.Queue()
        self.last_words = ""
        self.process = subprocess.Popen(
            command(part, options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=environment(part, options),
            start_new_session=True,  # so that its own processes end with it
        )
        self.listener = threading.Thread(target=self._listen, args=(log,), daemon=True)
        self.listener.start()

    def _listen(self, log: TextIO) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("> "):
                self.said.put(json.loads(line[2:]))
            else:
                log.write(f"[{self.part.name}] {line}")
                log.flush()
                if re.match(r"[\w.]+(Error|Exception|Exit)\b", line) or not self.last_words:
                    self.last_words = line.strip()
        self.said.put(None)

    def rows(self, seconds: float) -> Iterator[Any]:
        """Yields what it says until it is ready or has ended; raises TimeoutError."""
        until = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            try:
                said = self.said.get(timeout=min(1.0, max(0.0, until - time.monotonic())))
            except queue.Empty:
                if not ended and time.monotonic() < until:
                    continue
                if not ended:
                    raise TimeoutError(f"not done in {seconds:.0f} s") from None
                said = None  # what it started may hold its output open
            if said is None:
                if self.process.wait():
                    status = self.process.returncode
                    raise RuntimeError(f"ended with status {status}: {self.last_words[-300:]}")
                return
            yield said
            if said == READY:
                return

    def go(self) -> None:
        """Lets it measure."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """Ends it and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.listener.join(timeout=5.0)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                if not self.listener.is_alive():
                    pipe.close()


def command(part: Part, options: argparse.Namespace) -> list[str]:
    """Returns the command of a part's process."""
    arguments = [f"--part={part.name}", f"--scratch={options.scratch}", f"--jobs={options.jobs}"]
    arguments += [f"--originals={options.originals.resolve()}"] if options.originals else []
    arguments += ["--rehearse"] if options.rehearse else []
    return [sys.executable, "-m", "tests.accelerator", *arguments]


def environment(part: Part, options: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of a part: no network, and nobody takes all memory."""
    env = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **os.environ,
    }
    if options.rehearse:
        env["JAX_PLATFORMS"] = "cpu"
    env["XLA_FLAGS"] = f"{FLAGS} {part.flags} {os.environ.get('XLA_FLAGS', '')}".strip()
    # bitgen need not be installed.
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    return env


# -------------------------------------------------------------------------- all of them
class Report:
    """Runs the rounds within the time, and writes what they say."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begun = options, time.monotonic()
        self.until = self.begun + 60 * options.minutes
        self.patience = 3 if options.rehearse else 1  # a CPU may have other work
        self.rows: list[dict[str, Any]] = []
        self.failed: list[str] = []
        self.processes: list[Process] = []
        self.lock = threading.Lock()

    def run(self, chosen: list[list[Part]]) -> int:
        """Returns the exit status."""
        out = self.options.out
        with (out / "log.txt").open("w") as log, (out / "results.jsonl").open("w") as results:
            self.log, self.results = log, results
            try:
                for parts in chosen:
                    self._round(parts)
            finally:
                for process in self.processes:
                    process.end()
            self.row("all", {"seconds": round(time.monotonic() - self.begun, 1)})
        from bitgen.runtime.logging import format_table

        tables = []
        for name in dict.fromkeys(row["part"] for row in self.rows):
            own = [row for row in self.rows if row["part"] == name]
            rows = [{key: row[key] for key in row if key != "part"} for row in own]
            tables.append(f"{name}\n{format_table(rows)}")
        table = "\n\n".join(tables) + "\n"
        (out / "table.txt").write_text(table)
        print(f"\n{table}")
        if self.failed:
            print(
                f"failed: {', '.join(sorted(self.failed))} ({out / 'log.txt'} has what they said)"
            )
        return int(bool(self.failed))

    def row(self, part: str, values: dict[str, Any]) -> None:
        """Writes and prints a row."""
        with self.lock:
            row = {"part": part, **values}
            self.rows.append(row)
            self.results.write(json.dumps(row) + "\n")
            self.results.flush()
            told = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
            print(f"{time.monotonic() - self.begun:6.1f} s  {part}  {told}", flush=True)

    def _round(self, parts: list[Part]) -> None:
        pool = ThreadPoolExecutor(self.options.jobs)
        try:
            ready = list(pool.map(self._prepared, parts))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in ready:
            if process is not None:
                self._measure(process)

    def _left(self) -> float:
        return self.until - time.monotonic()

    def _prepared(self, part: Part) -> Process | None:
        """Returns the process of a part that has something to measure, once it is ready."""
        if self._left() <= 0:
            self.row(part.name, {"left_out": "no time was left"})
            return None
        process = Process(part, self.options, self.log)
        self.processes.append(process)
        if not self._written(process, min(part.prepare * self.patience, self._left())):
            return None
        self.log.write(f"[{part.name}] ready after {time.monotonic() - process.started:.1f} s\n")
        return process

    def _measure(self, process: Process) -> None:
        if self._left() <= 0:
            self.row(process.part.name, {"left_out": "no time was left"})
            process.end()
            return
        process.go()
        self._written(process, min(process.part.measure * self.patience, self._left()))

    def _written(self, process: Process, seconds: float) -> bool:
        """Writes what a part says; returns whether it is ready to measure, ends it otherwise."""
        name = process.part.name
        try:
            for said in process.rows(seconds):
                if said == READY:
                    return True
                self.row(name, said)
                if said.get("holds") is False:
                    self.failed.append(f"{name} ({said.get('what', '')})")
        except (TimeoutError, RuntimeError) as e:
            if self._left() <= 0:
                self.row(name, {"left_out": "the time of all was over before it was done"})
            else:
                self.row(name, {"failed": str(e)})
                self.failed.append(name)
        process.end()
        return False


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
