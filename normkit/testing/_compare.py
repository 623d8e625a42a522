"""Comparing trees of arrays: to the last bit, or as their dtypes allow."""

from typing import Any

import chex  # type: ignore[import-untyped]
import jax.numpy as jnp
import numpy as np

from normkit._types import Array, ArrayLike


def wide(x: ArrayLike) -> np.ndarray[Any, Any]:
  """An array as float64 or complex128."""
  return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def assert_equal(actual: Any, expected: Any) -> None:
  """Asserts the same structure, shapes, dtypes and values."""
  chex.assert_trees_all_equal_structs(actual, expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_equal(actual, expected)


def assert_close(
  actual: Any, expected: Any, rtol: float | None, atol: float | None
) -> None:
  """Asserts the same structure and shapes, and values as the dtype allows."""

  def close(a: Array, b: Array) -> bool:
    tolerance = _tolerance(a.dtype)
    return np.allclose(
      wide(a),
      wide(b),
      tolerance if rtol is None else rtol,
      tolerance if atol is None else atol,
      equal_nan=True,
    )

  chex.assert_trees_all_equal_structs(actual, expected)
  chex.assert_trees_all_equal_shapes(actual, expected)
  chex.assert_trees_all_equal_comparator(
    close, lambda a, b: f'{a} is not close to {b}', actual, expected
  )


def _tolerance(dtype: Any) -> float:
  """Two roundings of the output, or rounding errors of a long float32 sum."""
  if not jnp.issubdtype(dtype, jnp.inexact):
    return 0
  sums = jnp.promote_types(dtype, jnp.float32)
  return max(2 * float(jnp.finfo(dtype).eps), 128 * float(jnp.finfo(sums).eps))
