"""Which elements of an array are one set, and the sums of each.

A sum may have a form of its own for one platform; see `means_by_platform`.
"""

from collections.abc import Callable, Sequence
import functools
import sys
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from normkit import _ops, _shards, _types, platforms
from normkit._primitives import Sizes
from normkit._types import Array, DType

# On a CPU: up to how many elements rows are summed by halves, groups at once,
# and rows by lanes; above which length rows are halved, and which are short.
SMALL, GROUPED, WIDE, ROWS = 2**12, 2**11, 2**20, 2**12
WINDOW, SHORT, LANES = 32, 63, 16
# What fits in a GPU's cache, of elements, XLA writes out there. A line of an
# image has LEAST elements or more; an axis by itself has LINES of LINE or more.
CACHED, LEAST, LINE, LINES = 2**24, 24, 64, 16


class Sets(NamedTuple):
  """Which elements are one set: along `axes`, of a group of channels.

  What belongs to a set has size one along the axes and, where there are groups,
  one number for each of them along the axis of the channels.
  """

  axes: tuple[int, ...]
  channel: int = 0
  groups: int | None = None

  def sum(self, values: Array) -> Array:
    """The sum of each set, of values in float32 or wider."""
    total = lax.expand_dims(lax.reduce_sum(values, self.axes), self.axes)
    if self.groups is None:
      return total
    total = _shards.unshard(total, self.channel)
    shape = list(total.shape)
    shape[self.channel] //= self.groups
    shape.insert(self.channel, self.groups)
    return lax.reduce_sum(lax.reshape(total, shape), (self.channel + 1,))

  def mean(self, values: Array, count: Array) -> Array:
    """The mean of each set; zero for one without elements."""
    return self.means(count, values)[0]

  def means(
    self,
    count: Array,
    *values: Array,
    sums: Callable[..., list[Array]] | None = None,
  ) -> list[Array]:
    """The same of each of several values, whose sums may be given."""
    size = _ops.maximum(count, 1.0)
    totals = sums(*values) if sums else map(self.sum, values)
    return [_ops.div(total, size) for total in totals]

  def spread(self, values: Array, x: Array) -> Array:
    """Gives what belongs to a set to each of its channels in x."""
    if self.groups is None:
      return values
    return spread(values, self.channel, x.shape[self.channel])


def spread(values: Array, channel: int, num_channels: int) -> Array:
  """Gives each channel the value of its group."""
  shape = list(values.shape)
  shape.insert(channel + 1, num_channels // values.shape[channel])
  axes = [a for a in range(len(shape)) if a != channel + 1]
  repeated = lax.broadcast_in_dim(values, shape, axes)
  return lax.collapse(repeated, channel, channel + 2)


def kind_of(x: Array, sets: Sets, dtype: DType) -> Any:
  """The type of what belongs to the sets of x."""
  kind, shape = jax.typeof(x), [*x.shape]
  spec = [*kind.sharding.spec]
  for axis in sets.axes:
    shape[axis], spec[axis] = 1, None
  if sets.groups is not None:
    shape[sets.channel], spec[sets.channel] = sets.groups, None
  sharding = kind.sharding.update(spec=spec)
  return kind.update(
    shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding
  )


def means_by_platform(
  sets: Sets, given: DType | None, count: Array, *values: Array
) -> list[Array]:
  """`sets.means`, by the sums of the platform; `given` as in `centred`."""
  x = values[0]
  forms: dict[str, tuple[Callable[..., list[Array]], range]] = {}
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


def _on_a_cpu(
  x: Array, sets: Sets
) -> dict[str, tuple[Callable[..., list[Array]], range]]:
  """Forms for one CPU, of several sums, and for how many elements each is."""
  if sets.groups is not None:
    return {'cpu alone': (sums_at_once, range(GROUPED + 1))}
  if sets != Sets((x.ndim - 1,)) or not _types.is_known(x.shape[-1]):
    return {}
  if x.shape[-1] <= SHORT:
    return {'cpu alone': (sums_at_once, range(sys.maxsize))}
  return {
    'cpu small alone': (sums_at_once, range(SMALL + 1)),
    'cpu alone': (_sums_by_lanes, range(end_of_lanes(x.shape[-1]))),
  }


def end_of_lanes(row: int) -> int:
  """Below how many elements a CPU sums rows by a form of its own.

  From ROWS rows on, unless they are short, XLA calls a library for all of a
  norm, which takes less than what is left to do around these forms.
  """
  return sys.maxsize if row <= SHORT else min(WIDE + 1, ROWS * row)


def sums_at_once(sets: Sets, *values: Array) -> list[Array]:
  """The sums of each set, for one CPU, of several values by one loop.

  Each addition waits for the one before it, unless that belongs to another sum:
  a step of layer norm of 50 x 48 takes .87 of Flax's time, and 1.07 without. Of
  several devices each may hold but a part of a set.
  """
  axes = sets.axes
  if sets.groups is not None:
    shape = [*values[0].shape]
    at = sets.channel
    shape[at : at + 1] = sets.groups, shape[at] // sets.groups
    parts = [lax.reshape(v, shape) for v in values]
    axes = *[a + (a > at) for a in axes], at + 1
  else:
    parts = _halved(values)
  return [lax.expand_dims(t, sets.axes) for t in _totals(parts, axes)]


def _sums_by_lanes(sets: Sets, *values: Array) -> list[Array]:
  """The same of longer rows, of LANES parts at once, and of what is left.

  XLA would write x - pivot out, and read it again for each of the sums: layer
  norm of 512 x 768, forward, takes 1.0 of Flax's time so, and 1.5 without.
  """
  *rows, size = values[0].shape
  at, part = len(rows), size // LANES
  cut = part * LANES, size % LANES
  wholes, rests = zip(*(lax.split(v, cut, at) for v in values), strict=True)
  shape = (*rows, LANES, part)
  totals = _totals([lax.reshape(w, shape) for w in wholes], (at,))
  found = [sets.sum(t) for t in totals]
  return _added(found, sums_at_once(sets, *rests)) if cut[1] else found


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
    are_many = others[0] > 0 or sets.groups is not None
    return are_many and size >= LEAST
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
