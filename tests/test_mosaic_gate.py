"""Gated RMS norm by Mosaic GPU: interpreted, lowered and compiled."""

import functools
import itertools

from cases import draw
import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
from test_kernels import DTYPES, Rows, assert_right
from test_mosaic_gpu import (
  COMPILERS,
  ENDS,
  FEW,
  NAME,
  SOME,
  assert_wide,
  lowered,
  rests,
)
from tiers import second_tier, thinned

from benchmarks import targets, traffic
from benchmarks.registers import CHIPS, GATES, KINDS, SIZES, is_taken, report
import normkit as nk
from normkit.kernels import cases, configs, mosaic_gpu
from normkit.kernels.rows import Gate, Spec

ORDERS = {'norm_first': True, 'gate_first': False}


def sigmoid(z):
  """And its derivative."""
  value = 1 / (1 + np.exp(-z))
  return value, value * (1 - value)


def silu(z):
  value, slope = sigmoid(z)
  return z * value, value + z * slope


FACTORS = {
  jax.nn.silu: silu,
  jax.nn.sigmoid: sigmoid,
  None: lambda z: (z, np.ones_like(z)),
}


class Gated:
  """In float64, and the gradients of sum(y * dy) for x, gate and scale."""

  def __init__(self, x, gate, scale, is_last, activation=jax.nn.silu):
    self.x, self.is_last = np.asarray(x, np.float64), is_last
    self.factor, self.slope = FACTORS[activation](np.asarray(gate, np.float64))
    z = self.x if is_last else self.x * self.factor
    self.rows = Rows(z, scale, 0.0, False)
    self.y = self.rows.y * (self.factor if is_last else 1)

  def gradients(self, dy):
    dy = np.asarray(dy, np.float64)
    if self.is_last:
      dx, dscale, _ = self.rows.gradients(dy * self.factor)
      return dx, dy * self.rows.y * self.slope, dscale
    dz, dscale, _ = self.rows.gradients(dy)
    return dz * self.factor, dz * self.x * self.slope, dscale


def given(shape, dtype='float32'):
  """x, gate, scale and the gradient of the result."""
  x, gate, dy = (draw(shape, dtype, seed=i) for i in range(3))
  return x, gate, draw(shape[-1:], seed=3), dy


def norm_of(is_last, name=NAME, **options):
  options |= {'norm_before_gate': is_last, 'implementation': name}
  return functools.partial(nk.gated_rms_norm, **options)


def pulled(norm):
  """The result, and the gradients of x, gate and scale."""

  @jax.jit
  def run(*arrays):
    y, pull = jax.vjp(norm, *arrays[:-1])
    return y, *pull(arrays[-1])

  return run


def assert_norm(norm, arrays, reference, tolerance):
  found = pulled(norm)(*arrays)
  chex.assert_trees_all_equal_shapes_and_dtypes(found[1:], arrays[:-1])
  wanted = reference.y, *reference.gradients(arrays[-1])
  for actual, value in zip(found, wanted, strict=True):
    assert_right(actual, value, tolerance)


@pytest.mark.parametrize(
  ('shape', 'is_last', 'activation', 'dtype'),
  [
    ((5, 100), True, jax.nn.silu, 'float32'),
    ((3, 1300), False, jax.nn.silu, 'bfloat16'),
    *(
      second_tier(shape, is_last, *[*zip(FACTORS, DTYPES, strict=True)][at % 3])
      for at, (shape, is_last) in enumerate(
        [
          ((7,), True),
          ((40, 3), False),
          *itertools.product(
            [(17, 768), (3, 2, 1024), (2, 9000)], ORDERS.values()
          ),
        ]
      )
    ),
  ],
  ids=lambda value: getattr(value, '__name__', str(value)),
)
def test_values_and_gradients(interpreted, shape, is_last, activation, dtype):
  """Rows of a part of a warp, of a warp, of one warpgroup and of several."""
  del interpreted
  arrays = given(shape, dtype)
  norm = norm_of(is_last, activation=activation)
  reference = Gated(*arrays[:-1], is_last, activation)
  assert_norm(norm, arrays, reference, DTYPES[dtype])


@pytest.mark.parametrize('is_last', thinned(ORDERS.values(), every=2))
def test_backward_by_xla(interpreted, monkeypatch, is_last):
  """As of rows that are too long, from statistics of the kernel."""
  del interpreted
  monkeypatch.setattr(cases, 'has_backward', lambda *_, **__: False)
  arrays = given((5, 70))
  norm, reference = norm_of(is_last), Gated(*arrays[:-1], is_last)
  assert_norm(norm, arrays, reference, DTYPES['float32'])


class Parted(Gated):
  """Groups of neighbouring features, each a row."""

  def __init__(self, x, gate, scale, is_last, size):
    x, gate = (a.reshape(*a.shape[:-1], -1, size) for a in (x, gate))
    super().__init__(x, gate, scale.reshape(-1, size), is_last)
    self.y = self.y.reshape(*self.y.shape[:-2], -1)

  def gradients(self, dy):
    dy, scale = dy.reshape(self.x.shape), self.rows.scale
    dx, dgate, _ = super().gradients(dy)
    g = np.asarray(dy, np.float64) * (self.factor if self.is_last else 1)
    dscale = (g * self.rows.normalized).reshape(-1, *scale.shape).sum(0)
    return *(a.reshape(self.y.shape) for a in (dx, dgate)), dscale.reshape(-1)


@pytest.mark.parametrize(
  ('shape', 'size', 'is_last', 'dtype'),
  [
    ((3, 5, 40), 10, False, 'float32'),
    second_tier((3, 5, 40), 40, True, 'float32'),
    second_tier((4, 140), 70, True, 'bfloat16'),
    second_tier((2, 3, 2600), 1300, False, 'float16'),
  ],
)
def test_groups_of_features(interpreted, shape, size, is_last, dtype):
  """As heads, each with its part of the scale."""
  del interpreted
  arrays = given(shape, dtype)
  norm = norm_of(is_last, group_size=size)
  reference = Parted(*arrays[:-1], is_last, size)
  assert_norm(norm, arrays, reference, DTYPES[dtype])


@pytest.mark.second_tier
@pytest.mark.parametrize('is_last', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('moved', [0, 1])
def test_one_gradient(interpreted, is_last, moved):
  """Of x or of the gate, and beside this the result; without a scale."""
  del interpreted
  x, gate, _, dy = given((5, 40))

  @jax.jit
  def run(x, gate, dy):
    def norm(one):
      return norm_of(is_last)(*((one, gate), (x, one))[moved])

    y, pull = jax.vjp(norm, (x, gate)[moved])
    return y if moved else None, *pull(dy)

  y, found = run(x, gate, dy)
  reference = Gated(x, gate, 1.0, is_last)
  assert_right(found, reference.gradients(dy)[moved], 1e-5)
  if moved:
    assert_right(y, reference.y, 1e-5)


@pytest.mark.second_tier
@pytest.mark.parametrize('is_last', ORDERS.values(), ids=ORDERS)
def test_statistics(interpreted, is_last):
  """Of what is normalized; rows that two warpgroups share."""
  del interpreted
  x, gate, scale, _ = given((2, 5000))
  spec = Spec(1e-6, False, x.dtype, gate=Gate(jax.nn.silu, is_last))
  arrays = {'x': x, 'gate': gate, 'scale': scale}
  found = mosaic_gpu.forward(arrays, spec, True, interpret=True)
  reference = Gated(x, gate, scale, is_last)
  assert_right(found['y'], reference.y, 1e-5)
  assert_right(found['var'], reference.rows.root**-2 - 1e-6, 1e-5)


@pytest.mark.second_tier
@pytest.mark.parametrize('is_last', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('scale_dtype', ['bfloat16', 'float32'])
def test_rounds_as_xla_does(interpreted, is_last, scale_dtype):
  """To the bit."""
  del interpreted
  x, gate, scale, dy = given((5, 70), 'bfloat16')
  arrays = x, gate, scale.astype(scale_dtype), dy
  found, desired = (
    pulled(norm_of(is_last, name, round_before_scale=True))(*arrays)
    for name in (NAME, 'xla')
  )
  chex.assert_trees_all_equal(found[0], desired[0])
  for actual, value in zip(found, desired, strict=True):
    assert_right(actual, np.asarray(value, np.float64), 1e-6)


@pytest.mark.second_tier
@pytest.mark.parametrize('is_last', ORDERS.values(), ids=ORDERS)
def test_transformed(interpreted, is_last):
  """vmap of x and the gate, or of all; a preference, and another result."""
  del interpreted
  x, gate, scale, dy = given((2, 4, 40))
  scales = draw((2, 40), seed=5)
  norm = functools.partial(pulled(norm_of(is_last, None)))
  for axes, values in ((0, 0, None, 0), scale), ((0, 0, 0, 0), scales):
    with nk.implementation(NAME):
      found = jax.vmap(norm, axes)(x, gate, values, dy)
    each = np.broadcast_to(values, scales.shape)
    for index in range(2):
      reference = Gated(x[index], gate[index], each[index], is_last)
      wanted = reference.y, *reference.gradients(dy[index])
      for actual, value in zip(found, wanted, strict=True):
        assert_right(actual[index], value, 1e-5)
  half = [a.astype(jnp.bfloat16) for a in (x, gate)]
  y = norm_of(is_last, dtype=jnp.float32)(*half, scale)
  assert y.dtype == jnp.float32
  assert_right(y, Gated(*half, scale, is_last).y, 1e-5)


@pytest.mark.parametrize('is_last', thinned(ORDERS.values(), every=2))
def test_where_there_is_no_kernel(is_last):
  """On a CPU a preference is XLA's form: derivatives of both modes, twice."""
  arrays = given((3, 40))

  def all_of(norm):
    def run(*arrays):
      *values, dy = arrays
      y, moved = jax.jvp(norm, values, values[::-1][1:] + values[2:])
      pull = jax.vjp(norm, *values)[1]

      def size(*values):
        return sum(jnp.sum(a**2) for a in jax.vjp(norm, *values)[1](dy))

      return y, moved, pull(dy), jax.grad(size, (0, 1, 2))(*values)

    return jax.jit(run)

  desired = all_of(norm_of(is_last, 'xla'))(*arrays)
  with nk.implementation(NAME):
    found = all_of(norm_of(is_last, None))(*arrays)
  chex.assert_trees_all_close(found, desired, rtol=1e-4, atol=1e-5)


@pytest.mark.second_tier
@pytest.mark.parametrize('is_last', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('size', [None, 10])
def test_several_devices(is_last, size):
  """Rows are sharded, and the gate with them or not."""
  arrays = given((8, 3, 40))
  of = Gated if size is None else functools.partial(Parted, size=size)
  desired = of(*arrays[:-1], is_last)
  mesh = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh), nk.implementation(NAME):
    x, gate, scale, dy = (
      jax.device_put(a, s)
      for a, s in zip(arrays, (P('d'), P(), P(), P('d')), strict=True)
    )
    norm = norm_of(is_last, None, group_size=size)
    y, pull = jax.vjp(norm, x, gate, scale)
    found = y, *pull(dy)
  assert jax.typeof(found[2]).sharding.spec == jax.typeof(gate).sharding.spec
  wanted = desired.y, *desired.gradients(arrays[-1])
  for actual, value in zip(found, wanted, strict=True):
    assert_right(actual, value, 1e-5)


X = jnp.ones((2, 8))
SCALE = jnp.ones(())
REFUSED = {
  'triton': ({'implementation': 'triton'}, 'a gate'),
  'mosaic_tpu': ({'implementation': 'mosaic_tpu'}, 'a gate'),
  'gate of another dtype': ({'gate': X.astype('bfloat16')}, 'beside x'),
  'activation': ({'activation': jax.nn.softplus}, 'primitives that it does'),
  'closure': ({'activation': lambda z: z * SCALE}, 'primitives that it does'),
  'mask': ({'where': X > 0}, 'a mask'),
  'mask of groups': ({'where': X > 0, 'group_size': 4}, 'a mask'),
  'axis': ({'axis': 0}, 'not the last one'),
  'long': ({'x': jnp.ones((1, 65_537))}, 'more than 65,536'),
}


@pytest.mark.parametrize(('options', 'match'), REFUSED.values(), ids=REFUSED)
def test_refused(options, match):
  """By name with the reason; a preference gives way to XLA's form."""
  options = {'x': X, 'implementation': NAME} | options
  options = {'gate': options['x']} | options
  name = options.pop('implementation')

  def made(name):
    return jax.make_jaxpr(
      lambda: nk.gated_rms_norm(**options, implementation=name)
    )()

  with pytest.raises(NotImplementedError, match=match):
    made(name)
  with nk.implementation(name):
    assert 'normkit_choice' not in str(made(None))


def test_none_is_xla():
  """Nothing of the dispatch, and the same program."""

  def program(name):
    norm = norm_of(False, name, group_size=4)
    return str(jax.make_jaxpr(lambda: norm(X, X))())

  jax.clear_caches()
  assert program(None) == program('xla')


@pytest.mark.parametrize(
  ('size', 'dtype'),
  [(7, 'float32'), (16_384, 'bfloat16'), (20_480, 'bfloat16')],
)
def test_lowered(size, dtype):
  """By every JAX; the backward of longer rows is XLA's."""
  x = jax.ShapeDtypeStruct((3, size), dtype)

  def step(x):
    y, pull = jax.vjp(norm_of(size != 7), x, x, jnp.ones(size))
    return pull(y)

  has_backward = cases.has_backward(NAME, x.shape, x.dtype, **BACKWARD)
  assert lowered(step, x).count('mosaic_gpu_v2') == 1 + has_backward


BACKWARD = {'sums': 1, 'residual': False, 'gate': True}


@pytest.mark.parametrize('capability', [9, 10])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_what_is_taken_fits(dtype, capability):
  """Whatever is wanted of it, there is a `Config`."""
  dtype, wide = jnp.dtype(dtype), jnp.dtype(jnp.float32)
  x, taken = (dtype,), {}

  def fits(*case):
    return configs.config(configs.Case(*case), capability) is not None

  for size in [1, 65, 500, 1025, *range(2048, 65_537, 2048)]:
    case = NAME, (2, size), dtype
    if cases.refusal(*case, gate=True) is None:
      taken['forward'] = size
      assert all(fits(size, x * 2, (out,), (wide,)) for out in (dtype, wide))
    for out, has_sets in itertools.product((dtype, wide), (False, True)):
      if cases.has_backward(*case, has_sets=has_sets, **BACKWARD):
        taken['backward', has_sets] = size
        for results in x, x * 2:
          arrays = (*x * 2, out), results, (wide,)
          assert fits(size, *arrays, 1, has_sets, True)
          assert fits(size, *arrays[:2], (), 0, has_sets, True)
  assert [*taken.values()] == [65_536, 49_152, 49_152]


LIMITS = {'forward': 3.01, 'training forward': 3.1, 'backward': 5.1}
FIRST = [
  ('forward', 768, 'bfloat16', 'first', 'feature'),
  ('backward', 4096, 'bfloat16', 'last', 'feature'),
]
# In CI one of five is compiled by the oldest JAX; of H200 others by the newest.
LATER = pytest.mark.second_tier, pytest.mark.table
CHOSEN = [
  pytest.param(*row, marks=() if row in FIRST else LATER[: 1 + at % 5])
  for at, row in enumerate(
    [
      *itertools.product(ENDS, [*SIZES, 15_000], SOME, GATES, ['feature']),
      *itertools.product(KINDS[1:2], SIZES[2:5], SOME, GATES[:1], ['feature']),
      *itertools.product(ENDS, FEW, ['float16'], GATES, ['feature']),
      *itertools.product(KINDS[2:], [256, 5120, 12_288], SOME, GATES, ['head']),
    ]
  )
  if is_taken(*row[:3], gate=row[3])
]


@pytest.mark.optimized
@pytest.mark.parametrize('target', COMPILERS)
@pytest.mark.parametrize(('kind', 'size', 'dtype', 'gate', 'of'), CHOSEN)
def test_compiled(target, kind, size, dtype, gate, of):
  """x, the gate and dy are read once; nothing spills."""
  found = report(target, kind, size, dtype, of, gate=gate)
  assert found.spilled == 0
  assert found.moved <= LIMITS[kind]
  assert_wide(found, kind, rests(size, dtype))
  assert found.under_way >= configs.CHIPS[CHIPS[target]].under_way


@pytest.mark.second_tier
@pytest.mark.optimized
@pytest.mark.parametrize('target', COMPILERS[:1])
@pytest.mark.parametrize('is_last', ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize('size', [None, 1024])
def test_step(target, is_last, size):
  """The norm and its gradients in one program, groups where they lie."""
  x = jax.ShapeDtypeStruct((16_384, 8192), 'bfloat16')
  scale = jax.ShapeDtypeStruct((8192,), 'float32')

  def moved(name):
    step = pulled(norm_of(is_last, name, group_size=size))
    made = targets.compile_for(target, step, x, x, scale, x)
    return traffic.measure(made.as_text()).bytes / (2 * x.size)

  assert moved(NAME) <= 8.1
  assert moved('xla') >= 10
