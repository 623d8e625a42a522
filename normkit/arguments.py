"""The arguments that norms share, checked and in the form that maths takes."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _types
from normkit._types import (
  Array,
  ArrayLike,
  Axes,
  DType,
  Implementation,
  Scalar,
)
from normkit.affine import Arguments
from normkit.closures import Closure
from normkit.kernels.rows import Rounding


def check_arguments(
  x: Array,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  feature_axes: tuple[int, ...],
  epsilon: Scalar,
  where: ArrayLike | None,
  dtype: DType | None,
  implementation: Implementation | None,
  scale_offset: float = 0.0,
  round_before_scale: bool = False,
) -> Arguments:
  """Checks what all norms share and gives it in its broadcast form."""
  _types.check_implementation(implementation)
  wide = _types.statistics_dtype(x.dtype)
  epsilon = _types.check_epsilon(epsilon)
  if isinstance(epsilon, Array):
    epsilon = epsilon.astype(_types.real_dtype(wide))
  dtype = _types.check_output_dtype(dtype, x.dtype)
  scale = check_feature(scale, x.shape, feature_axes, 'scale')
  bias = check_feature(bias, x.shape, feature_axes, 'bias')
  check_held(dtype, scale=scale, bias=bias)
  scale = _plus_offset(scale, scale_offset, wide)
  rounding = None
  if _types.check_flag(round_before_scale, 'round_before_scale'):
    rounding = Rounding(x.dtype, _product_dtype(x, scale))
  where = _types.check_where(where, x.shape)
  return Arguments(scale, bias, epsilon, where, dtype, wide, rounding, x.dtype)


def _plus_offset(
  scale: Array | None, offset: float, wide: DType
) -> Array | None:
  """The scale that a parameter and its offset make, added in `wide`."""
  offset = _types.check_real(offset, 'scale_offset')
  if scale is None or not offset:
    return scale
  both: Array = _types.widen(scale, _types.real_dtype(wide)) + offset
  return both


def _product_dtype(x: Array, scale: Array | None) -> DType:
  return x.dtype if scale is None else _types.promote(x.dtype, scale.dtype)


def check_activation(
  activation: Callable[[Array], Array] | None,
) -> Callable[[Array], Array] | None:
  """Returns a function of an array, or None."""
  if activation is not None and not callable(activation):
    raise TypeError(
      f'activation must be a function of an array or None, got {activation!r}.'
    )
  return activation


def check_hash(activation: Callable[[Array], Array] | None) -> None:
  """Raises where `jax.jit` could not know it again."""
  if not _types.has_hash(activation):
    raise TypeError(
      f'activation has no hash, got {activation!r}: programs are known by it. '
      'Give a function of a module, or a class that has __hash__.'
    )


def check_elementwise(
  activation: Callable[[Array], Array] | None,
  shape: tuple[int, ...],
  dtype: DType,
) -> None:
  """Raises unless it makes a floating-point array of the shape it is given.

  Of complex numbers also complex ones. A kernel would give it tiles, and
  broadcast what is smaller. Of a traced array it closes over no rule of
  derivatives would know.
  """
  if activation is None:
    return
  alike = Closure(activation)
  if _types.has_hash(alike):
    _check_elementwise(alike, shape, dtype)
  else:
    _check_elementwise.__wrapped__(activation, shape, dtype)


@functools.lru_cache(256)
def _check_elementwise(
  activation: Callable[[Array], Array], shape: tuple[int, ...], dtype: DType
) -> None:
  """Once for all that are alike: it takes longer than a small norm."""
  given = jax.ShapeDtypeStruct(shape, dtype)
  program, found = jax.make_jaxpr(activation, return_shape=True)(given)
  if any(isinstance(c, jax.core.Tracer) for c in program.consts):
    raise TypeError(
      f'activation={activation!r} closes over an array that is traced, such as '
      'a parameter. Give a function of its argument alone, and apply what is '
      'learned outside of the norm.'
    )
  if not isinstance(found, jax.ShapeDtypeStruct):
    raise TypeError(
      f'activation makes {type(found).__name__} of an array, not an array. '
      'Give an elementwise function.'
    )
  if found.shape != shape:
    raise ValueError(
      f'activation makes an array of shape {found.shape} of one of shape '
      f'{shape}. Give an elementwise function.'
    )
  kind = (
    jnp.inexact if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.floating
  )
  if not jnp.issubdtype(found.dtype, kind):
    raise TypeError(
      f'activation makes {found.dtype} of {jnp.dtype(dtype)}. Give a function '
      'whose result is floating-point, for example with .astype(z.dtype).'
    )


def check_held(dtype: DType, **parameters: Array | None) -> None:
  """Raises if a parameter is complex, and the result of `dtype` real."""
  for name, value in parameters.items():
    if value is not None:
      _types.check_output_dtype(dtype, value.dtype, name)


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
  given, value = value, as_parameter(value, name)
  if value.dtype == jnp.bool_:
    raise TypeError(
      f'{name} must hold numbers, got booleans. Give a mask by name: where=.'
    )
  features = tuple(shape[a] for a in feature_axes)
  others = _types.other_axes(feature_axes, len(shape))
  if value.shape == features:
    return lax.expand_dims(value, others)
  if value.ndim != len(shape):
    raise ValueError(
      f'{name} of shape {value.shape} fits neither the feature axes '
      f'{feature_axes} of {of}, of shape {features}, nor the rank of {of}, of '
      f'shape {shape}. Give one number a feature, or an array of rank '
      f'{len(shape)} that broadcasts to {of}.'
      f'{other_axis(value.shape, shape, feature_axes)}{not_sizes(given)}'
    )
  is_whole = jnp.issubdtype(value.dtype, jnp.integer)
  if is_whole and any(value.shape[a] != 1 for a in others):
    raise TypeError(
      f'{name} holds integers of places in {of}, as a mask may, of '
      f'{value.dtype}. Give a mask by name: where={name}.astype(bool). Cast '
      f'another {name}: {name}.astype(jnp.float32).'
    )
  _types.check_broadcast(value.shape, shape, name, of)
  return value


def as_parameter(value: ArrayLike, name: str) -> Array:
  """Returns `value` as an array; raises for parameters that are several."""
  if hasattr(value, '_fields') or isinstance(value, dict):
    raise TypeError(
      f'{name} must be an array, got {type(value).__name__}. Functions take '
      'the arrays in it one by one; apply of a transform takes it whole, in '
      'the order params, state, x.'
    )
  return _types.as_array(value)


def other_axis(
  features: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, ...]
) -> str:
  """A sentence for a message, if the features lie on another axis of x."""
  if len(features) > len(shape):
    return ' If that is x: it comes first.'
  found = [
    a for a in range(1, len(shape)) if (shape[a],) == features and (a,) != axes
  ]
  if not found:
    return ''
  return (
    f' Axis {found[0]} of x has that size: if its channels come first, give '
    f'axis={found[0]}, or move them last with jnp.moveaxis(x, {found[0]}, -1).'
  )


def not_sizes(value: Any) -> str:
  """A sentence for a message, if a width or shape may have been meant."""
  sizes = value if isinstance(value, (list, tuple)) else (value,)
  if not all(_types.is_integer(size) for size in sizes):
    return ''
  return ' If that is a width or shape: axis= says which axes, if not the last.'


def check_num_features(size: Any) -> None:
  """Raises for a shape in the place of a number of features."""
  if not _types.is_integer(size):
    raise TypeError(
      f'num_features must be an integer, got {size!r}. Of several feature axes '
      'it is the product of their sizes.'
    )


def check_not_width_as_flag(flag: Any) -> None:
  """Raises for a width in the place of `use_running_average`."""
  if _types.is_integer(flag) and flag >= 1:
    raise ValueError(
      f'use_running_average={flag} is a flag, but looks like a number of '
      'features. Modules find the width themselves. Leave it out, or give '
      'True if you mean it.'
    )


def check_not_width(epsilon: Any, width: str) -> None:
  """Raises for a width in the place of epsilon; `width` tells its own."""
  if _types.is_integer(epsilon) and epsilon >= 1:
    raise ValueError(
      f'epsilon={epsilon} is added to the variance, but looks like a number of '
      f'features. {width} Leave epsilon out, or give {float(epsilon)} if you '
      'mean it.'
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


def check_real(x: ArrayLike, why: str, name: str = 'x') -> Array:
  """Returns x as a real array; `why` tells what complex numbers lack."""
  x = _types.check_input(x, name)
  if jnp.iscomplexobj(x):
    raise TypeError(
      f'{name} must be real, got {x.dtype}: {why}. Take its real and imaginary '
      'part as features of their own.'
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
      f'{_channels_first(shape, channel, num_groups)}'
    )
  return channel


def _channels_first(
  shape: tuple[int, ...], channel: int, num_groups: int
) -> str:
  """A sentence for a message, if the groups divide axis 1, and x is images."""
  is_likely = len(shape) > 2 and channel != 1 and num_groups > 1
  if not is_likely or shape[1] % num_groups:
    return ''
  return other_axis(shape[1:2], shape, (channel,))


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
