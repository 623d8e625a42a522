"""The nnx modules beside Flax's: signatures, errors, graphs, transforms.

Random arguments and inputs are compared by `benchmarks.dropin`, some of them in
`test_dropin.py`. Here is what a draw does not reach.
"""

import dataclasses
import functools
import inspect
import itertools
from typing import Any, NamedTuple
import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from tiers import thinned

import normkit as nk
import normkit.nnx as kn

NAMES = 'BatchNorm', 'LayerNorm', 'RMSNorm', 'GroupNorm', 'InstanceNorm'
EXTRA = {
  'debias',
  'unbiased',
  'skip_nonfinite',
  'virtual_batch_size',
  'implementation',
  'round_before_scale',
  'scale_offset',
}
X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (4, 5, 6)), jnp.float32)

every_module = pytest.mark.parametrize('name', NAMES)
some_modules = pytest.mark.parametrize('name', thinned(NAMES, every=3))
one_module = pytest.mark.parametrize('name', thinned(NAMES, every=5))


def both(name, *args, **kwargs):
  """Flax's layer and ours, made alike."""
  return tuple(
    getattr(package, name)(*args, rngs=nnx.Rngs(0), **kwargs)
    for package in (nnx, kn)
  )


def near_one(key, shape, dtype):
  """An initializer."""
  return 1 + jax.random.uniform(key, shape, dtype, -0.5, 0.5)


def small(name, package=kn, **kwargs):
  """A module for six features with parameters that are not ones and zeros."""
  defaults = {'rngs': nnx.Rngs(0), 'scale_init': near_one}
  if name == 'GroupNorm':
    defaults['num_groups'] = 3
  if name != 'RMSNorm':
    defaults['bias_init'] = near_one
  return getattr(package, name)(6, **(defaults | kwargs))


def close(actual, desired, tolerance=1e-5, scale=1.0):
  """Holds two arrays together, errors counted in units of `scale`."""
  wide = [np.asarray(reference.wide(a)) / scale for a in (actual, desired)]
  np.testing.assert_allclose(*wide, rtol=tolerance, atol=tolerance)


def same_states(one, two, tolerance=1e-6):
  """Holds two modules' variables together: paths, kinds, dtypes, values."""
  ours, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (one, two))
  assert ours.keys() == theirs.keys()
  for path, variable in ours.items():
    assert type(variable) is type(theirs[path])
    assert variable.dtype == theirs[path].dtype
    close(variable[...], theirs[path][...], tolerance)


@nnx.jit
def run(layer, x):
  """A call in one program: eagerly, each operation would be one."""
  return layer(x)


@nnx.jit
def masked(layer, x, mask):
  return layer(x, mask=mask)


@pytest.mark.parametrize('name', thinned(NAMES[::-1], every=5))
def test_dtypes(name):
  """Of the output and the variables, in training and evaluation: a grid."""
  grid = itertools.product(
    ('bfloat16', 'float16', 'float32', 'int32', 'complex64'),
    (None, 'bfloat16', 'float32', 'complex64'),
    ('float32', 'bfloat16', None),
    (True, False) if name == 'BatchNorm' else (True,),
  )
  for x, dtype, param_dtype, train in grid:
    if x == 'complex64' and dtype in ('bfloat16', 'float32'):
      continue  # Flax drops the imaginary part, ours raises
    options = {'dtype': dtype, 'param_dtype': param_dtype or 'float32'}
    if param_dtype is None:
      options |= {'use_scale': False}
      options |= {} if name == 'RMSNorm' else {'use_bias': False}
    options |= {} if name != 'BatchNorm' else {'use_running_average': not train}

    def apply(package, x=x, options=options):
      layer = small(name, package, **options)
      return layer(jnp.ones((2, 3, 6), x)), nnx.to_pure_dict(nnx.state(layer))

    with warnings.catch_warnings(action='ignore'):
      theirs, ours = (jax.eval_shape(lambda p=p: apply(p)) for p in (nnx, kn))
    assert ours == theirs, (x, options)


# Constructors, attributes, variables.


@every_module
def test_signature(name):
  """Flax's arguments, in its order, with its defaults; ours besides."""
  for method in ('__init__', '__call__'):
    theirs, ours = (
      dict(inspect.signature(getattr(layer, method)).parameters)
      for layer in (getattr(nnx, name), getattr(kn, name))
    )
    assert 'self' in theirs
    assert set(ours) - set(theirs) <= EXTRA
    assert all(
      ours[n].kind == inspect.Parameter.KEYWORD_ONLY for n in EXTRA & set(ours)
    )
    for n, parameter in theirs.items():
      assert ours[n].kind == parameter.kind
      if not n.endswith('_metadata'):  # None here, {} there
        assert ours[n].default == parameter.default
    by_place = [n for n, p in theirs.items() if p.kind != p.KEYWORD_ONLY]
    assert list(ours)[: len(by_place)] == by_place


@every_module
def test_attributes(name):
  """What people read and set on a layer is there, with the same values."""
  theirs, ours = small(name, nnx), small(name)
  for key, value in vars(theirs).items():
    if not key.startswith('_') and not isinstance(value, nnx.Variable):
      assert getattr(ours, key) == value


@pytest.mark.parametrize(
  ('name', 'absent'),
  thinned(NAMES, [(), ('scale',), ('scale', 'bias')], every=2),
)
def test_variables(name, absent):
  """Drawn from the same keys; each layer's variables fit the other."""
  absent = absent[:1] if name == 'RMSNorm' else absent
  kwargs = {f'use_{parameter}': False for parameter in absent}
  theirs, ours = small(name, nnx, **kwargs), small(name, **kwargs)
  for parameter in absent:
    assert getattr(ours, parameter) is None
  same_states(ours, theirs)
  trained = jax.tree.map(lambda a: a + 0.5, nnx.state(theirs))
  nnx.update(theirs, trained)
  nnx.update(ours, trained)
  same_states(ours, theirs)
  close(run(ours, X), run(theirs, X))
  nnx.update(theirs, nnx.state(ours))
  same_states(ours, theirs)


@every_module
def test_keys(name):
  """One key for each parameter that there is, and none besides."""
  groups = {'num_groups': 3} if name == 'GroupNorm' else {}
  for use in (True, False):
    drawn = []
    for package in (nnx, kn):
      rngs = nnx.Rngs(params=3)
      getattr(package, name)(6, use_scale=use, rngs=rngs, **groups)
      drawn.append(int(rngs.params.count[...]))
    assert drawn == [use + (name != 'RMSNorm')] * 2
  with pytest.raises(TypeError, match='rngs'):
    getattr(kn, name)(6)


@one_module
def test_metadata(name):
  """Metadata and sharding annotations reach the parameters."""
  names = ('scale',) if name == 'RMSNorm' else ('scale', 'bias')
  mesh = jax.make_mesh((2,), ('model',), devices=jax.devices()[:2])
  init = nnx.with_partitioning(nnx.initializers.normal(1.0), ('model',))
  kwargs = {f'{n}_metadata': {'note': n} for n in names}
  kwargs |= {f'{n}_init': init for n in names}
  with jax.set_mesh(mesh):
    layers = [small(name, package, **kwargs) for package in (nnx, kn)]
    outputs = [run(layer, X) for layer in layers]
  close(*outputs)
  for n in names:
    theirs, ours = (getattr(layer, n) for layer in layers)
    assert ours.note == n
    assert ours.get_metadata() == theirs.get_metadata()
    assert ours[...].sharding == theirs[...].sharding
    assert not ours[...].sharding.is_fully_replicated
  plain, noted = small(name), small(name, **{f'{names[0]}_metadata': {}})
  assert nnx.graphdef(plain) == nnx.graphdef(noted)


def test_group_norm_groups():
  for kwargs in ({'num_groups': 3}, {'num_groups': None, 'group_size': 2}):
    for layer in both('GroupNorm', 6, **kwargs):
      assert (layer.num_groups, layer.group_size) == (3, 2)


# Errors.


def failure(function):
  """The class of the exception that a function raises."""
  try:
    function()
  except Exception as error:
    return type(error)
  return None


def fails(name, make=(), call=(), *, x=X, flax=ValueError, ours=ValueError):
  """A row: what raises `ours` here, and in Flax `flax`, perhaps nothing."""
  make = {'num_groups': 3} | dict(make) if name == 'GroupNorm' else dict(make)
  key = ','.join([*map('{0[0]}={0[1]}'.format, (make | dict(call)).items())])
  return pytest.param(
    name, make, dict(call), x, flax, ours, id=f'{name}-{key}-{x.shape}'
  )


INTEGER_MASK = {'mask': np.ones(X.shape, int)}
ERRORS = [
  # On purpose in Flax: the same class.
  *(fails(n, {'dtype': jnp.int32}) for n in NAMES),
  *(
    fails(n, {'axis_name': 'i'}, flax=NameError, ours=NameError) for n in NAMES
  ),
  *(fails(n, call=INTEGER_MASK) for n in NAMES),
  *(fails(n, call={'mask': np.ones((3, 6), bool)}) for n in NAMES),
  fails('BatchNorm', {'use_running_average': None}),
  fails('GroupNorm', {'num_groups': None}),
  fails('GroupNorm', {'group_size': 2}),
  fails('GroupNorm', {'num_groups': 4}),
  fails('GroupNorm', {'num_groups': 0}),
  fails('GroupNorm', {'num_groups': None, 'group_size': 4}),
  fails('InstanceNorm', {'feature_axes': 0}),
  fails('InstanceNorm', {'feature_axes': (-1, -3)}),
  # By accident in Flax, or silently wrong: ValueError.
  *(fails(n, x=X[..., :5], flax=TypeError) for n in NAMES),
  *(fails(n, x=X[0, 0, 0], flax=IndexError) for n in NAMES if n != 'GroupNorm'),
  *(
    fails(n, {f'{axes}_axes': axis}, flax=error)
    for n in ('LayerNorm', 'RMSNorm')
    for axes in ('feature', 'reduction')
    for axis, error in ((3, IndexError), (-4, None))
  ),
  fails('BatchNorm', {'axis': 3}, flax=IndexError),
  fails('BatchNorm', {'axis': -4}, flax=None),
  fails('BatchNorm', {'momentum': 1.5}, flax=None),
  fails('InstanceNorm', {'feature_axes': 3}, flax=IndexError),
  fails(
    'GroupNorm', {'num_groups': None, 'group_size': 0}, flax=ZeroDivisionError
  ),
  fails('GroupNorm', {'num_groups': None, 'group_size': -2}, flax=TypeError),
  fails('GroupNorm', {'reduction_axes': 1}, flax=None),
  fails('GroupNorm', {'reduction_axes': (1, 3)}, flax=None),
  *(fails(n, {'epsilon': 12}, flax=None) for n in NAMES),
  *(fails(n, {'epsilon': -1.0}, flax=None) for n in NAMES),
  *(fails(n, {'axis_index_groups': [[0]]}, flax=None) for n in NAMES),
  *(
    fails(n, {'dtype': jnp.float32}, x=X + 1j, flax=None, ours=TypeError)
    for n in NAMES
  ),
]


@pytest.mark.parametrize(('name', 'make', 'call', 'x', 'flax', 'ours'), ERRORS)
def test_errors(name, make, call, x, flax, ours):
  def use(package):
    layer = getattr(package, name)(6, rngs=nnx.Rngs(0), **make)
    layer(x, **call)

  with warnings.catch_warnings(action='ignore'):  # of imaginary parts
    assert failure(lambda: jax.eval_shape(lambda: use(nnx))) == flax
  assert failure(lambda: jax.eval_shape(lambda: use(kn))) == ours


def test_error_messages_name_the_argument_and_the_mend():
  with pytest.raises(ValueError, match=r'feature_axes=0 .*batch'):
    small('InstanceNorm', feature_axes=0)(X)
  with pytest.raises(ValueError, match=r'reduction_axes=\[1\] .*channels'):
    small('GroupNorm', reduction_axes=[1])(X)
  with pytest.raises(ValueError, match=r'epsilon=6 .* num_features.*Leave'):
    small('LayerNorm', epsilon=6)
  assert small('LayerNorm', epsilon=1.0).epsilon == 1.0
  with pytest.raises(ValueError, match=r'num_features is 6\..*num_features=5'):
    small('RMSNorm')(X[..., :5])
  with pytest.raises(ValueError, match=r'mask must be boolean.*int'):
    small('GroupNorm')(X, mask=np.ones(X.shape, int))
  with pytest.raises(ValueError, match=r'use_running_average.*train\(\)'):
    small('BatchNorm', use_running_average=None)(X)


# Training and evaluation.


def test_the_call_beats_the_attribute():
  for layer in (small('BatchNorm', nnx), small('BatchNorm')):
    before = layer.mean[...]
    layer(X, True)
    layer.use_running_average = True
    layer(X)
    assert (layer.mean[...] == before).all()
    layer(X, use_running_average=False)
    assert (layer.mean[...] != before).all()


class Pair(nnx.Module):
  """A layer of Flax's and one of ours that answer to the same calls."""

  def __init__(self):
    self.theirs, self.ours = small('BatchNorm', nnx), small('BatchNorm')
    self.norm = kn.Norm(nk.BatchNorm(), X)
    self.dropout = nnx.Dropout(0.5)

  def modes(self):
    layers = self.theirs, self.ours, self.norm
    return {layer.use_running_average for layer in layers}


def test_modes():
  pair = Pair()
  assert pair.modes() == {False}
  pair.eval()
  assert pair.modes() == {True}
  pair.train()
  assert pair.modes() == {False}
  pair.set_attributes(use_running_average=True, deterministic=True)
  assert pair.modes() == {True}
  view = nnx.view(pair, use_running_average=False, deterministic=False)
  assert (pair.modes(), view.modes()) == ({True}, {False})
  assert view.ours.scale is pair.ours.scale
  view = nnx.view(pair, only=kn.BatchNorm, use_running_average=None)
  assert view.modes() == {True}
  with pytest.raises(ValueError, match='momentum'):
    nnx.view(pair, momentum=0.5)


def test_evaluation_needs_no_axis_and_changes_nothing():
  layer = small('BatchNorm', axis_name='i', use_running_average=True)
  before = nnx.clone(layer)
  layer(X)
  same_states(layer, before, 0)


def test_no_gradient_through_the_running_statistics():
  for layer in (small('BatchNorm', nnx), small('BatchNorm')):

    def loss(x, layer=layer):
      copy = nnx.clone(layer)
      copy(x)
      return jnp.sum(copy.mean[...] + copy.var[...])

    assert not np.any(jax.jit(jax.grad(loss))(X))


# Numbers that differ from Flax's on purpose, and some that do not.


def test_group_norm_repeats_the_axis_of_groups():
  """nnx repeats along axis 1 where linen takes the last: off by 56."""
  x = jnp.asarray(
    np.random.default_rng(0).normal(50, 1, (2, 5, 6)), jnp.float32
  )
  kwargs = {'num_groups': 3, 'reduction_axes': (-1,)}
  theirs, ours = both('GroupNorm', 6, **kwargs)
  truth = reference.group_norm(3, batch_axis=(0, 1))
  desired, _ = truth(nk.NormParams(), None, x, True)
  close(run(ours, x), desired, 1e-4, 10)
  assert np.abs(np.asarray(run(theirs, x)) - desired).max() > 1


def test_batch_norm_does_not_round_its_statistics():
  """nnx rounds 100.7 and x to bfloat16 in evaluation, and gives 0."""
  x = jnp.full((2, 6), 101.4)
  theirs, ours = both('BatchNorm', 6, dtype=jnp.bfloat16)
  for layer in (theirs, ours):
    layer.mean[...] = jnp.full((6,), 100.7)
    layer.eval()
  assert ours(x).dtype == theirs(x).dtype == jnp.bfloat16
  close(ours(x), np.full((2, 6), 0.7), 1e-2)
  assert np.abs(np.asarray(theirs(x), float) - 0.7).min() > 0.1
  ours.train()
  ours(x)
  assert ours.mean[...].dtype == jnp.float32


def pooled(layer, x, mask=None):
  """The output, and the statistics of BatchNorm, over a mapped axis."""
  graph, state = nnx.split(layer)

  def apply(x, mask):
    layer = nnx.merge(graph, state, copy=True)
    return layer(x, mask=mask), nnx.to_pure_dict(
      nnx.state(layer, nnx.BatchStat)
    )

  return jax.jit(jax.vmap(apply, axis_name='i'))(x, mask)


def test_masks_are_pooled_by_count():
  """Two devices with 10 and 2 examples have the statistics of all 12."""
  x = X.reshape(2, 10, 6)
  mask = np.ones((2, 10, 1), bool)
  mask[1, 2:] = False
  theirs, ours = (
    pooled(layer, x, mask)[1]['mean'][0]
    for layer in both('BatchNorm', 6, axis_name='i', momentum=0.0)
  )
  desired = np.mean(x, (0, 1), where=mask)
  close(ours, desired)
  assert np.abs(theirs - desired).max() > 1e-2


@one_module
def test_pooled_as_flax(name):
  """With the same count on all devices; and in groups, which Flax refuses."""
  x = X.reshape(4, 1, 5, 6)
  theirs, ours = (
    pooled(small(name, package, axis_name='i'), x) for package in (nnx, kn)
  )
  jax.tree.map(functools.partial(close, tolerance=1e-4), ours, theirs)
  groups = [[0, 1], [2, 3]]
  layer = small(name, axis_name='i', axis_index_groups=groups)
  assert hash(nnx.graphdef(layer)) is not None  # the lists are tuples
  close(
    pooled(layer, x)[0][:2], pooled(small(name, axis_name='i'), x[:2])[0], 1e-4
  )


@every_module
def test_all_masked(name):
  """Zeros, then the bias; the statistics stay."""
  layer = small(name)
  before = nnx.clone(layer)
  y = masked(layer, X, np.zeros(X.shape, bool))
  bias = getattr(layer, 'bias', None)
  close(y, np.broadcast_to(0 if bias is None else bias[...], X.shape))
  same_states(layer, before, 0)


@every_module
def test_mask_may_be_of_lower_rank_and_holds_out_nan(name):
  layer = small(name)
  rows = np.arange(5) > 0
  mask = np.broadcast_to(rows[:, None], X.shape)
  x = X.at[:, 0].set(jnp.nan)
  if name in ('LayerNorm', 'RMSNorm'):  # a row of NaN is a set of its own
    x = X
  y = masked(layer, x, rows[:, None])
  close(y[:, 1:], masked(small(name), X, mask)[:, 1:])


@every_module
def test_small_batches(name):
  """One example gives what Flax gives, and none gives none."""
  x = X[:1, :1]
  if name in ('GroupNorm', 'InstanceNorm', 'BatchNorm'):
    close(*(run(small(name, package), x) for package in (nnx, kn)))
  theirs, ours = small(name, nnx), small(name)
  before = nnx.clone(ours)
  assert run(ours, X[:0]).shape == run(theirs, X[:0]).shape == (0, 5, 6)
  same_states(ours, before, 0)


def test_complex_statistics_are_stored_real():
  """With the warning that tells of it, as in Flax."""
  x = (X + 1j).astype(jnp.complex64)
  layer = small('BatchNorm', momentum=0.0)
  with pytest.warns(np.exceptions.ComplexWarning):
    y = layer(x)
  assert (y.dtype, layer.mean[...].dtype) == (jnp.complex64, jnp.float32)
  close(layer.mean[...], np.mean(X, (0, 1)))


def test_several_axes():
  """In any order, even twice; num_features is the product of the features."""
  for axes in ((2, 1), [1, -1, 2]):
    kwargs = {'reduction_axes': axes, 'feature_axes': axes}
    for name in ('LayerNorm', 'RMSNorm'):
      close(*(run(layer, X) for layer in both(name, 30, **kwargs)))
  layer, x = kn.BatchNorm(30, axis=(2, 1), rngs=nnx.Rngs(0)), np.asarray(X)
  close(run(layer, x), (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
  close(layer.mean[...], 0.01 * x.mean(0).ravel())


def test_double_precision_in_evaluation():
  """The stored statistics are float32, but not what is done with them."""
  with jax.enable_x64(True):
    x = jnp.asarray(X, jnp.float64)
    layer = kn.BatchNorm(6, rngs=nnx.Rngs(0))
    run(layer, x)
    mean, var = (np.float64(s[...]) for s in (layer.mean, layer.var))
    y = nnx.jit(lambda layer, x: layer(x, True))(layer, x)
    assert y.dtype == jnp.float64
    close(y, (np.float64(X) - mean) / np.sqrt(var + 1e-5), 1e-12)


def test_references():
  """Variables may be mutable references, under a plain `jax.jit`."""
  with nnx.var_defaults(ref=True):
    theirs, ours = small('BatchNorm', nnx), small('BatchNorm')
  apply = jax.jit(lambda layer, x: layer(x))
  close(apply(ours, X), apply(theirs, X))
  same_states(ours, theirs)


# promote_dtype.


@some_modules
def test_promote_dtype(name):
  """It is called as Flax calls it, and what it returns is used."""
  calls = []

  def promote(arrays, dtype=None):
    calls.append((len(arrays), dtype))
    return tuple(
      None if a is None else jnp.asarray(a, jnp.float32) * 2 for a in arrays
    )

  theirs, ours = (
    small(name, package, promote_dtype=promote, dtype=jnp.float16)
    for package in (nnx, kn)
  )
  for train in (True, False) if name == 'BatchNorm' else (None,):
    kwargs = {} if train is None else {'use_running_average': not train}
    y, z = theirs(X, **kwargs), ours(X, **kwargs)
    assert y.dtype == z.dtype == jnp.float16
    close(z, y, 1e-2)
  same_states(ours, theirs, 1e-5)
  count = {'BatchNorm': 5, 'RMSNorm': 2}.get(name, 3)
  assert set(calls) == {(count, jnp.float16)}


# What Flax lacks.


@pytest.mark.parametrize(
  'options',
  [
    {'debias': True, 'momentum': 0.9},
    {'momentum': None},
    {'unbiased': True},
    {'skip_nonfinite': True},
    {'virtual_batch_size': 2},
    {'implementation': 'xla'},
  ],
  ids=str,
)
def test_extra_fields(options):
  """Each does what it does in the pure function."""
  layer = kn.BatchNorm(6, rngs=nnx.Rngs(0), **options)
  needs = 'debias' in options or options.get('momentum', 0) is None
  assert (layer.count is not None) == needs
  transform = nk.BatchNorm(**options)
  params, state = transform.init(X)
  for x in (X, 3 * X.at[0, 0, 0].set(jnp.nan), 2 * X):
    desired, state = transform.apply(params, state, x, train=True)
    close(layer(x), desired)
  close(layer.mean[...], state.mean)
  close(layer.var[...], state.var)
  if needs:
    assert layer.count[...].tolist() == state.count.tolist()
    assert isinstance(layer.count, nnx.BatchStat)


def test_count_is_made_at_construction():
  layer = small('BatchNorm')
  layer.momentum = None
  with pytest.raises(ValueError, match='construction'):
    layer(X)


@every_module
def test_implementation(name):
  with pytest.raises(NotImplementedError):
    small(name, implementation='mosaic_tpu')(X)


# Transforms.


def by_jit(layer):
  return nnx.jit(lambda layer, x: layer(x))(layer, X)


def by_grad(layer):
  """The derivative by x."""
  grad = nnx.grad(lambda layer, x: jnp.sum(layer(x) * X), argnums=1)
  return nnx.jit(grad)(layer, X)


def by_remat(layer):
  """The derivative by the parameters, through a rematerialized layer."""

  def loss(layer):
    return jnp.sum(nnx.remat(lambda layer, x: layer(x))(layer, X) * X)

  return nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(layer))['scale']


def by_forward_over_reverse(layer):
  """A product with the Hessian."""

  def loss(x):
    return jnp.sum(nnx.clone(layer)(x) * X)

  product = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (jnp.sin(x),))[1])
  return product(X)


def by_split_and_merge(layer):
  """Used as a pure function; the state goes back to the layer."""
  graph, params, rest = nnx.split(layer, nnx.Param, ...)

  @jax.jit
  def apply(params, rest):
    layer = nnx.merge(graph, params, rest)
    return layer(X), nnx.state(layer)

  y, state = apply(params, rest)
  nnx.update(layer, state)
  return y


TRANSFORMS = (
  by_jit,
  by_grad,
  by_remat,
  by_forward_over_reverse,
  by_split_and_merge,
)


@pytest.mark.parametrize(
  ('name', 'transform'), thinned(NAMES, TRANSFORMS, every=7)
)
def test_transforms(name, transform):
  theirs, ours = small(name, nnx), small(name)
  close(transform(ours), transform(theirs), 1e-4, 10)
  same_states(ours, theirs, 1e-5)


@one_module
def test_stacks(name):
  """Three layers made by vmap, used together by vmap, in a row by scan."""

  def make(package):
    keys = jax.random.split(jax.random.key(1), 3)
    each = nnx.vmap(lambda key: small(name, package, rngs=nnx.Rngs(key)))
    return nnx.jit(each)(keys)

  @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
  def in_a_row(x, layer):
    return layer(x)

  together = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
  theirs, ours = make(nnx), make(kn)
  for use in (lambda m: together(m, X), lambda m: in_a_row(X, m)):
    close(nnx.jit(use)(ours), nnx.jit(use)(theirs), 1e-4)
    same_states(ours, theirs, 1e-5)


@every_module
def test_eval_shape(name):
  """The shapes of a layer without its numbers; then an optimizer's."""
  shapes = nnx.eval_shape(lambda: small(name))
  for path, variable in nnx.to_flat_state(nnx.state(shapes)):
    assert isinstance(variable.get_value(), jax.ShapeDtypeStruct), path
  graph, state = nnx.split(small(name))
  assert nnx.graphdef(shapes) == graph
  close(nnx.merge(nnx.graphdef(shapes), state)(X), small(name)(X))


# Checkpoints.


class ConvNet(nnx.Module):
  """A small convolutional network."""

  def __init__(self, norms, rngs):
    self.first = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
    self.batch_norm = norms.BatchNorm(8, momentum=0.9, rngs=rngs)
    self.second = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
    self.group_norm = norms.GroupNorm(8, num_groups=4, rngs=rngs)
    self.third = nnx.Conv(8, 4, (3, 3), rngs=rngs)
    self.instance_norm = norms.InstanceNorm(4, rngs=rngs)
    self.head = nnx.Linear(64, 3, rngs=rngs)

  def __call__(self, x):
    x = self.second(nnx.relu(self.batch_norm(self.first(x))))
    x = self.third(nnx.relu(self.group_norm(x)))
    return self.head(self.instance_norm(x).reshape(len(x), -1))


class Transformer(nnx.Module):
  """A transformer block, normalized before each part and after the last."""

  def __init__(self, norms, rngs):
    self.before = norms.LayerNorm(8, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      num_heads=2, in_features=8, decode=False, keep_rngs=False, rngs=rngs
    )
    self.between = norms.RMSNorm(8, dtype=jnp.float32, rngs=rngs)
    self.hidden = nnx.Linear(8, 16, rngs=rngs)
    self.out = nnx.Linear(16, 8, rngs=rngs)
    self.after = norms.LayerNorm(8, use_bias=False, rngs=rngs)
    self.head = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x):
    x = x + self.attention(self.before(x))
    x = x + self.out(nnx.gelu(self.hidden(self.between(x))))
    return self.head(self.after(x).mean(1))


class Layers(nnx.Module):
  """A layer and a norm with statistics, for the first tier."""

  def __init__(self, norms, rngs):
    self.first = nnx.Linear(4, 6, rngs=rngs)
    self.norm = norms.BatchNorm(6, momentum=0.9, rngs=rngs)
    self.head = nnx.Linear(6, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(self.norm(self.first(x)))


MODELS = {
  'layers': (Layers, (12, 4)),
  'cnn': (ConvNet, (12, 8, 8, 1)),
  'transformer': (Transformer, (12, 5, 8)),
}
sgd = optax.sgd(0.1)


def loss(model, x):
  losses = optax.softmax_cross_entropy_with_integer_labels(
    model(x), jnp.arange(len(x)) % 3
  )
  return losses.mean()


@nnx.jit
def step(model, optimizer, x):
  value, gradients = nnx.value_and_grad(loss)(model, x)
  optimizer.update(model, gradients)
  return value


def train(model, x):
  """The losses of some steps of training."""
  optimizer = nnx.Optimizer(model, sgd, wrt=nnx.Param)
  return np.array([step(model, optimizer, x) for _ in range(4)])


@pytest.mark.parametrize(
  ('name', 'packages'), thinned(MODELS, [(nnx, kn), (kn, nnx)], every=4)[:-1]
)
def test_orbax(name, packages, tmp_path):
  """A model trained with one package goes on with the other as with it."""
  make, shape = MODELS[name]
  first, second = packages
  x = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)
  model = make(first, nnx.Rngs(0))
  losses = train(model, x)
  assert losses[-1] < losses[0]
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'model', nnx.state(model))
    checkpointer.wait_until_finished()
    shapes = nnx.eval_shape(lambda: make(second, nnx.Rngs(1)))
    graph, state = nnx.split(shapes)
    restored = checkpointer.restore(tmp_path / 'model', state)
  # Bound to no device, for which `step` would be compiled anew.
  other = nnx.merge(graph, jax.tree.map(np.array, restored))
  same_states(other, model, 0)
  close(train(other, x), train(model, x), 1e-4)
  same_states(other, model, 1e-3)


# Any transform.


class Gains(NamedTuple):
  """Parameters within parameters, and one that is absent."""

  gain: Any
  inner: dict[str, Any]
  absent: None = None


@dataclasses.dataclass(frozen=True)
class Own:
  """A transform of someone's own: scales, counts its uses in training."""

  tree: str

  def init(self, x):
    gain = np.full(x.shape[-1], 2, np.float32)
    params = {
      'tuple': Gains(gain, {'log': jnp.zeros(())}),
      'dict': {'gain': gain},
      'array': gain,
    }[self.tree]
    return params, {'uses': [jnp.zeros((), jnp.int32)]}

  def apply(self, params, state, x, *, train, where=None):
    gain = params if self.tree == 'array' else 0
    gain = params['gain'] if self.tree == 'dict' else gain
    if self.tree == 'tuple':
      gain = params.gain * jnp.exp(params.inner['log'])
    y = x * jnp.broadcast_to(gain, x.shape)
    y = y if where is None else jnp.where(where, y, 0)
    return y, jax.tree.map(lambda n: n + train, state)


@pytest.mark.parametrize(
  ('tree', 'params'),
  [
    ('tuple', {('gain',), ('inner', 'log')}),
    ('dict', {('params', 'gain')}),
    ('array', {('params',)}),
  ],
)
def test_norm_of_any_transform(tree, params):
  """NamedTuples keep their fields; what is not one has a name of its own."""
  layer = kn.Norm(Own(tree), jax.ShapeDtypeStruct((1, 6), jnp.float32))
  paths = {True: set(), False: set()}
  for path, variable in nnx.to_flat_state(nnx.state(layer)):
    paths[isinstance(variable, nnx.Param)].add(path)
    assert isinstance(variable, (nnx.Param, nnx.BatchStat))
  assert paths == {True: params, False: {('state', 'uses', 0)}}
  assert getattr(layer, 'absent', None) is None
  y = nnx.jit(lambda layer, x: layer(x, mask=x > 0))(layer, X)
  close(y, np.where(X > 0, 2 * X, 0))
  layer.eval()
  layer(X)
  assert int(layer.state['uses'][0][...]) == 1
  gradients = nnx.grad(lambda layer: jnp.sum(layer(X)))(layer)
  assert len(jax.tree.leaves(gradients)) == len(params)
  graph, state = nnx.split(layer)
  assert hash(graph) is not None
  close(nnx.merge(graph, state)(X), 2 * X)


def test_norm_is_the_module():
  """`Norm(BatchNorm())` has Flax's variables, and the count of updates."""
  layer = kn.Norm(nk.BatchNorm(), X)
  other = kn.BatchNorm(6, rngs=nnx.Rngs(0))
  for _ in range(2):
    close(layer(X), other(X))
  assert layer.count[...].tolist() == [2] * 6
  del layer.count
  same_states(layer, other, 0)


def test_norm_without_scale():
  layer = kn.Norm(nk.RMSNorm(use_scale=False), X)
  assert layer.scale is None and layer.bias is None
  assert not nnx.to_flat_state(nnx.state(layer))
  close(layer(X), nk.rms_norm(X))


def test_norm_refuses_the_name_of_an_attribute():
  class Named(NamedTuple):
    transform: Any

  @dataclasses.dataclass(frozen=True)
  class Bad(Own):
    def init(self, x):
      return Named(jnp.ones(6)), ()

  with pytest.raises(ValueError, match=r"'transform'.*Rename"):
    kn.Norm(Bad('tuple'), X)


def test_norm_needs_a_mode():
  layer = kn.Norm(nk.LayerNorm(), X, use_running_average=None)
  with pytest.raises(ValueError, match='use_running_average'):
    layer(X)
  assert layer(X, True).shape == X.shape
