"""Norms by Mosaic GPU: interpreted on the CPU, compiled for H200 and B200.

Interpreted, shared memory, barriers and copies run as on the device, and the
numbers are held to float64; compiled, programs are held to the bytes that they
may move, NVIDIA's assembler says what registers they take, and its input how
they load and store.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re

from cases import CASES, draw
import chex
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
from test_conformance import (
  assert_close,
  assert_gradients,
  expected,
  inputs,
  train_and_eval,
)
from test_kernels import (
  DTYPES,
  Rows,
  assert_norm,
  assert_right,
  group_norm_of,
  norm_of,
)
from tiers import second_tier, thinned

from benchmarks import layers, models, targets, traffic
from benchmarks.registers import (
  CHIPS,
  COUNT,
  GROUPS,
  HEAD_SIZES,
  KINDS,
  SIZES,
  is_taken,
  report,
)
import normkit as nk
from normkit.kernels import (
  activations,
  cases,
  configs,
  dispatch,
  mosaic_gpu,
)
from normkit.kernels.rows import Gate, Spec

NAME = 'mosaic_gpu'


@pytest.mark.parametrize(
  ('shape', 'center', 'dtype'),
  [
    ((5, 100), True, 'float32'),
    ((3, 2, 1300), False, 'bfloat16'),
    *(
      second_tier(*row.values)
      for row in thinned(
        [(1,), (40, 7), (17, 768), (3, 1024), (2, 5000)],
        [True, False],
        DTYPES,
        every=1000,
        keep=3,  # each shape with both, in two of the dtypes
      )
    ),
  ],
  ids=str,
)
def test_values_and_gradients(interpreted, shape, center, dtype):
  """Rows of a part of a warp, of a warp, of one warpgroup and of several."""
  del interpreted
  reference = functools.partial(Rows, center=center)
  assert_norm(norm_of(center, NAME), reference, shape, dtype)


@pytest.mark.parametrize(
  ('case', 'dtype'),
  [
    (((3, 7, 5, 12), 2), 'float32'),
    second_tier(((2, 6), 3), 'float16'),
    second_tier(((1, 40, 13, 10), 2), 'bfloat16'),
    second_tier(((2, 33, 7), 7), 'bfloat16'),
    second_tier(((2, 200, 16), 1), 'float32'),
  ],
  ids=str,
)
def test_groups(interpreted, case, dtype):
  """Several groups in a tile and one; channels and places of odd numbers."""
  del interpreted
  shape, groups = case
  reference = functools.partial(Rows, center=True, groups=groups)
  assert_norm(group_norm_of(groups, NAME), reference, shape, dtype)


@pytest.mark.second_tier
@pytest.mark.parametrize('center', [True, False])
def test_statistics_of_groups(interpreted, center):
  """Far from zero too; without scale and bias."""
  del interpreted
  x = 1e3 * center + draw((3, 5, 5, 24))
  spec = Spec(1e-6, center, x.dtype, groups=4)
  found = mosaic_gpu.forward({'x': x}, spec, True, interpret=True)
  split = np.asarray(x, np.float64).reshape(3, 25, 4, 6)
  mean = split.mean((1, 3), keepdims=True) * center
  sets = 3, 1, 1, 4
  if center:
    actual = np.asarray(found['pivot'], np.float64) + found['offset']
    assert_right(actual, mean.reshape(sets), 1e-7)
  var = ((split - mean) ** 2).mean((1, 3))
  assert_right(found['var'], var.reshape(sets), 1e-6)
  assert_right(found['y'], Rows(x, 1.0, 0.0, center, 4).y, 1e-6)


# Scale and bias of an example, or of a head: x's shape and theirs.
SETS = [
  ((3, 37, 64), (3, 1, 64)),
  ((4, 2, 1300), (2, 1300)),
  ((3, 2, 2, 1300), (3, 1, 1, 1300)),
  ((5, 3, 4, 70), (4, 70)),
]


@dataclasses.dataclass
class SomeRows(Rows):
  """Of which some share scale and bias."""

  def gradients(self, dy):
    g, shape = np.asarray(dy, np.float64), np.shape(self.scale)
    rank = (1,) * (g.ndim - len(shape)) + shape
    axes = tuple(a for a, n in enumerate(rank) if n == 1 < g.shape[a])
    dx, *_ = super().gradients(dy)
    each = g * self.normalized, g
    return dx, *(a.sum(axes, keepdims=True).reshape(shape) for a in each)


def some_inputs(shape, of, dtype='float32'):
  x, dy = draw(shape, dtype), draw(shape, dtype, seed=1)
  return x, draw(of, seed=2), draw(of, seed=3), dy


def of_some(x, scale, center=True, name=NAME):
  """`norm_of` for a scale of an example or of a head."""
  axes = range(x.ndim - scale.ndim, x.ndim) if scale.ndim < x.ndim else (-1,)
  return norm_of(center, name, feature_axis=tuple(axes))


@pytest.mark.parametrize(
  ('given', 'center', 'dtype'),
  [
    (SETS[0], True, 'float32'),
    second_tier(SETS[1], False, 'bfloat16'),
    *thinned(SETS, [True, False], DTYPES, every=1000, keep=3)[1:],
  ],
  ids=str,
)
def test_sets(interpreted, processors, given, center, dtype):
  """Programs that have rows of several sets, and sets that several have."""
  del interpreted
  processors(2)
  x, scale, bias, dy = some_inputs(*given, dtype)
  norm = of_some(x, scale, center)

  @jax.jit
  def gradients(x, scale, bias, dy):
    y, pull = jax.vjp(norm, x, scale, bias)
    return y, *pull(dy)

  reference = SomeRows(x, scale, bias if center else 0.0, center)
  desired = reference.y, *reference.gradients(dy)
  found = gradients(x, scale, bias, dy)
  chex.assert_equal_shape([found[2], scale])
  for actual, value in zip(found[: 3 + center], desired, strict=False):
    assert_right(actual, value, DTYPES[dtype])


def test_sets_of_one_parameter(interpreted):
  """Statistics of heads; a bias of a feature beside a scale of an example."""
  del interpreted
  x, dy = draw((3, 4, 40)), draw((3, 4, 40), seed=1)
  scale, bias = draw((3, 1, 40), seed=2), draw(40, seed=3)
  spec = Spec(1e-6, True, x.dtype)
  run = {'spec': spec, 'interpret': True}
  of_heads = {'x': x.swapaxes(0, 1), 'scale': scale.swapaxes(0, 1)}
  found = mosaic_gpu.forward(of_heads, with_statistics=True, **run)
  mean = np.asarray(found['pivot'], np.float64) + found['offset']
  exact = np.asarray(of_heads['x'], np.float64)
  assert_right(mean, exact.mean(-1, keepdims=True), 1e-6)
  assert_right(found['var'], exact.var(-1, keepdims=True), 1e-5)
  given = {'x': x, 'scale': scale, 'bias': bias, 'dy': dy}
  wanted = 'dx', 'dscale', 'dbias'
  found = mosaic_gpu.backward(given, wanted=wanted, **run)
  desired = SomeRows(x, scale, bias, True).gradients(dy)
  assert_right(found['dx'], desired[0], 1e-5)
  assert_right(found['dscale'], desired[1], 1e-5)
  assert_right(found['dbias'], desired[2].sum((0, 1)), 1e-5)


@pytest.mark.parametrize('norm', [nk.adaptive_layer_norm, nk.adaptive_rms_norm])
def test_adaptive_norms(interpreted, norm):
  """By a preference: scale is what one is added to."""
  del interpreted
  x, scale = draw((2, 5, 40), 'bfloat16'), draw((2, 40), 'bfloat16', seed=1)
  wide = np.asarray(scale, np.float64)[:, None]
  center = norm is nk.adaptive_layer_norm
  with nk.implementation(NAME):
    y = jax.jit(norm)(x, scale, scale)
  assert_right(y, Rows(x, 1 + wide, wide, center).y, DTYPES['bfloat16'])


@pytest.mark.parametrize('whole', [True, False])
def test_sets_on_several_devices(whole):
  """Examples are sharded, and their scale with them, or is whole."""
  x, scale, bias, dy = some_inputs((8, 3, 40), (8, 1, 40))
  desired = SomeRows(x, scale, bias, True)
  mesh = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh), nk.implementation(NAME):
    x, dy = (jax.device_put(a, P('d')) for a in (x, dy))
    of = P() if whole else P('d')
    scale, bias = (jax.device_put(a, of) for a in (scale, bias))
    y, pull = jax.vjp(nk.layer_norm, x, scale, bias)
    found = y, *pull(dy)
  chex.assert_equal(jax.typeof(found[2]), jax.typeof(scale))
  for actual, value in zip(
    found, (desired.y, *desired.gradients(dy)), strict=True
  ):
    assert_right(actual, value, 1e-5)


def test_statistics_and_sums(interpreted):
  """A residual, and two warpgroups on a row; far from zero too."""
  del interpreted
  x = 1e3 + draw((2, 5000))
  spec = Spec(1e-6, True, jnp.dtype(jnp.float32))
  residual = draw(x.shape, seed=1)
  given = {'x': x, 'residual': residual}
  found = mosaic_gpu.forward(given, spec, with_statistics=True, interpret=True)
  exact = np.asarray(x + residual, np.float64)
  mean = np.asarray(found['pivot'], np.float64) + found['offset']
  assert_right(found['total'], exact, 1e-7)
  assert_right(found['y'], Rows(exact, 1.0, 0.0, True).y, 1e-5)
  assert_right(mean, exact.mean(-1, keepdims=True), 1e-7)
  assert_right(found['var'], exact.var(-1, keepdims=True), 1e-5)


@pytest.mark.parametrize(
  ('activation', 'rounds', 'dtype', 'tolerance'),
  [
    (jax.nn.relu, True, 'bfloat16', 0),
    *thinned(
      [jax.nn.silu, jax.nn.gelu], [True, False], ['float32'], [5e-6], every=99
    )[1:],
  ],
)
def test_as_by_xla(interpreted, activation, rounds, dtype, tolerance):
  """An activation, with a rule of its own too; to the bit where it rounds."""
  del interpreted
  x, residual, dy, dtotal = (draw((5, 70), dtype, seed=i) for i in range(4))
  scale = draw(70, dtype, seed=4)

  def step(name):
    add = functools.partial(
      nk.add_rms_norm,
      activation=activation,
      round_before_scale=rounds,
      implementation=name,
    )
    results, pull = jax.vjp(add, x, residual, scale)
    return results, pull((dy, dtotal))

  found, desired = (jax.jit(step, static_argnums=0)(n) for n in (NAME, 'xla'))
  chex.assert_trees_all_equal_dtypes(found, desired)
  for actual, value in zip(
    *map(jax.tree.leaves, (found, desired)), strict=True
  ):
    assert_right(actual, np.asarray(value, np.float64), tolerance)


ACTIVATIONS = [
  *(jax.nn.soft_sign, lambda x: x * lax.stop_gradient(x)),
  *(jax.nn.gelu, jax.nn.relu, jax.nn.relu6, jax.nn.silu, jax.nn.sigmoid),
  *(jnp.tanh, jnp.square, jax.nn.leaky_relu, jax.nn.hard_tanh),
]


@pytest.mark.parametrize('power', [-3, -1, 1, 4])
def test_powers_of_activations(power):
  y = np.linspace(-2, 2, 9)

  def run(x):
    return lax.integer_pow(x * x + 1, power)

  found = activations.with_slope(run, jnp.asarray(y, jnp.float32))
  slope = power * (y * y + 1) ** (power - 1.0) * 2 * y
  for actual, value in zip(found, ((y * y + 1.0) ** power, slope), strict=True):
    np.testing.assert_allclose(actual, value, rtol=1e-5)


@pytest.mark.parametrize(
  'activation',
  thinned(ACTIVATIONS, every=3),
  ids=lambda run: getattr(run, '__name__', None),
)
def test_activations_lower(activation):
  """On the oldest JAX too; what cannot is told before."""
  assert activations.is_lowered(activation)
  x = jax.ShapeDtypeStruct((3, 70), jnp.bfloat16)

  def step(x):
    add = functools.partial(
      nk.add_layer_norm, activation=activation, implementation=NAME
    )
    y, pull = jax.vjp(add, x, x, jnp.ones(70), jnp.ones(70))
    return pull(y)

  made = jax.jit(step).trace(x).lower(lowering_platforms=('cuda',))
  assert made.as_text().count('mosaic_gpu_v2') == 2


def test_gradients_of_sums(interpreted):
  """Of the norm and of the sum before it."""
  del interpreted
  x, residual, dy, dtotal = (draw((5, 40), seed=i) for i in range(4))
  scale = draw(40, seed=4)
  add = functools.partial(nk.add_rms_norm, implementation=NAME)
  pull = jax.vjp(add, x, residual, scale)[1]
  dx, dscale, _ = Rows(x + residual, scale, 0.0, False).gradients(dy)
  desired = dx + dtotal, dx + dtotal, dscale
  for actual, value in zip(pull((dy, dtotal)), desired, strict=True):
    assert_right(actual, value, 1e-5)


@pytest.mark.second_tier
@pytest.mark.parametrize(
  ('name', 'dtype'),
  [
    *itertools.product(['layer_norm', 'rms_norm'], ['float32']),
    *itertools.product(['group_norm', 'instance_norm'], DTYPES),
  ],
)
def test_conformance(interpreted, name, dtype):
  """The suite of all norms; of rows other dtypes are held above."""
  del interpreted
  (case,) = (c for c in CASES if c.name == name)
  transform = dataclasses.replace(case.transform, implementation=NAME)
  case = case._replace(transform=transform)
  args = inputs(case, jnp.dtype(dtype))
  outputs, _ = jax.jit(train_and_eval(case))(*args)
  chex.assert_type(outputs, jnp.dtype(dtype))
  assert_close(outputs, expected(case, *args)[0], DTYPES[dtype])
  if dtype == 'float32':
    assert_gradients(case, args)


@pytest.mark.second_tier
@pytest.mark.parametrize('named', [True, False])
def test_transformed(interpreted, named):
  """vmap of x and of the parameters, and a preference instead of a name."""
  del interpreted
  x, scale, dy = draw((3, 4, 40)), draw((3, 40), seed=1), draw((3, 4, 40))
  norm = functools.partial(nk.rms_norm, implementation=NAME if named else None)

  def gradients(x, scale, dy):
    return jax.vjp(norm, x, scale)[1](dy)

  with nk.implementation(NAME):
    found = jax.jit(jax.vmap(gradients))(x, scale, dy)
  each = [
    Rows(*a, 0.0, False).gradients(d)
    for *a, d in zip(x, scale, dy, strict=True)
  ]
  for index, actual in enumerate(found):
    assert_right(actual, np.stack([e[index] for e in each]), 1e-5)


def test_examples_of_vmap():
  """One axis of the grid: along another CUDA takes 65,535 programs at most."""
  spec = Spec(1e-6, False, jnp.dtype('float32'))

  def backward(x, scale):
    given = {'x': x, 'scale': scale, 'dy': x}
    return mosaic_gpu.backward(given, spec, ('dx', 'dscale'))

  each = jax.vmap(jax.vmap(backward, (0, None)), (1, None))
  made = jax.make_jaxpr(each)(jnp.ones((300, 400, 1, 8)), jnp.ones(8))
  assert re.findall(r'grid=(\(.*?\))', str(made)) == ['(120000,)']


def run_plain(x, scale):
  """Both kernels, all that they may do."""
  spec = Spec(1e-6, True, x.dtype)
  given = {'x': x, 'scale': scale, 'bias': scale, 'residual': x}
  found = mosaic_gpu.forward(given, spec, with_statistics=True, interpret=True)
  given = {'x': x, 'scale': scale, 'dy': x, 'dtotal': x}
  wanted = 'dx', 'dscale', 'dbias'
  return found, mosaic_gpu.backward(given, spec, wanted, interpret=True)


def run_gated(x, scale):
  """The same with a gate."""
  spec = Spec(1e-6, False, x.dtype, gate=Gate(jax.nn.silu, False))
  given = {'x': x, 'gate': x, 'scale': scale}
  found = mosaic_gpu.forward(given, spec, interpret=True)
  given, wanted = given | {'dy': x}, ('dx', 'dgate', 'dscale')
  return found, mosaic_gpu.backward(given, spec, wanted, interpret=True)


# Each program has more tiles than its rings, which are short.
IN_WARP = configs.Config(4, 128, 1, 2, False, 2, 1, True)
SHARED = configs.Config(2, 256, 2, 2, True, 3, 1, True)


@pytest.mark.second_tier
@pytest.mark.parametrize(
  ('config', 'shape', 'of', 'run'),
  [
    (IN_WARP, (36, 100), (100,), run_plain),
    (IN_WARP, (3, 10, 100), (3, 1, 100), run_gated),
    (SHARED, (5, 1300), (1300,), run_gated),
    (SHARED, (2, 3, 1300), (3, 1300), run_plain),
  ],
)
def test_no_races(races, processors, monkeypatch, config, shape, of, run):
  """Layouts with one set of parameters and with several; gates, residuals."""
  processors(2)
  monkeypatch.setattr(configs, 'config', lambda *_: config)
  x, scale = draw(shape), draw(of, seed=1)
  if 1 < scale.ndim < x.ndim:
    scale = scale[None]
  jax.block_until_ready(run(x, scale))
  assert not races()


@pytest.mark.second_tier
@pytest.mark.parametrize('programs', [4, 3])
def test_no_races_of_groups(races, processors, monkeypatch, programs):
  """Two warpgroups, a ring that is used again, and more tasks than programs.

  Of four programs each has the same channels of all its examples.
  """
  x, scale = draw((3, 200, 16)), draw(16, seed=1)
  config = configs.Config(64, 8, 2, 2, True, 3, 1, False)
  monkeypatch.setattr(configs, 'groups', lambda *_: config)
  processors(programs)
  spec = Spec(1e-6, True, x.dtype, groups=4)
  given = {'x': x, 'scale': scale, 'bias': scale}
  found = mosaic_gpu.forward(given, spec, with_statistics=True, interpret=True)
  given = {'x': x, 'scale': scale, 'dy': x}
  wanted = 'dx', 'dscale', 'dbias'
  found |= mosaic_gpu.backward(given, spec, wanted, interpret=True)
  exact = Rows(x, scale, scale, True, 4)
  assert_right(found['y'], exact.y, 1e-5)
  for name, value in zip(wanted, exact.gradients(x), strict=True):
    assert_right(found[name], value, 1e-5)
  assert not races()


# Compiled for devices that are not here.


# Each row's statistics are 12 bytes, and each program's sums two rows.
LIMITS = {'forward': 2.01, 'training forward': 2.1, 'backward': 3.1}
# What a norm of rows may have, and the passes over x that it adds.
EXTRAS = {
  'nothing': ({}, 0, 0),
  'example': ({'of': 'example'}, 0.05, 0.05),
  'head': ({'of': 'head'}, 0, 0),
  'gelu': ({'activation': 'gelu'}, 0, 0),
  'residual': ({'residual': True}, 2, 1),
  'rms': ({'center': False}, 0, 0),
  'rounding': ({'center': False, 'rounds': True}, 0, 0),
  '16-bit parameters': ({'parameters': 'bfloat16'}, 0, 0),
  'no parameters': ({'parameters': None}, 0, 0),
  '16-bit result': ({'result': 'bfloat16'}, -0.5, -0.5),
}


def needs(target):
  return pytest.mark.skipif(
    not targets.is_installed(target),
    reason=f'no compiler for {target}: pip install -e ".[targets]"',
  )


COMPILERS = [
  pytest.param('h200', marks=needs('h200')),
  pytest.param('b200', marks=[needs('b200'), pytest.mark.second_tier]),
]


def table(kinds, sizes, dtypes, extra, every=None):
  """Cases for each chip; of so many, on diagonals, one is compiled in CI.

  Without `every` that is one kind of each.
  """
  for row in itertools.product(*map(enumerate, (CHIPS, sizes, dtypes))):
    places, (target, *case) = zip(*row, strict=True)
    taken = [k for k in kinds if is_taken(k, *case, **EXTRAS[extra][0])]
    for place, kind in enumerate(taken):
      in_ci = (place + sum(places)) % (every or len(taken)) == 0
      yield in_ci, (target, kind, *case, extra)


def covering(*tables):
  """Their rows; first those with which a kind has another size, dtype or so."""
  had, rows = set(), []
  for in_ci, (target, kind, *case) in itertools.chain(*tables):
    news = {(kind, value) for value in (target, *case)} - had if in_ci else ()
    had.update(news)
    marks = [needs(target)]
    if not news:
      marks += [pytest.mark.second_tier]
    if not in_ci:
      marks += [pytest.mark.table]
    rows.append(pytest.param(target, kind, *case, marks=marks))
  return rows


SOME, ENDS = ['bfloat16', 'float32'], KINDS[::2]
FEW = SIZES[::3]  # for float16, of which everything is as large as of bfloat16


@pytest.mark.optimized
@pytest.mark.parametrize(
  ('target', 'kind', 'size', 'dtype', 'extra'),
  covering(
    table(KINDS, SIZES, DTYPES, 'nothing'),
    table(ENDS, HEAD_SIZES, DTYPES, 'head', every=4),
    table(ENDS, SIZES, ['bfloat16'], 'rounding', every=4),
    table(ENDS, FEW, ['float16'], 'rounding', every=4),
    table(ENDS, FEW, ['bfloat16'], '16-bit parameters', every=4),
    table(ENDS, FEW, SOME, 'no parameters', every=4),
    table(ENDS, FEW, ['float32'], '16-bit result', every=4),
    *(
      table(ENDS, sizes, dtypes, extra, every=4)
      for extra in ('example', 'gelu', 'residual', 'rms')
      for sizes, dtypes in ((SIZES, SOME), (FEW, ['float16']))
    ),
  ),
)
def test_compiled(target, kind, size, dtype, extra):
  """Bytes, registers, loads and stores, and what is under way."""
  options, *added = EXTRAS[extra]
  found = report(target, kind, size, dtype, **options)
  assert found.spilled == 0
  assert found.moved <= LIMITS[kind] + added[kind == 'backward']
  assert_wide(found, kind, rests(size, dtype))
  assert found.under_way >= configs.CHIPS[CHIPS[target]].under_way


LIMITS_OF_GROUPS = {
  'forward': 2.01,
  'training forward': 2.03,
  'backward': 3.03,
}


@pytest.mark.optimized
@pytest.mark.parametrize(
  ('target', 'kind', 'size', 'dtype', 'extra'),
  covering(
    table(KINDS, GROUPS, DTYPES, 'nothing'),
    table(ENDS, GROUPS[::3], ['bfloat16'], '16-bit parameters', every=4),
    table(ENDS, GROUPS[::3], ['bfloat16'], 'no parameters', every=4),
    table(ENDS, GROUPS[::3], ['float32'], '16-bit result', every=4),
  ),
  ids=str,
)
def test_compiled_groups(target, kind, size, dtype, extra):
  """As rows, and sums for scale and bias do not count."""
  options, added, _ = EXTRAS[extra]
  found = report(target, kind, size, dtype, 'group', **options)
  assert found.spilled == 0
  assert found.moved <= LIMITS_OF_GROUPS[kind] + added
  config = found.config
  case = configs.groups_of((1, *size), 1, [dtype], [dtype])
  vectors = config.width // math.prod(case.lanes(config.width))
  assert_copied(found, kind)
  loads = accesses(found.code, 'ld')  # of scale and bias
  assert loads.total() <= vectors * (1 if kind == 'backward' else 2)
  assert found.under_way >= configs.CHIPS[CHIPS[target]].under_way


@pytest.mark.second_tier
@pytest.mark.optimized
@pytest.mark.parametrize('target', COMPILERS)
@pytest.mark.parametrize(
  ('size', 'dtype'), [(20_480, 'bfloat16'), (16_384, 'float32')]
)
def test_longest_compiled(target, size, dtype):
  """RMS norm, which has one sum."""
  found = report(target, 'backward', size, dtype, center=False)
  assert found.spilled == 0
  assert found.moved <= LIMITS['backward']
  assert found.under_way >= configs.CHIPS[CHIPS[target]].under_way


def rests(size, dtype):
  """Bytes of a store of what a copy leaves of rows that are no multiple."""
  step = math.gcd(size * jnp.dtype(dtype).itemsize, 16)
  return set() if step == 16 else {step}


def assert_wide(found, kind, others=frozenset()):
  """Of other memory than shared, only scale and bias are loaded, or held."""
  assert_copied(found, kind, others)
  held = found.config.holds_parameters
  assert accesses(found.code, 'ld').keys() <= (set() if held else {16})


# Bytes of each store: of none, of statistics, of sums.
STORES = {'forward': set(), 'training forward': {4}, 'backward': {8, 16}}


def assert_copied(found, kind, others=frozenset()):
  """What is as large as x comes and goes by asynchronous copies; and others."""
  for way in r'tensor\S*shared::c\w+\.global', r'\S*global\.shared::cta':
    assert re.search(rf'cp\.async\.bulk\.{way}', found.code)
  assert accesses(found.code, 'st').keys() <= STORES[kind] | others


def accesses(code, name):
  """How many loads or stores there are of memory not shared, by their bytes."""
  body = code[code.index('.entry') :]
  found = re.findall(rf'\b{name}\.(?!param|shared)(\S+)', body)
  sizes = [re.search(r'(?:\.|^)(?:v(\d)\.)?[a-z]+(\d+)$', f) for f in found]
  return collections.Counter(int(s[1] or 1) * int(s[2]) // 8 for s in sizes)


LAYERS, TOKENS, WIDTH = 12, 8192, 2048


@pytest.mark.second_tier
@pytest.mark.optimized
@needs('h200')
@pytest.mark.parametrize('norm', layers.ROWS)
def test_scan(norm):
  """What a loop saved is read where it lies, if XLA is told that it may be.

  Then the kernels add fewer bytes than XLA's form, and otherwise one pass more.
  """

  def added(name, options=None):
    jax.clear_caches()
    library = 'normkit' if name else 'none'
    of = norm if name else ''
    function, given = models.transformer_step(
      library, of, TOKENS, WIDTH, LAYERS
    )
    with nk.implementation(name or 'xla'):
      made = targets.compile_for('h200', function, *given, options=options)
    return traffic.measure(made.as_text()).bytes

  n = LAYERS * TOKENS * WIDTH * 2
  in_place = {'xla_gpu_enable_dynamic_slice_fusion': True}
  by_xla = added('xla')
  assert added(NAME, in_place) <= by_xla - 0.9 * n
  assert added(NAME) <= by_xla + 1.2 * n
  assert added(NAME, in_place) - added(None) <= 10.4 * n


@pytest.mark.parametrize(
  ('size', 'given', 'wanted'),
  [
    (7, 'float32', 'float32'),
    (100, 'bfloat16', 'float32'),
    (5000, 'bfloat16', 'bfloat16'),
    (30_000, 'float16', 'float16'),
  ],
)
def test_lowered(size, given, wanted):
  """By every version of JAX, without a compiler: as far as it can go."""
  x = jax.ShapeDtypeStruct((3, size), given)
  assert_lowered(x, (size,), wanted)


@pytest.mark.parametrize('size', [70, 1300])
@pytest.mark.parametrize('of', [(3, 1, 1), (1, 1, 4)])
def test_lowered_sets(size, of):
  x = jax.ShapeDtypeStruct((3, 5, 4, size), 'bfloat16')
  assert_lowered(x, (*of, size), 'bfloat16')


@pytest.mark.parametrize('size', [70, 1300])
def test_lowered_statistics(size):
  """Of some rows, which may be less than a sector of memory."""
  x = jax.ShapeDtypeStruct((40, size), jnp.bfloat16)
  run = functools.partial(
    mosaic_gpu.forward, spec=Spec(1e-6, True, x.dtype), with_statistics=True
  )
  assert lowered(run, {'x': x}).count('mosaic_gpu_v2') == 1


@pytest.mark.parametrize(
  ('size', 'norm', 'activation', 'calls'),
  [
    (20_480, nk.add_rms_norm, None, 2),
    (65_536, nk.add_layer_norm, None, 2),
    (49_152, nk.add_layer_norm, jax.nn.gelu, 2),
    (65_536, nk.add_layer_norm, jax.nn.gelu, 1),
  ],
)
def test_longest_backward(size, norm, activation, calls):
  """Shorter with an activation; beyond it is XLA's."""
  x = jax.ShapeDtypeStruct((3, size), jnp.bfloat16)
  parameters = [jnp.ones(size)] * (2 if norm is nk.add_layer_norm else 1)

  def step(x):
    add = functools.partial(norm, activation=activation, implementation=NAME)
    y, pull = jax.vjp(add, x, x, *parameters)
    return pull(y)

  made = jax.jit(step).trace(x).lower(lowering_platforms=('cuda',))
  assert made.as_text().count('mosaic_gpu_v2') == calls


def assert_lowered(x, of, wanted):
  def step(x):
    norm = functools.partial(
      nk.layer_norm, dtype=jnp.dtype(wanted), implementation=NAME
    )
    y, pull = jax.vjp(norm, x, jnp.ones(of))
    return pull(y)

  calls = lowered(step, x).count('mosaic_gpu_v2')
  one = {'sums': 1, 'residual': False}  # there is no bias
  has_backward = cases.has_backward(NAME, x.shape, x.dtype, **one)
  assert calls == (2 if has_backward else 1)


def lowered(step, *given):
  made = jax.jit(step).trace(*given).lower(lowering_platforms=('cuda',))
  return made.as_text()


@pytest.mark.parametrize(
  ('channels', 'groups', 'given', 'wanted'),
  [
    (12, 12, 'bfloat16', 'float32'),
    second_tier(320, 32, 'float16', 'float16'),
    second_tier(64, 4, 'float32', 'bfloat16'),
  ],
)
def test_lowered_groups(channels, groups, given, wanted):
  x = jax.ShapeDtypeStruct((3, 7, 7, channels), given)

  def step(x):
    parameter = jnp.ones(channels)
    norm = functools.partial(
      nk.group_norm,
      num_groups=groups,
      dtype=jnp.dtype(wanted),
      implementation=NAME,
    )
    y, pull = jax.vjp(norm, x, parameter, parameter)
    return pull(y)

  assert lowered(step, x).count('mosaic_gpu_v2') == 2


OTHER = {
  'token': ((3, 5, 4), (3, 5, 4), NAME, 'for each row'),
  'between': ((3, 5, 2, 4), (1, 5, 1, 4), NAME, 'is neither of an example'),
  'both': ((3, 5, 2, 4), (3, 1, 2, 4), NAME, 'neither of an example'),
  'triton': ((3, 5, 4), (3, 1, 4), 'triton', 'more than one number a feature'),
}


@pytest.mark.parametrize(
  ('shape', 'of', 'name', 'match'), OTHER.values(), ids=OTHER
)
def test_refused_sets(shape, of, name, match):
  """By name with the reason; a preference gives way to XLA's form."""
  x, scale = draw(shape), draw(of, seed=1)
  norm = functools.partial(jax.make_jaxpr(nk.rms_norm), x, scale)
  with pytest.raises(NotImplementedError, match=match):
    jax.make_jaxpr(functools.partial(nk.rms_norm, implementation=name))(
      x, scale
    )
  with nk.implementation(name):
    assert 'normkit_choice' not in str(norm())


REFUSED = {
  'activation': (dict(activation=jax.nn.softplus), 'primitives that it does'),
  'length': (dict(x=jnp.ones((1, 65_537))), '65,536'),
}


@pytest.mark.parametrize(('given', 'match'), REFUSED.values(), ids=REFUSED)
def test_refused(given, match):
  """By name with the reason; a preference gives way to XLA's form."""
  given = {'x': jnp.ones((2, 4)), 'implementation': NAME} | given
  given['residual'] = given['x']
  with pytest.raises(NotImplementedError, match=match):
    jax.make_jaxpr(lambda: nk.add_layer_norm(**given))()
  del given['implementation']
  with nk.implementation(NAME):
    made = jax.jit(lambda: nk.add_layer_norm(**given)).trace()
    text = made.lower(lowering_platforms=('cuda',)).as_text()
  assert 'mosaic_gpu' not in text


REFUSED_GROUPS = {
  'fit': ((1, 2**18, 8), 'shared memory'),
  'line': ((1, 4, 520), 'multiples of 16 bytes in more than 256 channels'),
}


@pytest.mark.parametrize(
  ('shape', 'match'), REFUSED_GROUPS.values(), ids=REFUSED_GROUPS
)
def test_refused_groups(shape, match):
  with pytest.raises(NotImplementedError, match=match):
    nk.group_norm(jnp.ones(shape), num_groups=1, implementation=NAME)


@pytest.mark.parametrize('capability', [9, 10])
@pytest.mark.parametrize('dtype', DTYPES)
def test_groups_that_are_taken_fit(dtype, capability):
  """Whatever the dtype of the result, and as copies and threads ask."""
  x, shared = jnp.dtype(dtype), configs.CHIPS[capability].shared
  found = []
  for places, size in itertools.product(
    [1, 49, 64, 1000, 56 * 56, 2**13], [1, 3, 4, 10, 16, 30, 61, 128]
  ):
    shape = 2, places, COUNT * size
    is_taken = cases.refusal(NAME, shape, x, COUNT) is None
    for out in x, jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16):
      given = [((x,), (out,), is_taken)]
      has_backward = cases.has_backward(NAME, shape, x, COUNT, result=out)
      given += [((x, out), (x,), has_backward)]
      for read, written, taken in given:
        case = configs.groups_of(shape, COUNT, read, written)
        config = configs.groups(case, capability)
        assert not taken or config
        if config is not None:
          found.append(config)
          tiles = config.warpgroups * config.rows * config.width
          buffers = [tiles * config.stages * d.itemsize for d in read]
          buffers += [tiles * 2 * d.itemsize for d in written]
          groups = config.members * config.warpgroups
          buffers.append(64 * groups * config.width)
          barriers = 8 * (config.warpgroups * config.stages + 1)
          held = sum(-(-b // 1024) * 1024 for b in buffers) + barriers
          assert held * config.resident <= shared
          assert config.row_width >= places * config.width
          assert config.width * min(case.itemsizes) % 16 == 0
          assert config.width % size == 0
          assert config.rows * case.lanes(config.width)[0] % 128 == 0
  assert len(found) > 50
  least = (2, 56, 56, 32 * (16 if x.itemsize == 2 else 8))
  assert cases.has_backward(NAME, least, x, 32)


@pytest.mark.parametrize('capability', [9, 10])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_what_is_taken_fits(dtype, capability):
  """Whatever comes along with x, there is a `Config`."""
  dtype, wide = jnp.dtype(dtype), jnp.dtype(jnp.float32)
  x = (dtype,)

  def fits(*case):
    return configs.config(configs.Case(*case), capability) is not None

  for size in [1, 65, 500, 1025, *range(2048, 65_537, 2048)]:
    case = NAME, (2, size), dtype
    for out in dtype, wide:
      if cases.refusal(*case) is None:
        assert fits(size, x, (out,), (wide, wide))
      if cases.refusal(*case, residual=True) is None:
        assert fits(size, x * 2, (out, dtype), (wide, wide))
      if cases.has_backward(*case):
        assert fits(size, (*x, out, dtype), x, (wide,), 2)
        assert fits(size, (*x, out, dtype), x, (wide,), 2, True)
        assert fits(size, (*x, out), x)
      for residual in (), x:
        if cases.has_backward(*case, sums=1, residual=bool(residual)):
          assert fits(size, (*x, out, *residual), x, (wide,), 1)
        one = {'sums': 1, 'residual': bool(residual), 'has_sets': True}
        if cases.has_backward(*case, **one):
          assert fits(size, (*x, out, *residual), x, (wide,), 1, True)


@pytest.mark.parametrize(
  ('capability', 'match'), [(8.0, 'capability 9'), (12.0, 'B200')]
)
def test_other_chips(monkeypatch, capability, match):
  monkeypatch.setattr(dispatch, 'oldest_gpu', lambda: capability)
  x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
  norm = functools.partial(nk.layer_norm, implementation=NAME)
  with pytest.raises(NotImplementedError, match=match):
    jax.jit(norm).trace(x).lower(lowering_platforms=('cuda',))
