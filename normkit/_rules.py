"""What rules of derivatives have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero


def moved(tangents: Sequence[Any]) -> list[int]:
  """Which of the tangents of a rule are not known to be zero."""
  return [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]


def along(
  function: Callable[..., Any],
  primals: Sequence[Any],
  moved: Sequence[int],
  tangents: Sequence[Any],
) -> tuple[Any, Any]:
  """`jax.jvp` in some of the arguments, the others as they are.

  Args:
    function: of all of `primals`.
    primals: arguments, of which those that do not move may be anything.
    moved: the positions of those that move.
    tangents: of these, in turn.

  Returns:
    What the function returns, and how it changes.
  """

  def of_moved(*values: Any) -> Any:
    new = dict(zip(moved, values, strict=True))
    return function(*(new.get(i, p) for i, p in enumerate(primals)))

  given = tuple(primals[i] for i in moved), tuple(tangents)
  found: tuple[Any, Any] = jax.jvp(of_moved, *given)
  return found
