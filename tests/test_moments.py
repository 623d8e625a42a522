"""Moments against float64: accuracy, masks, dtypes, derivatives."""

from functools import partial

import chex
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import thinned

from benchmarks.accuracy import about_a_sample, about_the_mean
import normkit as nk
from normkit.affine import Arguments, affine
from normkit.centred import (
  Centred,
  _zero,
  about,
  centred,
  counts,
)
from normkit.sets import Sets

UNIT = 2.0**-24


def exact(x, axis, where=True):
  """Mean, variance and count in float64, two passes."""
  x = np.asarray(x)
  wide = x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)
  count = np.sum(np.broadcast_to(where, wide.shape), axis, keepdims=True)
  size = np.maximum(count, 1)
  mean = np.sum(wide, axis, keepdims=True, where=where) / size
  spread = np.abs(wide - mean) ** 2
  return mean, np.sum(spread, axis, keepdims=True, where=where) / size, count


def public(x, axis):
  return centred(x, (axis % x.ndim,))


def naive(x, axis):
  """E[x^2] - E[x]^2: what these tests must catch."""
  mean = jnp.mean(x, axis, keepdims=True)
  var = jnp.maximum(jnp.mean(x * x, axis, keepdims=True) - mean * mean, 0)
  return Centred(mean, jnp.zeros_like(mean), var, jnp.ones_like(mean))


def errors(form, x, axis):
  """Relative error of the variance, and of the output in its std."""
  mean, var, _ = exact(x, axis)
  epsilon = np.float32(1e-6 * var.max())
  stats, y = jax.device_get(moments_and_output(form, x, axis, epsilon))
  wanted = (x.astype(np.float64) - mean) / np.sqrt(var + epsilon)
  return np.abs(stats.var / var - 1).max(), np.abs(y - wanted).max()


@partial(jax.jit, static_argnums=(0, 2))
def moments_and_output(form, x, axis, epsilon):
  stats = form(x, axis)
  options = Arguments(None, None, epsilon, None, x.dtype, x.dtype)
  return stats, affine(x, stats, options)


def normal(shape, ratio, scale=1.0, seed=0):
  values = np.random.default_rng(seed).standard_normal(shape) + ratio
  return (values * scale).astype(np.float32)


FORMS = (public, about_the_mean, about_a_sample)


@pytest.mark.parametrize(
  ('form', 'ratio', 'sets', 'scale'),
  thinned(
    FORMS,
    [0, 1e2, 1e3, 1e4, 1e5],
    [((512, 16), -1), ((64, 768), -1), ((2, 65_536), -1), ((100_000, 3), 0)],
    [1e-15, 1.0, 1e15],
    every=3,
  ),
)
def test_accuracy(form, ratio, sets, scale):
  """1e-6 of the variance, and of the output, whatever the mean: the aim."""
  shape, axis = sets
  var, y = errors(form, normal(shape, ratio, scale), axis)
  assert var < 1e-6
  assert y < 4e-6


@pytest.mark.parametrize('ratio', [1e3, 1e4, 1e5])
def test_accuracy_test_can_fail(ratio):
  var, y = errors(naive, normal((64, 768), ratio), -1)
  assert var > 1e-2
  assert y > 1e-2


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('outlier', [1e1, 1e4, 1e8])
@pytest.mark.parametrize('everywhere', [False, True])
def test_any_sample_will_do(form, outlier, everywhere):
  """The sample may miss all there is, or hold all that is strange."""
  x = np.ones((2, 4096), np.float32)
  x[:, : 4096 // 32 if everywhere else 1] = outlier
  var, _ = errors(form, x, -1)
  assert var < 1e-5


@partial(jax.jit, static_argnums=1)
def about_zero(x, axis):
  sets, count = Sets((axis % 2,)), np.full((1, 1), x.shape[axis], np.float32)
  return about(_zero(x, count, sets, jnp.float32), x, count, sets)


@pytest.mark.parametrize(
  ('ratio', 'sets'),
  thinned(
    [0, 10, 100, 256],
    [((64, 768), -1), ((100_000, 3), 0), ((1_000_000, 2), 0)],
    every=2,
  ),
)
def test_bfloat16_on_accelerators(ratio, sets):
  """The form that GPU and TPU take: it loses less than the rounding of x."""
  shape, axis = sets
  x = normal(shape, ratio)
  half = jax.device_put(np.asarray(x, jnp.bfloat16))
  _, _, var = about_zero(half, axis)
  before, after = (exact(a, axis)[1] for a in (x, half))
  lost = np.abs(after / before - 1).max()
  assert np.abs(np.asarray(var) / after - 1).max() <= max(1e-6, lost / 8)


@partial(jax.jit, static_argnums=0)
def moments_and_gradient(form, x):
  norm = partial(nk.layer_norm, epsilon=0.0)
  return form(x, -1), jax.grad(lambda x: norm(x).sum())(x)


@pytest.mark.parametrize(
  ('form', 'value', 'count'),
  thinned(
    FORMS, [0.0, 1.0, 0.1, 4096.3, 1e-30, 1e15], [1, 2, 17, 1000], every=5
  ),
)
def test_constant_rows(form, value, count):
  """No negative variance, no NaN, a finite gradient."""
  x = np.full((3, count), value, np.float32)
  stats, dx = jax.device_get(moments_and_gradient(form, x))
  np.testing.assert_allclose(stats.pivot + stats.offset, x[:, :1], rtol=2e-7)
  assert (stats.var >= 0).all()
  assert (stats.var <= (2e-7 * value) ** 2).all()
  chex.assert_tree_all_finite(dx)


@pytest.mark.parametrize('place', [(0, 0, 0), (1, 7, 3)])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite(place, value):
  """It is the mean of its channel, be it of the pivot's sample or not."""
  x = np.ones((2, 8, 8, 3), np.float32)
  x[*place, 1] = value
  mean, var, _ = jax.jit(nk.moments, static_argnums=1)(x, (0, 1, 2))
  np.testing.assert_array_equal(mean, [1, value, 1])
  np.testing.assert_array_equal(var, [0, np.nan, 0])


@pytest.mark.parametrize('of', [float, jnp.asarray], ids=['number', 'array'])
def test_nan_shows_without_epsilon(of):
  """In all of its row: zeros would hide it."""
  x = normal((3, 8), 5.0)
  desired = x / np.sqrt(np.mean(x * x, -1, keepdims=True))
  x[1, 0] = desired[1] = np.nan
  y, pull = jax.vjp(partial(nk.rms_norm, epsilon=of(0.0)), x)
  np.testing.assert_allclose(y, desired, rtol=1e-6)
  np.testing.assert_array_equal(np.isnan(pull(y)[0]), np.isnan(desired))


@jax.jit
def some_steps(x):
  """The variance, and of batch norm the output after three steps."""
  bn = nk.BatchNorm(momentum=0.999)
  params, state = bn.init(x)

  def step(state, _):
    return bn.apply(params, state, x, train=True)[::-1]

  state, _ = jax.lax.scan(step, state, length=3)
  y, _ = bn.apply(params, state, x, train=False)
  return nk.moments(x, -1, keepdims=True).var, y, state


@pytest.mark.parametrize(
  ('mean', 'std'), [(4096.0, 1.0), (4096.0, 0.01), (300.0, 300.0)]
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_peers_defects(mean, std, dtype):
  """Inputs on which peers give NaN, zeros or outputs of std 988.

  Flax's layer norm on N(4096, 1), Haiku's batch norm on N(4096, 0.01) and on
  float16 with a deviation of 300.
  """
  x = np.asarray(normal((64, 512), mean / std, std), dtype)
  found, y, state = jax.device_get(some_steps(x))
  np.testing.assert_allclose(found, exact(x, -1)[1], rtol=1e-5, atol=1e-30)
  assert (state.var >= 0).all()
  chex.assert_tree_all_finite((np.asarray(y, np.float32), state))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('mean', [0.0, 100.0])
def test_half_precision_loses_only_its_rounding(dtype, mean):
  x = jax.device_put(np.asarray(normal((128, 256), mean), dtype))
  stats = nk.moments(x, -1, keepdims=True)
  assert stats.mean.dtype == stats.var.dtype == jnp.float32
  mean, var, _ = exact(x.astype(jnp.float32), -1)
  np.testing.assert_allclose(stats.mean, mean, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(stats.var, var, rtol=1e-6)


@pytest.mark.parametrize('given', ['bfloat16', 'float32', 'float64'])
@pytest.mark.parametrize('wanted', ['float32', 'float64'])
def test_dtype_of_statistics(given, wanted):
  """Narrower than x, too, and with a derivative."""
  with jax.enable_x64(True):
    x = np.asarray(normal((8, 64), 3.0), given)

    def var(x):
      stats = nk.moments(x, -1, dtype=wanted)
      return stats.var.sum(), stats

    dx, stats = jax.jit(jax.grad(var, has_aux=True))(x)
    assert {s.dtype for s in stats} == {jnp.dtype(wanted)}
    assert dx.dtype == x.dtype


@pytest.mark.parametrize('axis', [0, -1, (0, 2), (-1, 0), (0, 1, 2)])
@pytest.mark.parametrize('keepdims', [False, True])
def test_shapes(axis, keepdims):
  x = normal((4, 3, 5), 2.0)
  stats = nk.moments(x, axis, keepdims=keepdims)
  shape = np.sum(x, axis, keepdims=keepdims).shape
  chex.assert_shape(stats, shape)
  wanted = (s.reshape(shape) for s in exact(x, axis)[:2])
  chex.assert_trees_all_close(tuple(stats[:2]), tuple(wanted), rtol=1e-5)
  np.testing.assert_array_equal(stats.count, x.size // max(1, np.prod(shape)))


@given(
  x=hnp.arrays(
    np.float32,
    st.sampled_from([(3, 4), (2, 3, 4), (40, 2)]),
    elements=st.floats(-1e4, 1e4, width=32),
  ),
  axis=st.integers(-2, 1),
  data=st.data(),
)
def test_moments_of_anything(x, axis, data):
  broadcast = data.draw(st.tuples(*(st.sampled_from([1, n]) for n in x.shape)))
  where = data.draw(hnp.arrays(bool, broadcast))
  stats = nk.moments(x, axis, where=where, keepdims=True)
  mean, var, count = exact(x, axis, where)
  np.testing.assert_array_equal(stats.count, count)
  np.testing.assert_allclose(stats.mean, mean, rtol=1e-5, atol=1e-6 * 1e4)
  tolerance = 1e-6 * np.abs(x).max() ** 2
  np.testing.assert_allclose(stats.var, var, rtol=1e-5, atol=tolerance)
  assert (stats.var >= 0).all()


def test_complex_and_double():
  z = normal((5, 64), 3.0) + 1j * normal((5, 64), -2.0, seed=1)
  stats = nk.moments(z.astype(np.complex64), -1, keepdims=True)
  mean, var, _ = exact(z, -1)
  assert stats.mean.dtype == jnp.complex64
  assert stats.var.dtype == jnp.float32
  np.testing.assert_allclose(stats.mean, mean, rtol=1e-6)
  np.testing.assert_allclose(stats.var, var, rtol=1e-6)
  with jax.enable_x64(True):
    x = normal((5, 64), 1e8).astype(np.float64)
    stats = nk.moments(jnp.asarray(x), -1, keepdims=True)
    assert stats.var.dtype == jnp.float64
    np.testing.assert_allclose(stats.var, exact(x, -1)[1], rtol=1e-12)
    assert nk.moments(jnp.ones(3), 0, dtype=jnp.float64).var.dtype == 'float64'


def test_dtype_cannot_drop_the_imaginary_part():
  with pytest.raises(TypeError, match='cannot hold the complex'):
    nk.moments(jnp.ones(3, jnp.complex64), 0, dtype=jnp.float32)


@jax.jit
def pulled(x, where):
  """A gradient through the moments, and they."""

  def total(x):
    stats = nk.moments(x, -1, where=where)
    return jnp.sum(jnp.sin(stats.mean) + stats.var), stats

  return jax.grad(total, has_aux=True)(x)


@pytest.mark.parametrize('strange', [np.nan, np.inf, -np.inf, 3e38])
def test_masked_values_do_nothing(strange):
  x = normal((6, 32), 5.0)
  where = np.random.default_rng(1).random((6, 32)) < 0.7
  where[0] = False
  spoilt = np.where(where, x, np.float32(strange))

  wanted, got = (jax.device_get(pulled(v, where)) for v in (x, spoilt))
  chex.assert_trees_all_equal(got, wanted)
  assert not got[0][~where].any()
  assert (got[1].count[0], got[1].mean[0], got[1].var[0]) == (0, 0, 0)


@pytest.mark.parametrize(
  ('masked', 'shape'), thinned([False, True], [(4, 24), (24, 4)], every=2)
)
def test_derivatives(masked, shape):
  """First and second, forward and reverse, against the closed forms."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    x, dx, ddx = rng.standard_normal((3, *shape))
    where = rng.random(shape) < 0.6 if masked else np.ones(shape, bool)
    axis, count = 1, where.sum(1, keepdims=True)

    def var(x):
      return nk.moments(x, axis, where=where).var

    mean, _, _ = exact(x, axis, where)
    first = np.sum(2 * (x - mean) * dx * where / count, axis)
    shift = np.sum(dx * where / count, axis, keepdims=True)
    second = np.sum(2 * (dx - shift) * ddx * where / count, axis)
    got = jax.jit(lambda x: jax.jvp(var, (x,), (dx,))[1])(x)
    np.testing.assert_allclose(got, first, rtol=1e-10, atol=1e-12)
    pulled = jax.jit(jax.grad(lambda x: var(x).sum()))(x)
    np.testing.assert_allclose(
      pulled, 2 * (x - mean) * where / count, rtol=1e-10, atol=1e-12
    )

    def along(x):
      return jax.jvp(var, (x,), (dx,))[1]

    got = jax.jit(lambda x: jax.jvp(along, (x,), (ddx,))[1])(x)
    np.testing.assert_allclose(got, second, rtol=1e-10, atol=1e-12)
    gradient = jax.grad(lambda x: var(x).sum())
    got = jax.jit(lambda x: jax.jvp(gradient, (x,), (dx,))[1])(x)
    np.testing.assert_allclose(
      got, 2 * (dx - shift) * where / count, rtol=1e-10, atol=1e-12
    )


def test_transformations():
  x = normal((3, 4, 50), 7.0)
  one = partial(nk.moments, axis=-1)
  wanted = one(x)
  chex.assert_trees_all_close(jax.vmap(one)(x), wanted, rtol=1e-6)
  chex.assert_trees_all_close(jax.jit(one)(x), wanted, rtol=1e-6)
  chex.assert_trees_all_close(jax.lax.map(one, x), wanted, rtol=1e-6)
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(one, x), wanted)


def test_a_mask_of_size_one_over_many_elements():
  """More than an int32 counts; nothing of that size is made."""
  x = jax.ShapeDtypeStruct((2**17, 2**16, 2), jnp.float32)
  where = jnp.array([[[True, False]]])
  sets = Sets((0, 1))
  count = jax.jit(lambda where: counts(x, sets, where, jnp.float32))(where)
  np.testing.assert_array_equal(count, [[[2.0**33, 0]]])


def test_nothing_to_reduce():
  for axis in 0, (0, 1):
    with pytest.raises(ValueError, match='no elements along'):
      nk.moments(jnp.ones((0, 3)), axis)


def test_groups_of_members():
  x, groups = normal((4, 5), 2.0), [[0, 3, 1], [2]]
  options = {'axis_name': 'i', 'axis_index_groups': groups}
  run = jax.vmap(partial(nk.moments, axis=0, **options), axis_name='i')
  found = jax.device_get(jax.jit(run)(x))
  for group in groups:
    wanted = [np.squeeze(s) for s in exact(x[np.array(group)], (0, 1))]
    for got, want in zip(found, wanted, strict=True):
      np.testing.assert_allclose(got[np.array(group)], want, rtol=1e-5)
