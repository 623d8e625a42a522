"""Sets of numbers merged: along an axis, into groups, over devices.

Sets are merged with the pairwise update of Chan, Golub and LeVeque, "Updating
Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979),
equation 2.1, by their counts and about a pivot that they share.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np

from normkit import _groups, _shards
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
  names = (
    tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
  )
  _shards.axis_size(axis_name)  # raises where it is not bound
  _check_names(names)
  if axis_index_groups is None:
    return lax.psum(values, names)
  _check_groups(axis_index_groups, names)
  groups = [tuple(group) for group in axis_index_groups if group]

  def run(leaves: list[Array]) -> list[Array]:
    flat, unravel = ravel_pytree(leaves)
    summed: list[Array] = unravel(_group_sum(flat, names, groups))
    return summed

  index = lax.axis_index(names)
  leaves, tree = jax.tree.flatten(values)
  leaves = [_shards.vary(leaf, index) for leaf in leaves]
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.manual_axes and mesh.explicit_axes:
    leaves = _symmetric(_shards.by_shards(run, _is_checked(names)))(leaves)
  else:
    leaves = run(leaves)
  return jax.tree.unflatten(tree, leaves)


def _is_checked(names: tuple[str, ...]) -> bool:
  """Whether `shard_map` checks what varies over these devices."""
  return bool(jax.typeof(lax.axis_index(names)).mat.varying)


def _symmetric(total: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """A sum that is its own transpose, which JAX else does not know.

  It learns it as if from a solver of linear equations.
  """
  return lambda values: lax.custom_linear_solve(
    lambda v: v, values, lambda _, v: total(v), symmetric=True
  )


def _group_sum(values: Array, given: tuple[str, ...], groups: Groups) -> Array:
  """The sum of a vector over the own group, alike to the bit in all members."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  devices = tuple(name for name in manual if name in given)
  inner = tuple(name for name in given if name not in devices)
  # Devices first, in the order of their mesh.
  order = [given.index(name) for name in (*devices, *inner)]
  sizes = [_shards.axis_size(name) for name in given]
  members = np.arange(math.prod(sizes)).reshape(sizes).transpose(order)
  place = np.argsort(members.reshape(-1)).tolist()
  groups = [[place[i] for i in group] for group in groups]
  if inner:
    return _sum_of_members(values, devices, inner, groups)
  return _sum_over_devices(values, devices, groups)


def _sum_over_devices(
  values: Array, names: tuple[str, ...], groups: Groups
) -> Array:
  """JAX's own, `psum`, where it takes groups.

  It takes none where `shard_map` checks what varies, and on TPUs none of
  unequal sizes.
  """
  if max(map(len, groups)) == 1:
    return values
  if len(groups) == 1:
    return _shards.vary(lax.psum(values, names), values)
  if len(set(map(len, groups))) > 1:
    return _sum_by_trees(values, names, groups)
  if _is_checked(names):
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


def _sum_of_members(
  values: Array,
  devices: tuple[str, ...],
  inner: tuple[str, ...],
  groups: Groups,
) -> Array:
  """Sums over members of a `vmap`, which lie in one array, then over devices.

  JAX's `psum` takes no groups under `vmap`.
  """
  count, each = (math.prod(map(_shards.axis_size, n)) for n in (devices, inner))
  own, rounds = _groups.schedule(groups, count, each, values.size)
  index = lax.axis_index(devices) if devices else 0
  mine = jnp.array(own)[index, lax.axis_index(inner)]

  def run(values: Array) -> Array:
    gathered = values
    for name in reversed(inner):  # `vmap` gathers along one at a time
      gathered = lax.all_gather(gathered, name)
    gathered = gathered.reshape(each, -1)

    def summed(places: np.ndarray) -> Array:
      some = _shards.vary(jnp.array(places), values)[index]
      return jnp.sum(gathered.at[some].get(mode='fill', fill_value=0), axis=1)

    found = []
    for partition, tables in rounds:
      sums = jnp.concatenate([summed(places) for places in tables])
      total = _sum_over_devices(sums.reshape(-1), devices, partition)
      found.append(total.reshape(sums.shape))
    sums = jnp.concatenate(found)
    one: Array = lax.dynamic_index_in_dim(sums, mine, keepdims=False)
    return one

  # Else the gather would be transposed, and `vmap` write an array of all
  # members for each.
  total: Array = _symmetric(run)(values)
  return total


def _check_names(names: tuple[str, ...]) -> None:
  """Raises where JAX runs no collective over names of a `vmap`."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  inner = tuple(name for name in names if name not in manual)
  if inner and manual and _is_checked(manual):
    raise NotImplementedError(
      f'axis_name holds {inner}, names of a vmap, inside of a jax.shard_map '
      'that checks what varies over devices, where JAX sums nothing over them. '
      'Give it check_vma=False.'
    )


def _check_groups(groups: Groups, names: tuple[str, ...]) -> None:
  """Raises unless the groups are a partition of the indices."""
  size = _shards.axis_size(names)
  if sorted(i for group in groups for i in group) != list(range(size)):
    raise ValueError(
      f'axis_index_groups={groups!r} is not a partition of the {size} indices '
      'of axis_name: each index from 0 must stand in exactly one group.'
    )
