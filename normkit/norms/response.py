"""Filter response normalization (Singh and Krishnan 2020), with its TLU."""

import dataclasses
from typing import NamedTuple

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
from normkit.norm import EmptyState


@_types.serializable
class FilterResponseParams(NamedTuple):
  """The parameters of filter response norm, one number a channel.

  Attributes:
    scale: what the normalized values are multiplied by, or None.
    bias: what is added after that, or None.
    threshold: the least value of the output, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> params, _ = nk.FilterResponseNorm().init(jnp.ones((2, 5, 5, 3)))
    >>> params.threshold.tolist()
    [0.0, 0.0, 0.0]
  """

  scale: Array | None = None
  bias: Array | None = None
  threshold: Array | None = None


def filter_response_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  threshold: ArrayLike | None = None,
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
  """Each channel of each example over its root mean square, then a threshold.

    y = max(x / sqrt(E[x^2] + epsilon) * scale + bias, threshold),

  E over all axes but `axis` and `batch_axis`. The maximum is the thresholded
  linear unit, which takes the place of a ReLU: use none after it. No batch
  statistics: training and evaluation are the same, at any batch size.

  Args:
    x: array (batch, ..., channels) or in another order of axes, float16,
      bfloat16, float32 or float64.
    scale: one a channel, or of x's rank and broadcasting against it. None: one.
    bias: shaped as `scale` is. None: zero.
    threshold: shaped as `scale` is. None: no threshold.
    axis: the channels, an axis or several.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to the mean square, not negative; a number or a scalar array.
      Where a channel has but a few places, the paper learns it; give a larger
      one, 1e-4 or so.
    where: boolean mask that broadcasts to x; elements where it is False change
      no other output.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'triton', 'mosaic_gpu' or 'mosaic_tpu', kernels for
      channels last without mask and pooling; 'xla'; or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError, NotImplementedError: as `normalize` does, and for
      complex x with a threshold.

  References:
    Singh and Krishnan, "Filter Response Normalization Layer: Eliminating Batch
    Dependence in the Training of Deep Neural Networks" (2020), equations 1 to
    3.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[[2.], [-2.]]])  # 1 example, 2 places, 1 channel
    >>> y = nk.filter_response_norm(x, threshold=jnp.zeros(1), epsilon=0.)
    >>> y.tolist()
    [[[1.0], [0.0]]]
  """
  x = _types.check_input(x)
  channels = _types.check_axes(axis, x.ndim)
  least = arguments.check_feature(threshold, x.shape, channels, 'threshold')
  if least is not None and jnp.iscomplexobj(x):
    raise TypeError(
      f'x must be real where there is a threshold, got {x.dtype}: complex '
      'numbers have no order. Leave the threshold out.'
    )
  out = _types.check_output_dtype(dtype, x.dtype)
  arguments.check_held(out, threshold=least)
  y = general.normalize(
    x,
    scale,
    bias,
    axis=arguments.spatial_axes(x.ndim, channels, batch_axis),
    feature_axis=channels,
    center=False,
    epsilon=epsilon,
    where=where,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    dtype=dtype,
    implementation=implementation,
  )
  return y if least is None else jnp.maximum(y, least.astype(y.dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterResponseNorm(norm.CenteredOptions):
  """Filter response norm as a transform; see `filter_response_norm`.

  Parameters have the shape of the channel axes; there is no state.

  Attributes:
    axis: the channels, an axis or several.
    batch_axis: the examples, an axis or several; () for a single example.
    epsilon: added to the mean square; a number or a scalar array.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    use_bias: whether there is a bias.
    use_threshold: whether there is a threshold, zero at first: a ReLU.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'triton', 'mosaic_gpu', 'mosaic_tpu', 'xla', or None to
      choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 4, 4, 3))
    >>> norm = nk.FilterResponseNorm()
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> y.shape
    (2, 4, 4, 3)
  """

  axis: Axes = -1
  batch_axis: Axes = 0
  use_threshold: bool = True

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[FilterResponseParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    norm.check_like(x)
    axes = _types.check_axes(self.axis, len(x.shape))
    shape = tuple(x.shape[a] for a in axes)
    least = jnp.zeros(shape, self.param_dtype) if self.use_threshold else None
    params = norm.init_params(x, self.axis, self)
    return FilterResponseParams(*params, least), EmptyState()

  def apply(
    self,
    params: FilterResponseParams,
    state: EmptyState,
    x: ArrayLike,
    *,
    train: bool,
    where: ArrayLike | None = None,
  ) -> tuple[Array, EmptyState]:
    """Returns `(y, state)`; `train` makes no difference."""
    del train
    scale, bias, least = norm.check_params(
      params, self, FilterResponseParams, threshold=self.use_threshold
    )
    norm.check_empty_state(state)
    options = norm.options_of(self, filter_response_norm)
    y = filter_response_norm(x, scale, bias, least, where=where, **options)
    return y, state
