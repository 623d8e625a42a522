"""Group norms on a CPU of groups that are no multiples of `sets.VECTOR`.

What is one number a group and what is one a channel are products of matrices
there, above `sets.SMALL` elements.
"""

import re

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

import normkit as nk
from normkit.sets import SMALL, VECTOR

GROUPS, EPSILON = 8, 1e-6
SHAPE = 4, 8, 8, 3 * GROUPS
OTHERS = {
  'multiples': (4, 8, 8, VECTOR * GROUPS),
  'of one channel': (16, 8, 8, GROUPS),
  'of two channels': (8, 8, 8, 2 * GROUPS),
  'small': (2, 8, 8, 3 * GROUPS),
}


def drawn(seed, shape, dtype=np.float32):
  """Means far from zero, which differ between groups."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape) * rng.uniform(0.5, 2, shape[-1])
  return np.asarray(x + rng.uniform(-9, 9, (shape[0], 1, 1, shape[-1])), dtype)


def parameters(channels):
  rng = np.random.default_rng(9)
  scale, bias = rng.uniform(-2, 2, (2, channels))
  return np.asarray(scale, np.float32), np.asarray(bias, np.float32)


def norm(x, scale, bias):
  options = {'num_groups': GROUPS, 'epsilon': EPSILON}
  return nk.group_norm(x, scale, bias, **options)


def step(x, dy, scale, bias):
  y, pull = jax.vjp(norm, x, scale, bias)
  return y, *pull(dy)


def exact_step(x, dy, scale, bias):
  """In float64; Wu and He (2018), derived by hand."""

  def in_groups(a):
    shape = *a.shape[:-1], GROUPS, -1
    return np.asarray(a, np.float64).reshape(shape)

  def mean(a):
    return a.mean((1, 2, 4), keepdims=True)

  x, dy, scale, bias = map(in_groups, (x, dy, scale, bias))
  d = x - mean(x)
  root = 1 / np.sqrt(mean(d**2) + EPSILON)
  h, g = d * root, dy * scale
  dx = root * (g - mean(g) - h * mean(g * h))
  y, *sums = h * scale + bias, (dy * h).sum((0, 1, 2)), dy.sum((0, 1, 2))
  return [a.reshape(*a.shape[:-2], -1) for a in (y, dx, *sums)]


def assert_close(found, desired, tolerance=2e-6):
  for got, want in zip(found, desired, strict=True):
    chex.assert_shape(got, want.shape)
    largest = np.abs(want).max()
    np.testing.assert_allclose(got / largest, want / largest, atol=tolerance)


class Steps(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_step(self):
    given = drawn(0, SHAPE), drawn(1, SHAPE), *parameters(SHAPE[-1])
    found = self.variant(step)(*given)
    chex.assert_tree_all_finite(found)
    assert_close(found, exact_step(*given))


def test_step_of_examples_apart():
  x, dy = (np.stack([drawn(i, SHAPE), drawn(i + 2, SHAPE)]) for i in range(2))
  given = parameters(SHAPE[-1])
  found = jax.jit(jax.vmap(step, (0, 0, None, None)))(x, dy, *given)
  for i in range(2):
    each = [a[i] for a in found]
    assert_close(each, exact_step(x[i], dy[i], *given))


def test_second_derivatives():
  """Along v, forward and backward over backward, by differences in float64."""
  x, dy, v = (drawn(i, SHAPE) for i in range(3))
  given = dy, *parameters(SHAPE[-1])

  @jax.jit
  def along(x, v):
    def dx(x):
      return step(x, *given)[1]

    return jax.jvp(dx, (x,), (v,))[1], jax.grad(lambda x: (dx(x) * v).sum())(x)

  size = 1e-5
  x, v = (np.asarray(a, np.float64) for a in (x, v))
  above, below = (exact_step(x + s * v, *given)[1] for s in (size, -size))
  want = (above - below) / (2 * size)
  assert_close(along(np.float32(x), np.float32(v)), [want, want], 2e-5)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_groups_apart(value):
  """What is not finite in one group of an example is in no other."""
  given = drawn(0, SHAPE), drawn(1, SHAPE), *parameters(SHAPE[-1])
  want = step(*given)[:2]
  for place in range(2):
    arrays = [a.copy() for a in given[:2]]
    arrays[place][1, 2, 3, 5] = value
    found = jax.jit(step)(*arrays, *given[2:])[:2]
    is_other = np.ones(SHAPE, bool)
    is_other[1, :, :, 3:6] = False
    for got, whole in zip(found, want, strict=True):
      np.testing.assert_array_equal(got[is_other], whole[is_other])
    assert not np.isfinite(found[place][1, :, :, 3:6]).all()


def products(run, *given):
  """The shapes of the matrices."""
  text = jax.jit(run).lower(*given).as_text()
  return set(re.findall(r'dot_general.*, tensor<(\w+)xf32>\)', text))


def test_products():
  """Of sums of channels, and of what is one number a group, to channels."""
  given = drawn(0, SHAPE), drawn(1, SHAPE), *parameters(SHAPE[-1])
  assert products(norm, given[0], *given[2:]) == {'3x2', '2x3'}
  assert products(step, *given) == {'3x2', '2x3'}


@pytest.mark.parametrize('shape', OTHERS.values(), ids=OTHERS)
def test_no_products(shape):
  assert (np.prod(shape) > SMALL) == (shape != OTHERS['small'])
  given = drawn(0, shape), drawn(1, shape), *parameters(shape[-1])
  assert products(step, *given) == set()


def test_channels_first():
  x, parameter = drawn(0, SHAPE), parameters(SHAPE[-1])
  want = exact_step(x, x, *parameter)[:1]

  def run(x):
    options = {'num_groups': GROUPS, 'axis': 1, 'epsilon': EPSILON}
    return nk.group_norm(x, *parameter, **options)

  x = np.moveaxis(x, -1, 1)
  assert products(run, x) == set()
  assert_close([np.moveaxis(jax.jit(run)(x), 1, -1)], want)


@pytest.mark.parametrize('axis', [0, 1, 3])
@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_meshes(axis, kind):
  """Of several devices XLA knows better where a part of a group is."""
  given = drawn(0, SHAPE), drawn(1, SHAPE), *parameters(SHAPE[-1])
  mesh = jax.make_mesh((4,), ('d',), axis_types=(kind,))
  spec = P(*[None] * axis, 'd')
  with jax.set_mesh(mesh):
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in given[:2]]
    assert products(step, *placed, *given[2:]) == set()
    found = jax.jit(step)(*placed, *given[2:])
  assert_close(found, exact_step(*given))


def test_devices_apart():
  """In `shard_map`, whose parts are programs of one device."""
  given = drawn(0, SHAPE), drawn(1, SHAPE), *parameters(SHAPE[-1])
  mesh = jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,))
  x = drawn(0, (16, *SHAPE[1:])), drawn(1, (16, *SHAPE[1:]))
  specs = P('d'), P('d'), P(), P()
  run = jax.shard_map(
    step, mesh=mesh, in_specs=specs, out_specs=(P('d'), P('d'), P(), P())
  )
  assert products(run, *x, *given[2:])
  assert_close(jax.jit(run)(*x, *given[2:]), exact_step(*x, *given[2:]))


def test_in_half_precision():
  given = drawn(0, SHAPE), drawn(1, SHAPE), *parameters(SHAPE[-1])
  x, dy = (jnp.asarray(a, jnp.bfloat16) for a in given[:2])
  found = jax.jit(step)(x, dy, *given[2:])
  chex.assert_type(found, [jnp.bfloat16] * 2 + [jnp.float32] * 2)
  wide = [np.asarray(a, np.float64) for a in (x, dy)]
  found = [np.asarray(a, np.float32) for a in found]
  assert_close(found, exact_step(*wide, *given[2:]), 2.0**-8)


def test_groups_of_tokens():
  """Of channels alone, and without a mean."""
  x = drawn(0, SHAPE).reshape(-1, SHAPE[-1])

  def run(x):
    return nk.gated_rms_norm(x, None, group_size=3, epsilon=EPSILON)

  assert products(run, x)
  parts = np.asarray(x, np.float64).reshape(-1, GROUPS, 3)
  root = 1 / np.sqrt((parts**2).mean(-1, keepdims=True) + EPSILON)
  assert_close([jax.jit(run)(x)], [(parts * root).reshape(x.shape)])
