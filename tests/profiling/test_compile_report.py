"""Kernels and bytes of compiled programs, against a program written out and a real one."""

import jax
import jax.numpy as jnp

from bitgen.profiling.compile_report import KernelStats, kernel_stats

PROGRAM = """
HloModule jit_f, is_scheduled=true

%sliced (p.1: f32[5,8,8], p.2: s32[], p.3: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[5,8,8]{2,1,0} parameter(0)
  %p.2 = s32[] parameter(1)
  %p.3 = f32[8,8]{1,0} parameter(2)
  %slice.1 = f32[1,8,8]{2,1,0} dynamic-slice(%p.1, %p.2), dynamic_slice_sizes={1,8,8}
  %flat.1 = f32[8,8]{1,0} bitcast(%slice.1)
  ROOT %add.1 = f32[8,8]{1,0} add(%flat.1, %p.3)
}

%stored (q.1: f32[5,8,8], q.2: f32[1,8,8], q.3: s32[]) -> f32[5,8,8] {
  %q.1 = f32[5,8,8]{2,1,0} parameter(0)
  %q.2 = f32[1,8,8]{2,1,0} parameter(1)
  %q.3 = s32[] parameter(2)
  ROOT %update.1 = f32[5,8,8]{2,1,0} dynamic-update-slice(%q.1, %q.2, %q.3)
}

%body (c.1: (s32[], f32[5,8,8], f32[8,8])) -> (s32[], f32[5,8,8], f32[8,8]) {
  %c.1 = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %all.1 = f32[5,8,8]{2,1,0} get-tuple-element(%c.1), index=1
  %x.1 = f32[8,8]{1,0} get-tuple-element(%c.1), index=2
  %fusion.1 = f32[8,8]{1,0} fusion(%all.1, %i.1, %x.1), kind=kLoop, calls=%sliced
  %dot.1 = f32[8,8]{1,0} dot(%fusion.1, %x.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %as.1 = f32[1,8,8]{2,1,0} bitcast(%dot.1)
  %fusion.2 = f32[5,8,8]{2,1,0} fusion(%all.1, %as.1, %i.1), kind=kLoop, calls=%stored
  ROOT %t.1 = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) tuple(%i.1, %fusion.2, %dot.1)
}

%test (d.1: (s32[], f32[5,8,8], f32[8,8])) -> pred[] {
  %d.1 = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %yes.1 = pred[] constant(true)
}

ENTRY %main (a.1: (s32[], f32[5,8,8], f32[8,8])) -> (s32[], f32[5,8,8], f32[8,8]) {
  %a.1 = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) parameter(0)
  ROOT %w.1 = (s32[], f32[5,8,8]{2,1,0}, f32[8,8]{1,0}) while(%a.1), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_a_written_program():
    matrix = 4 * 8 * 8
    sliced = 4 + 3 * matrix  # an index, a slice, x, the sum
    stored = 4 + 2 * matrix  # an index, what is stored, where it goes
    expected = KernelStats(kernels=5 * 3, products=5 * 3 * matrix, others=5 * (sliced + stored))
    assert kernel_stats(PROGRAM) == expected


def test_a_compiled_loop_moves_its_operands_at_each_turn():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    def moved(turns):
        arguments = jnp.ones((64, 64)), jnp.ones((turns, 64, 64))
        return kernel_stats(jax.jit(f).lower(*arguments).compile().as_text())

    few, many = moved(5), moved(50)
    assert many.products - few.products == 45 * 3 * 4 * 64 * 64
    assert many.kernels > few.kernels + 45
    assert many.others > few.others
