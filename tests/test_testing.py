"""Norms broken on purpose: each check of normkit.testing fails and says why."""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

from cases import draw, draw_mask
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiers import second_tier

import normkit as nk
from normkit import testing

X = draw((6, 4))
CHECKS = [n for n in dir(testing) if n.startswith('check_')]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spoilt(nk.BatchNorm):
  """Batch norm whose y and state become `spoil(y, state, x, where, train)`."""

  spoil: Callable[..., tuple[Any, Any]]

  def apply(self, params, state, x, *, train, where=None):
    y, state = super().apply(params, state, x, train=train, where=where)
    return self.spoil(y, state, x, where, train)


def spoilt_y(function):
  """Batch norm whose y becomes `function(y, x)`."""
  return Spoilt(spoil=lambda y, state, x, *_: (function(y, x), state))


def spoilt_state(**fields):
  """Batch norm with functions of its state and x in place of some fields."""

  def spoil(y, state, x, where, train):
    new = {name: f(state, x) for name, f in fields.items() if train}
    return y, state._replace(**new)

  return Spoilt(spoil=spoil)


class ReadsValues(nk.BatchNorm):
  def init(self, x):
    return super().init(x - x.mean())


class StartsAtX(nk.BatchNorm):
  def init(self, x):
    params, state = super().init(x)
    if isinstance(x, jax.Array):
      state = state._replace(mean=x[0])
    return params, state


class NotHashable(nk.BatchNorm):
  __hash__ = None


class EqualToItselfAlone(nk.BatchNorm):
  __eq__ = object.__eq__
  __hash__ = object.__hash__


class NoMask(nk.BatchNorm):
  """Counts what is masked."""

  def apply(self, params, state, x, *, train, where=None):
    return super().apply(params, state, x, train=train)


class EvaluatesByBatch(nk.BatchNorm):
  """Moves the state, and never uses it."""

  def apply(self, params, state, x, *, train, where=None):
    y, new = super().apply(params, state, x, train=True, where=where)
    return y, new if train else state


@dataclasses.dataclass(frozen=True)
class Without(nk.LayerNorm):
  """Takes a parameter that it does not use."""

  unused: str

  def apply(self, params, state, x, *, train, where=None):
    params = params._replace(**{self.unused: None})
    norm = nk.LayerNorm(**{f'use_{self.unused}': False})
    return norm.apply(params, state, x, train=train, where=where)


class MultipliesByMask(nk.LayerNorm):
  """Zero times NaN is NaN."""

  def apply(self, params, state, x, *, train, where=None):
    x = x if where is None else x * where
    return super().apply(params, state, x, train=train)


@jax.custom_jvp
def doubled_derivative(y):
  return y


@doubled_derivative.defjvp
def _(primals, tangents):
  return primals[0], 2 * tangents[0]


@jax.custom_vjp
def no_forward_mode(y):
  return y


no_forward_mode.defvjp(lambda y: (y, None), lambda _, dy: (dy,))


@jax.custom_batching.custom_vmap
def other_under_vmap(y):
  return y


@other_under_vmap.def_vmap
def _(axis_size, in_batched, y):
  return y + 1, True


CALLS = itertools.count()

BROKEN = {
  'init-needs-values': (
    'check_init',
    ReadsValues(),
    r'ReadsValues, init of a jax.ShapeDtypeStruct.*AttributeError',
  ),
  'init-uses-values': (
    'check_init',
    StartsAtX(),
    r'StartsAtX, init of a jax.ShapeDtypeStruct.*: state.mean is',
  ),
  'shape': (
    'check_shapes',
    spoilt_y(lambda y, x: y[None]),
    r'shapes with train=True: y has the shape \(1, 6, 4\), not \(6, 4\)',
  ),
  'dtype': (
    'check_shapes',
    spoilt_y(lambda y, x: y.astype(jnp.bfloat16)),
    r'shapes with train=True: y has the dtype bfloat16, not float32',
  ),
  'not-finite': (
    'check_shapes',
    spoilt_y(lambda y, x: y.at[0].set(jnp.inf)),
    r'shapes with train=True: y is inf at index \(0, 0\): not finite',
  ),
  'eval-shape': (
    'check_shapes',
    spoilt_y(lambda y, x: y + 1 if float(x[0, 0]) else y),
    r'shapes with train=True, raised ConcretizationTypeError: ',
  ),
  'state-dtype-drifts': (
    'check_state',
    spoilt_state(mean=lambda state, x: state.mean.astype(jnp.float16)),
    r'state after train=True: state.mean has the dtype float16, not float32',
  ),
  'state-shape-drifts': (
    'check_state',
    spoilt_state(var=lambda state, x: state.var[None]),
    r'state after train=True: state.var has the shape \(1, 4\), not \(4,\)',
  ),
  'state-structure-drifts': (
    'check_state',
    Spoilt(spoil=lambda y, state, *_: (y, tuple(state))),
    r'the state changed: the arrays are 0, 1, 2, where mean, var, count should',
  ),
  'state-changes-in-eval': (
    'check_state',
    Spoilt(spoil=lambda y, state, *_: (y, state._replace(mean=state.mean + 1))),
    r'the state changed: mean is 1 at index \(0,\), not 0; 4 of 4 values',
  ),
  'scan': (
    'check_state',
    Spoilt(
      spoil=lambda y, state, x, where, train: (
        y + next(CALLS) if train else y,
        state,
      )
    ),
    r'three steps under jax.lax.scan: y is .*, not .* values differ',
  ),
  'state-stands-still': (
    'check_state',
    spoilt_state(var=lambda state, x: jnp.ones_like(state.var)),
    r'state after train=True: state.var is what it was before three steps',
  ),
  'batch-statistics-in-evaluation': (
    'check_state',
    EvaluatesByBatch(),
    r'state after train=False: y is the same whatever the state holds',
  ),
  'other-examples-in-evaluation': (
    'check_state',
    spoilt_y(lambda y, x: y - 0.1 * x.mean(0, keepdims=True)),
    r'state after train=False: the output for the first example.*changes with',
  ),
  'not-normalized': (
    'check_normalized',
    spoilt_y(lambda y, x: x - x.mean(0, keepdims=True)),
    r'16 x and of 256 x.*are 16 times as large, so y is not normalized over',
  ),
  'divided-by-variance': (
    'check_normalized',
    spoilt_y(lambda y, x: y / x.std(0, keepdims=True)),
    r'are 0.0625 times as large, so y is not normalized over any axis',
  ),
  'not-traceable': (
    'check_transformations',
    spoilt_y(lambda y, x: y if x.sum() > 0 else -y),
    r'jit with train=True, raised TracerBoolConversionError',
  ),
  'not-hashable': (
    'check_transformations',
    NotHashable(),
    r'jit with the transform as a static argument.*[Hh]ashable',
  ),
  'vmap': (
    'check_transformations',
    spoilt_y(lambda y, x: other_under_vmap(y)),
    r'vmap with train=True: y is .*, not .*48 of 48 values differ',
  ),
  'weak-type': (
    'check_traces',
    spoilt_state(var=lambda state, x: jnp.where(state.var > 0, 1.0, 2.0)),
    r'second call, with the state of the first.*jax.jit traced it again',
  ),
  'unequal-copies': (
    'check_traces',
    EqualToItselfAlone(),
    r'an equal copy as static argument.*jax.jit traced it again',
  ),
  'wrong-gradient': (
    'check_gradients',
    spoilt_y(lambda y, x: doubled_derivative(y)),
    r'derivatives with train=True: the derivative in forward mode is not that',
  ),
  'no-forward-mode': (
    'check_gradients',
    spoilt_y(lambda y, x: no_forward_mode(y)),
    r'derivatives with train=True, raised TypeError.*forward-mode',
  ),
  'gradient-not-finite': (
    'check_gradients',
    spoilt_y(lambda y, x: y + jnp.sqrt(x - x)),
    r'gradients with train=True: gradient of x is .*: not finite',
  ),
  'scale-unused': (
    'check_gradients',
    Without('scale'),
    r'gradients with train=True: params.scale changes nothing',
  ),
  'bias-unused': (
    'check_gradients',
    Without('bias'),
    r'gradients with train=True: params.bias changes nothing',
  ),
  'checkpoint': (
    'check_gradients',
    spoilt_y(lambda y, x: y * (1 + next(CALLS))),
    r'gradients under checkpoint with train=True: gradient of .* values differ',
  ),
  'mask-ignored': (
    'check_mask',
    NoMask(),
    r'0.0 in masked elements and train=True: gradient of masked x is .*, not 0',
  ),
  'mask-leaks-nan': (
    'check_mask',
    MultipliesByMask(),
    r'with nan in masked elements and train=True: .* is nan at .*: not finite',
  ),
  'mask-leaks-into-state': (
    'check_mask',
    spoilt_state(
      mean=lambda state, x: state.mean + jax.lax.stop_gradient(x.sum(0))
    ),
    r'with -3.0 in masked elements and train=True: state.mean is',
  ),
  'mask-leaks-into-gradient': (
    'check_mask',
    Spoilt(
      spoil=lambda y, state, x, where, train: (
        jnp.where(where, y, jnp.nan_to_num(x).sum()),
        state,
      )
    ),
    r'with 0.0 in masked elements and train=True: gradient of masked x is',
  ),
}


@pytest.mark.parametrize(
  ('check', 'transform', 'message'), BROKEN.values(), ids=BROKEN
)
def test_fails(check, transform, message):
  with pytest.raises(AssertionError, match=message) as caught:
    getattr(testing, check)(transform, X)
  assert str(caught.value).count('\n') == 0, 'a sentence, no dump'


def test_pmap_fails(monkeypatch):
  monkeypatch.setattr(jax, 'pmap', lambda f: lambda xs: jax.vmap(f)(xs + 1))
  with pytest.raises(
    AssertionError, match=r'(?s)pmap with train=True: state.mean is'
  ):
    testing.check_transformations(nk.BatchNorm(), X)


def test_no_pmap_on_one_device(monkeypatch):
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
  monkeypatch.delattr(jax, 'pmap')
  testing.check_transformations(nk.LayerNorm(), X)


def test_mask_that_masks_nothing():
  with pytest.raises(ValueError, match='masks nothing'):
    testing.check_mask(nk.LayerNorm(), X, where=jnp.ones(4, bool))


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'epsilon': 0.1}, 'step 0 with train=True: y is'),
    ({'momentum': 0.9}, 'step 0 with train=True: state.mean is'),
    ({'momentum': 0.99, 'debias': True}, 'step 0 .*: state.mean is'),
  ],
)
def test_values_fail(wrong, message):
  with pytest.raises(AssertionError, match=f'(?s){message}'):
    testing.check_values(nk.BatchNorm(**wrong), X, reference.batch_norm())


def test_values_fail_after_a_step():
  """Cumulative and debiased averages part at the second step."""
  cumulative = nk.BatchNorm(momentum=None)
  debiased = reference.batch_norm(momentum=0.5, debias=True)
  with pytest.raises(
    AssertionError, match=r'step 1 with train=True: state\.mean is'
  ):
    testing.check_values(cumulative, X, debiased)


def test_tolerance():
  """Given, it holds; not given, it follows the dtype."""
  wrong = reference.layer_norm(epsilon=1e-4)
  testing.check_values(nk.LayerNorm(), X, wrong, rtol=1e-3, atol=1e-3)
  testing.check_values(nk.LayerNorm(), X.astype(jnp.bfloat16), wrong)
  with pytest.raises(AssertionError, match='values differ'):
    testing.check_values(nk.LayerNorm(), X, wrong)


@pytest.mark.parametrize('name', [n for n in CHECKS if n != 'check_norm'])
def test_check_norm_runs(name, monkeypatch):
  """Each check of the module, and hands it the mask."""
  calls = []
  for check in CHECKS:
    if check != 'check_norm':
      monkeypatch.setattr(testing.norm, check, lambda *args, **options: None)
  monkeypatch.setattr(
    testing.norm, name, lambda *args, **options: calls.append((args, options))
  )
  where = draw_mask(X.shape)
  testing.check_norm(nk.LayerNorm(), X, reference.layer_norm(), where=where)
  ((args, options),) = calls
  assert args[:2] == (nk.LayerNorm(), X)
  assert name == 'check_init' or options['where'] is where


@pytest.mark.parametrize(
  ('dtype', 'output'),
  [
    second_tier(jnp.bfloat16, None),
    second_tier(jnp.complex64, None),
    (jnp.float32, jnp.bfloat16),
  ],
)
def test_gradients_of_other_dtypes(dtype, output):
  """Narrow inputs are widened for differences; narrow outputs have none."""
  testing.check_gradients(nk.LayerNorm(dtype=output), draw((6, 4), dtype))


NORMALIZED = np.array([[-1.0, 1.0, 5.0], [1.0, -1.0, 5.0]])
ONLY = np.array([True, True, False])


def test_assert_normalized():
  testing.assert_normalized(NORMALIZED[:, :2], -1)
  testing.assert_normalized(NORMALIZED, 1, where=ONLY)
  testing.assert_normalized(NORMALIZED, 0, where=ONLY)
  testing.assert_normalized(
    NORMALIZED * 2 + 3, (0, 1), where=ONLY, mean=3, var=4
  )
  testing.assert_normalized(jnp.ones((2, 3), jnp.bfloat16), -1, mean=None)
  testing.assert_normalized(np.array([1, -1, 1j, -1j]), 0)


@pytest.mark.parametrize(
  ('y', 'options', 'message'),
  [
    (
      NORMALIZED,
      {},
      r'axis=-1: its mean is 1.66667 at index \(0, 0\), not 0.0',
    ),
    (NORMALIZED[:, :2] * 2, {}, 'its variance is 4 at index'),
    (NORMALIZED[:, :2] * 1.01, {'atol': 0.02}, 'its variance is 1.0201'),
    (NORMALIZED[:, :2], {'mean': 1.0}, 'its mean is 0 at index'),
    (np.array([[1.0, -1.0], [np.nan, 1.0]]), {}, r'nan at index \(1, 0\)'),
    (NORMALIZED, {'where': np.zeros((2, 3), bool)}, 'has no element'),
  ],
)
def test_assert_normalized_fails(y, options, message):
  with pytest.raises(AssertionError, match=message):
    testing.assert_normalized(y, -1, **options)


STATE = nk.BatchNormState(jnp.zeros(2), jnp.ones(2), jnp.zeros(2, jnp.int32))


def test_assert_state_unchanged():
  testing.assert_state_unchanged(STATE, jax.tree.map(jnp.copy, STATE))
  not_a_number = {'mean': jnp.array(jnp.nan)}
  testing.assert_state_unchanged(not_a_number, not_a_number)


@pytest.mark.parametrize(
  ('after', 'message'),
  [
    (STATE._replace(mean=STATE.mean + 1e-9), 'mean'),
    (
      STATE._replace(count=STATE.count.astype(jnp.int16)),
      'count has the dtype int16',
    ),
    (STATE._replace(var=jnp.ones(1)), r'var has the shape \(1,\), not \(2,\)'),
    (nk.EmptyState(), 'the arrays are none, where mean, var, count should be'),
  ],
)
def test_assert_state_unchanged_fails(after, message):
  with pytest.raises(
    AssertionError, match=f'(?s)the state changed:.*{message}'
  ):
    testing.assert_state_unchanged(STATE, after)
