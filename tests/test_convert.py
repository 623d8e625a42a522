"""Weights of other frameworks: the outputs before and after are the same.

What PyTorch, Keras, Haiku and Equinox compute is compared where they are
installed. The twins of those tests need none: convolution, batch norm and
matrix product in NumPy, in float64.
"""

import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import chex
import flax
from flax import linen as nn, nnx
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import normkit.linen
import normkit.nnx
from normkit.tools import convert, files

KEY = jax.random.key(0)


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def empty(model, *args, **kwargs):
  return jax.eval_shape(lambda: model.init(KEY, *args, **kwargs))


def close(actual, expected, tolerance=2e-5):
  chex.assert_trees_all_close(
    np.asarray(actual), np.asarray(expected), atol=tolerance, rtol=tolerance
  )


# References, channels first, as PyTorch defines them, in float64.


def reference_conv(x, weight, bias, groups=1):
  """Correlation without padding, (N, I, H, W) by (O, I / groups, h, w)."""
  x, weight = x.astype(np.float64), weight.astype(np.float64)
  windows = np.lib.stride_tricks.sliding_window_view(
    x, weight.shape[2:], axis=(2, 3)
  )
  shape = x.shape[0], groups, -1, *windows.shape[2:]
  windows = windows.reshape(shape)
  weight = weight.reshape(groups, -1, *weight.shape[1:])
  y = np.einsum('ngihwab,goiab->ngohw', windows, weight)
  return y.reshape(x.shape[0], -1, *y.shape[3:]) + bias[:, None, None]


def reference_conv_transpose(x, weight, bias, stride):
  """The adjoint of a convolution: each input adds its kernel to the output."""
  n, _, height, width = x.shape
  _, out, h, w = weight.shape
  y = np.zeros((n, out, (height - 1) * stride + h, (width - 1) * stride + w))
  for i in range(height):
    for j in range(width):
      patch = np.einsum('ni,iohw->nohw', x[:, :, i, j], weight)
      y[:, :, i * stride : i * stride + h, j * stride : j * stride + w] += patch
  return y + bias[:, None, None]


def reference_batch_norm(x, scale, bias, mean, var, epsilon=1e-5):
  def form(v):
    return np.asarray(v, np.float64)[:, None, None]

  return (x - form(mean)) / np.sqrt(form(var) + epsilon) * form(scale) + form(
    bias
  )


def channels_last(x):
  return np.moveaxis(x, 1, -1)


OPTIONS = convert.batch_norm_options('torch')


class Net(nn.Module):
  """Convolution, batch norm, transposed and grouped ones, flatten, dense."""

  norm: type = normkit.linen.BatchNorm

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 3), padding='VALID', name='conv')(x)
    x = self.norm(use_running_average=not train, name='bn', **OPTIONS)(x)
    x = nn.relu(x)
    x = nn.ConvTranspose(6, (2, 3), (2, 2), padding='VALID', name='up')(x)
    x = nn.Conv(
      12, (3, 2), padding='VALID', feature_group_count=3, name='grouped'
    )(x)
    return nn.Dense(4, name='fc')(x.reshape(len(x), -1))


TRANSPOSED = ('up',)
X = draw(0, 2, 2, 5, 6)  # channels first
UP = 6, 9  # the sizes after the transposed convolution
FLAT = {'fc': (12, UP[0] - 2, UP[1] - 1)}


def torch_state():
  """Arrays by PyTorch's names, by PyTorch's layouts."""
  shapes = {
    'conv.weight': (6, 2, 3, 3),
    'conv.bias': (6,),
    'bn.weight': (6,),
    'bn.bias': (6,),
    'bn.running_mean': (6,),
    'bn.running_var': (6,),
    'up.weight': (6, 6, 2, 3),
    'up.bias': (6,),
    'grouped.weight': (12, 2, 3, 2),
    'grouped.bias': (12,),
    'fc.weight': (4, 12 * 4 * 8),
    'fc.bias': (4,),
  }
  state = {k: draw(i, *shape) for i, (k, shape) in enumerate(shapes.items())}
  state['bn.running_var'] = np.square(state['bn.running_var']) + 0.1
  return state | {'bn.num_batches_tracked': np.asarray(7)}


def reference_net(state, x):
  def of(layer):
    return state[f'{layer}.weight'], state[f'{layer}.bias']

  y = reference_conv(x, *of('conv'))
  stats = state['bn.running_mean'], state['bn.running_var']
  y = np.maximum(reference_batch_norm(y, *of('bn'), *stats), 0)
  y = reference_conv_transpose(y, *of('up'), stride=2)
  y = reference_conv(y, *of('grouped'), groups=3)
  weight, bias = of('fc')
  return y.reshape(len(y), -1) @ weight.T.astype(np.float64) + bias


@pytest.fixture(scope='module')
def template():
  return empty(Net(), channels_last(X))


def converted(state, template, **options):
  options = {'flatten': FLAT, 'transposed': TRANSPOSED} | options
  return convert.from_torch(state, template, **options)


def test_linen_net_as_numpy_computes_it(template):
  state = torch_state()
  before = {k: v.copy() for k, v in state.items()}
  variables = converted(state, template)
  chex.assert_trees_all_equal_shapes_and_dtypes(variables, template)
  chex.assert_trees_all_equal(state, before)
  y = Net().apply(variables, channels_last(X))
  close(y, reference_net(state, X), 1e-4)


class NNXNet(nnx.Module):
  def __init__(self, rngs):
    valid = {'padding': 'VALID', 'rngs': rngs}
    self.conv = nnx.Conv(2, 6, (3, 3), **valid)
    self.bn = normkit.nnx.BatchNorm(6, **OPTIONS, rngs=rngs)
    self.up = nnx.ConvTranspose(6, 6, (2, 3), (2, 2), **valid)
    self.grouped = nnx.Conv(6, 12, (3, 2), feature_group_count=3, **valid)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.fc = nnx.Linear(12 * 4 * 8, 4, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.bn(self.conv(x)))
    x = self.grouped(self.up(x))
    return self.fc(self.drop(x.reshape(len(x), -1)))


def test_nnx_net_as_numpy_computes_it():
  model = NNXNet(nnx.Rngs(0))
  before = jax.tree.map(
    np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param))
  )
  state = torch_state()
  filled = convert.from_torch(state, model, flatten=FLAT)  # sees `up` itself
  filled.eval()
  close(filled(channels_last(X)), reference_net(state, X), 1e-4)
  after = jax.tree.map(
    np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param))
  )
  chex.assert_trees_all_equal(before, after)
  filled.train()
  filled(channels_last(X))  # draws a key, which the first model does not share
  assert model.drop.rngs.count[...] == 0


def test_abstract_nnx_model_is_filled():
  abstract = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
  weight, bias = draw(0, 2, 3), draw(1, 2)
  filled = convert.from_torch({'weight': weight, 'bias': bias}, abstract)
  x = draw(2, 4, 3)
  close(filled(x), x.astype(np.float64) @ weight.T + bias)


def test_way_back_is_the_inverse(template):
  state = torch_state()
  variables = converted(state, template)
  back = convert.to_torch(variables, flatten=FLAT, transposed=TRANSPOSED)
  tracked = back.pop('bn.num_batches_tracked')
  assert tracked == 0 and tracked.dtype == np.int64 and tracked.shape == ()
  state.pop('bn.num_batches_tracked')
  chex.assert_trees_all_equal(back, state)
  assert all(value.flags.c_contiguous for value in back.values())


def test_through_a_file(template, tmp_path):
  path = tmp_path / 'net.safetensors'
  files.save_arrays(path, torch_state())
  state = files.load_arrays(path)
  chex.assert_trees_all_equal(state, torch_state())
  chex.assert_trees_all_equal(
    converted(state, template), converted(torch_state(), template)
  )


# Names.


def test_prefixes_functions_and_order_name_the_same_layers():
  class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(11):
        x = nn.Dense(3, use_bias=False, name=f'Dense_{i}')(x)
      return nn.LayerNorm(name='norm')(x)

  template = empty(Nested(), np.ones((1, 3), np.float32))
  state = {f'net.body.{i}.weight': draw(i, 3, 3) for i in reversed(range(11))}
  state |= {'net.head.weight': draw(11, 3), 'net.head.bias': draw(12, 3)}
  mapping = {f'net.body.{i}': f'Dense_{i}' for i in range(11)}
  mapping['net.head'] = 'norm'

  def function(name):
    return 'norm' if 'head' in name else 'Dense_' + name.rpartition('.')[2]

  by_mapping = convert.from_torch(state, template, names=mapping)
  for i in range(11):
    kernel = by_mapping['params'][f'Dense_{i}']['kernel']
    chex.assert_trees_all_equal(np.asarray(kernel), draw(i, 3, 3).T)
  for names in (function, 'order'):
    by_other = convert.from_torch(state, template, names=names)
    chex.assert_trees_all_equal(by_other, by_mapping)
  back = convert.to_torch(by_mapping, names=mapping)
  chex.assert_trees_all_equal(back, state)


def test_beginning_of_a_name_is_of_whole_parts():
  template = {
    'params': {'a': {'b': {'x': jnp.ones(1)}}, 'l10': {'x': jnp.ones(1)}}
  }
  state = {'l1.b.x': np.zeros(1), 'l10.x': np.ones(1)}
  got = convert.from_torch(state, template, names={'l1': 'a'})
  assert got['params']['a']['b']['x'] == 0 and got['params']['l10']['x'] == 1


def test_order_lists_both_sides():
  state = {'a0.weight': np.ones((2, 3)), 'a1.weight': np.ones((2, 3))}
  template = {'params': {'Dense_0': {'kernel': jnp.ones((3, 2))}}}
  with pytest.raises(ValueError, match=r"2 layers .*'a0', 'a1'.*1.*'Dense_0'"):
    convert.from_torch(state, template, names='order')


@pytest.mark.parametrize(
  ('there', 'here'),
  [
    (('encoder', 'decoder'), ('Dense_0', 'Dense_1')),
    (('net.0', 'net.2'), ('encoder', 'decoder')),
  ],
)
def test_order_refuses_names_that_have_none(there, here):
  state = {f'{name}.weight': draw(0, 4, 4) for name in there}
  kernels = {name: {'kernel': jnp.ones((4, 4))} for name in here}
  with pytest.raises(ValueError, match=r"'decoder' and 'encoder'.*Give names="):
    convert.from_torch(state, {'params': kernels}, names='order')


def test_order_takes_a_first_layer_without_a_number():
  kernels = {f'Dense_{i}': {'kernel': jnp.ones((4, 4))} for i in range(2)}
  state = {'dense_1': [draw(1, 4, 4)], 'dense': [draw(0, 4, 4)]}
  got = convert.from_keras(state, {'params': kernels}, names='order')
  for i in range(2):
    kernel = np.asarray(got['params'][f'Dense_{i}']['kernel'])
    chex.assert_trees_all_equal(kernel, draw(i, 4, 4))


def test_a_parameter_called_kernel_goes_as_it_is():
  value = draw(0, 4, 4)
  template = {'params': {'layer': {'kernel': jnp.ones((4, 4))}}}
  got = convert.from_torch({'layer.kernel': value}, template)
  chex.assert_trees_all_equal(
    np.asarray(got['params']['layer']['kernel']), value
  )


WRAPPED = {
  'checkpoint': lambda s: {'epoch': 3, 'state_dict': s, 'optimizer': {}},
  'of modules': lambda s: {
    name: {k.partition('.')[2]: v for k, v in s.items() if k[0] == name[0]}
    for name in ('a', 'b')
  },
  'prefix': lambda s: {f'module.{k}': v for k, v in s.items()},
  'compiled': lambda s: {f'module._orig_mod.{k}': v for k, v in s.items()},
  'both': lambda s: {'model': {f'model.{k}': v for k, v in s.items()}},
}


@pytest.mark.parametrize('form', WRAPPED)
def test_wrapped_state_dicts(form):
  state = {
    'a.weight': draw(0, 2, 3),
    'a.bias': draw(1, 2),
    'b.bias': draw(2, 2),
  }
  template = {'params': {k: {'bias': jnp.ones(2)} for k in 'ab'}}
  template['params']['a']['kernel'] = jnp.ones((3, 2))
  want = convert.from_torch(state, template)
  wrapped = WRAPPED[form](state)
  chex.assert_trees_all_equal(convert.from_torch(wrapped, template), want)
  like = convert.to_torch(want, like=wrapped)
  assert next(iter(like.values())).shape == (2, 3) and len(like) == 3


def test_prefixes_that_are_known_are_kept():
  state = {'model.a.bias': draw(0, 2)}
  leaf = {'a': {'bias': jnp.ones(2)}}
  for template, names in (
    ({'params': {'model': leaf}}, None),
    ({'params': {'x': leaf}}, {'model': 'x'}),
    ({'params': {'model.a': leaf['a']}}, lambda name: name),
  ):
    got = convert.from_torch(state, template, names=names)
    np.testing.assert_array_equal(jax.tree.leaves(got)[0], draw(0, 2))
  with pytest.raises(ValueError, match=r"may be the state dict: \['model',"):
    convert.from_torch({'model': state, 'net': state}, {'params': leaf})
  with pytest.raises(TypeError, match=r'model\.state_dict\(\)'):
    convert.from_torch([1], {'params': leaf})


# The receiver's form.


def test_boxes_and_kinds_of_dicts_come_back():
  def boxed(shape, names):
    struct = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nn.LogicallyPartitioned(struct, names)

  template = flax.core.freeze(
    {
      'params': {
        'a': {'kernel': boxed((3, 2), ('in', 'out')), 'bias': jnp.ones(2)}
      },
      'batch_stats': {},
      'none': None,
    }
  )
  state = {'a.weight': draw(0, 2, 3), 'a.bias': draw(1, 2)}
  got = convert.from_torch(state, template)
  assert isinstance(got, flax.core.FrozenDict)
  chex.assert_trees_all_equal_structs(got, template)
  kernel = got['params']['a']['kernel']
  assert isinstance(kernel, nn.LogicallyPartitioned)
  assert kernel.names == ('in', 'out')
  np.testing.assert_array_equal(kernel.value, state['a.weight'].T)
  chex.assert_trees_all_equal(convert.to_torch(got), state)


def test_arrays_go_where_the_receiver_says():
  devices = jax.devices()
  assert len(devices) > 1
  mesh = jax.sharding.Mesh(np.asarray(devices[:2]), ('x',))
  split = jax.sharding.NamedSharding(mesh, jax.P('x'))
  last = jax.sharding.SingleDeviceSharding(devices[-1])
  template = {
    'params': {
      'a': jax.ShapeDtypeStruct((4,), jnp.float32, sharding=split),
      'b': jax.device_put(jnp.ones(4), last),
      'c': jnp.ones(4),
      'd': jax.ShapeDtypeStruct((4,), jnp.bfloat16),
    }
  }
  state = {name: draw(0, 4) for name in 'abcd'}
  got = convert.from_torch(state, template)['params']
  assert got['a'].sharding == split and got['b'].sharding == last
  assert not got['c'].committed and not got['d'].committed
  assert got['d'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(got['a'], draw(0, 4))
  model = nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
  model.bias.set_value(template['params']['a'])
  state = {'weight': draw(0, 4, 3), 'bias': draw(0, 4)}
  assert convert.from_torch(state, model).bias[...].sharding == split


# The account.


@pytest.mark.parametrize(
  ('key', 'value', 'fault'),
  [
    ('fc.bias', np.ones(4, np.int8), "dtype: 'fc.bias' int8"),
    ('fc.bias', np.ones(4, bool), "dtype: 'fc.bias' bool"),
    ('bn.running_var', -np.ones(6), "value: 'bn.running_var' is negative"),
    ('bn.running_var', np.full(6, np.nan), "value: 'bn.running_var' is"),
  ],
)
def test_values_that_would_be_wrong_are_refused(key, value, fault, template):
  with pytest.raises(ValueError, match=fault):
    converted(torch_state() | {key: value}, template)


@pytest.mark.parametrize(
  ('count', 'fault'),
  [(2**32 + 5, 'range'), (-1, 'value'), (1.5, 'dtype')],
)
def test_counts_that_would_be_wrong_are_refused(count, fault):
  options = convert.batch_norm_options('torch', momentum=None)
  norm = normkit.linen.BatchNorm(use_running_average=True, **options)
  here = empty(norm, np.ones((2, 6), np.float32))
  state = {k[3:]: v for k, v in torch_state().items() if k.startswith('bn.')}
  del state['num_batches_tracked']
  with pytest.raises(ValueError, match=f"{fault}: 'count='"):
    convert.from_torch(state, here, count=count)
  state['num_batches_tracked'] = np.asarray(count)
  with pytest.raises(ValueError, match=f"{fault}: 'num_batches_tracked'"):
    convert.from_torch(state, here)


def test_all_faults_are_in_one_message(template):
  state = torch_state()
  del state['conv.bias']
  state['head.weight'] = np.ones((2, 2))
  state['grouped.weight'] = state['grouped.weight'][:, :, :2]
  state['fc.bias'] = state['fc.bias'].astype(np.complex64)
  state['up.bias'] = state['up.bias'].astype(np.float64) + 1e300
  with pytest.raises(ValueError) as caught:
    converted(state, template)
  message = str(caught.value)
  for part in (
    '5 arrays',
    "missing: 'conv/bias' (6,)",
    "extra: 'head.weight' (2, 2)",
    "shape: 'grouped.weight' (12, 2, 2, 2) becomes (2, 2, 2, 12), but "
    "'grouped/kernel' is (3, 2, 2, 12)",
    "dtype: 'fc.bias' complex64",
    "range: 'up.bias'",
  ):
    assert part in message


def test_ignored_arrays_are_left_out(template):
  state = torch_state() | {'head.weight': np.ones((2, 2))}
  got = converted(state, template, ignore=('head.*',))
  chex.assert_trees_all_equal(got, converted(torch_state(), template))


def test_count_is_read_or_given_or_missed():
  options = convert.batch_norm_options('torch', momentum=None)
  model = normkit.linen.BatchNorm(use_running_average=True, **options)
  template = empty(model, np.ones((2, 3), np.float32))
  state = {
    k[3:]: v[:3] if v.ndim else v
    for k, v in torch_state().items()
    if k[:2] == 'bn'
  }
  got = convert.from_torch(state, template)['batch_stats']['count']
  chex.assert_trees_all_equal(np.asarray(got), np.full(3, 7, np.int32))
  assert (
    convert.to_torch(convert.from_torch(state, template))['num_batches_tracked']
    == 7
  )
  del state['num_batches_tracked']
  with pytest.raises(ValueError, match="missing: '/count'"):
    convert.from_torch(state, template)
  got = convert.from_torch(state, template, count=5)['batch_stats']['count']
  chex.assert_trees_all_equal(np.asarray(got), np.full(3, 5, np.int32))


def test_two_arrays_for_one_place(template):
  with pytest.raises(ValueError, match=r"'conv\.\w+' and 'bn\.\w+' both go to"):
    converted(torch_state(), template, names=lambda layer: 'conv')
  variables = converted(torch_state(), template)
  with pytest.raises(ValueError, match='two arrays would be'):
    convert.to_torch(variables, names=lambda layer: 'x')


@pytest.mark.parametrize(
  'key',
  [
    'rnn.weight_ih_l0',
    'attention.in_proj_weight',
    'conv.weight_g',
    'fc.parametrizations.weight.original0',
  ],
)
def test_layers_that_are_not_converted_are_named(key):
  with pytest.raises(ValueError, match=key):
    convert.from_torch({key: np.ones((2, 2))}, {'params': {}})


@pytest.mark.parametrize(
  'name',
  [
    '../../etc/passwd',
    '/abs',
    'a..b',
    'a\x00b',
    'a\nb',
    '',
    'a.',
    'a\\b',
    '\u202ea',
  ],
)
def test_hostile_names_are_refused(name, tmp_path):
  template = {'params': {'a': {'bias': jnp.ones(1)}}}
  with pytest.raises(ValueError, match='is not that of an array'):
    convert.from_torch({name: np.ones(1)}, template)
  with pytest.raises(ValueError, match='is not that of an array'):
    files.save_arrays(tmp_path / 'x', {name: np.ones(1)})
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'flatten': {'nowhere': (1,)}}, "flatten names 'nowhere'"),
    ({'flatten': {'fc': (2, 2)}}, 'of 4 elements, but it has 384 inputs'),
    ({'names': 'oder'}, "or 'order', got 'oder'"),
  ],
)
def test_wrong_options_are_named(options, match, template):
  with pytest.raises(ValueError, match=match):
    converted(torch_state(), template, **options)


def test_wrong_kinds_of_argument():
  with pytest.raises(TypeError, match='variables must be'):
    convert.from_torch({}, [1])
  with pytest.raises(TypeError, match=r"patterns as a sequence: \('fc\.\*',\)"):
    convert.from_torch({'a': np.ones(1)}, {'params': {}}, ignore='fc.*')
  with pytest.raises(TypeError, match=r"'a\.bias' must be an array of numbers"):
    convert.from_torch({'a.bias': 'text'}, {'params': {}})
  shape = {'params': {'a': {'bias': jax.ShapeDtypeStruct((1,), jnp.float32)}}}
  with pytest.raises(TypeError, match='a/bias is a shape'):
    convert.to_torch(shape)
  with pytest.raises(ValueError, match='norm over several axes'):
    convert.from_torch(
      {'n.weight': np.ones((2, 3, 4))},
      {'params': {'n': {'scale': np.ones((3, 4, 2))}}},
    )


def test_norms_of_equinox_over_several_axes_are_refused():
  eqx = pytest.importorskip(
    'equinox', reason="needs equinox: pip install 'normkit[benchmarks]'"
  )
  here = {name: jnp.ones((4, 4)) for name in ('scale', 'bias')}
  with pytest.raises(ValueError, match='norm over several axes'):
    convert.from_equinox(eqx.nn.LayerNorm((4, 4)), {'params': here})


# Options.


@pytest.mark.parametrize(
  ('options', 'error'),
  [
    ({'momentum': 5}, ValueError),
    ({'momentum': float('nan')}, ValueError),
    ({'momentum': '0.1'}, TypeError),
    ({'epsilon': -1}, ValueError),
    ({'epsilon': 'x'}, TypeError),
  ],
)
def test_options_that_no_norm_has_are_refused(options, error):
  (name,) = options
  with pytest.raises(error, match=f'{name} must'):
    convert.batch_norm_options('torch', **options)


def test_options_of_each_framework():
  assert convert.batch_norm_options('torch', momentum=0.25)['momentum'] == 0.75
  assert convert.batch_norm_options('torch')['unbiased']
  assert convert.batch_norm_options('torch', momentum=None)['momentum'] is None
  assert convert.batch_norm_options('keras') == {
    'epsilon': 1e-3,
    'momentum': 0.99,
    'unbiased': False,
    'debias': False,
  }
  haiku = convert.batch_norm_options('haiku', momentum=0.9, epsilon=1e-4)
  assert haiku['debias'] and haiku['epsilon'] == 1e-4
  with pytest.raises(ValueError, match='decay_rate'):
    convert.batch_norm_options('haiku')
  with pytest.raises(ValueError, match=r"one of torch, keras.*got 'jax'"):
    convert.batch_norm_options('jax')


# Keras's layouts without Keras.


def test_keras_layouts_without_keras(tmp_path):
  h5py = pytest.importorskip('h5py', reason='writes an HDF5 file')

  class Depthwise(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(
        6, (2, 2), padding='VALID', feature_group_count=3, name='depthwise'
      )(x)
      x = normkit.linen.BatchNorm(
        use_running_average=True, epsilon=1e-3, name='norms/bn'
      )(x)
      return nn.Dense(2, name='dense')(x)

  x = draw(0, 2, 4, 4, 3)
  kernel = draw(1, 2, 2, 3, 2)  # (H, W, C, M)
  bias, gamma, beta, mean = draw(2, 4, 6)
  var = np.square(draw(3, 6)) + 0.1
  dense = draw(4, 6, 2), draw(5, 2)
  weights = {
    'depthwise': [kernel, bias],
    'norms/bn': [gamma, beta, mean, var],
    'dense': dense,
  }
  path = tmp_path / 'k.weights.h5'
  with h5py.File(path, 'w') as file:
    for layer, arrays in weights.items():
      for i, array in enumerate(arrays):
        name = layer.replace('/', '/layers/')
        file[f'layers/{name}/vars/{i}'] = array
    file['optimizer/vars/0'] = 3
  template = {
    'params': {
      'depthwise': {'kernel': (2, 2, 1, 6), 'bias': (6,)},
      'norms': {'bn': {'scale': (6,), 'bias': (6,)}},
      'dense': {'kernel': (6, 2), 'bias': (2,)},
    },
    'batch_stats': {'norms': {'bn': {'mean': (6,), 'var': (6,)}}},
  }
  template = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    template,
    is_leaf=lambda node: isinstance(node, tuple),
  )
  variables = convert.from_keras(files.load_arrays(path), template)
  chex.assert_trees_all_equal(variables, convert.from_keras(weights, template))
  # Keras: output c * M + m is channel c by kernel [..., c, m].
  windows = np.lib.stride_tricks.sliding_window_view(
    x.astype(np.float64), (2, 2), axis=(1, 2)
  )
  y = np.einsum('nhwcab,abcm->nhwcm', windows, kernel)
  y = y.reshape(*y.shape[:3], 6) + bias
  y = (y - mean) / np.sqrt(var + 1e-3) * gamma + beta
  conv = nn.Conv(6, (2, 2), padding='VALID', feature_group_count=3)
  bn = normkit.linen.BatchNorm(use_running_average=True, epsilon=1e-3)
  z = conv.apply({'params': variables['params']['depthwise']}, x)
  z = bn.apply(
    jax.tree.map(
      lambda a: a, {k: v['norms']['bn'] for k, v in variables.items()}
    ),
    z,
  )
  close(z, y)
  with pytest.raises(ValueError, match='not a name in the weights of Keras'):
    convert.from_keras({'dense/weight:0': np.ones(1)}, template)


def keras_file(path, kind):
  """A file as Keras writes it: a layer in a model in a model, and a norm."""
  h5py = pytest.importorskip('h5py', reason='writes an HDF5 file')
  kernel, bias = draw(0, 3, 2), draw(1, 2)
  norm = {'gamma': draw(2, 2), 'beta': draw(3, 2)}
  norm |= {'moving_mean': draw(4, 2), 'moving_variance': draw(5, 2) ** 2}
  data = io.BytesIO()
  with h5py.File(data, 'w') as file:
    if kind == 'legacy':
      for name, value in {'kernel': kernel, 'bias': bias}.items():
        file[f'model_weights/body/body/stem/{name}:0'] = value
      for name, value in norm.items():
        file[f'model_weights/norm/net/norm/{name}:0'] = value
      file['optimizer_weights/adam/norm/beta:0'] = draw(6, 2)
      file.create_group('model_weights/top_level_model_weights')
    else:
      titles = {
        'layers/sequential': 'body',
        'layers/sequential/layers/dense_1': 'stem',
        'layers/batch_normalization': 'norm',
        'optimizer': 'adam',
      }
      for group, title in titles.items():
        file.create_group(f'{group}/vars').attrs['name'] = title
      for i, value in enumerate((kernel, bias)):
        file[f'layers/sequential/layers/dense_1/vars/{i}'] = value
      for i, value in enumerate(norm.values()):
        file[f'layers/batch_normalization/vars/{i}'] = value
      file['optimizer/vars/0'] = 3
  if kind == 'archive':
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('config.json', '{}')
      archive.writestr('model.weights.h5', data.getvalue())
  else:
    path.write_bytes(data.getvalue())
  params = {
    'body': {'stem': {'kernel': kernel, 'bias': bias}},
    'norm': {'scale': norm['gamma'], 'bias': norm['beta']},
  }
  mean, var = norm['moving_mean'], norm['moving_variance']
  return {
    'params': params,
    'batch_stats': {'norm': {'mean': mean, 'var': var}},
  }


@pytest.mark.parametrize('kind', ['weights', 'archive', 'legacy'])
def test_files_of_keras_hold_the_names_of_layers(kind, tmp_path):
  want = keras_file(tmp_path / 'file', kind)
  got = convert.from_keras(files.load_arrays(tmp_path / 'file'), want)
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, got), want)


def test_layers_of_one_name_keep_those_of_their_classes(tmp_path):
  h5py = pytest.importorskip('h5py', reason='writes an HDF5 file')
  with h5py.File(tmp_path / 'file', 'w') as file:
    for name in ('dense', 'dense_1'):
      file[f'layers/{name}/vars/0'] = draw(0, 2)
      file[f'layers/{name}/vars'].attrs['name'] = 'same'
  names = {'layers/dense/vars/0', 'layers/dense_1/vars/0'}
  assert files.load_arrays(tmp_path / 'file').keys() == names


def test_attributes_of_a_layer_of_keras_keep_their_names(tmp_path):
  h5py = pytest.importorskip('h5py', reason='writes an HDF5 file')
  with h5py.File(tmp_path / 'file', 'w') as file:
    file['layers/attention/key_dense/vars/0'] = draw(0, 2)
    file['layers/attention/key_dense/vars'].attrs['name'] = 'key'
    file.create_group('layers/attention/vars').attrs['name'] = 'mha'
  name = 'layers/mha/key_dense/vars/0'
  assert files.load_arrays(tmp_path / 'file').keys() == {name}


@pytest.mark.parametrize('leaf', ['scale', 'bias'])
def test_gamma_and_beta_of_keras_are_told_by_name_alone(leaf):
  there = {'scale': 'gamma', 'bias': 'beta'}[leaf]
  value, mean, var = draw(0, 4), draw(1, 4), np.square(draw(2, 4))
  here = {
    'params': {'bn': {leaf: jnp.ones(4)}},
    'batch_stats': {'bn': {'mean': jnp.ones(4), 'var': jnp.ones(4)}},
  }
  with pytest.raises(ValueError, match=f"'bn' has a {leaf} alone.*by name"):
    convert.from_keras({'bn': [value, mean, var]}, here)
  named = {there: value, 'moving_mean': mean, 'moving_variance': var}
  got = convert.from_keras({'bn': named}, here)
  expected = {leaf: value, 'mean': mean, 'var': var}
  flat = got['params']['bn'] | got['batch_stats']['bn']
  chex.assert_trees_all_equal(jax.tree.map(np.asarray, flat), expected)


# The frameworks themselves, where they are installed.

TORCH = "needs torch: pip install 'normkit[benchmarks]'"


def test_reference_is_what_torch_computes():
  torch = pytest.importorskip('torch', reason=TORCH)
  t = torch.nn
  layers = {
    'conv': t.Conv2d(2, 6, 3),
    'bn': t.BatchNorm2d(6),
    'relu': t.ReLU(),
    'up': t.ConvTranspose2d(6, 6, (2, 3), 2),
    'grouped': t.Conv2d(6, 12, (3, 2), groups=3),
    'flatten': t.Flatten(),
    'fc': t.Linear(12 * 4 * 8, 4),
  }
  net = t.Sequential()
  for name, layer in layers.items():
    net.add_module(name, layer)
  state = torch_state()
  net.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
  with torch.no_grad():
    y = net.eval()(torch.from_numpy(X)).numpy()
  close(y, reference_net(state, X), 1e-4)


def torch_pair(name):
  """A PyTorch layer, the same in Flax, and an input with channels first."""
  torch = pytest.importorskip('torch', reason=TORCH)
  t = torch.nn
  valid = {'padding': 'VALID'}
  running = normkit.linen.BatchNorm(use_running_average=True, **OPTIONS)
  pairs = {
    'linear': (t.Linear(5, 3), nn.Dense(3), (4, 5)),
    'no bias': (
      t.Linear(5, 3, bias=False),
      nn.Dense(3, use_bias=False),
      (4, 5),
    ),
    'conv1d': (t.Conv1d(3, 4, 3), nn.Conv(4, (3,), **valid), (2, 3, 7)),
    'conv3d': (
      t.Conv3d(2, 4, (1, 2, 3), stride=2),
      nn.Conv(4, (1, 2, 3), strides=2, **valid),
      (2, 2, 3, 4, 5),
    ),
    'depthwise': (
      t.Conv2d(4, 8, 3, groups=4, padding=1),
      nn.Conv(8, (3, 3), padding=1, feature_group_count=4),
      (2, 4, 5, 6),
    ),
    'transposed': (
      t.ConvTranspose2d(
        4, 4, (3, 2), stride=(2, 1), padding=1, output_padding=(1, 0)
      ),
      nn.ConvTranspose(4, (3, 2), (2, 1), padding=((1, 2), (0, 0))),
      (2, 4, 5, 6),
    ),
    'transposed, dilated': (
      t.ConvTranspose1d(3, 5, 3, stride=2, dilation=2),
      nn.ConvTranspose(5, (3,), (2,), padding=((4, 4),), kernel_dilation=2),
      (2, 3, 6),
    ),
    'batch': (t.BatchNorm2d(4), running, (3, 4, 5, 6)),
    'layer': (t.LayerNorm(6), normkit.linen.LayerNorm(epsilon=1e-5), (2, 3, 6)),
    'group': (
      t.GroupNorm(2, 4),
      normkit.linen.GroupNorm(num_groups=2, epsilon=1e-5),
      (2, 4, 5, 6),
    ),
    'instance': (
      t.InstanceNorm2d(4, affine=True),
      normkit.linen.InstanceNorm(epsilon=1e-5),
      (2, 4, 5, 6),
    ),
  }
  there, here, shape = pairs[name]
  with torch.no_grad():
    for i, value in enumerate(there.state_dict().values()):
      if value.ndim:
        value.copy_(torch.from_numpy(np.abs(draw(i, *value.shape)) + 0.1))
  return there.eval(), here, draw(9, *shape)


@pytest.mark.parametrize(
  'name',
  [
    'linear',
    'no bias',
    'conv1d',
    'conv3d',
    'depthwise',
    'transposed',
    'transposed, dilated',
    'batch',
    'layer',
    'group',
    'instance',
  ],
)
def test_layer_as_torch_computes_it(name):
  there, here, x = torch_pair(name)
  import torch  # noqa: PLC0415

  moved = x if name == 'layer' else channels_last(x)
  template = empty(here, moved)
  transposed = ('*',) if name.startswith('transposed') else ()
  variables = convert.from_torch(
    there.state_dict(), template, transposed=transposed
  )
  with torch.no_grad():
    expected = there(torch.from_numpy(x)).numpy()
  y = here.apply(variables, moved)
  close(y, expected if name == 'layer' else channels_last(expected))
  back = convert.to_torch(variables, transposed=transposed)
  there.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})
  assert back.keys() == there.state_dict().keys()


def test_embedding_as_torch_has_it():
  torch = pytest.importorskip('torch', reason=TORCH)
  there, here = torch.nn.Embedding(7, 3), nn.Embed(7, 3)
  x = np.array([[0, 6], [3, 3]], np.int32)
  variables = convert.from_torch(there.state_dict(), empty(here, x))
  close(here.apply(variables, x), there(torch.from_numpy(x)).detach().numpy())


@pytest.mark.parametrize('momentum', [0.1, 0.3, None])
def test_training_goes_on_as_in_torch(momentum):
  torch = pytest.importorskip('torch', reason=TORCH)
  options = convert.batch_norm_options('torch', momentum=momentum)
  there = torch.nn.BatchNorm2d(4, momentum=momentum)
  here = normkit.linen.BatchNorm(use_running_average=False, **options)
  x, more = draw(0, 3, 4, 5, 6) + 2, draw(1, 3, 4, 5, 6) * 3
  there(torch.from_numpy(x))
  variables = convert.from_torch(
    there.state_dict(), empty(here, channels_last(x))
  )
  model = normkit.nnx.BatchNorm(4, **options, rngs=nnx.Rngs(0))
  model = convert.from_torch(there.state_dict(), model)
  expected = there(torch.from_numpy(more)).detach().numpy()
  y, updates = here.apply(variables, channels_last(more), mutable='batch_stats')
  close(y, channels_last(expected))
  close(model(channels_last(more)), channels_last(expected))
  for field in ('mean', 'var'):
    stored = getattr(there, f'running_{field}').numpy()
    close(updates['batch_stats'][field], stored)
    close(getattr(model, field)[...], stored)


def test_bfloat16_of_torch(tmp_path):
  torch = pytest.importorskip('torch', reason=TORCH)
  there = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
  path = tmp_path / 'x.safetensors'
  files.save_arrays(path, there.state_dict())
  loaded = files.load_arrays(path)
  assert loaded['weight'].dtype == ml_dtypes.bfloat16
  variables = convert.from_torch(loaded, empty(nn.Dense(3), np.ones((1, 5))))
  kernel = variables['params']['kernel']
  assert kernel.dtype == jnp.float32
  chex.assert_trees_all_equal(
    np.asarray(kernel), there.weight.detach().float().numpy().T
  )


@pytest.mark.parametrize(
  'dtype',
  ['bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float16', 'int64', '>f4'],
)
def test_tensors_have_the_bits_of_arrays(dtype):
  pytest.importorskip('torch', reason=TORCH)
  for shape in ((3, 2), ()):
    array = np.asarray(draw(0, *shape) * 5).astype(np.dtype(dtype))
    array.flags.writeable = False
    tensor = convert.as_tensors({'a': array})['a']
    assert dtype == '>f4' or str(tensor.dtype) == f'torch.{dtype}'
    assert tensor.shape == shape
    back = files.as_numpy('a', tensor)
    assert back.dtype == array.dtype.newbyteorder('=')
    np.testing.assert_array_equal(back, array)


def test_bfloat16_of_torch_goes_back():
  torch = pytest.importorskip('torch', reason=TORCH)
  there = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
  state = {k: v.clone() for k, v in there.state_dict().items()}
  variables = convert.from_torch(state, empty(nn.Dense(3), np.ones((1, 5))))
  back = convert.as_tensors(convert.to_torch(variables, like=state))
  there.load_state_dict(back)
  for name, value in there.state_dict().items():
    assert back[name].dtype == torch.bfloat16
    assert torch.equal(value, state[name])


class Small(nn.Module):
  """Two convolutions, one transposed, a batch norm, a layer norm."""

  options: tuple = ()

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(4, (3, 3), padding='VALID')(x)
    x = normkit.linen.BatchNorm(
      use_running_average=not train, **dict(self.options)
    )(x)
    x = nn.ConvTranspose(4, (3, 3), (2, 2), padding='VALID')(x)
    x = normkit.linen.LayerNorm(epsilon=1e-5)(x)
    return nn.Dense(5)(x.reshape(len(x), -1))


def test_haiku_net():
  hk = pytest.importorskip(
    'haiku', reason="needs haiku: pip install 'normkit[benchmarks]'"
  )

  def there(x, train):
    x = hk.Conv2D(4, 3, padding='VALID')(x)
    x = hk.BatchNorm(True, True, 0.8)(x, train)
    x = hk.Conv2DTranspose(4, 3, 2, padding='VALID')(x)
    x = hk.LayerNorm(-1, True, True)(x)
    return hk.Linear(5)(hk.Flatten()(x))

  net = hk.transform_with_state(there)
  x, more = draw(0, 2, 6, 6, 3), draw(1, 2, 6, 6, 3) + 1
  params, state = net.init(KEY, x, True)
  params = jax.tree.map(lambda a: a + draw(2, *a.shape) / 4, params)
  _, state = net.apply(params, state, None, x, True)
  options = convert.batch_norm_options('haiku', momentum=0.8)
  here = Small(tuple(options.items()))
  names = {
    'conv2_d': 'Conv_0',
    'batch_norm': 'BatchNorm_0',
    'conv2_d_transpose': 'ConvTranspose_0',
    'layer_norm': 'LayerNorm_0',
    'linear': 'Dense_0',
  }
  variables = convert.from_haiku(params, state, empty(here, x), names=names)
  back = convert.to_haiku(variables, (params, state), names=names)
  chex.assert_trees_all_equal(back, (params, state))
  expected, _ = net.apply(params, state, None, more, False)
  close(here.apply(variables, more), expected, 1e-4)
  _, state = net.apply(params, state, None, more, True)
  _, updates = here.apply(variables, more, True, mutable='batch_stats')
  stats = updates['batch_stats']['BatchNorm_0']
  close(stats['var'], state['batch_norm/~/var_ema']['average'].ravel())
  assert stats['count'].tolist() == [2] * 4


@pytest.mark.parametrize('mode', ['ema', 'batch'])
def test_equinox_net(mode):
  eqx = pytest.importorskip(
    'equinox', reason="needs equinox: pip install 'normkit[benchmarks]'"
  )

  class There(eqx.Module):
    layers: list

    def __init__(self):
      keys = jax.random.split(KEY, 3)
      self.layers = [
        eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
        eqx.nn.BatchNorm(4, 'batch', momentum=0.8, mode=mode),
        eqx.nn.ConvTranspose2d(4, 4, 3, 2, key=keys[1]),
        eqx.nn.GroupNorm(2, 4),
        eqx.nn.Linear(4 * 9 * 9, 5, key=keys[2]),
      ]

    def __call__(self, x, state):
      conv, bn, up, gn, linear = self.layers
      x, state = bn(conv(x), state)
      return linear(gn(up(x)).ravel()), state

  class Here(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(4, (3, 3), padding='VALID', name='layers_0')(x)
      x = normkit.linen.BatchNorm(use_running_average=True, name='layers_1')(x)
      x = nn.ConvTranspose(4, (3, 3), (2, 2), padding='VALID', name='layers_2')(
        x
      )
      x = normkit.linen.GroupNorm(2, epsilon=1e-5, name='layers_3')(x)
      return nn.Dense(5, name='layers_4')(x.reshape(len(x), -1))

  there, state = eqx.nn.make_with_state(There)()
  x = draw(0, 2, 3, 6, 6)
  template = empty(Here(), channels_last(x))
  options = {
    'names': lambda name: name.replace('.', '_'),
    'flatten': {'layers_4': (4, 9, 9)},
  }
  with pytest.raises(ValueError, match=r'layers\.1.*give state='):
    convert.from_equinox(there, template, **options)
  if mode == 'ema':
    with pytest.raises(ValueError, match='never trained'):
      convert.from_equinox(there, template, state=state, **options)

  @eqx.filter_jit
  def run(model, state):
    return jax.vmap(
      model, in_axes=(0, None), out_axes=(0, None), axis_name='batch'
    )(x, state)

  _, state = run(there, state)
  expected, _ = run(eqx.nn.inference_mode(there), state)
  variables = convert.from_equinox(there, template, state=state, **options)
  close(jax.jit(Here().apply)(variables, channels_last(x)), expected, 1e-4)


KERAS = """
import sys
import keras, numpy as np
from keras import layers
keras.utils.set_random_seed(0)
model = keras.Sequential([
  layers.Input((6, 6, 3)),
  layers.Conv2D(4, 3),
  layers.BatchNormalization(momentum=0.8),
  layers.Conv2DTranspose(4, 3, strides=2),
  layers.LayerNormalization(epsilon=1e-5),
  layers.Flatten(),
  layers.Dropout(0.5),
  layers.Dense(5),
])
model.compile('adam', 'mse')
x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype('float32')
model(x, training=True)
for name in ('save_weights', 'net.weights.h5'), ('save', 'k.keras'), (
  'save', 'k.h5'
):
  getattr(model, name[0])(sys.argv[1] + '/' + name[1])
np.savez(sys.argv[1] + '/xy.npz', x=x, y=model(x, training=False))
"""


def test_keras_net(tmp_path):
  pytest.importorskip('h5py', reason='needs h5py, as Keras does')
  if importlib.util.find_spec('keras') is None:
    pytest.skip('needs keras: pip install keras')
  environment = os.environ | {'KERAS_BACKEND': 'jax', 'JAX_PLATFORMS': 'cpu'}
  subprocess.run(
    [sys.executable, '-c', KERAS, str(tmp_path)], env=environment, check=True
  )
  weights = files.load_arrays(tmp_path / 'net.weights.h5')
  xy = files.load_arrays(tmp_path / 'xy.npz')
  options = convert.batch_norm_options('keras', momentum=0.8)
  here = Small(tuple(options.items()))
  names = {
    'conv2d': 'Conv_0',
    'batch_normalization': 'BatchNorm_0',
    'conv2d_transpose': 'ConvTranspose_0',
    'layer_normalization': 'LayerNorm_0',
    'dense': 'Dense_0',
  }
  template = empty(here, xy['x'])
  variables = convert.from_keras(weights, template, names=names)
  close(here.apply(variables, xy['x']), xy['y'], 1e-4)
  back = convert.to_keras(variables, weights, names=names)
  chex.assert_trees_all_equal(back, dict(weights))
  for name in ('k.keras', 'k.h5'):
    weights = files.load_arrays(tmp_path / name)
    again = convert.from_keras(weights, template, names=names)
    chex.assert_trees_all_equal(again, variables)


# Files.


def saved(tmp_path, arrays=None):
  path = tmp_path / 'net.safetensors'
  arrays = (
    {'a.weight': draw(0, 2, 3), 'a.bias': draw(1, 3)}
    if arrays is None
    else arrays
  )
  files.save_arrays(path, arrays)
  return path


def refused(path, data, match=None):
  path.write_bytes(data)
  with pytest.raises(ValueError, match=match) as caught:
    files.load_arrays(path)
  assert str(path) in str(caught.value)


def npz(**arrays):
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def hdf5(**arrays):
  h5py = pytest.importorskip('h5py', reason='makes HDF5 files')
  file = io.BytesIO()
  with h5py.File(file, 'w') as archive:
    for name, value in arrays.items():
      archive[name] = value
  return file.getvalue()


def test_files_are_told_by_content(tmp_path):
  path = tmp_path / 'misleading.pkl'
  for data in (npz(a=draw(0, 3)), hdf5(a=draw(0, 3))):
    path.write_bytes(data)
    chex.assert_trees_all_equal(files.load_arrays(path), {'a': draw(0, 3)})


@pytest.mark.parametrize('kind', ['safetensors', 'npz', 'hdf5'])
def test_files_cut_short_are_refused(kind, tmp_path):
  if kind == 'safetensors':
    data = saved(tmp_path).read_bytes()
  else:
    data = {'npz': npz, 'hdf5': hdf5}[kind](a=draw(0, 40), b=draw(1, 4))
  path = tmp_path / 'cut'
  for end in range(0, len(data), max(1, len(data) // 60)):
    refused(path, data[:end])


@given(st.data())
def test_whatever_the_bytes_only_value_errors(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('bytes')
  good = bytearray(saved(folder).read_bytes())
  for place in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1)):
    good[place] ^= data.draw(st.integers(1, 255))
  path = folder / 'flipped'
  path.write_bytes(good)
  try:
    arrays = files.load_arrays(path)
  except ValueError as error:
    assert str(path) in str(error)
  else:
    assert all(isinstance(a, np.ndarray) for a in arrays.values())


class Bomb:
  def __reduce__(self):
    return (pytest.fail, ('a pickle was loaded',))


def test_pickles_are_refused(tmp_path):
  path = tmp_path / 'model.safetensors'
  for protocol in (2, 5):
    refused(path, pickle.dumps(Bomb(), protocol), 'save_file')
  refused(path, pickle.dumps(Bomb(), 0), 'it begins with')
  checkpoint = io.BytesIO()
  with zipfile.ZipFile(checkpoint, 'w') as archive:
    archive.writestr('archive/data.pkl', pickle.dumps(Bomb()))
  refused(path, checkpoint.getvalue(), 'save_file')
  objects = io.BytesIO()
  np.savez(objects, a=np.array([Bomb()], object))
  refused(path, objects.getvalue(), 'allow_pickle')


def test_hostile_headers_are_refused(tmp_path):
  path = tmp_path / 'x'

  def crafted(header, body=b''):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, 'little') + text + body

  def entry(end, shape=(1,), dtype='F32', begin=0):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}

  four = b'\0' * 4
  path.write_bytes(crafted({'a': entry(4)}, four))
  assert files.load_arrays(path)['a'].shape == (1,)
  refused(path, crafted({'../a': entry(4)}, four), r"'\.\./a'")
  refused(path, crafted({'a\u0000': entry(4)}, four), r"'a\\x00'")
  refused(path, crafted({'a': entry(4, (2**40,))}, four))
  refused(path, crafted({'a': entry(8)}, four))
  refused(path, crafted({'a': entry(4, dtype='F31')}, four))
  twice = b'{"a":%b,"a":%b}' % ((json.dumps(entry(4)).encode(),) * 2)
  refused(path, crafted(twice, four))
  refused(path, (10**7).to_bytes(8, 'little') + b'{}')
  refused(path, b'')
  refused(path, b'PK\x03\x04')
  keras = io.BytesIO()
  with zipfile.ZipFile(keras, 'w') as archive:
    archive.writestr('model.weights.h5', b'')
  refused(path, keras.getvalue())
  refused(path, npz(a=np.array(['text'])), "'a' must be an array of numbers")


def test_hdf5_that_points_elsewhere_is_refused(tmp_path):
  h5py = pytest.importorskip('h5py', reason='makes HDF5 files')
  secret = tmp_path / 'secret'
  secret.write_bytes(b'\1' * 8)
  path = tmp_path / 'x.h5'
  with h5py.File(path, 'w') as file:
    file.create_dataset(
      'a', (2,), 'f4', external=[(str(secret), 0, h5py.h5f.UNLIMITED)]
    )
  refused(path, path.read_bytes(), "'a' points to another file")
  with h5py.File(path, 'w') as file:
    file.create_dataset('a', (2**40,), 'f4')
  refused(path, path.read_bytes(), "'a' claims more")
  with h5py.File(path, 'w') as file:
    file['a'] = 'text'
  refused(path, path.read_bytes(), "'a' must be an array of numbers")
  with h5py.File(path, 'w') as file:
    file['layers'] = h5py.ExternalLink(str(secret), '/')
  refused(path, path.read_bytes(), "'layers' points to another file")
  with h5py.File(path, 'w') as file:
    file.create_group('a/b')['c'] = h5py.ExternalLink(str(secret), '/')
  refused(path, path.read_bytes(), "'a/b/c' points to another file")


def test_arrays_out_of_proportion_to_the_file_are_refused(
  tmp_path, monkeypatch
):
  h5py = pytest.importorskip('h5py', reason='makes HDF5 files')
  path = tmp_path / 'x'
  with h5py.File(path, 'w') as file:
    for name in 'ab':  # 32 MiB and a byte each
      file.create_dataset(name, (2**25 + 1,), 'i1', chunks=(2**20,))
  refused(path, path.read_bytes(), "'b' the arrays take 67108866 bytes")
  with h5py.File(path, 'w') as file:  # one element, in a chunk of 128 MiB
    file.create_dataset('a', (1,), 'i1', chunks=(2**27,), maxshape=(None,))
  refused(path, path.read_bytes(), "'a' the arrays take 134217728 bytes")
  packed = io.BytesIO()
  np.savez_compressed(packed, a=np.zeros(1), b=np.zeros(2**20, np.int8))
  path.write_bytes(packed.getvalue())
  assert files.load_arrays(path)['b'].size == 2**20  # little in all
  monkeypatch.setattr(files, '_MIN_LIMIT', 2**20)
  monkeypatch.setattr(files, '_MAX_RATIO', 100)
  refused(path, packed.getvalue(), "'b' the arrays take")


def test_nothing_is_half_written(tmp_path, monkeypatch):
  path = saved(tmp_path)
  before = path.read_bytes()
  with pytest.raises(FileExistsError, match='overwrite=True'):
    files.save_arrays(path, {'b': np.ones(3)})

  def fails(*args):
    raise OSError('the disk is full')

  for name in ('fsync', 'replace'):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, fails)
      with pytest.raises(OSError, match='disk is full'):
        files.save_arrays(path, {'b': np.ones(3)}, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
  files.save_arrays(path, {'b': np.ones(3)}, overwrite=True)
  chex.assert_trees_all_equal(files.load_arrays(path), {'b': np.ones(3)})


def test_arrays_of_any_order_and_rank_survive(tmp_path):
  arrays = {
    'scalar': np.asarray(3),
    'fortran': np.asfortranarray(draw(0, 3, 4)),
    'strided': draw(1, 6, 4)[::2, ::-1],
    'empty': np.zeros((0, 2), np.float16),
    'big endian': draw(2, 3).astype('>f4'),
    'bool': np.array([True, False]),
    'half': draw(3, 3).astype(ml_dtypes.bfloat16),
  }
  loaded = files.load_arrays(saved(tmp_path, arrays))
  assert loaded.keys() == arrays.keys()
  for name, value in arrays.items():
    np.testing.assert_array_equal(loaded[name], value)
    assert loaded[name].dtype == value.dtype.newbyteorder('=')
