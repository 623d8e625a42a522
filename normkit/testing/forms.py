"""Structures, shapes and dtypes of what a norm takes and returns."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit._types import Array, ArrayLike
from normkit.norm import Norm
from normkit.testing._calls import applied, doing, start, times
from normkit.testing._compare import (
  assert_close,
  assert_equal,
  assert_finite,
  assert_forms,
  leaves,
  wide,
)
from normkit.testing.assertions import assert_state_unchanged


def check_init(transform: Norm, x: ArrayLike) -> None:
  """Checks that `init` takes an array and its shape alike.

  Args:
    transform, x: as `check_norm` takes them.

  Raises:
    AssertionError: if parameters or state differ between the two.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_init(nk.BatchNorm(), jnp.ones((4, 6)))
  """
  x = jnp.asarray(x)
  with doing(transform, 'init of a jax.ShapeDtypeStruct and of an array'):
    from_shape = transform.init(jax.ShapeDtypeStruct(x.shape, x.dtype))
    names = 'params', 'state'
    from_array = dict(zip(names, transform.init(x), strict=True))
    assert_equal(dict(zip(names, from_shape, strict=True)), from_array)


def check_shapes(
  transform: Norm, x: ArrayLike, *, where: ArrayLike | None = None
) -> None:
  """Checks that y has the shape and dtype of x, finite, as `eval_shape` says.

  A transform with a field `dtype` that is not None gives y in that dtype.

  Args:
    transform, x, where: as `check_norm` takes them.

  Raises:
    AssertionError: if a shape or dtype is another, or a value is not finite.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_shapes(nk.LayerNorm(), jnp.ones((4, 6), jnp.bfloat16))
  """
  x = jnp.asarray(x)
  params, state = start(transform, x)
  dtype = getattr(transform, 'dtype', None)
  for train in (True, False):
    apply = applied(transform, train)
    with doing(transform, f'shapes with train={train}'):
      out = apply(params, state, x, where)
      like = jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype)
      assert_forms({'y': out['y']}, {'y': like})
      assert_finite(out)
      assert_forms(jax.eval_shape(apply, params, state, x, where), out)


def check_state(
  transform: Norm,
  x: ArrayLike,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks the state: moved by training, used in evaluation, stable in form.

  In evaluation it stays as it is, y follows it, and an example, along the first
  axis of x, does not feel the others: their statistics are not used. A norm
  that has no state may normalize as it likes.

  Args:
    transform, x, where, rtol, atol: as `check_norm` takes them.

  Raises:
    AssertionError: if a step changes the structure, a shape or a dtype of the
      state, or leaves an array of it as it was, if `train=False` changes it at
      all or does not use it, or if steps under `jax.lax.scan` differ from steps
      one by one.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> from normkit import testing
    >>> testing.check_state(nk.BatchNorm(), jnp.ones((4, 6)))
  """
  x = jnp.asarray(x)
  params, first = start(transform, x)
  with doing(transform, 'state after train=False'):
    out = applied(transform, train=False)(params, first, x, where)
    assert_state_unchanged(first, out['state'])
    _check_evaluation(transform, params, first, x, where, out['y'])
  xs, ys, state = [x, times(-1, x), times(2, x)], [], first
  apply = applied(transform, train=True)
  with doing(transform, 'state after train=True'):
    for step in xs:
      y, state = apply(params, state, step, where).values()
      ys.append(y)
      assert_forms({'state': state}, {'state': first})
    _check_moved(first, state)

  def body(state: Any, step: Array) -> tuple[Any, Array]:
    y, state = apply(params, state, step, where).values()
    return state, y

  with doing(transform, 'three steps under jax.lax.scan'):
    last, scanned = jax.lax.scan(body, first, jax.device_put(np.stack(xs)))
    expected = {'y': np.stack(ys), 'state': state}
    assert_close({'y': scanned, 'state': last}, expected, rtol, atol)


def _check_moved(before: Any, after: Any) -> None:
  """Raises if three steps left an array of the state as it was."""
  moved = leaves({'state': after})
  for name, leaf in leaves({'state': before}).items():
    if np.array_equal(leaf, moved[name]):
      raise AssertionError(
        f'{name} is what it was before three steps of training on other '
        'inputs. Return what training makes of it, or do without it.'
      )


def _check_evaluation(
  transform: Norm, params: Any, state: Any, x: Array, where: Any, y: Array
) -> None:
  """Raises if y, the output in evaluation, is of the batch's statistics."""
  if not any(
    jnp.issubdtype(a.dtype, jnp.inexact) for a in jax.tree.leaves(state)
  ):
    return
  evaluate = applied(transform, train=False)
  other = jax.tree.map(lambda a: times(2, a, 1), state)
  if np.array_equal(evaluate(params, other, x, where)['y'], y):
    raise AssertionError(
      'y is the same whatever the state holds. Evaluation must normalize by '
      'the statistics in the state, not by those of the batch.'
    )
  others = np.where(np.arange(len(x)) > 0, -3, 1)
  others = others.reshape(-1, *[1] * (x.ndim - 1))
  alone = evaluate(params, state, times(others, x), where)['y']
  if not np.allclose(wide(alone[:1]), wide(y[:1]), 1e-2, 1e-2, equal_nan=True):
    raise AssertionError(
      'the output for the first example, along axis 0, changes with the other '
      'examples. Evaluation must not use the statistics of the batch.'
    )
