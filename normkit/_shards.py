"""Where arrays lie: what their types say of meshes and of mapped axes."""

from collections.abc import Callable
import itertools
import math

import jax
import jax.numpy as jnp

from normkit._types import Array, AxisName


def sharded_axes(x: Array) -> tuple[int, ...]:
  """The axes that the type of x says are sharded: explicit meshes alone."""
  spec = jax.typeof(x).sharding.spec
  return tuple(a for a, names in enumerate(spec) if names is not None)


def axis_size(axis_name: AxisName) -> int:
  """How many indices mapped axes have; raises where none is mapped."""
  try:
    return jax.lax.axis_size(axis_name)
  except NameError as error:  # Flax's, too
    raise NameError(
      f'axis_name={axis_name!r} names no mapped axis here ({error}). Call it '
      'under jax.vmap, jax.pmap or jax.shard_map with an axis of this name; on '
      'one device, or under jit alone, leave axis_name out.'
    ) from None


def vary(a: Array, like: Array) -> Array:
  """`a`, varying over the devices that `like` varies over, as in `shard_map`.

  Its gradient is then summed over them.
  """
  missing = jax.typeof(like).mat.varying - jax.typeof(a).mat.varying
  return jax.lax.pcast(a, tuple(missing), to='varying') if missing else a


def unshard(x: Array, axis: int) -> Array:
  """Gathers an axis that the type of x says is sharded."""
  sharding = jax.typeof(x).sharding
  if axis not in sharded_axes(x):
    return x
  spec = [None if a == axis else s for a, s in enumerate(sharding.spec)]
  whole: Array = jax.sharding.reshard(x, sharding.update(spec=spec))
  return whole


def reshard_like(x: Array, like: Array) -> Array:
  """Gives x the sharding that the type of `like`, of its shape, names.

  If `like` was made outside of the mesh of x, that is whole on it.
  """
  own, sharding = jax.typeof(x).sharding, jax.typeof(like).sharding
  if own.spec == sharding.spec:
    return x
  if own.mesh.empty and not isinstance(x, jax.core.Tracer):
    return x + jnp.zeros_like(like, x.dtype)  # outside of jit, the one way
  if sharding.mesh.empty:
    sharding = own.update(spec=sharding.spec)
  moved: Array = jax.sharding.reshard(x, sharding)
  return moved


def broadcast_like(x: Array, like: Array) -> Array:
  """Gives x the shape of `like`, and the sharding that its type names.

  JAX does so by itself in the context of a mesh alone, where the forms of
  `jnp.where` and `jnp.maximum` agree.
  """
  return reshard_like(jnp.broadcast_to(x, like.shape), like)


def by_shards(
  run: Callable[[list[Array]], list[Array]], check_vma: bool
) -> Callable[[list[Array]], list[Array]]:
  """Lets what works on elements see, of explicit axes too, one device's.

  Arrays that are sharded over the same axes of a mesh run together.
  """
  axes = {*jax.sharding.get_abstract_mesh().explicit_axes}

  def whole(leaves: list[Array]) -> list[Array]:
    alike: dict[frozenset[str], list[int]] = {}
    for place, leaf in enumerate(leaves):
      alike.setdefault(_mesh_axes(leaf), []).append(place)
    found = list(leaves)
    for places in alike.values():
      specs = [jax.typeof(leaves[p]).sharding.spec for p in places]
      local = jax.shard_map(
        run,
        axis_names=axes,
        in_specs=(specs,),
        out_specs=specs,
        check_vma=check_vma,
      )
      results = local([leaves[p] for p in places])
      for place, result in zip(places, results, strict=True):
        found[place] = result
    return found

  return whole


def _mesh_axes(x: Array) -> frozenset[str]:
  """The axes of a mesh over which the type of x says that it is sharded."""
  spec = jax.typeof(x).sharding.spec
  parts = [(s,) if isinstance(s, str) else s or () for s in spec]
  return frozenset(itertools.chain(*parts))


def shards(x: Array, axis: int) -> int:
  """Into how many parts the type of x says that an axis is sharded."""
  sharding = jax.typeof(x).sharding
  names = sharding.spec[axis] or ()
  names = (names,) if isinstance(names, str) else names
  return math.prod(sharding.mesh.shape[name] for name in names)
