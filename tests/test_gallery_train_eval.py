"""The example of training against evaluation mode, run small."""

import re

import chex
import jax
import numpy as np
import pytest


@pytest.fixture(scope='module')
def train_eval(example):
  return example('train_eval')


def test_skewed_batches_are_of_two_classes(train_eval):
  labels = np.repeat(np.arange(5), 7)
  order = train_eval.skewed(labels, 8, seed=0)
  found = [labels[next(order)] for _ in range(20)]
  pairs = {tuple(np.unique(batch)) for batch in found}
  assert all(len(pair) == 2 for pair in pairs) and len(pairs) > 5
  for batch in found:
    assert sorted(np.bincount(batch)[np.unique(batch)]) == [4, 4]


def test_ways_are_averages_and_the_first_statistics(train_eval, monkeypatch):
  """Steps that leave weights of 1, 2, 3 and 4."""
  training = train_eval.training
  states = [
    training.State({'w': np.float32(n)}, {'mean': np.float32(n)}, None)
    for n in range(5)
  ]
  steps = iter(states[1:])
  monkeypatch.setattr(training, 'init', lambda *_: states[0])
  monkeypatch.setattr(training, 'step', lambda *_: (next(steps), 0.0))
  monkeypatch.setattr(train_eval, 'accuracies', lambda *_: (60.0, 50.0))
  images = np.zeros((64, 1, 1, 1), np.float32)
  labels = np.zeros(64, np.int32)
  dataset = train_eval.data.Dataset('', images, labels, images, labels)
  ways, points = train_eval.train(train_eval.Setting(), dataset, 4, 0, 2)
  weights = {way: v['params']['w'] for way, v in ways.items()}
  wanted = {'last': 4, 'EMA': 0.95 * 3 + 0.05 * 4, 'SWA': 3.5, 'forgotten': 4}
  chex.assert_trees_all_close(weights, wanted, rtol=1e-6)
  means = {way: float(v['batch_stats']['mean']) for way, v in ways.items()}
  assert means == {'last': 4, 'EMA': 4, 'SWA': 4, 'forgotten': 0}
  assert points == [(2, 60, 50), (4, 60, 50)]


def test_accuracies_are_of_both_modes(train_eval, monkeypatch):
  """A network that finds every class in training mode, and 0 in evaluation."""
  labels = np.arange(1000, dtype=np.int32) % 10
  images = np.float32(jax.nn.one_hot(labels, 10))[:, None, None]
  dataset = train_eval.data.Dataset('', images, labels, images, labels)

  def call(model, train, variables, images):
    return images[:, 0, 0] * (1 if train else 0), {}

  monkeypatch.setattr(train_eval, 'call', call)
  setting = train_eval.Setting(train_eval.SLOW)
  both = train_eval.accuracies(setting, {}, dataset, 0)
  order = np.random.default_rng(0).permutation(1000)[:768]
  zeros = 100 * (labels[order] == 0).mean()
  chex.assert_trees_all_close(both, (100.0, zeros), rtol=1e-6)


@pytest.mark.second_tier
def test_it_runs_small(train_eval, run_small):
  told = run_small(
    train_eval, 'train_eval_gap', 'train_eval_curves', 'train_eval_inspect'
  )
  rows = re.findall(r'(baseline|forgotten `mutable`) +│(.+)', told)
  assert [name for name, _ in rows] == train_eval.SMALL
  for _, cells in rows:
    numbers = re.findall(r'([\d.]+) ± ([\d.]+)', cells)
    assert len(numbers) == 4
    assert all(0 <= float(mean) <= 100 for mean, _ in numbers)
  warned = ' '.join(told.split()).partition('warns of: ')[2]
  assert re.search('forgotten `mutable`, [^;.]*not_updated', warned)


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  train_eval, takes_images, photographs_folder
):
  takes_images(train_eval, photographs_folder)
