"""The example of looking into networks, run small."""

import re

import chex
from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='module')
def interpret(example):
  return example('interpret')


class Quadratic(nn.Module):
  """Logits of an image: its squares, less the mean image in training mode."""

  @nn.compact
  def __call__(self, x, *, train):
    x = x.reshape(len(x), -1) ** 2
    return x - x.mean(0, keepdims=True) if train else x


@pytest.mark.parametrize('train', [False, True])
def test_saliency_is_the_gradient_of_one_logit(interpret, train):
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(2, 3, 2, 2, 1)).astype(np.float32)
  labels = np.array([3, 0])
  found, gradients = interpret.saliency(Quadratic(), train, {}, batches, labels)
  flat = np.float64(batches.reshape(2, 3, 4))
  means = (flat**2).mean(1) if train else 0
  chex.assert_trees_all_close(found, flat[:, 0] ** 2 - means, rtol=1e-5)
  wanted = np.zeros_like(flat)
  for i, label in enumerate(labels):
    wanted[i, 0, label] = 2 * flat[i, 0, label]
    wanted[i, :, label] -= 2 * flat[i, :, label] / 3 * train
  chex.assert_trees_all_close(
    gradients.reshape(2, 3, 4), wanted, rtol=1e-5, atol=1e-6
  )


def test_the_tenth_of_highest_score_is_erased(interpret):
  images = np.arange(40, dtype=np.float32).reshape(2, 4, 5, 1)
  scores = np.stack([images[0], -images[1]])
  erased = interpret.erase(images, scores, np.full((4, 5, 1), -1.0))
  changed = [
    np.flatnonzero(a != b) for a, b in zip(erased, images, strict=True)
  ]
  assert [list(c) for c in changed] == [[18, 19], [0, 1]]
  assert (erased[erased != images] == -1).all()


def test_agreement_is_the_correlation(interpret):
  rng = np.random.default_rng(1)
  maps = [rng.normal(size=(4, 3, 3, 1)) for _ in range(3)]
  found = interpret.agreements(maps)
  wanted = [
    np.mean([100 * np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs])
    for pairs in (
      list(zip(maps[i], maps[j], strict=True))
      for i, j in ((0, 1), (0, 2), (1, 2))
    )
  ]
  chex.assert_trees_all_close(found, wanted, rtol=1e-10)


def test_variation_and_unevenness(interpret):
  maps = np.array([[3.0, 0.0], [3.0, 4.0]])  # mean (3, 2), 2 off each
  assert np.isclose(interpret.variation(maps), 2 / 13**0.5)
  x = np.random.default_rng(2).normal(size=(50, 4, 4, 3)) * [1, 2, 6]
  stds = x.reshape(-1, 3).std(0)
  assert np.isclose(interpret.unevenness(x), stds[2] / stds[1])


def test_roughness_is_that_of_neighbours(interpret):
  maps = np.array([[1.0, 3.0, 3.0], [-1.0, 3.0, 4.0]]).reshape(1, 2, 3, 1)
  down, right = (2 + 0 + 1) / 3, (2 + 0 + 4 + 1) / 4
  wanted = (down + right) / 2 / (15 / 6)
  assert np.isclose(interpret.roughness(maps), wanted)


def test_climbing_raises_each_logit_within_the_range(interpret):
  start = np.full((2, 5, 1), 0.5, np.float32)
  images = interpret.maximize(Quadratic(), False, {}, start, steps=12)
  chex.assert_shape(images, (10, 2, 5, 1))
  flat = images.reshape(10, 10)
  chex.assert_trees_all_close(np.diag(flat), np.ones(10), atol=1e-6)
  rest = flat[~np.eye(10, dtype=bool)]
  chex.assert_trees_all_close(rest, jnp.full(90, 0.5), atol=1e-6)


@pytest.mark.second_tier
def test_it_runs_small(interpret, run_small):
  told = run_small(
    interpret,
    'interpret_channels',
    'interpret_saliency',
    'interpret_others',
    'interpret_maximized',
  )
  numbers = re.findall(r'(-?\d+\.\d|nan) ± (\d+\.\d|nan)', told)
  assert len(numbers) > 30
  assert np.isfinite([float(n) for pair in numbers for n in pair]).all()
  modes = re.findall(r'(training|evaluation) mode +│ \d+ +│ +([\d.]+)', told)
  assert len(modes) == 2
  for mode, change in modes:
    assert (float(change) > 0) == (mode == 'training')


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  interpret, takes_images, digits_folder
):
  takes_images(interpret, digits_folder)
