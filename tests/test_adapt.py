"""Adaptation against float64 references, and on corrupted digits."""

import functools

import chex
from flax import linen as nn, nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits
from tiers import second_tier

import normkit.linen
import normkit.nnx
from normkit.tools.adapt import adapt_statistics, tent

close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    for width in (16, 32):
      x = nn.Conv(width, (3, 3), 2)(x)
      x = normkit.linen.BatchNorm(not train, momentum=0.9)(x)
      x = nn.relu(x)
    return nn.Dense(10)(x.reshape(len(x), -1))


NET = Net()


@jax.jit
def call(variables, x):
  return NET.apply(variables, x, train=True, mutable=['batch_stats'])


@jax.jit
def evaluate(variables, x):
  return NET.apply(variables, x, train=False)


@pytest.fixture(scope='module')
def digits():
  """A trained model, and images and labels that it was not trained on."""
  bunch = load_digits()
  images, labels = np.float32(bunch.images[..., None] / 16), bunch.target
  tx = optax.adam(0.01)

  @jax.jit
  def step(variables, opt, x, y):
    def loss(params):
      logits, updates = call({**variables, 'params': params}, x)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
      return losses.mean(), updates

    grads, updates = jax.grad(loss, has_aux=True)(variables['params'])
    moves, opt = tx.update(grads, opt)
    params = optax.apply_updates(variables['params'], moves)
    return {'params': params, **updates}, opt

  init = jax.jit(functools.partial(NET.init, train=False))
  variables = init(jax.random.key(0), images[:1])
  opt = jax.jit(tx.init)(variables['params'])
  rng = np.random.default_rng(0)
  for _ in range(120):
    chosen = rng.integers(0, 997, 32)
    variables, opt = step(variables, opt, images[chosen], labels[chosen])
  return variables, images[997:], labels[997:]


CORRUPTIONS = {
  'none': lambda x: x,
  'noise': lambda x: x + np.random.default_rng(0).normal(0, 0.3, x.shape),
  'blur': lambda x: ndimage.gaussian_filter(x, (0, 1, 1, 0)),
  'contrast': lambda x: 0.2 * x + 0.4,
  'brightness': lambda x: x + 1,
  'inversion': lambda x: 1 - x,
}


def corrupted(name, images):
  """Four batches of 200 images."""
  return np.float32(CORRUPTIONS[name](images)).reshape(4, 200, 8, 8, 1)


def accuracy(variables, parts, labels):
  logits = np.asarray(evaluate(variables, parts.reshape(-1, 8, 8, 1)))
  return float((logits.argmax(-1) == labels).mean())


@pytest.mark.parametrize(
  ('name', 'gain'),
  [
    second_tier('none', -0.02),
    second_tier('noise', -0.02),
    ('blur', 0.05),
    ('contrast', 0.1),
    second_tier('brightness', 0.15),
  ],
)
def test_corrupted_digits(digits, name, gain):
  variables, images, labels = digits
  before = jax.tree.map(np.array, variables)
  parts = corrupted(name, images)
  adapted = adapt_statistics(call, variables, parts)
  trained, with_statistics = (
    accuracy(v, parts, labels) for v in (variables, adapted)
  )
  assert with_statistics >= trained + gain
  chex.assert_trees_all_equal(adapted['params'], before['params'])
  chex.assert_trees_all_equal(variables, before)


def test_does_not_mend_inversion(digits):
  """Statistics cannot tell black on white from white on black."""
  variables, images, labels = digits
  parts = corrupted('inversion', images)
  adapted = tent(call, variables, parts, steps=2)
  assert accuracy(adapted, parts, labels) < 0.2


def test_tent_on_contrast(digits):
  """Tuning gains on statistics alone, and lowers the entropy."""
  variables, images, labels = digits
  before = jax.tree.map(np.array, variables)
  parts = corrupted('contrast', images)
  adapted = adapt_statistics(call, variables, parts)
  tuned = tent(call, variables, parts, steps=10)
  assert (
    accuracy(tuned, parts, labels) > accuracy(adapted, parts, labels) + 0.01
  )
  assert entropy(tuned, parts[0]) < entropy(adapted, parts[0])
  changed = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, same in jax.tree.leaves_with_path(
      jax.tree.map(np.array_equal, tuned['params'], variables['params'])
    )
    if not same
  }
  norms = 'BatchNorm_0', 'BatchNorm_1'
  assert changed == {f'{n}/{leaf}' for n in norms for leaf in ('scale', 'bias')}
  chex.assert_trees_all_equal(variables, before)


def entropy(variables, x):
  logits = np.float64(evaluate(variables, x))
  shares = np.exp(logits - logits.max(-1, keepdims=True))
  shares /= shares.sum(-1, keepdims=True)
  return -(shares * np.log(shares)).sum(-1).mean()


# Numbers.


class Nnx(nnx.Module):
  def __init__(self):
    self.norm = normkit.nnx.BatchNorm(3, rngs=nnx.Rngs(0))

  def __call__(self, x):
    return self.norm(x)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return normkit.linen.BatchNorm(False, name='norm')(x)


def models():
  """The same norm in linen and nnx, a call of each, and how to read it."""
  linen, model = Linen(), Nnx()
  stats = {
    'mean': jnp.array([1.0, 2.0, 3.0]),
    'var': jnp.array([2.0, 1.0, 4.0]),
  }
  affine = {'scale': jnp.ones(3), 'bias': jnp.zeros(3)}
  variables = {'params': {'norm': affine}, 'batch_stats': {'norm': stats}}
  for name, value in stats.items():
    getattr(model.norm, name)[...] = value
  names = 'scale', 'bias', 'mean', 'var'

  def read_linen(variables):
    leaves = variables['params']['norm'] | variables['batch_stats']['norm']
    return [leaves[name] for name in names]

  def read_nnx(model):
    return [getattr(model.norm, name)[...] for name in names]

  def linen_call(variables, x):
    return linen.apply(variables, x, mutable=['batch_stats'])

  return {
    'linen': (jax.jit(linen_call), variables, read_linen),
    'nnx': (nnx.jit(lambda model, x: model(x)), model, read_nnx),
  }


def parts_of(*sizes):
  rng = np.random.default_rng(1)
  return [np.float32(rng.normal([0, 1, -1], 2, (n, 3))) for n in sizes]


@pytest.mark.parametrize('kind', ['linen', 'nnx'])
@pytest.mark.parametrize('source', [second_tier(0), 0.25, second_tier(1)])
def test_mixture(kind, source):
  run, model, read = models()[kind]
  parts = parts_of(5, 8)
  x = np.float64(np.concatenate(parts))
  adapted = read(adapt_statistics(run, model, parts, source=source))
  wanted = [
    source * np.array(old) + (1 - source) * new
    for old, new in (([1, 2, 3], x.mean(0)), ([2, 1, 4], x.var(0)))
  ]
  close(adapted, [np.ones(3), np.zeros(3), *wanted])
  close(read(model)[2:], [np.array([1.0, 2, 3]), np.array([2.0, 1, 4])])


@pytest.mark.parametrize('kind', ['linen', second_tier('nnx')])
def test_tent_steps(kind):
  """Gradient descent by differences of the float64 entropy."""
  run, model, read = models()[kind]
  parts = parts_of(6, 9)
  tuned = tent(run, model, parts, optimizer=optax.sgd(0.5), steps=2)

  def uncertainty(affine, x):
    normalized = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    logits = normalized * affine[0] + affine[1]
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -(shares * np.log(shares)).sum(-1).mean()

  affine = np.stack([np.ones(3), np.zeros(3)])
  for x in np.repeat(np.array([np.float64(p) for p in parts], object), 2):
    slopes = np.zeros_like(affine)
    for index in np.ndindex(affine.shape):
      move = np.zeros_like(affine)
      move[index] = 1e-5
      ends = [uncertainty(affine + m, x) for m in (move, -move)]
      slopes[index] = (ends[0] - ends[1]) / 2e-5
    affine -= 0.5 * slopes
  x = np.float64(np.concatenate(parts))
  close(read(tuned), [*affine, x.mean(0), x.var(0)])
  close(read(model)[:2], [np.ones(3), np.zeros(3)])


def test_tent_on_masked_logits():
  """A class of logit -inf has no share, as if it were not there."""
  run, model, read = models()['linen']
  parts = parts_of(6)

  def masked(variables, x):
    logits, updates = run(variables, x)
    return jnp.where(jnp.array([True, True, False]), logits, -jnp.inf), updates

  def two(variables, x):
    logits, updates = run(variables, x)
    return logits[:, :2], updates

  options = {'optimizer': optax.sgd(0.5), 'steps': 2}
  found, wanted = (
    read(tent(call, model, parts, **options)) for call in (masked, two)
  )
  close(found, wanted)
  assert abs(found[0][:2] - 1).max() > 1e-3


# What is refused.


@pytest.mark.parametrize(
  ('function', 'change', 'error', 'match'),
  [
    (adapt_statistics, {'source': 1.5}, ValueError, 'from 0 to 1'),
    (adapt_statistics, {'source': '1'}, TypeError, 'Python number'),
    (adapt_statistics, {'batches': []}, ValueError, 'batches is empty'),
    (adapt_statistics, {'call': None}, TypeError, 'call must be'),
    (tent, {'call': None}, TypeError, 'call must be'),
    (tent, {'call': lambda v, x: x}, TypeError, r'return \(outputs, updates'),
    (tent, {'batches': 3}, TypeError, 'must be an iterable'),
    (tent, {'batches': iter([])}, ValueError, 'read once'),
    (tent, {'batches': []}, ValueError, 'batches is empty'),
    (tent, {'steps': 0}, ValueError, 'above zero'),
    (tent, {'optimizer': 0.1}, TypeError, 'optax.adam'),
    (tent, {'optimizer': optax.sgd(np.inf)}, ValueError, 'not finite'),
  ],
)
def test_refuses(function, change, error, match):
  run, model, read = models()['linen']
  given = {'call': run, 'variables': model, 'batches': parts_of(4)} | change
  with pytest.raises(error, match=match):
    function(**given)
  close(read(model)[:2], [np.ones(3), np.zeros(3)])


def test_refuses_norms_without_scale_and_bias():
  norm = nn.BatchNorm(False, use_scale=False, use_bias=False)
  variables = jax.jit(norm.init)(jax.random.key(0), np.ones((2, 3)))
  with pytest.raises(ValueError, match='a scale or a bias to tune'):
    tent(lambda v, x: norm.apply(v, x), variables, parts_of(4))


def test_refuses_outputs_that_are_no_logits():
  _, model, _ = models()['nnx']
  with pytest.raises(TypeError, match='last axis is the classes'):
    tent(lambda model, x: model(x).sum(), model, parts_of(4))
