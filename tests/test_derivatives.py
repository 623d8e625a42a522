"""Derivatives of layer and RMS norm: the forms for CPUs.

By products of matrices from `affine.LARGE` elements on, in another way above
`affine.MODERATE`; by both sums of a row at once below, of few rows or columns,
and of layer norms up to `affine.HUGE`.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import normkit as nk
from normkit.affine import HUGE, LARGE, MANY_ROWS, MODERATE

ROWS = 64
EPSILON = 1e-6
PRODUCTS = [(ROWS, LARGE // ROWS), (ROWS, HUGE // ROWS + 1)]
PAIRS = [(48, 77), (700, 7), (3, 1540), (ROWS, MODERATE // ROWS + 10)]


@pytest.fixture(scope='module', params=PRODUCTS + PAIRS, ids=str)
def data(request):
  """x, two directions, scale and bias; rows far from zero among them."""
  rng = np.random.default_rng(0)
  rows, width = request.param
  x, dy, v = rng.standard_normal((3, rows, width))
  x = x * rng.uniform(0.5, 2, (rows, 1)) + rng.uniform(-9, 9, (rows, 1))
  scale, bias = 1 + rng.standard_normal((2, width)) / 4
  return [np.asarray(a, np.float32) for a in (x, dy, v, scale, bias)]


def norm(center, x, scale, bias):
  options = {'axis': -1, 'center': center, 'epsilon': EPSILON}
  return nk.normalize(x, scale, bias, **options)


def exact(center, x, scale, bias):
  """The formula, in float64."""
  d = x - x.mean(-1, keepdims=True) if center else x
  root = 1 / np.sqrt((d**2).mean(-1, keepdims=True) + EPSILON)
  return d * root * scale + bias


def exact_gradients(center, x, dy, scale):
  """Of sum(y * dy), in float64; Ba and others (2016), derived by hand."""
  y = exact(center, x, 1.0, 0.0)
  d = x - x.mean(-1, keepdims=True) if center else x
  root = 1 / np.sqrt((d**2).mean(-1, keepdims=True) + EPSILON)
  g = dy * scale
  along = (g * y).mean(-1, keepdims=True)
  mean = g.mean(-1, keepdims=True) if center else 0.0
  return root * (g - mean - y * along), (dy * y).sum(0), dy.sum(0)


def gradients(center, x, dy, scale, bias):
  def loss(x, scale, bias):
    return (norm(center, x, scale, bias) * dy).sum()

  return jax.grad(loss, (0, 1, 2))(x, scale, bias)


@pytest.mark.parametrize('center', [True, False])
def test_gradients(data, center):
  x, dy, _, scale, bias = data
  found = jax.jit(gradients, static_argnums=0)(center, x, dy, scale, bias)
  chex.assert_tree_all_finite(found)
  wide = [a.astype(np.float64) for a in (x, dy, scale)]
  for got, want in zip(found, exact_gradients(center, *wide), strict=True):
    chex.assert_shape(got, want.shape)
    largest = np.abs(want).max()
    np.testing.assert_allclose(got / largest, want / largest, atol=2e-6)


@pytest.mark.parametrize('data', PAIRS, indirect=True, ids=str)
def test_rows_of_two_axes(data):
  """A sum along the last alone would be a part of it."""
  x, dy, _, scale, bias = (a.reshape(*a.shape[:-1], 7, -1) for a in data)

  def loss(x, scale, bias):
    return (nk.layer_norm(x, scale, bias, axis=(-2, -1)) * dy).sum()

  found = jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)
  wide = [data[i].astype(np.float64) for i in (0, 1, 3)]
  for got, want in zip(found, exact_gradients(True, *wide), strict=True):
    largest = np.abs(want).max()
    pair = np.reshape(got, want.shape) / largest, want / largest
    np.testing.assert_allclose(*pair, atol=2e-6)


@pytest.mark.parametrize('center', [True, False])
def test_second_derivatives_and_vmap(data, center):
  """Along v, forward or backward over backward, by differences in float64."""
  x, dy, v, scale, bias = data

  @jax.jit
  def along(x, v):
    def dx(x):
      return gradients(center, x, dy, scale, bias)[0]

    forward = jax.vmap(lambda v: jax.jvp(dx, (x,), (v,))[1])(
      jnp.stack([v, -2 * v])
    )
    return *forward, jax.grad(lambda x: (dx(x) * v).sum())(x)

  x, v = (a.astype(np.float64) for a in (x, v))
  step = 1e-5
  above, below = (
    exact_gradients(center, x + s * v, dy, scale)[0] for s in (step, -step)
  )
  want = (above - below) / (2 * step)
  found = along(data[0], data[2])
  largest = np.abs(want).max()
  for got, factor in zip(found, (1, -2, 1), strict=True):
    np.testing.assert_allclose(
      got / largest, factor * want / largest, atol=2e-5
    )


@pytest.mark.parametrize('data', PRODUCTS[:1], indirect=True)
def test_only_from_this_size_on(data):
  """Of fewer elements it would cost more to compile than it ever saves."""

  def program(rows):
    x, dy, _, scale, bias = data
    run = jax.jit(functools.partial(gradients, True))
    return run.lower(x[:rows], dy[:rows], scale, bias).as_text()

  assert 'dot_general' in program(ROWS)
  assert 'dot_general' not in program(ROWS - 1)


@pytest.mark.parametrize(('width', 'has_some'), [(63, True), (64, False)])
def test_products_of_short_rows(width, has_some):
  """Also where longer ones take both sums at once."""
  x, scale = jnp.ones((MODERATE // 63 + 1, width)), jnp.ones(width)
  run = jax.jit(functools.partial(gradients, True))
  text = run.lower(x, x, scale, scale).as_text()
  assert ('dot_general' in text) == has_some


@pytest.mark.optimized
def test_fewer_programs_up_to_a_size():
  """XLA compiles each; of more, or few rows, a second core does one earlier."""

  def kernels(center, elements, rows=ROWS):
    x, scale = jnp.ones((rows, elements // rows)), jnp.ones(elements // rows)
    run = jax.jit(functools.partial(gradients, center))
    text = run.lower(x, x, scale, scale).compile().as_text()
    return len(re.findall(r' fusion\(', text))

  for center, most in (True, HUGE), (False, MODERATE):
    assert kernels(center, most) < kernels(center, most + ROWS)
  many, few = (
    kernels(False, rows * 1024, rows) for rows in (MANY_ROWS, MANY_ROWS - 1)
  )
  assert many < few


@pytest.mark.parametrize('data', PRODUCTS, indirect=True, ids=str)
@pytest.mark.parametrize('center', [True, False])
def test_no_product_with_a_vector(data, center):
  """XLA would make code for it, at the cost of compiling a whole norm."""
  x, dy, _, scale, bias = data
  run = jax.jit(functools.partial(gradients, center))
  text = run.lower(x, dy, scale, bias).as_text()
  found = re.findall(r'dot_general.*-> tensor<(\w+)xf32>', text)
  assert {tuple(map(int, f.split('x'))) for f in found} == {
    (ROWS, 2),
    (2, x.shape[-1]),
  }


@pytest.mark.parametrize('data', PAIRS, indirect=True, ids=str)
def test_sums_at_once(data):
  """Of a row both in one loop; of what may be on several devices, apart."""
  x, dy, _, scale, bias = data
  run = jax.jit(functools.partial(gradients, True))

  def pairs(x):
    text = run.lower(x, dy, scale, bias).as_text()
    assert 'dot_general' not in text or x.size >= LARGE
    return len(re.findall(r'reduce\([^)]*\), \([^)]*\)', text))

  assert pairs(x) == 2
  assert 'dot_general' not in run.lower(x, dy, scale, bias).as_text()
  grid = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,))
  spec = P('d') if len(x) % 4 == 0 else P(None, 'd')
  assert pairs(jax.device_put(x, NamedSharding(grid, spec))) == 0
  assert pairs(x.astype(jnp.bfloat16)) == 1


@pytest.mark.parametrize(('width', 'parts'), [(1358, 0), (1540, 2)])
def test_long_rows_by_lanes(width, parts):
  """Both sums of the statistics, and both of their gradient."""
  x, scale = jnp.ones((3, width)), jnp.ones(width)
  run = jax.jit(functools.partial(gradients, True))
  text = run.lower(x, x, scale, scale).as_text()
  lanes = rf'reduce\([^)]*\), \([^)]*\).*: \(tensor<3x14x{width // 14}xf32>'
  assert len(re.findall(lanes, text)) == parts


@pytest.mark.parametrize('axis', [0, 1])
def test_nothing_is_gathered(data, axis):
  """Where `jit` places batch or sequence: one sum over devices, for both."""
  x, _, _, scale, bias = data
  grid = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,))
  spec = P(*[None] * axis, 'd')
  x = jax.ShapeDtypeStruct(
    (8, ROWS // 8, x.shape[-1]), np.float32, sharding=NamedSharding(grid, spec)
  )
  run = jax.jit(functools.partial(gradients, True))
  text = run.lower(x, x, scale, bias).compile().as_text()
  assert set(re.findall(r' (all-[a-z]+)(?:-start)?\(', text)) == {'all-reduce'}


@pytest.mark.parametrize('data', PRODUCTS, indirect=True, ids=str)
@pytest.mark.parametrize('center', [True, False])
def test_explicit_meshes(data, center):
  """Also where the sums are of bfloat16, about zero on some platforms."""
  x, dy, _, scale, bias = data
  x, dy = (jnp.asarray(a, jnp.bfloat16) for a in (x, dy))
  run = jax.jit(functools.partial(gradients, center))
  desired = run(x, dy, scale, bias)
  grid = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(grid):
    placed = [jax.device_put(a, NamedSharding(grid, P('d'))) for a in (x, dy)]
    found = run(*placed, scale, bias)
  assert jax.typeof(found[0]).sharding.spec[0] == 'd'
  for got, want in zip(found, desired, strict=True):
    largest = np.abs(want).max()
    pair = got / largest, want / largest
    is_close = np.isclose(*pair, 1e-7, 1e-5)
    assert is_close.mean() > 1 - 1e-4  # of a few the rounding falls elsewhere
    np.testing.assert_allclose(*pair, rtol=2.0**-7, atol=1e-5)
