"""Norms of queries and keys: all heads together, or each with its own scale.

test_conformance.py holds both to float64 on one device; here heads lie on
several, and beside the modules of transformers where that is installed.
"""

from functools import partial

from cases import draw
import chex
from flax import nnx
import jax
from jax import shard_map
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
import reference
from tiers import thinned

import normkit as nk
import normkit.linen
import normkit.nnx

SHAPE = 3, 5, 8, 4  # examples, tokens, heads, features
BOTH = {
  'rms': (nk.rms_norm, reference.rms_norm),
  'layer': (nk.layer_norm, reference.layer_norm),
}
both = pytest.mark.parametrize(('norm', 'of'), BOTH.values(), ids=BOTH)


def step(norm, x, scale, dy):
  y, pull = jax.vjp(norm, x, scale)
  return y, *pull(dy)


def by_shard_map(norm, x, scale, dy, check_vma=True):
  """Two heads a device, tokens whole."""
  mesh = jax.make_mesh((4,), ('model',), axis_types=(AxisType.Auto,))
  heads = P(None, None, 'model')
  run = shard_map(
    partial(step, norm),
    mesh=mesh,
    in_specs=(heads, P('model'), heads),
    out_specs=(heads, heads, P('model')),
    check_vma=check_vma,
  )
  return jax.jit(run)(x, scale, dy)


def by_vmap(norm, x, scale, dy):
  def split(a, axis):
    return np.asarray(a).reshape(*a.shape[:axis], 4, 2, *a.shape[axis + 1 :])

  run = jax.vmap(
    partial(step, norm), (2, 0, 2), out_axes=(2, 2, 0), axis_name='model'
  )
  found = jax.jit(run)(split(x, 2), split(scale, 0), split(dy, 2))
  y, dx, dscale = map(np.asarray, found)
  return y.reshape(x.shape), dx.reshape(x.shape), dscale.reshape(scale.shape)


FORMS = {
  'shard_map': by_shard_map,
  'shard_map_unchecked': partial(by_shard_map, check_vma=False),
  'vmap': by_vmap,
}


def inputs(dtype=jnp.float32):
  x, dy = draw(SHAPE, dtype), draw(SHAPE, dtype, seed=1)
  return x, draw(SHAPE[-2:], seed=2), dy


def wanted(of, x, scale, dy):
  params = nk.NormParams(np.asarray(scale))
  y, _ = of(params, None, np.asarray(x), True)
  dx, dscale, _ = of.gradients(params, np.asarray(x), np.asarray(dy))
  return y, dx, dscale


@both
@pytest.mark.parametrize('form', thinned(FORMS.values(), every=3))
def test_all_heads_on_several_devices(form, norm, of):
  """As OLMo 2 and 3, tensor-parallel: the statistics are of all heads."""
  found = form(partial(norm, axis=(-2, -1), axis_name='model'), *inputs())
  want = wanted(of(axis=(-2, -1)), *inputs())
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  alone = form(partial(norm, axis=(-2, -1)), *inputs())
  assert np.abs(alone[0] - want[0]).max() > 0.01  # or nothing was pooled


@both
@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
def test_each_head_on_several_devices(form, norm, of):
  """Nothing is pooled; each device has the scales of its heads."""
  found = form(partial(norm, feature_axis=(-2, -1)), *inputs())
  want = wanted(of(feature_axis=(-2, -1)), *inputs())
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_heads_as_one_axis():
  """The same, flat, is a norm of rows; so is a slice of them on a device."""
  x, scale, _ = inputs()
  flat = nk.rms_norm(x.reshape(3, 5, 32), scale.reshape(32))
  y = nk.rms_norm(x, scale, axis=(-2, -1))
  np.testing.assert_allclose(flat.reshape(SHAPE), y, rtol=1e-6)


@pytest.mark.parametrize('transform', [nk.RMSNorm, nk.LayerNorm])
def test_modules_have_a_scale_a_head(transform):
  each = transform(feature_axis=[-2, -1])
  x, scale, _ = inputs()
  params, state = each.init(x)
  assert params.scale.shape == SHAPE[-2:]
  params = params._replace(scale=scale)
  y, _ = each.apply(params, state, x, train=True)
  module = normkit.linen.Norm(each)
  variables = module.init(jax.random.key(0), x, train=True)
  variables['params']['scale'] = scale
  found = module.apply(variables, x, train=True)
  chex.assert_trees_all_equal(found, y)
  layer = normkit.nnx.Norm(each, x)
  layer.scale = nnx.Param(scale)
  chex.assert_trees_all_equal(layer(x), y)


def test_scales_that_do_not_fit():
  x = jnp.ones(SHAPE)
  with pytest.raises(ValueError, match=r'scale of shape \(8, 4\)'):
    nk.rms_norm(x, jnp.ones(SHAPE[-2:]))
  with pytest.raises(ValueError, match=r'scale of shape \(4,\)'):
    nk.rms_norm(x, jnp.ones(4), feature_axis=(-2, -1))
  with pytest.raises(ValueError, match='feature_axis=7 is out of range'):
    nk.layer_norm(x, jnp.ones(4), feature_axis=7)
  with pytest.raises(TypeError, match='feature_axis must be'):
    nk.RMSNorm(feature_axis=(0.5,))


PEERS = {
  'olmo2': ('olmo2', 'Olmo2RMSNorm', 32, nk.rms_norm, {'axis': (-2, -1)}),
  'cohere': (
    'cohere',
    'CohereLayerNorm',
    (8, 4),
    nk.layer_norm,
    {'feature_axis': (-2, -1)},
  ),
}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('peer', PEERS.values(), ids=PEERS)
def test_published_modules(peer, dtype):
  why = 'for comparison: pip install torch transformers'
  torch = pytest.importorskip('torch', reason=why)
  family, name, size, norm, options = peer
  module = pytest.importorskip(
    f'transformers.models.{family}.modeling_{family}', reason=why
  )
  layer = getattr(module, name)(size, eps=1e-6)
  x, scale, dy = inputs(jnp.dtype(dtype))
  shape = (*SHAPE[:2], *layer.weight.shape)

  def to_torch(a, shape):
    wide = torch.tensor(np.asarray(a, np.float32))
    return wide.to(getattr(torch, dtype)).reshape(shape)

  with torch.no_grad():
    layer.weight.copy_(torch.tensor(np.asarray(scale)).view_as(layer.weight))
  given = to_torch(x, shape).requires_grad_()
  layer(given).backward(to_torch(dy, shape))
  want = [
    t.detach().float().numpy()
    for t in (layer(given), given.grad, layer.weight.grad)
  ]
  run = jax.jit(partial(step, partial(norm, **options, epsilon=1e-6)))
  found = run(x, scale, dy)
  # What is rounded to bfloat16 may differ by a rounding of its last digit.
  error = 2e-5 if dtype == 'float32' else 2**-7
  for a, b, limit in zip(found, want, (error, error, 2e-5), strict=True):
    np.testing.assert_allclose(
      np.asarray(a, np.float32),
      b.reshape(a.shape),
      rtol=limit,
      atol=limit * np.abs(b).max() / 8,
    )
