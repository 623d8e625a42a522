"""The gallery's example of speed: its numbers and its figures."""

import functools
import math
import re

import chex
import jax
import numpy as np
import pytest


@pytest.fixture(scope='module')
def faster(example):
  return example('faster')


@pytest.fixture(scope='module')
def sweep(example):
  return example('sweep')


def runs_of(sweep, accuracies):
  accuracies = np.array(accuracies, float)
  return sweep.Runs(
    np.zeros((*accuracies.shape[:2], 20)), np.array([5, 10, 15]), accuracies
  )


@pytest.mark.second_tier
def test_small_run_writes_figures_and_finite_numbers(faster, run_small):
  names = 'curves', 'inception', 'rates', 'scales'
  printed = run_small(faster, *(f'faster_{name}' for name in names))
  pairs = re.findall(r'(\S+) ± (\S+)', printed)
  assert len(pairs) == 3 * 2 + 3 * 2 + 5 + 5
  assert all(
    0 <= float(mean) <= 100 and math.isfinite(float(std)) for mean, std in pairs
  )
  assert len(re.findall('the paper: ', printed)) == 8


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  faster, takes_images, digits_folder
):
  takes_images(faster, digits_folder)


@pytest.mark.second_tier
def test_runs_differ_by_seed_rate_and_scale_alone(faster, sweep):
  """The steps of one run, done one by one with training.step's rule."""
  model = faster.DeepNet((None,) * 2, 8)
  dataset = faster.data.digits()
  images = dataset.train_images[:1]
  settings = [sweep.Setting(0.1, 1.0), sweep.Setting(0.2, 3.0)]
  state = sweep.start(model, images, settings, seeds=2)
  chex.assert_tree_shape_prefix(state.params, (2, 2))
  kernel = np.array(state.params['dense1']['kernel'])
  np.testing.assert_allclose(kernel[1], 3 * kernel[0], rtol=1e-6)
  assert not np.allclose(kernel[0, 0], kernel[0, 1])
  # A gradient step from zero momentum is the rate times the gradient.
  batch = next(sweep.batches(dataset, 2))
  new, losses = sweep.step(model, state, *batch)
  chex.assert_shape(losses, (2, 2))
  apply = jax.jit(functools.partial(model.apply, train=True))
  for row, setting in enumerate(settings):
    params = jax.tree.map(
      lambda x, row=row: np.asarray(x)[row, 1], state.params
    )
    bias = np.float64(params['logits']['bias'])
    logits = np.float64(apply({'params': params}, batch[0][1]))
    exps = np.exp(logits)
    p = exps / exps.sum(-1, keepdims=True)
    grad = (p - np.eye(10)[batch[1][1]]).mean(0)
    np.testing.assert_allclose(
      new.params['logits']['bias'][row, 1],
      bias - setting.rate * grad,
      rtol=1e-4,
      atol=1e-6,
    )


def test_failed_is_no_better_than_guessing(sweep):
  losses = np.ones((4, 20))
  losses[1, -2:] = math.log(10) + 0.01
  losses[2, -1] = np.nan
  losses[3, :-2] = 100  # it learned in the end
  np.testing.assert_array_equal(
    sweep.failed(losses), [False, True, True, False]
  )


def test_steps_to_are_those_of_the_first_test_that_is_there(sweep):
  runs = runs_of(sweep, [[[10, 90, 80], [90, 10, 10], [1, 2, 3]]])
  np.testing.assert_array_equal(sweep.steps_to(runs, 90), [[10, 5, np.inf]])


def test_the_best_setting_has_the_highest_last_mean(sweep):
  runs = runs_of(
    sweep, [[[99, 99, 50], [99, 99, 60]], [[0, 0, 56], [0, 0, 58]]]
  )
  assert sweep.best([0.1, 0.2], runs) == 0.2
  assert sweep.near(runs) == 2
  assert sweep.row_of(runs, 1).accuracies.tolist() == [[[0, 0, 56], [0, 0, 58]]]


@pytest.mark.parametrize(
  'steps, words',
  [
    ([10, 90, 90], 'is there in 1.0 times fewer steps'),
    ([90, 90, 90], 'is there in 2.0 times fewer steps'),
    ([10, 10, 90], 'is there in 1.5 times more steps'),
    ([10, 10, 10], 'is there never, the plain network after 10 steps, and'),
  ],
)
def test_compare_says_fewer_more_or_never(faster, sweep, steps, words):
  plain = runs_of(sweep, [[[10, 90, 90]]])
  text = faster.compare(plain, runs_of(sweep, [[steps]]), 90)
  assert text.startswith(words)


def test_weights_alone_are_scaled(sweep):
  params = {'dense1': {'kernel': np.ones(2), 'bias': np.ones(2)}}
  chex.assert_trees_all_close(
    sweep.scale_weights(params, 2.0),
    {'dense1': {'kernel': 2 * np.ones(2), 'bias': np.ones(2)}},
  )
