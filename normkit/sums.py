"""Means of sets by the sums of the platform: one read of x for several of them.

What XLA writes out, or reads twice, differs between platforms and sizes.
"""

from collections.abc import Callable, Sequence
import functools
import math
import sys

from jax import lax
import jax.numpy as jnp
import numpy as np

from normkit import _ops, _types, platforms
from normkit._primitives import Sizes
from normkit._types import Array, DType
from normkit.sets import Sets, kind_of

Form = Callable[..., list[Array]]

# On a CPU: up to so many elements rows are summed by halves, and images at
# once; fewer than so many rows by lanes. Above which length rows are halved,
# and which are short; how many lanes there are, at most and least.
SMALL, ROWS = 2**12, 2**12
WINDOW, SHORT, LANES, FEW_LANES = 32, 63, 16, 4
# What fits in a GPU's cache, of elements, XLA writes out there. A line of an
# image has LEAST elements or more; an axis by itself has LINES of LINE or more.
CACHED, LEAST, LINE, LINES = 2**24, 24, 64, 16


def means_by_platform(
  sets: Sets, given: DType | None, count: Array, *values: Array
) -> list[Array]:
  """`sets.means`, by the sums of the platform; `given` as in `centred`."""
  x = values[0]
  forms: dict[str, tuple[Form, range]] = {}
  if given == x.dtype == jnp.float32 and _has_lines(x, sets):
    forms['cuda alone'] = _sums_by_lines, range(CACHED)
  if x.dtype == jnp.float32:
    forms |= _on_a_cpu(x, sets)
  if not forms:
    return sets.means(count, *values)
  sizes = {name: Sizes(elements) for name, (_, elements) in forms.items()}
  runs = {name: functools.partial(f, sets) for name, (f, _) in forms.items()}
  runs['default'] = functools.partial(_sums, sets)
  kinds = [kind_of(x, sets, x.dtype)] * len(values)

  def sums(*values: Array) -> list[Array]:
    totals: list[Array] = platforms.dependent(runs, values, kinds, sizes=sizes)
    return totals

  return sets.means(count, *values, sums=sums)


def _sums(sets: Sets, *values: Array) -> list[Array]:
  return [sets.sum(v) for v in values]


def _on_a_cpu(x: Array, sets: Sets) -> dict[str, tuple[Form, range]]:
  """Forms for one CPU, of several sums, and for how many elements each is."""
  if not all(map(_types.is_known, x.shape)) or not sets.axes:
    return {}
  if sets.are_rows(x):
    if x.shape[-1] <= SHORT:
      return {'cpu alone': (sums_at_once, range(sys.maxsize))}
    return {
      'cpu small alone': (sums_at_once, range(SMALL + 1)),
      'cpu alone': (_sums_of_long_rows, range(end_of_lanes(x.shape[-1]))),
    }
  forms = {}
  if not sets.hold_a_batch:
    forms['cpu small alone'] = sums_at_once, range(SMALL + 1)
  start, stop = _last_axes(sets)
  if _lanes(math.prod(x.shape[start:stop])) >= FEW_LANES:
    forms['cpu alone'] = _sums_by_lanes, range(SMALL + 1, sys.maxsize)
  return forms


def end_of_lanes(row: int) -> int:
  """Below how many elements a CPU sums rows by a form of its own.

  From ROWS rows on, unless they are short, XLA calls a library for all of a
  norm, which takes less than what is left to do around these forms.
  """
  return sys.maxsize if row <= SHORT else ROWS * row


def sums_at_once(sets: Sets, *values: Array) -> list[Array]:
  """The sums of each set, for one CPU, of several values by one loop.

  Each addition waits for the one before it, unless that belongs to another sum:
  a step of layer norm of 50 x 48 takes .87 of Flax's time, and 1.07 without;
  forward instance norm of 2 x 12 x 12 x 8 .94, and 1.3. Of several devices each
  may hold but a part of a set.
  """
  axes, parts = sets.axes, [*values]
  if sets.groups is not None:
    shape = [*values[0].shape]
    at = sets.channel
    shape[at : at + 1] = sets.groups, shape[at] // sets.groups
    parts = [lax.reshape(v, shape) for v in values]
    axes = *[a + (a > at) for a in axes], at + 1
  elif sets.are_rows(values[0]):
    parts = _halved(values)
  return [lax.expand_dims(t, sets.axes) for t in _totals(parts, axes)]


def sums_of_rows(*values: Array) -> list[Array]:
  """The same of rows, for one CPU, in the form for as many elements."""
  x = values[0]
  is_long = x.size > SMALL and x.shape[-1] > SHORT
  sums = _sums_of_long_rows if is_long else sums_at_once
  return sums(Sets((x.ndim - 1,)), *values)


def _sums_of_long_rows(sets: Sets, *values: Array) -> list[Array]:
  """The same by lanes; of a size that has too few, the rest at once."""
  at = sets.axes[0]
  size = values[0].shape[at]
  if _lanes(size) >= LANES // 2:
    return _sums_by_lanes(sets, *values)
  cut = size - size % LANES, size % LANES
  wholes, rests = zip(*(lax.split(v, cut, at) for v in values), strict=True)
  return _added(_sums_by_lanes(sets, *wholes), sums_at_once(sets, *rests))


def _sums_by_lanes(sets: Sets, *values: Array) -> list[Array]:
  """The same, along the last axes of each set in parts, by one loop for all.

  XLA would write x - pivot out, and read it again for each of the sums. Forward
  layer norm of 512 x 768 takes 1.0 of Flax's time so, and 1.5 without; batch
  norm of 64 x 14 x 14 x 512 .9, and 1.7.
  """
  start, stop = _last_axes(sets)
  shape = values[0].shape
  size = math.prod(shape[start:stop])
  lanes = _lanes(size)
  is_row = math.prod(shape[stop:]) == 1
  split = (lanes, size // lanes) if is_row else (size // lanes, lanes)
  parts = (*shape[:start], *split, *shape[stop:])
  ones = [1] * (stop - start - 1)
  whole = (*shape[:start], size // lanes, *ones, *shape[stop:])
  axis = start if is_row else start + 1
  totals = _totals([lax.reshape(v, parts) for v in values], (axis,))
  return [sets.sum(lax.reshape(t, whole)) for t in totals]


def _last_axes(sets: Sets) -> tuple[int, int]:
  """From where to where the last axes of the sets are neighbours.

  Without the first, of a batch: batch norm of 16 x 56 x 56 x 64, forward, takes
  2.0 of Flax's time with it, and 1.0 without.
  """
  start = sets.axes[-1]
  while start - 1 in sets.axes and start > 1:
    start -= 1
  return start, sets.axes[-1] + 1


def _lanes(size: int) -> int:
  """Into how many parts so many elements go."""
  return max(n for n in range(1, LANES + 1) if size % n == 0)


def _totals(values: Sequence[Array], axes: Sequence[int]) -> list[Array]:
  """Sums of several arrays, of which XLA makes one loop."""
  zeros = [np.zeros((), v.dtype) for v in values]
  found: list[Array] = lax.reduce(values, zeros, _added, axes)
  return found


def _halved(values: Sequence[Array]) -> list[Array]:
  """Sums of the halves of each row, and of theirs, that are as long at most.

  So an addition waits for fewer, and a sum of many is rounded as one of parts.
  """
  rows = [*values]
  size = rows[0].shape[-1]
  while size > WINDOW and (size % 2 == 0 or size > 2 * WINDOW):
    if size % 2:
      rows = [_with_zero(v) for v in rows]
    size = (size + 1) // 2
    rows = [lax.add(*lax.split(v, (size, size), v.ndim - 1)) for v in rows]
  return rows


def _with_zero(rows: Array) -> Array:
  edges = [(0, 0, 0)] * (rows.ndim - 1) + [(0, 1, 0)]
  return lax.pad(rows, np.zeros((), rows.dtype), edges)


def _added(x: list[Array], y: list[Array]) -> list[Array]:
  return [lax.add(a, b) for a, b in zip(x, y, strict=True)]


def _has_lines(x: Array, sets: Sets) -> bool:
  """Whether a GPU moves less by `_sum_by_lines`: of images and of one axis.

  Of whole batches of images XLA does not write x - pivot out.
  """
  if not sets.axes or sets.axes[-1] == x.ndim - 1:
    return False
  *others, last = sets.axes
  size = x.shape[last]
  if not _types.is_known(size):
    return False
  if others:
    return not sets.hold_a_batch and size >= LEAST
  return size % LINE == 0 and size >= LINES * LINE


def _sums_by_lines(sets: Sets, *values: Array) -> list[Array]:
  return [_sum_by_lines(sets, v) for v in values]


def _sum_by_lines(sets: Sets, values: Array) -> Array:
  """The sum of each set along its last axis first, for one H200, or in parts.

  XLA has few threads for the sums of few images, and so leaves them no
  arithmetic: it writes x - pivot out, where that fits in the cache. Group norm
  of 16 x 56 x 56 x 64 in float32 moves 5.0 n so, and 3.1 by lines. Of several
  devices each may hold a part of every line.
  """
  *others, axis = sets.axes
  shape = list(values.shape)
  parts = 1 if others else shape[axis] // LINE
  shape[axis : axis + 1] = parts, shape[axis] // parts
  total = lax.reduce_sum(lax.reshape(values, shape), (axis + 1,))
  # Halved and doubled, or XLA makes one sum of the two.
  return _ops.mul(sets.sum(_ops.mul(total, 0.5)), 2.0)
