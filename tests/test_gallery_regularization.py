"""The gallery's example of regularization: its numbers and its figures."""

import re

import jax
import numpy as np
import pytest


@pytest.fixture(scope='module')
def regularization(example):
  return example('regularization')


@pytest.mark.second_tier
def test_runs_small(regularization, run_small):
  printed = run_small(
    regularization, 'regularization_noise', 'regularization_gap'
  )
  pairs = re.findall(r'([-+]?[\d.]+) ± ([\d.]+)', printed)
  assert len(pairs) == 3 * 4 + 3
  assert all(np.isfinite(float(n)) for pair in pairs for n in pair)


@pytest.mark.second_tier
def test_numbers_are_those_of_the_images_given(
  regularization, takes_images, digits_folder
):
  takes_images(regularization, digits_folder)


def test_noise_of_pairs(regularization):
  """Of two values one is +1 or -1, whatever they are: the noise is near 1."""
  pair, many = regularization.noise(regularization.data.digits(), (2, 64), 50)
  assert np.all(pair > 0.5)
  assert np.all(many < 0.3)


def test_shifts_move_whole_images(regularization):
  images = np.arange(2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4, 1) + 1
  move = jax.jit(regularization.training.shifted)
  for shift in np.ndindex(3, 3):
    moved = np.asarray(move(images, np.array([shift, (1, 1)])))
    i, j = shift
    padded = np.pad(images[0, ..., 0], 1)
    np.testing.assert_array_equal(
      moved[0, ..., 0], padded[i : i + 4, j : j + 4]
    )
    np.testing.assert_array_equal(moved[1], images[1])
