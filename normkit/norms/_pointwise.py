"""Functions of each value that several norms share."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from normkit import _types, arguments
from normkit._types import Array, ArrayLike, Axes, DType
from normkit.lean import lean


def bounded(
  function: Callable[[Array], Array],
  x: ArrayLike,
  alpha: ArrayLike,
  shift: ArrayLike | None,
  scale: ArrayLike | None,
  bias: ArrayLike | None,
  axis: Axes,
  where: ArrayLike | None,
  dtype: DType | None,
  name: str,
) -> Array:
  """function(alpha * x + shift) * scale + bias, in float32 or wider."""
  x = arguments.check_real(x, f'{name} is for real ones')
  features = _types.check_axes(axis, x.ndim)
  checked = {
    name: arguments.check_feature(value, x.shape, axes, name)
    for name, value, axes in (
      ('alpha', alpha, ()),
      ('shift', shift, ()),
      ('scale', scale, features),
      ('bias', bias, features),
    )
  }
  dtype = _types.check_output_dtype(dtype, x.dtype)
  arguments.check_held(dtype, **checked)
  mask = _types.check_where(where, x.shape)
  wide = _types.statistics_dtype(x.dtype)

  def run(x: Array, *given: Any) -> Array:
    *parameters, mask = given
    factor, shift, scale, bias = (_types.widen(p, wide) for p in parameters)
    x = factor * arguments.known(x, mask, wide)
    y = function(x if shift is None else x + shift)
    return arguments.scaled(y, scale, bias, dtype)

  y: Array = lean(run, wide, x, *checked.values(), mask)
  return y


def root(x: Array) -> Array:
  """The square root, whose derivative at zero is zero."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)
