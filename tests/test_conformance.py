"""Every case of cases.py: values, gradients, dtypes, and `check_norm`."""

import functools
import inspect
import itertools

import cases
from cases import CASES, draw, draw_mask, precision
import chex
import jax
from jax import test_util
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import numpy as np
import pytest
from tiers import second_tier

import normkit as nk
from normkit import testing

ROWS = [(case.name, case) for case in CASES]
NORMS = [(case.name, case) for case in cases.NORMS]
# Those whose gradients finite differences find: not r and d of renorm.
DERIVATIVES = [row for row in ROWS if row[1].reference.is_derivative]
DTYPES = [
  ('bfloat16', jnp.bfloat16, 1e-2),
  ('float16', jnp.float16, 2e-3),
  ('complex128', jnp.complex128, 1e-12),
]
WIDE = [('float64', jnp.float64, 1e-12), ('complex64', jnp.complex64, 1e-5)]
AVERAGES = [
  (case.name, case)
  for case in CASES
  if isinstance(case.transform, nk.BatchNorm)
  and (case.transform.debias or case.transform.momentum is None)
]


def is_one_each(row, *_):
  return row in {case.name for case in cases.NORMS}


def rows(*columns, first=lambda *names: True, every=1, others=1):
  """One test for each combination of rows, named after them.

  Of the first tier are those whose names `first` takes, and of these one in
  `every` of them, on diagonals, so that rows take turns. Rows that are not a
  norm's first have one in `others` of the combinations, so that each value
  of another column comes with each norm, and each row with some value.
  """

  def decorate(test):
    params = []
    for row in itertools.product(*map(enumerate, columns)):
      positions, parts = zip(*row, strict=True)
      ids = [part[0] for part in parts]
      if not is_one_each(*ids) and sum(positions) % others:
        continue
      is_first = first(*ids) and sum(positions) % every == 0
      make = pytest.param if is_first else second_tier
      values = (value for part in parts for value in part[1:])
      params.append(make(*values, id='-'.join(filter(None, ids))))
    names = list(inspect.signature(test).parameters)
    return pytest.mark.parametrize(names, params)(test)

  return decorate


def inputs(case, dtype=jnp.float32, masked=False):
  """Parameters unlike those of init, the state of init, x and a mask."""
  x = draw(case.shape, dtype)
  params, state = case.transform.init(x)
  leaves, tree = jax.tree.flatten(params)
  precise = jnp.finfo(dtype).dtype
  params = jax.tree.unflatten(
    tree,
    [
      draw(p.shape, jnp.promote_types(p.dtype, precise), seed)
      for seed, p in enumerate(leaves)
    ],
  )
  where = draw_mask(case.shape) if masked else None
  return params, state, x, where


@functools.cache
def train(case):
  @jax.jit
  def apply(params, state, x, where):
    return case.transform.apply(params, state, x, train=True, where=where)

  return apply


@functools.cache
def use(case):
  """Output and state of training, its gradients, and the output after it."""

  @jax.jit
  def run(params, state, x, where, dy):
    def apply(params, x, state=state, train=True):
      return case.transform.apply(params, state, x, train=train, where=where)

    y, pull, new = jax.vjp(apply, params, x, has_aux=True)
    # Without a state evaluation is training, as `test_values` shows.
    z = apply(params, x, new, train=False)[0] if jax.tree.leaves(new) else y
    return ((y, z), new), pull(dy)

  return run


def train_and_eval(case):
  """A function that trains once and evaluates with the new state."""

  def apply(params, state, x, where):
    y, state = case.transform.apply(params, state, x, train=True, where=where)
    z, _ = case.transform.apply(params, state, x, train=False, where=where)
    return (y, z), state

  return apply


def expected(case, params, state, x, where):
  y, state = case.reference(params, state, x, True, where)
  z, _ = case.reference(params, state, x, False, where)
  return (y, z), state


def assert_close(actual, desired, tolerance=1e-5):
  chex.assert_trees_all_close(actual, desired, rtol=tolerance, atol=tolerance)


def assert_gradients(case, args, tolerance=1e-5):
  """Holds the gradients in training to the closed form; returns the rest."""
  params, _, x, where = args
  dy = draw(x.shape, x.dtype, seed=9)
  found, (dparams, dx) = use(case)(*args, dy)
  desired = case.reference.gradients(params, x, dy, where)
  tolerance = max(tolerance, case.reference.gradient_error)
  for actual, value in zip((dx, *dparams), desired, strict=True):
    if actual is not None:
      scale = max(1, np.abs(value).max())
      assert_close(np.asarray(actual) / scale, value / scale, tolerance)
  return found


def is_refused(case, dtype):
  """Whether complex inputs are, which is then what is tested."""
  if not (
    case.reference.is_real and jnp.issubdtype(dtype, jnp.complexfloating)
  ):
    return False
  params, state, x, _ = inputs(case)
  with pytest.raises(TypeError, match='real'):
    train(case)(params, state, x.astype(dtype), None)
  return True


def with_pmap(function):
  """The same on every device, and the same from every device."""

  def run(*args):
    count = jax.local_device_count()
    args = jax.tree.map(lambda a: np.stack([a] * count), args)
    out = jax.device_get(jax.pmap(function)(*args))
    for leaf in jax.tree.leaves(out):
      np.testing.assert_array_equal(leaf, np.stack([leaf[0]] * count))
    return jax.tree.map(lambda a: a[0], out)

  return run


def without_device(function):
  return lambda *args: function(*jax.device_get(args))


# Without a mask: `test_gradients`, and eagerly `check_norm`.
OTHERWISE = without_device, with_pmap, lambda function: function


@rows(ROWS)
def test_values(case):
  args = inputs(case, masked=True)
  outputs, state = jax.jit(train_and_eval(case))(*args)
  chex.assert_type(outputs, jnp.float32)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, args[1])
  assert_close((outputs, state), expected(case, *args))


@pytest.mark.second_tier
@rows([(*row, turn % 2) for turn, row in enumerate(ROWS)])
def test_values_otherwise(case, turn):
  """Each norm in each way; options take turns at the first two."""
  args = inputs(case, masked=True)
  desired = expected(case, *args)
  ways = OTHERWISE if case in cases.NORMS else OTHERWISE[turn : turn + 1]
  for way in ways:
    assert_close(way(train_and_eval(case))(*args), desired)


def assert_of_dtype(case, dtype, tolerance, run):
  """Asserts dtypes and values of outputs and state, masked."""
  with precision(dtype):
    if is_refused(case, dtype):
      return
    args = inputs(case, dtype, masked=True)
    outputs, state = run(args)
    chex.assert_type(outputs, dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, args[1])
    desired, desired_state = expected(case, *args)
    assert_close(outputs, desired, tolerance)
    assert_close(state, desired_state, min(tolerance, 1e-5))


@rows(ROWS, DTYPES, every=24, others=3)
def test_dtypes(case, dtype, tolerance):
  def run(args):
    return jax.jit(train_and_eval(case))(*args)

  assert_of_dtype(case, dtype, tolerance, run)


@rows(ROWS, WIDE, every=16, others=2)
def test_gradients_of_dtypes(case, dtype, tolerance):
  """And the values that come with them."""

  def run(args):
    return assert_gradients(case, args, tolerance)

  assert_of_dtype(case, dtype, tolerance, run)


@rows(ROWS, first=is_one_each)
def test_gradients(case):
  """Without a mask; and the values that come with them. One program."""
  args = inputs(case)
  assert_close(assert_gradients(case, args), expected(case, *args))
  assert_exact_for_a_constant(case, args)
  assert_exact_far_from_zero(case, args)


def assert_exact_for_a_constant(case, args):
  """No variance: the outputs and gradients are finite, and exact."""
  params, state, x, _ = args
  args = params, state, np.ones_like(x), None
  (y, _), after = assert_gradients(case, args)
  desired = case.reference(*args[:3], True, None)
  assert_close((y, after), desired, 2e-4)  # 1e-7 / sqrt(epsilon)


def assert_exact_far_from_zero(case, args):
  """A mean of a thousand deviations costs three digits, not all of them."""
  params, state, x, _ = args
  args = params, state, np.asarray(x) + 4096, None
  ((y, _), after), _ = use(case)(*args, x)
  desired, desired_state = case.reference(*args[:3], True, None)
  assert_close(y, desired, 2e-3)
  assert_close(after, desired_state, 1e-5)


@rows(ROWS, every=16)
def test_gradients_masked(case):
  """Some or all masked, by one program."""
  args = inputs(case, masked=True)
  assert_close(assert_gradients(case, args), expected(case, *args))
  assert_nothing_left(case, args)


def assert_nothing_left(case, args):
  """All masked: zeros, then the bias; state and gradients untouched."""
  params, state, x, _ = args
  where = np.zeros(case.shape, bool)
  (y, _), after = assert_gradients(case, (params, state, x, where))
  desired, _ = case.reference(params, state, x, True, where)
  if case.reference.is_masked:
    chex.assert_trees_all_equal(y, np.asarray(desired, y.dtype))
  testing.assert_state_unchanged(state, after)


@rows(NORMS, first=('layer_norm',).__contains__)
def test_second_derivatives(case):
  """By finite differences: of the values, then of the gradients."""
  with precision(jnp.float64):
    params, state, x, where = inputs(case, jnp.float64, masked=True)
    dy = draw(case.shape, jnp.float64, seed=9)
    args = jax.device_get((params, x, dy))  # NumPy takes the differences

    def loss(params, x, dy):
      y, _ = case.transform.apply(params, state, x, train=True, where=where)
      return (dy * y).sum()

    @jax.jit
    def run(args, change):
      gradients = jax.value_and_grad(loss, (0, 1, 2))
      (value, found), pull = jax.vjp(gradients, *args)
      return value, found, pull((np.zeros(()), change))

    def first(*args):
      value, found, _ = jax.device_get(run(args, args))
      return value, lambda dy: jax.tree.map(lambda g: dy * g, found)

    def second(*args):
      _, found, _ = jax.device_get(run(args, args))
      return found, lambda change: jax.device_get(run(args, change)[2])

    for pull in (first, second):
      test_util.check_vjp(lambda *args: pull(*args)[0], pull, args)  # noqa: B023


@rows(NORMS, every=9)
def test_bfloat16_under_shard_map(case):
  """On each device by itself, what varies over devices being checked."""
  params, state, _, _ = inputs(case)
  xs = np.stack([draw(case.shape, jnp.bfloat16, seed=i) for i in range(8)])
  apply = train(case)

  def loss(params, x):
    return (apply(params, state, x, None)[0] * x).sum()

  def total(params, xs):
    each = jax.shard_map(
      lambda params, x: loss(params, x[0])[None],
      mesh=jax.make_mesh((8,), ('d',), axis_types=(AxisType.Auto,)),
      in_specs=(P(), P('d')),
      out_specs=P('d'),
    )(params, xs)
    return each.astype(jnp.float32).sum()

  found = jax.jit(jax.grad(total))(params, xs)
  alone = jax.jit(jax.grad(loss))
  each = [alone(params, x) for x in np.asarray(xs)]
  assert_close(found, jax.tree.map(lambda *a: np.sum(a, 0), *each), 0.02)


# What they add to x, or multiply it by, grows with it.
GROWING = nk.GlobalResponseNorm, nk.GatedRMSNorm


def alone(case):
  """Whether no other row is of the same norm."""
  return sum(type(c.transform) is type(case.transform) for c in CASES) == 1


@rows(
  [row for row in DERIVATIVES if row in NORMS],
  first=('batch_norm',).__contains__,
)
def test_check_norm(case):
  x, grows = draw(case.shape), isinstance(case.transform, GROWING)
  testing.check_norm(case.transform, x, case.reference, normalizes=not grows)


CHECKS = (
  testing.check_shapes,
  testing.check_state,
  testing.check_traces,
  testing.check_mask,
)
# Gradients with a mask are held by `test_gradients_masked` too.
COSTLY = (testing.check_transformations,), (testing.check_gradients,), ()
MASKED = [row for row in DERIVATIVES if row not in NORMS or alone(row[1])]


@rows(
  [(*row, 0 if row in NORMS else turn % 3) for turn, row in enumerate(MASKED)],
  first=('rms_norm_first_axis',).__contains__,
)
def test_check_norm_masked(case, turn):
  """Each norm and each of its options; at the costly checks these take turns.

  Norms with a mask are transformed.
  """
  x, where = draw(case.shape), draw_mask(case.shape)
  testing.check_init(case.transform, x)
  for check in (*CHECKS, *COSTLY[turn]):
    check(case.transform, x, where=where)
  if not isinstance(case.transform, GROWING):
    testing.check_normalized(case.transform, x, where=where)
  testing.check_values(case.transform, x, case.reference, where=where)


# Options without a state are scanned by `check_norm`.
SCANNED = [
  row
  for row in ROWS
  if row in NORMS or isinstance(row[1].transform, nk.BatchNorm | nk.BatchRenorm)
]


@rows(SCANNED, first=is_one_each, every=4)
def test_steps_under_scan(case):
  params, first, _, _ = inputs(case)
  xs = np.stack([draw(case.shape, seed=i) for i in range(4)])
  masks = np.stack([draw_mask(case.shape, seed=i) for i in range(4)])
  apply = train(case)

  def body(state, step):
    y, state = apply(params, state, *step)
    return state, y

  last, ys = jax.lax.scan(body, first, (xs, masks))
  state = first
  for x, where, y in zip(xs, masks, ys, strict=True):
    desired, state = case.reference(params, state, x, True, where)
    assert_close(y, desired)
  assert_close(last, state)


@rows(AVERAGES)
def test_weights_of_averages(case):
  """A feature's average weighs the batches that held it, and no others."""
  params, state, _, _ = inputs(case)
  apply = train(case)
  seen = []
  for seed in range(4):
    x, where = draw(case.shape, seed=seed), draw_mask(case.shape, seed=seed)
    where = np.array(where)
    where[..., 0], where[..., 1] = seed == 2, seed < 2
    _, state = apply(params, state, x, where)
    seen.append(case.reference.batch(x, where))
  keep = 1 if case.transform.momentum is None else case.transform.momentum
  for feature, updates in enumerate((1, 2, 4)):
    mean, var, _ = np.transpose(
      [[part[feature] for part in batch] for batch in seen if batch[2][feature]]
    )
    weights = keep ** np.arange(updates)[::-1]
    assert state.count[feature] == updates
    assert_close(state.mean[feature], np.average(mean, weights=weights))
    assert_close(state.var[feature], np.average(var, weights=weights))
