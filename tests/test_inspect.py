"""Inspections: numbers against float64 references, faults in real models."""

import functools
import io
import itertools

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import optax
import pytest
from rich import console
from sklearn.datasets import load_digits
from tiers import second_tier

import normkit.linen
import normkit.nnx
from normkit.tools.inspect import inspect
from normkit.tools.recalibrate import recalibrate

STEPS = 60


class Net(nn.Module):
  """A small CNN; with `flat`, a network of dense layers."""

  momentum: float = 0.9
  flat: bool = False
  norm: type = normkit.linen.BatchNorm

  @nn.compact
  def __call__(self, x, *, train):
    x = x.reshape(len(x), -1) if self.flat else x
    for width in (8, 16):
      layer = nn.Dense if self.flat else nn.Conv
      args = () if self.flat else ((3, 3), 2)
      x = layer(width, *args)(x)
      x = self.norm(not train, momentum=self.momentum)(x)
      x = nn.relu(x)
    return nn.Dense(10)(x.reshape(len(x), -1))


TX = optax.sgd(0.1, 0.9)


@functools.partial(jax.jit, static_argnums=0)
def step(net, variables, opt, part):
  grads, updates = jax.grad(
    lambda params: loss_of(net, params, variables, part), has_aux=True
  )(variables['params'])
  moves, opt = TX.update(grads, opt)
  params = optax.apply_updates(variables['params'], moves)
  return params, updates, opt


def train(net, parts, keep=True):
  """Trains the model; without `keep` updated statistics are dropped."""
  variables = start(net)
  opt = TX.init(variables['params'])
  for part in zip(*parts, strict=True):
    params, updates, opt = step(net, variables, opt, part)
    stats = updates if keep else {'batch_stats': variables['batch_stats']}
    variables = {'params': params, **stats}
  return variables


def loss_of(net, params, variables, part):
  x, y = part
  logits, updates = net.apply(
    {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
  )
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
  return losses.mean(), updates


@functools.cache
def start(net):
  x = jnp.zeros((2, 8, 8, 1))
  return jax.jit(lambda key: net.init(key, x, train=False))(jax.random.key(0))


@functools.cache
def loss_call(net):
  return jax.jit(lambda v, part: loss_of(net, v['params'], v, part)[0])


@functools.cache
def training_call(net, **kwargs):
  options = {'train': True, 'mutable': ['batch_stats']} | kwargs
  return jax.jit(
    lambda variables, part: net.apply(variables, part[0], **options)
  )


def mesh():
  """Four devices in a row."""
  return jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))


def gathered(net, variables, parts):
  """The variables with statistics from the initial ones on."""
  variables = {**variables, 'batch_stats': start(net)['batch_stats']}
  for part in zip(*parts, strict=True):
    _, updates = training_call(net)(variables, part)
    variables = {**variables, **updates}
  return variables


def codes(found):
  return {finding.code for finding in found.advice}


def layers(found, code):
  return {finding.layer for finding in found.advice if finding.code == code}


@pytest.fixture(scope='module')
def data():
  """Batches of 64 digits for the steps of training, and larger ones."""
  bunch = load_digits()
  images = np.float32(bunch.images[..., None] / 16)
  chosen = np.random.default_rng(0).integers(0, len(images), (STEPS, 64))
  parts = images[chosen], bunch.target[chosen]
  batches = [
    (images[i : i + 128], bunch.target[i : i + 128]) for i in range(0, 512, 128)
  ]
  return parts, batches


@pytest.fixture(scope='module')
def healthy(data):
  net = Net()
  return net, train(net, data[0])


def test_healthy(healthy, data):
  net, variables = healthy
  before = jax.tree.map(np.array, variables)
  found = inspect(
    training_call(net),
    variables,
    data[1],
    loss=loss_call(net),
    learning_rate=0.1,
    steps=STEPS,
    framework='flax',
  )
  assert found.advice == [], found
  assert [layer.name for layer in found.layers] == [
    'BatchNorm_0',
    'BatchNorm_1',
  ]
  assert [w.name for w in found.weights] == ['Conv_0/kernel', 'Conv_1/kernel']
  for weight in found.weights:
    kernel = np.float64(variables['params'][weight.name[:6]]['kernel'])
    chex.assert_trees_all_close(weight.rate, 0.1 / (kernel**2).sum(), rtol=1e-6)
  assert 0 < sum(layer.gradient for layer in found.layers) < 1
  chex.assert_trees_all_equal(variables, before)


# Numbers.


def tiny():
  """One dense layer and its norm, float64 arrays, and its inputs."""
  rng = np.random.default_rng(1)
  params = {
    'Dense_0': {'kernel': rng.normal(size=(3, 4))},
    'BatchNorm_0': {
      'scale': rng.normal(1, 0.2, 4),
      'bias': rng.normal(0, 3, 4),
    },
  }
  stats = {'mean': rng.normal(size=4), 'var': rng.uniform(1, 2, 4)}
  parts = [rng.normal(size=(n, 3)) for n in (6, 9, 6)]
  return params, stats, parts


class Tiny(nn.Module):
  norm: nn.Module = normkit.linen.BatchNorm(False, parent=None)

  @nn.compact
  def __call__(self, x, mask=None):
    x = nn.Dense(4, use_bias=False, name='Dense_0')(x)
    return self.norm.clone(name='BatchNorm_0', parent=self)(x, mask=mask)


def reference(params, x):
  h = x @ params['Dense_0']['kernel']
  normalized = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
  return h, normalized * params['BatchNorm_0']['scale'] + params['BatchNorm_0'][
    'bias'
  ]


def rounded(tree):
  return jax.tree.map(np.float32, tree)


@jax.jit
def tiny_call(variables, x):
  return Tiny().apply(variables, x, mutable=['batch_stats'])


@jax.jit
def tiny_loss(variables, x):
  return jnp.mean(jnp.sin(tiny_call(variables, x)[0]))


@pytest.fixture(scope='module')
def tiny_found():
  params, stats, parts = tiny()
  variables = rounded({'params': params, 'batch_stats': {'BatchNorm_0': stats}})
  return inspect(tiny_call, variables, rounded(parts), loss=tiny_loss)


def test_numbers(tiny_found):
  params, stats, parts = tiny()
  (row,) = tiny_found.layers
  h, y = (
    np.concatenate(a)
    for a in zip(*[reference(params, x) for x in parts], strict=True)
  )
  assert np.any(abs(y) > 3)
  chex.assert_trees_all_close(
    [row.batch_mean, row.batch_var, row.positive, row.saturated],
    [h.mean(0), h.var(0), (y > 0).mean(0), (abs(y) > 3).mean(0)],
    rtol=1e-5,
    atol=1e-6,
  )
  off = abs(stats['mean'] - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
  ratio = np.sqrt((stats['var'] + 1e-5) / (h.var(0) + 1e-5))
  chex.assert_trees_all_close(
    [row.shift, row.stretch], [off, np.log2(ratio)], rtol=1e-4
  )
  assert (row.elements, row.examples, row.epsilon) == (
    6,
    6,
    pytest.approx(1e-5),
  )


def test_gradient_shares(tiny_found):
  """Against differences of the float64 model."""
  params, _, parts = tiny()

  def total(params):
    return sum(np.mean(np.sin(reference(params, x)[1])) for x in parts)

  squares = {}
  for name, group in params.items():
    for leaf, value in group.items():
      slopes = np.zeros_like(value)
      for index in np.ndindex(value.shape):
        old = value[index]
        ends = []
        for move in (1e-5, -1e-5):
          value[index] = old + move
          ends.append(total(params))
        value[index] = old
        slopes[index] = (ends[0] - ends[1]) / 2e-5
      squares[name, leaf] = (slopes**2).sum()
  share = 1 - squares['Dense_0', 'kernel'] / sum(squares.values())
  chex.assert_trees_all_close(tiny_found.layers[0].gradient, share, rtol=1e-4)
  (weight,) = tiny_found.weights
  chex.assert_trees_all_close(weight.gradient, 1 - share, rtol=1e-4)


def test_masks_and_devices():
  """Masks that leave four devices unequal shares, pooled by the layer."""
  params, stats, _ = tiny()
  rng = np.random.default_rng(2)
  x, mask = rng.normal(size=(8, 5, 3)), rng.random((8, 5, 1)) < 0.6
  mask[:2] = False  # a device without any
  norm = normkit.linen.BatchNorm(False, axis_name='data', parent=None)
  call = jax.jit(
    jax.shard_map(
      lambda v, batch: Tiny(norm).apply(v, *batch, mutable=['batch_stats']),
      mesh=mesh(),
      in_specs=(P(), P('data')),
      out_specs=(P('data'), P()),
    )
  )
  variables = rounded({'params': params, 'batch_stats': {'BatchNorm_0': stats}})
  found = inspect(call, variables, [(np.float32(x), mask)])
  h, y = reference(params, x[mask[..., 0]])
  (row,) = found.layers
  chex.assert_trees_all_close(
    [row.batch_mean, row.batch_var, row.positive],
    [h.mean(0), h.var(0), (y > 0).mean(0)],
    rtol=1e-5,
    atol=1e-6,
  )
  assert (row.elements, row.examples) == (mask.sum(), 8)


# Faults, each in a model that was trained with it.


def test_forgotten_mutable(healthy, data):
  net, variables = healthy
  calls = (
    training_call(net, mutable=False),
    training_call(net, train=False, mutable=False),
    training_call(net, train=False, mutable='losses'),
  )
  for call in calls:
    found = inspect(call, variables, data[1])
    assert codes(found) == {'mutable'}
    assert "mutable=['batch_stats']" in found.advice[0].message
    assert found.advice[0].level == 'error'
    assert '-' in str(found)


def test_never_updated(data):
  net = Net()
  variables = train(net, data[0], keep=False)
  found = inspect(training_call(net), variables, data[1])
  assert layers(found, 'not_updated') == {'BatchNorm_0', 'BatchNorm_1'}
  assert codes(found) == {'not_updated'}


def test_gap_and_its_mending(healthy, data):
  net, variables = healthy
  shifted = [(0.4 * x + 0.6, y) for x, y in data[1]]
  call = training_call(net)
  found = inspect(call, variables, shifted)
  assert codes(found) == {'gap'}
  assert 'evaluation differs from training in BatchNorm_0' in str(found)
  mended = recalibrate(call, variables, shifted)
  assert inspect(call, mended, shifted).advice == []


def test_one_channel_off(healthy, data):
  """One of many is lost in the root mean square."""
  net, variables = healthy
  call = training_call(net)
  stats = variables['batch_stats']
  for off, wanted in ((0.5, set()), (1.6, {'gap'})):
    one = stats['BatchNorm_1']
    mean = one['mean'].at[5].add(off * one['var'][5] ** 0.5)
    moved = {**stats, 'BatchNorm_1': {**one, 'mean': mean}}
    found = inspect(call, {**variables, 'batch_stats': moved}, data[1])
    assert codes(found) == wanted
  row = found.layers[1]
  assert np.sqrt(np.mean(row.shift**2)) < 0.5
  assert 'channels 5 are up to' in found.advice[0].message
  cells = str(found).splitlines()[2].split()
  assert cells[3] == f'{row.shift.max():.2g}'


@pytest.mark.second_tier
def test_momentum(healthy, data):
  net = Net(momentum=0.99)
  variables = gathered(net, healthy[1], data[0])
  found = inspect(training_call(net), variables, data[1], steps=STEPS)
  assert layers(found, 'momentum') == {'BatchNorm_0', 'BatchNorm_1'}
  assert '55% are left after 60 steps' in str(found)
  debiased = normkit.linen.BatchNorm(False, debias=True, parent=None)
  x = data[1][0][0].reshape(128, 64)[:, 20:23]
  variables = jax.jit(Tiny(debiased).init)(jax.random.key(0), x)
  call = jax.jit(
    lambda v, x: Tiny(debiased).apply(v, x, mutable=['batch_stats'])
  )
  _, updates = call(variables, x)
  found = inspect(call, {**variables, **updates}, [x], steps=1)
  assert 'momentum' not in codes(found)


@pytest.mark.second_tier
def test_momentum_of_pytorch(healthy, data):
  net = Net(momentum=0.1)
  variables = gathered(net, healthy[1], data[0])
  found = inspect(training_call(net), variables, data[1])
  assert layers(found, 'momentum') == {'BatchNorm_0', 'BatchNorm_1'}
  assert 'momentum=0.9' in str(found)


@pytest.mark.parametrize('flat', [True, second_tier(False)])
def test_batch_of_one(healthy, data, flat):
  net = Net(flat=flat)
  variables = start(net) if flat else healthy[1]
  images, labels = data[0][0][0], data[0][1][0]
  single = images[:40, None], labels[:40, None]
  variables = gathered(net, variables, single)
  found = inspect(training_call(net), variables, [*zip(*single, strict=True)])
  assert layers(found, 'one_element') == {'BatchNorm_0', 'BatchNorm_1'}
  one = 'one element' if flat else 'one example'
  assert sum(one in f.message for f in found.advice) == 2
  elements = [layer.elements for layer in found.layers]
  assert elements == ([1, 1] if flat else [16, 4])


def test_nan_in_statistics(healthy, data):
  net, variables = healthy
  call = training_call(net)
  images, labels = data[0]
  spoilt = images[0].copy()
  spoilt[5, 2, 2] = np.nan
  _, updates = call(variables, (spoilt, labels[0]))
  worse = {**variables, **updates}
  found = inspect(call, worse, data[1])
  assert layers(found, 'nonfinite') == {'BatchNorm_0', 'BatchNorm_1'}
  stats = variables['batch_stats']
  mean = stats['BatchNorm_1']['mean'].at[3].set(jnp.nan)
  one = {**stats, 'BatchNorm_1': {**stats['BatchNorm_1'], 'mean': mean}}
  found = inspect(call, {**variables, 'batch_stats': one}, data[1])
  assert [(f.layer, f.code) for f in found.advice] == [
    ('BatchNorm_1', 'nonfinite')
  ]
  assert 'channels 3:' in found.advice[0].message


def test_nan_in_batches(healthy, data):
  net, variables = healthy
  x, y = data[1][0]
  x = x.copy()
  x[7, 4, 4] = np.inf
  found = inspect(training_call(net), variables, [(x, y)])
  assert layers(found, 'nonfinite') == {'BatchNorm_0', 'BatchNorm_1'}


@pytest.mark.second_tier
def test_statistics_differ_between_devices(data):
  """Four devices that train without axis_name, outputs said to be equal."""
  images, labels = data[0][0][:5], data[0][1][:5]
  order = np.argsort(labels, axis=1)  # each device has digits of its own
  x = np.take_along_axis(images.reshape(5, 64, 64), order[..., None], 1)
  plain = nn.BatchNorm(False, momentum=0.9)
  variables = plain.init(jax.random.key(0), x[0])

  def call(variables, x):
    return plain.apply(variables, x, mutable=['batch_stats'])

  def trained(axis_name):
    norm = nn.BatchNorm(False, momentum=0.9, axis_name=axis_name)

    def train(variables, parts):
      for x in parts:
        _, updates = norm.apply(variables, x, mutable=['batch_stats'])
        variables = {**variables, **updates}
      return variables

    specs = {'in_specs': (P(), P(None, 'data')), 'out_specs': P()}
    train = jax.shard_map(train, mesh=mesh(), check_vma=False, **specs)
    return jax.jit(train)(variables, x)

  found = {
    name: inspect(call, trained(name), [x.reshape(-1, 64)])
    for name in (None, 'data')
  }
  assert layers(found[None], 'devices') == {''}
  assert found[None].advice[0].message.startswith('the norm has different')
  assert 'devices' not in codes(found['data'])


@pytest.mark.second_tier
def test_stacked_statistics(healthy, data):
  net, variables = healthy
  copies = jax.tree.map(lambda a: jnp.stack([a, a]), variables)
  parts = [(x.reshape(2, -1, 8, 8, 1), y) for x, y in data[1]]
  call = jax.vmap(training_call(net), in_axes=(0, (0, None)))
  assert inspect(call, copies, parts, stacked=True).advice == []
  stats = jax.tree.map(lambda a: a.at[1].mul(1.1), copies['batch_stats'])
  found = inspect(call, {**copies, 'batch_stats': stats}, parts, stacked=True)
  assert layers(found, 'devices') == {'BatchNorm_0', 'BatchNorm_1'}


def test_epsilon_of_another_framework(healthy, data):
  net, variables = healthy
  call, parts = training_call(net), data[1][:1]
  found = inspect(call, variables, parts, framework='torch')
  assert found.advice == []
  found = inspect(call, variables, parts, framework='keras')
  assert layers(found, 'epsilon') == {'BatchNorm_0', 'BatchNorm_1'}
  assert 'epsilon=0.001' in str(found)


@pytest.mark.parametrize(
  ('code', 'group', 'leaf', 'change'),
  [
    ('dead', 'BatchNorm_1', 'bias', lambda a: a.at[:8].set(-100.0)),
    ('exploding', 'Conv_1', 'kernel', lambda a: a.at[..., 2].mul(1e4)),
    ('scale', 'BatchNorm_1', 'scale', lambda a: a.at[:8].set(1e-6)),
    ('saturated', 'BatchNorm_1', 'scale', lambda a: 10 * a),
  ],
)
def test_channels(healthy, data, code, group, leaf, change):
  net, variables = healthy
  params = variables['params']
  changed = {**params[group], leaf: change(params[group][leaf])}
  variables = {**variables, 'params': {**params, group: changed}}
  call = training_call(net)
  found = inspect(call, recalibrate(call, variables, data[1]), data[1])
  assert layers(found, code) == {'BatchNorm_1'}
  others = {'saturated'} if code == 'dead' else set()
  assert codes(found) == {code} | others
  row = found.layers[1]
  if code == 'dead':
    assert row.dead[:8].all()
    assert row.dead.sum() < 16
  if code == 'exploding':
    assert np.flatnonzero(row.exploding).tolist() == [2]


def test_unseen(healthy, data):
  net, variables = healthy
  zeros = np.zeros(2, np.float32)
  stray = {'mean': zeros, 'var': zeros + 3}
  stats = {**variables['batch_stats'], 'head': stray}
  found = inspect(
    training_call(net),
    {**variables, 'batch_stats': stats},
    data[1],
    steps=1000,
    framework='flax',
  )
  assert [(f.layer, f.code) for f in found.advice] == [('head', 'unseen')]
  initial = {'mean': zeros, 'var': zeros + 1}
  stats = {**variables['batch_stats'], 'head': initial}
  found = inspect(
    training_call(net), {**variables, 'batch_stats': stats}, data[1]
  )
  assert [(f.layer, f.code) for f in found.advice] == [('head', 'unseen')]


def test_zeros_that_residual_blocks_begin_with(healthy, data):
  """No fault; but an input that does not vary is one, whatever the scale."""
  net, variables = healthy
  params = variables['params']
  last = jax.tree.map(jnp.zeros_like, params['BatchNorm_1'])
  variables = {**variables, 'params': {**params, 'BatchNorm_1': last}}
  found = inspect(training_call(net), variables, data[1])
  assert not found.advice
  assert not found.layers[1].dead.any()
  assert not found.layers[1].small.any()
  still = jax.tree.map(jnp.zeros_like, params['Conv_1'])
  params = {**variables['params'], 'Conv_1': still}
  found = inspect(training_call(net), {**variables, 'params': params}, data[1])
  assert found.layers[1].dead.all()


def test_evaluation_is_told(healthy, data):
  net, variables = healthy
  found = inspect(training_call(net, train=False), variables, data[1])
  assert codes(found) == {'evaluation'}
  assert found.advice[0].level == 'warning'
  assert not any(
    n.evaluated for n in inspect(training_call(net), variables, data[1]).layers
  )


# nnx, lifted layers, output.


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    widths = [64, 16, 16]
    self.dense = nnx.List(
      nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(widths)
    )
    self.norms = nnx.List(
      normkit.nnx.BatchNorm(o, momentum=0.9, rngs=rngs) for o in widths[1:]
    )
    self.head = nnx.Linear(16, 10, rngs=rngs)

  def __call__(self, x):
    x = x.reshape(len(x), -1)
    for dense, norm in zip(self.dense, self.norms, strict=True):
      x = nnx.relu(norm(dense(x)))
    return self.head(x)


def test_nnx(data):
  def loss(model, part):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      model(part[0]), part[1]
    )
    return losses.mean()

  model = nnx.jit(lambda: NnxNet(nnx.Rngs(0)))()
  optimizer = nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, part):
    optimizer.update(model, nnx.grad(loss)(model, part))

  for part in zip(*data[0], strict=True):
    step(model, optimizer, part)
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
  call = nnx.jit(lambda model, part: model(part[0]))
  found = inspect(
    call,
    model,
    data[1],
    loss=nnx.jit(loss),
    learning_rate=0.1,
    steps=STEPS,
    framework='flax',
  )
  assert found.advice == [], found
  assert [w.name for w in found.weights] == ['dense/0/kernel', 'dense/1/kernel']
  chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)
  model.norms[1].mean[...] = model.norms[1].mean[...] + 100
  found = inspect(call, model, data[1])
  assert [(f.layer, f.code) for f in found.advice] == [('norms/1', 'gap')]


def test_order_of_layers():
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  names = [f'BatchNorm_{i}' for i in range(12)]
  variables = {'batch_stats': dict.fromkeys(sorted(names), stats)}
  found = inspect(lambda v, x: (x, v), variables, [0])
  assert [layer.name for layer in found.layers] == names


def test_scanned_layers():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return nn.BatchNorm(False)(x) * 2, None

  x = np.float32(np.random.default_rng(0).normal(5, 3, (32, 4)))
  axes = {'params': 0, 'batch_stats': 0}
  net = nn.scan(Block, axes, split_rngs={'params': True}, length=3)()
  variables = net.init(jax.random.key(0), x, None)
  found = inspect(
    lambda v, x: net.apply(v, x, None, mutable=['batch_stats']), variables, [x]
  )
  (row,) = found.layers
  wanted = np.stack([np.float64(x).var(0), np.full(4, 4.0), np.full(4, 4.0)])
  chex.assert_trees_all_close(row.batch_var, wanted, rtol=1e-4)


@pytest.mark.parametrize('mapped', [False, True])
def test_scanned_layers_without_statistics(mapped):
  """Under `nn.scan`, which refuses what has an effect; each layer counts."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return x * nn.RMSNorm(epsilon=0.0)(x), None

  x = np.float32(np.random.default_rng(0).normal(5, 3, (32, 4)))
  axes = {'params': 0}
  net = nn.scan(Block, axes, split_rngs={'params': True}, length=3)()
  variables = net.init(jax.random.key(0), x, None)

  def call(variables, x):
    def run(x):
      return net.apply(variables, x, None)[0]

    return jax.vmap(run)(x) if mapped else run(x)

  found = inspect(call, variables, [x])
  (norm,) = found.norms
  outputs = []
  for _ in range(3):
    outputs.append(x / np.sqrt((x**2).mean(-1, keepdims=True)))
    x = x * outputs[-1]
  low, high = np.min(outputs, (0, 1)), np.max(outputs, (0, 1))
  assert norm.examples == 3 * 32
  chex.assert_trees_all_close((norm.low, norm.high), (low, high), rtol=1e-5)


def test_output(healthy, data, tmp_path):
  net, variables = healthy
  found = inspect(
    training_call(net),
    variables,
    [(x + 1, y) for x, y in data[1]],
    loss=loss_call(net),
  )
  lines = str(found).splitlines()
  assert lines[0].split()[:2] == ['layer', 'elements']
  assert lines[1].split()[:2] == ['BatchNorm_0', '2048']
  assert lines[3].startswith('weight before a norm')
  assert lines[-1].startswith('warning: evaluation differs')
  shown = console.Console(width=160, file=io.StringIO())
  shown.print(found.table())
  text = shown.file.getvalue()
  assert 'BatchNorm_1' in text
  assert 'recalibrate' in text
  figure = found.figure()
  figure.savefig(tmp_path / 'norms.pdf')
  marks = [line.get_ydata() for line in figure.axes[0].lines]
  chex.assert_trees_all_equal(marks, [layer.shift for layer in found.layers])


# Norms without running statistics.


class Stateless(nn.Module):
  """A transformer's norms, and convolutions', with the faults asked for."""

  fault: str = ''

  @nn.compact
  def __call__(self, x):
    epsilon = 1e-12 if self.fault == 'epsilon' else 1e-6
    axis = (0, 2) if self.fault == 'axis' else -1
    y = nn.LayerNorm(reduction_axes=axis, epsilon=epsilon)(x)
    if self.fault == 'doubled':
      y = nn.RMSNorm()(y)
    y = jnp.tanh(normkit.linen.RMSNorm(name='rms')(nn.Dense(8)(y)))
    groups = 8 if self.fault == 'one_element' else 2
    y = y[:, 0] if self.fault == 'one_element' else y
    return nn.GroupNorm(num_groups=groups)(y)


def test_norms_without_statistics():
  x = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float16)
  variables = jax.jit(Stateless().init)(jax.random.key(0), x)
  call = jax.jit(Stateless().apply)
  call(variables, x)  # compiled before
  for _ in range(2):  # and with what inspects it
    found = inspect(call, variables, [x, x + 1])
    assert not found.advice
    assert not found.layers
    told = [(n.name, n.kind, n.elements) for n in found.norms]
    assert told == [
      ('LayerNorm_0', 'LayerNorm', 8),
      ('rms', 'RMSNorm', 8),
      ('GroupNorm_0', 'GroupNorm', 20),
    ]
  assert found.norms[0].examples == 30
  y = np.float64(np.stack([x, x + 1]))
  y -= y.mean(-1, keepdims=True)
  y /= np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  close(found.norms[0].high, y.max((0, 1, 2)))
  close(found.norms[0].low, y.min((0, 1, 2)))
  lines = str(found).splitlines()
  assert lines[0].split() == ['norm', 'kind', 'elements', 'epsilon', 'dead']
  assert lines[-1] == 'nothing seems wrong'


@pytest.mark.parametrize(
  ('fault', 'layer'),
  [
    ('axis', 'LayerNorm_0'),
    ('doubled', 'RMSNorm_0'),
    ('epsilon', 'LayerNorm_0'),
    ('one_element', 'GroupNorm_0'),
    ('dead', 'LayerNorm_0'),
  ],
)
def test_faults_of_norms_without_statistics(fault, layer):
  x = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float16)
  model = Stateless(fault)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  if fault == 'dead':
    params = variables['params']
    scale = params[layer]['scale'].at[:3].set(0)
    params = {**params, layer: {**params[layer], 'scale': scale}}
    variables = {'params': params}
  found = inspect(jax.jit(model.apply), variables, [x])
  assert [(f.layer, f.code) for f in found.advice] == [(layer, fault)]
  assert found.advice[0].level == (
    'error' if fault == 'one_element' else 'warning'
  )


def test_nnx_norms_without_statistics():
  class Rectified(nnx.LayerNorm):
    def __call__(self, x):
      return nnx.relu(super().__call__(x))

  rngs = nnx.Rngs(0)
  images = np.random.default_rng(0).normal(size=(2, 4, 8, 8))
  model = nnx.Sequential(
    nnx.GroupNorm(8, 2, rngs=rngs),
    nnx.BatchNorm(8, rngs=rngs),
    Rectified(8, rngs=rngs),
  )
  found = inspect(
    lambda model, x: nnx.jit(lambda model, x: model(x))(model, x),
    model,
    [np.float32(images)],
  )
  assert [n.name for n in found.norms] == ['layers/0', 'layers/2']
  assert [layer.name for layer in found.layers] == ['layers/1']
  assert ('layers/0', 'axis') in [(f.layer, f.code) for f in found.advice]
  assert 'channels were first' in str(found)
  assert type(model.layers[0]) is nnx.GroupNorm
  assert not hasattr(model.layers[0], '_normkit_path')
  with pytest.raises(ValueError, match='no layer with running'):
    inspect(lambda model, x: x, nnx.Linear(2, 2, rngs=rngs), [images])


# What is refused.


@pytest.mark.parametrize(
  ('change', 'error', 'match'),
  [
    ({'call': None}, TypeError, 'call must be a function'),
    ({'loss': 3}, TypeError, 'loss must be a function'),
    ({'batches': 3}, TypeError, 'batches must be an iterable'),
    ({'batches': []}, ValueError, 'batches is empty'),
    ({'batches': lambda: iter(())}, ValueError, 'batches is empty'),
    ({'variables': {'params': {}}}, ValueError, 'no layer with running'),
    ({'variables': 3}, TypeError, 'linen variables'),
    ({'learning_rate': 0.1}, ValueError, 'without loss'),
    ({'learning_rate': -1.0}, ValueError, 'above zero'),
    ({'learning_rate': '1'}, TypeError, 'Python number'),
    ({'steps': 0}, ValueError, 'whole number above zero'),
    ({'steps': 2.5}, ValueError, 'whole number above zero'),
    ({'framework': 'caffe'}, ValueError, "one of \\['equinox'"),
    ({'stacked': 1}, TypeError, 'True or False'),
    ({'stacked': True, 'loss': print}, ValueError, 'of one device'),
    ({'loss': lambda v, part: part[0]}, ValueError, 'one number'),
  ],
)
def test_refuses(healthy, data, change, error, match):
  net, variables = healthy
  good = {
    'call': training_call(net),
    'variables': variables,
    'batches': data[1][:1],
  }
  given = good | change
  with pytest.raises(error, match=match):
    inspect(**given)
