"""Numbers over the seeds: in tables, in words, and whether they differ.

A difference is called clear where it is more than three times its standard
error over the seeds, which are compared one by one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.table import Table

ERRORS = 3
Numbers = Sequence[float] | np.ndarray


def spread(values: Numbers, digits: int = 1) -> str:
  """Mean ± standard deviation; of one value, that."""
  values = np.asarray(values, float)
  mean = f'{values.mean():.{digits}f}'
  if values.size < 2:
    return mean
  return f'{mean} ± {values.std(ddof=1):.{digits}f}'


def reach(values: Numbers) -> str:
  """The least and the largest value."""
  return f'{np.min(values):.1f} to {np.max(values):.1f}'


def is_clear(changes: np.ndarray) -> bool:
  """Whether the mean change is more than `ERRORS` standard errors."""
  return bool(abs(changes.mean()) > ERRORS * standard_error(changes))


def difference(new: Numbers, old: Numbers, digits: int = 1) -> str:
  """The mean difference ± its standard error in points, and if it is clear."""
  changes = np.asarray(new, float) - np.asarray(old, float)
  error = standard_error(changes)
  clear = 'clear' if is_clear(changes) else 'not clear'
  return f'{changes.mean():+.{digits}f} ± {error:.{digits}f} points, {clear}'


def standard_error(values: np.ndarray) -> float:
  return float(values.std(ddof=1) / len(values) ** 0.5)


def tell(lines: Iterable[str], small: bool) -> None:
  """Prints what a run found; a small run passes no verdict."""
  lines = list(lines)
  if not small:
    print('\n'.join(lines))


def table(title: str, left: Sequence[str], right: Sequence[Any]) -> Table:
  """An empty table: columns of words, and columns of numbers."""
  made = Table(*left, title=title)
  for name in right:
    made.add_column(str(name), justify='right')
  return made
