"""Norms of eight bits: against float64 and the nearest numbers there are."""

from functools import partial

from cases import draw
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import normkit as nk

LIMITS = {'float8_e4m3fn': 448.0, 'float8_e5m2': 57344.0}
NORMS = {'rms': nk.quantized_rms_norm, 'layer': nk.quantized_layer_norm}
norms = pytest.mark.parametrize('norm', NORMS.values(), ids=NORMS)
EXAMPLES = 16, 3, 40


def given(norm, dtype='float32', seed=0):
  x = np.asarray(draw(EXAMPLES, dtype, seed)) * np.asarray(3, dtype)
  count = 2 if norm is nk.quantized_layer_norm else 1
  return x, *(draw((40,), seed=seed + i + 1) for i in range(count))


def exact(norm, x, scale, bias=0.0, offset=0.0, epsilon=1e-6):
  x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
  if norm is nk.quantized_layer_norm:
    x = x - x.mean(-1, keepdims=True)
  root = np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
  return x / root * (scale + offset) + bias


def nearest(y, dtype):
  """As NumPy's numbers of eight bits round, kept within them."""
  limit = LIMITS[dtype]
  return np.clip(y, -limit, limit).astype(np.dtype(dtype))


def assert_nearest(q, y, dtype):
  """The nearest number, or one beside it where y lies between two."""
  want = nearest(y, dtype)
  assert q.dtype == want.dtype and q.shape == y.shape
  differs = np.asarray(q).view(np.int8) != want.view(np.int8)
  assert differs.mean() < 2e-3
  below, above = (nearest(y * (1 + s * 1e-5), dtype) for s in (-1, 1))
  found = np.asarray(q, np.float32)
  assert np.all((found == np.float32(below)) | (found == np.float32(above)))


@norms
@pytest.mark.parametrize('dtype', LIMITS)
@pytest.mark.parametrize('of', ['float32', 'bfloat16'])
def test_a_scale_a_row(norm, dtype, of):
  args = given(norm, of)
  q, s = jax.jit(partial(norm, dtype=jnp.dtype(dtype)))(*args)
  y = exact(norm, *args)
  want = np.abs(y).max(-1, keepdims=True) / LIMITS[dtype]
  assert s.dtype == jnp.float32
  np.testing.assert_allclose(s, want, rtol=2e-6)
  assert_nearest(q, y / np.asarray(s, np.float64), dtype)
  largest = np.abs(np.asarray(q, np.float32)).max(-1)
  np.testing.assert_array_equal(largest, LIMITS[dtype])
  error = np.asarray(q, np.float64) * np.asarray(s) - y
  share = 2.0**-4 if dtype == 'float8_e4m3fn' else 2.0**-3
  least = np.finfo(np.float32).eps + np.asarray(s) * 2.0**-9
  assert np.all(np.abs(error) <= np.abs(y) * share + least)


@norms
@pytest.mark.parametrize('shape', [(), (1,), (3, 1), (16, 1, 1), (40,)])
def test_given_scales(norm, shape):
  """Beyond them the largest number, where a cast would give NaN."""
  args = given(norm)
  steps = np.float32(np.abs(draw(shape, seed=7)) * 0.004 + 0.001)
  q, s = jax.jit(norm)(*args, quantization_scale=steps)
  np.testing.assert_array_equal(s, steps)
  y = exact(norm, *args) / np.asarray(steps, np.float64)
  assert np.abs(y).max() > 448
  assert_nearest(q, y, 'float8_e4m3fn')
  assert np.isnan(np.float32(y.astype(ml_dtypes.float8_e4m3fn))).any()


@norms
def test_conventions(norm):
  """An offset, an order of rounding, several axes."""
  x, scale, *bias = given(norm, 'bfloat16')
  options = {'scale_offset': 1.0}
  y = exact(norm, x, scale, *bias, offset=1.0)
  q, s = jax.jit(partial(norm, **options))(x, scale, *bias)
  assert_nearest(q, y / np.asarray(s, np.float64), 'float8_e4m3fn')
  plain = nk.layer_norm if norm is nk.quantized_layer_norm else nk.rms_norm
  plain = partial(plain, axis=(-2, -1), dtype=jnp.float32)
  (q, s), y = jax.jit(lambda x: (norm(x, axis=(-2, -1)), plain(x)))(x)
  y = np.asarray(y, np.float64)
  assert s.shape == (16, 1, 1)
  assert_nearest(q, y / np.asarray(s, np.float64), 'float8_e4m3fn')


def test_rounding_before_the_scale():
  x, scale = draw((64, 40), 'bfloat16'), draw((40,), 'bfloat16', seed=1)
  q, s = nk.quantized_rms_norm(x, scale, round_before_scale=True)
  y = nk.rms_norm(x, scale, round_before_scale=True)  # each a bfloat16
  assert_nearest(q, np.float64(y) / np.float64(s), 'float8_e4m3fn')
  other, _ = nk.quantized_rms_norm(x, scale)
  assert np.any(np.float32(other) != np.float32(q))


@norms
def test_rows_of_zeros_and_near_them(norm):
  x = jnp.zeros((3, 8)).at[1, 0].set(1e-30).at[2].set(draw((8,)))
  q, s = norm(x, epsilon=1e-6)
  assert np.all(np.float32(q[0]) == 0) and s[0] == 1
  assert np.isfinite(np.float32(q)).all() and np.all(np.asarray(s) > 0)
  bad = x.at[0, 0].set(jnp.nan)
  q, s = norm(bad)
  assert np.isnan(np.float32(q[0])).all() and np.isnan(s[0, 0])
  np.testing.assert_array_equal(np.float32(norm(x)[0][2]), np.float32(q[2]))


@norms
def test_no_gradient(norm):
  x, *params = given(norm)

  def loss(x):
    q, s = norm(x, *params)
    return jnp.sum(q.astype(jnp.float32) * s)

  assert not np.any(jax.jit(jax.grad(loss))(x))


@norms
def test_errors(norm):
  x = jnp.ones((3, 8))
  for dtype in jnp.int8, jnp.bfloat16, jnp.float8_e4m3:
    with pytest.raises(TypeError, match='dtype must be float8_e4m3fn'):
      norm(x, dtype=dtype)
  with pytest.raises(TypeError, match='x must be real'):
    norm(x.astype(jnp.complex64))
  with pytest.raises(ValueError, match=r'quantization_scale of shape \(2, 1\)'):
    norm(x, quantization_scale=jnp.ones((2, 1)))
