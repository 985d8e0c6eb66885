"""Two real processes with four devices each do what one with eight does, and write it once.

Run as a program, this file is the work that each process does.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SPEED = ("images_per_second", "data_wait", "mfu")
TINY = [
    "--config=configs/digits_tokenizer.py",
    "--config.data.image_size=8",
    "--config.model.image_size=8",
    "--config.model.multipliers=(1,1)",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.train.preview_every=0",
]


def work(root: Path) -> None:
    """Trains both kinds of model, tokenizes, samples and evaluates."""
    import small

    from bitgen import distributed, evaluate, sample, tokenize, train

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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(arguments, log, processes=1, index=0, port=0, devices=8, **more):
    """Starts one process of a run; what it prints goes to a file."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if processes > 1:
        env |= {
            "COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "NUM_PROCESSES": str(processes),
            "PROCESS_ID": str(index),
            "COORDINATOR_TIMEOUT": "120",
        }
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env | more, stdout=file, stderr=file
        )


def start_two(arguments, folder):
    """Starts two processes with four devices each; their output is FOLDER/0.log and 1.log."""
    port = free_port()
    return [
        start(arguments, folder / f"{i}.log", processes=2, index=i, port=port, devices=4)
        for i in range(2)
    ]


def finish(processes, seconds=900):
    """Returns the exit statuses; ends what is still there after so many seconds."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def rows(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in row.items() if k not in SPEED} for row in found]


def files(folder):
    """What a user finds there; the names within Orbax's folders and of TensorBoard differ."""
    names = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        inner = any(
            part in name for part in ("checkpoints/", "params/", "events.out", "heartbeats")
        )
        if path.is_file() and not inner:
            names.add(name)
    return names


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same work by one process and by two."""
    import jax
    import small

    from bitgen import build, data, model_directory
    from bitgen.data.images import write_png

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
    assert finish(start_two([__file__, str(root / "two")], root)) == [0, 0], "\n".join(
        (root / f"{i}.log").read_text()[-3000:] for i in range(2)
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_two_processes_have_the_losses_of_one(kind, runs):
    one, two = rows(runs / "one" / kind), rows(runs / "two" / kind)
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


def wait_for_lines(path, count, processes, seconds=180):
    end = time.monotonic() + seconds
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes), "a process ended too early"
        time.sleep(0.02)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    work(Path(sys.argv[1]))
