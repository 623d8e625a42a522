"""Covariances of groups of channels, their inverse roots, and their use."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from normkit import _shards, _types
from normkit._types import Array, Scalar
from normkit.affine import Arguments
from normkit.arguments import scaled
from normkit.centred import Centred, named
from normkit.kernels.rows import reciprocal_root


def covariance(
  x: Array, stats: Centred, where: Array | None, groups: int
) -> Array:
  """Of the channels of each group."""
  d = _distances(x, (stats.pivot, stats.offset), where)
  d = _grouped(d / jnp.sqrt(jnp.maximum(stats.count, 1)), groups)
  places, group = tuple(range(x.ndim - 1)), (x.ndim - 1,)
  options: dict[str, Any] = {}
  if _shards.sharded_axes(x):  # summed over devices
    options['out_sharding'] = jax.typeof(d).sharding.update(spec=P())
  matrices: Array = lax.dot_general(
    d, d, ((places, places), (group, group)), precision='highest', **options
  )
  kept: Array = _types.ruled(_kept, matrices)
  return kept


@jax.custom_jvp
def _kept(matrices: Array) -> Array:
  """The matrices, which `lean` keeps as it does all statistics."""
  return matrices


@_kept.defjvp
def _kept_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
  return named(primals[0]), tangents[0]


def inverse_root(covariance: Array, epsilon: Scalar, n_steps: int) -> Array:
  """Nearly the inverse square roots of matrices, by Newton's iteration.

  P as above, and P S / tr S beside it: the same numbers, but errors do not grow
  from step to step as they do in the form with the cube.
  """
  eye = jnp.eye(covariance.shape[-1], dtype=covariance.dtype)[None]
  covariance = covariance + epsilon * eye
  trace = jnp.trace(covariance, axis1=-2, axis2=-1)[:, None, None]
  scale = reciprocal_root(trace, 0.0)  # by its factors: not 1 / trace^2
  p = jnp.broadcast_to(eye, covariance.shape)
  root = covariance * scale * scale
  for _ in range(n_steps):
    step = (3 * eye - _product(p, root)) / 2
    p, root = _product(step, p), _product(root, step)
  return p * scale


def whitened(
  x: Array, means: Any, matrix: Array, args: Arguments, like: Array
) -> Array:
  """The matrices times x less its mean, scaled, in the sharding of `like`."""

  dtype = args.statistics_dtype
  means = [m.astype(dtype) for m in means]
  d = _grouped(_distances(x, means, args.where), len(matrix))
  y = jnp.einsum(
    'gij,...gj->...gi', matrix.astype(dtype), d, precision='highest'
  )
  y = _shards.reshard_like(y.reshape(x.shape), like)
  return scaled(y, args.scale, args.bias, args.dtype)


def _distances(x: Array, means: Any, where: Array | None) -> Array:
  """x less both parts of its mean, zero where masked."""
  pivot, offset = means
  d = (x.astype(pivot.dtype) - pivot) - offset
  return d if where is None else jnp.where(where, d, 0)


def _grouped(d: Array, groups: int) -> Array:
  return d.reshape(*d.shape[:-1], groups, -1)


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision='highest')
