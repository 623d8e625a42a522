"""Norms on TPUs: whole rows or examples pass through on-chip memory, once.

The grid runs block after block, so that the sums over rows stay on chip until
the last. Pallas, lowered to Mosaic.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
import jax.numpy as jnp

from normkit._types import Array
from normkit.kernels import rows
from normkit.kernels.rows import Spec

LANES = 128
BLOCK = 2**18  # elements of x at once, lanes filled up: 1 MiB in float32
MEMORY = 96 * 2**20  # of the 128 MiB on chip
Arrays = dict[str, Any]


@functools.partial(jax.jit, static_argnames=('spec', 'interpret'))
def forward(given: Arrays, spec: Spec, interpret: bool = False) -> Arrays:
  """The norm of each row or group; see `normkit.kernels.triton.forward`.

  There are no statistics: a number a row would fill a tile's 128 lanes, and the
  backward finds them again at no cost.
  """
  x = given['x']
  results = {'y': rows.result(x, x.shape, spec.dtype)}
  if 'residual' in given:
    results['total'] = rows.result(x, x.shape, x.dtype)
  return _call(_forward, given, results, spec, 'parallel', interpret)


@functools.partial(jax.jit, static_argnames=('spec', 'wanted', 'interpret'))
def backward(
  given: Arrays, spec: Spec, wanted: tuple[str, ...], interpret: bool = False
) -> Arrays:
  """Gradients of the norm; see `normkit.kernels.triton.backward`."""
  x = given['x']
  total = rows.result(x, x.shape[-1:], jnp.float32)
  results = {'dx': rows.result(x, x.shape, x.dtype)}
  results |= {name: total for name in wanted if name != 'dx'}
  return _call(_backward, given, results, spec, 'arbitrary', interpret)


def _call(
  body: Callable[..., None],
  given: Arrays,
  results: Arrays,
  spec: Spec,
  order: Literal['parallel', 'arbitrary'],
  interpret: bool,
) -> Arrays:
  shape = _blocked(given['x'], spec)
  size = shape[-1]
  block = _block(shape, spec)
  names = *given, *results
  one_row = (1,) * len(block) + (size,)

  def full(a: Any) -> tuple[int, ...]:
    return one_row if a.ndim == 1 else shape

  def spec_of(a: Any) -> pl.BlockSpec:
    if a.ndim == 1:
      return pl.BlockSpec(one_row, lambda *_: (0,) * len(one_row))
    return pl.BlockSpec((*block, size), lambda *i: (*i, 0))

  def kernel(*refs: Any) -> None:
    body(dict(zip(names, refs, strict=True)), shape, block, spec)

  found = pl.pallas_call(
    kernel,
    out_shape=tuple(
      rows.result(given['x'], full(a), a.dtype) for a in results.values()
    ),
    grid=tuple(pl.cdiv(n, b) for n, b in zip(shape, block, strict=False)),
    in_specs=[spec_of(a) for a in given.values()],
    out_specs=tuple(spec_of(a) for a in results.values()),
    compiler_params=tpu.CompilerParams(
      dimension_semantics=(order,) * len(block), vmem_limit_bytes=MEMORY
    ),
    interpret=interpret,
    name=f'normkit{body.__name__}',
  )(*(a.reshape(full(a)) for a in given.values()))
  shaped = zip(results, found, results.values(), strict=True)
  return {name: a.reshape(like.shape) for name, a, like in shaped}


def _blocked(x: Array, spec: Spec) -> tuple[int, ...]:
  """x as (outer, inner, size), without a change of its layout.

  The last two axes lie in tiles: the second is merged with those before it
  only where it fills its tiles. Groups keep x as it is.
  """
  size = x.shape[-1]
  inner = x.shape[-2]
  if spec.groups is not None:
    return (len(x), *(x.shape[1:-1] or (1,)), size)
  if x.ndim == 2 or inner % (32 // x.dtype.itemsize) == 0:
    return 1, x.size // size, size
  return x.size // (inner * size), inner, size


def _block(shape: tuple[int, ...], spec: Spec) -> tuple[int, ...]:
  """How many of the outer and of the inner rows at once; or one example."""
  if spec.groups is not None:
    return (1, *shape[1:-1])
  outer, inner, size = shape
  count = max(BLOCK // (pl.cdiv(size, LANES) * LANES), 8)
  if inner > count:
    return 1, max(count // 32 * 32, 8)
  return min(max(count // inner, 1), outer), inner


def _mean(shape: tuple[int, ...], spec: Spec) -> rows.Mean:
  size, groups = shape[-1], spec.groups
  if groups is None:
    return rows.row_mean(size)
  return rows.group_mean(size // groups, groups, math.prod(shape[1:]) // groups)


def _parameters(refs: Arrays) -> rows.Parameters:
  return rows.Parameters(
    *(
      refs[n][...].astype(jnp.float32) if n in refs else None
      for n in ('scale', 'bias')
    )
  )


def _forward(
  refs: Arrays, shape: tuple[int, ...], block: tuple[int, ...], spec: Spec
) -> None:
  del block
  x = refs['x'][...].astype(jnp.float32)
  if 'residual' in refs:
    x = x + refs['residual'][...].astype(jnp.float32)
    refs['total'][...] = x.astype(refs['total'].dtype)
  mean = _mean(shape, spec)
  (xhat,), _, _ = rows.standardize([x], mean, spec)
  refs['y'][...] = rows.outputs(xhat, _parameters(refs), spec)


def _backward(
  refs: Arrays, shape: tuple[int, ...], block: tuple[int, ...], spec: Spec
) -> None:
  x, dy = (refs[name][...].astype(jnp.float32) for name in ('x', 'dy'))
  mean, parameters = _mean(shape, spec), _parameters(refs)
  (xhat,), root, _ = rows.standardize([x], mean, spec)
  (dx,), (g,) = rows.gradients([dy], [xhat], root, parameters, mean, spec)
  if 'dtotal' in refs:
    dx = dx + refs['dtotal'][...].astype(jnp.float32)
  refs['dx'][...] = dx.astype(refs['dx'].dtype)
  inside = _inside(x.shape, shape, block)
  for name, term in ('dscale', g * xhat), ('dbias', g):
    if name in refs:
      _add(refs[name], rows.column_sums(jnp.where(inside, term, 0)))


def _inside(
  tile: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, ...]
) -> Array:
  """Which rows of the tile are rows of x: the last may reach beyond."""
  inside = jnp.ones(tile, bool)
  for axis in range(len(block)):
    if shape[axis] % block[axis]:
      index = jax.lax.broadcasted_iota(jnp.int32, tile, axis)
      first = pl.program_id(axis) * block[axis]
      inside = inside & (first + index < shape[axis])
  return inside


def _add(ref: Any, value: Array) -> None:
  is_first = sum(pl.program_id(axis) for axis in range(value.ndim - 1)) == 0

  @pl.when(is_first)
  def _() -> None:
    ref[...] = value

  @pl.when(~is_first)
  def _() -> None:
    ref[...] += value
