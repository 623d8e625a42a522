"""The example from training to a file, run small."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='module')
def deploy(example):
  return example('deploy')


def test_average_is_of_the_second_half(deploy, monkeypatch):
  """Steps that leave weights of 1 to 6."""
  training = deploy.training
  states = [
    training.State({'w': np.float32(n)}, {'mean': np.float32(n)}, None)
    for n in range(7)
  ]
  steps = iter(states[1:])
  monkeypatch.setattr(training, 'init', lambda *_: states[0])
  monkeypatch.setattr(training, 'step', lambda *_: (next(steps), 0.0))
  images, labels = np.zeros((64, 1, 1, 1)), np.zeros(64, np.int32)
  dataset = deploy.data.Dataset('', images, labels, images, labels)
  last, averaged = deploy.train(None, dataset, 6, 0)
  assert last['params']['w'] == 6
  chex.assert_trees_all_close(averaged['params']['w'], 5.0, rtol=1e-6)
  assert averaged['batch_stats'] == last['batch_stats']


def test_file_holds_the_program_for_batches_of_any_size(deploy, tmp_path):
  rng = np.random.default_rng(0)
  kernel, scale = rng.normal(size=(3, 4)), rng.normal(size=(1, 4))
  x = np.float32(rng.normal(size=(5, 3)))
  variables = {'kernel': jnp.float32(kernel), 'scale': jnp.float32(scale)}
  folded = deploy.fold(lambda v, x: x @ v['kernel'] * v['scale'], variables, x)
  path = tmp_path / 'new' / 'model.jax'
  deploy.write(folded, x, path)
  program = deploy.load(path)
  for size in (1, 5):
    wanted = np.float64(x[:size]) @ kernel * scale
    chex.assert_trees_all_close(program(x[:size]), wanted, rtol=1e-5, atol=1e-5)


def test_costs_are_of_every_program_and_round(deploy):
  x = np.ones((8, 8), np.float32)
  costs = deploy.measure(
    {'once': (lambda x: x @ x, (x,)), 'twice': (lambda x: x @ x @ x, (x,))},
    rounds=3,
  )
  for name, times in (('once', 1), ('twice', 2)):
    chex.assert_shape(costs[name].latencies, (3,))
    assert (costs[name].latencies > 0).all()
    # Two operations for each product of two numbers.
    assert np.isclose(costs[name].operations, times * 2 * 8**3 / 1e6)
    assert costs[name].megabytes >= 2 * x.nbytes / 1e6


@pytest.mark.second_tier
def test_it_runs_small(deploy, run_small, tmp_path):
  told = run_small(deploy, 'deploy_accuracy', 'deploy_cost')
  accuracies = re.findall(
    r'(trained|averaged|recalibrated|folded|file) +│ +([\d.]+) ± [\d.]+', told
  )
  assert [name for name, _ in accuracies] == [
    'trained',
    'averaged',
    'recalibrated',
    'folded',
    'file',
  ]
  assert accuracies[2][1] == accuracies[3][1] == accuracies[4][1]
  costs = re.findall(r'(1|64) +│ (?:as trained|folded|file) +│(.+)', told)
  assert [size for size, _ in costs] == ['1'] * 3 + ['64'] * 3
  for _, cells in costs:
    assert all(float(n) > 0 for n in re.findall(r'[\d.]+', cells))
  program = jax.jit(deploy.load(tmp_path / 'out' / 'deploy.jax'))
  chex.assert_shape(program(np.zeros((2, 32, 32, 3), np.float32)), (2, 10))


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  deploy, takes_images, photographs_folder
):
  takes_images(deploy, photographs_folder)
