"""The affine map of every norm, from x and its moments to the output."""

from collections.abc import Callable
import functools
import sys
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _ops, _rules, _shards, _types, derivatives, platforms
from normkit._primitives import Sizes
from normkit._types import Array, DType, Scalar
from normkit.centred import Centred
from normkit.closures import traced_once
from normkit.kernels.rows import Rounding, reciprocal_root
from normkit.lean import lean
from normkit.sums import SHORT

# Of the forms of derivatives for a CPU the late one is faster from LARGE on, of
# elements. Above MODERATE, and of fewer than MANY_ROWS, the early one is, which
# compiles longer and keeps a second core busy. By pairs are faster layer norms
# above MODERATE, up to HUGE, of rows that are not short, and all norms of
# FEW_COLUMNS or fewer, or of fewer than FEW_ROWS.
LARGE, MODERATE, HUGE = 2**12, 2**17, 2**19
MANY_ROWS, FEW_ROWS, FEW_COLUMNS = 8, 4, 15


class Arguments(NamedTuple):
  """The checked arguments that all norms share."""

  scale: Array | None
  bias: Array | None
  epsilon: Scalar
  where: Array | None
  dtype: DType
  statistics_dtype: DType
  rounding: Rounding | None = None
  given: DType | None = None  # of x before it was widened


def widened(
  run: Callable[..., Any], x: Array, args: Arguments, *given: Any
) -> Any:
  """`run(x, args, *given)`, x and parameters widened once; see `lean`.

  What is kept for the backward is x in its own dtype, sums over it, and what
  the caller gave: parameters and mask.
  """
  arrays, of_arrays = _parted(run, args)
  return lean(of_arrays, args.statistics_dtype, x, arrays, *given)


def by_running(x: Array, args: Arguments, stats: Centred) -> Array:
  """`affine` by statistics that x has no part in, and so uses x but once."""
  arrays, of_arrays = _parted(lambda x, a, stats: affine(x, stats, a), args)
  wide = args.statistics_dtype

  def run(x: Array, arrays: Any, stats: Centred) -> Array:
    y: Array = of_arrays(x.astype(wide), arrays, stats)
    return y

  def kept(*given: Any) -> Array:
    y: Array = _types.ruled(jax.checkpoint(run, prevent_cse=False), *given)
    return y

  y: Array = traced_once(kept, x, arrays, stats)
  return y


def _parted(
  run: Callable[..., Any], args: Arguments
) -> tuple[Any, Callable[..., Any]]:
  """The arrays among the arguments, and `run` as a function of them."""
  real = _types.real_dtype(args.statistics_dtype)
  is_array = isinstance(args.epsilon, Array)
  arrays = args.scale, args.bias, args.where, args.epsilon if is_array else None
  rest = args._replace(scale=None, bias=None, where=None)
  rest = rest._replace(epsilon=0.0) if is_array else rest

  def of_arrays(x: Array, arrays: Any, *given: Any) -> Any:
    *parameters, where, epsilon = arrays
    scale, bias = (_types.widen(p, real) for p in parameters)
    inner = rest._replace(scale=scale, bias=bias, where=where)
    if epsilon is not None:
      inner = inner._replace(epsilon=epsilon)
    return run(x, inner, *given)

  return arrays, of_arrays


def affine(
  x: Array, stats: Centred, args: Arguments, center: bool = True
) -> Array:
  """(x - mean) / sqrt(var + epsilon) * scale + bias, in `args.dtype`.

  A set without elements gives zeros, then the bias. Where the mask is False, a
  value that is not finite comes out as it went in and has no other effect.
  """
  if args.rounding is not None:
    return _by_rounding(x, stats, args, args.rounding, center)
  if isinstance(args.epsilon, Array):  # it may be differentiated
    stats = stats._replace(var=stats.var + args.epsilon.astype(stats.var.dtype))
    args = args._replace(epsilon=0.0)
  form = _of_rows if _is_outer(stats, args) else _by_factors
  return form(x, stats, args, center)


def _by_rounding(
  x: Array, stats: Centred, args: Arguments, rounding: Rounding, center: bool
) -> Array:
  """`affine` in steps of which each is rounded."""
  inner = args._replace(
    scale=None, bias=None, dtype=args.statistics_dtype, rounding=None
  )
  held = x
  if args.where is not None:  # or a scale's gradient would meet it
    is_stray = ~args.where & ~jnp.isfinite(x)
    held = jnp.where(is_stray, 0, x)
  y = rounded(affine(held, stats, inner, center), rounding.normalized)
  if args.scale is not None:
    y = rounded(y * args.scale, rounding.product)
  y = _plus(y, args.bias)
  if args.where is not None:
    y = jnp.where(is_stray & (stats.count > 0), x, y)
  return y.astype(args.dtype)


def rounded(x: Array, dtype: DType) -> Array:
  """x as `dtype` has it, in its own dtype; the derivative is that of x.

  Compilers may leave out a cast there and back.
  """
  if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
    return x
  y: Array = _types.ruled(_rounded, x, jnp.finfo(dtype))
  return y


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded(x: Array, info: Any) -> Array:
  y = lax.reduce_precision(x, info.nexp, info.nmant)
  if info.nexp == jnp.finfo(x.dtype).nexp:
    return y
  step = float(info.smallest_subnormal)  # below the least normal number
  small = lax.round(x / step, lax.RoundingMethod.TO_NEAREST_EVEN) * step
  return jnp.where(jnp.abs(x) < float(info.tiny), small, y)


@_rounded.defjvp
def _rounded_jvp(info: Any, primals: Any, tangents: Any) -> tuple[Array, Any]:
  return _rounded(*primals, info), tangents[0]


def activated(
  x: Array,
  stats: Centred,
  args: Arguments,
  center: bool,
  activation: Callable[[Array], Array] | None,
) -> Array:
  """`affine`, and an activation before the result is narrowed."""
  if activation is None:
    return affine(x, stats, args, center)
  wide = args._replace(dtype=args.statistics_dtype)
  return activation(affine(x, stats, wide, center)).astype(args.dtype)


def _of_rows(x: Array, stats: Centred, args: Arguments, center: bool) -> Array:
  """Layer and RMS norm: one form to evaluate, others to differentiate.

  Compilers fuse the first with the statistics: layer norm of 4096 x 768 on a
  CPU is one kernel instead of seven, and takes .4 of the time. The others have
  the better derivatives.
  """
  # Under shard_map gradients of parameters are summed outside of the rule.
  parameters = [
    p if p is None else _shards.vary(p, x) for p in (args.scale, args.bias)
  ]
  leaves, tree = jax.tree.flatten((x, stats, *parameters))
  held = len(leaves) - (args.bias is not None)  # no tangent needs a bias
  at = None if args.scale is None else held - 1  # it goes once into each row
  first, others = _ranges_of_pairs(x, stats, args, center)
  sizes = {
    'cpu first alone': Sizes(first),
    'cpu late': Sizes(range(LARGE, MODERATE + 1), at, MANY_ROWS),
    'cpu': Sizes(range(LARGE, sys.maxsize), at, FEW_ROWS),
    'cpu pairs alone': Sizes(others),
  }
  args = args._replace(scale=None, bias=None)  # they are among the leaves

  def run(form: Callable[..., Array], *leaves: Array) -> Array:
    x, stats, scale, bias = jax.tree.unflatten(tree, leaves)
    return form(x, stats, args._replace(scale=scale, bias=bias), center)

  evaluate = jax.custom_jvp(functools.partial(run, _by_steps))

  def derive(primals: Any, tangents: Any) -> tuple[Array, Any]:
    moved = _rules.moved(tangents)

    def along(form: Callable[..., Array], *leaves: Array) -> Array:
      primals: list[Any] = [*leaves[:held]]
      given = leaves[held:]
      if held < len(tangents):
        primals.append(jnp.zeros_like(given[-1]) if held in moved else None)
      of_leaves = functools.partial(run, form)
      y: Array = _rules.along(of_leaves, primals, moved, given)[1]
      return y

    def by_change(form: Callable[..., Any], *leaves: Array) -> Array:
      given = dict(zip(moved, leaves[held:], strict=True))
      changes = jax.tree.unflatten(tree, map(given.get, range(len(tangents))))
      bias = [None] * (len(tangents) - held)
      x, stats, scale, _ = jax.tree.unflatten(tree, [*leaves[:held], *bias])
      x = x.astype(args.statistics_dtype)
      root = reciprocal_root(stats.var, args.epsilon)
      dy = derivatives.change(form, x, stats, root, scale, changes, center)
      return jnp.broadcast_to(dy, y.shape).astype(y.dtype)

    y = evaluate(*primals)
    if not moved:
      return y, jnp.zeros_like(y)
    pairs = functools.partial(by_change, derivatives.by_pairs)
    runs = {
      'default': functools.partial(along, _by_roots),
      'cpu first alone': pairs,
      'cpu late': functools.partial(by_change, derivatives.late),
      'cpu': functools.partial(by_change, derivatives.early),
      'cpu pairs alone': pairs,
    }
    given = [tangents[i] for i in moved]
    kind = jax.typeof(y).to_tangent_aval()
    return y, platforms.dependent(runs, primals[:held], kind, given, sizes)

  evaluate.defjvp(derive, symbolic_zeros=True)
  y: Array = _types.ruled(evaluate, *leaves)
  return y


def _ranges_of_pairs(
  x: Array, stats: Centred, args: Arguments, center: bool
) -> tuple[range, range]:
  """Of how many elements `derivatives.by_pairs` is first, and last."""
  is_row = stats.var.shape == (*x.shape[:-1], 1)
  is_single = args.statistics_dtype == (args.given or x.dtype) == jnp.float32
  row = x.shape[-1]
  if not (is_row and is_single and _types.is_known(row)):
    return range(0), range(0)
  any_size = range(sys.maxsize)
  if row <= FEW_COLUMNS:
    return any_size, any_size
  has_two = center and row > SHORT  # a single sum is slower so
  return range(MODERATE + 1, HUGE + 1) if has_two else range(0), any_size


def _by_steps(x: Array, stats: Centred, args: Arguments, center: bool) -> Array:
  y = x.astype(args.statistics_dtype)
  if center:
    y = _ops.sub(_ops.sub(y, stats.pivot), stats.offset)
  y = _ops.mul(y, reciprocal_root(stats.var, args.epsilon))
  if args.scale is not None:
    y = _ops.mul(y, args.scale)
  return _plus(y, args.bias).astype(args.dtype)


def _by_roots(x: Array, stats: Centred, args: Arguments, center: bool) -> Array:
  """For GPUs and TPUs: sums over a row that need no other sum before them.

  One read of x and dy gives all of them; with `_by_factors` layer norm's
  backward in float32 on H200 moves 6.0 n, and not 5.0.
  """
  x = x.astype(args.statistics_dtype)
  root = reciprocal_root(stats.var, args.epsilon)
  y = _ops.mul(_ops.sub(x, stats.pivot) if center else x, root)
  if center:
    y = _ops.sub(y, _ops.mul(stats.offset, root))
  if args.scale is not None:
    y = _ops.mul(y, args.scale)
  return _plus(y, args.bias).astype(args.dtype)


def _by_factors(
  x: Array, stats: Centred, args: Arguments, center: bool
) -> Array:
  x = x.astype(args.statistics_dtype)
  factor = reciprocal_root(stats.var, args.epsilon)
  if args.scale is not None:
    factor = _ops.mul(factor, args.scale)
  distance, shift = x, args.bias
  if center:
    distance = _ops.sub(x, stats.pivot)
    shift = _ops.mul(stats.offset, factor)
    shift = lax.neg(shift) if args.bias is None else _ops.sub(args.bias, shift)
  if args.where is None:
    return _plus(_ops.mul(distance, factor), shift).astype(args.dtype)
  stray = ~args.where & ~jnp.isfinite(x)
  y = jnp.where(stats.count > 0, jnp.where(stray, 0, distance) * factor, 0)
  y = jnp.where(stray & (stats.count > 0), x, _plus(y, shift))
  return y.astype(args.dtype)


def _is_outer(stats: Centred, args: Arguments) -> bool:
  """Whether there is one number a row and one a column: layer and RMS norm."""
  params = [p for p in (args.scale, args.bias) if p is not None]
  arrays = [stats.var, *params]
  if args.where is not None or any(map(_shards.sharded_axes, arrays)):
    return False
  if not all(jnp.issubdtype(a.dtype, jnp.floating) for a in arrays):
    return False
  rows, *columns = map(derivatives.long_axes, arrays)
  last = max(rows, default=-1)  # a single row has no such axis
  return bool(columns) and all(c and last < min(c) for c in columns)


def _plus(y: Array, shift: Array | None) -> Array:
  return y if shift is None else _ops.add(y, shift)
