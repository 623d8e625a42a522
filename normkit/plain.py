"""The norms that have kernels, by XLA: forward, statistics, derivatives."""

import functools

import jax
import jax.numpy as jnp

from normkit import _types
from normkit._types import Array, DType
from normkit.affine import Arguments, activated, rounded
from normkit.centred import (
  Centred,
  centred,
  changes,
  counts,
  of_channels,
)
from normkit.kernels.rows import Spec, statistics
from normkit.sets import Sets, of_groups

Arrays = dict[str, Array]
SUMMANDS = 'x', 'residual'


def _sets(x: Array, spec: Spec) -> Sets:
  """Rows, or groups of channels with all places."""
  last = x.ndim - 1
  if spec.groups is None:
    return Sets((last,))
  return of_groups(x, tuple(range(1, last)), last, spec.groups)


def statistics_of_rows(spec: Spec, given: Arrays) -> Arrays:
  """Of rows or groups, by the names that kernels give them."""
  x, dtype = _input(given, spec), given['x'].dtype
  stats = _centred(x, dtype, spec, output_alone=False)
  return {n: getattr(stats, n) for n in statistics(spec)}


def _centred(x: Array, dtype: DType, spec: Spec, output_alone: bool) -> Centred:
  groups = None if spec.groups is None else (x.ndim - 1, spec.groups)
  options = {'output_alone': output_alone, 'given': dtype, 'groups': groups}
  return centred(x, _sets(x, spec).axes, None, spec.center, **options)


def norm(spec: Spec, given: Arrays, stats: Arrays | None = None) -> Arrays:
  """The norm by XLA."""
  x, dtype = _input(given, spec), given['x'].dtype
  y = _affine(x, _statistics(x, dtype, stats or {}, spec), given, spec)
  return {'y': y, 'total': x.astype(dtype)} if 'residual' in given else {'y': y}


def _input(given: Arrays, spec: Spec) -> Array:
  """The norm's input: x, its sum with the residual, or what a gate leaves.

  Not yet rounded where the result is wider and would show it. Otherwise what is
  returned is read again: the sum anew would be another pass over x. A model
  that rounds before the scale has rounded the sum, whatever its result is.
  """
  x = given['x']
  if spec.gate is not None and not spec.gate.is_last:
    wide = _types.statistics_dtype(x.dtype)
    return x.astype(wide) * spec.gate.factor(given['gate'].astype(wide))
  if 'residual' not in given:
    return x
  is_wider = jnp.finfo(spec.dtype).bits > jnp.finfo(x.dtype).bits
  if not is_wider and spec.rounding is None:
    return x + given['residual']
  wide = _types.statistics_dtype(x.dtype)
  total = x.astype(wide) + given['residual'].astype(wide)
  return total if spec.rounding is None else rounded(total, x.dtype)


def _affine(x: Array, stats: Centred, given: Arrays, spec: Spec) -> Array:
  wide = _types.statistics_dtype(x.dtype)
  if spec.groups is not None:
    stats = of_channels(stats, x.ndim - 1, x)
  scale, bias = (
    _types.widen(_of_rank(given.get(n), x.ndim), _types.real_dtype(wide))
    for n in ('scale', 'bias')
  )
  args = Arguments(
    scale, bias, spec.epsilon, None, spec.dtype, wide, spec.rounding
  )
  last = spec.activation
  if spec.gate is not None and spec.gate.is_last:
    factor = spec.gate.factor(given['gate'].astype(wide))
    last = functools.partial(jnp.multiply, factor)
  return activated(x, stats, args, spec.center, last)


def _of_rank(value: Array | None, ndim: int) -> Array | None:
  """One number an element of the last axis, or what broadcasts already."""
  if value is None or value.ndim == ndim:
    return value
  return value.reshape((1,) * (ndim - 1) + (-1,))


def tangents(
  saved: Arrays, moved: Arrays, spec: Spec, results: tuple[str, ...]
) -> Arrays:
  """How the results change, by XLA: linear in what has moved.

  Each array is widened once, so that its gradient is rounded once.
  """
  dtype = saved['x'].dtype
  wide = _types.statistics_dtype(dtype)
  stats = _statistics(_input(saved, spec), dtype, saved, spec)
  widen = functools.partial(_types.widen, dtype=_types.real_dtype(wide))
  saved, moved = jax.tree.map(widen, (saved, moved))
  if spec.gate is not None and not spec.gate.is_last:
    saved, moved = _gated(saved, moved, spec)
  x = saved['x']
  if parts := [moved.pop(n) for n in SUMMANDS if n in moved]:
    moved['x'] = sum(parts[1:], parts[0])
  values = {n: saved[n] for n in moved}
  changed = dict(moved)
  if 'x' in moved:
    found = changes(x, stats, moved['x'], _sets(x, spec))
    doffset, changed['var'] = found
    values['var'] = stats.var
    if spec.center:
      values['offset'], changed['offset'] = stats.offset, doffset

  def of_values(values: Arrays) -> Array:
    some = {n: values[n] for n in ('offset', 'var') if n in values}
    now = stats._replace(**some)
    return _affine(values.get('x', x), now, saved | values, spec)

  dresults = {'y': jax.jvp(of_values, (values,), (changed,))[1]}
  if 'total' in results:
    dresults['total'] = moved.get('x', jnp.zeros_like(x)).astype(dtype)
  return dresults


def _gated(saved: Arrays, moved: Arrays, spec: Spec) -> tuple[Arrays, Arrays]:
  """With what a gate leaves in the place of x, and how that changes."""
  some = {n: a for n, a in moved.items() if n in ('x', 'gate')}
  rest = {n: a for n, a in moved.items() if n not in some}

  def run(values: Arrays) -> Array:
    return _input(saved | values, spec)

  if not some:
    return saved | {'x': run({})}, rest
  x, dx = jax.jvp(run, ({n: saved[n] for n in some},), (some,))
  return saved | {'x': x}, rest | {'x': dx}


def _statistics(x: Array, dtype: DType, saved: Arrays, spec: Spec) -> Centred:
  """Of each row or group, those that were saved where there are some.

  `dtype` is that of which x was widened.
  """
  if spec.groups is None and 'var' not in saved:
    return _centred(x, dtype, spec, output_alone=True)
  stats = saved if 'var' in saved else statistics_of_rows(spec, {'x': x})
  count = counts(x, _sets(x, spec), None, stats['var'].dtype)
  zero = jnp.zeros_like(stats['var'])
  pivot, offset = (stats.get(n, zero) for n in ('pivot', 'offset'))
  return Centred(pivot, offset, stats['var'], count)
