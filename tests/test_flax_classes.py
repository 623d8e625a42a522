"""The drop-ins are Flax's classes: other people's programs find them so."""

import copy
import dataclasses
import inspect
import pickle

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk
from normkit import general
import normkit.linen
import normkit.nnx
from normkit.norms import group

NORMS = 'BatchNorm', 'LayerNorm', 'RMSNorm', 'GroupNorm', 'InstanceNorm'
WRAPPERS = 'WeightNorm', 'SpectralNorm'
every_norm = pytest.mark.parametrize('name', NORMS)
every_class = pytest.mark.parametrize('name', (*NORMS, *WRAPPERS))
# What a transform calls otherwise than Flax, or Flax has no place for.
ELSEWHERE = {'axis', 'batch_axis', 'check_batch', 'feature_axis'}
# Of convolutional networks no checkpoint is known with a scale around zero.
WITHOUT_OFFSET = 'BatchNorm', 'GroupNorm', 'InstanceNorm'


def linen_module(package, name):
  options = {'BatchNorm': {'use_running_average': False}}
  return getattr(package, name)(**options.get(name, {}))


def nnx_module(package, name, **options):
  groups = {'num_groups': 2} if name == 'GroupNorm' else {}
  return getattr(package, name)(4, **{'rngs': nnx.Rngs(0)} | groups | options)


@every_class
def test_is_flax_class(name):
  for flax, ours in ((nn, normkit.linen), (nnx, normkit.nnx)):
    assert issubclass(getattr(ours, name), getattr(flax, name))
    assert getattr(ours, name).__name__ == name


@every_class
def test_docstrings_tell_every_argument(name):
  """And each entry of it has words."""
  for package in (normkit.linen, normkit.nnx):
    cls = getattr(package, name)
    taken = set(inspect.signature(cls.__init__).parameters)
    taken -= {'self', 'parent', 'name'}
    if 'force_float32_reductions' in taken:  # in no docstring of Flax
      assert 'statistics are' in cls.__doc__ or 'in float32' in cls.__doc__
    for argument in taken:
      assert f'\n  {argument}: ' in cls.__doc__, (cls, argument)


@every_norm
def test_options_of_the_transform(name):
  """An option that a transform gains is asked for in the modules."""
  transform = getattr(nk, name)
  options = {f.name for f in dataclasses.fields(transform)} - ELSEWHERE
  options -= {'scale_offset'} if name in WITHOUT_OFFSET else set()
  linen = {f.name for f in dataclasses.fields(getattr(normkit.linen, name))}
  assert options <= linen
  cls = getattr(normkit.nnx, name)
  assert options <= set(inspect.signature(cls.__init__).parameters)


@every_norm
def test_options_reach_the_function(name):
  """What the drop-ins of a norm hold, the functions that they call take."""
  public, called = {
    'BatchNorm': (nk.batch_norm, nk.batch_norm),
    'GroupNorm': (nk.group_norm, group.group_norm_any),
    'InstanceNorm': (nk.instance_norm, general.normalize_any),
  }.get(name, (nk.normalize, general.normalize_any))
  fields = {f.name for f in dataclasses.fields(getattr(nk, name))} - ELSEWHERE
  options = fields - {'use_scale', 'use_bias', 'param_dtype'}
  options -= {'scale_offset'} if name in WITHOUT_OFFSET else set()
  for function in public, called:
    assert options <= inspect.signature(function).parameters.keys()


@every_norm
def test_interceptors_find_linen(name):
  """As a loader of adapters does that looks for Flax's classes."""
  found = []

  def look(call, args, kwargs, context):
    found.append(isinstance(context.module, getattr(nn, name)))
    return call(*args, **kwargs)

  module, x = linen_module(normkit.linen, name), jnp.ones((2, 3, 32))
  with nn.intercept_methods(look):
    jax.eval_shape(module.init, jax.random.key(0), x)
  assert found == [True]


@every_norm
def test_pickle_and_copy(name):
  """A linen module is its fields; an nnx module keeps its variables."""
  module = linen_module(normkit.linen, name)
  assert pickle.loads(pickle.dumps(module)) == module
  layer = nnx_module(normkit.nnx, name)
  again = copy.deepcopy(layer)
  x = jnp.arange(24.0).reshape(2, 3, 4)
  np.testing.assert_array_equal(layer(x), again(x))
  assert type(again) is type(layer)
  pickled = pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state(layer))))
  chex.assert_trees_all_equal(pickled, nnx.to_pure_dict(nnx.state(layer)))


def test_set_attributes_and_view_find_nnx():
  class Model(nnx.Module):
    def __init__(self, package):
      self.norm = package.BatchNorm(4, rngs=nnx.Rngs(0))
      self.other = package.LayerNorm(4, rngs=nnx.Rngs(0))

  model = Model(normkit.nnx)
  model.set_attributes(nnx.BatchNorm, use_running_average=True)
  assert model.norm.use_running_average
  seen = nnx.view(model, only=nnx.BatchNorm, use_running_average=False)
  assert not seen.norm.use_running_average


@every_norm
def test_constructor_rejects_before_it_draws(name):
  """A width for an epsilon costs no key."""
  rngs = nnx.Rngs(0)
  with pytest.raises(ValueError, match='epsilon=4 '):
    nnx_module(normkit.nnx, name, epsilon=4, rngs=rngs)
  assert rngs.params.count[...] == 0
