"""How layer and RMS norm change, in forms for CPUs.

XLA writes out there what it sums. So in the transpose of these the sums are
products of matrices, or those of a row are taken at once where there is little.
"""

from collections.abc import Callable, Sequence
import importlib
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _types
from normkit._types import Array
from normkit.centred import Centred
from normkit.kernels.rows import log_change
from normkit.sums import sums_of_rows

Pair = tuple[Array | None, Array | None]


class Rows(NamedTuple):
  """What is normalized and scaled: (distance - offset) * root * scale."""

  distance: Array
  offset: Array | None  # None is zero
  root: Array
  scale: Array | None

  def normalized(self) -> Array:
    """The same without the scale."""
    d = self.distance
    return (d if self.offset is None else d - self.offset) * self.root


def change(
  form: Callable[..., list[Array | None]],
  x: Array,
  stats: Centred,
  root: Array,
  scale: Array | None,
  tangents: Sequence[Any],
  center: bool,
) -> Array:
  """How (x - mean) * root * scale + bias changes.

  Args:
    form: `early`, `late` or `by_pairs`.
    x: an array of rows, in the dtype of the statistics.
    stats: its statistics, one number a row.
    root: 1 / sqrt(var + epsilon).
    scale: one number a column, or None.
    tangents: of x, statistics, scale and bias; None for what does not change.
    center: whether the mean is subtracted.

  Returns:
    The change, or what broadcasts to it.
  """
  dx, dstats, *columns = tangents
  means = [d for d in dstats[:2] if center and d is not None]
  dshift = _sum([-d * root for d in means])  # so that -dy is not written out
  dfactor = None if dstats.var is None else log_change(dstats.var, root)
  distance, offset = (x - stats.pivot, stats.offset) if center else (x, None)
  rows = Rows(distance, offset, root, scale)
  terms = form(rows, (dshift, dfactor), columns)
  if dx is not None:
    dx = dx.astype(x.dtype)
    terms.append(dx * root if scale is None else dx * (root * scale))
  found = _sum(terms)
  return jnp.zeros_like(x) if found is None else found


def early(rows: Rows, drows: Pair, columns: Pair) -> list[Array | None]:
  """All but the change of x itself, by dy times x - pivot.

  That is there before the statistics are, as the normalized x is not. So a
  second core has work meanwhile, and XLA two programs more to compile.
  """
  distance, offset, root, scale = rows
  (dshift, dfactor), (dscale, dbias) = drows, columns
  shift = None if offset is None else -offset * root
  if dfactor is not None:
    dfactor = dfactor * root
    if offset is not None:
      dshift = _sum([dshift, -offset * dfactor])
  one = jnp.ones_like(root, distance.dtype)
  factors = _outer(dfactor, scale, (root, dscale))
  terms = [_outer(dshift, scale, (shift, dscale), (one, dbias))]
  return terms if factors is None else [*terms, distance * factors]


def late(rows: Rows, drows: Pair, columns: Pair) -> list[Array | None]:
  """The same, by dy times the normalized x."""
  one = jnp.ones_like(rows.root)
  done = Rows(rows.normalized(), None, one, rows.scale)
  return early(done, drows, columns)


def by_pairs(rows: Rows, drows: Pair, columns: Pair) -> list[Array | None]:
  """The same without products of matrices, and both sums of a row at once."""
  dscale, dbias = columns
  normalized = rows.normalized()
  terms = [_of_pair((normalized, rows.scale), drows), dbias]
  return terms if dscale is None else [*terms, normalized * dscale]


def _of_pair(residuals: tuple[Array, Array | None], pair: Pair) -> Array | None:
  """(pair[0] + pair[1] * x) * scale, in the transpose of which is one sum."""

  def plain(residuals: Any, pair: Any) -> Any:
    (x, scale), (shift, factor) = residuals, pair
    y = _sum([shift, None if factor is None else x * factor])
    return y if y is None or scale is None else y * scale

  def sums(residuals: Any, dy: Array) -> Any:
    x, scale = residuals
    dy = dy if scale is None else dy * scale
    values = zip(pair, (dy, dy * x), strict=True)
    found = [None if p is None else v for p, v in values]
    leaves, tree = jax.tree.flatten(tuple(found))
    return jax.tree.unflatten(tree, _linear_sums(leaves))

  y: Array | None = _linear(plain, sums, residuals, pair)
  return y


def _linear_sums(values: list[Array]) -> list[Array]:
  """Of each of them; linear, since JAX differentiates no sum of several."""
  shape = values[0].shape

  def sums(_: None, values: list[Array]) -> list[Array]:
    return sums_of_rows(*values)

  def spread(_: None, totals: list[Array]) -> list[Array]:
    return [jnp.broadcast_to(t, shape) for t in totals]

  found: list[Array] = _linear(sums, spread, None, values)
  return found


def _linear(*given: Any) -> Any:
  """`dispatch.choose_linear`, which takes 20 ms to import."""
  dispatch = importlib.import_module('normkit.kernels.dispatch')
  return dispatch.choose_linear(*given)


def _sum(terms: Sequence[Array | None]) -> Array | None:
  """Of those that there are."""
  found = [t for t in terms if t is not None]
  return sum(found[1:], found[0]) if found else None


def _outer(
  drow: Array | None, scale: Array | None, *pairs: Pair
) -> Array | None:
  """`drow` times the scale, and the other products of rows and columns."""
  terms = [drow]
  if drow is not None and scale is not None:
    terms = [_by_dot([drow], [scale.astype(drow.dtype)])]
  there = [(r, c) for r, c in pairs if r is not None and c is not None]
  if there:
    columns = [c.astype(r.dtype) for r, c in there]
    terms.append(_by_dot_of_columns([r for r, _ in there], columns))
  return _sum(terms)


def _by_dot(rows: list[Array], columns: list[Array]) -> Array:
  """In all axes: a reshape to two would gather what is sharded along one."""
  at = _first_column(rows[0])
  left = [r.reshape(*r.shape[:at], 1) for r in rows]
  right = _matrix([c.reshape(1, *c.shape[at:]) for c in columns], 0)
  if len(left) == 1:  # once is enough
    left.append(jnp.zeros_like(left[0]))
  axes = ((at,), (0,)), ((), ())
  return lax.dot_general(jnp.concatenate(left, at), right, axes, 'highest')


def _by_dot_of_columns(rows: list[Array], columns: list[Array]) -> Array:
  """The same, linear in the columns.

  Their gradient has the rows first: in the order that JAX would choose, XLA
  writes out the other factor, which is as large as x, with its axes swapped.
  """

  def sums(rows: list[Array], dy: Array) -> list[Array]:
    at = _first_column(rows[0])
    left = _matrix([r.reshape(1, *r.shape[:at]) for r in rows], 0)
    axes = (tuple(range(1, at + 1)), tuple(range(at))), ((), ())
    found = lax.dot_general(left, dy, axes, 'highest')
    return [found[i].reshape(shape) for i in range(len(rows))]

  if not long_axes(rows[0]):  # under `vmap` JAX sums over the rows it adds
    return _by_dot(rows, columns)
  shape = columns[0].shape
  y: Array = _linear(_by_dot, sums, rows, columns)
  return y


def _matrix(vectors: list[Array], axis: int) -> Array:
  """Two vectors at least: XLA calls a library for products of matrices.

  For those with one vector it makes code, which is hardly faster: with five of
  them a norm, twelve transformer blocks took 2.0 times Flax's time to compile,
  and so 1.0.
  """
  if len(vectors) > 1:
    return jnp.concatenate(vectors, axis)
  shape = list(vectors[0].shape)
  shape[axis] = 2
  return jnp.broadcast_to(vectors[0], shape)


def _first_column(rows: Array) -> int:
  return max(long_axes(rows), default=-1) + 1


def long_axes(array: Array) -> list[int]:
  """The axes of another size than one, or that may be."""
  sizes = enumerate(array.shape)
  return [a for a, n in sizes if not _types.is_known(n) or n != 1]
