"""Comparing trees of arrays: to the last bit, or as their dtypes allow.

What differs is told in a sentence that names the leaf: 'state.mean'.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit._types import ArrayLike


def wide(x: ArrayLike) -> np.ndarray[Any, Any]:
  """An array as float64 or complex128."""
  return np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)


def leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their names."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = jax.tree_util.keystr
  return {name(p, simple=True, separator='.') or 'it': v for p, v in paths}


def assert_forms(actual: Any, expected: Any, *, dtypes: bool = True) -> None:
  """Asserts the same structure and shapes, and dtypes unless told not to."""
  found, wanted = leaves(actual), leaves(expected)
  if found.keys() != wanted.keys():
    raise AssertionError(
      f'the arrays are {_listed(found)}, where {_listed(wanted)} should be.'
    )
  is_, due = str(jax.tree.structure(actual)), str(jax.tree.structure(expected))
  if is_ != due:
    raise AssertionError(f'the structure is {is_}, where {due} should be.')
  kinds = ('shape', 'dtype') if dtypes else ('shape',)
  for name, leaf in found.items():
    for kind in kinds:
      both = [getattr(_formed(a), kind) for a in (leaf, wanted[name])]
      if both[0] != both[1]:
        raise AssertionError(f'{name} has the {kind} {both[0]}, not {both[1]}.')


def assert_equal(actual: Any, expected: Any) -> None:
  """Asserts the same structure, shapes, dtypes and values."""
  assert_forms(actual, expected)
  _assert_values(actual, expected, 0, 0)


def assert_close(
  actual: Any, expected: Any, rtol: float | None, atol: float | None
) -> None:
  """Asserts the same structure and shapes, and values as the dtype allows."""
  assert_forms(actual, expected, dtypes=False)
  _assert_values(actual, expected, rtol, atol)


def assert_finite(tree: Any) -> None:
  """Asserts that no number is infinite or NaN."""
  for name, leaf in leaves(tree).items():
    values = wide(leaf)
    if not np.isfinite(values).all():
      index = _first(~np.isfinite(values))
      raise AssertionError(
        f'{name} is {values[index]}{_at(index)}: not finite.'
      )


def _assert_values(
  actual: Any, expected: Any, rtol: float | None, atol: float | None
) -> None:
  wanted = leaves(expected)
  for name, leaf in leaves(actual).items():
    tolerance = _tolerance(_formed(leaf).dtype)
    found, due = wide(leaf), wide(wanted[name])
    differ = ~np.isclose(
      found,
      due,
      rtol=tolerance if rtol is None else rtol,
      atol=tolerance if atol is None else atol,
      equal_nan=True,
    )
    if differ.any():
      index = _first(differ)
      raise AssertionError(
        f'{name} is {found[index]:.6g}{_at(index)}, not {due[index]:.6g}; '
        f'{differ.sum()} of {differ.size} values differ.'
      )


def _formed(leaf: Any) -> Any:
  return leaf if hasattr(leaf, 'dtype') else jnp.asarray(leaf)


def _listed(names: dict[str, Any]) -> str:
  return ', '.join(names) or 'none'


def _first(where: np.ndarray[Any, Any]) -> tuple[int, ...]:
  """The first index at which an array is True."""
  return tuple(np.argwhere(where)[0].tolist())


def _at(index: tuple[int, ...]) -> str:
  return f' at index {index}' if index else ''


def _tolerance(dtype: Any) -> float:
  """Two roundings of the output, or rounding errors of a long float32 sum."""
  if not jnp.issubdtype(dtype, jnp.inexact):
    return 0
  sums = jnp.promote_types(dtype, jnp.float32)
  return max(2 * float(jnp.finfo(dtype).eps), 128 * float(jnp.finfo(sums).eps))
