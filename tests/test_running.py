"""Running statistics over several steps: exact per feature, hard to spoil."""

from cases import draw, draw_mask
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import normkit as nk

AVERAGES = [
  {'momentum': 0.9},
  {'momentum': 0.0},
  {'momentum': 1.0},
  {'momentum': None},
  {'momentum': 0.999, 'debias': True},
  {'momentum': 0.0, 'debias': True},
  {'momentum': None, 'unbiased': True},
  {'momentum': 0.7, 'debias': True, 'unbiased': True},
]
STEPS = 12


def steps(seed=0):
  """Batches and masks; each leaves some features out, or leaves them one."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((STEPS, 6, 5)) * 3 + 50
  held = rng.random((STEPS, 6, 5)) < rng.choice([0, 0.2, 1], (STEPS, 1, 5))
  return x, held


@pytest.mark.parametrize('options', AVERAGES)
def test_averages_by_definition(options):
  """Against the reference's weights, in float64, masked features and all."""
  of = reference.batch_norm(**options)
  with jax.enable_x64(True):
    bn = nk.BatchNorm(**options)
    x, where = (jnp.asarray(a) for a in steps())
    params, state = bn.init(x[0])
    want = jax.tree.map(np.asarray, state)
    for i in range(STEPS):
      _, state = bn.apply(params, state, x[i], train=True, where=where[i])
      want = of.updated(want, np.asarray(x[i]), np.asarray(where[i]))
      np.testing.assert_array_equal(state.count, want.count)
      chex.assert_trees_all_close(
        (state.mean, state.var), (want.mean, want.var), rtol=1e-10
      )
  assert len(set(np.asarray(state.count).tolist())) > 1


@pytest.mark.parametrize('updates', [1, 10, 100])
@pytest.mark.parametrize('momentum', [0.99, None])
def test_equal_updates(updates, momentum):
  """After n equal updates, evaluation gives deviation one.

  Equinox gives 0.10, 0.31 and 0.80, for it debiases a variance that began at
  one as if at zero.
  """
  bn = nk.BatchNorm(momentum=momentum, debias=momentum is not None)
  x = np.float32(np.random.default_rng(0).standard_normal((256, 2)) * 5)
  params, state = bn.init(x)
  apply = jax.jit(bn.apply, static_argnames='train')
  for _ in range(updates):
    _, state = apply(params, state, x, train=True)
  y = np.asarray(apply(params, state, x, train=False)[0])
  np.testing.assert_allclose(y.std(0), 1, rtol=1e-5)
  np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)


@pytest.mark.parametrize(
  'options', [{'momentum': None}, {'momentum': 0.99, 'debias': True}]
)
def test_the_first_update_leaves_nothing_of_the_start(options):
  """Not even a rounding: the variance may be far smaller than its start."""
  x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 3)) * 1e-8)
  bn = nk.BatchNorm(**options)
  params, state = bn.init(x)
  _, state = bn.apply(params, state, x, train=True)
  stats = nk.moments(x, 0)
  np.testing.assert_allclose(state.var, stats.var, rtol=1e-6)
  np.testing.assert_allclose(state.mean, stats.mean, rtol=1e-6)


@pytest.mark.parametrize('x64', [False, True])
@pytest.mark.parametrize(
  'dtype', [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.complex64]
)
def test_dtypes_never_drift(dtype, x64):
  """A scan refuses a carry whose dtype changes."""
  with jax.enable_x64(x64):
    x = jnp.asarray(steps()[0]).astype(jax.dtypes.canonicalize_dtype(dtype))
    bn = nk.BatchNorm(momentum=None, unbiased=True)
    params, state = bn.init(jax.ShapeDtypeStruct(x.shape[1:], x.dtype))

    def step(state, x):
      return bn.apply(params, state, x, train=True)[::-1]

    last, _ = jax.lax.scan(step, state, x)
  chex.assert_trees_all_equal_shapes_and_dtypes(last, state)
  assert (last.count == STEPS).all()
  # The state's dtype holds, whatever the input's: float64 into float32.
  if dtype == jnp.float64 and x64:
    with jax.enable_x64(True):
      narrow = jax.tree.map(lambda s: s.astype(jnp.float32), state[:2])
      narrow = state._replace(mean=narrow[0], var=narrow[1])
      last, _ = jax.lax.scan(step, narrow, x)
    chex.assert_trees_all_equal_dtypes(last, narrow)


@pytest.mark.parametrize('bad', [np.nan, np.inf, 1e30])
@pytest.mark.parametrize('virtual', [None, 3])
def test_bad_steps_are_skipped(bad, virtual):
  """One feature of one step is spoilt: it is as if it had been masked."""
  x, _ = steps()
  spoilt = x.copy()
  spoilt[4, 2, 1] = bad
  options = {'momentum': 0.9, 'virtual_batch_size': virtual}
  bn = nk.BatchNorm(skip_nonfinite=True, **options)
  params, state = bn.init(jax.ShapeDtypeStruct((6, 5), jnp.float32))
  want = state
  for i in range(STEPS):
    _, state = bn.apply(params, state, jnp.float32(spoilt[i]), train=True)
    where = jnp.asarray(np.arange(5) != 1) | (i != 4)
    _, want = bn.apply(params, want, jnp.float32(x[i]), train=True, where=where)
  chex.assert_trees_all_close(state, want, rtol=1e-6)
  assert state.count.tolist() == [12, 11, 12, 12, 12]


def test_without_the_option_a_bad_step_shows():
  """Not silently: the running statistics tell of it."""
  bn = nk.BatchNorm()
  x = jnp.ones((4, 2)).at[0, 1].set(jnp.nan)
  params, state = bn.init(x)
  _, state = bn.apply(params, state, x, train=True)
  assert np.isnan(state.mean).tolist() == [False, True]
  assert state.count.tolist() == [1, 1]


def test_evaluation_in_float64_by_float32_statistics():
  """The statistics are widened before anything is computed."""
  with jax.enable_x64(True):
    x = jnp.asarray(steps()[0][0])
    mean = np.linspace(0.1, 0.9, 5, dtype=np.float32)
    state = nk.BatchNormState(mean, mean + 1, np.zeros(5, np.int32))
    y, after = nk.batch_norm(x, state, train=False)
    want = (np.float64(x) - mean) / np.sqrt(np.float64(mean + 1) + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-14)
  assert y.dtype == np.float64
  chex.assert_trees_all_equal(after, state)


def test_evaluation_of_complex_x_by_a_real_mean():
  """As of a network whose real part alone was kept; training must not."""
  x = jnp.asarray(steps()[0][0] + 1j, jnp.complex64)
  state = nk.BatchNormState(jnp.full(5, 2.0), jnp.ones(5), jnp.zeros(5, int))
  y, after = nk.batch_norm(x, state, train=False, epsilon=0.0)
  np.testing.assert_allclose(y, np.asarray(x) - 2, rtol=1e-6)
  chex.assert_trees_all_equal(after, state)


def test_half_precision_state_is_moved_in_float32():
  """Rounded once, when it is stored."""
  x = jnp.asarray(steps()[0][0], jnp.float32)
  old = jnp.full(5, 3.14, jnp.bfloat16)
  state = nk.BatchNormState(old, old, jnp.zeros(5, jnp.int32))
  _, new = nk.batch_norm(x, state, train=True, momentum=0.9)
  want = 0.9 * old.astype(jnp.float32) + 0.1 * nk.moments(x, 0).mean
  assert new.mean.dtype == jnp.bfloat16
  np.testing.assert_array_equal(new.mean, want.astype(jnp.bfloat16))


@pytest.mark.parametrize('shape', [(4, 0, 3), (0, 2, 3)])
def test_virtual_batches_of_nothing(shape):
  """Where it is let: nothing comes out, and nothing is learnt from it."""
  bn = nk.BatchNorm(virtual_batch_size=2, check_batch=False)
  x = jnp.ones(shape)
  params, state = bn.init(x)
  y, after = bn.apply(params, state, x, train=True)
  assert y.shape == shape
  chex.assert_trees_all_equal(after, state)


def test_evaluation_uses_the_running_statistics_alone():
  x = jnp.asarray(steps()[0][0], jnp.float32)
  bn = nk.BatchNorm(epsilon=0.0)
  params, _ = bn.init(x)
  state = nk.BatchNormState(
    jnp.arange(5.0), 4 * jnp.ones(5), jnp.zeros(5, jnp.int32)
  )
  y, after = bn.apply(params, state, x, train=False)
  np.testing.assert_allclose(y, (np.asarray(x) - np.arange(5)) / 2, rtol=1e-6)
  chex.assert_trees_all_equal(after, state)
  one, _ = bn.apply(params, state, x[:1], train=False)
  np.testing.assert_array_equal(one, y[:1])


def test_a_state_of_two_arrays():
  """Where nothing needs a count; it comes back as it was given."""
  x, mask = draw((8, 3)), draw_mask((8, 3))
  whole = nk.BatchNormState(jnp.ones(3), jnp.full(3, 2.0), jnp.zeros(3, int))
  pair = nk.BatchNormState(*whole[:2])
  for norm in nk.BatchNorm(momentum=0.9), nk.EvoNormB0(momentum=0.9):
    params, _ = norm.init(x)
    step = jax.jit(norm.apply, static_argnames='train')
    for train in True, False:
      y, new = step(params, pair, x, train=train, where=mask)
      desired, after = step(params, whole, x, train=train, where=mask)
      chex.assert_trees_all_equal(y, desired)
      chex.assert_trees_all_equal(new, nk.BatchNormState(*after[:2]))


@pytest.mark.parametrize(
  'norm',
  [
    nk.BatchNorm(debias=True),
    nk.BatchNorm(momentum=None),
    nk.EvoNormB0(momentum=None),
    nk.BatchRenorm(),
    nk.StreamingNorm(),
  ],
  ids=lambda norm: type(norm).__name__,
)
def test_a_count_that_is_needed(norm):
  params, state = norm.init(draw((8, 3)))
  with pytest.raises(ValueError, match=r'state.count is None.*jnp.zeros'):
    norm.apply(params, state._replace(count=None), draw((8, 3)), train=True)
