"""Means and variances as people see them: masked, pooled, counted."""

from typing import NamedTuple

import jax.numpy as jnp

from normkit import _types
from normkit._types import Array, ArrayLike, Axes, AxisName, DType, Groups
from normkit.centred import Centred, centred
from normkit.lean import lean
from normkit.pooling import pool


@_types.serializable
class Moments(NamedTuple):
  """The mean, variance and size of sets of numbers.

  Attributes:
    mean: the means, in the dtype of the statistics (float32 or wider).
    var: the biased variances E[|x - mean|^2], real, of the shape of `mean`.
    count: how many elements each set holds, in the dtype and shape of `var`
      (exact up to 2^24 in float32). A set without elements has mean, variance
      and count 0.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.Moments(jnp.zeros(3), jnp.ones(3), jnp.ones(3)).mean.shape
    (3,)
  """

  mean: Array
  var: Array
  count: Array  # type: ignore[assignment]


def moments(
  x: ArrayLike,
  axis: Axes,
  *,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  keepdims: bool = False,
) -> Moments:
  """Mean, biased variance and element count over some axes.

  Every set of numbers is centred before it is squared, so that a mean many
  times the standard deviation costs no digits of the variance, and sets are
  merged by their counts, so that unequal shares (masks, devices) are right.

  Args:
    x: array of any shape, of float16, bfloat16, float32, float64 or complex
      dtype.
    axis: the axes to reduce, an integer or several; negative ones count from
      the end.
    where: boolean mask that broadcasts to the shape of x; only elements where
      it is True count. None counts all.
    axis_name: name or names of mapped axes (`pmap`, `vmap`, `shard_map`) over
      which to pool, in two sums. None pools nothing.
    axis_index_groups: a partition of the indices of `axis_name` into groups,
      each pooled by itself. None is one group of all.
    dtype: dtype of the statistics; None takes x's, or float32 where x is
      narrower.
    keepdims: keep the reduced axes with size one.

  Returns:
    `Moments(mean, var, count)`, each of x's shape without the reduced axes.

  Raises:
    TypeError: if x is not floating-point or complex, or `where` not boolean.
    ValueError: if an axis is out of range or given twice, if there is nothing
      to reduce, if `where` does not broadcast to x, or if the groups are not a
      partition.

  References:
    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979).

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.moments(jnp.array([[1., 3.], [2., 2.]]), axis=-1).var.tolist()
    [1.0, 0.0]
  """
  x = _types.check_input(x)
  axes = _types.check_axes(axis, x.ndim)
  mask = _types.check_where(where, x.shape)
  _types.check_not_empty(x.shape, axes)
  dtype = _types.check_output_dtype(dtype, x.dtype)
  wide, given = _types.statistics_dtype(dtype), x.dtype

  def run(values: Array, mask: Array | None) -> Moments:
    stats = centred(values, axes, mask, given=given)
    return flatten(pool(stats, axis_name, axis_index_groups))

  result: Moments = lean(run, wide, x, mask)
  return result if keepdims else squeeze(result, axes)


def flatten(stats: Centred) -> Moments:
  """The moments in their public form, of one shape."""
  mean = stats.pivot + stats.offset
  return Moments(mean, stats.var, jnp.broadcast_to(stats.count, mean.shape))


def squeeze(result: Moments, axes: tuple[int, ...]) -> Moments:
  """Drops the reduced axes."""
  return Moments(*(m.squeeze(axes) for m in result))
