"""Runs one golden, the reference's inputs and outputs: `python tests/parity.py PATH/NAME.json`.

Prints the largest error of each array and exits 1 if one is beyond tolerance: atol = rtol = 2e-4,
or 2e-3 for `*_full`; Monte-Carlo statistics in standard errors. The weights are made from the
tensors' names (`synthetic.py`) and loaded through the conversion tables.

`--dtype=bfloat16` and `--steps=N`, of a generator's head, tell what these cost: they draw samples
alone, whose statistics are held against those of the original's own dtype and steps.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers.synthetic import synthetic_state_dict

from bitgen import build
from bitgen.convert import bigr, binary_ae, bitdance, bitvae, dcae, gfq_ae, patchgan
from bitgen.convert.rules import import_tensors
from bitgen.heads.bernoulli import BernoulliHead, chain_times, marginal
from bitgen.losses.adversarial import PatchDiscriminator
from bitgen.losses.lpips import lpips_distance, params_from_tensors
from bitgen.samplers import autoregressive, masked
from bitgen.samplers.autoregressive import AutoregressivePlan
from bitgen.samplers.images import image_keys
from bitgen.samplers.masked import MaskedPlan
from bitgen.tokenizers.multiscale import MultiScale, area_downsample
from bitgen.tokenizers.quantizers import normalized

Arrays = dict[str, np.ndarray]
# Last digits by which two float32 evaluations of a head differ: the goldens' `net_out` by up to 92.
ROUNDINGS = 100
# For what computes long, also where tests tell the compiler not to optimise.
OPTIMISED: Any = {"xla_backend_optimization_level": 3}


class Result(NamedTuple):
    """One array compared; `errors` is in units of what is tolerated."""

    name: str
    ours: np.ndarray
    golden: np.ndarray
    errors: np.ndarray
    unit: str


def close(name: str, ours: Any, golden: np.ndarray, tolerance: float) -> Result:
    """Compares values: |ours - golden| against tolerance * (1 + |golden|)."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    assert ours.shape == golden.shape, f"{name}: {ours.shape} against {golden.shape}"
    errors = np.abs(ours - golden) / (tolerance * (1 + np.abs(golden)))
    return Result(name, ours, golden, errors, f"of tolerance {tolerance:g}")


def close_chain(
    name: str, run: Callable[..., Any], inputs: tuple, golden: np.ndarray, tolerance: float
) -> Result:
    """Compares the end of a chain, which magnifies the rounding of each of its steps.

    What is tolerated beyond `tolerance` is ROUNDINGS times the largest change of the end when each
    number of the inputs changes by its last digit, up or down at random.
    """
    ours = np.asarray(run(*inputs), np.float64)
    rng, ulp = np.random.default_rng(0), np.finfo(np.float32).eps
    moved = 0.0
    for _ in range(4):
        other = [x * (1 + ulp * rng.choice(np.float32([-1, 1]), x.shape)) for x in inputs]
        moved = max(moved, np.abs(np.asarray(run(*other), np.float64) - ours).max())
    golden = golden.reshape(ours.shape).astype(np.float64)
    errors = np.abs(ours - golden) / (tolerance * (1 + np.abs(golden)) + ROUNDINGS * moved)
    unit = f"of tolerance {tolerance:g} and {ROUNDINGS} x {moved:.1e}"
    return Result(name, ours, golden, errors, unit)


def nchw(x: Any) -> np.ndarray:
    """[b, h, w, c] -> [b, c, h, w]."""
    return np.asarray(x).transpose(0, 3, 1, 2)


def nhwc(x: np.ndarray) -> np.ndarray:
    """[b, c, h, w] -> [b, h, w, c], float32."""
    return np.asarray(x, np.float32).transpose(0, 2, 3, 1)


def like(x: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Cuts [b, c, h, w] as a large golden is cut: its first channels, every so many pixels."""
    step = x.shape[2] // golden.shape[2]
    return x[:, : golden.shape[1], ::step, ::step]


def binary_ae_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """The binary autoencoder; its images are in [0, 1]."""
    hparams = binary_ae.hparams_from_reference(spec["hparams"])
    module = build.make_module("tokenizer", "binary_ae", hparams)
    state = synthetic_state_dict(spec)
    table = binary_ae.table(hparams, **binary_ae.wrapping({k: v.shape for k, v in state.items()}))
    params, _ = import_tensors(table, state, build.param_shapes(module))

    def apply(method, x):
        return jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))(params, x)

    images = nhwc(arrays["image"]) * 2 - 1
    hidden, probs = nchw(apply("hidden", images)), nchw(apply("probs", images))
    yield close("hidden", like(hidden, arrays["hidden"]), arrays["hidden"], tolerance)
    if hparams.get("signed"):
        probs = probs * 2 - 1  # the golden holds the activation, tanh
    yield close("code_prob", probs, arrays["code_prob"], tolerance)
    decoded = nchw((apply("decode", nhwc(arrays["bits_in"]) > 0.5) + 1) / 2)
    yield close("decoded", like(decoded, arrays["decoded"]), arrays["decoded"], tolerance)


def gfq_ae_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """BitDance's autoencoder; signs and indices are exact, entropies those of our hidden."""
    hparams = gfq_ae.hparams_from_reference(spec["hparams"])
    module = build.make_module("tokenizer", "gfq_ae", hparams)
    params, _ = import_tensors(
        gfq_ae.table(hparams), synthetic_state_dict(spec), build.param_shapes(module)
    )

    def apply(method, x):
        return jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))(params, x)

    hidden = apply("hidden", nhwc(arrays["image"]))
    yield close("hidden", nchw(hidden), arrays["hidden"], tolerance)
    bits = np.asarray(module.quantizer.bits(hidden))
    yield close("quantized", nchw(bits) * 2.0 - 1, arrays["quantized"], 1e-6)
    grouped = bits.reshape(-1, module.groups, module.bits // module.groups)
    indices = (grouped << np.arange(grouped.shape[-1])).sum(-1)  # the first bit is the lowest
    yield close("indices", indices.T, arrays["indices"], 1e-9)
    decoded = nchw(apply("decode", nhwc(arrays["codes_in"]) > 0))
    yield close("decoded", like(decoded, arrays["decoded"]), arrays["decoded"], tolerance)
    sample, batch = module.quantizer.entropies(hidden)
    yield close("per_sample_entropy", sample, arrays["per_sample_entropy"], tolerance)
    yield close("codebook_entropy", batch, arrays["codebook_entropy"], tolerance)
    loss = module.quantizer(hidden).losses["entropy"]
    yield close("entropy_aux_loss", loss, arrays["entropy_aux_loss"], tolerance)


def bitvae_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """BitVAE; bits are exact where the reference's value is 1e-4 or more from the sign change."""
    hparams = bitvae.hparams_from_reference(spec["hparams"])
    module = build.make_module("tokenizer", "bitvae", hparams)
    params, _ = import_tensors(
        bitvae.table(hparams), synthetic_state_dict(spec), build.param_shapes(module)
    )

    def apply(method, x):
        return jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))(params, x)

    def golden_bits(prefix):
        names = (f"{prefix}{i}" for i in range(len(spec["hparams"]["scale_schedule"])))
        return {name: arrays[name][:, 0] > 0 for name in names}

    images = nhwc(arrays["image"])
    hidden, bits = apply("hidden", images), apply("encode", images)
    yield close("hidden", nchw(hidden), arrays["hidden"], tolerance)
    coarser = ()
    for ours, (name, golden) in zip(bits, golden_bits("bits_scale").items(), strict=True):
        left = hidden - MultiScale().codes(coarser, hidden.shape[1:3])
        unsure = np.abs(normalized(area_downsample(left, golden.shape[1:3]))) < 1e-4
        errors = 2.0 * ((np.asarray(ours) != golden) & ~unsure)
        yield Result(name, np.asarray(ours, float), golden.astype(float), errors, "of no bit")
        coarser = (*coarser, golden)
    yield close("quantized", nchw(apply("codes", bits)), arrays["quantized"], tolerance)
    images = np.clip(nchw(apply("decode", bits)), -1, 1)
    yield close("reconstruction", images, arrays["reconstruction"], tolerance)
    if "random_bits_decoded" in arrays:
        bits = tuple(golden_bits("random_bits_scale").values())
        codes = nchw(apply("codes", bits))[:, :, None]
        name = "random_bits_summed_codes"
        yield close(name, codes, arrays[name], tolerance)
        images = np.clip(nchw(apply("decode", bits)), -1, 1)
        yield close("random_bits_decoded", images, arrays["random_bits_decoded"], tolerance)


def dcae_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """DC-AE in evaluation mode."""
    hparams = dcae.hparams_from_reference(spec["hparams"])
    hparams["image_size"] = arrays["image"].shape[-1]
    module = build.make_module("tokenizer", "dcae", hparams)
    params, _ = import_tensors(
        dcae.table(hparams), synthetic_state_dict(spec), build.param_shapes(module)
    )

    def apply(method, x):
        return jax.jit(lambda p, x: module.apply({"params": p}, x, method=method))(params, x)

    latents = nchw(apply("encode", nhwc(arrays["image"])))
    yield close("latent", latents, arrays["latent"], tolerance)
    decoded = nchw(apply("decode", nhwc(arrays["latent_in"])))
    yield close("decoded", decoded, arrays["decoded"], tolerance)


def patchgan_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """The discriminator in evaluation mode, fed as the original is."""
    hparams = {"width": spec["hparams"]["ndf"], "layers": spec["hparams"]["n_layers"]}
    module = PatchDiscriminator(**hparams, pixel_range=(-1.0, 1.0))
    images = nhwc(arrays["image"])
    target = jax.eval_shape(lambda: module.init(jax.random.key(0), images))
    variables, _ = import_tensors(patchgan.table(hparams, ""), synthetic_state_dict(spec), target)
    logits = module.apply(variables, images)
    yield close("logits_eval", nchw(logits), arrays["logits_eval"], tolerance)


def lpips_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """The perceptual distance; the golden's channel weights are absolute values."""
    state = synthetic_state_dict(spec)
    state = {name: np.abs(x) if name.startswith("lin") else x for name, x in state.items()}
    params = params_from_tensors(list(state.items()), "golden")
    ours = lpips_distance(params, nhwc(arrays["image0"]), nhwc(arrays["image1"]))
    yield close("distance", ours, arrays["distance"], tolerance)


def generator(spec: dict, source: Any) -> tuple[Any, Any]:
    """-> a golden's module and its parameters, by the conversion's module of its family."""
    hparams = source.hparams_from_reference(spec["hparams"])
    module = build.make_module("generator", spec["family"], hparams)
    shapes = build.param_shapes(module)
    return module, import_tensors(source.table(hparams), synthetic_state_dict(spec), shapes)[0]


def bigr_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """BiGR: transformer, head, loss, chain of the head, and statistics of the whole sampler."""
    module, params = generator(spec, bigr)

    def apply(*args, method):
        return module.apply({"params": params}, *args, method=method)

    bits, labels = jnp.asarray(arrays["bits"]) > 0.5, jnp.asarray(arrays["label"], jnp.int32)
    mask = jnp.asarray(arrays["mask"])
    classes = apply(labels, method="embed_labels")
    cond = apply(bits, mask, classes, method="hidden")
    yield close("denoiser_cond", cond, arrays["denoiser_cond"], tolerance)
    name = "denoiser_cond_interpolated_30_70_with_next_label"
    other = apply((labels + 1) % module.num_classes, method="embed_labels")
    cond = apply(bits, mask, 0.3 * classes + 0.7 * other, method="hidden")
    yield close(name, cond, arrays[name], tolerance)
    name = "features_per_layer_full_image"
    yield close(name, apply(bits, labels, method="features"), arrays[name], tolerance)
    head = BernoulliHead(
        module.bits,
        module.denoiser_width,
        module.denoiser_layers,
        steps=module.diffusion_steps,
        predict_flip=module.predict_flip,
    )
    yield from head_results(head, params["denoiser"], arrays, tolerance)
    yield from bigr_statistics(module, params, spec, arrays)


def head_results(
    head: BernoulliHead, params: Any, arrays: Arrays, tolerance: float
) -> Iterator[Result]:
    """The Bernoulli head alone."""
    cond = jnp.asarray(arrays["denoiser_c"])
    logits = head.apply(
        {"params": params},
        jnp.asarray(arrays["denoiser_x_t"]),
        jnp.asarray(arrays["denoiser_t0"], jnp.int32),
        cond,
        method="logits",
    )
    yield close("denoiser_logits", logits, arrays["denoiser_logits"], tolerance)
    steps = np.arange(head.steps + 1)
    yield close("sched_k", 1 - 2 * marginal(0.0, steps, head.steps), arrays["sched_k"], tolerance)
    yield close("sched_b", marginal(0.0, steps, head.steps), arrays["sched_b"], tolerance)
    keep = np.hstack([1, (head.steps - steps[1:]) / (head.steps - steps[:-1])])
    yield close("sched_beta", keep, arrays["sched_beta"], tolerance)
    for name in arrays:
        if settings := re.fullmatch(r"loss_all_focal(.+)_alpha(.+)_aux(.+)", name):
            focal, alpha, aux = map(float, settings.groups())
            losses, metrics = head.clone(focal=focal, alpha=alpha, vlb_weight=aux).apply(
                {"params": params},
                jnp.asarray(arrays["train_x0"]),
                jnp.asarray(arrays["train_t"], jnp.int32),
                jnp.asarray(arrays["train_uniform"]),
                cond,
                method="loss_given",
            )
            yield close(name, losses, arrays[name], tolerance)
            name = name.replace("loss_all", "bce_all")
            yield close(name, metrics["bce"], arrays[name], tolerance)
    conds = jnp.asarray(arrays["chain_cond_then_uncond"])[:, None]
    uniforms = jnp.asarray(arrays["chain_uniforms"])[:, :, None]
    half, chain = len(conds) // 2, len(uniforms) - 1
    probs = head.apply(
        {"params": params},
        conds[:half],
        conds[half:],
        lambda i: uniforms[i],
        chain,
        float(arrays["chain_cfg"]),
        float(arrays["chain_temp"]),
        method="sample_given",
    )
    yield close("chain_final_prob", probs[:, 0], arrays["chain_final_prob"], tolerance)
    name = "chain_timesteps_1based"
    yield close(name, chain_times(head.steps, chain), arrays[name], 0.5)


def bigr_statistics(
    module: Any, params: Any, spec: dict, arrays: Arrays, steps: int | None = None
) -> Iterator[Result]:
    """Mean and covariance of the bits of many samples, in standard errors of the difference.

    `steps` of the head, in place of the golden's.
    """
    pattern = r"sample_bit_mean_(\d+)_label(\d+)_iter(\d+)_cfg([\d.]+)(\D+)_gumbel([\d.]+)(\D+)"
    name, found = next((n, m) for n in arrays if (m := re.fullmatch(pattern, n)))
    count, label, iterations, cfg, cfg_schedule, gumbel, gumbel_schedule = found.groups()
    plan = MaskedPlan(
        iterations=int(iterations),
        guidance=float(cfg),
        guidance_schedule=cfg_schedule,
        gumbel=float(gumbel),
        gumbel_schedule=gumbel_schedule,
        denoiser_steps=steps or spec["hparams"]["infer_steps"],
    )
    bits = draw(module, params, masked.sample_bits, int(label), int(count), plan)
    bits = bits.reshape(len(bits), module.tokens, module.bits)
    yield from moments(bits, name, "sample_bit_cov", arrays, (0, 1))


def draw(module: Any, params: Any, sample_bits: Any, label: int, n: int, plan: Any) -> np.ndarray:
    """-> bits of n images of a class, float64."""
    sample = jax.jit(
        lambda p, k: sample_bits(module, p, jnp.full((n,), label), k, plan),
        compiler_options=OPTIMISED,
    )
    return np.asarray(sample(params, image_keys(0, np.arange(n))), np.float64)


def bitdance_results(spec: dict, arrays: Arrays, tolerance: float) -> Iterator[Result]:
    """BitDance: transformer, head, loss, flow, and statistics of the whole sampler."""
    module, params = generator(spec, bitdance)
    groups = (-1, module.together, module.token_bits)

    def apply(*args, method):
        return module.apply({"params": params}, *args, method=method)

    def like(ours, name):
        """One token at a time, the original has no axis for those that are drawn together."""
        return close(name, np.asarray(ours).reshape(arrays[name].shape), arrays[name], tolerance)

    bits, labels = jnp.asarray(nhwc(arrays["codes"])) > 0, jnp.asarray(arrays["label"], jnp.int32)
    yield like(apply(bits, labels, method="hidden"), "head_cond")
    yield like(module.order(bits) * 2.0 - 1, "head_target")

    def grouped(name, last=module.token_bits):
        return jnp.asarray(arrays[name]).reshape(-1, module.together, last)

    def head(*args, method):
        return apply(*args, method=lambda m, *a: getattr(m.head, method)(*a))

    z, cond = grouped("net_z"), grouped("net_c", module.width)
    yield like(head(z, jnp.asarray(arrays["net_t"]), cond, method="predict"), "net_out")
    losses, _ = head(
        grouped("loss_x"),
        jnp.asarray(arrays["loss_normal_for_t"]),
        grouped("loss_noise"),
        head(cond, method="embed_cond"),
        method="loss_given",
    )
    yield like(losses.mean(), "loss")
    conds = grouped("em_cond_then_uncond", module.width)
    half, steps = len(conds) // 2, int(arrays["em_steps"])
    noises = jnp.asarray(arrays["em_noises"]).reshape(steps, half, *groups[1:])
    noises = jnp.concatenate([grouped("em_x_init")[None], noises])

    @jax.jit
    def chain(conds, noises):
        scale = float(arrays["em_cfg"])
        out = head(
            conds[:half], conds[half:], lambda i: noises[i], steps, scale, method="sample_given"
        )
        return jnp.concatenate([out, out])

    yield close_chain("em_out", chain, (conds, noises), arrays["em_out"], tolerance)
    yield from bitdance_statistics(module, params, spec, arrays)


def bitdance_statistics(
    module: Any, params: Any, spec: dict, arrays: Arrays, steps: int | None = None
) -> Iterator[Result]:
    """The same of BitDance."""
    del spec  # the array's name has the steps
    pattern = r"sample_code_mean_(\d+)_label(\d+)_steps(\d+)_cfg([\d.]+)(\D+)"
    name, found = next((n, m) for n in arrays if (m := re.fullmatch(pattern, n)))
    count, label, its_steps, cfg, schedule = found.groups()
    plan = AutoregressivePlan(float(cfg), schedule, head_steps=steps or int(its_steps))
    bits = draw(module, params, autoregressive.sample_bits, int(label), int(count), plan)
    yield from moments(nchw(bits) * 2 - 1, name, "sample_code_cov_first64", arrays, (-1, 1))


def moments(
    codes: np.ndarray, mean_name: str, cov_name: str, arrays: Arrays, values: tuple[int, int]
) -> Iterator[Result]:
    """Mean and covariance of samples of two values, in standard errors of the difference.

    Both sets of samples have their own variances and fourth moments, which means and covariances
    of two-valued numbers determine. One event more in all samples is no error: the variance of a
    sum has at least the square of what one event changes.
    """
    n, (low, high) = len(codes), values
    width = high - low
    ours, golden = codes.mean(0), arrays[mean_name].astype(np.float64)

    def variance_of_mean(mean):
        return np.maximum((mean - low) * (high - mean) / n, (width / n) ** 2)

    error = np.sqrt(variance_of_mean(ours) + variance_of_mean(golden))
    errors = np.abs(ours - golden) / error / 5
    yield Result(mean_name, ours, golden, errors, "of 5 standard errors")

    golden_cov = arrays[cov_name].astype(np.float64)
    first = len(golden_cov)
    cov = np.cov(codes.reshape(n, -1)[:, :first].T)
    sets = ((ours, cov), (golden, golden_cov))
    variance = sum(
        np.maximum(
            variance_of_cov((mean.reshape(-1)[:first] - low) / width, c / width**2, n), n**-2
        )
        for mean, c in sets
    )
    # Thousands of entries: one more standard error keeps chance out.
    errors = np.abs(cov - golden_cov) / np.sqrt(variance) / width**2 / 6
    yield Result(cov_name, cov, golden_cov, errors, "of 6 standard errors")


def variance_of_cov(p: np.ndarray, cov: np.ndarray, n: int) -> np.ndarray:
    """-> the variance of the covariances [k, k] of n samples of bits with means p [k].

    It is (E[(x - p)^2 (y - q)^2] - cov^2) / n, where the fourth moment is a sum over the four
    values of a pair of bits.
    """
    q = p[:, None]
    both = np.clip(cov + q * p, 0, 1)
    one, other = np.clip(q - both, 0, 1), np.clip(p - both, 0, 1)
    neither = np.clip(1 - both - one - other, 0, 1)
    x, y = (1 - q) ** 2, (1 - p) ** 2
    fourth = both * x * y + one * x * p**2 + other * q**2 * y + neither * q**2 * p**2
    return (fourth - cov**2) / n


# Family -> (what compares it, pattern of the arrays that are only inputs).
FAMILIES: dict[str, tuple[Callable[[dict, Arrays, float], Iterator[Result]], str]] = {
    "binary_ae": (binary_ae_results, "image|bits_in"),
    "gfq_ae": (gfq_ae_results, "image|codes_in"),
    "bitvae": (bitvae_results, r"image|random_bits_scale\d+"),
    "dcae": (dcae_results, "image|latent_in"),
    "patchgan_discriminator": (patchgan_results, "image"),
    "lpips": (lpips_results, "image0|image1"),
    "bigr": (
        bigr_results,
        "bits|label|mask|denoiser_(x_t|t0|c)|train_(x0|t|uniform)"
        "|chain_(cond_then_uncond|uniforms|temp|cfg)",
    ),
    "bitdance": (
        bitdance_results,
        "codes|label|net_[ztc]|loss_(x|normal_for_t|noise)"
        "|em_(cond_then_uncond|x_init|noises|steps|cfg)",
    ),
}


def read(path: Path) -> tuple[dict, Arrays]:
    """-> what a golden is of, and its arrays."""
    spec = json.loads(path.read_text())
    with np.load(path.with_suffix(".npz")) as file:
        arrays = dict(file)
    if spec["family"] not in FAMILIES:
        raise ValueError(f"{path}: family {spec['family']!r}, have {sorted(FAMILIES)}")
    return spec, arrays


def compare(path: str | Path) -> list[Result]:
    """Returns every output array of a golden compared; raises ValueError if one is left out."""
    path = Path(path)
    spec, arrays = read(path)
    results, inputs = FAMILIES[spec["family"]]
    found = list(results(spec, arrays, 2e-3 if path.stem.endswith("_full") else 2e-4))
    compared = {result.name for result in found}
    left_out = {name for name in arrays if not re.fullmatch(inputs, name)} - compared
    if left_out:
        raise ValueError(f"{path}: nothing compares {sorted(left_out)}")
    return found


def compare_samples(path: Path, dtype: str, steps: int | None) -> list[Result]:
    """Returns the statistics of samples drawn in another dtype or in fewer steps of the head."""
    spec, arrays = read(path)
    sources = {"bigr": (bigr, bigr_statistics), "bitdance": (bitdance, bitdance_statistics)}
    if spec["family"] not in sources:
        raise ValueError(f"{path}: a {spec['family']} draws no samples, {sorted(sources)} do")
    source, statistics = sources[spec["family"]]
    module, params = generator(spec, source)
    return list(statistics(module.clone(dtype=build.DTYPES[dtype]), params, spec, arrays, steps))


def main(argv: list[str]) -> int:
    """Prints a line for each array; returns 1 if one is beyond tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("golden", type=Path, help="PATH/NAME.json, beside its NAME.npz")
    parser.add_argument("--dtype", choices=build.DTYPES)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args(argv[1:])
    failed = False
    if options.dtype or options.steps:
        results = compare_samples(options.golden, options.dtype or "float32", options.steps)
    else:
        results = compare(options.golden)
    for r in results:
        worst = r.errors.max() if r.errors.size else 0.0
        beyond = not worst <= 1
        failed |= beyond
        error = np.abs(r.ours - r.golden).max()
        verdict = "FAILED" if beyond else "ok"
        print(f"{verdict:6} {r.name}: largest error {error:.3g}, {worst:.3f} {r.unit}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
