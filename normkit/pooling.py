"""Sets of numbers merged: along an axis, into groups, over devices.

Sets are merged with the pairwise update of Chan, Golub and LeVeque, "Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979),
equation 2.1, by their counts and about a pivot that they share.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any

import jax
from jax import lax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp

from normkit import _shards
from normkit._types import Array, AxisName, Groups
from normkit.centred import Centred, fixed, square


def merge(parts: Centred, axis: int) -> Centred:
  """Merges sets along an array axis, kept with size one, by their counts."""
  count = _shards.broadcast_like(parts.count, parts.var)
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
  stats = Centred(*(_shards.unshard(s, channel) for s in stats))
  full = jnp.broadcast_shapes(*(s.shape for s in stats))
  size = full[channel] // num_groups
  split = (*full[:channel], num_groups, size, *full[channel + 1 :])
  parts = [jnp.broadcast_to(s, full).reshape(split) for s in stats]
  merged = merge(Centred(*parts), channel + 1)
  return Centred(*(s.squeeze(channel + 1) for s in merged))


# A power of two, so that counts times means near the largest number of a float
# do not overflow: up to 2^32 elements.
PART = 2.0**-32


def pool(
  stats: Centred,
  axis_name: AxisName | None,
  axis_index_groups: Groups | None = None,
  center: bool = True,
) -> Centred:
  """Merges the sets of all devices along named axes, in two sums over them.

  The first gives all of them the mean, and the second what lies about it. (To
  send the sets themselves takes one collective, but its bytes grow with the
  number of devices, and under `vmap` with its square.) With `center=False`, as
  in `centred`, one sum does. Gradients take one.
  """
  if axis_name is None:
    if axis_index_groups is not None:
      raise ValueError(
        f'axis_index_groups={axis_index_groups!r} was given without axis_name. '
        'Name the mapped axis whose indices the groups hold.'
      )
    return stats
  total = functools.partial(
    pool_sum, axis_name=axis_name, axis_index_groups=axis_index_groups
  )
  return (_about_mean if center else _about_zero)(stats, total)


def _about_mean(stats: Centred, total: Callable[..., Any]) -> Centred:
  """About the mean of all, whose rounding error the offset holds."""

  def held(values: Array) -> Array:  # of a set without elements, nothing
    return jnp.where(_shards.broadcast_like(stats.count, values) > 0, values, 0)

  mean = held(
    stats.count * PART * lax.stop_gradient(stats.pivot + stats.offset)
  )
  count, mean = total((stats.count, mean))
  pivot = fixed(mean / (jnp.maximum(count, 1) * PART))
  delta = held((stats.pivot - pivot) + stats.offset)
  weight = stats.count / jnp.maximum(count, 1)
  both = weight * delta, weight * (held(stats.var) + square(delta))
  offset, var = total(both)
  var = var - square(offset)
  # Rounding may leave it below zero; what is cut off has no derivative.
  var = var - lax.stop_gradient(jnp.minimum(var, 0))
  return Centred(pivot, offset, var, count)


def _about_zero(stats: Centred, total: Callable[..., Any]) -> Centred:
  count, var = total((stats.count, stats.count * PART * stats.var))
  var = var / (jnp.maximum(count, 1) * PART)
  zero = jnp.zeros_like(var, stats.pivot.dtype)
  return Centred(zero, zero, var, count)


def pool_sum(
  values: Any, axis_name: AxisName | None, axis_index_groups: Groups | None
) -> Any:
  """Sums over all devices along named axes, or those of the own group."""
  if axis_name is None:
    return values
  if axis_index_groups is None:
    _shards.axis_size(axis_name)  # raises where it is not bound
    return lax.psum(values, axis_name)
  _check_groups(axis_index_groups, axis_name)
  flat, unravel = ravel_pytree(values)
  groups = [tuple(group) for group in axis_index_groups if group]
  return unravel(_group_sum(flat, axis_name, groups))


def _group_sum(values: Array, axis_name: AxisName, groups: Groups) -> Array:
  """The sum of a vector over the own group, alike to the bit in all members.

  JAX's own, `psum`, takes no groups under `vmap` nor where `shard_map` checks
  what varies, and on TPUs none of unequal sizes.
  """
  index = lax.axis_index(axis_name)
  values = _shards.vary(values, index)
  names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
  devices = jax.sharding.get_abstract_mesh().manual_axes
  if names != tuple(n for n in devices if n in names):
    return _sum_of_all(values, names, groups)
  if len(set(map(len, groups))) > 1:
    return _sum_by_trees(values, names, groups)
  if jax.typeof(index).mat.varying:
    return _sum_by_shares(values, names, groups)
  summed: Array = lax.psum(values, names, axis_index_groups=groups)
  return summed


def _sum_by_shares(
  values: Array, names: tuple[str, ...], groups: Groups
) -> Array:
  """Each member of a group sums a share of the numbers, and sends it to all."""
  share = jnp.pad(values, (0, -values.size % len(groups[0])))
  for exchange in lax.psum_scatter, lax.all_gather:
    share = exchange(share, names, axis_index_groups=groups, tiled=True)
  return share[: values.size]


def _sum_by_trees(
  values: Array, names: tuple[str, ...], groups: Groups
) -> Array:
  """Sums go up to the first member of each group, and the total comes down."""
  longest = max(map(len, groups))
  steps = [2**n for n in range((longest - 1).bit_length())]
  rounds = [
    [(g[i + s], g[i]) for g in groups for i in range(0, len(g) - s, 2 * s)]
    for s in steps
  ]
  for up in rounds:  # who receives nothing adds zero
    values += lax.ppermute(values, names, up)
  is_first = jnp.isin(lax.axis_index(names), jnp.array([g[0] for g in groups]))
  values = jnp.where(is_first, values, 0)
  for up in reversed(rounds):
    values += lax.ppermute(values, names, [pair[::-1] for pair in up])
  return values


def _sum_of_all(values: Array, names: tuple[str, ...], groups: Groups) -> Array:
  """From the values of all: under `vmap`, where they lie in one array.

  Groups of one size are summed together.
  """
  index = lax.axis_index(names)
  by_size = sorted(groups, key=len)
  number = {i: n for n, group in enumerate(by_size) for i in group}
  places = [
    _shards.vary(jnp.array(list(some)), index)
    for _, some in itertools.groupby(by_size, len)
  ]
  own = jnp.array([number[i] for i in range(len(number))])[index]

  def run(values: Array) -> Array:
    gathered = values
    for name in reversed(names):  # `vmap` gathers along one at a time
      gathered = lax.all_gather(gathered, name)
    gathered = gathered.reshape(-1, *values.shape)
    sums = jnp.concatenate([jnp.sum(gathered[p], axis=1) for p in places])
    mine: Array = lax.dynamic_index_in_dim(sums, own, keepdims=False)
    return mine

  # This sum is its own transpose. JAX learns it as if from a solver of linear
  # equations; it would transpose the gather, and write under `vmap` an array of
  # all devices for each.
  summed: Array = lax.custom_linear_solve(
    lambda v: v, values, lambda _, v: run(v), symmetric=True
  )
  return summed


def _check_groups(groups: Groups, axis_name: AxisName) -> None:
  """Raises unless the groups are a partition of the indices."""
  size = _shards.axis_size(axis_name)
  if sorted(i for group in groups for i in group) != list(range(size)):
    raise ValueError(
      f'axis_index_groups={groups!r} is not a partition of the {size} indices '
      'of axis_name: each index from 0 must stand in exactly one group.'
    )
