"""Recalibrated statistics against float64 moments of what the layers see."""

import functools
import importlib.util

import chex
from flax import core, linen as nn, nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from sklearn.datasets import load_digits
from tiers import second_tier, thinned

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools import recalibrate as tool
from normkit.tools.freeze import freeze, frozen
from normkit.tools.recalibrate import recalibrate

SIZES = 6, 2, 6, 6
EQUAL = 6, 6, 6  # one program, where weights of batches are not the claim
NNX_CALL = nnx.jit(lambda model, x: model(x))
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=1e-5)


def batches(*shape, mean=0.0, sizes=EQUAL):
  rng = np.random.default_rng(0)
  return [np.float32(rng.normal(mean, 2, (n, *shape))) for n in sizes]


def moments(parts, axis=0, ddof=0):
  """Float64 moments of all parts together."""
  x = np.concatenate([*parts])
  x = x.astype(np.promote_types(x.dtype, np.float64))
  return {'mean': x.mean(axis), 'var': x.var(axis, ddof=ddof)}


def apply(module, **kwargs):
  @jax.jit
  def call(variables, x):
    return module.apply(variables, x, mutable=['batch_stats'], **kwargs)

  return call


def stats(variables, *path):
  """Mean and variance of a layer."""
  layer = variables['batch_stats']
  for name in path:
    layer = layer[name]
  return {name: layer[name] for name in ('mean', 'var')}


def begin(module, x, **kwargs):
  init = jax.jit(functools.partial(module.init, **kwargs))
  return init(jax.random.key(0), x)


def run(module, parts, **kwargs):
  variables = begin(module, parts[0], **kwargs)
  return recalibrate(apply(module, **kwargs), variables, parts)


# Both passes, by Flax's layers, ours, and a transform.
KINDS = thinned(['flax', 'normkit', 'norm'], [False, True], every=3)


class Net(nn.Module):
  """Dense, norm, ReLU, norm, of three kinds in turn."""

  kind: str = 'flax'

  @nn.compact
  def __call__(self, x, train):
    for _ in range(2):
      x = nn.relu(nn.Dense(4)(x))
      if self.kind == 'norm':
        x = normkit.linen.Norm(nk.BatchNorm(), name=f'bn{_}')(x, train=train)
      else:
        peer = nn if self.kind == 'flax' else normkit.linen
        x = peer.BatchNorm(not train, name=f'bn{_}')(x)
    return x


@functools.cache
def begun(kind='flax'):
  return begin(Net(kind), batches(3)[0], train=True)


@functools.cache
def net_call(train, kind='flax'):
  return apply(Net(kind), train=train)


class NnxNet(nnx.Module):
  """The same network."""

  def __init__(self, kind, rngs):
    peer = nnx if kind == 'flax' else normkit.nnx
    self.dense = nnx.List([nnx.Linear(n, 4, rngs=rngs) for n in (3, 4)])
    x = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    self.norms = nnx.List(
      normkit.nnx.Norm(nk.BatchNorm(), x)
      if kind == 'norm'
      else peer.BatchNorm(4, rngs=rngs)
      for _ in range(2)
    )

  def __call__(self, x):
    for dense, norm in zip(self.dense, self.norms, strict=True):
      x = norm(nnx.relu(dense(x)))
    return x


def nnx_net(kind):
  return nnx.jit(lambda: NnxNet(kind, nnx.Rngs(0)))()


def reference(weights, parts, layerwise):
  """What the two layers of the network see, in float64."""
  found = []
  parts = [np.float64(p) for p in parts]
  for kernel, bias in weights:
    parts = [
      np.maximum(p @ np.float64(kernel) + np.float64(bias), 0) for p in parts
    ]
    found.append(moments(parts))
    used = found[-1:] if layerwise else [moments([p]) for p in parts]
    used = used * len(parts) if layerwise else used
    parts = [
      (p - u['mean']) / np.sqrt(u['var'] + 1e-5)
      for p, u in zip(parts, used, strict=True)
    ]
  return found


@pytest.mark.parametrize(('kind', 'layerwise'), KINDS)
def test_linen(kind, layerwise):
  parts, variables = batches(3, sizes=SIZES), begun(kind)
  before = jax.tree.map(np.array, variables)
  call = net_call(not layerwise, kind)
  call(variables, parts[0])  # a program of before is of no use, and not used
  after = recalibrate(call, variables, parts, layerwise=layerwise)
  params = variables['params']
  weights = [
    (params[f'Dense_{i}']['kernel'], params[f'Dense_{i}']['bias'])
    for i in range(2)
  ]
  wanted = reference(weights, parts, layerwise)
  close([stats(after, f'bn{i}') for i in range(2)], wanted)
  chex.assert_trees_all_equal(variables, before)
  chex.assert_trees_all_equal(after['params'], before['params'])
  chex.assert_trees_all_equal_structs(after, before)


@pytest.mark.parametrize(('kind', 'layerwise'), KINDS)
def test_nnx(kind, layerwise):
  parts, net = batches(3, sizes=SIZES), nnx_net(kind)
  if layerwise:
    net.eval()
  before = jax.tree.map(np.array, nnx.state(net))
  NNX_CALL(nnx.clone(net), parts[0])
  after = recalibrate(NNX_CALL, net, parts, layerwise=layerwise)
  weights = [(d.kernel[...], d.bias[...]) for d in net.dense]
  wanted = reference(weights, parts, layerwise)
  found = [{'mean': n.mean[...], 'var': n.var[...]} for n in after.norms]
  close(found, wanted)
  chex.assert_trees_all_equal(nnx.state(net), before)
  assert nnx.graphdef(after) == nnx.graphdef(net)
  assert type(after.norms[0]) is type(net.norms[0])


def test_count_and_unbiased_variance():
  parts = batches(3)
  norm = normkit.linen.BatchNorm(False, momentum=None, unbiased=True)
  after = run(norm, parts)
  close(stats(after), moments(parts, ddof=1))
  assert after['batch_stats']['count'].tolist() == [3, 3, 3]


@pytest.mark.parametrize(
  'axis', [(1, 2), *map(second_tier, (-1, 1, (-1, 1), ()))]
)
def test_feature_axes(axis):
  parts = batches(2, 5)
  axes = axis if isinstance(axis, tuple) else (axis,)
  reduced = tuple(a for a in range(3) if a not in {b % 3 for b in axes})
  after = run(nn.BatchNorm(False, axis=axis), parts)
  close(stats(after), moments(parts, reduced))
  if len(axes) > 1 or not axes:
    return
  norm = nnx.BatchNorm(parts[0].shape[axis], axis=axis, rngs=nnx.Rngs(0))
  model = recalibrate(NNX_CALL, norm, parts)
  close(model.var[...], moments(parts, reduced)['var'])


@pytest.mark.second_tier
def test_several_feature_axes_of_nnx():
  parts = batches(2, 5)
  norm = normkit.nnx.BatchNorm(10, axis=(1, 2), rngs=nnx.Rngs(0))
  model = recalibrate(NNX_CALL, norm, parts)
  close(model.mean[...], moments(parts)['mean'].reshape(10))


@pytest.mark.parametrize(
  'peer', ['normkit', 'nnx', *map(second_tier, ('flax', 'norm'))]
)
def test_masks(peer):
  rng = np.random.default_rng(1)
  parts = batches(5, 3)
  masks = [rng.random((len(p), 5, 1)) < 0.4 for p in parts]
  given = list(zip(parts, masks, strict=True))
  kept = [p[m[..., 0]] for p, m in given]
  if peer == 'nnx':
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda n, xm: n(xm[0], mask=xm[1]))
    model = recalibrate(call, norm, given)
    close({'mean': model.mean[...], 'var': model.var[...]}, moments(kept))
    return
  module, kwargs = {
    'flax': (nn.BatchNorm(False), {}),
    'normkit': (normkit.linen.BatchNorm(False), {}),
    'norm': (normkit.linen.Norm(nk.BatchNorm()), {'train': True}),
  }[peer]
  variables = begin(module, parts[0], **kwargs)
  call = jax.jit(masked(module, **kwargs))
  close(stats(recalibrate(call, variables, given)), moments(kept))


def test_masked_feature_keeps_its_statistics():
  parts = batches(3)
  norm = normkit.linen.BatchNorm(False, momentum=None)
  variables = begin(norm, parts[0])
  mask = np.array([True, False, True])
  call = apply(norm, mask=mask)
  after = recalibrate(call, variables, parts)['batch_stats']
  after = jax.tree.map(np.asarray, after)
  assert after['mean'][1] == 0
  assert after['var'][1] == 1
  assert after['count'].tolist() == [3, 0, 3]
  close(after['mean'][::2], moments(parts)['mean'][::2])


@pytest.mark.second_tier
@pytest.mark.parametrize('dtype', [second_tier(jnp.float16), jnp.bfloat16])
def test_half_precision(dtype):
  parts = [jnp.asarray(p, dtype) for p in batches(3, mean=3)]
  after = run(nn.BatchNorm(False, dtype=dtype), parts)
  assert after['batch_stats']['mean'].dtype == jnp.float32
  close(stats(after), moments(parts))


@pytest.mark.second_tier
def test_large_mean():
  parts = batches(3, mean=2e5)
  close(stats(run(nn.BatchNorm(False), parts)), moments(parts), rtol=1e-6)


@pytest.mark.second_tier
def test_complex_inputs():
  parts = [p + 1j * p[::-1] for p in batches(3)]
  norm = normkit.linen.Norm(nk.BatchNorm())
  close(stats(run(norm, parts, train=True)), moments(parts))
  real = norm.init(jax.random.key(0), parts[0].real, train=True)
  with pytest.raises(TypeError, match='complex'):
    recalibrate(apply(norm, train=False), real, parts)


@pytest.mark.second_tier
def test_long_stream():
  """A float count would lose each element after the first 2^24."""
  norm = nn.BatchNorm(False)
  call = apply(norm)
  x = jnp.zeros((2**24, 1))
  state = tool.start(norm.init(jax.random.key(0), x))
  state = jax.jit(functools.partial(tool.update, call))(state, x)
  late = jnp.full((16384, 1, 1), 1024.0)

  def step(state, x):
    return tool.update(call, state, x), None

  state, _ = jax.jit(functools.partial(jax.lax.scan, step))(state, late)
  share = 16384 / (2**24 + 16384)
  wanted = {
    'mean': np.array([1024 * share]),
    'var': np.array([1024**2 * share * (1 - share)]),
  }
  close(stats(tool.finish(state)), wanted, rtol=3e-4)


@pytest.mark.parametrize(
  'transform',
  [
    nk.BatchRenorm(),
    *map(second_tier, (nk.StreamingNorm(), nk.BatchNorm(axis=0))),
  ],
)
def test_relatives_of_batch_norm(transform):
  parts = [np.float32(p.T) for p in batches(3)]
  axis = 1 if transform.axis == 0 else 0
  parts = parts if axis else [p.T for p in parts]
  after = run(normkit.linen.Norm(transform), parts, train=True)
  wide = [p.T if axis else p for p in parts]
  close(stats(after), moments(wide))


def test_the_schedule_of_batch_renorm_goes_on():
  """Its count tells how far; that of others, how many batches were seen."""
  for transform, expected in ((nk.BatchRenorm(), 70), (nk.BatchNorm(), None)):
    layer = normkit.linen.Norm(transform)
    parts = batches(3)
    variables = begin(layer, parts[0], train=False)
    old = variables['batch_stats']
    old = {**old, 'count': np.full(3, 70, np.int32)}
    call = apply(layer, train=True)
    after = recalibrate(call, {**variables, 'batch_stats': old}, parts)
    assert set(after['batch_stats']['count'].tolist()) == {
      expected or len(parts)
    }


class Block(nn.Module):
  train: bool = True

  @nn.compact
  def __call__(self, x, _=None):
    y = nn.BatchNorm(not self.train, name='bn')(nn.Dense(3, name='dense')(x))
    return nn.relu(y), None


def scanned(train):
  return nn.scan(
    Block,
    variable_axes={'params': 0, 'batch_stats': 0},
    split_rngs={'params': True},
    length=3,
  )(train)


@pytest.mark.second_tier
@pytest.mark.parametrize('layerwise', [False, True])
def test_scan(layerwise):
  parts, net = batches(3), scanned(not layerwise)
  variables = net.init(jax.random.key(0), parts[0], None)

  @jax.jit
  def call(variables, x):
    return net.apply(variables, x, None, mutable=['batch_stats'])

  after = recalibrate(call, variables, parts, layerwise=layerwise)
  dense = variables['params']['dense']
  x = [np.float64(p) for p in parts]
  for i in range(3):
    x = [p @ np.float64(dense['kernel'][i]) for p in x]
    found = jax.tree.map(lambda a, i=i: a[i], stats(after, 'bn'))
    close(found, moments(x))
    whole = moments(x)
    used = [whole if layerwise else moments([p]) for p in x]
    x = [
      np.maximum((p - u['mean']) / np.sqrt(u['var'] + 1e-5), 0)
      for p, u in zip(x, used, strict=True)
    ]


@pytest.mark.second_tier
def test_vmap_remat_and_jit_of_modules():
  class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x):
      both = nn.vmap(
        nn.BatchNorm,
        variable_axes={'params': 0, 'batch_stats': 0},
        split_rngs={'params': True},
        in_axes=None,
        out_axes=0,
        axis_size=2,
      )
      x = both(False, name='two')(x)[0]
      x = nn.remat(nn.BatchNorm)(False, name='remat')(2 * x)
      return nn.jit(nn.BatchNorm)(False, name='jit')(3 * x + 1)

  parts = batches(3)
  net = Lifted()
  variables = begin(net, parts[0])
  call = apply(net)
  call(variables, parts[0])
  after = recalibrate(call, variables, parts)
  wanted = moments(parts)
  two = jax.tree.map(lambda a: np.stack([a, a]), wanted)
  close(stats(after, 'two'), two)
  normalized = [
    (p - m['mean']) / np.sqrt(m['var'] + 1e-5)
    for p in map(np.float64, parts)
    for m in [moments([p])]
  ]
  close(stats(after, 'remat'), moments([2 * p for p in normalized]))
  again = [2 * p / np.sqrt(4 * moments([p])['var'] + 1e-5) for p in normalized]
  close(stats(after, 'jit'), moments([3 * p + 1 for p in again]))


def test_shared_layer_sees_all_its_calls():
  class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
      norm = nn.BatchNorm(False)
      return norm(x) + norm(10 * x + 1)

  parts = batches(3)
  after = run(Shared(), parts)
  both = [*parts, *(10 * p + 1 for p in parts)]
  close(stats(after, 'BatchNorm_0'), moments(both))


@pytest.mark.second_tier
def test_subclasses():
  class Doubled(nn.BatchNorm):
    def __call__(self, x):
      return super().__call__(2 * x)

  parts = batches(3)
  after = run(Doubled(False), parts)
  close(stats(after), moments([2 * p for p in parts]))

  class NnxDoubled(nnx.BatchNorm):
    def __call__(self, x):
      return super().__call__(2 * x)

  norm = NnxDoubled(3, rngs=nnx.Rngs(0))
  after = recalibrate(lambda n, x: n(x), norm, parts)
  assert type(after) is NnxDoubled
  doubled = moments([2 * p for p in parts])
  close({'mean': after.mean[...], 'var': after.var[...]}, doubled)

  class Own(nnx.BatchNorm):
    def __call__(self, x):
      return x - self.mean[...].reshape(1, 3)

  with pytest.raises(ValueError, match='saw nothing'):
    recalibrate(lambda n, x: n(x), Own(3, rngs=nnx.Rngs(0)), parts)


@pytest.mark.second_tier
def test_other_state_stays():
  class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
      dense = nn.SpectralNorm(nn.Dense(4))
      return nn.BatchNorm(False)(dense(x, update_stats=True))

  parts = batches(3)
  net = Spectral()
  variables = begin(net, parts[0])
  after = recalibrate(apply(net), variables, parts)
  chex.assert_trees_all_equal(
    after['batch_stats']['SpectralNorm_0'],
    variables['batch_stats']['SpectralNorm_0'],
  )


def test_frozen_dict():
  parts, norm = batches(3), nn.BatchNorm(False)
  variables = core.freeze(begin(norm, parts[0]))
  after = recalibrate(apply(norm), variables, parts)
  assert isinstance(after, core.FrozenDict)
  close(stats(after), moments(parts))


def test_function_of_batches():
  parts = batches(3)
  norm = nn.BatchNorm(False)
  variables, call = begin(norm, parts[0]), apply(norm)
  stacked = jnp.asarray(np.stack([parts[0]] * 3))
  for given in (iter(parts), lambda: iter(parts), stacked):
    after = recalibrate(call, variables, given)
    wanted = parts[:1] if isinstance(given, jax.Array) else parts
    close(stats(after), moments(wanted))


# Several devices.


def sharded_parts():
  """Per-device inputs and masks that leave unequal shares."""
  rng = np.random.default_rng(2)
  parts = [np.float32(rng.normal(3, 2, (4, n, 3))) for n in (5, 2)]
  masks = [rng.random((*p.shape[:2], 1)) < 0.5 for p in parts]
  masks[0][1] = False  # a device without any
  kept = [p[m[..., 0]] for p, m in zip(parts, masks, strict=True)]
  return list(zip(parts, masks, strict=True)), moments(kept)


def masked(norm, **kwargs):
  def call(variables, xm):
    options = {'mask': xm[1], 'mutable': ['batch_stats'], **kwargs}
    return norm.apply(variables, xm[0], **options)

  return call


@pytest.mark.second_tier
@pytest.mark.parametrize('use_running_average', [False, True])
def test_shard_map(use_running_average):
  parts, wanted = sharded_parts()
  norm = normkit.linen.BatchNorm(use_running_average, axis_name='data')
  variables = begin(nn.BatchNorm(True), parts[0][0])
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  call = jax.jit(
    jax.shard_map(
      masked(norm),
      mesh=mesh,
      in_specs=(P(), P('data')),
      out_specs=(P('data'), P()),
    )
  )
  after = recalibrate(call, variables, parts, layerwise=use_running_average)
  close(stats(after), wanted)


@pytest.mark.second_tier
def test_pmap():
  parts, wanted = sharded_parts()
  norm = nn.BatchNorm(False, axis_name='data')
  variables = norm.init(jax.random.key(0), parts[0][0][0])
  copies = jax.tree.map(lambda a: jnp.stack([a] * 4), variables)
  call = jax.pmap(masked(norm), axis_name='data', devices=jax.devices()[:4])
  after = stats(recalibrate(call, copies, parts))
  for device in range(4):
    close(jax.tree.map(lambda a, d=device: a[d], after), wanted)


@pytest.mark.second_tier
def test_pmap_without_axis_name_keeps_devices_apart():
  parts = [np.stack([p, p + 1]) for p in batches(3)]
  norm = nn.BatchNorm(False)
  variables = begin(norm, parts[0][0])
  copies = jax.tree.map(lambda a: jnp.stack([a] * 2), variables)
  call = jax.pmap(apply(norm), devices=jax.devices()[:2])
  after = stats(recalibrate(call, copies, parts))
  close(after, moments(np.moveaxis(p, 1, 0) for p in parts))


@pytest.mark.second_tier
def test_groups_of_devices():
  parts = [np.stack([p, p + 1, 2 * p, p - 3]) for p in batches(3)]
  groups = [[0, 1], [2, 3]]
  norm = normkit.linen.BatchNorm(
    False, axis_name='data', axis_index_groups=groups
  )
  variables = begin(norm, parts[0][0])
  copies = jax.tree.map(lambda a: jnp.stack([a] * 4), variables)
  call = jax.vmap(apply(norm), axis_name='data')
  after = stats(recalibrate(call, copies, parts))
  for group in groups:
    seen = [p[d] for p in parts for d in group]
    for d in group:
      close(jax.tree.map(lambda a, d=d: a[d], after), moments(seen))


@pytest.mark.parametrize(
  'kind', [AxisType.Auto, second_tier(AxisType.Explicit)]
)
def test_sharded_arrays(kind):
  parts = [p[:4] for p in batches(3)]
  mesh = jax.make_mesh((4,), ('data',), axis_types=(kind,))
  given = [jax.device_put(p, jax.NamedSharding(mesh, P('data'))) for p in parts]
  norm = normkit.linen.BatchNorm(False)
  variables = begin(norm, parts[0])
  with jax.set_mesh(mesh):
    variables = jax.device_put(variables, jax.NamedSharding(mesh, P()))
    after = recalibrate(apply(norm), variables, given)
  close(stats(after), moments(parts))


# Stopping and going on.


def save_and_restore(path, state):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, state)
    checkpointer.wait_until_finished()
    return checkpointer.restore(path, jax.tree.map(np.zeros_like, state))


def test_resumed_linen(tmp_path):
  parts, variables, call = batches(3), begun(), net_call(train=True)
  state = tool.start(variables)
  for x in parts[:2]:
    state = tool.update(call, state, x)
  state = save_and_restore(tmp_path / 'state', state)
  whole = recalibrate(call, variables, parts)
  chex.assert_trees_all_equal(recalibrate(call, state, parts[2:]), whole)
  for x in parts[2:]:
    state = tool.update(call, state, x)
  chex.assert_trees_all_equal(tool.finish(state), whole)
  chex.assert_trees_all_equal(recalibrate(call, state, []), whole)


@pytest.mark.second_tier
def test_resumed_nnx(tmp_path):
  parts, net = batches(3), nnx_net('norm')
  state = tool.start(net)
  for x in parts[:2]:
    state = tool.update(NNX_CALL, state, x)
  saved = save_and_restore(
    tmp_path / 'state', nnx.to_pure_dict(nnx.state(state))
  )
  state = tool.start(NnxNet('norm', nnx.Rngs(1)))
  nnx.update(state, saved)
  chex.assert_trees_all_equal(
    nnx.state(recalibrate(NNX_CALL, state, parts[2:])),
    nnx.state(recalibrate(NNX_CALL, net, parts)),
  )


# A real model.


class DigitsNet(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    for width in (8, 16, 16, 16):
      x = nn.Conv(width, (2, 2), strides=2 if width == 8 else 1)(x)
      x = normkit.linen.BatchNorm(not train)(x)
      x = nn.relu(x)
    return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def digits():
  """Variables at first and after two cycles of one training, and the data."""
  bunch = load_digits()
  images, labels = np.float32(bunch.images[..., None]), bunch.target
  net, tx = DigitsNet(), optax.adam(0.02)
  first = variables = begin(net, images[:1], train=False)
  opt = jax.jit(tx.init)(variables['params'])

  @jax.jit
  def step(variables, opt, x, y):
    def loss(params):
      logits, updates = net.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return losses.mean(), updates

    grads, updates = jax.grad(loss, has_aux=True)(variables['params'])
    moves, opt = tx.update(grads, opt)
    params = optax.apply_updates(variables['params'], moves)
    return {'params': params, **updates}, opt

  rng, snapshots = np.random.default_rng(0), [first]
  for number in range(90):
    chosen = rng.integers(0, 1400, 64)
    variables, opt = step(variables, opt, images[chosen], labels[chosen])
    if number in (59, 89):
      snapshots.append(variables)
  train = [images[i : i + 200] for i in range(0, 800, 200)]
  return net, snapshots, train, (images[1400:], labels[1400:])


EVALUATE = jax.jit(functools.partial(DigitsNet().apply, train=False))


def accuracy(variables, test):
  logits = np.asarray(EVALUATE(variables, test[0]))
  return float((logits.argmax(-1) == test[1]).mean())


@pytest.mark.parametrize('layerwise', [second_tier(False), True])
def test_repairs_stale_statistics(digits, layerwise):
  net, (fresh, _, trained), train, test = digits
  stale = {**trained, 'batch_stats': fresh['batch_stats']}
  call = apply(net, train=not layerwise)
  mended = recalibrate(call, stale, train, layerwise=layerwise)
  before, after = (accuracy(v, test) for v in (stale, mended))
  assert before < 0.7
  assert after > 0.9
  assert after >= accuracy(trained, test) - 0.02


def test_repairs_averaged_weights(digits):
  net, (fresh, one, two), train, test = digits
  one, two = jax.device_get((one['params'], two['params']))
  params = jax.tree.map(lambda a, b: (a + b) / 2, one, two)
  averaged = {'params': params, 'batch_stats': fresh['batch_stats']}
  mended = recalibrate(apply(net, train=True), averaged, train)
  assert accuracy(averaged, test) < 0.7
  assert accuracy(mended, test) > 0.9


# What is refused.


@pytest.fixture(scope='module')
def model():
  return net_call(train=True), begun(), batches(3)


def test_refuses_the_other_mode(model):
  """One pass in evaluation mode would leave second layers far off."""
  _, variables, parts = model
  for layerwise in (True, False):
    call = net_call(train=layerwise)
    recalibrate(call, variables, parts, layerwise=not layerwise)
    with pytest.raises(ValueError, match=r"'bn0' normalized .* train="):
      recalibrate(call, variables, parts, layerwise=layerwise)
  net = nnx_net('flax')
  with pytest.raises(ValueError, match=r"'norms/0' normalized .* batch"):
    recalibrate(NNX_CALL, net, parts, layerwise=True)
  net.eval()
  with pytest.raises(ValueError, match=r"'norms/0' normalized .* running"):
    recalibrate(NNX_CALL, net, parts)


@pytest.mark.parametrize('kind', ['linen', 'nnx'])
def test_frozen_layers_stay(kind):
  """The others are set by what they see behind a layer that evaluates."""
  parts = batches(3)
  if kind == 'linen':
    call = frozen('bn0')(net_call(train=True))
    after = recalibrate(call, begun(), parts)
    found = after['batch_stats']['bn1']['mean']
    params = after['params']
    weights = [params[f'Dense_{i}'] for i in range(2)]
    weights = [(w['kernel'], w['bias']) for w in weights]
    first = stats(after, 'bn0')
  else:
    before = nnx_net('normkit')
    after = recalibrate(NNX_CALL, freeze(before, 'norms/0'), parts)
    found = after.norms[1].mean[...]
    weights = [(d.kernel[...], d.bias[...]) for d in after.dense]
    first = {n: getattr(after.norms[0], n)[...] for n in ('mean', 'var')}
  close(first, {'mean': np.zeros(4), 'var': np.ones(4)})
  x = np.float64(np.concatenate(parts))
  for kernel, bias in weights:
    x = np.maximum(x @ np.float64(kernel) + np.float64(bias), 0)
    mean, x = x.mean(0), x / np.sqrt(1 + 1e-5)
  close(found, mean)


def test_refuses_no_batches(model):
  call, variables, _ = model
  for given in ([], lambda: iter(())):
    with pytest.raises(ValueError, match='batches is empty'):
      recalibrate(call, variables, given)
  with pytest.raises(TypeError, match='batches must be an iterable'):
    recalibrate(call, variables, 3)


def test_refuses_a_model_without_statistics(model):
  call, variables, parts = model
  params = {'params': variables['params']}
  with pytest.raises(ValueError, match='no layer with running statistics'):
    recalibrate(call, params, parts)
  with pytest.raises(ValueError, match='no layer with running statistics'):
    recalibrate(call, nnx.Linear(3, 3, rngs=nnx.Rngs(0)), parts)
  with pytest.raises(TypeError, match='got list'):
    recalibrate(call, [1], parts)


def test_refuses_a_layer_that_never_runs(model):
  call, variables, parts = model
  zeros = np.zeros(4, np.float32)
  stray = {'head': {'norm': {'mean': zeros, 'var': zeros + 1}}}
  variables = {**variables, 'batch_stats': variables['batch_stats'] | stray}
  with pytest.raises(ValueError, match="'head/norm' saw nothing"):
    recalibrate(call, variables, parts)


@pytest.mark.second_tier
def test_refuses_recurrent_cells():
  """Their statistics are of time steps, and no layer's that can be watched."""
  cell = normkit.nnx.BatchNormLSTMCell(3, 4, max_length=5, rngs=nnx.Rngs(0))
  rnn = normkit.nnx.RNN(cell)
  with pytest.raises(ValueError, match="'cell/norm_c' saw nothing"):
    recalibrate(lambda rnn, x: rnn(x), rnn, [jnp.ones((2, 5, 3))])


@pytest.mark.parametrize('layerwise', [False, True])
def test_refuses_what_is_not_finite(model, layerwise):
  _, variables, parts = model
  call = net_call(not layerwise)
  before = jax.tree.map(np.array, variables)
  with pytest.raises(ValueError, match="'bn0' saw inputs whose mean"):
    parts = [*parts, np.full((6, 3), np.inf, np.float32)]
    recalibrate(call, variables, parts, layerwise=layerwise)
  chex.assert_trees_all_equal(variables, before)


@pytest.mark.parametrize('value', [1e30, np.nan, -np.inf])
def test_refuses_one_number_that_is_not_finite(value):
  """Or, of 1e30, whose square is not: the mean is finite."""
  parts = batches(3)
  parts[1][0, 2] = value
  with pytest.raises(ValueError, match='mean or variance is not finite'):
    run(nn.BatchNorm(False), parts)


def test_refuses_what_can_be_read_once(model):
  call, variables, parts = model
  with pytest.raises(ValueError, match='can be read once'):
    recalibrate(call, variables, iter(parts), layerwise=True)


def test_refuses_a_call_without_updates(model):
  _, variables, parts = model
  calls = (
    lambda v, x: Net().apply(v, x, train=False),
    lambda v, x: Net().apply(v, x, train=False, mutable=['losses']),
  )
  for call in calls:
    with pytest.raises(TypeError, match='mutable='):
      recalibrate(call, variables, parts)
  with pytest.raises(TypeError, match='call must be a function'):
    recalibrate(None, variables, parts)


def test_refuses_a_state_of_another_kind(model):
  call, variables, parts = model
  for function in (tool.finish, functools.partial(tool.update, call, batch=0)):
    with pytest.raises(ValueError, match='does not come from start'):
      function(variables)
  with pytest.raises(ValueError, match='begins anew'):
    recalibrate(call, tool.start(variables), parts, layerwise=True)


def test_progress(model, capsys, monkeypatch):
  call, variables, parts = model
  recalibrate(call, variables, parts, progress=True)
  assert 'recalibrate' in capsys.readouterr().out
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ImportError, match='pip install rich'):
    recalibrate(call, variables, parts, progress=True)
