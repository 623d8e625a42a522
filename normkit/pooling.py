"""Sets of numbers merged: along an axis, into groups, over devices.

Sets are merged with the pairwise update of Chan, Golub and LeVeque, "Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979),
equation 2.1, by their counts and about a pivot that they share.
"""

from jax import lax
import jax.numpy as jnp
import numpy as np

from normkit import _types
from normkit._types import Array, AxisName, Groups
from normkit.centred import Centred, fixed, square


def merge(parts: Centred, axis: int) -> Centred:
  """Merges sets along an array axis, kept with size one, by their counts."""
  count = jnp.broadcast_to(parts.count, parts.var.shape)
  total = jnp.sum(count, axis, keepdims=True)
  weight = count / jnp.maximum(total, 1)

  def held(values: Array) -> Array:  # a set without weight may hold a NaN
    return jnp.where(weight > 0, values, 0)

  def mean(values: Array) -> Array:
    return jnp.sum(weight * held(values), axis, keepdims=True)

  pivot = fixed(lax.stop_gradient(mean(parts.pivot)))
  delta = (parts.pivot - pivot) + parts.offset
  offset = mean(delta)
  var = mean(parts.var) + mean(square(held(delta - offset)))
  return Centred(pivot, offset, var, total)


def merge_channels(stats: Centred, channel: int, num_groups: int) -> Centred:
  """Merges the channels of each group; the groups stay on the same axis."""
  stats = Centred(*(_types.unshard(s, channel) for s in stats))
  full = jnp.broadcast_shapes(*(s.shape for s in stats))
  size = full[channel] // num_groups
  split = (*full[:channel], num_groups, size, *full[channel + 1 :])
  parts = [jnp.broadcast_to(s, full).reshape(split) for s in stats]
  merged = merge(Centred(*parts), channel + 1)
  return Centred(*(s.squeeze(channel + 1) for s in merged))


def spread(values: Array, channel: int, num_channels: int) -> Array:
  """Gives each channel the value of its group."""
  shape = list(values.shape)
  shape.insert(channel + 1, num_channels // values.shape[channel])
  spread = jnp.broadcast_to(lax.expand_dims(values, [channel + 1]), shape)
  return lax.collapse(spread, channel, channel + 2)


def pool(
  stats: Centred,
  axis_name: AxisName | None,
  axis_index_groups: Groups | None = None,
) -> Centred:
  """Merges the sets of all devices along named axes, in one collective.

  Each device writes its moments at its own place in an array of zeros, and one
  sum over the devices gives all of them to each. A sum, unlike a gather, is
  known to be the same everywhere, as `shard_map` checks.
  """
  if axis_name is None:
    if axis_index_groups is not None:
      raise ValueError(
        f'axis_index_groups={axis_index_groups!r} was given without axis_name. '
        'Name the mapped axis whose indices the groups hold.'
      )
    return stats
  dtype = jnp.result_type(stats.pivot)
  shape = jnp.broadcast_shapes(*(s.shape for s in stats))
  packed = jnp.stack([jnp.broadcast_to(s, shape).astype(dtype) for s in stats])
  gathered = _gathered(packed, axis_name)
  pivot, offset, var, count = jnp.moveaxis(gathered, 1, 0)
  count = count.real
  if axis_index_groups is not None:
    member = _membership(axis_index_groups, axis_name)
    count = count * lax.expand_dims(member, range(1, count.ndim))
  merged = merge(Centred(pivot, offset, var.real, count), axis=0)
  return Centred(*(m.squeeze(0) for m in merged))


def pool_sum(
  total: Array, axis_name: AxisName | None, axis_index_groups: Groups | None
) -> Array:
  """The sum over all devices along named axes, or those of the own group."""
  if axis_name is None:
    return total
  gathered = _gathered(total, axis_name)
  if axis_index_groups is not None:
    member = _membership(axis_index_groups, axis_name)
    member = lax.expand_dims(member, range(1, gathered.ndim))
    gathered = jnp.where(member, gathered, 0)
  return jnp.sum(gathered, axis=0)


def _gathered(values: Array, axis_name: AxisName) -> Array:
  """The values of all devices, along a new first axis."""
  size, index = lax.axis_size(axis_name), lax.axis_index(axis_name)
  own = lax.expand_dims(jnp.arange(size) == index, range(1, values.ndim + 1))
  gathered: Array = lax.psum(jnp.where(own, values[None], 0), axis_name)
  return gathered


def _membership(groups: Groups, axis_name: AxisName) -> Array:
  """Which indices along `axis_name` share a group with the own."""
  size = lax.axis_size(axis_name)
  if sorted(i for group in groups for i in group) != list(range(size)):
    raise ValueError(
      f'axis_index_groups={groups!r} is not a partition of the {size} indices '
      'of axis_name: each index from 0 must stand in exactly one group.'
    )
  table = np.zeros((size, size), bool)
  for group in groups:
    table[np.ix_(group, group)] = True
  return jnp.asarray(table)[lax.axis_index(axis_name)]
