"""Weights given back to Keras, Haiku and Equinox, as they were taken."""

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import second_tier

import normkit.linen
import normkit.nnx
from normkit.tools import convert


class Net(nn.Module):
  """A layer of each kind that lies in another way there."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 2), padding='VALID')(x)
    x = normkit.linen.BatchNorm(use_running_average=True)(x)
    x = nn.ConvTranspose(5, (2, 3), padding='VALID')(x)
    x = normkit.linen.GroupNorm(5)(x)
    return nn.Dense(6)(x.reshape(len(x), -1))


X = np.zeros((1, 5, 5, 3), np.float32)
NAMES = {
  'conv': 'Conv_0',
  'bn': 'BatchNorm_0',
  'up': 'ConvTranspose_0',
  'gn': 'GroupNorm_0',
  'fc': 'Dense_0',
}


def drawn(tree, seed=0):
  """Of the shapes of a tree, no two numbers alike."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda a: rng.uniform(1, 2, a.shape).astype(np.float32), tree
  )


@pytest.fixture(scope='module')
def variables():
  shapes = jax.eval_shape(Net().init, jax.random.key(0), X)
  variables = drawn(shapes)
  stats = variables['batch_stats']['BatchNorm_0']
  if 'count' in stats:
    stats['count'] = np.full(4, 7, np.int32)
  return variables


def leaves(variables, layer):
  found = dict(variables['params'].get(layer, {}))
  found.update(variables.get('batch_stats', {}).get(layer, {}))
  found.pop('count', None)
  return found


def in_keras(variables):
  """By the layouts that Keras documents."""
  order = 'kernel', 'scale', 'bias', 'mean', 'var'
  weights = {}
  for there, here in NAMES.items():
    held = leaves(variables, here)
    weights[there] = [held[name] for name in order if name in held]
  kernel = weights['up'][0]  # (h, w, out, in), and not turned round
  weights['up'][0] = np.flip(kernel.swapaxes(-2, -1), (0, 1))
  return weights


def in_haiku(variables, counter=3):
  words = {'kernel': 'w', 'bias': 'b'}
  params = {}
  for there, here in NAMES.items():
    held = leaves(variables, here)
    if 'scale' in held:
      params[there] = {'scale': held['scale'], 'offset': held['bias']}
    else:
      params[there] = {words[n]: a for n, a in held.items()}
  params['up']['w'] = params['up']['w'].swapaxes(-2, -1)
  state = {}
  for name in ('mean', 'var'):
    average = leaves(variables, 'BatchNorm_0')[name].reshape(1, 1, 1, -1)
    state[f'bn/~/{name}_ema'] = {
      'hidden': average * np.float32(1 - 0.9**counter),
      'average': average,
      'counter': np.int32(counter),
    }
  return params, state


def test_keras(variables):
  wanted = in_keras(variables)
  like = jax.tree.map(np.zeros_like, wanted)
  found = convert.to_keras(variables, like, names=NAMES)
  chex.assert_trees_all_equal(found, wanted)
  again = convert.from_keras(found, variables, names=NAMES, count=7)
  chex.assert_trees_all_equal(again, variables)


def test_keras_by_name_and_others_stay(variables):
  lists = in_keras(variables)
  words = {
    'bn': ('gamma', 'beta', 'moving_mean', 'moving_variance'),
    'gn': ('gamma', 'beta'),
  }
  wanted = {
    name: dict(zip(words.get(name, ('kernel', 'bias')), arrays, strict=True))
    for name, arrays in lists.items()
  }
  like = jax.tree.map(np.zeros_like, wanted) | {'head': [np.ones(2)]}
  found = convert.to_keras(variables, like, names=NAMES, ignore=['head'])
  np.testing.assert_array_equal(found.pop('head')[0], np.ones(2))
  chex.assert_trees_all_equal(found, wanted)


def test_separable_convolutions_of_keras():
  depthwise, pointwise = np.ones((3, 3, 2, 2)), np.full((1, 1, 4, 5), 2.0)
  like = {'sep': [0 * depthwise, 0 * pointwise, np.zeros(5)]}
  kernel = np.arange(36.0).reshape(3, 3, 1, 4)
  there = {
    'depthwise': {'kernel': jnp.asarray(kernel)},
    'pointwise': {'kernel': jnp.asarray(pointwise), 'bias': jnp.ones(5)},
  }
  variables = {'params': {'sep': there}}
  found = convert.to_keras(variables, like)
  np.testing.assert_array_equal(
    found['sep'][0].reshape(3, 3, 4), kernel[:, :, 0]
  )
  np.testing.assert_array_equal(found['sep'][1], pointwise)
  chex.assert_trees_all_equal(convert.from_keras(found, variables), variables)


def test_haiku(variables):
  wanted = in_haiku(variables)
  found = convert.to_haiku(variables, wanted, names=NAMES)
  chex.assert_trees_all_equal(found, wanted)  # hidden and counter too


def test_haiku_of_new_averages(variables):
  """They are those of very many updates: the next one is as any other."""
  like = jax.tree.map(np.zeros_like, in_haiku(variables))
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), like)
  params, state = convert.to_haiku(variables, like, names=NAMES)
  wanted, averages = in_haiku(variables)
  chex.assert_trees_all_equal(params, wanted)
  for name, held in state.items():
    np.testing.assert_array_equal(held['average'], averages[name]['average'])
    np.testing.assert_array_equal(held['hidden'], held['average'])
    assert 0.999 ** int(held['counter']) == 0


@pytest.mark.parametrize('mode', ['ema', second_tier('batch')])
def test_equinox(mode):
  eqx = pytest.importorskip(
    'equinox', reason="needs equinox: pip install 'normkit[benchmarks]'"
  )

  class There(eqx.Module):
    layers: list

    def __init__(self):
      keys = jax.random.split(jax.random.key(0), 2)
      self.layers = [
        eqx.nn.Conv2d(3, 4, 3, key=keys[0]),
        eqx.nn.BatchNorm(4, 'batch', momentum=0.8, mode=mode),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Linear(36, 5, use_bias=False, key=keys[1]),
      ]

    def __call__(self, x, state):
      conv, norm, relu, linear = self.layers
      x, state = norm(conv(x), state)
      return linear(relu(x).ravel()), state

  class Here(nnx.Module):
    def __init__(self, rngs):
      conv = nnx.Conv(3, 4, (3, 3), padding='VALID', rngs=rngs)
      norm = normkit.nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
      linear = nnx.Linear(36, 5, use_bias=False, rngs=rngs)
      self.layers = nnx.List([conv, norm, nnx.List([]), linear])

    def __call__(self, x):
      conv, norm, _, linear = self.layers
      x = nnx.relu(norm(conv(x)))
      return linear(x.reshape(len(x), -1))

  there, state = eqx.nn.make_with_state(There)()
  here = Here(nnx.Rngs(0))
  norm = here.layers[1]
  norm.mean[...] = jnp.arange(4.0)
  norm.var[...] = 1 + jnp.arange(4.0)
  options = {'flatten': {'layers/3': (4, 3, 3)}}
  model, new = convert.to_equinox(here, there, state=state, **options)
  x = np.float32(np.random.default_rng(0).normal(size=(2, 5, 5, 3)))
  run = jax.vmap(
    eqx.nn.inference_mode(model), (0, None), (0, None), axis_name='batch'
  )
  y, _ = run(np.moveaxis(x, -1, 1), new)
  np.testing.assert_allclose(y, here(x), atol=1e-5)
  again = convert.from_equinox(model, here, state=new, **options)
  chex.assert_trees_all_equal(
    nnx.state(again, nnx.Param), nnx.state(here, nnx.Param)
  )
  np.testing.assert_array_equal(again.layers[1].mean[...], norm.mean[...])
  same, state = convert.to_equinox(again, model, state=new, **options)
  chex.assert_trees_all_equal(
    *(
      eqx.filter((a, s), eqx.is_array) for a, s in ((same, state), (model, new))
    )
  )


@pytest.mark.parametrize(
  ('change', 'fault'),
  [
    (lambda w: w.pop('fc'), "extra: 'Dense_0/kernel'"),
    (lambda w: w.update(more=[np.ones(3)]), "missing: 'more/0', for 'more"),
    (
      lambda w: w.update(fc=[np.ones((6, 9)), np.ones(6)]),
      r"shape: 'Dense_0/kernel' \(120, 6\), but 'fc\[0\]' \(6, 9\) is \(6, 9\)",
    ),
    (
      lambda w: w.update(bn=[a.astype(np.float16) for a in w['bn']]),
      r"range: 'bn\[2\]' float16 is too narrow",
    ),
  ],
)
def test_what_does_not_fit_is_named(variables, change, fault):
  like = in_keras(variables)
  change(like)
  far = jax.tree.map(np.array, variables)
  far['batch_stats']['BatchNorm_0']['mean'][0] = 1e30
  with pytest.raises(ValueError, match=fault):
    convert.to_keras(far, like, names=NAMES)


def test_scales_and_wrong_models(variables):
  like = in_keras(variables)
  options = {'names': NAMES, 'add_to_scale': {'GroupNorm_0': 1.0}}
  found = convert.to_keras(variables, like, **options)
  np.testing.assert_allclose(found['gn'][0], like['gn'][0] - 1, rtol=1e-6)
  shapes = jax.eval_shape(Net().init, jax.random.key(0), X)
  with pytest.raises(TypeError, match='is a shape, not an array'):
    convert.to_keras(shapes, like, names=NAMES)
