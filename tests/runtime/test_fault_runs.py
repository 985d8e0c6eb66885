"""Faults in the midst of whole runs: the same command goes on, and every number is the same.

Run as a program, this file is bitgen with a kill -9 at a file operation: EVENT PATH ARGUMENTS...
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import small

from bitgen import main
from bitgen.errors import UserError
from bitgen.modes import train
from bitgen.runtime.mesh import make_mesh
from bitgen.runtime.watchdog import Watchdog
from bitgen.training.tokenizer_task import TokenizerTask

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 6, 2
CONFIG = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
import test_fault_runs
get_config = test_fault_runs.settings
"""


def settings():
    c = small.tokenizer()
    c.train.steps, c.train.checkpoint_every, c.train.max_to_keep = STEPS, EVERY, 9
    return c


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without faults."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train.run(settings(), workdir)
    return workdir


def copy_up_to(step, whole, workdir):
    """A copy of the whole run as it was when it had saved a step and nothing after it."""
    shutil.copytree(whole, workdir)
    for later in range(step + EVERY, STEPS + 1, EVERY):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:step]))
    return workdir


def assert_same_run(workdir, whole, repeated=()):
    """Every number and the model are those of the whole run; some steps were done twice."""
    expected = {row["step"]: row for row in small.rows(whole)}
    found = small.rows(workdir)
    assert sorted(row["step"] for row in found) == sorted([*expected, *repeated])
    for row in found:
        assert row == expected[row["step"]]
    assert digest(workdir) == digest(whole)


def digest(workdir):
    return json.loads((workdir / "model" / "model.json").read_text())["digest"]


def at(monkeypatch, moment, action):
    """Does something once, when a run begins with what it calls so."""
    activity = Watchdog.report

    def watched(self, what, slow=False):
        activity(self, what, slow)
        if what == moment:
            monkeypatch.setattr(Watchdog, "report", activity)
            action()

    monkeypatch.setattr(Watchdog, "report", watched)


@pytest.mark.slow
def test_sigterm_at_any_moment_costs_no_step(whole, tmp_path, monkeypatch, capsys):
    for moment, said in (
        ("waiting for the data of step 1", "before the first step: the same command starts again"),
        ("compiling the training step", "before the first step: the same command starts again"),
        ("step 1", "saved step 1; the same command resumes there"),
        ("drawing and saving step 2", "saved step 2;"),
        ("waiting for the data of step 4", "saved step 4;"),
    ):
        at(monkeypatch, moment, lambda: signal.raise_signal(signal.SIGTERM))
        train.run(settings(), tmp_path)
        assert f"stopped by a signal{':' if 'saved' in said else ''} {said}" in (
            capsys.readouterr().err
        ), moment
    train.run(settings(), tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_and_a_second_run_leave_a_run_as_it_was(
    whole, tmp_path, monkeypatch
):
    step = TokenizerTask.step

    def poisoned(self, state, frozen, batch, key, stage):
        state, metrics = step(self, state, frozen, batch, key, stage)
        return state, {
            **metrics,
            "loss": metrics["loss"] + jax.numpy.where(state.step == 4, np.nan, 0),
        }

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTask, "step", poisoned)
        with pytest.raises(UserError, match=r"nan at step 4; .* keeps the checkpoint of step 2"):
            train.run(settings(), tmp_path)

    def second():
        with pytest.raises(
            UserError, match=rf"in use: process {os.getpid()} on .* has been running there"
        ):
            train.run(settings(), tmp_path)

    at(monkeypatch, "step 5", second)
    train.run(settings(), tmp_path)
    assert_same_run(tmp_path, whole, repeated=[3])


@pytest.mark.slow
def test_over_a_truncated_checkpoint_a_run_goes_on_from_the_one_before(whole, tmp_path, capsys):
    workdir = copy_up_to(STEPS, whole, tmp_path / "run")
    newest = workdir / "checkpoints" / str(STEPS)
    largest = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    train.run(settings(), workdir)
    said = capsys.readouterr().err
    assert f"checkpoint {STEPS} cannot be read (" in said
    assert f"going back to 4; the broken one is in {workdir}/checkpoints_broken/{STEPS}" in said
    assert f"resuming {workdir} at step 4" in said
    assert_same_run(workdir, whole, repeated=[5, 6])


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_and_on_fewer_devices(whole, tmp_path, monkeypatch):
    """To float32 rounding: sums over the batch are in another order."""
    c = settings()
    c.mesh.data, c.mesh.fsdp = 2, 4
    meshes = {"fsdp": make_mesh(**c.mesh), "four devices": make_mesh(devices=jax.devices()[:4])}
    for name, mesh in meshes.items():
        workdir = copy_up_to(4, whole, tmp_path / name)
        monkeypatch.setattr(train, "make_mesh", lambda mesh=mesh, **_: mesh)
        train.run(c, workdir)
        for ours, theirs in zip(small.rows(workdir), small.rows(whole), strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_kill_between_the_last_checkpoint_and_its_model(whole, tmp_path, capsys):
    workdir = copy_up_to(STEPS, whole, tmp_path / "run")
    shutil.rmtree(workdir / "model")
    train.run(settings(), workdir)
    assert "nothing to do" in capsys.readouterr().err
    assert_same_run(workdir, whole)


def command(tmp_path, *arguments):
    """-> arguments of a Python that trains as `settings` says, and its environment."""
    (tmp_path / "config.py").write_text(CONFIG)
    words = [*arguments, f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    return [sys.executable, *words], {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


@pytest.mark.slow
def test_kill_9_during_a_save(whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    for event, where, kept in (
        # As the first save begins; when all of the second is written, before it gets its name;
        # when the model before is out of the way and the new one has not got its name.
        ("os.mkdir", "checkpoints/2.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp", []),
        ("os.rename", "checkpoints/4.orbax-checkpoint-tmp", ["2"]),
        ("os.rename", "run/model.writing", ["2"]),
    ):
        words, env = command(tmp_path, __file__, event, where)
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        found = {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
        assert set(kept) <= found <= {*kept, "4"}
    assert not (workdir / "model").exists()
    train.run(settings(), workdir)
    said = capsys.readouterr().err
    assert "is gone, taking over its lock" in said
    assert f"resuming {workdir} at step " in said
    steps = [row["step"] for row in small.rows(workdir)]
    assert steps[:6] == [1, 2, 1, 2, 3, 4]  # begun twice, and then not again
    assert 1 not in steps[6:]
    for step in range(1, STEPS + 1):
        steps.remove(step)
    assert_same_run(workdir, whole, repeated=steps)
    names = [path.name for path in (*workdir.iterdir(), *(workdir / "checkpoints").iterdir())]
    assert not [name for name in names if "tmp" in name or name.endswith((".old", ".writing"))]


# In a file system of 6 MB a run ends, as a checkpoint takes 3; it goes on when there are 50.
FULL = """
mount -t tmpfs -o size=6m tmpfs "$RUN"
"$@" || echo "status $?" >&2
mount -o remount,size=50m "$RUN"
"$@" && cp -r "$RUN/model" "$RUN/metrics.jsonl" "$OUT"
"""


def may_mount():
    try:
        tried = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(tried, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
def test_a_full_disk_ends_a_run_and_with_more_space_it_goes_on(whole, tmp_path):
    if not may_mount():
        pytest.skip("this machine lets nobody mount a file system in a namespace")
    for name in ("run", "out"):
        (tmp_path / name).mkdir()
    words, env = command(tmp_path, __file__, "no event", "")
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", FULL, "sh", *words],
        cwd=ROOT,
        env={**env, "RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, again = done.stderr.split("status 2\n")
    line = first.splitlines()[-1]
    assert "Traceback" not in first
    assert f"error: no space for the checkpoint of step 4 in {tmp_path}/run/checkpoints" in line
    assert "that of step 2 is kept; free some and start the same command again" in line
    assert f"resuming {tmp_path}/run at step 2" in again
    # The run is some steps ahead of the thread that saves.
    count = len(small.rows(tmp_path / "out"))
    assert_same_run(tmp_path / "out", whole, repeated=[3, 4, 5, 6][: max(2, count - STEPS)])


if __name__ == "__main__":
    EVENT, WHERE = sys.argv[1:3]

    def kill(event, arguments):
        if event == EVENT and str(arguments[0]).endswith(WHERE):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)
    sys.exit(main.main(["bitgen", *sys.argv[3:]]))
