"""Bytes that compiled programs move and keep: no clock, so no noise.

On CPU programs always; on those for H200 and TPU where their compilers are
installed (`pip install -e '.[targets]'`, as in CI), without the devices.
"""

import functools
import itertools

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from benchmarks import layers, models, targets, traffic
from benchmarks.bytes import SHAPES, measure
import normkit as nk

pytestmark = pytest.mark.optimized
TPUS = 'v5e', 'v6e'


def on(target, *values):
  """A row of a parametrization."""
  reason = (
    f'no compiler for {target}: pip install -e ".[targets]"; '
    'tests/test_memory.py holds what is kept without it'
  )
  needed = pytest.mark.skipif(not targets.is_installed(target), reason=reason)
  return pytest.param(target, *values, marks=needed)


def on_both(*columns):
  """Each combination on H200, and on one of the TPUs, which take turns."""
  rows = []
  for row in itertools.product(*map(enumerate, columns)):
    places, values = zip(*row, strict=True)
    rows += [on(t, *values) for t in ('h200', TPUS[sum(places) % 2])]
  return rows


DEVICES = [on(target) for target in ('h200', *TPUS)]

PROGRAM = """HloModule jit_f

%fused (p0: f32[64,256], p1: f32[256]) -> f32[8,256] {
  %p0 = f32[64,256]{1,0} parameter(0)
  %p1 = f32[256]{0} parameter(1)
  %slice.1 = f32[8,256]{1,0} slice(%p0), slice={[0:64:8], [0:256]}
  %b = f32[8,256]{1,0} broadcast(%p1), dimensions={1}
  ROOT %add.1 = f32[8,256]{1,0} add(%slice.1, %b)
}

%body (s: (s32[], f32[8,256])) -> (s32[], f32[8,256]) {
  %s = (s32[], f32[8,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[8,256]{1,0} get-tuple-element(%s), index=1
  %neg = f32[8,256]{1,0} negate(%v)
  ROOT %t = (s32[], f32[8,256]{1,0}) tuple(%i, %neg)
}

%condition (s.1: (s32[], f32[8,256])) -> pred[] {
  %s.1 = (s32[], f32[8,256]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %bound = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x: f32[64,256], y: f32[256]) -> f32[8,256] {
  %x = f32[64,256]{1,0} parameter(0)
  %y = f32[256]{0} parameter(1)
  LINES
}
"""
BLOCK = 8 * 256 * 4
LINES = {
  'a slice counts as the slice': (
    'ROOT %f = f32[8,256]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused',
    2 * BLOCK + 256 * 4,
  ),
  'the same beside others': (
    '%st = ((f32[64,256]{1,0}, f32[256]{0}), f32[8,256]{1,0}, u32[]) '
    'fusion-start(%x, %y), kind=kLoop, calls=%fused\n  '
    'ROOT %f = f32[8,256]{1,0} fusion-done(%st)',
    2 * BLOCK + 256 * 4,
  ),
  'sectors of the fastest axis': (
    'ROOT %f = f32[64,16]{1,0} slice(%x), slice={[0:64], [0:256:16]}',
    64 * 16 * (32 + 4),
  ),
  'on chip': (
    'ROOT %c = f32[64,256]{1,0:T(8,128)S(1)} copy(%x)',
    64 * 256 * 4,
  ),
  'tiles are filled up': (
    'ROOT %s = bf16[3,100]{1,0:T(8,128)(2,1)} custom-call(), '
    'custom_call_target="f"',
    8 * 128 * 2,
  ),
  'loops count their trips': (
    '%i0 = s32[] constant(0)\n  %v0 = f32[8,256]{1,0} constant({...})\n  '
    '%t0 = (s32[], f32[8,256]{1,0}) tuple(%i0, %v0)\n  '
    'ROOT %w = (s32[], f32[8,256]{1,0}) while(%t0), condition=%condition, '
    'body=%body',
    5 * 2 * BLOCK,
  ),
  'an update in place': (
    '%new = f32[8,256]{1,0} constant({...})\n  %z = s32[] constant(0)\n  '
    'ROOT %u = f32[64,256]{1,0} dynamic-update-slice(%x, %new, %z, %z)',
    2 * BLOCK,
  ),
  'prefetches': (
    '%st = ((f32[64,256]{1,0}), f32[8,256]{1,0:S(1)}, s32[]{:S(2)}) '
    'slice-start(%x), slice={[0:8], [0:256]}\n  '
    'ROOT %d = f32[8,256]{1,0:S(1)} slice-done(%st)',
    BLOCK,
  ),
}


@pytest.mark.parametrize(('lines', 'moved'), LINES.values(), ids=LINES)
def test_counter(lines, moved):
  assert traffic.measure(PROGRAM.replace('LINES', lines)).bytes == moved


def test_counter_refuses_what_is_no_program():
  with pytest.raises(ValueError, match='ENTRY'):
    traffic.measure('module @jit_f { }')


def test_a_loop_without_bound_is_refused():
  lines = LINES['loops count their trips'][0]
  text = PROGRAM.replace('LINES', lines).replace('constant(5)', 'parameter(1)')
  with pytest.raises(ValueError, match='how often'):
    traffic.measure(text)


def test_counter_on_a_real_program():
  x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
  found = measure('cpu', lambda x: lax.scan(step, x, None, length=3)[0], (x,))
  n = 64 * 256 * 4
  assert 3 * 2 * n <= found.bytes <= 4.1 * 2 * n  # and a copy of x


def step(x, _):
  return jnp.sin(x), None


# Passes over x: forward, backward, and both in one program. Flax's, compiled
# alike, stand in README.md.
ROW, IMAGE = (2.05, 5.2, 7.3), (3.1, 5.2, 7.2)
LIMITS = {
  ('h200', norm): ROW if norm in layers.ROWS else IMAGE for norm in layers.NORMS
} | {(tpu, norm): IMAGE for tpu in TPUS for norm in layers.NORMS}


@pytest.mark.parametrize(
  ('target', 'norm', 'dtype'), on_both(layers.NORMS, layers.DTYPES)
)
def test_passes(target, norm, dtype):
  layer = layers.make('normkit', norm, SHAPES[norm], dtype)
  programs = layers.programs(layer)
  names = 'forward', 'backward', 'step'
  for name, limit in zip(names, LIMITS[target, norm], strict=True):
    found = measure(target, *programs[name])
    assert found.bytes / layer.bytes <= limit, name
    assert found.temporaries <= 0.1 * layer.bytes, name


FEW = (
  *itertools.product(
    ('GroupNorm', 'InstanceNorm'),
    [(16, 56, 56, 64), (64, 56, 56, 64), (16, 32, 32, 256), (16, 4096, 64)],
    [(3.2, 9.2)],
  ),
  ('BatchNorm', (4096, 512), (3.2, 9.2)),
  # Shorter lines, which would move more than what XLA writes out.
  ('GroupNorm', (16, 7, 7, 512), (3.75, 7.85)),
  ('InstanceNorm', (128, 8, 8, 64), (3.45, 7.6)),
  ('GroupNorm', (32, 14, 14, 256), (3.25, 7.25)),
)


@pytest.mark.parametrize(
  ('target', 'norm', 'shape', 'limits'), [on('h200', *row) for row in FEW]
)
def test_few_sets(target, norm, shape, limits):
  """Of those that fit in a GPU's cache x - pivot is not written out."""
  layer = layers.make('normkit', norm, shape, 'float32')
  programs = layers.programs(layer)
  for name, limit in zip(('forward', 'step'), limits, strict=True):
    assert measure(target, *programs[name]).bytes / layer.bytes <= limit, name


FORWARD_MODE = (
  ('LayerNorm', (2048, 1024), 6.1),
  ('GroupNorm', (16, 28, 28, 128), 7.1),
)


@pytest.mark.parametrize(
  ('target', 'norm', 'shape', 'limit'),
  [on('h200', *row) for row in FORWARD_MODE],
)
def test_forward_mode(target, norm, shape, limit):
  """No sum of x and its tangent waits for the mean."""
  layer = layers.make('normkit', norm, shape, 'bfloat16')

  def along(params, x, dx):
    return jax.jvp(lambda x: layer.apply(params, x), (x,), (dx,))

  arguments = layer.params, layer.x, layer.x
  assert measure(target, along, arguments).bytes / layer.bytes <= limit


@pytest.mark.parametrize('target', ['cpu', *DEVICES])
@pytest.mark.parametrize('dtype', layers.DTYPES)
@pytest.mark.parametrize('shape', [(2048, 512), (32, 64)], ids=str)
def test_vmap_over_single_rows(shape, dtype, target):
  """It moves what the same rows move at once, forward and backward."""

  def moved(change):
    def norm(x, scale, bias):
      return nk.layer_norm(x, scale, bias, dtype=dtype)

    def step(dy, *given):
      y, pull = jax.vjp(change(norm), *given)
      return y, pull(dy)

    x = jax.ShapeDtypeStruct(shape, dtype)
    param = jax.ShapeDtypeStruct(shape[1:], jnp.float32)
    return measure(target, step, (x, x, param, param)).bytes

  of_rows = moved(lambda norm: jax.vmap(norm, (0, None, None)))
  assert of_rows <= 1.01 * moved(lambda norm: norm)


@pytest.mark.parametrize('target', ['cpu', *DEVICES])
@pytest.mark.parametrize('norm', layers.NORMS)
def test_kept_by_the_compiled_forward(norm, target):
  """Besides y: x itself and the statistics, in the program's own results."""
  layer = layers.make('normkit', norm, SHAPES[norm], 'bfloat16')
  compiled = targets.compile_for(
    target, layers.pullback(layer), layer.params, layer.x
  )
  results = compiled.memory_analysis().output_size_in_bytes
  assert results <= 2.1 * layer.bytes


LAYERS, TOKENS, WIDTH = 12, 8192, 2048
UNIT = LAYERS * TOKENS * WIDTH * 2


@functools.cache
def temporaries(target, library, norm, policy):
  step = models.transformer_step(
    library, norm, TOKENS, WIDTH, LAYERS, policy=policy
  )
  return measure(target, *step).temporaries


KEPT = {'default': (None, 1.2), 'products': (nk.products_saveable, 0.2)}


@pytest.mark.parametrize(
  ('target', 'norm', 'keeps'),
  [
    *(on('h200', *row) for row in itertools.product(layers.ROWS, KEPT)),
    *(on('v5e', *row) for row in zip(layers.ROWS, KEPT, strict=True)),
  ],
)
def test_scan(target, norm, keeps):
  """What the norms of transformer blocks add to the temporaries of a step."""
  policy, limit = KEPT[keeps]
  without = temporaries(target, 'none', '', policy)
  found = temporaries(target, 'normkit', norm, policy)
  assert (found - without) / UNIT <= limit


@pytest.mark.parametrize('norm', layers.ROWS)
def test_scan_keeps(norm):
  """The same on the level of JAX: what the loop hands to its backward."""

  def kept(library, policy):
    gradient, given = models.transformer_step(
      library, norm, TOKENS, WIDTH, LAYERS, policy=policy
    )
    jaxpr = jax.make_jaxpr(gradient)(*given)
    loops = [e for e in jaxpr.eqns if e.primitive is lax.scan_p]
    return sum(
      v.aval.size * v.aval.dtype.itemsize
      for v in loops[0].outvars
      if v.aval.shape[:1] == (LAYERS,)
    )

  for policy, limit in (None, 1.1), (nk.products_saveable, 0.02):
    assert kept('normkit', policy) - kept('none', policy) <= limit * UNIT


@pytest.mark.parametrize('target', DEVICES)
def test_quantized_norms_write_no_wide_result(target):
  """In units of x in bfloat16; the norm and the rest apart: 4.5, 5.5 on TPU."""
  x = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16)
  size = x.size * x.dtype.itemsize
  step = jax.ShapeDtypeStruct((), jnp.float32)

  def by_given(x, step):
    return nk.quantized_rms_norm(x, quantization_scale=step)

  limits = (2.6, 1.6) if target == 'h200' else (3.6, 2.6)
  cases = (nk.quantized_rms_norm, (x,)), (by_given, (x, step))
  for (norm, args), limit in zip(cases, limits, strict=True):
    assert measure(target, norm, args).bytes < limit * size
