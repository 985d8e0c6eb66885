"""One run in a workdir, also after a crash and on storage that machines share."""

import json
import os
import socket
import subprocess
import sys

import pytest

from bitgen.errors import UserError
from bitgen.runtime import lock
from bitgen.runtime.lock import Process


def dead_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return Process(socket.gethostname(), lock.this_process().machine, done.pid, "1")


def held_by(path, holder):
    fields = {"host": holder.host, "machine": holder.machine, "pid": holder.pid}
    content = {**fields, "started": holder.started, "since": "2026-01-01 00:00:00", "token": "x"}
    path.write_text(json.dumps(content))


def test_a_second_run_is_refused_and_told_who_holds_the_workdir(tmp_path):
    first = lock.acquire(tmp_path / "train.lock")
    me = f"process {os.getpid()} on {socket.gethostname()}"
    message = rf"is in use: {me} has been running there since 20"
    with pytest.raises(UserError, match=message):
        lock.acquire(tmp_path / "train.lock")
    assert first.touch()
    first.release()
    lock.acquire(tmp_path / "train.lock").release()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, capsys):
    held_by(tmp_path / "train.lock", dead_process())
    lock.acquire(tmp_path / "train.lock").release()
    assert "is gone, taking over its lock" in capsys.readouterr().err


def test_a_process_number_that_was_given_again_is_not_the_holder(tmp_path):
    me = lock.this_process()
    held_by(tmp_path / "train.lock", Process(me.host, me.machine, me.pid, "an earlier start"))
    lock.acquire(tmp_path / "train.lock").release()


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_known_by_its_touch(alive, tmp_path):
    """Time is counted here alone: clocks of machines differ."""
    path, now = tmp_path / "train.lock", [0.0]
    held_by(path, Process("elsewhere", "another boot", 12, "5"))

    def sleep(seconds):
        now[0] += seconds
        if alive and now[0] > 9:
            os.utime(path, (1, 1))  # of a clock that is far behind

    def acquire():
        return lock.acquire(path, silent=60, clock=lambda: now[0], sleep=sleep)

    if alive:
        with pytest.raises(UserError, match="process 12 on elsewhere has been running there"):
            acquire()
        assert now[0] < 12
    else:
        acquire().release()
        assert now[0] >= 60


def test_a_holder_notices_that_it_was_taken_over(tmp_path):
    mine = lock.acquire(tmp_path / "train.lock")
    held_by(tmp_path / "train.lock", Process("elsewhere", "another boot", 12, "5"))
    assert not mine.touch()
    mine.release()
    assert (tmp_path / "train.lock").exists()


def test_of_many_that_start_together_one_gets_the_lock(tmp_path):
    """Without hard links too, as on object stores."""
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from bitgen.runtime import lock\n"
        "from bitgen.errors import UserError\n"
        "if sys.argv[2] == 'no links':\n"
        "    def link(*_): raise OSError(95, 'not supported')\n"
        "    os.link = link\n"
        "try:\n"
        "    lock.acquire(Path(sys.argv[1]))\n"
        "    print('got it', flush=True)\n"
        "    sys.stdin.read()\n"
        "except UserError: print('refused', flush=True)\n"
    )
    for kind in ("links", "no links"):
        path = tmp_path / kind / "train.lock"
        started = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(path), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        said = [process.stdout.readline().strip() for process in started]  # type: ignore
        for process in started:
            process.communicate()
        assert sorted(said) == ["got it", "refused", "refused"]
