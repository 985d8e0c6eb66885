"""The command line: one line for bad input, and a run that survives kill -9."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import small

ROOT = Path(__file__).parent.parent
TINY = [
    "--config.data.image_size=8",
    "--config.model.image_size=8",
    "--config.model.multipliers=(1,1)",
    "--config.train.batch_size=8",
    "--config.train.log_every=1",
    "--config.train.preview_every=0",
]


def environment():
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def command(*arguments):
    return [sys.executable, "-m", "bitgen.main", *map(str, arguments)]


def run(*arguments):
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/bigr.py:XS"], "unknown size 'XS', have ['L', "),
        (["--config=configs/none.py"], "there is no config file configs/none.py"),
        (
            ["--config=configs/bigr.py", "--config.optim.lrr=1"],
            "unknown key in config.optim: 'lrr'",
        ),
        (["--config=configs/bigr.py", "--config.seed.x=1"], "config.seed is a value"),
        (["--config=configs/bigr.py", "--config.optim.lr=fast"], "could not convert"),
        (["--config=configs/bigr.py", "--mode=dance"], "unknown mode 'dance', have ['benchmark', "),
        (["--config=configs/bigr.py", "--config.tokenizer=nowhere"], "is not a model directory"),
        (["--config=configs/digits_tokenizer.py", "--config.data.source=disc"], "have ['bits', "),
        ([], "no --config=FILE given"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    done = run(*arguments, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_help_names_the_modes():
    assert "MODE is one of train, tokenize, sample" in run("--help").stdout


def wait_for_lines(path, count, process):
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)


def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(tmp_path):
    steps = ["--config.train.steps=14", "--config.train.checkpoint_every=4"]
    config = ["--config=configs/digits_tokenizer.py", *TINY, *steps]
    whole = run(*config, f"--workdir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(*config, f"--workdir={killed}"), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    at = random.randint(1, 13)
    wait_for_lines(killed / "metrics.jsonl", at, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = run(*config, f"--workdir={killed}")
    assert resumed.returncode == 0, resumed.stderr

    ours, theirs = (
        [(row["step"], row) for row in small.rows(workdir)]
        for workdir in (killed, tmp_path / "whole")
    )
    theirs = dict(theirs)
    assert {step for step, _ in ours} == set(theirs) == set(range(1, 15))
    for step, row in ours:  # the steps between the checkpoint and the kill are there twice
        assert row == theirs[step], f"killed at {at}, step {step} differs"
    digests = [
        json.loads((workdir / "model" / "model.json").read_text())["digest"]
        for workdir in (killed, tmp_path / "whole")
    ]
    assert digests[0] == digests[1]
