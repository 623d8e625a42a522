"""Any shape, axes, groups, mask and dtype: every norm against its reference."""

from cases import draw as numbers, precision
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiers import second_tier

import normkit as nk

EPSILON = 1e-3
DTYPES = 'bfloat16', 'float16', 'float32', 'float64', 'complex64', 'complex128'


def axes(draw, among, least=1, left=0):
  """Some of the axes, in any order; `left` of them are not taken."""
  order = draw(st.permutations(among))
  return order[: draw(st.integers(least, len(among) - left))]


def signed(draw, some, ndim):
  """Some axes, each counted from the start or the end."""
  return tuple(a - draw(st.sampled_from((0, ndim))) for a in some)


def batch_norm(draw, shape):
  ndim = len(shape)
  axis = signed(draw, axes(draw, range(ndim), left=1), ndim)
  average = draw(
    st.sampled_from([{}, {'momentum': None}, {'momentum': 0.9, 'debias': True}])
  ) | {'unbiased': draw(st.booleans())}
  return (
    nk.BatchNorm(axis=axis, epsilon=EPSILON, check_batch=False, **average),
    reference.batch_norm(axis, EPSILON, **average),
  )


def layer_norm(draw, shape):
  axis = signed(draw, axes(draw, range(len(shape))), len(shape))
  return (
    nk.LayerNorm(axis=axis, epsilon=EPSILON),
    reference.layer_norm(axis, EPSILON),
  )


def rms_norm(draw, shape):
  axis = signed(draw, axes(draw, range(len(shape))), len(shape))
  return (
    nk.RMSNorm(axis=axis, epsilon=EPSILON),
    reference.rms_norm(axis, EPSILON),
  )


def group_norm(draw, shape):
  ndim = len(shape)
  channel, *others = draw(st.permutations(range(ndim)))
  divisors = [n for n in range(1, 5) if shape[channel] % n == 0]
  groups = draw(st.sampled_from(divisors))
  (axis,) = signed(draw, [channel], ndim)
  batch = signed(draw, axes(draw, others, least=0), ndim)
  return (
    nk.GroupNorm(
      num_groups=groups, axis=axis, batch_axis=batch, epsilon=EPSILON
    ),
    reference.group_norm(groups, axis, batch, EPSILON),
  )


def instance_norm(draw, shape):
  ndim = len(shape)
  kept = axes(draw, range(ndim), left=1)
  channels = draw(st.integers(1, len(kept)))
  axis = signed(draw, kept[:channels], ndim)
  batch = signed(draw, kept[channels:], ndim)
  return (
    nk.InstanceNorm(axis=axis, batch_axis=batch, epsilon=EPSILON),
    reference.instance_norm(axis, batch, EPSILON),
  )


def values(draw, shape):
  """Any numbers, with ties and constant sets; complex ones are not real."""
  elements = st.floats(-8, 8, width=16)
  x = draw(hnp.arrays(np.float32, shape, elements=elements))
  dtype = draw(st.sampled_from(DTYPES))
  return (x + 1j * np.flip(x) if dtype.startswith('complex') else x), dtype


def masks(draw, shape):
  """No mask, or one of fewer axes or of axes of size one."""
  if draw(st.booleans()):
    return None
  mask = [draw(st.sampled_from((1, n))) for n in shape]
  mask = mask[draw(st.integers(0, len(shape))) :]
  return draw(hnp.arrays(bool, tuple(mask)))


def assert_close(y, desired, error):
  """Within the error of the statistics and the rounding of the output."""
  error = error + float(jnp.finfo(y.dtype).eps) * np.abs(desired)
  difference = np.abs(reference.wide(y) - desired)
  assert y.shape == desired.shape
  assert (difference <= error).all(), (difference, error)


@pytest.mark.parametrize(
  ('norm', 'least_axes'),
  [
    (layer_norm, 1),
    second_tier(batch_norm, 2),
    second_tier(rms_norm, 1),
    second_tier(group_norm, 1),
    second_tier(instance_norm, 2),
  ],
)
@given(data=st.data())
def test_any_input(norm, least_axes, data):
  shape = data.draw(
    hnp.array_shapes(min_dims=least_axes, max_dims=4, max_side=4)
  )
  transform, of = norm(data.draw, shape)
  x, dtype = values(data.draw, shape)
  where = masks(data.draw, shape)
  with precision(dtype):
    x = jax.device_put(x.astype(jnp.dtype(dtype)))
    params, _ = jax.eval_shape(transform.init, x)
    params = jax.tree.map(lambda p: numbers(p.shape), params)

    @jax.jit
    def apply(x, where):
      _, state = transform.init(x)
      y, new = transform.apply(params, state, x, train=True, where=where)
      z, _ = transform.apply(params, new, x, train=False, where=where)
      return state, y, new, z

    state, y, new, z = apply(x, where)
    rounding = 64 * float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)
  assert y.dtype == z.dtype == dtype

  _, var, _ = of.moments(reference.wide(x), where)
  size = (
    rounding * 8 * max(1, *(np.abs(p).max() for p in jax.tree.leaves(params)))
  )
  desired, desired_state = of(params, state, x, True, where)
  assert_close(y, desired, size / np.sqrt(var + EPSILON))
  if new:
    for actual, value in zip(new, desired_state, strict=True):
      np.testing.assert_allclose(
        actual, value, rtol=rounding, atol=64 * rounding
      )
    var = of.expand(new.var, None, len(shape))
  desired, _ = of(params, new, x, False, where)
  assert_close(z, desired, size / np.sqrt(var + EPSILON))
