"""The gallery's example of regularization: its numbers and its figures."""

import importlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


@pytest.fixture(scope='module')
def regularization():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    yield importlib.import_module('regularization')


def test_runs_small(regularization, tmp_path, capsys):
  with jax.numpy_rank_promotion('allow'):  # optax's schedules and masks
    regularization.main(['--small', '--out', str(tmp_path)])
  for name in ('noise', 'gap'):
    path = tmp_path / f'regularization_{name}.png'
    assert path.read_bytes().startswith(b'\x89PNG')
  printed = capsys.readouterr().out
  pairs = re.findall(r'([-+]?[\d.]+) ± ([\d.]+)', printed)
  assert len(pairs) == 3 * 10 + 6
  assert all(np.isfinite(float(n)) for pair in pairs for n in pair)


def test_noise_of_pairs(regularization):
  """Of two values one is +1 or -1, whatever they are: the noise is near 1."""
  pair, many = regularization.noise((2, 64), 50)
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
