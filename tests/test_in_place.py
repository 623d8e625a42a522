"""Models of Flax's norms run with normkit's, in both adapters."""

import chex
from flax import linen as nn, nnx
import jax
import numpy as np
import pytest

import normkit.linen
import normkit.nnx
from normkit.tools import freeze, recalibrate

# So far from zero that the variance of Flax's norms is lost.
X = (3e3 + np.random.default_rng(0).normal(size=(4, 6, 8))).astype(np.float32)
AXES = {
  'BatchNorm': (0, 1),
  'LayerNorm': (-1,),
  'GroupNorm': (1, -1),
  'InstanceNorm': (1,),
}


def reference(name):
  x = X.astype(np.float64)
  if name == 'GroupNorm':
    grouped = x.reshape(4, 6, 2, 4)
    mean, var = (f(grouped, (1, 3), keepdims=True) for f in (np.mean, np.var))
    return ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
  mean, var = (f(x, AXES[name], keepdims=True) for f in (np.mean, np.var))
  epsilon = 1e-5 if name == 'BatchNorm' else 1e-6
  return (x - mean) / np.sqrt(var + epsilon)


class LinenReLU(nn.LayerNorm):
  def __call__(self, x, **options):
    return nn.relu(super().__call__(x, **options))


class LinenOwn(nn.LayerNorm):
  @nn.compact
  def __call__(self, x):
    return x * self.param('scale', nn.initializers.ones, (1, 1, 8))


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return {
      'BatchNorm': nn.BatchNorm(use_running_average=not train, name='b')(x),
      'LayerNorm': nn.LayerNorm()(x),
      'RMSNorm': nn.RMSNorm()(x),
      'GroupNorm': nn.GroupNorm(num_groups=2)(x),
      'InstanceNorm': nn.InstanceNorm()(x),
      'relu': LinenReLU()(x),
      'own': LinenOwn()(x),
    }


class NnxReLU(nnx.LayerNorm):
  def __call__(self, x):
    return nnx.relu(super().__call__(x))


class NnxOwn(nnx.LayerNorm):
  def __call__(self, x):
    return x * self.scale[...].reshape(1, 1, 8)


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.norms = nnx.Dict(
      BatchNorm=nnx.BatchNorm(8, rngs=rngs),
      LayerNorm=nnx.LayerNorm(8, rngs=rngs),
      RMSNorm=nnx.RMSNorm(8, rngs=rngs),
      GroupNorm=nnx.GroupNorm(8, 2, rngs=rngs),
      InstanceNorm=nnx.InstanceNorm(8, rngs=rngs),
      relu=NnxReLU(8, rngs=rngs),
      own=NnxOwn(8, rngs=rngs),
    )
    self.again = self.norms['LayerNorm']

  def __call__(self, x):
    return {name: norm(x) for name, norm in self.norms.items()}


def check_outputs(outputs):
  for name in AXES:
    np.testing.assert_allclose(outputs[name], reference(name), atol=2e-3)
  relu = np.maximum(reference('LayerNorm'), 0)
  np.testing.assert_allclose(outputs['relu'], relu, atol=2e-3)
  np.testing.assert_array_equal(outputs['own'], X)


def test_linen():
  model, key = Linen(), jax.random.key(0)
  variables = model.init(key, X, train=False)

  @jax.jit
  def apply(variables, x):
    return model.apply(variables, x, train=True, mutable=['batch_stats'])

  before, _ = apply(variables, X)
  with normkit.linen.in_place_of_flax() as found:
    chex.assert_trees_all_equal(model.init(key, X, train=False), variables)
    outputs, updates = apply(variables, X)  # compiled outside before
  check_outputs(outputs)
  with pytest.raises(AssertionError):
    check_outputs(before)
  chex.assert_trees_all_equal_structs(
    updates['batch_stats'], {**variables['batch_stats']}
  )
  assert found.kept == {'LinenOwn_0': 'LinenOwn'}
  assert found.swapped.pop('LinenReLU_0') == 'LinenReLU'
  assert {*found.swapped.values()} == {*AXES, 'RMSNorm'}
  assert 'LinenOwn_0: LinenOwn, its own' in str(found)
  chex.assert_trees_all_equal(apply(variables, X)[0], before)


def test_linen_options():
  model = nn.Sequential([nn.BatchNorm(use_running_average=False)])
  x = X[:, 0].copy()
  variables = model.init(jax.random.key(0), x)
  x[0, 0] = np.nan
  with normkit.linen.in_place_of_flax(skip_nonfinite=True):
    _, updates = model.apply(variables, x, mutable=['batch_stats'])
  mean = np.asarray(updates['batch_stats']['layers_0']['mean'])
  assert np.isfinite(mean).all()
  assert (mean[1:] > 0).all()
  rms = nn.RMSNorm()
  with (
    normkit.linen.in_place_of_flax(implementation='triton'),
    pytest.raises(NotImplementedError, match='triton'),
  ):
    rms.init_with_output(jax.random.key(0), x)


def test_linen_with_the_tools():
  """Inside of the context they see the calls, and the norm is normkit's."""
  model = nn.Sequential([nn.BatchNorm(use_running_average=False)])
  variables = model.init(jax.random.key(0), X)

  def call(variables, x):
    return model.apply(variables, x, mutable=['batch_stats'])

  with normkit.linen.in_place_of_flax(implementation='xla') as found:
    calibrated = recalibrate.recalibrate(call, variables, [X])
    with freeze.frozen():
      y, updates = call(calibrated, X)
  np.testing.assert_allclose(y, reference('BatchNorm'), atol=2e-3)
  chex.assert_trees_all_equal(updates['batch_stats'], calibrated['batch_stats'])
  assert found.swapped == {'layers_0': 'BatchNorm'}


def test_nnx():
  model = Nnx(nnx.Rngs(0))
  ours, found = normkit.nnx.in_place_of_flax(model)
  check_outputs(ours(X))
  assert found.kept == {'norms/own': 'NnxOwn'}
  assert found.swapped.pop('norms/relu') == 'NnxReLU'
  assert {*found.swapped.values()} == {*AXES, 'RMSNorm'}
  assert ours.again is ours.norms['LayerNorm']
  assert type(model.norms['LayerNorm']) is nnx.LayerNorm
  assert isinstance(ours.norms['relu'], NnxReLU)
  state = nnx.to_pure_dict(nnx.state(model))
  chex.assert_trees_all_equal_structs(nnx.to_pure_dict(nnx.state(ours)), state)
  ours.eval()
  nnx.update(ours, nnx.state(model))
  nnx.jit(lambda model, x: model(x))(ours, X)


def test_nnx_options():
  model = nnx.Sequential(nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
  ours, _ = normkit.nnx.in_place_of_flax(
    model, skip_nonfinite=True, debias=True
  )
  x = X[:, 0].copy()
  x[0, 0] = np.nan
  ours(x)
  norm = ours.layers[0]
  assert np.isfinite(norm.mean[...]).all()
  assert norm.count[...].tolist() == [0] + [1] * 7
  again, found = normkit.nnx.in_place_of_flax(ours)
  assert not found.swapped
  assert again.layers[0].skip_nonfinite


def test_rejects():
  model = nn.LayerNorm()
  with (
    pytest.raises(TypeError, match='axis_name'),
    normkit.linen.in_place_of_flax(axis_name='devices'),
  ):
    pass
  with (
    pytest.raises(ValueError, match='skip_nonfinite is for BatchNorm'),
    normkit.linen.in_place_of_flax(skip_nonfinite=True),
  ):
    jax.eval_shape(model.init, jax.random.key(0), X)
  layer = nnx.LayerNorm(8, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match='scale_offset'):
    normkit.nnx.in_place_of_flax(layer, scale_offset=1.0)
  with pytest.raises(ValueError, match='unbiased is for BatchNorm'):
    normkit.nnx.in_place_of_flax(layer, unbiased=True)
  with pytest.raises(TypeError, match='linen'):
    normkit.nnx.in_place_of_flax(model)
