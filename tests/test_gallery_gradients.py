"""The gallery's example of gradients: its numbers and its figures."""

import functools
import math
import re

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit.linen

SEED = 5


@pytest.fixture(scope='module')
def gradients(example):
  return example('gradients')


@pytest.mark.second_tier
def test_small_run_writes_figures_and_finite_numbers(gradients, run_small):
  printed = run_small(
    gradients,
    'gradients_start',
    'gradients_channels',
    'gradients_sigmoid',
    'gradients_noise',
    'gradients_landscape',
  )
  pairs = re.findall(r'([\d.e+-]+) ± ([\d.e+-]+)', printed)
  in_tables = 2 * (6 + 2 + 4) + 3 * 2
  in_claims = 2 * (6 + 1 + 4) + 2
  assert len(pairs) == in_tables + in_claims
  assert all(math.isfinite(float(x)) for pair in pairs for x in pair)


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  gradients, takes_images, digits_folder
):
  takes_images(gradients, digits_folder)


def test_gradients_are_in_the_order_of_the_network(gradients):
  names = ['stage2_block1', 'stage1_block10', 'stage1_block2']
  assert sorted(names, key=gradients.order) == names[::-1]
  assert gradients.is_block('stage1_block2')
  assert not gradients.is_block('dense') and not gradients.is_block(None)


@pytest.mark.second_tier
def test_gradient_of_the_logits_is_the_softmax_less_the_label(gradients):
  dataset = gradients.halved(gradients.data.photographs())
  chex.assert_shape(dataset.test_images, (900, 16, 16, 3))
  original = gradients.data.photographs().test_images[0]
  np.testing.assert_allclose(
    dataset.test_images[0, 0, 1], original[:2, 2:4].mean((0, 1)), rtol=1e-5
  )
  model = gradients.SmallResNet(None, widths=(16, 32))
  start = gradients.at_start(model, dataset, SEED)
  n = gradients.BATCH_SIZE
  chex.assert_shape(start.logits, (n, 10))
  np.testing.assert_allclose(start.logits.sum(-1), 0, atol=1e-6)
  # One class of each image is pulled up: the gradient there is negative.
  np.testing.assert_array_equal((start.logits < 0).sum(-1), 1)
  assert len(start.means) == 2 and len(start.grads) == 4
  for grads, channels in zip(start.grads, start.channels, strict=True):
    assert channels.size * 9 == grads.size
    np.testing.assert_allclose(channels.mean(), grads.mean(), rtol=1e-5)


def test_tail_and_share(gradients):
  values = np.arange(1001.0)
  assert np.isclose(gradients.tail(values), 999 / 500)
  logits = np.array([[1, 0], [2, 1], [0, 3], [9, 1]])
  assert gradients.share(logits) == 75
  # Output channels of means 1, 2 and 6.
  assert gradients.unevenness(np.array([[0, 1, 7], [2, 3, 5]])) == 2


def test_drift_and_jumps(gradients):
  """One seed, three looks, two units; the spread of each is two."""
  middle = np.array([[[1.0, 2.0], [5.0, 3.0], [3.0, 2.0]]])
  quantiles = np.stack([middle - 1, middle, middle + 1])
  np.testing.assert_allclose(gradients.drift(quantiles), [[2, 0.5]])
  np.testing.assert_allclose(
    gradients.jumps(quantiles), [((4 + 2) / 2 / 2 + (1 + 1) / 2 / 2) / 2]
  )


@pytest.mark.parametrize(
  'none, batch, words',
  [
    ([10, 11], [1, 2], 'holds'),
    ([1, 2], [10, 11], 'does not hold'),
    ([1, 3], [2, 3], 'not clear'),
  ],
)
def test_verdict_minds_the_spread(gradients, none, batch, words):
  assert gradients.verdict(np.array(none), np.array(batch)) == words


@pytest.mark.parametrize('kind', ['dense', 'norm'])
def test_watch_gives_what_goes_into_an_activation(gradients, kind):
  norm = None if kind == 'dense' else gradients.TORCH
  model = gradients.DeepNet((norm,) * 2, 4)
  x = np.float32(np.random.default_rng(SEED).normal(size=(6, 8, 8, 1)))
  state = gradients.start(model, x[:1], [gradients.Setting(0.1)], 2)
  found = gradients.watch(model, 1, state.variables, x)
  chex.assert_shape(found, (1, 2, 6, 4))
  dense = jax.tree.map(lambda a: a[0, 1], state.params['dense1'])
  y = np.float64(x.reshape(6, -1)) @ np.float64(dense['kernel'])
  if norm is not None:
    y = (y - y.mean(0)) / np.sqrt(y.var(0) + norm.epsilon)
  np.testing.assert_allclose(found[0, 1], y, rtol=1e-3, atol=1e-4)


@pytest.mark.second_tier
def test_noise_moves_each_unit_anew_at_each_step(gradients):
  norm = normkit.linen.Norm(gradients.NoisyBatchNorm(layer=2))
  x = np.float32(np.random.default_rng(SEED).normal(size=(2000, 3)))
  init = functools.partial(norm.init_with_output, train=False)
  clean, variables = jax.jit(init)(jax.random.key(0), x)
  np.testing.assert_allclose(clean, x, rtol=1e-4)

  def trained(norm):
    options = {'train': True, 'mutable': ['batch_stats']}
    return jax.jit(functools.partial(norm.apply, **options))

  means, run = [], trained(norm)
  for _ in range(2):
    y, new = run(variables, x)
    again, _ = run(variables, x)
    np.testing.assert_array_equal(y, again)
    variables = {**variables, **new}
    means.append(np.mean(y, 0))
    assert (np.abs(means[-1]) < 0.51).all()
    assert (np.std(y, 0) > 0.99).all() and (np.std(y, 0) < 1.3).all()
  assert (np.abs(means[0] - means[1]) > 1e-3).all()

  quiet = normkit.linen.Norm(gradients.NoisyBatchNorm(2, level=0.0))
  y, _ = trained(quiet)(variables, x)
  expected = (x - x.mean(0)) / x.std(0)
  np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)


class Quadratic(nn.Module):
  """Logits (a, 0), where a is the one parameter."""

  @nn.compact
  def __call__(self, x, *, train):
    a = self.param('a', lambda _: jnp.array(1.0))
    return jnp.stack([jnp.full(len(x), a), jnp.zeros(len(x))], -1)


@pytest.mark.second_tier
def test_along_gradient_is_that_of_a_loss_known_by_hand(gradients):
  """The loss of the second class is log(1 + exp(a)), its slope a sigmoid."""
  rate, n = 0.5, 3
  model = Quadratic()
  state = gradients.training.State(
    {'a': jnp.ones((1, 1))}, {}, optimizer=jnp.zeros((1, 1))
  )
  line = gradients.along_gradient(
    model, rate, state, np.zeros((1, n, 2)), np.ones((1, n), np.int32)
  )

  def slope(a):
    return 1 / (1 + np.exp(-a))

  a = 1 - gradients.FACTORS * rate * slope(1)
  change = np.abs(slope(a) - slope(1))
  expected = gradients.Line(
    np.log1p(np.exp(a)),
    change,
    change / slope(1),
    change / (1 - a),
  )
  for found, values in zip(line, expected, strict=True):
    np.testing.assert_allclose(found[0], values, rtol=2e-4)
