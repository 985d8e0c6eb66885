"""The parts of the accelerator's run, in the order of worth.

What a round holds ready at once has to fit the device's memory: a step of BiGR-XL takes 44 GiB.
"""

from functools import partial

from . import exactness, originals, profiles, samplers, training
from .part import Part

# Without graphs of kernels (XLA's command buffers), whose kernels a profile does not tell apart.
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
GENERATORS = ("bigr_L_d24", "bitdance_B_1x", "bitdance_B_16x")
TOKENIZERS = ("bigr_bae_d24", "bitdance_ae_d16c32")
# Row of configs/*_released.py -> images at once.
BATCHES = {
    "bigr_L_d24": (1, 8, 64),
    "bitdance_B_1x": (1, 32, 256),
    "bitdance_B_16x": (1, 32, 256),
    "bigr_XL_d24": (1, 8, 32),
    "bitdance_L_1x": (1, 32, 256),
}
# Config -> images of a step; True where its layers are also unrolled.
STEPS = {
    "bigr:XL": (64, True),
    "bitdance:L_1x": (64, True),
    "binary_ae:d24": (16, False),
    "bitvae:d16_stage2": (16, False),
    "dcae:f32c32": (16, False),
    "gfq_ae": (16, False),
}


def rounds(rehearse: bool) -> list[list[Part]]:
    """Returns the rounds; a rehearsal has a part of each kind."""
    exact = [
        Part("exact-goldens", "the reference's outputs, float32", exactness.goldens),
        Part("exact-attention", "cuDNN's attention against XLA's", exactness.attention),
        *(
            Part(
                f"exact-{name}", "a sampler at real size, finite", partial(exactness.sampler, name)
            )
            for name in ("bigr_L_d24", "bitdance_B_16x")
        ),
    ]
    peaks = Part("peaks", "matrix products and copies", samplers.peaks, measure=30)

    def beside(name: str) -> Part:
        run = partial(originals.beside, name)
        return Part(f"original-{name}", "the original beside bitgen", run, 200, 60)

    def sample(name: str) -> Part:
        run = partial(samplers.sampler, name, BATCHES[name])
        return Part(f"sample-{name}", "images from labels, growing batches", run)

    def step(name: str) -> Part:
        run = partial(training.step, name, *STEPS[name])
        return Part(f"train-{name.replace(':', '_')}", "a training step, data from files", run)

    def profile_sampler(name: str) -> Part:
        run = partial(profiles.sampler, name)
        return Part(f"profile-{name}", "a sampler's longest kernels", run, flags=NO_GRAPHS)

    def profile_step(name: str) -> Part:
        run = partial(profiles.step, name, *STEPS[name])
        name = f"profile-{name.replace(':', '_')}"
        return Part(name, "a training step's longest kernels", run, flags=NO_GRAPHS)

    if rehearse:
        return [
            [*exact[:3], peaks, beside("bitdance_B_16x")],
            [sample("bitdance_B_16x"), step("bigr:XL"), step("binary_ae:d24")],
            [profile_sampler("bigr_L_d24"), profile_step("bitdance:L_1x")],
        ]
    large, small = list(STEPS)[:2], list(STEPS)[2:]
    return [
        [*exact, peaks, beside("bigr_L_d24"), beside("bitdance_B_16x")],
        [*map(sample, GENERATORS), *map(step, large)],
        [beside("bitdance_B_1x"), *map(profile_sampler, GENERATORS), *map(profile_step, large)],
        [*map(sample, list(BATCHES)[3:]), *map(step, small), *map(beside, TOKENIZERS)],
    ]
