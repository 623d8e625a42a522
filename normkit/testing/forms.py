"""Structures, shapes and dtypes of what a norm takes and returns."""

from typing import Any

import chex  # type: ignore[import-untyped]
import jax
import jax.numpy as jnp

from normkit._types import Array, ArrayLike
from normkit.norm import Norm
from normkit.testing._calls import applied, doing, start
from normkit.testing._compare import assert_close, assert_equal
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
    assert_equal(from_shape, transform.init(x))


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
      chex.assert_shape(out['y'], x.shape)
      chex.assert_type(out['y'], x.dtype if dtype is None else dtype)
      chex.assert_tree_all_finite(out)
      chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(apply, params, state, x, where), out
      )


def check_state(
  transform: Norm,
  x: ArrayLike,
  *,
  where: ArrayLike | None = None,
  rtol: float | None = None,
  atol: float | None = None,
) -> None:
  """Checks the state: stable in form, carried by scan, left alone in eval.

  Args:
    transform, x, where, rtol, atol: as `check_norm` takes them.

  Raises:
    AssertionError: if a step changes the structure, a shape or a dtype of the
      state, if `train=False` changes it at all, or if steps under
      `jax.lax.scan` differ from steps one by one.

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
  xs, ys, state = jnp.stack([x, -x, 2 * x]), [], first
  apply = applied(transform, train=True)
  with doing(transform, 'state after train=True'):
    for step in xs:
      y, state = apply(params, state, step, where).values()
      ys.append(y)
      chex.assert_trees_all_equal_structs(first, state)
      chex.assert_trees_all_equal_shapes_and_dtypes(first, state)

  def body(state: Any, step: Array) -> tuple[Any, Array]:
    y, state = apply(params, state, step, where).values()
    return state, y

  with doing(transform, 'three steps under jax.lax.scan'):
    last, scanned = jax.lax.scan(body, first, xs)
    expected = {'y': jnp.stack(ys), 'state': state}
    assert_close({'y': scanned, 'state': last}, expected, rtol, atol)
