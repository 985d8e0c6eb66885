"""Which process is named when a run hangs or loses one."""

import os
import socket
import subprocess
import sys

import pytest

from bitgen.errors import UserError
from bitgen.runtime import lock, watchdog
from bitgen.runtime.lock import Process
from bitgen.runtime.watchdog import Heartbeat, StallDetector


def dead_process():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return Process(socket.gethostname(), lock.this_process().machine, done.pid, "1")


def beat(process, **fields):
    here = Process(f"host{process}", f"machine{process}", 100 + process, "1")
    return Heartbeat(process, here, **{"activity": "step 7", "slow": False, **fields})


def test_a_run_that_goes_on_is_left_alone():
    detector = StallDetector(stuck_after=10)
    for now in range(100):
        assert (
            detector.check({i: beat(i, count=now, progress=now // 9) for i in (0, 1)}, now) is None
        )


def test_a_stuck_process_is_named_with_what_it_waits_for():
    """The other has gone one step further and waits too."""
    detector = StallDetector(stuck_after=10)
    for now in range(11):
        heartbeats = {
            0: beat(0, count=now, progress=5),
            1: beat(1, count=now, progress=4, activity="waiting for the data of step 7"),
        }
        assert detector.check(heartbeats, now) is None
    found = detector.check(heartbeats, 11)
    assert found == (
        "process 1 on host1: stuck for 11 s at: waiting for the data of step 7; "
        "the others wait for it",
        watchdog.RESTART,
    )


def test_all_stuck_alike_are_all_named():
    detector = StallDetector(stuck_after=10)
    heartbeats = {i: beat(i, progress=3) for i in range(5)}
    for now in (0, 11):
        for i in heartbeats:
            heartbeats[i].count = now
        found = detector.check(heartbeats, now)
    assert found is not None
    assert found[0].startswith(
        "process 0 on host0, process 1 on host1, process 2 on host2 and 2 more: stuck for 11 s"
    )


def test_what_takes_long_by_nature_is_given_ten_times_as_long():
    detector = StallDetector(stuck_after=10)
    heartbeats = {
        0: beat(0, progress=5),
        1: beat(1, progress=4, activity="compiling", slow=True),
    }
    for now in range(0, 140, 10):
        for i in heartbeats:
            heartbeats[i].count = now
        assert (detector.check(heartbeats, now) is not None) == (now > 100), now


def test_nothing_is_stuck_where_that_is_switched_off():
    detector = StallDetector(stuck_after=0)
    assert not [now for now in range(0, 9999, 50) if detector.check({0: beat(0, count=now)}, now)]


def test_a_silent_process_is_named():
    detector = StallDetector(stuck_after=1000, silent_after=60)
    for now in range(0, 100, 10):
        heartbeats = {
            0: beat(0, count=now, progress=now),
            1: beat(1, count=3, progress=now),
        }
        found = detector.check(heartbeats, now)
        assert (found is not None) == (now > 60)
    assert found is not None
    assert found[0] == "process 1 on host1 has sent no heartbeat for 90 s: step 7"


def test_a_judge_that_was_suspended_blames_nobody():
    detector = StallDetector(stuck_after=10, silent_after=10)
    assert detector.check({1: beat(1)}, 0) is None
    detector.pause(1000)
    assert detector.check({1: beat(1)}, 1005) is None
    assert detector.check({1: beat(1)}, 1011) is not None


def test_a_killed_process_of_this_machine_is_named_at_once():
    gone = Heartbeat(1, dead_process(), activity="step 9")
    found = StallDetector(600).check({1: gone}, 0)
    assert found is not None
    assert f"is gone: its process {gone.where.pid} was killed" in found[0]
    assert found[1] == watchdog.RESTART


def test_why_another_process_ended_is_passed_on_with_its_status():
    ended = beat(1, status=2, why="too many broken images")
    assert StallDetector(600).check({1: ended}, 0) == (
        "process 1 on host1 ended: too many broken images",
        2,
    )
    assert StallDetector(600).check({1: beat(1, status=0)}, 0) is None


def test_a_stuck_run_of_one_process_ends_with_a_line(tmp_path):
    program = (
        "import time, sys\n"
        "from pathlib import Path\n"
        "from bitgen.runtime import watchdog\n"
        "watchdog.HEARTBEAT_SECONDS = 0.1\n"
        "with watchdog.guard(Path(sys.argv[1]), 'train', 0.5) as watch:\n"
        "    watch.report('waiting for the data of step 3')\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 75
    assert "stuck for" in done.stderr
    assert "at: waiting for the data of step 3; the same command resumes the run" in done.stderr
    assert not (tmp_path / "train.lock").exists()


def test_errors_under_guard_release_the_workdir(tmp_path):
    for error in (UserError("bad"), RuntimeError("worse"), KeyboardInterrupt()):
        with pytest.raises(type(error)), watchdog.guard(tmp_path, "train", 600):
            raise error
        assert not list(tmp_path.iterdir())
    with (
        watchdog.guard(tmp_path, "train", 600),
        pytest.raises(UserError, match="is in use"),
        watchdog.guard(tmp_path, "train", 600),
    ):
        pass
