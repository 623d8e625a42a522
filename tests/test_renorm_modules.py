"""Batch renorm as modules: as the paper has it, with SBX's variables."""

import functools
from importlib import metadata, util

from cases import draw, draw_mask
import chex
import family
from flax import linen as nn, nnx, serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normkit as nk
import normkit.linen
import normkit.nnx
from normkit.tools import freeze, inspect, recalibrate

KEY = jax.random.key(0)
LIMITS = {'r_max': 1.5, 'd_max': 0.3}
STEPS = [draw((8, 2, 3), seed=i) * (1 + i) + i for i in range(3)]
MASKS = [draw_mask((8, 2, 3), seed=i) for i in range(3)]


def expected(params, masked):
  """Outputs of the steps and of an evaluation, and the last state."""
  of = family.batch_renorm(1.5, 0.3, momentum=0.9)
  state = nk.BatchNormState(jnp.zeros(3), jnp.ones(3), jnp.zeros(3, int))
  outputs = []
  for x, mask in zip(STEPS, MASKS, strict=True):
    y, state = of(params, state, x, True, mask if masked else None)
    outputs.append(y)
  return [*outputs, of(params, state, STEPS[0], False, None)[0]], state


@pytest.mark.parametrize('masked', [False, True])
def test_linen(masked):
  norm = normkit.linen.BatchRenorm(momentum=0.9, **LIMITS)
  variables = norm.init(jax.random.key(0), STEPS[0], use_running_average=False)
  assert jax.tree.map(jnp.shape, variables) == {
    'params': {'scale': (3,), 'bias': (3,)},
    'batch_stats': {'mean': (3,), 'var': (3,), 'steps': ()},
  }
  params = {'scale': draw(3, seed=5), 'bias': draw(3, seed=6)}
  desired, state = expected(nk.NormParams(**params), masked)
  stats = variables['batch_stats']
  assert stats['steps'] == 0  # initializing is no step

  @jax.jit
  def step(stats, x, mask):
    return norm.apply(
      {'params': params, 'batch_stats': stats},
      x,
      use_running_average=False,
      mask=mask,
      mutable=['batch_stats'],
    )

  outputs = []
  for x, mask in zip(STEPS, MASKS, strict=True):
    y, updates = step(stats, x, mask if masked else None)
    stats = updates['batch_stats']
    outputs.append(y)
  variables = {'params': params, 'batch_stats': stats}
  outputs.append(norm.apply(variables, STEPS[0], use_running_average=True))
  chex.assert_trees_all_close(outputs, desired, atol=1e-5, rtol=1e-5)
  found = stats['mean'], stats['var']
  chex.assert_trees_all_close(found, tuple(state[:2]), atol=1e-5, rtol=1e-5)
  assert stats['steps'] == len(STEPS)
  assert stats['steps'].dtype == jnp.int32


@pytest.mark.parametrize('masked', [False, True])
def test_nnx(masked):
  norm = normkit.nnx.BatchRenorm(3, momentum=0.9, rngs=nnx.Rngs(0), **LIMITS)
  params = nk.NormParams(draw(3, seed=5), draw(3, seed=6))
  norm.scale[...], norm.bias[...] = params
  desired, state = expected(params, masked)
  step = nnx.jit(lambda norm, x, mask: norm(x, mask=mask))
  outputs = [
    step(norm, x, mask if masked else None)
    for x, mask in zip(STEPS, MASKS, strict=True)
  ]
  norm.eval()
  outputs.append(norm(STEPS[0]))
  chex.assert_trees_all_close(outputs, desired, atol=1e-5, rtol=1e-5)
  found = norm.mean[...], norm.var[...]
  chex.assert_trees_all_close(found, tuple(state[:2]), atol=1e-5, rtol=1e-5)
  assert norm.steps[...] == len(STEPS)


def test_they_are_batch_norms():
  assert issubclass(normkit.linen.BatchRenorm, nn.BatchNorm)
  norm = normkit.nnx.BatchRenorm(3, rngs=nnx.Rngs(0))
  assert isinstance(norm, nnx.BatchNorm)
  nnx.view(norm, only=nnx.BatchNorm, use_running_average=True)(STEPS[0])


def test_limits_are_checked():
  for r_max in (0.5, '3'):
    with pytest.raises((ValueError, TypeError), match='r_max'):
      normkit.linen.BatchRenorm(r_max=r_max).init(
        jax.random.key(0), STEPS[0], use_running_average=False
      )
    with pytest.raises((ValueError, TypeError), match='r_max'):
      normkit.nnx.BatchRenorm(3, r_max=r_max, rngs=nnx.Rngs(0))(STEPS[0])
  with pytest.raises(ValueError, match='use_running_average'):
    normkit.linen.BatchRenorm(16)


# What SBX (CrossQ) writes and computes: sbx/common/jax_layers.py, version 0.21.


def of_sbx(x, stats, epsilon=1e-3, warmup=1):
  """Its formula, with its own place of epsilon, in float64."""
  given = x, stats['mean'], stats['var']
  x, mean, var = (np.asarray(a, float) for a in given)
  batch_mean, batch_var = x.mean((0, 1)), x.var((0, 1))
  std = np.sqrt(var + epsilon)
  r = np.clip(np.sqrt(batch_var + epsilon) / std, 1 / 3, 3)
  d = np.clip((batch_mean - mean) / std, -5, 5)
  if stats['steps'] < warmup:
    r, d = np.ones_like(r), np.zeros_like(d)
  moved = batch_mean - d * np.sqrt(batch_var) / r
  return (x - moved) / np.sqrt(batch_var / r**2 + epsilon)


def like_sbx(epsilon):
  constant, join = optax.constant_schedule, optax.join_schedules
  return normkit.linen.BatchRenorm(
    momentum=0.9,
    epsilon=epsilon,
    r_max=join([constant(1.0), constant(3.0)], [1]),
    d_max=join([constant(0.0), constant(5.0)], [1]),
  )


def written_by_sbx():
  """Its collection: limits are variables there, and numbers of Python's."""
  stats = {'mean': jnp.zeros(3), 'var': jnp.ones(3)}
  return stats | {'r_max': 3, 'd_max': 5, 'steps': 0}


@pytest.mark.parametrize(
  ('epsilon', 'most', 'least'), [(1e-9, 1e-5, 0), (1e-3, 1, 0.01)]
)
def test_beside_sbx(epsilon, most, least):
  """The same but for epsilon; with its .001 and a narrow feature they part."""
  norm, stats = like_sbx(epsilon), written_by_sbx()
  narrow = jnp.array([[[1.0, 0.02, 3.0]]])
  differences = []
  for x in (x * narrow for x in STEPS):
    desired = of_sbx(x, stats, epsilon)
    y, updates = norm.apply(
      {'params': {'scale': jnp.ones(3), 'bias': jnp.zeros(3)}}
      | {'batch_stats': stats},
      x,
      use_running_average=False,
      mutable=['batch_stats'],
    )
    stats = updates['batch_stats']
    differences.append(np.abs(y - desired).max())
  assert least <= max(differences) <= most
  assert stats['steps'] == len(STEPS)
  assert (stats['r_max'], stats['d_max']) == (3, 5)  # as they came


def sbx():
  """Its layers, in a file that needs Flax alone; all of SBX needs far more."""
  why = "SBX's own BatchRenorm: pip install --no-deps sbx-rl"
  try:
    files = metadata.files('sbx-rl') or ()
  except metadata.PackageNotFoundError:
    pytest.skip(why)
  (path,) = (f.locate() for f in files if f.match('common/jax_layers.py'))
  spec = util.spec_from_file_location('jax_layers', path)
  module = util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  ('epsilon', 'most', 'least'), [(1e-9, 1e-5, 0), (1e-3, 1, 0.01)]
)
def test_sbx_itself(epsilon, most, least):
  """What it initializes loads; the statistics and evaluation are the same."""
  theirs = sbx().BatchRenorm(momentum=0.9, epsilon=epsilon, warmup_steps=1)
  norm, first = like_sbx(epsilon), STEPS[0]
  variables = theirs.init(KEY, first, use_running_average=False)
  found, wanted, differences = variables, variables, []
  for x in (x * jnp.array([[[1.0, 0.02, 3.0]]]) for x in STEPS):
    ys = []
    for layer, given in (norm, found), (theirs, wanted):
      y, updates = layer.apply(
        given, x, use_running_average=False, mutable=['batch_stats']
      )
      ys.append((y, given | updates))
    (y, found), (desired, wanted) = ys
    differences.append(np.abs(y - desired).max())
    for name in 'mean', 'var', 'steps', 'r_max', 'd_max':
      actual, stat = (v['batch_stats'][name] for v in (found, wanted))
      np.testing.assert_allclose(actual, stat, rtol=1e-5, atol=1e-6)
  assert least <= max(differences) <= most
  y, desired = (
    layer.apply(wanted, first, use_running_average=True)
    for layer in (norm, theirs)
  )
  np.testing.assert_allclose(y, desired, rtol=1e-5, atol=1e-5)


def test_a_file_of_sbx_is_read():
  stats = written_by_sbx()
  read = serialization.msgpack_restore(serialization.msgpack_serialize(stats))
  variables = {'params': {'scale': jnp.ones(3), 'bias': jnp.zeros(3)}}
  norm = like_sbx(1e-3)
  y = norm.apply(
    variables | {'batch_stats': read}, STEPS[0], use_running_average=True
  )
  np.testing.assert_allclose(y, STEPS[0] / np.sqrt(1.001), rtol=1e-6)


def test_joint_batch():
  """CrossQ's critic sees current and next pairs in one batch.

  Its statistics are then of both; of two calls each has its own, and what is
  stored lies near the last. The targets give no gradient.
  """
  norm = normkit.linen.BatchRenorm(momentum=0.0, r_max=1.0, d_max=0.0)
  now, later = draw((16, 3)), draw((16, 3), seed=1) + 4
  init = functools.partial(norm.init, use_running_average=True)
  variables = jax.jit(init)(jax.random.key(0), now)

  @jax.jit
  def critic(x):
    return norm.apply(
      variables, x, use_running_average=False, mutable=['batch_stats']
    )

  now, later = map(np.asarray, (now, later))
  together = np.concatenate([now, later])
  both, updates = critic(together)
  q, q_next = np.split(np.asarray(both), 2)
  joint = together.astype(float)
  desired = (joint - joint.mean(0)) / np.sqrt(joint.var(0) + 1e-5)
  np.testing.assert_allclose([*q, *q_next], desired, atol=1e-5)
  stats = updates['batch_stats']
  np.testing.assert_allclose(stats['mean'], joint.mean(0), rtol=1e-5)
  apart, _ = critic(later)
  assert np.abs(apart - q_next).max() > 1

  def loss(later):
    q, q_next = jnp.split(critic(jnp.concatenate([now, later]))[0], 2)
    return jnp.sum((q - jax.lax.stop_gradient(q_next)) ** 2)

  slopes = jax.jit(jax.grad(loss))(later)
  assert np.abs(slopes).max() > 0  # through the statistics


@pytest.mark.second_tier
def test_tools_see_them():
  """Recalibrated, as batch norm is; the steps stay."""
  x = draw((32, 3))
  norm = normkit.linen.BatchRenorm()
  variables = norm.init(jax.random.key(0), x, use_running_average=True)

  def call(variables, x):
    return norm.apply(
      variables, x, use_running_average=False, mutable=['batch_stats']
    )

  stats = recalibrate.recalibrate(call, variables, [x])['batch_stats']
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(stats['mean'], exact.mean(0), rtol=1e-5)
  np.testing.assert_allclose(stats['var'], exact.var(0), rtol=1e-5)
  assert stats['steps'] == 0
  module = normkit.nnx.BatchRenorm(3, rngs=nnx.Rngs(0))
  new = recalibrate.recalibrate(lambda m, x: m(x), module, [x])
  np.testing.assert_allclose(new.mean[...], exact.mean(0), rtol=1e-5)
  frozen = freeze.freeze(module)
  frozen.train()
  want = exact / np.sqrt(1 + 1e-5)  # by the statistics of the start
  np.testing.assert_allclose(frozen(x), want, rtol=1e-5)
  with freeze.frozen():
    y, updates = call(variables, x)
  np.testing.assert_allclose(y, want, rtol=1e-5)
  chex.assert_trees_all_equal(updates['batch_stats'], variables['batch_stats'])
  for found in (
    inspect.inspect(call, variables, [x]),
    inspect.inspect(lambda m, x: m(x), module, [x]),
  ):
    (layer,) = found.layers
    np.testing.assert_allclose(layer.batch_mean, exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer.batch_var, exact.var(0), rtol=1e-5)
    assert 'not_updated' in [advice.code for advice in found.advice]
