"""Root mean square layer normalization (Zhang and Sennrich 2019)."""

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


def rms_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  *,
  axis: Axes = -1,
  scale_offset: float = 0.0,
  round_before_scale: bool = False,
  feature_axis: Axes | None = None,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """RMS normalization: layer norm without the mean.

    y = x / sqrt(E[|x|^2] + epsilon) * scale,

  the mean square over `axis`, in float32 or wider.

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    scale: of the shape of the axes `axis`, or of x's rank and broadcasting
      against it. None: one.
    axis: the normalized axes, an integer or several.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Gemma.
    round_before_scale: round the normalized values to x's dtype before `scale`
      multiplies them, and their product to the wider dtype of both, as in
      Llama.
    feature_axis: the axes that a `scale` of lower rank belongs to; None takes
      `axis`. (-2, -1) for a scale (heads, features), one a head.
    epsilon: added to the mean square, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output. A row with no element left
      gives zeros.
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
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019),
    equation 4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.rms_norm(jnp.array([[2., 2.]]), epsilon=0.).tolist()
    [[1.0, 1.0]]

    Queries (batch, tokens, heads, features), each head by itself with a scale
    of its own, and all heads together, as in OLMo 2 and 3:

    >>> q, scale = jnp.ones((2, 5, 4, 8)), jnp.ones((4, 8))
    >>> nk.rms_norm(q, scale, feature_axis=(-2, -1)).shape
    (2, 5, 4, 8)
    >>> nk.rms_norm(q, scale, axis=(-2, -1)).shape
    (2, 5, 4, 8)
  """
  return general.normalize(
    x,
    scale,
    axis=axis,
    feature_axis=feature_axis,
    center=False,
    scale_offset=scale_offset,
    round_before_scale=round_before_scale,
    epsilon=epsilon,
    where=where,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    dtype=dtype,
    implementation=implementation,
  )


def add_rms_norm(
  x: ArrayLike,
  residual: ArrayLike,
  scale: ArrayLike | None = None,
  *,
  scale_offset: float = 0.0,
  round_before_scale: bool = False,
  epsilon: Scalar = 1e-6,
  activation: Callable[[Array], Array] | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> tuple[Array, Array]:
  """RMS normalization of a sum, and the sum, as transformers want both.

    total = x + residual
    y = activation(rms_norm(total, scale))

  A kernel reads x and the residual once for both, and in its backward adds the
  gradient of the sum where it writes that of the norm. With
  `round_before_scale`, of which Mosaic GPU alone has a kernel, the sum is
  rounded before it is normalized, as it is when the published code adds.

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    residual: what is added to x, of its shape and dtype.
    scale: of the shape of the last axis, or of x's rank and broadcasting
      against it. None: one.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Gemma.
    round_before_scale: round the normalized values to x's dtype before `scale`
      multiplies them, and their product to the wider dtype of both, as in
      Llama.
    epsilon: added to the mean square, not negative; a number or a scalar array.
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
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019),
    equation 4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x, residual = jnp.array([[1., 2.]]), jnp.array([[0., -1.]])
    >>> y, total = nk.add_rms_norm(x, residual, epsilon=0.)
    >>> y.tolist(), total.tolist()
    ([[1.0, 1.0]], [[1.0, 1.0]])
  """
  return general.add_normalize(
    x,
    residual,
    scale,
    None,
    center=False,
    scale_offset=scale_offset,
    round_before_scale=round_before_scale,
    epsilon=epsilon,
    activation=activation,
    dtype=dtype,
    implementation=implementation,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm(norm.Options):
  """RMS normalization as a transform; see `rms_norm`.

  The scale has the shape of the normalized axes, or of `feature_axis`; there is
  no bias and no state.

  Attributes:
    axis: the normalized axes, an integer or several.
    feature_axis: the axes whose shape the parameters have; None takes `axis`.
    epsilon: added to the mean square; a number or a scalar array.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale; with 1 it starts at
      zero, as in Gemma.
    round_before_scale: round the normalized values to x's dtype before the
      scale multiplies them, as in Llama.
    param_dtype: dtype of the parameters that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'triton', 'mosaic_gpu', 'mosaic_tpu', 'xla', or None to
      choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 3))
    >>> rms = nk.RMSNorm()
    >>> params, state = rms.init(x)
    >>> y, state = rms.apply(params, state, x, train=True)
    >>> params.bias is None
    True
  """

  axis: Axes = -1
  round_before_scale: bool = False
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
    scale, _ = norm.check_made(params, self)
    norm.check_empty_state(state)
    options = norm.options_of(self, rms_norm)
    return rms_norm(x, scale, where=where, **options), state
