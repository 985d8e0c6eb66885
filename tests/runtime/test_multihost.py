"""Two real processes with four devices each do what one with eight does, and write it once.

Run as a program, this file is the work that each process does: DIRECTORY; or a training that gets a
signal as it begins a step, or freezes: SIGNAL|0 STEP SLOW_FACTOR DIRECTORY.
"""

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import small

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 3  # of the training that is killed; steps between its checkpoints


def work(root: Path) -> None:
    """Trains both kinds of model, tokenizes, samples and evaluates."""
    from bitgen.modes import evaluate, sample, tokenize, train
    from bitgen.runtime import distributed

    distributed.start()
    distributed.check_shared(root)
    c = small.tokenizer()
    c.mesh.data, c.mesh.fsdp = -1, 2
    c.model.width = 64  # so that some arrays are split
    c.train.steps, c.train.preview_every, c.train.preview_images = 3, 3, 6
    train.run(c, root / "tokenizer")

    c = small.tokenizer()
    c.tokenizer = str(root / "given" / "tokenizer")
    c.data.source, c.data.path, c.data.split = "folder", str(root / "pictures"), "all"
    c.data.max_broken_share = 0.1
    c.tokenize.shard, c.tokenize.batch_size = 30, 16
    tokenize.run(c, root)
    c.data.source, c.data.split = "digits", "train"
    c.evaluate.kind, c.evaluate.protocol, c.evaluate.images = "reconstruction", "random", 100
    evaluate.run(c, root / "reconstruction")

    c = small.generator(root / "given" / "tokenizer")
    c.data.source, c.data.path = "bits", str(root / "bits")
    c.train.steps, c.train.preview_every, c.train.preview_images = 3, 3, 16
    c.train.fid_every, c.train.fid_images, c.evaluate.protocol = 3, 40, "random"
    c.evaluate.batch_size = 16
    train.run(c, root / "generator")
    c.generator = str(root / "given" / "generator")
    c.sample.labels, c.sample.per_label, c.sample.batch_size = "0-4", 5, 16
    c.sample.output = "samples.npz"
    sample.run(c, root / "samples")
    c.evaluate.kind, c.evaluate.layers = "probe", "1"
    evaluate.run(c, root / "probe")
    c.data.source, c.evaluate.images, c.evaluate.kind = "digits", 60, "generation"
    evaluate.run(c, root / "generation")


def train_with_fault(number: int, at: int, patience: int, workdir: Path) -> None:
    """Trains, with arrays that lie across both processes; at a step gets a signal, or freezes.

    By then, the last checkpoint before it is on disk.
    """
    from bitgen import main
    from bitgen.errors import UserError
    from bitgen.modes import train
    from bitgen.runtime import distributed
    from bitgen.runtime.watchdog import Watchdog

    activity = Watchdog.report

    def watched(self, what, slow=False):
        activity(self, what, slow)
        if what == f"step {at}":
            while not (workdir / "checkpoints" / str((at - 1) // EVERY * EVERY)).exists():
                time.sleep(0.02)
            if number:
                os.kill(os.getpid(), number)
            else:
                ctypes.PyDLL(None).sleep(3600)  # no other thread of Python runs meanwhile

    Watchdog.report = watched
    c = small.tokenizer()
    c.mesh.data, c.mesh.fsdp = 1, 8
    c.model.width = 64
    c.train.steps, c.train.checkpoint_every, c.train.stuck_after = STEPS, EVERY, patience
    try:
        distributed.start()
        train.run(c, workdir)
    except UserError as e:
        main._end(f"error: {e}", e.status)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(arguments, log, processes=1, index=0, port=0, devices=8):
    """Starts one process of a run; what it prints goes to a file."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    if processes > 1:
        env |= {
            "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "NUM_PROCESSES": str(processes),
            "PROCESS_ID": str(index),
            "COORDINATOR_TIMEOUT": "120",
        }
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=file, stderr=file
        )


def start_two(folder, *arguments):
    """Starts two processes with four devices each; their output is FOLDER/0.log and 1.log.

    `arguments` are of both, or lists, one for each.
    """
    port = free_port()
    of_each = arguments if isinstance(arguments[0], list) else (arguments, arguments)
    return [
        start(words, folder / f"{i}.log", processes=2, index=i, port=port, devices=4)
        for i, words in enumerate(of_each)
    ]


def finish(processes, seconds=1800):
    """Returns the exit statuses; ends what is still there after so many seconds."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def files(folder):
    """What a user finds there; the names within Orbax's folders and of TensorBoard differ.

    That of the reference has a digest of the paths of the data.
    """
    names = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        inner = any(
            part in name for part in ("checkpoints/", "params/", "events.out", "heartbeats")
        )
        if path.is_file() and not inner:
            names.add(re.sub(r"fid_reference_[0-9a-f]+", "fid_reference", name))
    return names


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same work by one process and by two."""
    import jax

    from bitgen import build, data
    from bitgen.hub import model_directory
    from bitgen.images.output import write_png

    root = tmp_path_factory.mktemp("runs")
    given = {
        "tokenizer": build.module_from_config("tokenizer", small.tokenizer().model),
        "generator": build.module_from_config("generator", small.generator("").model),
    }
    digits = data.default_config()
    digits.image_size, digits.split = 8, "test"
    images = next(data.make_batches(digits, batch_size=45, seed=0, training=False))["image"]
    for who in ("one", "two"):
        for kind, (module, info) in given.items():
            params = build.init_params(module, jax.random.key(1))
            model_directory.write(root / who / "given" / kind, info, params)
        for i, image in enumerate(images):
            write_png(root / who / "pictures" / f"{i % 3}" / f"{i:02d}.png", image)
        (root / who / "pictures" / "1" / "22.png").write_bytes(b"no image")
    one = start([__file__, str(root / "one")], root / "one.log")
    assert finish([one]) == [0], (root / "one.log").read_text()[-3000:]
    assert finish(start_two(root, __file__, str(root / "two"))) == [0, 0], logs(root)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_two_processes_have_the_losses_of_one(kind, runs):
    one, two = (small.rows(runs / who / kind) for who in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [1, 2, 3, 3][: len(one)]
    assert "fid" in two[-1] or kind == "tokenizer"
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_write_one_set_of_files(runs):
    assert files(runs / "two") == files(runs / "one")
    names = files(runs / "one")
    assert {"tokenizer/model/model.json", "samples/samples.npz", "bits/bits.json"} <= names
    assert "tokenizer/pictures/reconstructions_0000003.png" in names
    assert not any(name.endswith((".lock", ".part", ".writing")) for name in names)


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one_exactly(runs):
    one, two = (np.load(runs / who / "samples" / "samples.npz") for who in ("one", "two"))
    assert one["arr_0"].shape == (25, 8, 8, 3)
    np.testing.assert_array_equal(two["arr_0"], one["arr_0"])
    np.testing.assert_array_equal(two["arr_1"], one["arr_1"])


@pytest.mark.slow
def test_two_processes_tokenize_what_one_does(runs):
    """In shards; a picture that is broken is left out."""
    for name in sorted(path.name for path in (runs / "one" / "bits").iterdir()):
        one, two = ((runs / who / "bits" / name).read_bytes() for who in ("one", "two"))
        assert one.replace(b"/one/", b"/two/") == two, name
    assert json.loads((runs / "two" / "bits" / "bits.json").read_text())["count"] == 44


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reconstruction", "generation", "probe"])
def test_two_processes_measure_what_one_does(kind, runs):
    reports = [
        json.loads((runs / who / kind / "evaluation.json").read_text()) for who in ("one", "two")
    ]
    assert reports[0]["counts"] == reports[1]["counts"]
    for ours, theirs in zip(*(report["results"] for report in reports), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"tokenizer"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-2, abs=1e-3), name


def logs(folder):
    return "\n".join((folder / f"{i}.log").read_text()[-3000:] for i in range(2))


class Training:
    """A training of two processes in one workdir, started again and again."""

    def __init__(self, root):
        self.root, self.workdir = root, root / "run"
        root.mkdir()

    def words(self, number=0, step=0, patience=600):
        return [__file__, *map(str, (int(number), step, patience, self.workdir))]

    def start(self, faulty=0, number=0, step=0, patience=600):
        """Starts both; one of them gets a signal at a step, or freezes there."""
        for i in range(2):
            (self.root / f"{i}.log").unlink(missing_ok=True)
        of_each = [
            self.words(number, step, patience) if i == faulty else self.words(patience=patience)
            for i in range(2)
        ]
        return start_two(self.root, *of_each)

    def said(self, process):
        return (self.root / f"{process}.log").read_text()

    def resumed_at(self):
        return int(self.said(0).split(f"resuming {self.workdir} at step ")[1].split()[0])


@pytest.mark.slow
def test_faults_of_one_process_of_two(tmp_path):
    """Each is killed, one is told to stop, one freezes: the other says so, and both go on."""
    whole, run = Training(tmp_path / "whole"), Training(tmp_path / "faults")
    assert finish(whole.start()) == [0, 0], logs(whole.root)
    host = socket.gethostname()

    # The second process is killed at step 5, then the coordinator at step 8.
    for killed, at in ((1, 5), (0, 8)):
        processes = run.start(killed, signal.SIGKILL, at)
        statuses = finish(processes)
        assert statuses[killed] == -signal.SIGKILL, logs(run.root)
        assert statuses[1 - killed] == 75, logs(run.root)
        gone = f"error: process {killed} on {host} is gone: its process {processes[killed].pid} was"
        line = run.said(1 - killed).split(gone)[1].splitlines()[0]
        assert line.endswith("; the same command resumes the run")
    assert run.resumed_at() == 3

    # One is told to stop: both do after the same step, two later, which they save.
    assert finish(run.start(1, signal.SIGTERM, 8)) == [0, 0], logs(run.root)
    assert run.resumed_at() == 6
    assert "stopped by a signal: saved step 10; the same command resumes" in run.said(0)

    # One that freezes is named, and the other does not wait for it.
    processes = run.start(1, 0, 11, patience=15)
    try:
        assert processes[0].wait(1800) == 75, logs(run.root)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert run.resumed_at() == 10
    named = rf"error: process 1 on {host}(: stuck for| has sent no heartbeat for) \d+ s"
    assert re.search(named, run.said(0)), logs(run.root)

    # What two began, one ends.
    alone = start(run.words(), run.root / "0.log")
    assert finish([alone]) == [0], run.said(0)
    expected = {row["step"]: row for row in small.rows(whole.workdir)}
    found = small.rows(run.workdir)
    assert {row["step"] for row in found} == set(range(1, STEPS + 1))
    assert len(found) <= STEPS + 2  # those after a save before a kill were done twice
    for row in found:
        if row["step"] <= 10:
            assert row == expected[row["step"]]  # bit for bit
        for name, value in row.items():
            np.testing.assert_allclose(value, expected[row["step"]][name], rtol=1e-3, atol=1e-5)
    assert not any((run.workdir / name).exists() for name in ("train.lock", "model.writing"))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        work(Path(sys.argv[1]))
    else:
        train_with_fault(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
