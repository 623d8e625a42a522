"""Norms of weights around Flax's layers, in place of Flax's own.

Each use is compared with NumPy in float64, and but for weight standardization,
which Flax does not have, with Flax's module. The rest is
what modules add to the functions: scopes, names, lifted transforms, metadata,
checkpoints, and that the wrapped layer keeps its parameters.
"""

import inspect
import traceback
from typing import Any

import chex
from flax import errors, linen as nn, nnx, serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from reference import (
  spectral_norm_reference,
  weight_norm_reference,
  weight_standardize_reference,
)
from tiers import second_tier, thinned

from benchmarks import dropin, wrappers
from normkit import linen as kl, nnx as kn, weights

KEY = jax.random.key(0)
NORMS = wrappers.NORMS
# Of each norm, then of each module others; `python -m benchmarks dropin`
# compares more.
USES = [
  *(
    (family, norm, 1, 2)
    for family, norm in zip(wrappers.PACKAGES, NORMS, strict=True)
  ),
  *(
    second_tier(family, norm, 2, 3)
    for family in wrappers.PACKAGES
    for norm in NORMS
  ),
]
PACKAGES = (nnx, kn), (kn, nnx), (kn, kn)
HALF = jnp.bfloat16


def normal(*shape, dtype=jnp.float32, seed=0):
  values = np.random.default_rng(seed).normal(size=shape)
  return jax.device_put(np.asarray(values, dtype))


X = normal(4, 6, seed=1)


def close(actual, desired, tolerance=2e-5):
  """Trees of one structure, their leaves equal but for rounding."""
  chex.assert_trees_all_equal_structs(actual, desired)
  wide = [
    jax.tree.map(lambda a: np.asarray(a, np.float32), tree)
    for tree in (actual, desired)
  ]
  chex.assert_trees_all_close(*wide, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(('family', 'norm', 'uses', 'seed'), USES)
def test_random_uses(family, norm, uses, seed):
  count = dropin.measure(family, norm, uses, seed)
  assert not count.unexplained, '\n'.join(count.unexplained)
  assert count.compared > count.raised


@pytest.mark.parametrize(
  ('family', 'norm'), thinned(wrappers.PACKAGES, NORMS, every=2)
)
def test_the_comparison_can_fail(family, norm, monkeypatch):
  """Another epsilon than the one given is neither Flax's nor the reference."""
  run, theirs, ours = wrappers.PACKAGES[family]

  class Wrong:
    pass

  def wrong(*args, **options):
    return getattr(ours, norm)(*args, **options | {'epsilon': 0.5})

  setattr(Wrong, norm, staticmethod(wrong))
  monkeypatch.setitem(wrappers.PACKAGES, family, (run, theirs, Wrong))
  own = {
    'WeightNorm': {'feature_axes': -1, 'use_scale': True},
    'SpectralNorm': {'n_steps': 1},
  }[norm]
  options = own | {'epsilon': 1e-3, 'dtype': None, 'param_dtype': jnp.float32}
  use = wrappers.Use(
    family, norm, options, 'dense', jnp.float32, update=True, zeros=False
  )
  told = ' '.join(wrappers.compare(use).problems)
  assert ', Flax ' in told
  assert 'reference' in told


# linen


def flags(norm, update=True):
  return {'update_stats': update} if norm == 'SpectralNorm' else {}


@pytest.mark.parametrize('norm', NORMS)
def test_linen_initial_weights_keep_their_dtype(norm):
  """Flax stores them in the dtype that the layer is to see them in."""
  module = getattr(kl, norm)(nn.Dense(5), dtype=HALF)
  params = module.init(KEY, X, **flags(norm))['params']
  assert params['layer_instance']['kernel'].dtype == jnp.float32


@pytest.mark.parametrize('norm', NORMS)
def test_linen_fields(norm):
  """Flax's, at its places and with its defaults."""
  ours, flax = (
    inspect.signature(getattr(p, norm)).parameters for p in (kl, nn)
  )
  assert [*ours] == [*flax]
  layer = nn.Dense(4)
  for name in ours:
    values = [getattr(getattr(p, norm)(layer), name) for p in (kl, nn)]
    assert values[0] == values[1] or name == 'parent', name


class Block(nn.Module):
  """Some layers, all that a layer may hold."""

  @nn.compact
  def __call__(self, x, step=None):
    x = nn.Dense(6)(x)
    x = nn.BatchNorm(use_running_average=False, momentum=0.5)(x)
    x = nn.Dropout(0.5, deterministic=False)(x)
    self.sow('intermediates', 'seen', x)
    return nn.Dense(6)(x)


@pytest.mark.parametrize('norm', NORMS)
def test_linen_keeps_what_the_layer_does(norm):
  """Its statistics move, its keys are drawn, what it sows is kept."""
  module, rngs = getattr(kl, norm)(Block()), {'params': KEY, 'dropout': KEY}
  variables = module.init(rngs, X, **flags(norm))
  everything = ['batch_stats', 'intermediates', 'params']
  y, updates = module.apply(
    variables, X, rngs={'dropout': KEY}, mutable=everything, **flags(norm)
  )
  chex.assert_trees_all_equal(updates['params'], variables['params'])
  stats = updates['batch_stats']['layer_instance']['BatchNorm_0']
  assert np.all(stats['mean'] != 0)
  (seen,) = updates['intermediates']['layer_instance']['seen']
  assert 0 < np.mean(seen == 0) < 1  # dropout
  other, _ = module.apply(
    variables,
    X,
    rngs={'dropout': jax.random.key(7)},
    mutable=everything,
    **flags(norm),
  )
  assert np.any(other != y)


def test_linen_normalizes_parameters_alone():
  """A filter that takes every path leaves the statistics as they are."""

  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.BatchNorm(use_running_average=True)(x)

  module = kl.WeightNorm(Layer(), variable_filter=None)
  variables = module.init(KEY, X)
  y = module.apply(variables, X)
  names = {n for n in variables['params'] if 'scale' in n}
  assert names == {
    'layer_instance/BatchNorm_0/bias/scale',
    'layer_instance/BatchNorm_0/scale/scale',
  }
  np.testing.assert_allclose(y, X, rtol=1e-4)


def test_linen_update_stats():
  module = kl.SpectralNorm(nn.Dense(5))
  variables = module.init(KEY, X, update_stats=False)
  double = jax.tree.map(lambda a: 2 * a, variables['params'])
  variables, stats = {**variables, 'params': double}, variables['batch_stats']
  y, updates = module.apply(
    variables, X, update_stats=False, mutable=['batch_stats']
  )
  chex.assert_trees_all_equal(updates['batch_stats'], stats)
  chex.assert_trees_all_equal(module.apply(variables, X, update_stats=False), y)
  _, updates = module.apply(
    variables, X, update_stats=True, mutable=['batch_stats']
  )
  for name, value in updates['batch_stats'].items():
    assert np.all(value != stats[name]), name
  with pytest.raises(errors.ModifyScopeVariableError):
    module.apply(variables, X, update_stats=True)


def test_linen_collection():
  module = kl.SpectralNorm(nn.Dense(5), collection_name='spectral')
  variables = module.init(KEY, X, update_stats=True)
  assert {*variables['spectral']} == {
    'layer_instance/kernel/u',
    'layer_instance/kernel/sigma',
  }
  with pytest.raises(errors.ScopeCollectionNotFound):
    module.apply({'params': variables['params']}, X, update_stats=False)


@pytest.mark.parametrize('package', [nn, kl], ids=['flax', 'normkit'])
def test_linen_filter(package):
  """A part of any name on the path will do."""

  class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(6, name='kernelled')(nn.Dense(6, name='plain')(x))

  def scales(variable_filter):
    module = package.WeightNorm(Inner(), variable_filter=variable_filter)
    params = module.init(KEY, X)['params']
    return {n.partition('/')[2] for n in params if n.endswith('/scale')}

  every = {
    f'{layer}/{weight}/scale'
    for layer in ('kernelled', 'plain')
    for weight in ('kernel', 'bias')
  }
  assert scales(None) == scales(()) == every
  assert scales({'plain/b'}) == {'plain/bias/scale'}
  assert scales(['kernel']) == every - {'plain/bias/scale'}
  assert scales({'bias', 'plain'}) == every - {'kernelled/kernel/scale'}


@pytest.mark.parametrize('norm', NORMS)
def test_linen_partitioned(norm):
  """Metadata stays, under the names that Flax gives."""
  init = nn.with_partitioning(nn.initializers.lecun_normal(), ('in', 'out'))
  module = getattr(kl, norm)(nn.Dense(5, kernel_init=init))
  variables = module.init(KEY, X, **flags(norm))
  kernel = variables['params']['layer_instance']['kernel']
  assert isinstance(kernel, nn.Partitioned)
  assert kernel.names == ('in', 'out')
  plain = getattr(kl, norm)(nn.Dense(5)).init(KEY, X, **flags(norm))
  shown = nn.get_partition_spec(variables)['params']['layer_instance']
  assert shown['kernel'] == jax.sharding.PartitionSpec('in', 'out')
  close(kernel.value, plain['params']['layer_instance']['kernel'])
  y = module.apply(variables, X, **flags(norm, False))
  close(y, getattr(kl, norm)(nn.Dense(5)).apply(plain, X, **flags(norm, False)))
  if norm == 'WeightNorm':
    flax = nn.WeightNorm(nn.Dense(5, kernel_init=init)).init(KEY, X)
    close(variables, flax)
  else:  # where Flax's raises
    assert 'layer_instance/kernel/value/u' in variables['batch_stats']


def test_linen_tabulate():
  table = kl.SpectralNorm(nn.Dense(5)).tabulate(
    KEY, X, update_stats=True, console_kwargs={'width': 200}
  )
  assert 'layer_instance/kernel/sigma' in table
  assert 'Total Parameters: 41' in table
  table = kl.WeightNorm(nn.Dense(5)).tabulate(
    KEY, X, console_kwargs={'width': 200}
  )
  assert 'layer_instance/kernel/scale' in table


class Wrapped(nn.Module):
  """A wrapped layer, as it stands in a model."""

  package: Any
  norm: str

  @nn.compact
  def __call__(self, x, step=None):
    layer = getattr(self.package, self.norm)(nn.Dense(6))
    y = nn.tanh(layer(x, **flags(self.norm)))
    return y, None


def scan(module):
  axes = {'params': 0, 'batch_stats': 0}
  return nn.scan(
    module, variable_axes=axes, split_rngs={'params': True}, length=3
  )


def vmap(module):
  axes = {'params': 0, 'batch_stats': 0}
  return nn.vmap(module, variable_axes=axes, split_rngs={'params': True})


@pytest.mark.parametrize(
  ('lift', 'norm'),
  [
    second_tier(scan, 'WeightNorm'),
    second_tier(scan, 'SpectralNorm'),
    second_tier(vmap, 'SpectralNorm'),
    (nn.remat, 'WeightNorm'),
  ],
)
def test_linen_lifted(norm, lift):
  got = []
  for package in nn, kl:
    module = lift(Wrapped)(package, norm)
    variables = jax.jit(module.init)(KEY, X)

    def loss(params, module=module, variables=variables):
      (y, _), updates = module.apply(
        {**variables, 'params': params}, X, mutable=['batch_stats']
      )
      return jnp.sum(y * normal(*y.shape)), updates

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    got.append((variables, run(variables['params'])))
  close(got[1], got[0])


def begin(module, x, key=KEY):
  variables = module.init(key, x)
  tx = optax.adam(0.05)
  return {'variables': variables, 'adam': tx.init(variables['params'])}


def train(module, state, x, steps=3):
  """The losses of some steps, and the state after them."""
  tx, losses = optax.adam(0.05), []

  @jax.jit
  def step(state):
    def loss(params):
      variables = {**state['variables'], 'params': params}
      (y, _), updates = module.apply(variables, x, mutable=['batch_stats'])
      return jnp.mean((y - 1) ** 2), updates

    params = state['variables']['params']
    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(params)
    changes, adam = tx.update(grads, state['adam'])
    params = optax.apply_updates(params, changes)
    return value, {'variables': {'params': params, **updates}, 'adam': adam}

  for _ in range(steps):
    value, state = step(state)
    losses.append(value)
  return losses, state


def by_bytes(state, template, path):
  del path
  return serialization.from_bytes(template, serialization.to_bytes(state))


def by_orbax(state, template, path):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path / 'state', state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path / 'state', template)


@pytest.mark.parametrize(
  ('norm', 'store', 'packages'),
  thinned(NORMS, [by_bytes, by_orbax], [(nn, kl), (kl, nn)], every=4),
)
def test_linen_checkpoints(norm, store, packages, tmp_path):
  """Training goes on with either package as it would have with the other."""
  before, after = (Wrapped(package, norm) for package in packages)
  early, state = train(before, begin(before, X), X)
  loaded = store(state, begin(after, X, jax.random.key(1)), tmp_path)
  chex.assert_trees_all_equal(loaded, state)
  stayed, went_on = train(before, state, X)[0], train(after, loaded, X)[0]
  assert stayed[-1] < early[0]
  np.testing.assert_allclose(went_on, stayed, rtol=2e-5)


# nnx


def nnx_layer(kind, dtype, rngs):
  if kind == 'dense':
    return nnx.Linear(6, 5, param_dtype=dtype, rngs=rngs)
  return nnx.Conv(6, 5, (3,), param_dtype=dtype, rngs=rngs)


def pair(norm, kind='dense', weight_dtype=jnp.float32, **options):
  """Flax's module and ours, made with the same keys; and their streams."""
  made = []
  for package in nnx, kn:
    rngs = nnx.Rngs(0)
    layer = nnx_layer(kind, weight_dtype, rngs)
    made.append((getattr(package, norm)(layer, rngs=rngs, **options), rngs))
  (flax, flax_rngs), (ours, rngs) = made
  return flax, ours, flax_rngs, rngs


def bare_arrays(tree):
  """A state without the variables that hold its arrays."""

  def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)

  return jax.tree.map(
    lambda leaf: leaf.get_value() if is_variable(leaf) else leaf,
    tree,
    is_leaf=is_variable,
  )


def arrays(state):
  """The arrays of a state by their paths."""
  flat = nnx.to_flat_state(bare_arrays(state))
  return {'/'.join(map(str, path)): value for path, value in flat}


@pytest.mark.filterwarnings('ignore:scatter inputs:FutureWarning')  # Flax's
@pytest.mark.parametrize('norm', NORMS)
def test_half_precision_as_flax(norm):
  """The result is of Flax's dtype where all but u and scale is half."""
  x = X.astype(HALF)
  flax, ours, _, _ = pair(norm, weight_dtype=HALF)
  assert ours(x).dtype == flax(x).dtype
  dense, results = nn.Dense(5, param_dtype=HALF), []
  for package in nn, kl:
    module = getattr(package, norm)(dense)
    results.append(module.init_with_output(KEY, x, **flags(norm))[0].dtype)
  assert results[0] == results[1]


@pytest.mark.parametrize('norm', NORMS)
def test_nnx_signature_and_attributes(norm):
  """Flax's, at its places and with its defaults."""
  flax, ours, _, _ = pair(norm)
  assert vars(ours).keys() == vars(flax).keys()
  for name in ('dtype', 'epsilon', 'param_dtype', 'variable_filter', 'n_steps'):
    assert getattr(ours, name, None) == getattr(flax, name, None)
  assert hasattr(ours, 'update_stats') == hasattr(flax, 'update_stats')
  theirs, mine = (
    inspect.signature(getattr(p, norm)).parameters for p in (nnx, kn)
  )
  for name, parameter in theirs.items():
    assert mine[name].kind == parameter.kind, name
    assert mine[name].default == parameter.default, name
  assert [*mine] == [*theirs]


def lengths(kernel):
  return np.linalg.norm(kernel, axis=0)


@pytest.mark.parametrize('norm', NORMS)
def test_nnx_trains_what_it_keeps(norm):
  """The optimizer moves the kernel and the scale, and nothing else does."""
  _, layer, _, _ = pair(norm)
  optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.Param)

  def loss(layer):
    return jnp.mean((layer(X) - normal(4, 5)) ** 2)

  @nnx.jit
  def step(layer, optimizer):
    value, grads = nnx.value_and_grad(loss)(layer)
    optimizer.update(layer, grads)
    return value, grads

  for _ in range(3):
    before = arrays(nnx.state(layer, nnx.Param))
    _, grads = step(layer, optimizer)
    moved = {k: before[k] - 0.1 * g for k, g in arrays(grads).items()}
    close(arrays(nnx.state(layer, nnx.Param)), moved, 1e-6)
    assert all(np.any(np.asarray(g) != 0) for g in arrays(grads).values())
  assert ("scales/('kernel',)" in moved) == (norm == 'WeightNorm')


def test_nnx_spectral_norm_is_one():
  """In training; and with the bare kernel kept, it is so in evaluation."""
  _, layer, _, _ = pair('SpectralNorm')
  kernel = layer.layer_instance.kernel[...]
  for _ in range(30):
    layer(X)
  layer.eval()
  bias = layer.layer_instance.bias[...]
  weight = layer(jnp.eye(6)) - jnp.broadcast_to(bias, (6, 5))
  np.testing.assert_allclose(np.linalg.norm(weight, 2), 1, rtol=1e-5)
  assert layer.layer_instance.kernel[...] is kernel
  sigma = layer.batch_stats['kernel', 'sigma'][...]
  np.testing.assert_allclose(sigma, np.linalg.norm(kernel, 2), rtol=1e-5)


def test_nnx_update_stats():
  """The call beats the attribute; where neither saves, nothing changes."""
  _, layer, _, _ = pair('SpectralNorm', update_stats=False)
  stats = arrays(nnx.state(layer, nnx.BatchStat))

  def unchanged():
    now = arrays(nnx.state(layer, nnx.BatchStat))
    return all(np.array_equal(now[name], stats[name]) for name in stats)

  y = layer(X)
  assert unchanged()
  np.testing.assert_array_equal(layer(X, False), y)
  layer.train()
  layer(X, update_stats=False)
  nnx.view(layer, use_running_average=True)(X)
  assert unchanged()
  layer.eval()
  layer(X)
  assert unchanged()
  layer(X, True)
  assert not unchanged()


class Tower(nnx.Module):
  """Some layers, all that a layer may hold."""

  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
    self.norm = nnx.BatchNorm(6, momentum=0.5, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x, *, offset=0.0):
    for layer in self.layers:
      x = self.dropout(self.norm(layer(x)))
    self.seen = nnx.Intermediate(x)
    return x + offset


def tower(norm):
  rngs = nnx.Rngs(0)
  options = {}
  if norm == 'WeightNorm':
    options['variable_filter'] = lambda path, _: path[-1] == 'kernel'
  return getattr(kn, norm)(Tower(rngs), rngs=rngs, **options)


@pytest.mark.parametrize('norm', NORMS)
def test_nnx_keeps_what_the_layer_does(norm):
  """Its statistics move, its keys are drawn, what it makes is kept."""
  module = tower(norm)
  layer = module.layer_instance
  count = layer.dropout.rngs.count
  kernels = [inner.kernel for inner in layer.layers]
  before = [(kernel, kernel[...]) for kernel in kernels]
  for calls in 1, 2, 3:
    y = module(X, offset=1.0)
    assert count[...] == 2 * calls
    close(layer.seen[...], y - 1, 1e-6)
  assert np.all(layer.norm.mean[...] != 0)
  assert layer is module.layer_instance
  assert kernels == [inner.kernel for inner in layer.layers]
  assert all(kernel[...] is value for kernel, value in before)
  held = nnx.pop(module, nnx.Intermediate)
  assert [*arrays(held)] == ['layer_instance/seen']


def test_nnx_capture():
  class Sower(nnx.Linear):
    def __call__(self, x):
      self.sow(nnx.Intermediate, 'seen', x)
      return super().__call__(x)

  rngs = nnx.Rngs(0)
  module = kn.WeightNorm(Sower(6, 5, rngs=rngs), rngs=rngs)
  _, seen = nnx.capture(module, nnx.Intermediate)(X)
  (held,) = jax.tree.leaves(seen)
  np.testing.assert_array_equal(held, X)


def test_nnx_failure_changes_nothing():
  _, layer, _, _ = pair('WeightNorm')
  kernel = layer.layer_instance.kernel[...]
  with pytest.raises(TypeError):
    layer(X[:, :3])
  assert layer.layer_instance.kernel[...] is kernel


@pytest.mark.parametrize('norm', NORMS)
def test_nnx_in_foreign_traces(norm):
  """Closed over by jax's own transformations, as no overwriting could."""
  _, layer, _, _ = pair(norm)
  layer.eval()
  desired = layer(X)
  close(jax.jit(lambda x: layer(x))(X), desired)
  close(jax.vmap(lambda x: layer(x))(X), desired)
  jax.grad(lambda x: layer(x).sum())(X)


@pytest.mark.parametrize(
  ('norm', 'graph'), thinned(NORMS, [True, False], every=2)
)
def test_nnx_transforms(norm, graph):
  def fresh():
    return pair(norm)[1]

  def call(layer, x):
    return layer(x)

  desired, reference = fresh(), fresh()
  y = desired(X)
  with nnx.set_graph_mode(graph):
    for transform in nnx.jit, nnx.remat:
      layer = fresh()
      close(transform(call)(layer, X), y)
      close(arrays(nnx.state(layer)), arrays(nnx.state(desired)))
  state = nnx.split(reference)[1]
  layer = nnx.merge(nnx.split(reference)[0], state)
  close(layer(X), y)
  shapes = nnx.eval_shape(fresh)
  chex.assert_trees_all_equal_shapes(
    arrays(nnx.state(shapes)), arrays(nnx.state(desired))
  )
  assert nnx.eval_shape(call, shapes, X).shape == y.shape


@pytest.mark.parametrize('norm', thinned(NORMS, every=2))
def test_nnx_stacks(norm):
  """Layers made by vmap, called one after the other by scan."""

  def make(package):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
      layer = nnx.Linear(6, 6, rngs=rngs)
      return getattr(package, norm)(layer, rngs=rngs)

    return stack(nnx.Rngs(0))

  @nnx.jit
  @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  def call(layer, x):
    return jnp.tanh(layer(x))

  layers, flax = make(kn), make(nnx)
  kernel = layers.layer_instance.kernel[...]
  close(call(layers, X), call(flax, X))
  np.testing.assert_array_equal(layers.layer_instance.kernel[...], kernel)
  assert jax.tree.leaves(nnx.grad(lambda m: call(m, X).sum())(layers))


def test_nnx_scales_are_drawn():
  """With a key each, in param_dtype; ones take none, as in Flax."""
  rngs = nnx.Rngs(0)
  layer = nnx.Linear(6, 5, rngs=rngs)
  count = int(rngs.default.count[...])
  module = kn.WeightNorm(
    layer,
    scale_init=nnx.initializers.normal(),
    param_dtype=jnp.float16,
    variable_filter=...,
    rngs=rngs,
  )
  assert int(rngs.default.count[...]) == count + 2
  bias, kernel = module.scales['bias',], module.scales['kernel',]
  assert isinstance(kernel, nnx.Param)
  assert kernel.dtype == jnp.float16
  assert np.all(kernel[...] != bias[...])


@pytest.mark.parametrize(
  ('norm', 'before', 'after', 'raw'),
  [
    ('WeightNorm', *PACKAGES[0], False),
    ('SpectralNorm', *PACKAGES[1], False),
    *(
      second_tier(norm, *pair, False)
      for norm in NORMS
      for pair in PACKAGES
      if (norm, pair)
      not in (('WeightNorm', PACKAGES[0]), ('SpectralNorm', PACKAGES[1]))
    ),
    second_tier('WeightNorm', nnx, kn, True),
  ],
)
def test_nnx_orbax(norm, before, after, raw, tmp_path):
  """A checkpoint of either package; `raw`: scales as bare arrays.

  So Flax kept them until it made them parameters; a state with bare arrays in
  their place is then the one to restore into.
  """

  def make(package, seed):
    rngs = nnx.Rngs(seed)
    layer = nnx.Linear(6, 5, rngs=rngs)
    module = getattr(package, norm)(layer, rngs=rngs)
    if norm == 'WeightNorm':
      module.scales = jax.tree.map(lambda a: a + seed, module.scales)
    return module

  old, new = make(before, 1), make(after, 2)
  bare = norm == 'WeightNorm' and any(
    raw or not isinstance(module.scales['kernel',], nnx.Param)
    for module in (old, new)
  )

  def state(module):
    state = nnx.state(module)
    if bare:
      state['scales'] = bare_arrays(state['scales'])
    return state

  old(X)
  nnx.update(new, by_orbax(state(old), state(new), tmp_path))
  close(arrays(nnx.state(new)), arrays(nnx.state(old)), 0)
  close(new(X), old(X))
  if before is after:
    losses = [losses_of(module) for module in (new, old)]
    np.testing.assert_array_equal(*losses)
    assert losses[0][-1] < losses[0][0]


def losses_of(module):
  optimizer = nnx.Optimizer(module, optax.adam(0.05), wrt=nnx.Param)

  @nnx.jit
  def step(module, optimizer):
    def loss(module):
      return jnp.mean((module(X) - 1) ** 2)

    value, grads = nnx.value_and_grad(loss)(module)
    optimizer.update(module, grads)
    return value

  return [float(step(module, optimizer)) for _ in range(4)]


# Both


def both(norm, layer_dtype=jnp.float32, shape=(6, 5), **options):
  """What each family multiplies by, its kernel, and its other variables."""

  class Read(nn.Module):
    @nn.compact
    def __call__(self):
      init = nn.initializers.normal()
      return self.param('kernel', init, shape, layer_dtype)

  class ReadNnx(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(normal(*shape, dtype=layer_dtype))

    def __call__(self, x):
      return self.kernel[...]

  held = {'WeightNorm': 'scales', 'SpectralNorm': 'batch_stats'}
  module = getattr(kl, norm)(Read(), **options)
  variables = module.init(KEY, **flags(norm, False))
  stats = {
    name.rpartition('/')[2]: value
    for tree in variables.values()
    for name, value in tree.items()
    if name != 'layer_instance'
  }
  kernel = variables['params']['layer_instance']['kernel']
  yield module.apply(variables, **flags(norm, False)), kernel, stats
  layer = getattr(kn, norm)(ReadNnx(), rngs=nnx.Rngs(0), **options)
  layer.eval()
  stats = {
    path[-1]: value[...] for path, value in getattr(layer, held[norm]).items()
  }
  yield layer(None), layer.layer_instance.kernel[...], stats


@pytest.mark.parametrize(
  ('shape', 'dtype'),
  thinned([(6, 5), (3, 2, 4), (2, 2, 3, 4)], [jnp.float32, HALF], every=3),
)
def test_references(shape, dtype):
  """NumPy in float64, of half-precision weights too."""
  tolerance = 1e-2 if dtype == HALF else 2e-6
  options = {'layer_dtype': dtype, 'shape': shape}
  for y, kernel, stats in both('SpectralNorm', n_steps=2, **options):
    desired = spectral_norm_reference(kernel, stats['u'], 2)[0]
    np.testing.assert_allclose(
      np.asarray(y, np.float64), desired, tolerance, tolerance
    )
  scale = normal(shape[0], shape[-1], seed=4)
  options |= {'feature_axes': (0, -1), 'scale_init': lambda *_: scale}
  for y, kernel, _ in both('WeightNorm', **options):
    desired = weight_norm_reference(kernel, scale, (0, -1))
    np.testing.assert_allclose(
      np.asarray(y, np.float64), desired, tolerance, tolerance
    )


def test_sums_are_float32():
  """A half-precision sum of so many squares is far off; ours is not."""
  kernel = jnp.full((4096, 2), 0.1, HALF)
  layer = nn.Dense(2, param_dtype=HALF, kernel_init=lambda *_: kernel)
  x, got = jnp.eye(1, 4096, dtype=HALF), {}
  for package in nn, kl:
    module = package.WeightNorm(layer, use_scale=False)
    variables = {
      'params': {
        'layer_instance': {'kernel': kernel, 'bias': jnp.zeros(2, HALF)}
      }
    }
    got[package] = np.asarray(module.apply(variables, x), np.float64)
  np.testing.assert_allclose(got[kl], 1 / 64, rtol=4e-3)


@pytest.mark.parametrize(
  ('norm', 'epsilon'), thinned(NORMS, [0.0, 1e-12], every=2)
)
def test_zeros(norm, epsilon):
  """Zeros give zeros, and leave u as it was."""
  rngs = nnx.Rngs(0)
  zeros = nnx.initializers.zeros
  layer = nnx.Linear(6, 5, kernel_init=zeros, rngs=rngs)
  module = getattr(kn, norm)(layer, epsilon=epsilon, rngs=rngs)
  before = arrays(nnx.state(module, nnx.BatchStat))
  np.testing.assert_array_equal(module(X), 0)
  after = arrays(nnx.state(module, nnx.BatchStat))
  for name in before:
    if 'u' in name.rpartition(',')[2]:
      np.testing.assert_array_equal(after[name], before[name])
  grads = nnx.grad(lambda m: m(X).sum())(module)
  assert all(np.all(np.isfinite(g)) for g in arrays(grads).values())


def test_complex_weights():
  """Weight norm takes |w|^2; Flax's w^2 is no length."""
  kernel = normal(6, 5) + 1j * normal(6, 5, seed=3)
  layer = nn.Dense(5, use_bias=False, param_dtype=jnp.complex64)
  module = kl.WeightNorm(layer, use_scale=False)
  variables = {'params': {'layer_instance': {'kernel': kernel}}}
  weight = module.apply(variables, jnp.eye(6, dtype=jnp.complex64))
  np.testing.assert_allclose(lengths(weight), 1, rtol=1e-6)
  with pytest.raises(TypeError, match='weight must be real in spectral norm'):
    kl.SpectralNorm(layer).init(KEY, X, update_stats=True)


def make_linen(norm, layer=None, **options):
  layer = nn.Dense(5) if layer is None else layer
  return getattr(kl, norm)(layer, **options).init(KEY, X, **flags(norm))


def make_nnx(norm, layer=None, **options):
  rngs = nnx.Rngs(0)
  layer = nnx.Linear(6, 5, rngs=rngs) if layer is None else layer
  return getattr(kn, norm)(layer, rngs=rngs, **options)(X)


def uncomplete(norm):
  """A module whose layer got a weight after it was wrapped."""
  _, module, _, _ = pair(norm)
  module.layer_instance.kernel_too = nnx.Param(jnp.ones((2, 2)))
  if norm == 'WeightNorm':
    module.variable_filter = lambda path, _: 'kernel' in path[-1]
  return module(X)


# Weight standardization


def layers(kind):
  """A layer of linen, its like of nnx, and an input."""
  if kind == 'dense':
    return nn.Dense(5), nnx.Linear(6, 5, rngs=nnx.Rngs(0)), X
  conv = nnx.Conv(6, 5, (3, 3), rngs=nnx.Rngs(0))
  return nn.Conv(5, (3, 3)), conv, normal(2, 4, 4, 6, seed=1)


@pytest.mark.parametrize(
  ('kind', 'feature_axes', 'scaled'),
  thinned(['dense', 'conv'], [-1, (-2, -1), None], [False, True], every=3),
)
def test_standardization(kind, feature_axes, scaled):
  """Both families call the layer with the standardized kernel."""
  linen, like, x = layers(kind)
  if kind == 'dense' and feature_axes == (-2, -1):
    feature_axes = 0
  kernel, bias = 3 + normal(*like.kernel.shape), normal(5, seed=2)
  features = () if feature_axes is None else np.atleast_1d(feature_axes)
  gain = normal(*(kernel.shape[a] for a in features), seed=4)
  options = {'feature_axes': feature_axes, 'scaled': scaled}
  desired = weight_standardize_reference(kernel, gain, **options)
  desired = np.float32(desired)
  y = linen.apply({'params': {'kernel': desired, 'bias': bias}}, x)
  options |= {'use_gain': True, 'gain_init': lambda *_: gain}
  module = kl.WeightStandardization(linen, **options)
  params = module.init(KEY, x)['params']
  assert {*params} == {'layer_instance', 'layer_instance/kernel/gain'}
  params = {**params, 'layer_instance': {'kernel': kernel, 'bias': bias}}
  close(module.apply({'params': params}, x), y)
  like.kernel[...], like.bias[...] = kernel, bias
  layer = kn.WeightStandardization(like, rngs=nnx.Rngs(0), **options)
  assert [*layer.gains] == [('kernel',)]
  close(layer(x), y)
  np.testing.assert_array_equal(like.kernel[...], kernel)


def test_standardization_of_a_transform_is_that_of_modules():
  """One set of parameters, three ways."""
  layer = nn.Dense(5)
  module = kl.WeightStandardization(layer, scaled=True)
  variables = module.init(KEY, X)
  assert {*variables['params']} == {'layer_instance'}
  held = variables['params']['layer_instance']
  ws = weights.WeightStandardization(scaled=True)
  new, _ = ws.apply(*ws.init(held), held, update=True)
  y = layer.apply({'params': new}, X)
  close(module.apply(variables, X), y)
  like = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
  like.kernel[...], like.bias[...] = held['kernel'], held['bias']
  bare = kn.WeightStandardization(like, scaled=True, rngs=nnx.Rngs(0))
  assert bare.gains is None
  close(bare(X), y)


def test_standardization_leaves_initial_weights():
  """Both families start from what the layer draws."""

  class Holder(nn.Module):
    wrap: bool

    @nn.compact
    def __call__(self, x):
      layer = nn.Dense(5, name='dense')
      return (kl.WeightStandardization(layer) if self.wrap else layer)(x)

  made = [Holder(wrap).init(KEY, X)['params']['dense'] for wrap in (0, 1)]
  chex.assert_trees_all_equal(*made)
  y, variables = Holder(True).init_with_output(KEY, X)
  close(y, Holder(True).apply(variables, X))
  bare = nnx.Linear(6, 5, rngs=nnx.Rngs(0)).kernel[...]
  layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
  layer = kn.WeightStandardization(layer, use_gain=True, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(layer.layer_instance.kernel[...], bare)


@pytest.mark.parametrize('epsilon', [None, 0.5])
@pytest.mark.parametrize('dtype', [None, HALF])
def test_standardization_options(dtype, epsilon):
  """Epsilon, dtypes and filters reach the function."""
  seen = []

  class Read(nn.Module):
    @nn.compact
    def __call__(self, x):
      seen.append(self.param('table', lambda _: normal(6, 5)))
      return x

  module = kl.WeightStandardization(
    Read(), epsilon, dtype, HALF, use_gain=True, variable_filter={'tab'}
  )
  params = module.init(KEY, X)['params']
  assert params['layer_instance/table/gain'].dtype == HALF
  module.apply({'params': params}, X)
  assert seen[-1].dtype == (jnp.float32 if dtype is None else dtype)
  desired = weight_standardize_reference(
    normal(6, 5), epsilon=1e-10 if epsilon is None else epsilon
  )
  tolerance = 1e-2 if dtype else 2e-6
  np.testing.assert_allclose(
    np.asarray(seen[-1], np.float64), desired, tolerance, tolerance
  )
  layer = kn.WeightStandardization(
    nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0)),
    epsilon=epsilon,
    dtype=dtype,
    param_dtype=HALF,
    use_gain=True,
    variable_filter=nnx.PathContains('kernel'),
    rngs=nnx.Rngs(0),
  )
  assert layer.gains['kernel',].dtype == HALF
  layer.layer_instance.kernel[...] = normal(6, 5)
  np.testing.assert_allclose(layer(jnp.eye(6)), desired, tolerance, tolerance)


def test_standardization_trains():
  """Kernels and gains, in both families; a shift of a kernel is nothing."""
  module = kl.WeightStandardization(nn.Dense(5), use_gain=True)
  params = module.init(KEY, X)['params']

  def loss(params):
    return jnp.mean((module.apply({'params': params}, X) - 1) ** 2)

  grads = jax.grad(loss)(params)
  assert all(np.any(g != 0) for g in jax.tree.leaves(grads))
  along = np.sum(grads['layer_instance']['kernel'], axis=0)
  np.testing.assert_allclose(along, 0, atol=1e-5)
  like = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
  layer = kn.WeightStandardization(like, use_gain=True, rngs=nnx.Rngs(0))
  before = arrays(nnx.state(layer, nnx.Param))
  losses = losses_of(layer)
  after = arrays(nnx.state(layer, nnx.Param))
  assert losses[-1] < losses[0]
  assert len(after) == 3
  assert all(np.any(before[k] != after[k]) for k in before)


W, S = NORMS
WS = 'WeightStandardization'
LINEN_CONV = nn.Conv(5, (3, 3))
COMPLEX = nn.Dense(5, param_dtype=jnp.complex64)
FAILURES = {
  'linen width': (ValueError, 'epsilon=64 .*width', make_linen, W, 64),
  'nnx width': (ValueError, 'epsilon=64 .*first argument', make_nnx, S, 64),
  'negative': (ValueError, 'epsilon must be .*not neg', make_linen, S, -1.0),
  'nnx negative': (ValueError, 'epsilon must be .*not neg', make_nnx, W, -1.0),
}


@pytest.mark.parametrize(
  ('error', 'message', 'make', 'norm', 'epsilon'),
  FAILURES.values(),
  ids=FAILURES,
)
def test_epsilon(error, message, make, norm, epsilon):
  with pytest.raises(error, match=message):
    make(norm, epsilon=epsilon)


@pytest.mark.parametrize(
  ('error', 'message', 'function'),
  [
    (TypeError, 'layer_instance must be a module', lambda: make_linen(W, 3)),
    (
      TypeError,
      'layer_instance must be a module.*nn.Dense',
      lambda: make_linen(S, nn.Dense),
    ),
    (TypeError, 'layer_instance .*nnx.Linear', lambda: make_nnx(S, jnp.tanh)),
    (
      TypeError,
      "variable_filter must be None or several strings, got 'kernel'",
      lambda: make_linen(W, variable_filter='kernel'),
    ),
    (TypeError, 'variable_filter', lambda: make_linen(W, variable_filter=[1])),
    (
      ValueError,
      'feature_axes=2 is out of range',
      lambda: make_linen(W, feature_axes=2),
    ),
    (
      ValueError,
      'feature_axes=2 is out of range',
      lambda: make_nnx(W, feature_axes=2),
    ),
    (ValueError, 'inexact', lambda: make_linen(W, dtype=jnp.int32)),
    (ValueError, 'inexact', lambda: make_nnx(S, dtype=jnp.int32)),
    (
      TypeError,
      'complex result of weight of dtype complex64',
      lambda: make_linen(W, COMPLEX, dtype=jnp.float32),
    ),
    (
      ValueError,
      'epsilon=64 .*width',
      lambda: make_linen(WS, epsilon=64),
    ),
    (ValueError, 'epsilon must be', lambda: make_nnx(WS, epsilon=-1.0)),
    (TypeError, 'scaled must be True', lambda: make_linen(WS, scaled=1)),
    (TypeError, 'scaled must be True', lambda: make_nnx(WS, scaled='a')),
    (
      ValueError,
      'only 1 element shares a mean',
      lambda: make_linen(WS, feature_axes=(0, 1)),
    ),
    (TypeError, 'layer_instance must be', lambda: make_linen(WS, 3)),
    (TypeError, 'layer_instance .*nnx.Linear', lambda: make_nnx(WS, jnp.tanh)),
    (
      TypeError,
      'variable_filter',
      lambda: make_linen(WS, variable_filter='kernel'),
    ),
    (
      ValueError,
      'feature_axes=2 is out of range',
      lambda: make_nnx(WS, feature_axes=2),
    ),
    (TypeError, 'n_steps must be', lambda: make_linen(S, n_steps=1.5)),
    (TypeError, 'n_steps must be', lambda: make_nnx(S, n_steps=1.5)),
    (
      TypeError,
      'update_stats must be True or False.*static',
      lambda: kl.SpectralNorm(nn.Dense(5)).init(KEY, X, update_stats=1),
    ),
    (
      TypeError,
      'update_stats must be True or False',
      lambda: jax.jit(lambda flag: pair(S)[1](X, flag))(True),
    ),
    (
      TypeError,
      'update_stats',
      lambda: kl.SpectralNorm(nn.Dense(5)).init(KEY, X),
    ),
    (
      ValueError,
      r'error_on_non_matrix=True, .*shape \(3, 3, 6, 5\)',
      lambda: kl.SpectralNorm(LINEN_CONV, error_on_non_matrix=True).init(
        KEY, normal(2, 4, 4, 6), update_stats=True
      ),
    ),
    (
      ValueError,
      r'error_on_non_matrix=True, .*shape \(3, 6, 5\)',
      lambda: make_nnx(S, conv(), error_on_non_matrix=True),
    ),
    (ValueError, 'holds nothing for .*kernel_too', lambda: uncomplete(W)),
    (ValueError, 'holds nothing for .*kernel_too', lambda: uncomplete(S)),
    (
      ValueError,
      'use_running_average is None',
      lambda: setless(pair(S)[1]),
    ),
  ],
)
def test_errors(error, message, function):
  with pytest.raises(error, match=message):
    function()


def conv():
  return nnx.Conv(6, 5, (3,), rngs=nnx.Rngs(0))


def setless(module):
  module.use_running_average = None
  module(X)


def test_errors_tell_the_path():
  class Table(nn.Module):
    @nn.compact
    def __call__(self, x):
      table = self.param('table', lambda _: jnp.arange(6).reshape(2, 3))
      return x + table.sum()

  for module, given in (
    (kl.WeightNorm(Table(), variable_filter=None), {}),
    (kl.SpectralNorm(Table()), {'update_stats': True}),
  ):
    with pytest.raises(TypeError, match='floating-point') as failure:
      module.init(KEY, X, **given)
    assert 'layer_instance/table' in ''.join(
      traceback.format_exception(failure.value)
    )


def test_another_width():
  """Statistics and scales of another layer are told from its weights."""
  variables = make_linen(S)
  other = kl.SpectralNorm(nn.Dense(3)).init(KEY, X, update_stats=False)
  with pytest.raises(ValueError, match=r'state\.u has shape \(1, 5\)'):
    kl.SpectralNorm(nn.Dense(3)).apply(
      {**other, 'batch_stats': variables['batch_stats']}, X, update_stats=False
    )
  scales = make_linen(W)['params']
  other = kl.WeightNorm(nn.Dense(3)).init(KEY, X)['params']
  with pytest.raises(errors.ScopeParamShapeError):
    kl.WeightNorm(nn.Dense(3)).apply(
      {'params': {**scales, 'layer_instance': other['layer_instance']}}, X
    )
