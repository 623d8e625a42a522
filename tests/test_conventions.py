"""Scale offsets and rounding before the scale: functions, drop-ins, maths."""

from cases import draw, draw_mask
import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory import kept

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
  with pytest.raises(NotImplementedError, match='rounds before'):
    nk.rms_norm(x, round_before_scale=True, implementation='triton')


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

    return jax.vjp(norm, x, w, w)[1](dy)

  found, plain = pull(round_before_scale=True), pull(dtype=jnp.float32)
  for actual, desired in zip(found, plain, strict=True):
    size = np.abs(np.float32(desired)).max()
    np.testing.assert_allclose(
      np.float32(actual) / size, np.float32(desired) / size, atol=2**-7
    )


def test_masked_values_do_not_leak_past_a_rounding():
  x, w = draw(SHAPE, jnp.bfloat16), draw((6,), jnp.bfloat16)
  where = jnp.ones(SHAPE, bool).at[0, 0, 1].set(False)

  def pull(x):
    def norm(x, w):
      return nk.rms_norm(x, w, where=where, round_before_scale=True)

    y, pull = jax.vjp(norm, x, w)
    return jnp.where(where, y, 0), pull(jnp.where(where, 1, 0).astype(y.dtype))

  clean, found = (pull(x.at[0, 0, 1].set(v)) for v in (0, jnp.inf))
  chex.assert_trees_all_equal(found, clean)
  whole = nk.rms_norm(
    x.at[0, 0, 1].set(jnp.inf), w, where=where, round_before_scale=True
  )
  assert whole[0, 0, 1] == jnp.inf
