"""Other norms in the place of batch norms: outputs, parameters, refusals."""

import dataclasses
import math

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools import replace

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(4, 3, 3, 8)).astype(np.float32)
RNGS = nnx.Rngs(0)
GROUPS = nk.GroupNorm(num_groups=2, epsilon=1e-5)


def reference_group_norm(x, scale, bias, groups, epsilon=1e-5):
  x = x.astype(np.float64)
  split = x.reshape(*x.shape[:-1], groups, -1)
  axes = (*range(1, x.ndim - 1), x.ndim)
  mean = split.mean(axes, keepdims=True)
  var = split.var(axes, keepdims=True)
  y = ((split - mean) / np.sqrt(var + epsilon)).reshape(x.shape)
  return y * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)


def reference_batch_norm(x, scale, bias, epsilon=1e-5):
  x = x.astype(np.float64)
  axes = tuple(range(x.ndim - 1))
  y = (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon)
  return y * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)


def close(actual, expected):
  chex.assert_trees_all_close(
    np.asarray(actual, np.float64), np.asarray(expected), atol=2e-5, rtol=2e-5
  )


def noise(tree):
  """Parameters that are neither ones nor zeros."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(KEY, len(leaves))
  return structure.unflatten(
    [
      leaf + jax.random.uniform(key, leaf.shape)
      for leaf, key in zip(leaves, keys, strict=True)
    ]
  )


class Block(nn.Module):
  norm: type

  @nn.compact
  def __call__(self, x, frozen):
    return self.norm(name='second')(x, use_running_average=frozen)


class Linen(nn.Module):
  """Two batch norms, one in a block."""

  norm: type

  @nn.compact
  def __call__(self, x, train):
    x = self.norm(use_running_average=not train, name='first')(x)
    return Block(self.norm, name='block')(x, not train)


class NNX(nnx.Module):
  """The same."""

  def __init__(self, norm, rngs):
    self.first = norm(8, rngs=rngs)
    self.block = nnx.List([nnx.Dict(norm=norm(8, rngs=rngs))])

  def __call__(self, x):
    return self.block[0]['norm'](self.first(x))


@pytest.fixture(
  params=[nn.BatchNorm, normkit.linen.BatchNorm], ids=['flax', 'normkit']
)
def linen(request):
  model = Linen(request.param)
  return model, noise(model.init(KEY, X, False))


@pytest.fixture(
  params=[nnx.BatchNorm, normkit.nnx.BatchNorm], ids=['flax', 'normkit']
)
def module(request):
  model = NNX(request.param, nnx.Rngs(0))
  nnx.update(model, noise(nnx.state(model)))
  return model


def test_linen_batch_norms_become_group_norms(linen):
  model, variables = linen
  first = variables['params']['first']
  second = variables['params']['block']['second']
  expected = reference_group_norm(X, **first, groups=2)
  expected = reference_group_norm(expected, **second, groups=2)
  plain = model.apply(variables, X, False)
  with replace.replacing_norms(GROUPS):
    for train in (True, False):
      close(model.apply({'params': variables['params']}, X, train), expected)
    fresh = model.init(KEY, X, False)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    fresh, {'params': variables['params']}
  )
  chex.assert_trees_all_equal(model.apply(variables, X, False), plain)


def test_nnx_batch_norms_become_group_norms(module):
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))
  replaced = replace.replace_norms(module, GROUPS)
  expected = X
  for norm in (module.first, module.block[0]['norm']):
    scale, bias = norm.scale[...], norm.bias[...]
    expected = reference_group_norm(expected, scale, bias, groups=2)
  close(replaced(X), expected)
  assert not nnx.state(replaced, nnx.BatchStat)
  replaced.first.scale[...] *= 2
  after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))
  chex.assert_trees_all_equal(after, before)


def test_where_chooses(linen, module):
  model, variables = linen
  first = variables['params']['first']
  stats, second = (
    jax.tree.map(np.float64, variables[collection]['block']['second'])
    for collection in ('batch_stats', 'params')
  )
  y = reference_group_norm(X, **first, groups=2)
  y = (y - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  with replace.replacing_norms(GROUPS, where=lambda path: path == 'first'):
    close(
      model.apply(variables, X, False), y * second['scale'] + second['bias']
    )
  some = replace.replace_norms(module, GROUPS, where=lambda p: p == 'first')
  assert isinstance(some.first, normkit.nnx.Norm)
  assert type(some.block[0]['norm']) is type(module.block[0]['norm'])
  some = replace.replace_norms(
    module, GROUPS, where=lambda p: p == 'block/0/norm'
  )
  assert isinstance(some.block[0]['norm'], normkit.nnx.Norm)
  assert type(some.first) is type(module.first)


@pytest.mark.parametrize(
  'transform', [nk.LayerNorm(epsilon=1e-5), nk.InstanceNorm(epsilon=1e-5)]
)
def test_layer_and_instance_norm(transform, linen, module):
  groups = 1 if isinstance(transform, nk.LayerNorm) else 8
  model, variables = linen
  scale, bias = module.first.scale[...], module.first.bias[...]
  x = X[:, :1, :1] if groups == 1 else X  # a layer norm of single positions
  expected = reference_group_norm(x, scale, bias, groups)
  close(replace.replace_norms(module, transform).first(x), expected)
  first = variables['params']['first']
  norm = model.norm(use_running_average=True)
  with replace.replacing_norms(transform):
    y = norm.apply({'params': first}, x)
  close(y, reference_group_norm(x, **first, groups=groups))


@pytest.mark.parametrize('own', [None, jnp.float16])
def test_the_dtype_stays(own):
  norm = nk.GroupNorm(num_groups=2, dtype=own)
  expected = own or jnp.bfloat16
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(nnx.BatchNorm(8, dtype=jnp.bfloat16, rngs=rngs))
  assert replace.replace_norms(model, norm)(X).dtype == expected
  model = nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)
  with replace.replacing_norms(norm):
    y, variables = model.init_with_output(KEY, X)
  assert y.dtype == expected
  chex.assert_type(jax.tree.leaves(variables), jnp.float32)


def test_masks_reach_the_new_norm():
  mask = np.arange(3)[:, None] < 2
  model = normkit.linen.BatchNorm(use_running_average=True)
  variables = model.init(KEY, X)
  with replace.replacing_norms(nk.InstanceNorm(epsilon=1e-5)):
    y = model.apply(variables, X, mask=mask[None, :, None])
  kept = reference_group_norm(X[:, :2], np.ones(8), np.zeros(8), 8)
  close(y[:, :2], kept)


@pytest.mark.parametrize(
  'context',
  [
    lambda where: replace.replacing_norms(GROUPS, where=where),
    lambda where: replace.synchronizing_norms(None, where=where),
  ],
)
def test_where_that_chooses_nothing_is_refused(context):
  model = nn.Sequential([nn.BatchNorm(use_running_average=True)])
  with (
    pytest.raises(ValueError, match=r"none of the batch norms \['layers_0'\]"),
    context(lambda path: path == 'layers_1'),
  ):
    model.init(KEY, X)
  with context(lambda path: False):
    pass  # nothing is called, so nothing is known
  with pytest.raises(RuntimeError), context(lambda path: False):
    model.init(KEY, X)
    raise RuntimeError  # an error of the block is the one that is seen


def test_what_has_no_parameters_gets_none():
  model = nn.BatchNorm(use_running_average=True, use_scale=False)
  with replace.replacing_norms(GROUPS):
    variables = model.init(KEY, X)
    close(
      model.apply(variables, X),
      reference_group_norm(X, np.ones(8), np.zeros(8), 2),
    )
  assert variables['params'].keys() == {'bias'}


def test_a_shared_batch_norm_stays_shared():
  class Shared(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.BatchNorm(8, rngs=rngs)
      self.b = self.a

  replaced = replace.replace_norms(Shared(nnx.Rngs(0)), GROUPS)
  assert replaced.a is replaced.b and isinstance(replaced.a, normkit.nnx.Norm)


def test_linen_batch_norms_pool_over_devices(linen):
  model, variables = linen
  expected = X
  for layer in (
    variables['params']['first'],
    variables['params']['block']['second'],
  ):
    expected = reference_batch_norm(expected, **layer)

  def run(x):
    return model.apply(variables, x, True, mutable='batch_stats')

  with replace.synchronizing_norms('devices'):
    y, updates = jax.pmap(run, axis_name='devices')(X[:, None])
    close(y[:, 0], expected)
    stats = updates['batch_stats']
    for leaf in jax.tree.leaves(stats):
      close(leaf, np.broadcast_to(leaf[0], leaf.shape))
  alone, _ = jax.jit(run)(X[:1])  # no axis is needed outside
  assert np.abs(alone - expected[:1]).max() > 0.1


def test_nnx_batch_norms_pool_over_devices(module):
  synchronized = replace.synchronize_norms(module, 'devices')
  expected = X
  for norm in (module.first, module.block[0]['norm']):
    assert norm.axis_name is None
    expected = reference_batch_norm(expected, norm.scale[...], norm.bias[...])
  graph, state = nnx.split(synchronized)

  def run(x):
    inside = jax.tree.map(lambda leaf: leaf, state)
    return nnx.merge(graph, inside)(x)

  y = jax.vmap(run, axis_name='devices')(X[:, None])
  close(y[:, 0], expected)


def test_a_linen_subclass_keeps_what_it_adds():
  class Rectified(nn.BatchNorm):
    def __call__(self, x):
      return nn.relu(super().__call__(x, use_running_average=True))

  model = Rectified()
  variables = noise(model.init(KEY, X))
  with replace.replacing_norms(GROUPS):
    y = model.apply(variables, X)
  expected = reference_group_norm(X, **variables['params'], groups=2)
  close(y, np.maximum(expected, 0))


def test_subclasses_whose_rest_would_be_lost_are_refused():
  class Own(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
      return x * self.param('scale', self.scale_init, (1, 1, 1, 8))

  with (
    replace.replacing_norms(GROUPS),
    pytest.raises(ValueError, match='is a Own'),
  ):
    jax.eval_shape(Own().init, KEY, X)
  with replace.replacing_norms(GROUPS, where=lambda name: name[-1] == '1'):
    jax.eval_shape(nn.Sequential([Own(), nn.BatchNorm(True)]).init, KEY, X)

  class Rectified(nnx.BatchNorm):
    def __call__(self, x):
      return nnx.relu(super().__call__(x))

  class Named(nnx.BatchNorm):
    pass

  model = nnx.List([Rectified(8, rngs=RNGS), Named(8, rngs=RNGS)])
  model = nnx.Sequential(*model)
  with pytest.raises(ValueError, match="'layers/0' is a Rectified"):
    replace.replace_norms(model, GROUPS)
  replaced = replace.replace_norms(model, GROUPS, where=lambda n: n[-1] == '1')
  assert isinstance(replaced.layers[0], Rectified)
  assert isinstance(replaced.layers[1], normkit.nnx.Norm)


def test_the_attribute_is_back_after_an_error():
  seen = []

  class Raises(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
      seen.append(self)
      assert self.axis_name == 'devices'
      raise RuntimeError('on purpose')

  with (
    replace.synchronizing_norms('devices'),
    pytest.raises(RuntimeError, match='on purpose'),
  ):
    Raises().init(KEY, X)
  assert seen[0].axis_name is None


@pytest.mark.parametrize(
  ('transform', 'error', 'match'),
  [
    (nk.BatchNorm(), TypeError, 'must be a norm without state'),
    (nk.ScaleNorm(), ValueError, 'ScaleNorm cannot take'),
    (nk.GlobalResponseNorm(), TypeError, 'must be a norm without state'),
    (nk.RMSNorm(), ValueError, 'has a bias, for which RMSNorm'),
    (nk.LayerNorm(axis=(-2, -1)), ValueError, 'over the last axis'),
    (nk.GroupNorm(num_groups=3), ValueError, 'num_groups'),
  ],
)
def test_norms_that_do_not_fit_are_refused(transform, error, match):
  model = NNX(nnx.BatchNorm, nnx.Rngs(0))
  with pytest.raises(error, match=match):
    replace.replace_norms(model, transform)
  model = Linen(nn.BatchNorm)
  with (
    replace.replacing_norms(transform),
    pytest.raises(error, match=match),
  ):
    model.init(KEY, X, False)


OWN = {'dyt': (nk.DyT(), np.tanh), 'derf': (nk.Derf(), np.vectorize(math.erf))}


def bounded(function, x, layer, alpha=0.5):
  """Of alpha * x, as DyT and Derf are at first; the shift is zero."""
  y = function(alpha * np.float64(x))
  return y * np.float64(layer['scale']) + np.float64(layer['bias'])


@pytest.mark.parametrize('name', OWN)
def test_norms_with_parameters_of_their_own_in_nnx(name, module):
  transform, function = OWN[name]
  replaced = replace.replace_norms(module, transform)
  expected = X
  for norm in module.first, module.block[0]['norm']:
    layer = {n: getattr(norm, n)[...] for n in ('scale', 'bias')}
    expected = bounded(function, expected, layer)
  close(replaced(X), expected)
  assert replaced.first.alpha[...] == 0.5


@pytest.mark.parametrize('name', OWN)
def test_norms_with_parameters_of_their_own_in_linen(name, linen):
  transform, function = OWN[name]
  model, variables = linen
  params = variables['params']
  with (
    replace.replacing_norms(transform),
    pytest.raises(ValueError, match="'first' has no alpha"),
  ):
    model.apply({'params': params}, X, True)
  with replace.replacing_norms(transform):
    fresh = model.init(KEY, X, True)['params']
    params = {
      'first': fresh['first'] | params['first'] | {'alpha': jnp.float32(0.25)},
      'block': {'second': fresh['block']['second'] | params['block']['second']},
    }
    y = model.apply({'params': params}, X, True)
  expected = bounded(function, X, params['first'], 0.25)
  close(y, bounded(function, expected, params['block']['second']))


def test_offsets_and_gates(module):
  """The scale is carried over less the offset; a gate is left out."""
  for transform in (
    nk.GroupNorm(num_groups=2, epsilon=1e-5, scale_offset=1.0),
    nk.LayerNorm(epsilon=1e-5, scale_offset=0.5),
  ):
    replaced = replace.replace_norms(module, transform)
    plain = dataclasses.replace(transform, scale_offset=0.0)
    same = replace.replace_norms(module, plain)
    close(replaced(X), np.asarray(same(X), np.float64))
    offset = module.first.scale[...] - replaced.first.scale[...]
    np.testing.assert_allclose(offset, transform.scale_offset, rtol=1e-6)
    assert isinstance(replaced.first.scale, nnx.Param)
  model = NNX(lambda n, rngs: nnx.BatchNorm(n, use_bias=False, rngs=rngs), RNGS)
  nnx.update(model, noise(nnx.state(model)))
  for transform in nk.GatedRMSNorm(), nk.RMSNorm(round_before_scale=True):
    y = X
    for norm in model.first, model.block[0]['norm']:
      y = nk.rms_norm(y, norm.scale[...])
    close(replace.replace_norms(model, transform)(X), y)


def test_offsets_are_refused_in_linen(linen):
  model, variables = linen
  with (
    replace.replacing_norms(nk.LayerNorm(scale_offset=1.0)),
    pytest.raises(ValueError, match='without scale_offset here'),
  ):
    model.apply({'params': variables['params']}, X, True)


def test_models_that_do_not_fit_are_refused():
  with pytest.raises(TypeError, match='replacing_norms and synchronizing'):
    replace.replace_norms(Linen(nn.BatchNorm), GROUPS)
  model = NNX(nnx.BatchNorm, nnx.Rngs(0))
  with pytest.raises(ValueError, match='no batch norm'):
    replace.synchronize_norms(model, 'devices', where=lambda path: False)
  model.first.axis = 1
  with pytest.raises(ValueError, match=r"'first' has axis=1"):
    replace.replace_norms(model, GROUPS)
