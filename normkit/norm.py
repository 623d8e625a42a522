"""What every norm shares: the transform's protocol, parameters, checks."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _types, rows
from normkit._types import (
  Array,
  ArrayLike,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
)
from normkit.affine import Arguments, activated, affine
from normkit.moments import STATISTICS, centred, pool


class NormParams(NamedTuple):
  """The affine parameters of a norm; None where it has none.

  Attributes:
    scale: what the normalized values are multiplied by, or None.
    bias: what is added after that, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.NormParams(scale=jnp.ones(4)).bias is None
    True
  """

  scale: Array | None = None
  bias: Array | None = None


class EmptyState(NamedTuple):
  """The state of a norm that keeps none.

  Examples:
    >>> import normkit as nk
    >>> nk.EmptyState()
    EmptyState()
  """


class Norm(Protocol):
  """What a normalization transform is: two pure functions and its options.

  A frozen, hashable dataclass with these two methods is a transform; it can be
  closed over or passed to `jax.jit` as a static argument, and
  `normkit.linen.Norm` and `normkit.nnx.Norm` turn it into a module.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> norm: nk.Norm = nk.LayerNorm(epsilon=1e-5)
    >>> params, state = norm.init(jnp.ones((2, 3)))
    >>> y, state = norm.apply(params, state, jnp.ones((2, 3)), train=True)
  """

  def init(self, x: Array | jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    """Returns `(params, state)` for inputs of the shape and dtype of x."""
    ...

  def apply(
    self,
    params: Any,
    state: Any,
    x: Array,
    *,
    train: bool,
    where: Array | None = None,
  ) -> tuple[Array, Any]:
    """Returns `(y, state)`, y of the shape of x."""
    ...


def normalize(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  bias: ArrayLike | None = None,
  *,
  axis: Axes,
  feature_axis: Axes | None = None,
  center: bool = True,
  epsilon: float = 1e-6,
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
    epsilon: added to the variance, not negative.
    where: boolean mask that broadcasts to x; elements where it is False change
      neither the statistics nor any other output. A set with no element left
      gives zeros, then the bias.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'triton' on NVIDIA GPUs or 'mosaic_tpu', kernels for the
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
  features = (
    axes
    if feature_axis is None
    else _types.check_axes(feature_axis, x.ndim, 'feature_axis')
  )
  if axis_name is None:
    check_some_axes(axes, x.shape)
  args = check_arguments(
    x, scale, bias, features, epsilon, where, dtype, implementation
  )
  _types.check_not_empty(x.shape, axes)
  if implementation != 'xla':
    is_pooled = axis_name is not None or axis_index_groups is not None
    y = rows.normalize(
      x, args, axes, features, is_pooled, center, implementation
    )
    if y is not None:
      return y
  stats = centred(x, axes, args.where, center)
  stats = pool(stats, axis_name, axis_index_groups)
  return affine(x, stats, args, center)


def add_normalize(
  x: ArrayLike,
  residual: ArrayLike,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  *,
  center: bool,
  epsilon: float,
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
  if activation is not None and not callable(activation):
    raise TypeError(
      f'activation must be a function of an array or None, got {activation!r}.'
    )
  axes = _types.check_axes(-1, x.ndim)
  args = check_arguments(
    x, scale, bias, axes, epsilon, None, dtype, implementation
  )
  _types.check_not_empty(x.shape, axes)
  if implementation != 'xla':
    found = rows.normalize_rows(
      x, args, axes, False, center, implementation, residual, activation
    )
    if found is not None:
      return found
  total = x + residual
  stats = centred(total, axes, None, center)
  return activated(total, stats, args, center, activation), total


def products_saveable(primitive: Any, *_: Any, **params: Any) -> bool:
  """A policy for `jax.checkpoint`: keep products and statistics, no more.

  What is kept for the backward are the results of matrix products and
  convolutions and the statistics of norms; the output of a norm, and of the
  activation after it, is computed again from the norm's input. Wrap what
  belongs together, the norm, the activation and the layer that takes them: a
  block, or the whole loss.

  Returns:
    Whether JAX may keep what the primitive gives.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk
    >>> def block(x, kernel):
    ...   return x + jax.nn.gelu(nk.layer_norm(x)) @ kernel
    >>> lean = jax.checkpoint(block, policy=nk.products_saveable)
    >>> x, kernel = jnp.ones((4, 8)), jnp.ones((8, 8))
    >>> grads = jax.grad(lambda *a: lean(*a).sum(), (0, 1))(x, kernel)
    >>> grads[1].shape
    (8, 8)
  """
  products = 'dot_general', 'conv_general_dilated'
  return primitive.name in products or params.get('name') == STATISTICS


def check_arguments(
  x: Array,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  feature_axes: tuple[int, ...],
  epsilon: float,
  where: ArrayLike | None,
  dtype: DType | None,
  implementation: Implementation | None,
) -> Arguments:
  """Checks what all norms share and gives it in its broadcast form."""
  _types.check_implementation(implementation)
  return Arguments(
    check_feature(scale, x.shape, feature_axes, 'scale'),
    check_feature(bias, x.shape, feature_axes, 'bias'),
    _types.check_epsilon(epsilon),
    _types.check_where(where, x.shape),
    _types.check_output_dtype(dtype, x.dtype),
    _types.statistics_dtype(x.dtype),
  )


def check_some_axes(axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
  """Raises if no axis is normalized: every element would become zero."""
  if not axes:
    raise ValueError(
      f'no axis is left to normalize over in x of shape {shape}: every element '
      'would become zero. Give x with the axes that are reduced.'
    )


def check_feature(
  value: ArrayLike | None,
  shape: tuple[int, ...],
  feature_axes: tuple[int, ...],
  name: str,
  of: str = 'x',
) -> Array | None:
  """Returns `value`, one number a feature, in a form that broadcasts to x."""
  if value is None:
    return None
  value = jnp.asarray(value)
  features = tuple(shape[a] for a in feature_axes)
  if value.shape == features:
    return lax.expand_dims(value, _types.other_axes(feature_axes, len(shape)))
  if value.ndim != len(shape):
    raise ValueError(
      f'{name} of shape {value.shape} fits neither the feature axes '
      f'{feature_axes} of {of}, of shape {features}, nor the rank of {of}, of '
      f'shape {shape}. Give one number a feature, or an array of rank '
      f'{len(shape)} that broadcasts to {of}.'
    )
  _types.check_broadcast(value.shape, shape, name, of)
  return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamOptions:
  """The options of every transform that has a scale.

  The scale is `params.scale + scale_offset`: with an offset of one the
  parameter starts at zero, and weight decay draws the scale to one (Gemma).

  Frozen and hashable: lists become tuples, and what can be checked without an
  input is checked when the transform is made.
  """

  use_scale: bool = True
  scale_offset: float = 0.0
  param_dtype: DType = jnp.float32
  dtype: DType | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = _types.hashable(getattr(self, field.name))
      if check := _FIELD_CHECKS.get(field.name):
        value = check(value)
      object.__setattr__(self, field.name, value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ParamOptions):
  """The options of the transforms that take statistics."""

  epsilon: float = 1e-6
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  implementation: Implementation | None = None

  def shared(self) -> dict[str, Any]:
    """The options that every pure function takes."""
    names = 'epsilon', 'dtype', 'axis_name', 'axis_index_groups'
    return {n: getattr(self, n) for n in (*names, 'implementation')}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CenteredOptions(Options):
  """The options of the transforms that subtract a mean."""

  use_bias: bool = True


_FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
  'epsilon': _types.check_epsilon,
  'implementation': _types.check_implementation,
  'alpha': lambda alpha: _types.check_real(alpha, 'alpha'),
  'scale_offset': lambda offset: _types.check_real(offset, 'scale_offset'),
  'momentum': _types.check_momentum,
  'axis': lambda axis: (
    _types.as_axes(axis) if isinstance(axis, tuple) else axis
  ),
  'param_dtype': lambda dtype: _types.check_dtype(dtype, 'param_dtype'),
  'dtype': lambda dtype: None if dtype is None else _types.check_dtype(dtype),
}


def init_params(
  x: Array | jax.ShapeDtypeStruct, axis: Axes, options: ParamOptions
) -> NormParams:
  """Scales of one and biases of zero for the feature axes of x."""
  _types.check_dtype(x.dtype, 'x')
  axes = _types.check_axes(axis, len(x.shape))
  shape = tuple(x.shape[a] for a in axes)
  return NormParams(
    jnp.full(shape, 1 - options.scale_offset, options.param_dtype)
    if options.use_scale
    else None,
    jnp.zeros(shape, options.param_dtype) if _use_bias(options) else None,
  )


def check_params(
  params: Any, options: ParamOptions, kind: Any = NormParams, **others: bool
) -> Any:
  """Returns `params`, the offset in its scale; raises unless as init makes it.

  `kind` is its type, a NamedTuple with scale and bias; `others` tell which of
  its other fields may be None, and whether they are.
  """
  wanted = {'scale': options.use_scale, 'bias': _use_bias(options), **others}
  held = {name: wanted.get(name, True) for name in kind._fields}
  if not isinstance(params, kind) or any(
    (getattr(params, name) is not None) != hold for name, hold in held.items()
  ):
    fields = (f'{n}={"an array" if h else "None"}' for n, h in held.items())
    raise ValueError(
      f'params must be {kind.__name__}({", ".join(fields)}), got '
      f'{jax.tree.structure(params)}. Take them from init of this transform.'
    )
  if params.scale is None or not options.scale_offset:
    return params
  wide = _types.statistics_dtype(params.scale.dtype)
  return params._replace(scale=params.scale.astype(wide) + options.scale_offset)


def _use_bias(options: ParamOptions) -> bool:
  return getattr(options, 'use_bias', False)


def check_not_width(epsilon: Any, width: str) -> None:
  """Raises for a width in the place of epsilon; `width` tells its own."""
  if _types.is_integer(epsilon) and epsilon >= 1:
    raise ValueError(
      f'epsilon={epsilon} is added to the variance, but looks like a number of '
      f'features. {width} Leave epsilon out, or give {float(epsilon)} if you '
      'mean it.'
    )


def check_empty_state(state: Any) -> None:
  """Raises unless `state` is the empty state of a norm that keeps none."""
  if not isinstance(state, EmptyState):
    raise ValueError(
      f'state must be EmptyState(), got {jax.tree.structure(state)}: this norm '
      'keeps no running statistics. Take the state from its init.'
    )


def known(x: Array, where: Array | None, dtype: DType) -> Array:
  """x in `dtype`; where it is masked and not finite, zero."""
  x = x.astype(dtype)
  return x if where is None else jnp.where(where | jnp.isfinite(x), x, 0)


def scaled(
  y: Array, scale: Array | None, bias: Array | None, dtype: DType
) -> Array:
  """y * scale + bias in `dtype`, without those that are None."""
  y = y if scale is None else y * scale
  return (y if bias is None else y + bias).astype(dtype)


def check_real(x: ArrayLike, why: str) -> Array:
  """Returns x as a real array; `why` tells what complex numbers lack."""
  x = _types.check_input(x)
  if jnp.iscomplexobj(x):
    raise TypeError(
      f'x must be real, got {x.dtype}: {why}. Take its real and imaginary part '
      'as features of their own.'
    )
  return x


def check_groups(
  shape: tuple[int, ...], channels: tuple[int, ...], num_groups: int
) -> int:
  """Returns the one channel axis; raises unless the groups divide it."""
  if len(channels) != 1:
    raise ValueError(
      f'axis={channels} must be the one axis of the channels for group norm.'
    )
  (channel,) = channels
  if not _types.is_integer(num_groups):
    raise TypeError(f'num_groups must be an integer, got {num_groups!r}.')
  if num_groups < 1 or shape[channel] % num_groups:
    raise ValueError(
      f'num_groups={num_groups} does not divide the {shape[channel]} channels '
      f'of x of shape {shape}. Give a divisor of {shape[channel]}.'
    )
  return channel


def spatial_axes(
  ndim: int, channels: tuple[int, ...], batch_axis: Axes
) -> tuple[int, ...]:
  """The axes that are neither channels nor batch."""
  batch = _types.check_axes(batch_axis, ndim, 'batch_axis')
  if shared := set(batch) & set(channels):
    raise ValueError(
      f'batch_axis={batch_axis!r} and axis share the axes {sorted(shared)} of '
      f'an input of rank {ndim}: an axis holds examples or channels. For an '
      'input without a batch, give batch_axis=().'
    )
  return _types.other_axes(batch + channels, ndim)
