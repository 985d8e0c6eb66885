"""The accelerator's run: rehearsed whole on a CPU, and what becomes of parts that fail."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from accelerator import __main__ as accelerator
from accelerator import profiles, training
from accelerator.part import READY, Context, Part
from accelerator.rounds import BATCHES, STEPS, rounds
from helpers import small
from PIL import Image

from bitgen.modes.benchmark import traced_step
from bitgen.profiling import memory_estimate
from bitgen.profiling.flops import count_flops
from bitgen.runtime import devices
from bitgen.runtime.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[1]
HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {"tensorflow", "tensorflow_datasets", "sklearn", "clu"}:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.fixture
def without_tensorflow(tmp_path, monkeypatch):
    """An environment where TensorFlow, its data sets and scikit-learn are not installed."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text(HIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    import_it = [sys.executable, "-c", "import tensorflow"]
    assert "ModuleNotFoundError" in subprocess.run(import_it, capture_output=True, text=True).stderr


def run(*arguments):
    command = [sys.executable, "-m", "tests.accelerator", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path, without_tensorflow):
    done = run("--rehearse", f"--out={tmp_path}", "--minutes=15", "--jobs=2")
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{log[-3000:]}"
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {part.name: [] for parts in rounds(rehearse=True) for part in parts}
    for row in rows[:-1]:
        found[row["part"]].append(row)
    assert all(found.values()), [name for name, its_rows in found.items() if not its_rows]
    assert all(row.get("holds", True) for row in rows)
    assert [name for name, (row, *_) in found.items() if "left_out" in row] == [
        "original-bitdance_B_16x"
    ]
    assert any("kernels" in row for row in found["sample-bitdance_B_16x"])
    assert {row["what"] for row in found["train-bigr_XL"]} == {
        "step of 2 images, layers unrolled",
        "step of 2 images, layers in a loop",
    }
    assert found["profile-bigr_L_d24"][0]["kernels"] > 0
    assert found["profile-bigr_L_d24"][1]["what"] == "kernel 1"
    table = (tmp_path / "table.txt").read_text()
    assert table in done.stdout
    assert all(f"{name}\n" in table for name in found)


def test_attention_and_goldens_are_rehearsed_alone(tmp_path):
    done = run("--rehearse", f"--out={tmp_path}", "--only=exact-att, exact-gold", "--jobs=2")
    assert done.returncode == 0, done.stdout
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"exact-attention", "exact-goldens", "all"}
    lengths = [row["what"].split(",")[0] for row in rows if row["part"] == "exact-attention"]
    assert sorted(set(lengths)) == ["length 256", "length 257", "length 319"]


def test_what_is_asked_for_wrongly_is_one_line(tmp_path):
    done = run("--only=nothing", f"--out={tmp_path}")
    assert done.returncode == 2
    assert "--only=nothing is none of exact-goldens, exact-attention" in done.stderr
    done = run("--only=exact,trian", f"--out={tmp_path}")
    assert done.returncode == 2
    assert "--only=trian is none of" in done.stderr
    done = run(f"--originals={tmp_path / 'no'}")
    assert done.returncode == 2
    assert "no is no directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_part_has_a_name_of_its_own_and_every_size_is_used():
    names = [part.name for parts in rounds(rehearse=False) for part in parts]
    assert len(set(names)) == len(names)
    assert {f"sample-{name}" for name in BATCHES} <= set(names)
    assert {f"train-{name.replace(':', '_')}" for name in STEPS} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_real_size_fit_an_h100_by_shapes(name, tmp_path):
    batch, unrolled = STEPS[name]
    c = training.settings(name, batch, Context(False, tmp_path, None), unrolled or None)
    mesh = make_mesh(devices=jax.devices()[:1])
    traced, (_, _, shapes) = traced_step(c, mesh)
    assert all(shape.shape[0] == batch for shape in shapes.values())
    assert count_flops(traced.jaxpr) > 1e12
    assert memory_estimate.fits(memory_estimate.estimate(c, 1), devices.by_name("H100").memory)


# ------------------------------------------------------------------------ parts that fail
SAYS = "import json, sys, time, subprocess\ndef say(x): print('>', json.dumps(x), flush=True)\n"


@pytest.fixture
def report(tmp_path, monkeypatch):
    """f(name -> its program, seconds of all) -> exit status, and the rows by part."""

    def run_parts(programs, seconds=60.0, **limits):
        def command(part, options):
            del options
            return [sys.executable, "-c", SAYS + programs[part.name]]

        monkeypatch.setattr(accelerator, "command", command)
        options = SimpleNamespace(
            out=tmp_path, minutes=seconds / 60, jobs=2, rehearse=False, originals=None
        )
        parts = [Part(name, "", lambda context: iter(()), **limits) for name in programs]
        status = accelerator.Report(options).run([parts])
        rows = {}
        for line in (tmp_path / "results.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row.pop("part"), []).append(row)
        return status, rows

    return run_parts


def test_parts_measure_one_after_another_in_their_order(report):
    program = f"say('{READY}'); sys.stdin.readline(); t = time.time(); time.sleep(0.2)\n"
    program += "say({'what': 'x', 'from': t, 'to': time.time()})"
    status, rows = report({"a": program, "b": program, "c": program})
    assert status == 0
    spans = [(row["from"], row["to"]) for name in "abc" for row in rows[name]]
    assert len(spans) == 3
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_what_fails_is_named_and_the_others_go_on(report, capsys):
    status, rows = report(
        {
            "breaks": "say({'what': 'first'}); raise ValueError('it is broken')",
            "wrong": "say({'what': 'sums', 'holds': False})",
            "good": "say({'what': 'sums', 'holds': True})",
        }
    )
    assert status == 1
    assert rows["breaks"][0] == {"what": "first"}  # what was known before is kept
    assert "ValueError: it is broken" in rows["breaks"][1]["failed"]
    assert rows["good"] == [{"what": "sums", "holds": True}]
    assert "failed: breaks, wrong (sums)" in capsys.readouterr().out


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(report, tmp_path):
    child = "import pathlib, time; time.sleep(4); pathlib.Path({0!r}).touch()"
    mark = tmp_path / "outlived"
    starts = f"subprocess.Popen([sys.executable, '-c', {child.format(str(mark))!r}])\n"
    begun = time.monotonic()
    status, rows = report({"slow": starts + "time.sleep(60)"}, prepare=2.0)
    assert status == 1
    assert "not done in 2 s" in rows["slow"][0]["failed"]
    time.sleep(max(0.0, 5.0 - (time.monotonic() - begun)))
    assert not mark.exists()


def test_what_the_time_cuts_off_is_left_out_not_failed(report):
    ready = f"say('{READY}'); sys.stdin.readline(); time.sleep(60)"
    status, rows = report({"a": ready, "b": f"say('{READY}')"}, seconds=6.0)
    assert status == 0
    assert rows["a"] == [{"left_out": "the time of all was over before it was done"}]
    assert rows["b"] == [{"left_out": "no time was left"}]


def test_no_part_begins_when_the_time_is_over(report):
    status, rows = report({"a": "say({'what': 'x'})"}, seconds=0.0)
    assert status == 0
    assert rows["a"] == [{"left_out": "no time was left"}]


# ---------------------------------------------------------------------------- its pieces
def test_time_between_kernels_that_overlap():
    events = [profiles.Event(0, 10, "a"), profiles.Event(5, 8, "b"), profiles.Event(20, 25, "a")]
    assert profiles._busy(events) == 15


def test_training_reads_what_it_wrote(tmp_path):
    context = Context(True, tmp_path, None)
    for name in ("bigr:XL", "binary_ae:d24"):
        c = training.settings(name, 2, context, None)
        training.write_data(c)
        batches = training.data.make_batches(
            c.data, batch_size=2, seed=0, training=True, process_index=0, process_count=1
        )
        batch = next(batches)
        batches.close()
        for key, shape in memory_estimate.shapes_task(c).batch_shapes().items():
            assert batch[key].shape == shape.shape
            assert batch[key].dtype == shape.dtype
            assert key == "label" or len(np.unique(batch[key])) > 8


def test_samples_are_drawn_and_measured_without_tensorflow(tmp_path, without_tensorflow):
    generator, tokenizer = small.write_models(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "real").mkdir()
    for i in range(10):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture.save(tmp_path / "real" / f"{i}.png")
    command = [
        *(sys.executable, "-m", "bitgen.main", "--config=configs/bigr_released.py"),
        *(f"--workdir={tmp_path / 'run'}", f"--config.generator={generator}"),
        *(f"--config.tokenizer={tokenizer}", "--config.sampler.iterations=2"),
        *("--config.sampler.denoiser_steps=2", "--config.sample.labels=0,1"),
        *("--config.sample.per_label=4", "--config.sample.output=samples.npz"),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT)])}
    measure = [
        *("--mode=evaluate", "--config.evaluate.protocol=random"),
        f"--config.evaluate.samples={tmp_path / 'run' / 'samples.npz'}",
        f"--config.evaluate.reference={tmp_path / 'real'}",
    ]
    for mode in (["--mode=sample"], measure):
        done = subprocess.run([*command, *mode], cwd=ROOT, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "fid" in done.stdout
