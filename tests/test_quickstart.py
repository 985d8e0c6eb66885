"""What README promises of the quickstart: recognisable digits of every class."""

import json
import os
import subprocess
import sys
from pathlib import Path

import digits
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_quickstart_makes_digits_that_a_classifier_recognises(tmp_path):
    environment = {
        **os.environ,
        "VENV": str(Path(sys.executable).parent.parent),
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [ROOT / "launch" / "quickstart.sh", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(tmp_path / "samples.png") in done.stdout
    classifier, accuracy = digits.judge()
    assert accuracy > 0.97
    counts = digits.recognised(tmp_path / "samples.png", classifier)
    assert counts.shape == (10,)
    assert counts.sum() >= 90, counts
    result = json.loads((tmp_path / "tokenizer" / "reconstructions.json").read_text())
    assert result["psnr"] >= 20
    assert result["bits_used"] == 1
