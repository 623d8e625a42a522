"""The modules of docs/others.md, in the libraries that they are written for."""

from cases import draw
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_docs import BLOCK, DOCS

import normkit as nk

EPSILON, MOMENTUM = 1e-5, 0.99
NEED = "needs {}: pip install 'normkit[benchmarks]'"
EQUINOX, HAIKU = 0, 2  # where the blocks of each begin


def run_blocks(library, first, last):
  pytest.importorskip(library, reason=NEED.format(library))
  blocks = BLOCK.findall((DOCS / 'others.md').read_text())
  names = {'jax': jax, 'jnp': jnp, 'nk': nk}
  for block in blocks[first:last]:
    exec(compile(block, 'docs/others.md', 'exec'), names)
  return names


def batch_norm(x, axes):
  """The batch's output and moments, in float64."""
  x = np.asarray(x, np.float64)
  mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
  return (x - mean) / np.sqrt(var + EPSILON), mean.ravel(), var.ravel()


def assert_running(state, mean, var):
  np.testing.assert_allclose(state.mean, (1 - MOMENTUM) * mean, rtol=1e-4)
  desired = MOMENTUM + (1 - MOMENTUM) * var
  np.testing.assert_allclose(state.var, desired, rtol=1e-5)


def evaluated(x, state, shape):
  mean, var = (np.asarray(s, np.float64).reshape(shape) for s in state[:2])
  return (np.asarray(x) - mean) / np.sqrt(var + EPSILON)


def test_equinox():
  found = run_blocks('equinox', EQUINOX, HAIKU)
  eqx, step, x = found['eqx'], found['step'], draw((8, 3, 4, 4)) * 2 + 5
  norm, state = eqx.nn.make_with_state(found['Norm'])(found['transform'], x[0])
  y, new = step(norm, state, x)
  desired, mean, var = batch_norm(x, (0, 2, 3))
  np.testing.assert_allclose(y, desired, atol=1e-5)
  assert_running(new.get(norm.index), mean, var)
  y, same = step(eqx.nn.inference_mode(norm), new, x)
  stats = new.get(norm.index)
  desired = evaluated(x, stats, (3, 1, 1))
  np.testing.assert_allclose(y, desired, rtol=1e-5)
  np.testing.assert_array_equal(same.get(norm.index).mean, stats.mean)


def test_haiku():
  found = run_blocks('haiku', HAIKU, None)
  net, x = found['net'], draw((8, 4, 4, 3)) * 2 + 5
  params, state = net.init(None, x, True)
  assert {p.shape for p in jax.tree.leaves(params)} == {(3,)}
  y, new = jax.jit(net.apply, static_argnums=4)(params, state, None, x, True)
  desired, mean, var = batch_norm(x, (0, 1, 2))
  np.testing.assert_allclose(y, desired, atol=1e-5)
  (stats,) = jax.tree.leaves(new, is_leaf=lambda s: hasattr(s, 'mean'))
  assert_running(stats, mean, var)
  y, same = net.apply(params, new, None, x, False)
  np.testing.assert_allclose(y, evaluated(x, stats, 3), rtol=1e-5)
  np.testing.assert_array_equal(
    jax.tree.leaves(same)[0], jax.tree.leaves(new)[0]
  )
