"""The gallery's example of placement: its numbers and its figures."""

import importlib
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


@pytest.fixture(scope='module')
def placement():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    yield importlib.import_module('placement')


def test_runs_small(placement, tmp_path, capsys):
  placement.main(['--small', '--out', str(tmp_path)])
  for name in ('activation', 'clipping', 'conventions'):
    path = tmp_path / f'placement_{name}.png'
    assert path.read_bytes().startswith(b'\x89PNG')
  printed = capsys.readouterr().out
  pairs = re.findall(r'([\d.]+) ± ([\d.]+)', printed)
  assert len(pairs) == 3 * 3 * 3 + 3 * 6 + 3
  assert all(np.isfinite(float(n)) for pair in pairs for n in pair)
  assert 'deviations off with momentum 0.9' in printed


def test_conventions_by_hand(placement):
  """Running means are sums of the batches' with weights that fall."""
  found = placement.conventions(12)
  images = placement.data.digits().train_images.reshape(-1, 64)
  order = placement.training.batches(len(images), 60, seed=0)
  pixel = images[:, images.var(0).argmax()].astype(np.float64)
  batch = np.array([pixel[next(order)].mean() for _ in range(12)])
  for momentum in (0.9, 0.1):
    weights = (1 - momentum) * momentum ** np.arange(12)[::-1]
    np.testing.assert_allclose(
      found.means[momentum][-1], weights @ batch, rtol=1e-5
    )
  assert found.errors[0.1] > 0
  assert np.all(np.diff(found.factors[np.argsort(found.var)]) >= 0)


def test_clipping_bounds_the_step(placement):
  """By hand: gradients of norm 5, of which 1 is left."""
  params = {'w': jnp.array([1.0, 1.0])}
  grads = {'w': jnp.array([3.0, 4.0])}
  faster = importlib.import_module('faster')
  optimizer = faster.clipped(optax.clip_by_global_norm(1.0))
  state = optimizer.init(params)
  rate = {'learning_rate': jnp.float32(0.5)}
  state = state._replace(hyperparams=state.hyperparams | rate)
  updates, _ = optimizer.update(grads, state, params)
  np.testing.assert_allclose(updates['w'], [-0.3, -0.4], rtol=1e-6)
