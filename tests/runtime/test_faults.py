"""What happens to a run around it: environments, locks, stuck and lost processes, dead workers."""

import itertools
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from helpers import small

from bitgen import data
from bitgen.errors import UserError
from bitgen.runtime import distributed, lock, watchdog
from bitgen.runtime.distributed import find_processes
from bitgen.runtime.lock import Process
from bitgen.runtime.watchdog import Heartbeat, StallDetector

PLAIN = {"COORDINATOR_ADDRESS": "10.0.0.1:1234", "NUM_PROCESSES": "4", "PROCESS_ID": "3"}
TORCHRUN = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "WORLD_SIZE": "2", "RANK": "1"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


# ------------------------------------------------------------------------------ environment
@pytest.mark.parametrize(
    ("env", "found"),
    [
        ({}, None),
        (PLAIN, {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}),
        ({**PLAIN, "NUM_PROCESSES": "1", "PROCESS_ID": "0"}, None),
        (TORCHRUN, {"coordinator_address": "node1:29500", "num_processes": 2, "process_id": 1}),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        (
            {**TORCHRUN, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"},
            {
                "coordinator_address": "node1:29501",
                "num_processes": 2,
                "process_id": 1,
                "local_device_ids": [1],
            },
        ),
        (SLURM, {}),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # no srun
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"},
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:1"}, {}),
    ],
)
def test_the_environment_tells_of_the_other_processes(env, found):
    assert find_processes(env) == found


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"PROCESS_ID": "0", "NUM_PROCESSES": "2"}, "^COORDINATOR_ADDRESS missing: .*PROCESS_ID=0"),
        ({k: v for k, v in TORCHRUN.items() if k != "RANK"}, "^RANK missing: .* WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "^MASTER_ADDR and MASTER_PORT and RANK missing"),
        ({**PLAIN, "PROCESS_ID": "4"}, "PROCESS_ID=4: processes count from 0"),
        ({**PLAIN, "NUM_PROCESSES": "two"}, "NUM_PROCESSES='two' is not a number"),
        ({**PLAIN, "COORDINATOR_ADDRESS": "node1"}, "no port: set host:port"),
    ],
)
def test_a_partly_set_environment_names_what_is_missing(env, message):
    with pytest.raises(UserError, match=message):
        find_processes(env)


def test_a_coordinator_that_does_not_answer_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # taken, but nothing listens
        address = f"127.0.0.1:{s.getsockname()[1]}"
        env = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "PROCESS_ID": "1"}
        with pytest.raises(UserError, match=rf"no coordinator answers at {address} after 0 s"):
            distributed.start({**env, "COORDINATOR_TIMEOUT": "0"})


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_processes_read_disjoint_rows_and_together_all(processes, training):
    c = data.default_config()
    c.image_size, c.threads = 8, 1
    parts = []
    for index in range(processes):
        batches = data.make_batches(
            c,
            batch_size=8,
            seed=3,
            training=training,
            process_index=index,
            process_count=processes,
        )
        parts.append([batch["image"] for batch in itertools.islice(batches, 3)])
        batches.close()
    whole = data.make_batches(c, batch_size=8, seed=3, training=training)
    for i, batch in enumerate(itertools.islice(whole, 3)):
        together = np.concatenate([part[i] for part in parts])
        np.testing.assert_array_equal(together, batch["image"])
    whole.close()


# ------------------------------------------------------------------------------------- lock
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


# --------------------------------------------------------------------------------- watchdog
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


# ----------------------------------------------------------------------------- data workers
def worker_batches():
    c = small.tokenizer().data
    c.workers = 1
    return data.make_batches(c, batch_size=8, seed=0, training=True)


def kill_workers():
    for child in multiprocessing.active_children():
        if child.pid:
            os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_data_worker_that_dies_is_started_again_and_nothing_is_lost(caplog):
    c = small.tokenizer().data
    plain = data.make_batches(c, batch_size=8, seed=0, training=True)
    expected = [next(plain)["image"] for _ in range(60)]
    plain.close()
    batches = worker_batches()
    with caplog.at_level(logging.WARNING):
        for i, images in enumerate(expected):
            if i == 3:
                kill_workers()
            np.testing.assert_array_equal(next(batches)["image"], images)
    batches.close()
    assert "a data worker process died (killed, as for lack of memory): started again" in (
        caplog.text
    )


def test_a_data_worker_that_dies_again_is_one_clear_error(monkeypatch):
    batches = worker_batches()

    class Dying:
        def __next__(self):
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

        def close(self):
            pass

    monkeypatch.setattr(batches, "_pipeline", Dying)
    with pytest.raises(UserError, match=r"worker process died twice at example 0 \(killed"):
        next(batches)
    batches.close()
