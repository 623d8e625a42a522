"""Nothing frozen moves, all else does, and frozen layers evaluate."""

import functools

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from tiers import second_tier

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools.freeze import (
  assert_frozen,
  freeze,
  frozen,
  frozen_mask,
  unfreeze,
)

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
equal = chex.assert_trees_all_equal


class Backbone(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.relu(nn.BatchNorm(not train, name='bn')(nn.Dense(8)(x)))
    return normkit.linen.BatchNorm(name='told')(x, not train)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = Backbone(name='backbone')(x, train)
    x = normkit.linen.Norm(nk.BatchNorm(), name='norm')(x, train=train)
    x = normkit.linen.BatchNorm(not train, name='bn')(x)
    return nn.Dense(10, name='head')(x)


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.dense = nnx.Linear(64, 8, rngs=rngs)
    x = jax.ShapeDtypeStruct((1, 8), jnp.float32)
    self.norms = nnx.List(
      [
        nnx.BatchNorm(8, rngs=rngs),
        normkit.nnx.BatchNorm(8, rngs=rngs),
        normkit.nnx.Norm(nk.BatchNorm(), x),
      ]
    )
    self.head = nnx.Linear(8, 10, rngs=rngs)

  def __call__(self, x):
    x = self.dense(x)
    for norm in self.norms:
      x = nnx.relu(norm(x))
    return self.head(x)


@pytest.fixture(scope='module')
def data():
  bunch = load_digits()
  return np.float32(bunch.data[:256] / 4), bunch.target[:256]


@pytest.fixture(scope='module')
def trained(data):
  """A network after a few steps, so that its statistics are not the first."""
  variables = jax.jit(Net().init, static_argnums=2)(
    jax.random.key(0), data[0], False
  )
  return fit(variables, data, optax.sgd(0.1))[0]


@pytest.fixture(scope='module')
def trained_nnx(data):
  model = nnx.jit(lambda: NnxNet(nnx.Rngs(0)))()
  return fit_nnx(model, data, optax.sgd(0.1))


def cross_entropy(logits, labels):
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


@functools.cache
def gradients(match):
  """A program for all optimizers: gradients and new statistics."""

  def loss(params, stats, x, y):
    variables = {'params': params, 'batch_stats': stats}
    logits, updates = Net().apply(variables, x, True, mutable=['batch_stats'])
    return cross_entropy(logits, y), updates

  chosen = loss if match is None else frozen(match)(loss)
  return jax.jit(jax.grad(chosen, has_aux=True))


def fit(variables, data, tx, match=None, steps=5):
  """Trains; returns the variables, and the first gradients."""

  @jax.jit
  def move(params, opt, grads):
    moves, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, moves), opt, moves

  opt, first = jax.jit(tx.init)(variables['params']), None
  for _ in range(steps):
    params = variables['params']
    grads, updates = gradients(match)(params, variables['batch_stats'], *data)
    params, opt, moves = move(params, opt, grads)
    variables = {'params': params, **updates}
    first = first or (grads, moves)
  return variables, *first


def fit_nnx(model, data, tx):
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer, x, y):
    grads = nnx.grad(lambda model: cross_entropy(model(x), y))(model)
    optimizer.update(model, grads)

  for _ in range(5):
    step(model, optimizer, *data)
  return model


def leaves(tree):
  flat = jax.tree.leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def moved(before, after):
  before, after = leaves(before), leaves(after)
  return {n for n in before if not np.array_equal(before[n], after[n])}


@pytest.mark.parametrize('params', [True, second_tier(False)])
def test_statistics_and_parameters(trained, data, params):
  """All layers frozen, with weight decay, which would move what has no grad."""
  tx = optax.adamw(0.01, weight_decay=0.1)
  if params:
    tx = optax.selective_transform(tx, freeze_mask=frozen_mask(trained))
  after, grads, moves = fit(trained, data, tx, '*')
  equal(after['batch_stats'], trained['batch_stats'])
  assert_frozen(trained, after, params=params)
  wanted = {
    n
    for n in leaves(trained['params'])
    if not params or 'Dense' in n or 'head' in n
  }
  assert moved(trained['params'], after['params']) == wanted
  assert np.any(grads['bn']['scale'])
  assert np.any(moves['bn']['scale']) != params
  if not params:
    with pytest.raises(AssertionError):
      assert_frozen(trained, after)


def test_zero_gradients_do_not_stop_weight_decay(trained, data):
  """Why the mask is for the whole optimizer."""
  mask = frozen_mask(trained)
  zeros = optax.masked(optax.set_to_zero(), mask)
  tx = optax.chain(zeros, optax.adamw(0.01, weight_decay=0.1))
  after, *_ = fit(trained, data, tx, '*')
  with pytest.raises(AssertionError, match="'backbone/bn/bias'"):
    assert_frozen(trained, after)


@pytest.mark.parametrize(
  ('match', 'wanted'),
  [
    ('backbone/*', {'backbone/bn', 'backbone/told'}),
    ('*bn', {'backbone/bn', 'bn'}),
    second_tier(('bn', 'norm'), {'bn', 'norm'}),
    second_tier(lambda path: path.startswith('n'), {'norm'}),
  ],
)
def test_part_of_a_model(trained, data, match, wanted):
  mask = frozen_mask(trained, match)
  tx = optax.selective_transform(optax.sgd(0.1), freeze_mask=mask)
  after, *_ = fit(trained, data, tx, match)
  assert_frozen(trained, after, match)
  layers = {'backbone/bn', 'backbone/told', 'bn', 'norm'}
  for path in layers:
    names = ''.join(f"['{n}']" for n in path.split('/'))
    of_layer = [
      n
      for tree in ('params', 'batch_stats')
      for n in moved(trained[tree], after[tree])
      if n.startswith(names)
    ]
    assert bool(of_layer) == (path not in wanted)


def test_frozen_layers_evaluate(trained, data):
  x = data[0]
  train = jax.jit(lambda v: Net().apply(v, x, True, mutable=['batch_stats']))
  with frozen():
    y, updates = train(trained)
  close(y, jax.jit(lambda v: Net().apply(v, x, False))(trained))
  equal(updates['batch_stats'], trained['batch_stats'])
  again = train(trained)[0]
  assert not np.allclose(y, again)


def test_against_numpy():
  """One frozen layer below one that is not."""

  class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.BatchNorm(False, momentum=0.5, name='one')(x)
      return nn.BatchNorm(False, momentum=0.5, name='two')(x)

  x = np.random.default_rng(0).normal(1, 2, (16, 3)).astype(np.float32)
  variables = jax.jit(Two().init)(jax.random.key(0), x)
  variables['batch_stats']['one']['mean'] = np.full(3, 2, np.float32)
  apply = jax.jit(functools.partial(Two().apply, mutable=['batch_stats']))
  with frozen('one'):
    y, updates = apply(variables, x)
  middle = (np.float64(x) - 2) / np.sqrt(1 + 1e-5)
  mean, var = middle.mean(0), middle.var(0)
  close(y, (middle - mean) / np.sqrt(var + 1e-5))
  wanted = {'mean': 0.5 * mean, 'var': 0.5 + 0.5 * var}
  close(updates['batch_stats']['two'], wanted)


@pytest.mark.parametrize('lift', ['scan', *map(second_tier, ('remat', 'jit'))])
def test_lifted(lift, data):
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
      return nn.relu(nn.BatchNorm(False, name='bn')(nn.Dense(4)(x))), None

  if lift == 'scan':
    block = nn.scan(
      Block,
      variable_axes={'params': 0, 'batch_stats': 0},
      split_rngs={'params': True},
      length=2,
    )(name='blocks')
  else:
    block = getattr(nn, lift)(Block)(name='blocks')

  class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return block.copy(parent=self, name='blocks')(x, None)[0]

  x = data[0][:, 20:24]
  net = Outer()
  variables = jax.jit(net.init)(jax.random.key(0), x)

  @jax.jit
  def step(variables):
    with frozen('blocks/bn'):
      return net.apply(variables, x, mutable=['batch_stats'])[1]

  equal(step(variables)['batch_stats'], variables['batch_stats'])


@pytest.mark.second_tier
def test_subclass_and_mask(data):
  class Doubled(nn.BatchNorm):
    def __call__(self, x, mask):
      return super().__call__(2 * x, mask=mask)

  x = data[0][:, 20:24]
  mask = x > 1
  norm = Doubled(False)
  variables = norm.init(jax.random.key(0), x, mask)
  with frozen():
    y, updates = norm.apply(variables, x, mask, mutable=['batch_stats'])
  close(y, 2 * np.float64(x) / np.sqrt(1 + 1e-5))
  equal(updates['batch_stats'], variables['batch_stats'])


@pytest.mark.parametrize('package', [nnx, normkit.nnx])
def test_nnx_subclass(package):
  """All that it does is kept, and it learns nothing more."""

  class Rectified(package.BatchNorm):
    def __call__(self, x):
      return nnx.relu(super().__call__(2 * x))

  norm = Rectified(2, rngs=nnx.Rngs(0))
  norm.mean[...] = jnp.array([1.0, -1.0])
  held = freeze(norm)
  x = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
  y = nnx.jit(lambda norm, x: norm(x))(held, x)
  close(y, np.maximum((2 * x - [1, -1]) / np.sqrt(1 + 1e-5), 0))
  equal(nnx.state(held), nnx.state(norm))
  assert isinstance(freeze(held), Rectified)
  assert type(unfreeze(held)) is Rectified


def test_a_norm_with_maths_of_its_own_is_refused():
  class Own(nnx.BatchNorm):
    def __call__(self, x):
      return x - self.mean[...]

  model = nnx.Sequential(
    Own(2, rngs=nnx.Rngs(0)), nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  )
  with pytest.raises(ValueError, match="'layers/0' cannot be frozen: Own"):
    freeze(model)
  freeze(model, 'layers/1')

  class LinenOwn(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
      return x + self.variable('batch_stats', 'mean', jnp.zeros, (1, 2)).value

  linen = nn.Sequential([LinenOwn(), nn.BatchNorm(False)])
  x = jnp.ones((2, 2))
  with (
    pytest.raises(ValueError, match="'layers_0' cannot be frozen: LinenOwn"),
    frozen(),
  ):
    jax.eval_shape(linen.init, jax.random.key(0), x)
  with frozen('layers_1'):
    jax.eval_shape(linen.init, jax.random.key(0), x)


@pytest.mark.parametrize('params', [True, second_tier(False)])
def test_nnx(trained_nnx, data, params):
  before = nnx.clone(trained_nnx)
  model = freeze(trained_nnx)
  tx = optax.adamw(0.01, weight_decay=0.1)
  if params:
    tx = optax.selective_transform(tx, freeze_mask=frozen_mask(model))
  model.train()
  fit_nnx(model, data, tx)
  assert_frozen(before, model, params=params)
  changed = moved(nnx.state(before), nnx.state(model))
  wanted = {
    n
    for n in leaves(nnx.state(before, nnx.Param))
    if 'norms' not in n or not params
  }
  assert changed == wanted
  equal(nnx.state(trained_nnx), nnx.state(before))


def test_part_of_an_nnx_model(trained_nnx, data):
  model = freeze(trained_nnx, 'norms/1')
  mask = frozen_mask(model, 'norms/1')
  tx = optax.selective_transform(optax.sgd(0.1), freeze_mask=mask)
  fit_nnx(model, data, tx)
  assert_frozen(trained_nnx, model, 'norms/1')
  for other in (0, 2):
    with pytest.raises(AssertionError):
      assert_frozen(trained_nnx, model, f'norms/{other}', params=False)


def test_frozen_nnx_layers_evaluate(trained_nnx, data):
  model = freeze(trained_nnx)
  before = jax.tree.map(np.array, nnx.state(model))
  evaluated = nnx.clone(trained_nnx)
  evaluated.eval()
  wanted = evaluated(data[0])
  model.train()
  equal(model(data[0]), wanted)
  equal(nnx.view(model, use_running_average=False)(data[0]), wanted)
  norm = model.norms[1]
  equal(norm(data[0][:, :8], False), norm(data[0][:, :8], True))
  equal(nnx.state(model), before)
  assert isinstance(norm, normkit.nnx.BatchNorm)


def test_unfreeze(trained_nnx, data):
  model = unfreeze(freeze(freeze(trained_nnx), 'norms/0'))
  assert nnx.graphdef(model) == nnx.graphdef(trained_nnx)
  model(data[0])
  for n in range(3):
    with pytest.raises(AssertionError):
      assert_frozen(trained_nnx, model, f'norms/{n}', params=False)


def test_refuses(trained, trained_nnx, data):
  x = data[0]

  def run():
    Net().apply(trained, x, False)

  for match in (3, [], [1], None):
    with pytest.raises(TypeError, match='match must be a pattern'):
      frozen_mask(trained, match)
    with pytest.raises(TypeError, match='match must be a pattern'):
      freeze(trained_nnx, match)
    with pytest.raises(TypeError, match='match must be a pattern'):
      frozen(match)(run)()
  for match in ('none/*', ['*', 'none'], lambda path: False):
    with pytest.raises(ValueError, match='backbone/bn'):
      frozen_mask(trained, match)
    with pytest.raises(ValueError, match='norms/0'):
      freeze(trained_nnx, match)
    with pytest.raises(ValueError, match='Those ran inside'):
      frozen(match)(run)()
  with pytest.raises(TypeError, match=r'must be an nnx\.Module, got dict'):
    freeze(trained)
  with pytest.raises(TypeError, match=r'must be an nnx\.Module, got dict'):
    unfreeze(trained)
  with pytest.raises(ValueError, match='no layer with running statistics'):
    frozen_mask({'params': trained['params']})


@pytest.mark.second_tier
def test_programs_compiled_before(trained, data):
  """Each is frozen inside and not outside, whatever ran first."""

  @jax.jit
  def step(x):
    _, updates = Net().apply(trained, x, True, mutable=['batch_stats'])
    return updates['batch_stats']

  def frozen_layers(match):
    with frozen(match):
      after = step(data[0])
    before = trained['batch_stats']
    return {n for n in ('bn', 'norm') if not moved(before[n], after[n])}

  for _ in range(2):  # the second time all are compiled
    assert moved(trained['batch_stats'], step(data[0]))
    assert frozen_layers('*') == {'bn', 'norm'}
    assert frozen_layers('bn') == {'bn'}
    assert frozen_layers(['norm']) == {'norm'}
  with frozen('bn'), frozen('norm'):
    assert not moved(trained['batch_stats']['bn'], step(data[0])['bn'])
  with frozen('*'):  # an eager call beside one that was compiled
    Net().apply(trained, data[0], True, mutable=['batch_stats'])
    equal(step(data[0]), trained['batch_stats'])


def test_jit_inside_a_model_that_ran_before(data):
  norm = nn.jit(nn.BatchNorm)(False)
  x = data[0][:, 20:24]
  variables = norm.init(jax.random.key(0), x)

  def run():
    return norm.apply(variables, x, mutable=['batch_stats'])[1]['batch_stats']

  assert moved(variables['batch_stats'], run())
  with frozen():
    equal(run(), variables['batch_stats'])
  assert moved(variables['batch_stats'], run())


def test_errors_inside_come_out(trained):
  with pytest.raises(ZeroDivisionError), frozen('none'):
    raise ZeroDivisionError
