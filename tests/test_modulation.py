"""Adaptive norms and the gate of diffusion transformers, against float64."""

from functools import partial

from cases import draw, draw_mask
import chex
import jax
from jax import shard_map
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
import reference
from tiers import thinned

import normkit as nk

SHAPE = 3, 5, 8  # examples, tokens, features
NORMS = {
  'layer': (nk.adaptive_layer_norm, reference.layer_norm),
  'rms': (nk.adaptive_rms_norm, reference.rms_norm),
}
norms = pytest.mark.parametrize(('norm', 'of'), NORMS.values(), ids=NORMS)
# Of one rounding, relative to the value, or to an eighth of the largest.
DTYPES = {'float32': 1e-5, 'bfloat16': 2**-8, 'float16': 2**-11}
SHAPES = {
  'an_example': (3, 8),
  'a_token': SHAPE,
  'an_example_in_rank': (3, 1, 8),
  'a_feature': (8,),
}


def wide(a):
  return np.asarray(a, np.float64)


def in_rank(a):
  """By hand, of x (examples, tokens, features)."""
  a = wide(a)
  return a[:, None] if a.shape == (3, 8) else a


def summed(a, shape):
  """The cotangent of an array that was broadcast."""
  rank = (3, 1, 8) if shape == (3, 8) else (1,) * (a.ndim - len(shape)) + shape
  axes = tuple(i for i, n in enumerate(rank) if n == 1 and a.shape[i] > 1)
  return a.sum(axes, keepdims=True).reshape(shape)


def wanted(of, x, shift, scale, dy, where=None):
  """y and the cotangents of x, shift and scale, by the product rule."""
  x, dy = wide(x), wide(dy)
  norm, none = of(), nk.NormParams()
  n, _ = norm(none, None, x, True, where)
  factor = 1 + in_rank(scale)
  dx, *_ = norm.gradients(none, x, dy * factor, where)
  dshift, dscale = summed(dy, shift.shape), summed(dy * n, scale.shape)
  return n * factor + in_rank(shift), dx, dshift, dscale


def assert_close(found, want, error):
  for a, b in zip(found, want, strict=True):
    size = np.maximum(np.abs(b), np.abs(b).max() / 8)
    np.testing.assert_array_less(np.abs(wide(a) - b), 1e-30 + error * size)


@norms
@pytest.mark.parametrize(
  ('dtype', 'shape', 'masked'),
  thinned(DTYPES, SHAPES.values(), [False, True], every=4, keep=2),
)
def test_values_and_gradients(norm, of, dtype, shape, masked):
  """In half precision too to one rounding: nothing else is rounded."""
  x, dy = draw(SHAPE, dtype), draw(SHAPE, dtype, seed=1)
  shift, scale = draw(shape, dtype, seed=2), draw(shape, dtype, seed=3)
  where = np.array(draw_mask(SHAPE)) if masked else None
  if masked:
    where[0] = True

  @jax.jit
  def run(x, shift, scale, dy):
    y, pull = jax.vjp(partial(norm, where=where), x, shift, scale)
    return y, *pull(dy)

  found = run(x, shift, scale, dy)
  chex.assert_type(found, dtype)
  assert_close(found, wanted(of, x, shift, scale, dy, where), DTYPES[dtype])


@norms
def test_one_plus_scale_is_not_rounded(norm, of):
  """In bfloat16 1 + 2^-9 is 1, and the scale of few steps is as small."""
  x = draw(SHAPE)
  scale = jnp.full((3, 8), 2.0**-9, jnp.bfloat16)
  y = jax.jit(norm)(x, None, scale)
  want, _ = of()(nk.NormParams(), None, np.asarray(x), True)
  np.testing.assert_allclose(y, want * (1 + 2.0**-9), rtol=1e-6, atol=1e-6)


@norms
def test_parts_left_out(norm, of):
  x, zero = draw(SHAPE), jnp.zeros((3, 8))
  want, _ = of()(nk.NormParams(), None, np.asarray(x), True)
  for given in (None, None), (zero, None), (None, zero), (zero, zero):
    np.testing.assert_allclose(norm(x, *given), want, atol=1e-5)


@norms
def test_other_axes(norm, of):
  """Channels first, images, and an example by itself, as under vmap."""
  x, shift, scale = draw((3, 5, 8)), draw((3, 8), seed=2), draw((3, 8), seed=3)

  @jax.jit
  def run(x, shift, scale):
    first = norm(x.swapaxes(1, 2), shift, scale, axis=1)
    images = norm(x.reshape(3, 5, 1, 8), shift, scale)
    ways = first.swapaxes(1, 2), images.reshape(3, 5, 8)
    ways = *ways, jax.vmap(norm)(x, shift, scale)
    alone = norm(x[0, 0], shift[0], scale[0])
    half = norm(x, shift, scale, dtype=jnp.bfloat16)
    return norm(x, shift, scale), ways, alone, half

  y, ways, alone, half = jax.device_get(run(x, shift, scale))
  for way in ways:
    np.testing.assert_allclose(way, y, atol=1e-6)
  np.testing.assert_allclose(alone, y[0, 0], 1e-5)
  chex.assert_trees_all_equal(half, y.astype(jnp.bfloat16))
  del of


@norms
def test_features_on_several_devices(norm, of):
  x, dy = draw(SHAPE), draw(SHAPE, seed=1)
  shift, scale = draw((3, 8), seed=2), draw((3, 8), seed=3)

  def step(x, shift, scale, dy):
    y, pull = jax.vjp(partial(norm, axis_name='d'), x, shift, scale)
    return y, *pull(dy)

  whole, one = P(None, None, 'd'), P(None, 'd')
  run = shard_map(
    step,
    mesh=jax.make_mesh((4,), ('d',), axis_types=(AxisType.Auto,)),
    in_specs=(whole, one, one, whole),
    out_specs=(whole, whole, one, one),
  )
  found = jax.jit(run)(x, shift, scale, dy)
  assert_close(found, wanted(of, x, shift, scale, dy), 2e-5)


@norms
@pytest.mark.parametrize('name', ['shift', 'scale'])
@pytest.mark.parametrize('shape', [(2, 8), (5, 8), (3, 7), (3, 5, 1, 8), (5,)])
def test_shapes_that_do_not_fit(norm, of, name, shape):
  del of
  given = {'shift': None, 'scale': None, name: jnp.ones(shape)}
  with pytest.raises(ValueError, match=rf'{name} of shape \({shape[0]},'):
    norm(jnp.ones(SHAPE), **given)
  with pytest.raises(TypeError, match=rf'complex result of {name}'):
    norm(jnp.ones(SHAPE), **given | {name: jnp.ones((3, 8), jnp.complex64)})


@norms
def test_other_errors(norm, of):
  del of
  with pytest.raises(TypeError, match='x must have a floating-point'):
    norm(jnp.ones(SHAPE, int), None, None)
  with pytest.raises(ValueError, match='no axis is left'):
    norm(jnp.ones(SHAPE), None, None, axis=())
  with pytest.raises(ValueError, match='epsilon must be'):
    norm(jnp.ones(SHAPE), None, None, epsilon=-1.0)
  with pytest.raises(TypeError, match='shift must be an array, got dict'):
    norm(jnp.ones(SHAPE), {}, None)
  with pytest.raises(TypeError, match='scale must be an array, got NormParams'):
    norm(jnp.ones(SHAPE), None, nk.NormParams())


@norms
def test_lists(norm, of):
  """As other norms take them, without a warning."""
  del of
  x, scale = draw(SHAPE), [float(i) for i in range(8)]
  found = norm(x, [scale] * 3, [1.0] * 8)
  desired = norm(x, np.float32([scale] * 3), np.ones(8, np.float32))
  chex.assert_trees_all_equal(found, desired)


def kept(function, *args):
  """Bytes that a forward hands to its backward."""
  residuals = jax.eval_shape(lambda *a: jax.vjp(function, *a)[1], *args)
  return sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(residuals))


@norms
def test_what_is_kept(norm, of):
  """x and the scale, in their own dtype: with one a token twice x's bytes."""
  del of
  x, one = (
    jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4, 256, 512), (4, 512))
  )
  size = x.size * 2
  assert size < kept(norm, x, one, one) < 1.1 * size
  assert 2 * size < kept(norm, x, x, x) < 2.1 * size
  assert size < kept(nk.adaptive_residual, x, x, one) < 1.1 * size


class TestResidual:
  @pytest.mark.parametrize(
    ('dtype', 'shape'), thinned(DTYPES, SHAPES.values(), every=3)
  )
  def test_values_and_gradients(self, dtype, shape):
    x, branch, dy = (draw(SHAPE, dtype, seed=i) for i in range(3))
    gate = draw(shape, dtype, seed=3)
    run = jax.jit(nk.adaptive_residual)
    y, pull = jax.vjp(run, x, branch, gate)
    found = y, *pull(dy)
    chex.assert_type(found, dtype)
    wide_dy = wide(dy)
    want = (
      wide(x) + in_rank(gate) * wide(branch),
      wide_dy,
      wide_dy * in_rank(gate),
      summed(wide_dy * wide(branch), shape),
    )
    assert_close(found, want, DTYPES[dtype])

  def test_one_rounding(self):
    """Each result is the float64 one rounded; written out, few are."""
    shape = 2, 512, 64
    x, branch, dy = (draw(shape, jnp.bfloat16, seed=i) for i in range(3))
    gate = draw((2, 64), jnp.bfloat16, seed=3)
    y, pull = jax.vjp(nk.adaptive_residual, x, branch, gate)
    want = wide(x) + wide(gate)[:, None] * wide(branch)
    np.testing.assert_array_equal(y, want.astype(jnp.bfloat16))
    dgate = (wide(dy) * wide(branch)).sum(1)
    np.testing.assert_allclose(wide(pull(dy)[2]), dgate, rtol=2**-8, atol=1e-2)
    written_out = jax.jit(lambda x, b, g: x + g[:, None] * b)(x, branch, gate)
    assert np.mean(wide(written_out) != wide(y)) > 0.05

  def test_zero_is_the_residual(self):
    x = draw(SHAPE, jnp.bfloat16)
    y = nk.adaptive_residual(x, 1e3 * x, jnp.zeros((3, 8), jnp.bfloat16))
    chex.assert_trees_all_equal(y, x)

  def test_dtypes_that_differ(self):
    """A residual in float32 stays there, as in mixed precision."""
    x, branch = draw(SHAPE), draw(SHAPE, jnp.bfloat16, seed=1)
    y = nk.adaptive_residual(x, branch, jnp.ones((3, 8), jnp.bfloat16))
    chex.assert_type(y, jnp.float32)
    np.testing.assert_allclose(y, wide(x) + wide(branch), rtol=1e-6)

  def test_errors(self):
    x = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match=r'gate of shape \(2, 8\)'):
      nk.adaptive_residual(x, x, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match=r'branch of shape \(5, 8\)'):
      nk.adaptive_residual(x, x[0], jnp.ones((3, 8)))
    with pytest.raises(TypeError, match='branch must have a floating-point'):
      nk.adaptive_residual(x, x.astype(int), jnp.ones((3, 8)))
    with pytest.raises(TypeError, match='complex result of branch'):
      nk.adaptive_residual(x, x.astype(jnp.complex64), jnp.ones((3, 8)))


WHY = "for comparison: pip install 'normkit[peers]'"


def diffusers(name, dtype, *args, **options):
  """A layer of diffusers with random weights."""
  torch = pytest.importorskip('torch', reason=WHY)
  module = pytest.importorskip(
    'diffusers.models.normalization', reason=WHY, exc_type=ImportError
  )
  torch.manual_seed(0)
  layer = getattr(module, name)(*args, **options)
  with torch.no_grad():
    for parameter in layer.parameters():
      parameter.normal_(std=0.3)
  return torch, layer.to(getattr(torch, dtype))


OTHERS = {
  'lumina': ('LuminaRMSNormZero', (8, 1e-5, True), 4),
  'continuous': ('AdaLayerNormContinuous', (8, 8, False), 2),
}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', OTHERS)
def test_others_of_diffusers(name, dtype):
  """Lumina 2's norm, with a weight; the last of DiTs, scale before shift."""
  kind, args, parts = OTHERS[name]
  torch, layer = diffusers(kind, dtype, *args)
  x, condition, dy = (
    draw(s, dtype, seed=i) for i, s in enumerate((SHAPE, (3, 8), SHAPE))
  )

  def to_torch(a):
    a = torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, dtype))
    return a.requires_grad_()

  given, emb = to_torch(x), to_torch(condition)
  y = layer(given, emb)
  y = y[0] if name == 'lumina' else y
  y.backward(to_torch(dy))
  outputs = layer.linear(layer.silu(emb)).detach().float().numpy()
  scale, shift, *_ = np.split(outputs, parts, axis=1)

  def run(x):
    if name == 'continuous':
      modulation = jnp.asarray(shift, dtype), jnp.asarray(scale, dtype)
      return nk.adaptive_layer_norm(x, *modulation, epsilon=1e-5)
    weight = layer.norm.weight.detach().float().numpy()
    factor = jnp.asarray(weight * (1 + scale)[:, None])
    return nk.rms_norm(x, factor, epsilon=1e-5)

  found, pull = jax.vjp(run, x)
  error = 1e-5 if dtype == 'float32' else 2**-5  # theirs rounds each step
  want = [wide(t.detach().float().numpy()) for t in (y, given.grad)]
  assert_close((found, *pull(dy)), want, error)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_diffusers(dtype):
  """AdaLayerNormZero of DiT and SD 3; its gate on the residual, written out."""
  torch, layer = diffusers('AdaLayerNormZero', dtype, 8)
  x, condition, dy, branch = (
    draw(s, dtype, seed=i) for i, s in enumerate((SHAPE, (3, 8), SHAPE, SHAPE))
  )

  def to_torch(a):
    a = torch.tensor(np.asarray(a, np.float32)).to(getattr(torch, dtype))
    return a.requires_grad_()

  given, emb = to_torch(x), to_torch(condition)
  y, gate, *_ = layer(given, emb=emb)
  total = given + gate[:, None] * to_torch(branch)
  (y + total).backward(to_torch(dy))
  outputs = layer.linear(layer.silu(emb)).detach().float().numpy()
  outputs = jnp.asarray(outputs, dtype)
  shift, scale, alpha, *_ = jnp.split(outputs, 6, axis=1)

  def run(x):
    y = nk.adaptive_layer_norm(x, shift, scale)
    return y, nk.adaptive_residual(x, branch, alpha)

  found, pull = jax.vjp(run, x)
  found = *found, *pull((dy, dy))
  # Theirs rounds the norm, one plus scale, their product and the sum.
  error = 1e-5 if dtype == 'float32' else 5 * 2**-8
  want = [wide(t.detach().float().numpy()) for t in (y, total, given.grad)]
  assert_close(found, want, error)
