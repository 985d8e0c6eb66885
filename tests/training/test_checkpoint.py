"""Checkpoints through faults: a broken one, a full disk, other meshes, what a kill leaves."""

import gc
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bitgen.errors import UserError
from bitgen.runtime.mesh import make_mesh
from bitgen.training.checkpoint import Checkpoints

CONFIG = {"seed": 0, "train": {"steps": 6, "max_to_keep": 3}}


def state(step, spec=None, **mesh):
    sharding = NamedSharding(make_mesh(**mesh), spec or P())
    values = {"w": jnp.arange(64.0).reshape(16, 4) + step, "step": jnp.full((8, 1), step)}
    return jax.tree.map(lambda x: jax.device_put(x, sharding), values)


def open_checkpoints(workdir):
    return Checkpoints(workdir, CONFIG, keep=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = open_checkpoints(workdir)
    for step in (2, 4):
        checkpoints.save(step, state(step), {"next_example": 8 * step})
    checkpoints.close()
    return workdir


def restored(workdir, like=None):
    checkpoints = open_checkpoints(workdir)
    try:
        return checkpoints.restore(state(0) if like is None else like)
    finally:
        checkpoints.close()


def assert_is(found, step):
    values, position = found
    jax.tree.map(np.testing.assert_array_equal, values, state(step))
    assert position == {"next_example": 8 * step}


def files_of(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


# An Orbax restore that fails leaves tasks behind, which Python names when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_file_of_the_newest_checkpoint_may_be_truncated(saved, tmp_path, capsys):
    """All of it is restored or, where a file mattered, all of the one before: never a mixture."""
    went_back = []
    for i, name in enumerate(files_of(saved / "checkpoints" / "4")):
        workdir = tmp_path / str(i)
        shutil.copytree(saved, workdir)
        file = workdir / "checkpoints" / "4" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        found = restored(workdir)
        said = capsys.readouterr().err
        if found[1] == {"next_example": 32}:
            assert_is(found, 4)
            continue
        assert_is(found, 2)
        went_back.append(name)
        assert said.count("\n") == 1
        assert said.startswith("checkpoint 4 cannot be read (")
        assert f"going back to 2; the broken one is in {workdir}/checkpoints_broken/4" in said
        assert not (workdir / "checkpoints" / "4").exists()
        assert (workdir / "checkpoints_broken" / "4" / name).exists()
    gc.collect()
    parts = {name.parts[0] for name in went_back}
    assert {"state", "data", "config"} <= parts


def test_a_run_goes_on_over_a_broken_checkpoint(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4" / "state")
    checkpoints = open_checkpoints(tmp_path / "run")
    assert_is(checkpoints.restore(state(0)), 2)
    assert checkpoints.latest == 2
    checkpoints.save(4, state(4), {"next_example": 32})
    checkpoints.close()
    assert_is(restored(tmp_path / "run"), 4)


def test_no_readable_checkpoint_is_an_error_and_nothing_is_moved(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for step in ("2", "4"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step / "state")
    with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints can be read: .*4"):
        restored(tmp_path / "run")
    assert {"2", "4"} <= set(os.listdir(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize(
    ("mesh", "spec"),
    [
        ({"data": 1, "fsdp": 8}, P("fsdp")),
        ({"data": 2, "fsdp": 2, "tensor": 2}, P(("data", "fsdp"))),
        ({"devices": jax.devices()[:1]}, P()),
        ({"devices": jax.devices()[:4]}, P("data")),
    ],
)
def test_another_mesh_or_device_count_restores_the_same(saved, mesh, spec):
    like = state(0, spec, **mesh)
    found = restored(saved, like)
    assert_is(found, 4)
    assert found[0]["w"].sharding == like["w"].sharding


def test_what_was_saved_sharded_restores_whole(tmp_path):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(2, state(2, P("fsdp"), data=2, fsdp=4), {"next_example": 16})
    checkpoints.close()
    assert_is(restored(tmp_path, state(0, devices=jax.devices()[:1])), 2)


def test_a_position_that_every_process_saved_is_read(saved, tmp_path):
    """As checkpoints were before: a file for each process, by grain."""
    shutil.copytree(saved, tmp_path / "run")
    data = tmp_path / "run" / "checkpoints" / "4" / "data"
    position = (data / "metadata").read_text()
    (data / "metadata").unlink()
    (data / "process_0-of-2.json").write_text(position)
    assert_is(restored(tmp_path / "run"), 4)


def test_what_a_killed_save_leaves_is_removed(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    rest = tmp_path / "run" / "checkpoints" / "6.orbax-checkpoint-tmp"
    shutil.copytree(saved / "checkpoints" / "4", rest)
    checkpoints = open_checkpoints(tmp_path / "run")
    assert checkpoints.latest == 4
    assert_is(checkpoints.restore(state(0)), 4)
    checkpoints.close()
    assert not rest.exists()


@pytest.mark.parametrize("errors", ["python", "tensorstore", "seen before"])
def test_a_full_disk_is_one_line_and_keeps_what_was_saved(errors, saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "run")
    checkpoints = open_checkpoints(tmp_path / "run")

    def fail(*args, **kwargs):
        assert errors != "seen before"
        if errors == "python":
            raise OSError(28, os.strerror(28))
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing: {os.strerror(28)} [source]")

    with monkeypatch.context() as patch:
        if errors == "seen before":
            usage = shutil.disk_usage(tmp_path)._replace(free=7)
            patch.setattr(shutil, "disk_usage", lambda path: usage)
        patch.setattr(checkpoints.manager, "save", fail)
        with pytest.raises(UserError) as caught:
            checkpoints.save(6, state(6), {"next_example": 48})
    line = str(caught.value)
    assert "\n" not in line
    assert f"no space for the checkpoint of step 6 in {tmp_path}/run/checkpoints" in line
    assert "takes about 0.0 MB" in line
    assert "that of step 4 is kept" in line
    checkpoints.close()
    assert_is(restored(tmp_path / "run"), 4)
    config = tmp_path / "run" / "checkpoints" / "4" / "config" / "metadata"
    assert json.loads(config.read_text()) == CONFIG


def test_other_errors_of_a_save_stay_what_they_are(tmp_path, monkeypatch):
    checkpoints = open_checkpoints(tmp_path)

    def fail(*args, **kwargs):
        raise TypeError("no such type")

    monkeypatch.setattr(checkpoints.manager, "save", fail)
    with pytest.raises(TypeError, match="no such type"):
        checkpoints.save(2, state(2), {})
    monkeypatch.undo()
    checkpoints.close()
