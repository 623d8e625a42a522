"""What a norm makes anew at each call is traced once, and never mistaken."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normkit as nk
from normkit.closures import Closure, traced_once

X = np.arange(6, dtype=np.float32).reshape(2, 3)


class Log:
  """What was traced; two of them are never equal."""

  def __init__(self):
    self.traced = []


def adding(number, log):
  def run(x):
    log.traced.append(number)
    return x + number

  return run


def test_once_for_each_value():
  log = Log()
  for number in (1, 2, 1, 2):
    np.testing.assert_array_equal(
      traced_once(adding(number, log), X), X + number
    )
  assert log.traced == [1, 2]


def test_another_platform_is_another_program():
  log = Log()
  for _ in range(2):
    traced_once(adding(1, log), X)
    with nk.for_platform('tpu'):
      traced_once(adding(1, log), X)
  assert log.traced == [1, 1]


@pytest.mark.parametrize('number', [np.ones(3, np.float32), [1.0], {}])
def test_what_has_no_hash_is_called_as_it_is(number):
  log, other = Log(), number

  def run(x):
    log.traced.append(other)
    return x

  for _ in range(2):
    assert traced_once(run, X) is X
  assert len(log.traced) == 2


def test_functions_inside_count_by_what_they_hold():
  def outer(number):
    def inner(x):
      return x * number

    return Closure(lambda x: inner(x) + 1)

  assert outer(2) == outer(2)
  assert hash(outer(2)) == hash(outer(2))
  assert outer(2) != outer(3)
  assert outer(2) != 2

  def with_default(number):
    return Closure(lambda x, n=number: x * n)

  assert with_default(2) == with_default(2)
  assert with_default(2) != with_default(3)


@pytest.mark.parametrize(
  'norm',
  [
    nk.BatchNorm(),
    nk.GroupNorm(num_groups=3),
    nk.LayerNorm(),
    nk.EvoNormB0(),
    nk.GatedRMSNorm(),
    nk.StreamingNorm(),
  ],
  ids=lambda n: type(n).__name__,
)
def test_a_norm_of_one_shape_is_traced_once(norm):
  """A model of ten norms holds one program, and ten calls of it."""
  x = jnp.ones((4, 5, 6))
  params, state = norm.init(x)

  def model(params, x):
    for _ in range(10):
      x, _ = norm.apply(params, state, x, train=True)
    return x.sum()

  for function in (model, jax.grad(model)):
    text = jax.jit(function).lower(params, x).as_text()
    assert text.count('sqrt') < 10, type(norm).__name__


def test_options_are_told_apart():
  """Alike but for an option, one after the other."""
  for epsilon in (0.0, 3.0):
    for axis in (-1, -2):
      y = nk.l2_norm(X + 1, axis=axis, epsilon=epsilon)
      want = (X + 1) / np.sqrt(
        ((X + 1) ** 2).sum(axis, keepdims=True) + epsilon
      )
      chex.assert_trees_all_close(np.asarray(y), want, rtol=1e-6)
