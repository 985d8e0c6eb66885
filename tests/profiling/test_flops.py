"""Counted operations against known numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bitgen.profiling.flops import count_flops


def flops(f, *args):
    return count_flops(jax.jit(f).trace(*args).jaxpr)


def test_products_and_their_gradient():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 4))
    assert flops(jnp.matmul, x, w) == 2 * 8 * 16 * 4
    loss = jax.grad(lambda w, x: jnp.sum((x @ w) ** 2))
    assert flops(loss, w, x) == 2 * (2 * 8 * 16 * 4)
    assert flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((3, 2, 5)), jnp.ones((3, 5, 7))
    ) == (2 * 3 * 2 * 5 * 7)


def test_a_loop_counts_as_often_as_it_runs():
    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))

    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    assert flops(f, x, w) == 5 * 2 * 8 * 16 * 16
    assert flops(jax.checkpoint(f), x, w) == 5 * 2 * 8 * 16 * 16
    gradient = jax.grad(lambda w, x: jnp.sum(f(x, w)))
    assert flops(gradient, w, x) == 3 * 5 * 2 * 8 * 16 * 16


def test_fused_attention_counts_as_its_products():
    fused = {name: core.Primitive(f"dot_product_attention_{name}") for name in ("fwd", "bwd_x")}
    for primitive in fused.values():
        primitive.def_abstract_eval(lambda q, k, v: q)
    q, k = jnp.ones((2, 6, 3, 8)), jnp.ones((2, 10, 3, 8))
    products = flops(
        lambda q, k: jnp.einsum("bqhc,bkhc->bhqk", q, k) @ jnp.ones((2, 3, 10, 8)), q, k
    )
    for name, times in (("fwd", 1), ("bwd_x", 2)):
        jaxpr = jax.make_jaxpr(fused[name].bind)(q, k, k)
        assert count_flops(jaxpr) == times * products


def test_convolutions_agree_with_the_compiler():
    x, w = jnp.ones((2, 16, 16, 8)), jnp.ones((3, 3, 8, 4))

    def conv(x, w, stride=1):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    for stride, size in ((1, 14), (2, 7)):
        assert flops(lambda x, w, s=stride: conv(x, w, s), x, w) == 2 * 2 * size * size * 9 * 8 * 4
    compiled = jax.jit(conv).lower(x, w).compile().cost_analysis()["flops"]
    np.testing.assert_allclose(flops(conv, x, w), compiled, rtol=1e-3)


def test_the_larger_branch_counts():
    x, w = jnp.ones((8, 16)), jnp.ones((16, 16))

    def f(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

    assert flops(f, x, w) == 2 * (2 * 8 * 16 * 16)
