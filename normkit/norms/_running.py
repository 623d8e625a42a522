"""Running statistics: the state of batch norm and of its relatives.

A state takes part in what it normalizes by in evaluation, and moves towards the
moments of each batch in training.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from normkit import _shards, _types, arguments, norm
from normkit._types import Array, Axes, AxisName, DType, Groups, Scalar
from normkit.centred import Centred
from normkit.closures import traced_once
from normkit.moments import Moments


@_types.serializable
class BatchNormState(NamedTuple):
  """Running statistics, one number a feature.

  Attributes:
    mean: running means, zeros at first.
    var: running variances, ones at first.
    count: int32, how many updates each feature has received; one that was
      masked out of a batch received none from it. None where nothing needs it:
      in batch norm with a momentum and without `debias`.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> params, state = nk.BatchNorm().init(jnp.ones((2, 3)))
    >>> state.count.tolist()
    [0, 0, 0]
  """

  mean: Array
  var: Array
  count: Array | None = None  # type: ignore[assignment]


def init_state(x: Array | jax.ShapeDtypeStruct, axis: Axes) -> BatchNormState:
  """Means of zero and variances of one for the feature axes of x."""
  axes = _types.check_axes(axis, len(x.shape))
  shape = tuple(x.shape[a] for a in axes)
  dtype = _types.statistics_dtype(x.dtype)
  return BatchNormState(
    jnp.zeros(shape, dtype),
    jnp.ones(shape, _types.real_dtype(dtype)),
    jnp.zeros(shape, jnp.int32),
  )


def running(
  state: BatchNormState, x: Array, features: tuple[int, ...]
) -> Centred:
  """The running statistics as the affine map takes them, widened for x."""
  dtype = _types.statistics_dtype(x.dtype)

  def form(values: Array, dtype: DType) -> Array:
    values = jnp.asarray(values)
    wide = values.astype(_types.promote(values.dtype, dtype))
    return lax.expand_dims(wide, _types.other_axes(features, x.ndim))

  mean = form(state.mean, dtype)
  var = form(state.var, _types.real_dtype(dtype))
  return Centred(mean, jnp.zeros_like(mean), var, jnp.ones_like(var))


def update(
  state: BatchNormState,
  batch: Moments,
  momentum: Scalar | None,
  *,
  debias: bool = False,
  unbiased: bool = False,
  skip_nonfinite: bool = False,
) -> BatchNormState:
  """Moves the running statistics of the features that the batch held."""
  given = momentum if _types.is_array(momentum) else None
  number = momentum if given is None else None

  def run(state: BatchNormState, batch: Moments, given: Any) -> BatchNormState:
    momentum = number if given is None else given
    return _updated(state, batch, momentum, debias, unbiased, skip_nonfinite)

  moved: BatchNormState = traced_once(run, state, batch, given)
  return moved


def _updated(
  state: BatchNormState,
  batch: Moments,
  momentum: Scalar | None,
  debias: bool,
  unbiased: bool,
  skip_nonfinite: bool,
) -> BatchNormState:
  new_mean, new_var = batch.mean, batch.var
  number = _shards.broadcast_like(batch.count, new_var)
  held = number > 0
  if unbiased:
    held = number > 1
    new_var = new_var * (number / jnp.maximum(number - 1, 1))
  if skip_nonfinite:
    held = held & jnp.isfinite(new_mean) & jnp.isfinite(new_var)
  old_count = None if state.count is None else as_count(state.count)

  def average(old: Array, new: Array) -> Array:
    wide = old.astype(_types.promote(old.dtype, new.dtype))
    new, moved = (_shards.reshard_like(a, wide) for a in (new, held))
    updates = None
    if old_count is not None:
      updates = _shards.reshard_like(old_count + 1, wide).astype(new_var.dtype)
    keep, share = shares(updates, momentum, debias)
    kept = jnp.where(keep > 0, keep * wide, 0)  # whatever old is, at keep = 0
    return jnp.where(moved, kept + share * new, wide).astype(old.dtype)

  count = old_count
  if count is not None:
    count = count + _shards.reshard_like(held, count).astype(count.dtype)
  return BatchNormState(
    average(state.mean, new_mean), average(state.var, new_var), count
  )


def as_count(count: Array | None) -> Array:
  """A count as an integer, whatever came in: the mean over devices is none."""
  assert count is not None  # see `check_state`
  count = jnp.asarray(count)
  if jnp.issubdtype(count.dtype, jnp.integer):
    return count
  return jnp.rint(count).astype(jnp.int32)


def shares(
  count: Array | None, momentum: Scalar | None, debias: bool
) -> tuple[Array | float, Array | float]:
  """The shares of the old average and of the newest of `count` updates.

  Where nothing is counted they are those of a momentum.
  """
  if count is None:
    assert momentum is not None
    return momentum, 1 - momentum
  if momentum is None:
    return (count - 1) / count, 1 / count
  if isinstance(momentum, Array):
    return _shares_of_array(count, momentum.astype(count.dtype), debias)
  if not debias or momentum == 0:
    return momentum, 1 - momentum
  rate = math.log(momentum)  # 1 - momentum^count = -expm1(count * rate)
  total = jnp.expm1(count * rate)
  return momentum * jnp.expm1((count - 1) * rate) / total, (
    (momentum - 1) / total
  )


def _shares_of_array(
  count: Array, momentum: Array, debias: bool
) -> tuple[Array, Array]:
  """The same, for a momentum that nobody has checked: 1 has a limit."""
  if not debias:
    return momentum, 1 - momentum
  is_inside = (momentum > 0) & (momentum < 1)
  inside = jnp.where(is_inside, momentum, 0.5)
  rate = jnp.log(inside)
  total = jnp.expm1(count * rate)
  share = jnp.where(is_inside, (inside - 1) / total, 1 / count)
  share = jnp.where(momentum > 0, share, 1)
  return 1 - share, share


def check_average(momentum: Any, debias: bool) -> Scalar | None:
  """Returns momentum; raises where there is nothing to debias."""
  value = _types.check_momentum(momentum)
  if debias and not _types.is_array(value) and value in (None, 1):
    raise ValueError(
      f'debias=True needs a momentum below 1, got momentum={value}. The '
      'cumulative average, momentum=None, has no bias to remove.'
    )
  return value


def check_state(
  state: Any, x: Array, features: tuple[int, ...], is_counted: bool = True
) -> None:
  """Raises unless the state holds one number for each feature of x.

  `is_counted` says that the updates are used, and their count must be there.
  """
  norm.check_kind(state, BatchNormState, 'state')
  shape = tuple(x.shape[a] for a in features)
  for name, value in zip(BatchNormState._fields, state, strict=True):
    if value is None and not is_counted:
      continue
    if value is None:
      raise ValueError(
        f'state.{name} is None. A count is needed by debias, momentum=None, '
        f'renorm and streaming; give jnp.zeros({shape}, int) to begin with.'
      )
    if np.shape(value) != shape:
      raise ValueError(
        f'state.{name} has shape {np.shape(value)}, but the feature axes '
        f'{features} of x, of shape {x.shape}, have shape {shape}. Take the '
        'state from init with an input of this shape.'
        f'{arguments.other_axis(np.shape(value), x.shape, features)}'
      )


def check_holds_mean(state: BatchNormState, x: Array) -> None:
  """Raises if the state is real and the mean of x complex."""
  if jnp.iscomplexobj(x) and not jnp.iscomplexobj(state[0]):
    raise TypeError(
      f'state.mean of dtype {state[0].dtype} cannot hold the mean of x of '
      f'dtype {x.dtype}. Take the state from init with a complex input.'
    )


def check_several(
  shape: tuple[int, ...],
  reduced: tuple[int, ...],
  axis_name: AxisName | None,
  axis_index_groups: Groups | None,
  ghosts: int | None,
) -> None:
  """Raises if a feature has but one element in a batch, pooled or virtual."""
  count = _types.check_not_empty(shape, reduced)
  if ghosts is not None:
    count //= ghosts
  elif axis_index_groups is not None:
    count *= min(len(group) for group in axis_index_groups)
  elif axis_name is not None:
    count *= _shards.axis_size(axis_name)
  if count == 1:
    raise ValueError(
      f'train=True with one element a feature in x of shape {shape}, reduced '
      f'over {reduced}: each would become zero. Give a larger batch '
      '(under jax.vmap or jax.pmap, axis_name shares it), or train=False to '
      'use the running statistics.'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningOptions(norm.CenteredOptions):
  """The options of the transforms that keep running statistics."""

  axis: Axes = -1
  momentum: Scalar | None = 0.99
  epsilon: Scalar = 1e-5

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[norm.NormParams, BatchNormState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    return norm.init_params(x, self.axis, self), init_state(x, self.axis)
