"""The samplers: what must hold of each of them whatever the weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from jax.sharding import PartitionSpec as P

from bitgen.errors import UserError
from bitgen.generators.bigr import BiGR
from bitgen.generators.bitdance import BitDance
from bitgen.runtime.mesh import make_mesh
from bitgen.samplers.autoregressive import AutoregressivePlan
from bitgen.samplers.images import image_keys, sampler_of
from bitgen.samplers.masked import MaskedPlan

MASKED = MaskedPlan(iterations=5, guidance=2.0, gumbel=0.5, denoiser_steps=4, segments=2)
AUTOREGRESSIVE = AutoregressivePlan(guidance=2.0, head_steps=3, segments=2)
PARALLEL = (1, 4, 16)
CASES = {"bigr": (BiGR(**small.GENERATOR), MASKED)} | {
    f"bitdance {p}": (BitDance(**{**small.BITDANCE, "together": p}), AUTOREGRESSIVE)
    for p in PARALLEL
}


class Case:
    """A generator with random parameters, and draws of its sampler."""

    def __init__(self, name):
        self.generator, self.plan = CASES[name]
        # Larger parameters saturate the flow.
        self.params = jax.tree.map(lambda x: x / 2, small.random_params(self.generator))
        self.sample = sampler_of(self.generator).sample_bits
        self.jitted = jax.jit(self.sample, static_argnums=(0, 4))

    def draw(self, labels, indices, **changes):
        plan = dataclasses.replace(self.plan, **changes)
        keys = image_keys(7, np.asarray(indices))
        labels = jnp.asarray(labels)
        return np.asarray(self.jitted(self.generator, self.params, labels, keys, plan))


case_of = functools.cache(Case)
each_sampler = pytest.mark.parametrize("case", ["bigr", "bitdance 4"], indirect=True)


@pytest.fixture
def case(request):
    return case_of(request.param)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_an_image_does_not_depend_on_its_batch(case):
    whole = case.draw([0, 1, 2, 3], [0, 1, 2, 3])
    parts = [case.draw([label], [label]) for label in range(4)]
    assert len({part.tobytes() for part in parts}) == 4
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole[0] != case.draw([0], [5])[0]).any()


@each_sampler
def test_an_image_does_not_depend_on_the_mesh(case):
    labels, keys = jnp.arange(8) % 5, image_keys(7, np.arange(8))

    def on(devices):
        program = jax.shard_map(
            lambda p, c, k: case.sample(case.generator, p, c, k, case.plan),
            mesh=make_mesh(devices=jax.devices()[:devices]),
            in_specs=(P(), P("data"), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )
        return jax.jit(program)(case.params, labels, keys)

    np.testing.assert_array_equal(on(1), on(8))


@each_sampler
def test_guidance_of_1_equals_no_guidance(case):
    # Just above 1 both halves are computed, and must cancel.
    plain, guided, strong = (case.draw([1, 2], [0, 1], guidance=g) for g in (1.0, 1 + 1e-7, 30.0))
    np.testing.assert_array_equal(plain, guided)
    assert (plain != strong).any()


@each_sampler
def test_unguided_sampling_runs_half_a_batch(case):
    def flops(guidance):
        plan = dataclasses.replace(case.plan, guidance=guidance)
        args = case.params, jnp.zeros(2, jnp.int32), image_keys(0, np.arange(2)), plan
        return case.jitted.lower(case.generator, *args).compile().cost_analysis()["flops"]

    assert flops(1.0) < 0.6 * flops(2.0)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bigr", {"guidance_schedule": "sideways"}, "unknown guidance schedule 'sideways'"),
        ("bigr", {"gumbel_schedule": "sideways"}, "unknown Gumbel schedule 'sideways'"),
        ("bigr", {"order": "sideways"}, "unknown order 'sideways'"),
        ("bigr", {"denoiser_steps": 17}, "from 1 to 8, got 17"),
        ("bitdance 16", {"head_steps": 0}, "at least one step, got 0"),
        ("bitdance 16", {"segments": 0}, "at least one segment, got 0"),
        ("bitdance 16", {"guidance_schedule": "cosine"}, "unknown guidance schedule 'cosine'"),
    ],
)
def test_settings_that_make_no_sampler_are_named(name, changes, message):
    with pytest.raises(UserError, match=message):
        case_of(name).draw([0], [0], **changes)
