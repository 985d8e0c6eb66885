"""Every golden that the tests carry, through the same code as `python tests/parity.py`."""

import json
import shutil
from pathlib import Path

import numpy as np
import parity
import pytest

from bitgen import build
from bitgen.convert import bitvae
from bitgen.convert.rules import import_tensors
from bitgen.tokenizers.multiscale import scales_of

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


def test_a_golden_of_ten_scales(tmp_path):
    """Made by our own model: what is tried is that every scale is found, and none left out."""
    spec, arrays = parity.read(GOLDENS[0].with_name("bitvae_tiny.json"))
    scales = scales_of("dynamic", (32, 32))
    spec["hparams"]["scale_schedule"] = [[1, *scale] for scale in scales]
    image, rng = arrays["image"].repeat(2, 2).repeat(2, 3), np.random.default_rng(0)
    hparams = bitvae.hparams_from_reference(spec["hparams"])
    module = build.make_module("tokenizer", "bitvae", hparams)
    state = parity.synthetic_state_dict(spec)
    params, _ = import_tensors(bitvae.table(hparams), state, build.param_shapes(module))

    def apply(method, x):
        return module.apply({"params": params}, x, method=method)

    bits = apply("encode", parity.nhwc(image))
    drawn = [rng.random(scale.shape) < 0.5 for scale in bits]
    made = {
        "image": image,
        "hidden": parity.nchw(apply("hidden", parity.nhwc(image))),
        "quantized": parity.nchw(apply("codes", bits)),
        "reconstruction": np.clip(parity.nchw(apply("decode", bits)), -1, 1),
        "random_bits_summed_codes": parity.nchw(apply("codes", tuple(drawn)))[:, :, None],
        "random_bits_decoded": np.clip(parity.nchw(apply("decode", tuple(drawn))), -1, 1),
    }
    for name, scales in (("bits_scale", bits), ("random_bits_scale", drawn)):
        made |= {f"{name}{i}": np.uint8(x)[:, None] for i, x in enumerate(scales)}
    (tmp_path / "ten.json").write_text(json.dumps(spec))
    np.savez(tmp_path / "ten.npz", **made)
    results = parity.compare(tmp_path / "ten.json")
    assert {f"bits_scale{i}" for i in range(10)} < {result.name for result in results}
    assert all(result.errors.max() <= 1 for result in results)


def samples(seed, n=2048):
    """Bits of which many are rare, and come together."""
    rng = np.random.default_rng(seed)
    p = np.geomspace(1e-4, 0.5, 40)
    together = (rng.random((n, 1)) < 0.1) & (rng.random((n, 40)) < 0.5)
    return ((rng.random((n, 40)) < p) | together).astype(np.float64)


def test_rare_bits_that_come_together_are_within_their_standard_errors():
    for seed in range(1, 20, 2):
        golden, ours = samples(seed), samples(seed + 1)
        arrays = {"mean": golden.mean(0), "cov": np.cov(golden.T)}
        for values in ((0, 1), (-1, 1)):
            scale = values[1] - values[0]
            moved = {"mean": arrays["mean"] * scale + values[0], "cov": arrays["cov"] * scale**2}
            codes = ours * scale + values[0]
            mean, cov = parity.moments(codes, "mean", "cov", moved, values)
            assert mean.errors.max() <= 1
            assert cov.errors.max() <= 1
    # Bits as frequent as these that do not come together are found.
    alone = np.random.default_rng(0).permuted(ours, axis=0)
    assert list(parity.moments(alone, "mean", "cov", arrays, (0, 1)))[1].errors.max() > 1


def test_variance_of_a_covariance_is_that_of_many_draws():
    covs = np.stack([np.cov(samples(seed, 500).T) for seed in range(400)])
    many = samples(1000, 200_000)
    expected = parity.variance_of_cov(many.mean(0), np.cov(many.T), 500)
    pairs = np.triu_indices(40, 1)  # each bit with another
    ratio = covs.var(0)[pairs] / expected[pairs]
    assert 0.5 < ratio.min() < ratio.max() < 2
    gaussian = np.outer(*[np.diag(np.cov(many.T))] * 2) / 500  # what is far too small
    assert (covs.var(0)[pairs] / gaussian[pairs]).max() > 5


def test_a_chain_may_differ_by_what_it_magnifies_and_no_more():
    def chain(x, growth=20.0):  # of small differences
        return np.sin(growth * np.asarray(x, np.float64))

    inputs = (np.linspace(-1, 1, 100, dtype=np.float32),)
    last_digits = inputs[0] * np.float32(1 + 50 * np.finfo(np.float32).eps)
    for golden, holds in (
        (chain(*inputs), True),
        (chain(last_digits), True),
        (chain(*inputs, growth=20.01), False),
    ):
        result = parity.close_chain("out", chain, inputs, golden, 1e-6)
        assert (result.errors.max() <= 1) == holds
