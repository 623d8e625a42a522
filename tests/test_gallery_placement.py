"""The gallery's example of placement: its numbers and its figures."""

import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


@pytest.fixture(scope='module')
def placement(example):
  return example('placement')


@pytest.mark.second_tier
def test_runs_small(placement, run_small):
  printed = run_small(
    placement,
    'placement_activation',
    'placement_clipping',
    'placement_conventions',
  )
  pairs = re.findall(r'([\d.]+) ± ([\d.]+)', printed)
  assert len(pairs) == 3 * 3 + 3 * 4 + 1
  assert all(np.isfinite(float(n)) for pair in pairs for n in pair)
  assert 'deviations off with momentum 0.9' in printed


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  placement, takes_images, digits_folder
):
  takes_images(placement, digits_folder)


def test_conventions_by_hand(placement):
  """Running means are sums of the batches' with weights that fall."""
  found = placement.conventions(placement.data.digits(), 12)
  images = placement.data.digits().train_images.reshape(-1, 64)
  order = placement.training.batches(len(images), 60, seed=0)
  pixel = images[:, images.var(0).argmax()].astype(np.float64)
  batch = np.array([pixel[next(order)].mean() for _ in range(12)])
  for momentum in (0.9, 0.1):
    weights = (1 - momentum) * momentum ** np.arange(12)[::-1]
    np.testing.assert_allclose(
      found.means[momentum][-1], weights @ batch, rtol=1e-5
    )
  # Over the second half of the steps, in deviations of each pixel.
  varies = images[:, images.var(0) > 1e-6].astype(np.float64)
  mean, std = varies.mean(0), varies.std(0)
  order = placement.training.batches(len(images), 60, seed=0)
  running, off = np.zeros(len(mean)), []
  for number in range(12):
    running = 0.1 * running + 0.9 * varies[next(order)].mean(0)
    if number >= 6:
      off.append((running - mean) / std)
  wanted = np.sqrt(np.mean(np.square(off)))
  np.testing.assert_allclose(found.errors[0.1], wanted, rtol=1e-4)
  assert np.all(np.diff(found.factors[np.argsort(found.var)]) >= 0)
  least = found.factors.argmin()
  assert least == found.var.argmin()
  wanted = ((std[least] ** 2 + 1e-5) / (std[least] ** 2 + 1e-3)) ** 0.5
  np.testing.assert_allclose(found.factors[least], wanted, rtol=1e-4)


def test_the_norm_is_where_it_is_said_to_be(placement):
  """By the order of the layers that a network calls."""
  x = np.ones((4, 8, 8, 1), np.float32)
  for place, kinds in {
    'none': [],
    'before': ['norm', 'activation'],
    'after': ['activation', 'norm'],
  }.items():
    called = []

    def activation(y, called=called):
      called.append('activation')
      return y

    net = placement.placed_net(place, activation, 2)
    key = jax.random.key(0)

    def watch(next_fun, args, kwargs, context, called=called):
      if (context.module.name or '').startswith('norm'):
        called.append('norm')
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
      net.init(key, x, train=False)
    assert called == 2 * (kinds or ['activation'])


@pytest.mark.second_tier
def test_clipping_bounds_the_step(example):
  """By hand: gradients of norm 5, of which 1 is left."""
  params = {'w': jnp.array([1.0, 1.0])}
  grads = {'w': jnp.array([3.0, 4.0])}
  sweep = example('sweep')
  optimizer = sweep.clipped(optax.clip_by_global_norm(1.0))
  state = optimizer.init(params)
  rate = {'learning_rate': jnp.float32(0.5)}
  state = state._replace(hyperparams=state.hyperparams | rate)
  updates, _ = optimizer.update(grads, state, params)
  np.testing.assert_allclose(updates['w'], [-0.3, -0.4], rtol=1e-6)
