"""Modulation as diffusion transformers do it (Peebles and Xie 2023): adaLN.

Shift, scale and gate are outputs of a network, one an example or one a token;
the norms have no parameters of their own. So there are functions here, and no
transforms.
"""

from normkit import _types, arguments, platforms, rows
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
from normkit.centred import centred
from normkit.lean import lean
from normkit.pooling import pool


def adaptive_layer_norm(
  x: ArrayLike,
  shift: ArrayLike | None,
  scale: ArrayLike | None,
  *,
  axis: Axes = -1,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """AdaLN: layer norm without parameters, moved by what a network says.

    y = (x - E[x]) / sqrt(Var[x] + epsilon) * (1 + scale) + shift,

  mean and variance over `axis`. Everything up to the result is in float32 or
  wider, 1 + scale too, and what is kept for the backward is x, shift and scale
  as given. The order of the arguments is that of DiT's `modulate`, and of its
  six outputs.

  Args:
    x: array (batch, ..., features) or in another order of axes, float16,
      bfloat16, float32, float64 or complex.
    shift: (batch, features), the same at all tokens of an example; of x's rank
      and broadcasting against it, (batch, tokens, features); or (features,).
      None: zero.
    scale: shaped as `shift` may be; zero leaves the norm as it is, as None
      does.
    axis: the normalized axes, the features, an integer or several. The first
      axis of x is the batch.
    epsilon: added to the variance, not negative; a number or a scalar array.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'triton', 'mosaic_gpu', 'mosaic_tpu', 'xla', or None to
      choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError, NotImplementedError: as `normalize` does; a shift or
      a scale that does not fit is named.

  References:
    Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023),
    section 3.2.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.array([[[1., 3.], [5., 9.]]])  # 1 example, 2 tokens
    >>> shift, scale = jnp.array([[10., 20.]]), jnp.array([[0., 1.]])
    >>> nk.adaptive_layer_norm(x, shift, scale, epsilon=0.).tolist()
    [[[9.0, 22.0], [9.0, 22.0]]]
  """
  options = axis, epsilon, where, axis_name, axis_index_groups, dtype
  return _modulated(x, shift, scale, True, *options, implementation)


def adaptive_rms_norm(
  x: ArrayLike,
  shift: ArrayLike | None,
  scale: ArrayLike | None,
  *,
  axis: Axes = -1,
  epsilon: Scalar = 1e-6,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """`adaptive_layer_norm` without the mean.

    y = x / sqrt(E[|x|^2] + epsilon) * (1 + scale) + shift.

  Args:
    x: as `adaptive_layer_norm` has it.
    shift: as `adaptive_layer_norm` has it; often None.
    scale: as `adaptive_layer_norm` has it.
    axis: as `adaptive_layer_norm` has it.
    epsilon: added to the mean square, not negative; a number or a scalar array.
    where: as `adaptive_layer_norm` has it.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: as `adaptive_layer_norm` has it.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError, NotImplementedError: as `adaptive_layer_norm` does.

  References:
    Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023),
    section 3.2, with the norm of Zhang and Sennrich (2019), equation 4.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x, scale = jnp.array([[[2., 2.]]]), jnp.array([[0., 1.]])
    >>> nk.adaptive_rms_norm(x, None, scale, epsilon=0.).tolist()
    [[[1.0, 2.0]]]
  """
  options = axis, epsilon, where, axis_name, axis_index_groups, dtype
  return _modulated(x, shift, scale, False, *options, implementation)


def adaptive_residual(
  x: ArrayLike,
  branch: ArrayLike,
  gate: ArrayLike,
  *,
  axis: Axes = -1,
  dtype: DType | None = None,
) -> Array:
  """The residual of adaLN-Zero: a branch enters through a gate, zero at first.

    y = x + gate * branch,

  in float32 or wider, rounded once. Written out in bfloat16 the product is
  rounded too, and each of the products that the gradient of the gate sums over
  the tokens: twice and three times the error. Kept for the backward are the
  branch and the gate, as given.

  Args:
    x: the residual, an array (batch, ..., features) or in another order of
      axes, float16, bfloat16, float32, float64 or complex.
    branch: what attention or MLP made of the norm, of the shape of x.
    gate: shaped as the `scale` of `adaptive_layer_norm` may be.
    axis: the features, an axis or several. The first axis of x is the batch.
    dtype: dtype of the result; None keeps x's.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError: if x or the branch is not floating-point or complex, or the
      result cannot hold it.
    ValueError: if a shape does not fit.

  References:
    Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023),
    section 3.2, adaLN-Zero.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x, branch = jnp.ones((1, 2, 2)), jnp.full((1, 2, 2), 3.)
    >>> nk.adaptive_residual(x, branch, jnp.array([[0., 1.]])).tolist()
    [[[1.0, 4.0], [1.0, 4.0]]]
  """
  x = _types.check_input(x)
  branch = _types.check_input(branch, 'branch')
  if branch.shape != x.shape:
    raise ValueError(
      f'branch of shape {branch.shape} is added to x of shape {x.shape}, and '
      'must have its shape. Broadcast one of them first.'
    )
  checked = _feature(gate, x.shape, _types.check_axes(axis, x.ndim), 'gate')
  assert checked is not None
  dtype = _types.check_output_dtype(dtype, x.dtype)
  arguments.check_held(dtype, branch=branch, gate=checked)
  both = _types.promote(x.dtype, branch.dtype)
  wide = _types.statistics_dtype(both)

  def run(branch: Array, x: Array, gate: Array) -> Array:
    return (x.astype(wide) + gate.astype(wide) * branch).astype(dtype)

  y: Array = lean(run, wide, branch, x, checked)
  return y


def _modulated(
  x: ArrayLike,
  shift: ArrayLike | None,
  scale: ArrayLike | None,
  center: bool,
  axis: Axes,
  epsilon: Scalar,
  where: ArrayLike | None,
  axis_name: AxisName | None,
  axis_index_groups: Groups | None,
  dtype: DType | None,
  implementation: Implementation | None,
) -> Array:
  x = _types.check_input(x)
  axes = _types.check_axes(axis, x.ndim)
  if axis_name is None:
    arguments.check_some_axes(axes, x.shape)
  shift = _feature(shift, x.shape, axes, 'shift')
  scale = _feature(scale, x.shape, axes, 'scale')
  out = _types.check_output_dtype(dtype, x.dtype)
  arguments.check_held(out, shift=shift, scale=scale)
  args = arguments.check_arguments(
    x, scale, shift, axes, epsilon, where, dtype, implementation
  )
  _types.check_not_empty(x.shape, axes)
  if (implementation or platforms.preferred()) not in (None, 'xla'):
    is_pooled = axis_name is not None or axis_index_groups is not None
    found = rows.normalize(
      x, _shifted(args), axes, axes, is_pooled, center, implementation
    )
    if found is not None:
      return found

  def run(wide: Array, args: Arguments) -> Array:
    args = _shifted(args)  # in float32 or wider, like x
    stats = centred(wide, axes, args.where, center, given=args.given)
    stats = pool(stats, axis_name, axis_index_groups, center)
    return affine(wide, stats, args, center)

  y: Array = widened(run, x, args)
  return y


def _shifted(args: Arguments) -> Arguments:
  """With 1 + scale, in float32 or wider.

  Added where the norm is computed, not before as `scale_offset` is: one an
  example, it is kept for the backward as it was given.
  """
  if args.scale is None:
    return args
  real = _types.real_dtype(args.statistics_dtype)
  return args._replace(scale=1 + _types.widen(args.scale, real))


def _feature(
  value: ArrayLike | None,
  shape: tuple[int, ...],
  axes: tuple[int, ...],
  name: str,
) -> Array | None:
  """One number a feature, or one an example and feature, in x's rank."""
  if value is not None:
    rank = arguments.as_parameter(value, name).ndim
    axes = axes if 0 in axes or rank == len(axes) else (0, *axes)
  return arguments.check_feature(value, shape, axes, name)
