"""What the kernels of row norms share: options, and the maths of a tile.

A tile is some rows of x in float32, on chip, the normalized axis last.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from normkit._types import Array, DType


@dataclasses.dataclass(frozen=True)
class Spec:
  """The options of a row norm.

  Attributes:
    epsilon: added to the variance.
    center: whether the mean is subtracted.
    dtype: of the result.
    activation: applied to the result, elementwise, or None.
  """

  epsilon: float
  center: bool
  dtype: DType
  activation: Callable[[Array], Array] | None = None


class Parameters(NamedTuple):
  """Scale and bias of a tile, (1, size), in float32; None for none."""

  scale: Array | None
  bias: Array | None


def statistics(spec: Spec) -> tuple[str, ...]:
  """What `standardize` gives last."""
  return ('pivot', 'offset', 'var') if spec.center else ('var',)


def result(x: Array, shape: tuple[int, ...], dtype: DType) -> Any:
  """What a kernel returns, varying over devices as x does."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)


def reciprocal_root(var: Array, epsilon: float) -> Array:
  """1 / sqrt(var + epsilon), and 0 where that would divide by zero."""
  total = var + jnp.asarray(epsilon, var.dtype)
  if epsilon >= jnp.finfo(var.dtype).tiny:
    return lax.rsqrt(total)
  positive = total > 0
  return jnp.where(positive, lax.rsqrt(jnp.where(positive, total, 1)), 0)


def standardize(
  x: Array, size: int, spec: Spec, inside: Array | None = None
) -> tuple[Array, Array, tuple[Array, ...]]:
  """x in units of its row's standard deviation, and the reciprocal of that.

  The mean is subtracted in two parts: the second is what the first had lost in
  rounding. Last come the statistics, the parts of the mean and the variance.
  """

  def mean(values: Array) -> Array:
    return jnp.sum(values, -1, keepdims=True) / size

  d, means = x, list[Array]()
  for _ in range(2 if spec.center else 0):
    means.append(mean(d))
    d = d - means[-1]
    d = d if inside is None else jnp.where(inside, d, 0)
  var = mean(d * d)
  root = reciprocal_root(var, spec.epsilon)
  return d * root, root, (*means, var)


def outputs(xhat: Array, parameters: Parameters, spec: Spec) -> Array:
  """From standardized values to the result."""
  y = _affine(xhat, parameters)
  y = y if spec.activation is None else spec.activation(y)
  return y.astype(spec.dtype)


def gradients(
  dy: Array,
  xhat: Array,
  root: Array,
  parameters: Parameters,
  size: int,
  spec: Spec,
) -> tuple[Array, Array]:
  """From the gradient of the result to that of x, and of scale * xhat + bias.

  With g the second of these and h = g * scale, the first is
  root * (h - mean(h) - xhat * mean(h * xhat)).
  """
  g = dy
  if spec.activation is not None:
    g = jax.vjp(spec.activation, _affine(xhat, parameters))[1](dy)[0]
  h = g if parameters.scale is None else g * parameters.scale
  dx = h - xhat * (jnp.sum(h * xhat, -1, keepdims=True) / size)
  if spec.center:
    dx = dx - jnp.sum(h, -1, keepdims=True) / size
  return dx * root, g


def _affine(xhat: Array, parameters: Parameters) -> Array:
  scale, bias = parameters
  y = xhat if scale is None else xhat * scale
  return y if bias is None else y + bias
