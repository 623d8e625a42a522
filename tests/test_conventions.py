"""Scale offsets and rounding before the scale: functions, drop-ins, maths."""

from cases import draw, draw_mask
import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory import kept
from tiers import thinned

import normkit as nk
from normkit import affine
import normkit.linen
import normkit.nnx

KEY, SHAPE = jax.random.key(0), (5, 4, 6)
# A class, its options, and the same as a function.
ROWS = {
  'rms_offset': ('RMSNorm', {'scale_offset': 1.0}, nk.rms_norm),
  'rms_rounds': ('RMSNorm', {'round_before_scale': True}, nk.rms_norm),
  'rms_both': (
    'RMSNorm',
    {'scale_offset': 0.5, 'round_before_scale': True},
    nk.rms_norm,
  ),
  'layer_offset': ('LayerNorm', {'scale_offset': 1.0}, nk.layer_norm),
}
each = pytest.mark.parametrize(
  ('name', 'options', 'function'), ROWS.values(), ids=ROWS
)


@each
def test_modules(name, options, function):
  """linen, nnx and the transform compute what the function does."""
  x, where = draw(SHAPE, jnp.bfloat16), draw_mask(SHAPE)
  transform = getattr(nk, name)(**options)
  params, state = transform.init(x)
  params = params._replace(scale=draw((6,), seed=1))
  biases = {} if params.bias is None else {'bias': params.bias}
  linen = getattr(normkit.linen, name)(dtype=jnp.bfloat16, **options)
  layer = getattr(normkit.nnx, name)(
    6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options
  )
  layer.scale[...] = params.scale
  want = function(x, *filter_none(params), where=where, **options)
  assert want.dtype == jnp.bfloat16
  variables = {'params': {'scale': params.scale, **biases}}
  found = (
    transform.apply(params, state, x, train=True, where=where)[0],
    linen.apply(variables, x, mask=where),
    layer(x, mask=where),
  )
  for y in found:
    np.testing.assert_array_equal(y, want)
  plain = function(x, *filter_none(params), where=where)
  assert not np.array_equal(want, plain)


def filter_none(params):
  return [p for p in params if p is not None]


@pytest.mark.parametrize('name', ['RMSNorm', 'LayerNorm'])
@pytest.mark.parametrize('offset', [0.0, 1.0, 0.25])
def test_a_scale_of_one_at_first(name, offset):
  """What is drawn is 1 - offset, but for an initializer that is given."""
  x = draw(SHAPE)
  linen, layers = getattr(normkit.linen, name), getattr(normkit.nnx, name)

  def drawn(**options):
    layer = layers(6, rngs=nnx.Rngs(0), scale_offset=offset, **options)
    variables = linen(scale_offset=offset, **options).init(KEY, x)
    scale = variables['params']['scale']
    np.testing.assert_array_equal(scale, layer.scale[...])
    return np.asarray(scale)

  np.testing.assert_array_equal(drawn(), np.full(6, 1 - offset))
  given = nn.initializers.constant(3.0)
  np.testing.assert_array_equal(drawn(scale_init=given), np.full(6, 3))
  transform = getattr(nk, name)(scale_offset=offset)
  np.testing.assert_array_equal(transform.init(x)[0].scale, drawn())


def test_offset_of_no_number_is_refused():
  x = draw(SHAPE)
  for make in (
    lambda: normkit.nnx.RMSNorm(6, scale_offset='1', rngs=nnx.Rngs(0)),
    lambda: normkit.linen.LayerNorm(scale_offset='1').init(KEY, x),
    lambda: nk.rms_norm(x, scale_offset='1'),
    lambda: nk.RMSNorm(scale_offset='1'),
  ):
    with pytest.raises(TypeError, match='scale_offset must be'):
      make()
  for make in (
    lambda: normkit.linen.RMSNorm(round_before_scale=1).init(KEY, x),
    lambda: nk.rms_norm(x, round_before_scale=1),
    lambda: nk.RMSNorm(round_before_scale=1),
  ):
    with pytest.raises(TypeError, match='round_before_scale must be'):
      make()
  with pytest.raises(NotImplementedError, match='rounding before'):
    nk.rms_norm(x, round_before_scale=True, implementation='triton')
  with pytest.raises(NotImplementedError, match='rounding before'):
    nk.add_rms_norm(x, x, round_before_scale=True, implementation='triton')
  with pytest.raises(TypeError, match='scale_offset must be'):
    nk.add_layer_norm(x, x, scale_offset='1')


def test_the_offset_is_added_in_float32():
  """1 + 2**-9 is 1 in bfloat16."""
  x, w = jnp.ones((1, 4)), jnp.full(4, 2.0**-9, jnp.bfloat16)
  y = nk.rms_norm(x, w, scale_offset=1.0, epsilon=0.0)
  np.testing.assert_array_equal(y, np.full((1, 4), 1 + 2.0**-9))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('size', [1e-9, 1e-6, 1e-3, 1.0, 100.0])
def test_rounded(dtype, size):
  """As a cast rounds, below the least normal number too."""
  x = draw((1000,)) * size
  want = np.asarray(x).astype(dtype).astype(np.float32)
  run = jax.jit(lambda x: affine.rounded(x, dtype))
  np.testing.assert_array_equal(run(x), want)
  y, dy = jax.jvp(run, (x,), (x,))
  np.testing.assert_array_equal(dy, x)
  assert size < 1e-6 or not np.array_equal(y, x)


ADDED = {
  'rms_offset': (nk.add_rms_norm, {'scale_offset': 1.0}),
  'rms_rounds': (nk.add_rms_norm, {'round_before_scale': True}),
  'rms_both': (
    nk.add_rms_norm,
    {'scale_offset': 0.5, 'round_before_scale': True},
  ),
  'layer_offset': (nk.add_layer_norm, {'scale_offset': 1.0}),
}


def steps_of_sum(x, residual, w, center, offset=0.0, rounds=False):
  """In NumPy, of bfloat16; the sum as `round_before_scale` has it."""
  total = np.asarray(x, np.float64) + np.asarray(residual, np.float64)
  n = np.float64(total.astype(x.dtype)) if rounds else total
  n = n - (n.mean(-1, keepdims=True) if center else 0)
  n = np.float32(n / np.sqrt(np.square(n).mean(-1, keepdims=True) + 1e-6))
  n = n.astype(x.dtype).astype(np.float32) if rounds else n
  return n * (np.float32(w) + np.float32(offset)), total.astype(x.dtype)


@pytest.mark.parametrize(
  ('added', 'dtype', 'array'),
  thinned(ADDED, [None, jnp.float32], [False, True], every=2, keep=2),
)
def test_sums(added, dtype, array):
  """Bit for bit but for a few: the sum is rounded where the rest is."""
  add, options = ADDED[added]
  x, residual = (draw((64, 40), jnp.bfloat16, seed=i) for i in range(2))
  w = draw((40,), jnp.bfloat16, seed=2)
  epsilon = jnp.float32(1e-6) if array else 1e-6
  run = jax.jit(lambda *a: add(*a, dtype=dtype, epsilon=epsilon, **options))
  y, total = run(x, residual, w)
  rounds = options.get('round_before_scale', False)
  want, sums = steps_of_sum(
    x,
    residual,
    w,
    add is nk.add_layer_norm,
    options.get('scale_offset', 0.0),
    rounds,
  )
  np.testing.assert_array_equal(total, sums)
  if not rounds:
    atol = 1e-5 if dtype else 2**-6  # a narrow result may be of either sum
    np.testing.assert_allclose(np.float32(y), want, 2**-7, atol * 4)
    return
  if 'scale_offset' not in options:  # a product of bfloat16
    want = want.astype(x.dtype).astype(np.float32)
  want = want.astype(y.dtype).astype(np.float32)
  assert np.mean(np.float32(y) != want) < (2e-3 if dtype is None else 0.02)
  np.testing.assert_allclose(np.float32(y), want, 2**-7)


@pytest.mark.parametrize(('add', 'options'), ADDED.values(), ids=ADDED)
def test_gradients_of_sums(add, options):
  """Those of the norm of what is kept, and the sum's, rounded once."""
  x, residual, dtotal = (draw((6, 40), jnp.bfloat16, seed=i) for i in range(3))
  dy, w = draw((6, 40), seed=3), draw((40,), seed=4)

  @jax.jit
  def pull(x, residual, w):
    run = lambda *a: add(*a, dtype=jnp.float32, **options)  # noqa: E731
    (_, total), back = jax.vjp(run, x, residual, w)
    return total, *back((dy, dtotal))

  def norm(total, w):
    rows = nk.layer_norm if add is nk.add_layer_norm else nk.rms_norm
    return rows(total, w, scale_offset=options.get('scale_offset', 0.0))

  total, dx, dresidual, dw = pull(x, residual, w)
  chex.assert_trees_all_equal(dx, dresidual)
  back = jax.jit(lambda *a: jax.vjp(norm, *a)[1](dy))
  dnorm, dscale = back(total.astype(jnp.float32), w)
  want = np.asarray(dnorm + dtotal.astype(jnp.float32))
  # The statistics are those of the sum, or of what is kept of it.
  np.testing.assert_allclose(np.float32(dx), want, 2**-8, 2**-6)
  size = np.abs(dscale).max()
  np.testing.assert_allclose(dw / size, dscale / size, atol=2**-7)


def test_sums_keep_the_sum_alone():
  x = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((1024,), jnp.bfloat16)
  size = x.size * x.dtype.itemsize

  def norm(x, residual, scale):
    return nk.add_rms_norm(x, residual, scale, round_before_scale=True)

  assert size <= kept(norm, x, x, scale) <= 1.05 * size


def test_rounding_keeps_x_alone():
  x = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16)
  scale = jax.ShapeDtypeStruct((1024,), jnp.bfloat16)
  size = x.size * x.dtype.itemsize

  def norm(x, scale):
    return nk.rms_norm(x, scale, scale_offset=1.0, round_before_scale=True)

  assert size <= kept(norm, x, scale) <= 1.05 * size


@pytest.mark.parametrize('center', [False, True])
def test_gradients_of_rounding(center):
  """Those of no rounding, but that the scale's is of what it multiplies."""
  x, dy, w = draw(SHAPE, jnp.bfloat16), draw(SHAPE, seed=1), draw((6,), seed=2)

  def pull(**options):
    def norm(x, w, b):
      y = nk.normalize(x, w, b, axis=-1, center=center, **options)
      return y.astype(jnp.float32)

    return jax.jit(lambda x, w: jax.vjp(norm, x, w, w)[1](dy))(x, w)

  found, plain = pull(round_before_scale=True), pull(dtype=jnp.float32)
  for actual, desired in zip(found, plain, strict=True):
    size = np.abs(np.float32(desired)).max()
    np.testing.assert_allclose(
      np.float32(actual) / size, np.float32(desired) / size, atol=2**-7
    )


def test_masked_values_do_not_leak_past_a_rounding():
  x, w = draw(SHAPE, jnp.bfloat16), draw((6,), jnp.bfloat16)
  where = np.ones(SHAPE, bool)
  where[0, 0, 1] = False

  def holding(value):
    held = np.array(x)
    held[0, 0, 1] = value
    return held

  @jax.jit
  def pull(x):
    def norm(x, w):
      return nk.rms_norm(x, w, where=where, round_before_scale=True)

    y, pull = jax.vjp(norm, x, w)
    dy = jnp.where(where, 1, 0).astype(y.dtype)
    return y, (jnp.where(where, y, 0), pull(dy))

  (_, clean), (whole, found) = (pull(holding(v)) for v in (0, np.inf))
  chex.assert_trees_all_equal(found, clean)
  assert np.asarray(whole)[0, 0, 1] == np.inf
