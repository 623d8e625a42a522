"""The gallery's example of regularization: its numbers and its figures."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope='module')
def regularization(example):
  return example('regularization')


def test_runs_small(regularization, run_small, digits_folder):
  printed = run_small(
    regularization, 'regularization_noise', 'regularization_gap'
  )
  pairs = re.findall(r'([-+]?[\d.]+) ± ([\d.]+)', printed)
  assert len(pairs) == 3 * 4 + 3
  assert all(np.isfinite(float(n)) for pair in pairs for n in pair)
  # The same images from files are as good.
  again = run_small(regularization, data=digits_folder)
  assert len(again.splitlines()) > 10 and 'nan' not in again.lower()


def test_noise_of_pairs(regularization):
  """Of two values one is +1 or -1, whatever they are: the noise is near 1."""
  pair, many = regularization.noise(regularization.data.digits(), (2, 64), 50)
  assert np.all(pair > 0.5)
  assert np.all(many < 0.3)


def test_shifts_move_whole_images(regularization):
  images = jnp.arange(2 * 4 * 4.0).reshape(2, 4, 4, 1) + 1
  seen = set()
  for seed in range(40):
    moved = np.asarray(regularization.shifted(images, jax.random.key(seed)))
    padded = np.pad(images[0, ..., 0], 1)
    found = [
      (i, j)
      for i in range(3)
      for j in range(3)
      if np.array_equal(padded[i : i + 4, j : j + 4], moved[0, ..., 0])
    ]
    assert len(found) == 1
    seen |= {*found}
  assert len(seen) == 9
