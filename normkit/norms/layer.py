"""Layer normalization (Ba, Kiros and Hinton 2016)."""

from collections.abc import Callable
import dataclasses

import jax

from normkit import general, norm
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
from normkit.norm import EmptyState, NormParams


def layer_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes = -1,
  scale_offset: float = 0.0,
  feature_axis: Axes | None = None,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """Layer normalization: each example is normalized over its own features.

    y = (x - E[x]) / sqrt(Var[x] + epsilon) * scale + bias,

  mean and variance over `axis`, in float32 or wider.

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    scale: of the shape of the axes `axis`, or of x's rank and broadcasting
      against it (one a example or a position: adaptive norms). None: one.
    bias: shaped as `scale` is. None: zero.
    axis: the normalized axes, an integer or several.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Nemotron.
    feature_axis: the axes that a `scale` of lower rank belongs to; None takes
      `axis`. (-2, -1) for a scale (heads, features), one a head.
    epsilon: added to the variance, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output. A row with no element left
      gives zeros, then the bias.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'triton', 'mosaic_gpu', 'mosaic_tpu', 'xla', or None to
      choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError, NotImplementedError: as `normalize` does.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.layer_norm(jnp.array([[1., 3.]]), epsilon=0.).tolist()
    [[-1.0, 1.0]]

    Of images with their channels first, as `LayerNorm2d` of ConvNeXt is:

    >>> images, weight, bias = jnp.ones((2, 3, 8, 8)), jnp.ones(3), jnp.ones(3)
    >>> nk.layer_norm(images, weight, bias, axis=1).shape
    (2, 3, 8, 8)
  """
  return general.normalize(
    x,
    scale,
    bias,
    axis=axis,
    scale_offset=scale_offset,
    feature_axis=feature_axis,
    epsilon=epsilon,
    where=where,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    dtype=dtype,
    implementation=implementation,
  )


def add_layer_norm(
  x: ArrayLike,
  residual: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  scale_offset: float = 0.0,
  epsilon: Scalar = 1e-6,
  activation: Callable[[Array], Array] | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, Array]:
  """Layer normalization of a sum, and the sum, as transformers want both.

    total = x + residual
    y = activation(layer_norm(total, scale, bias))

  A kernel reads x and the residual once for both, and in its backward adds the
  gradient of the sum where it writes that of the norm.

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    residual: what is added to x, of its shape and dtype.
    scale: of the shape of the last axis, or of x's rank and broadcasting
      against it. None: one.
    bias: shaped as `scale` is. None: zero.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Nemotron.
    epsilon: added to the variance, not negative; a number or a scalar array.
    activation: a function of an array, elementwise, hashable (a function of a
      module, not one made anew at each call, which would be compiled anew); it
      is given float32 or wider. None: none.
    dtype: dtype of y; None keeps x's.
    implementation: 'triton', 'mosaic_gpu', 'mosaic_tpu', 'xla', or None to
      choose.

  Returns:
    `(y, total)`, both of the shape of x.

  Raises:
    TypeError, ValueError, NotImplementedError: as `normalize` does, and if x
      and the residual differ in shape or dtype, or `activation` makes another
      shape, or no floating-point numbers.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016), equations 3 and 4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x, residual = jnp.array([[1., 2.]]), jnp.array([[0., 1.]])
    >>> y, total = nk.add_layer_norm(x, residual, epsilon=0.)
    >>> y.tolist(), total.tolist()
    ([[-1.0, 1.0]], [[1.0, 3.0]])
  """
  return general.add_normalize(
    x,
    residual,
    scale,
    bias,
    center=True,
    scale_offset=scale_offset,
    epsilon=epsilon,
    activation=activation,
    dtype=dtype,
    implementation=implementation,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm(norm.CenteredOptions):
  """Layer normalization as a transform; see `layer_norm`.

  Parameters have the shape of the normalized axes, or of `feature_axis`; there
  is no state.

  Attributes:
    axis: the normalized axes, an integer or several.
    feature_axis: the axes whose shape the parameters have; None takes `axis`.
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
    >>> x = jnp.ones((2, 3))
    >>> ln = nk.LayerNorm()
    >>> params, state = ln.init(x)
    >>> y, state = ln.apply(params, state, x, train=True)
    >>> params.scale.shape, state
    ((3,), EmptyState())
  """

  axis: Axes = -1
  feature_axis: Axes | None = None

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    axis = self.axis if self.feature_axis is None else self.feature_axis
    return norm.init_params(x, axis, self), EmptyState()

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
    scale, bias = norm.check_made(params, self)
    norm.check_empty_state(state)
    options = norm.options_of(self, layer_norm)
    return layer_norm(x, scale, bias, where=where, **options), state
