"""The general form behind layer, RMS and instance norm, and with a residual."""

from collections.abc import Callable

from normkit import _types, rows
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
from normkit.affine import Arguments, activated, affine, rounded, widened
from normkit.arguments import (
  check_activation,
  check_arguments,
  check_elementwise,
  check_hash,
  check_some_axes,
)
from normkit.centred import centred
from normkit.pooling import pool


def normalize(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes,
  feature_axis: Axes | None = None,
  center: bool = True,
  scale_offset: float = 0.0,
  round_before_scale: bool = False,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """Normalizes x over some axes: the general form of layer, RMS and instance.

  With E the mean over `axis` (and over `axis_name`),

    y = (x - E[x]) / sqrt(E[|x - E[x]|^2] + epsilon) * scale + bias,

  where `center=False` leaves out both E[x]. Statistics are in float32 or wider.

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    scale: multiplies the result; of the shape of the feature axes, or of x's
      rank and broadcasting against it. None multiplies by nothing.
    bias: added last; shaped as `scale` is. None adds nothing.
    axis: the normalized axes, an integer or several.
    feature_axis: the axes that a `scale` or `bias` of lower rank belongs to;
      None takes `axis`.
    center: subtract the mean.
    scale_offset: added to `scale`, in float32 or wider; 1 for weights around
      zero, as in Gemma.
    round_before_scale: round the normalized values to x's dtype before `scale`
      multiplies them, and their product to the wider dtype of both, as in
      Llama.
    epsilon: added to the variance, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output. A set with no element left
      gives zeros, then the bias.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'triton', 'mosaic_gpu' or 'mosaic_tpu', kernels for the
      last axis alone without mask and pooling; 'xla'; or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError: if x is not floating-point or complex, `where` not boolean, or
      epsilon not a number.
    ValueError: if an axis is out of range or given twice, nothing is reduced,
      a shape does not fit, or epsilon is negative or not finite.
    NotImplementedError: if `implementation` names a kernel that does not take
      this, or not on the platform (when the program is lowered).

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016), equation 3.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.normalize(jnp.array([1., 3.]), axis=0, epsilon=0.).tolist()
    [-1.0, 1.0]
  """
  x = _types.check_input(x)
  axes = _types.check_axes(axis, x.ndim)
  if axis_name is None:
    check_some_axes(axes, x.shape)
  _types.check_not_empty(x.shape, axes)
  return normalize_any(
    x,
    scale,
    bias,
    axis=axes,
    feature_axis=feature_axis,
    center=center,
    scale_offset=scale_offset,
    round_before_scale=round_before_scale,
    epsilon=epsilon,
    where=where,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    dtype=dtype,
    implementation=implementation,
  )


def normalize_any(
  x: Array,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes,
  feature_axis: Axes | None = None,
  center: bool = True,
  scale_offset: float = 0.0,
  round_before_scale: bool = False,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """`normalize`, also where there is nothing to normalize over, as in Flax.

  Over no axis each element is its own mean: zeros, then the bias.
  """
  x = _types.check_input(x)
  axes = _types.check_axes(axis, x.ndim)
  features = (
    axes
    if feature_axis is None
    else _types.check_axes(feature_axis, x.ndim, 'feature_axis')
  )
  args = check_arguments(
    x,
    scale,
    bias,
    features,
    epsilon,
    where,
    dtype,
    implementation,
    scale_offset,
    round_before_scale,
  )
  if implementation != 'xla':
    is_pooled = axis_name is not None or axis_index_groups is not None
    y = rows.normalize(
      x, args, axes, features, is_pooled, center, implementation
    )
    if y is not None:
      return y

  def run(wide: Array, args: Arguments) -> Array:
    stats = centred(wide, axes, args.where, center, given=args.given)
    stats = pool(stats, axis_name, axis_index_groups, center)
    return affine(wide, stats, args, center)

  normalized: Array = widened(run, x, args)
  return normalized


def add_normalize(
  x: ArrayLike,
  residual: ArrayLike,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  *,
  center: bool,
  scale_offset: float,
  round_before_scale: bool = False,
  epsilon: Scalar,
  activation: Callable[[Array], Array] | None,
  dtype: DType | None,
  implementation: Implementation | None,
) -> tuple[Array, Array]:
  """Normalizes x + residual over the last axis; see `add_layer_norm`."""
  x = _types.check_input(x)
  residual = _types.check_input(residual, 'residual')
  if (residual.shape, residual.dtype) != (x.shape, x.dtype):
    raise ValueError(
      f'residual is {residual.dtype}{list(residual.shape)} and x is '
      f'{x.dtype}{list(x.shape)}: they are added, and must be alike. Broadcast '
      'or cast one of them first.'
    )
  check_hash(check_activation(activation))
  axes = _types.check_axes(-1, x.ndim)
  args = check_arguments(
    x,
    scale,
    bias,
    axes,
    epsilon,
    None,
    dtype,
    implementation,
    scale_offset,
    round_before_scale,
  )
  _types.check_not_empty(x.shape, axes)
  check_elementwise(activation, x.shape, args.statistics_dtype)
  if isinstance(args.epsilon, Array):
    return _add_by_xla(x, residual, args, axes, center, activation)
  found = rows.normalize_rows(
    x, args, axes, False, center, implementation, residual, activation
  )
  assert found is not None
  return found


def _add_by_xla(
  x: Array,
  residual: Array,
  args: Arguments,
  axes: tuple[int, ...],
  center: bool,
  activation: Callable[[Array], Array] | None,
) -> tuple[Array, Array]:
  """With an epsilon that is an array, which no rule of `rows` takes."""

  def run(wide: Array, args: Arguments, residual: Array) -> tuple[Array, Array]:
    total = wide + residual.astype(wide.dtype)
    if args.rounding is not None:
      total = rounded(total, residual.dtype)
    stats = centred(total, axes, None, center)
    y = activated(total, stats, args, center, activation)
    return y, total.astype(residual.dtype)

  found: tuple[Array, Array] = widened(run, x, args, residual)
  return found
