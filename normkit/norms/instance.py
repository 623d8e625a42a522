"""Instance normalization (Ulyanov, Vedaldi and Lempitsky 2016)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from normkit import _types, arguments, general, norm
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
from normkit.moments import moments
from normkit.norm import EmptyState, NormParams


def instance_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes = -1,
  batch_axis: Axes = 0,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """Instance normalization: each channel of each example by itself.

    y = (x - E[x]) / sqrt(Var[x] + epsilon) * scale + bias,

  mean and variance over all axes but `axis` and `batch_axis`, in float32 or
  wider.

  Args:
    x: array (batch, ..., channels) or in another order of axes, float16,
      bfloat16, float32, float64 or complex.
    scale: one a channel, or of x's rank and broadcasting against it (one an
      example and channel: AdaIN). None: one.
    bias: shaped as `scale` is. None: zero.
    axis: the channels, an axis or several.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to the variance, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output. A channel with no element
      left gives zeros, then the bias.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'triton', 'mosaic_gpu' or 'mosaic_tpu', kernels for
      channels last without mask and pooling; 'xla'; or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError, NotImplementedError: as `normalize` does, and if
      `axis` and `batch_axis` share an axis or leave none to normalize over.

  References:
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing
    Ingredient for Fast Stylization" (2016), equation 2.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[[1., 5.], [3., 5.]]])  # 1 example, 2 places, 2 channels
    >>> nk.instance_norm(x, epsilon=0.).tolist()
    [[[-1.0, 0.0], [1.0, 0.0]]]
  """
  x = _types.check_input(x)
  channels = _types.check_axes(axis, x.ndim)
  return general.normalize(
    x,
    scale,
    bias,
    axis=arguments.spatial_axes(x.ndim, channels, batch_axis),
    feature_axis=channels,
    epsilon=epsilon,
    where=where,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    dtype=dtype,
    implementation=implementation,
  )


def normalize_any(
  x: Array, channels: tuple[int, ...], options: dict[str, Any]
) -> Array:
  """`instance_norm` of a batch, also where there are no places, as in Flax."""
  spatial = arguments.spatial_axes(x.ndim, channels, 0)
  options = options | {'axis': spatial, 'feature_axis': channels}
  return general.normalize_any(x, **options)


def adaptive_instance_norm(
  x: ArrayLike,
  style: ArrayLike,
  *,
  axis: Axes = -1,
  batch_axis: Axes = 0,
  epsilon: Scalar = 1e-5,
  dtype: DType | None = None,
) -> Array:
  """AdaIN: each channel of x with the mean and deviation of another input.

    y = (x - E[x]) / sqrt(Var[x] + epsilon) * sqrt(Var[s] + epsilon) + E[s].

  Args:
    x: the content, array (batch, ..., channels) or in another order of axes,
      float16, bfloat16, float32, float64 or complex.
    style: array of the rank of x, with as many examples (or one) and channels;
      its other axes may have other sizes.
    axis: the channels, an axis or several.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to both variances, not negative; a number or a scalar array.
    dtype: dtype of the result; None keeps x's.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError: as `instance_norm` does, and if the ranks differ.

  References:
    Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive
    Instance Normalization" (2017), equation 8.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x, style = jnp.array([[[1.], [3.]]]), jnp.array([[[0.], [8.], [4.]]])
    >>> y = nk.adaptive_instance_norm(x, style)
    >>> float(y.mean())
    4.0
  """
  x, style = _types.check_input(x), _types.check_input(style, 'style')
  if style.ndim != x.ndim:
    raise ValueError(
      f'style has {style.ndim} axes and x has {x.ndim}. Give style the axes of '
      'x, in their order; batch and channels must agree.'
    )
  if jnp.iscomplexobj(style) and not jnp.iscomplexobj(x):
    raise TypeError(
      f'style is {style.dtype} and x is {x.dtype}, which cannot hold its mean. '
      'Make x complex, or take a part of style.'
    )
  channels = _types.check_axes(axis, x.ndim)
  spatial = arguments.spatial_axes(x.ndim, channels, batch_axis)
  for a in _types.other_axes(spatial, x.ndim):
    sizes = (x.shape[a],) if a in channels else (x.shape[a], 1)
    if style.shape[a] not in sizes:
      raise ValueError(
        f'style of shape {style.shape} must have the channels of x, of shape '
        f'{x.shape}, and as many examples or one: axis {a} differs.'
      )
  epsilon = _types.check_epsilon(epsilon)
  mean, var, _ = moments(style, spatial, keepdims=True)
  return instance_norm(
    x,
    jnp.sqrt(var + epsilon),
    mean,
    axis=axis,
    batch_axis=batch_axis,
    epsilon=epsilon,
    dtype=dtype,
  )


def check_feature_axes(feature_axes: Axes, ndim: int) -> tuple[int, ...]:
  """Returns the channels' axes; raises if the first, the batch, is one."""
  axes = _types.check_axes(feature_axes, ndim, 'feature_axes', repeats=True)
  if 0 in axes:
    raise ValueError(
      f'feature_axes={feature_axes} must not hold the first axis of x, the '
      'batch. Give the axes of the channels.'
    )
  return axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceNorm(norm.CenteredOptions):
  """Instance normalization as a transform; see `instance_norm`.

  Parameters have the shape of the channel axes; there is no state.

  Attributes:
    axis: the channels, an axis or several.
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
    >>> x = jnp.ones((2, 4, 4, 3))
    >>> norm = nk.InstanceNorm()
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> y.shape, params.scale.shape
    ((2, 4, 4, 3), (3,))
  """

  axis: Axes = -1
  batch_axis: Axes = 0

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
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
    options = norm.options_of(self, instance_norm)
    return instance_norm(x, scale, bias, where=where, **options), state
