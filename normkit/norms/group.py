"""Group normalization (Wu and He 2018)."""

import dataclasses

import jax

from normkit import _types, arguments, norm, rows
from normkit._types import (
  Array,
  ArrayLike,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
  Scalar,
)
from normkit.affine import Arguments, affine, widened
from normkit.centred import centred, of_channels
from normkit.norm import EmptyState, NormParams
from normkit.pooling import pool


def group_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  num_groups: int,
  axis: int = -1,
  batch_axis: Axes = 0,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """Group normalization: neighbouring channels of each example together.

    y = (x - E[x]) / sqrt(Var[x] + epsilon) * scale + bias,

  mean and variance over all axes but the batch, and over the channels of a
  group, in float32 or wider. One group is layer norm over all but the batch;
  as many groups as channels is instance norm.

  Args:
    x: array (batch, ..., channels) or in another order of axes, float16,
      bfloat16, float32, float64 or complex.
    scale: one a channel, or of x's rank and broadcasting against it. None: one.
    bias: shaped as `scale` is. None: zero.
    num_groups: how many groups of contiguous channels; it divides their number.
    axis: the channels, one axis.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to the variance, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output. A group with no element left
      gives zeros, then the bias.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'triton', 'mosaic_gpu' or 'mosaic_tpu', kernels for
      channels last without mask and pooling; 'xla'; or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError, NotImplementedError: as `normalize` does, and if
      `num_groups` does not divide the channels or `axis` and `batch_axis`
      share an axis.

  References:
    Wu and He, "Group Normalization" (2018), equations 1 and 7.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[1., 3., 10., 30.]])
    >>> nk.group_norm(x, num_groups=2, epsilon=0.).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
  """
  x = _types.check_input(x)
  channels = _types.check_axes(axis, x.ndim)
  spatial = arguments.spatial_axes(x.ndim, channels, batch_axis)
  _types.check_not_empty(x.shape, spatial + channels)
  return group_norm_any(
    x,
    scale,
    bias,
    num_groups=num_groups,
    axis=axis,
    batch_axis=batch_axis,
    epsilon=epsilon,
    where=where,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    dtype=dtype,
    implementation=implementation,
  )


def group_norm_any(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  num_groups: int,
  axis: int = -1,
  batch_axis: Axes = 0,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """`group_norm`, also where groups have no elements, as in Flax."""
  x = _types.check_input(x)
  channels = _types.check_axes(axis, x.ndim)
  spatial = arguments.spatial_axes(x.ndim, channels, batch_axis)
  args = arguments.check_arguments(
    x, scale, bias, channels, epsilon, where, dtype, implementation
  )
  channel = arguments.check_groups(x.shape, channels, num_groups)
  if implementation != 'xla':
    is_pooled = axis_name is not None or axis_index_groups is not None
    y = rows.normalize_groups(
      x, args, spatial, channel, num_groups, is_pooled, implementation
    )
    if y is not None:
      return y

  def run(wide: Array, args: Arguments) -> Array:
    groups = channel, num_groups
    stats = centred(wide, spatial, args.where, given=args.given, groups=groups)
    stats = pool(stats, axis_name, axis_index_groups)
    stats = of_channels(stats, channel, wide)
    return affine(wide, stats, args)

  normalized: Array = widened(run, x, args)
  return normalized


def groups_of(
  channels: int, num_groups: int | None, group_size: int | None
) -> tuple[int, int]:
  """Returns how many groups there are and how large, one of which is given."""
  if (num_groups is None) == (group_size is None):
    raise ValueError(
      f'give either num_groups or group_size, got num_groups={num_groups} and '
      f'group_size={group_size}. Set the other to None.'
    )
  if num_groups is not None:
    name, given = 'num_groups', num_groups
  elif group_size is not None:
    name, given = 'group_size', group_size
  if not _types.is_integer(given) or given < 1 or channels % given:
    raise ValueError(
      f'{name}={given} does not divide the {channels} channels. Give a divisor '
      f'of {channels}.'
    )
  other = channels // given
  return (given, other) if group_size is None else (other, given)


def batch_axes(reduction_axes: Axes | None, ndim: int) -> tuple[int, ...]:
  """Returns the axes that are not reduced, of an input with channels last.

  None reduces all but the first, and the channels.
  """
  name, given = 'reduction_axes', reduction_axes
  if given is None:
    given = *range(1, ndim - 1), -1
  axes = _types.check_axes(given, ndim, name, repeats=True)
  if ndim - 1 not in axes:
    raise ValueError(
      f'{name}={reduction_axes} must hold the last axis, the channels. Add -1.'
    )
  return _types.other_axes(axes, ndim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupNorm(norm.CenteredOptions):
  """Group normalization as a transform; see `group_norm`.

  Parameters have the shape of the channel axis; there is no state.

  Attributes:
    num_groups: how many groups of contiguous channels.
    axis: the channels, one axis.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to the variance; a number or a scalar array.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    use_bias: whether there is a bias.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'triton', 'mosaic_gpu', 'mosaic_tpu', 'xla', or None to
      choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 4, 4, 6))
    >>> gn = nk.GroupNorm(num_groups=3)
    >>> params, state = gn.init(x)
    >>> y, state = gn.apply(params, state, x, train=True)
    >>> y.shape, params.scale.shape
    ((2, 4, 4, 6), (6,))
  """

  num_groups: int
  axis: int = -1
  batch_axis: Axes = 0

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    norm.check_like(x)
    channels = _types.check_axes(self.axis, len(x.shape))
    arguments.check_groups(x.shape, channels, self.num_groups)
    return norm.init_params(x, self.axis, self), EmptyState()

  def apply(
    self,
    params: NormParams,
    state: EmptyState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, EmptyState]:
    """Returns `(y, state)`; `train` makes no difference."""
    del train
    scale, bias = norm.check_params(params, self)
    norm.check_empty_state(state)
    options = norm.options_of(self, group_norm)
    return group_norm(x, scale, bias, where=where, **options), state
