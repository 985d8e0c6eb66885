"""Every golden that the tests carry, through the same code as `python tests/parity.py`."""

import json
import shutil
from pathlib import Path

import numpy as np
import parity
import pytest

GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*.json"))
SLOW = {"gfq_ae_d16c32_full"}  # 460M parameters: half a minute and 4 GB


def cases():
    for path in GOLDENS:
        marks = [pytest.mark.slow] if path.stem in SLOW else []
        yield pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", list(cases()))
def test_golden_reproduces(path):
    for result in parity.compare(path):
        assert result.errors.max() <= 1, f"{result.name}: {result.errors.max():.2f} {result.unit}"


def test_a_wrong_array_fails_and_an_unknown_one_is_reported(tmp_path, capsys):
    golden = GOLDENS[0].with_name("bae_tiny.json")
    shutil.copy(golden, tmp_path)
    arrays = dict(np.load(golden.with_suffix(".npz")))
    np.savez(tmp_path / "bae_tiny.npz", **{**arrays, "hidden": arrays["hidden"] + 1e-2})
    assert parity.main(["parity.py", str(tmp_path / "bae_tiny.json")]) == 1
    assert "FAILED hidden" in capsys.readouterr().out
    np.savez(tmp_path / "bae_tiny.npz", **arrays, other=arrays["hidden"])
    with pytest.raises(ValueError, match="nothing compares"):
        parity.compare(tmp_path / "bae_tiny.json")
    (tmp_path / "bae_tiny.json").write_text(json.dumps({"family": "what"}))
    with pytest.raises(ValueError, match="family 'what'"):
        parity.compare(tmp_path / "bae_tiny.json")
