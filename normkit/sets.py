"""Which elements of an array are one set, and the sums of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax

from normkit import _ops, _shards
from normkit._types import Array, DType


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
