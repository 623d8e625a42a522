"""What the kernels share: options, and the maths of what is held on chip.

That is x in float32, in one tile or several: rows, the normalized axis last, or
places by channels. A function that takes the mean of such tiles says which.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from normkit import _ops
from normkit._types import Array, DType, Scalar, ruled

Tiles = Sequence[Array]
Mean = Callable[[Tiles], Array]
Narrow = Callable[[Array, DType], Array]  # rounds to a dtype, in its own


class Rounding(NamedTuple):
  """What is narrow before the result is, as some models round.

  Attributes:
    normalized: dtype of the normalized values that the scale multiplies.
    product: dtype of their product.
  """

  normalized: DType
  product: DType


class Gate(NamedTuple):
  """What each element is multiplied by: a function of its own gate.

  Attributes:
    activation: that function, elementwise, or None for the gate itself.
    is_last: whether it multiplies the result; or what is normalized.
  """

  activation: Callable[[Array], Array] | None
  is_last: bool

  def factor(self, gate: Array) -> Array:
    """What a gate, in float32 or wider, multiplies by, in its dtype."""
    if self.activation is None:
      return gate
    return jnp.asarray(self.activation(gate), gate.dtype)


@dataclasses.dataclass(frozen=True)
class Spec:
  """The options of a norm.

  Attributes:
    epsilon: added to the variance.
    center: whether the mean is subtracted.
    dtype: of the result.
    activation: applied to the result, elementwise, or None.
    groups: of channels of x (batch, ..., channels); None for rows, x's last
      axis.
    rounding: what is rounded on the way to the result, or None.
    gate: how there is a gate, or None.
  """

  epsilon: float
  center: bool
  dtype: DType
  activation: Callable[[Array], Array] | None = None
  groups: int | None = None
  rounding: Rounding | None = None
  gate: Gate | None = None


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


def reciprocal_root(var: Array, epsilon: Scalar) -> Array:
  """1 / sqrt(var + epsilon), and 0 where that would divide by zero."""
  if isinstance(epsilon, Array):  # it may be differentiated
    var, epsilon = var + epsilon.astype(var.dtype), 0.0
  root: Array = ruled(_reciprocal_root, var, epsilon)
  return root


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _reciprocal_root(var: Array, epsilon: float) -> Array:
  return root_of(var, epsilon)


def root_of(var: Array, epsilon: float) -> Array:
  """`reciprocal_root` for a kernel, which is not differentiated itself."""
  total = _ops.add(var, epsilon)
  if epsilon >= jnp.finfo(var.dtype).tiny:
    return lax.rsqrt(total)
  is_zero = total <= 0  # and NaN is not: it must show
  return jnp.where(is_zero, 0, lax.rsqrt(jnp.where(is_zero, 1, total)))


@_reciprocal_root.defjvp
def _reciprocal_root_jvp(
  epsilon: float, primals: Any, tangents: Any
) -> tuple[Array, Array]:
  root = _reciprocal_root(*primals, epsilon)
  return root, _ops.mul(log_change(tangents[0], root), root)


def log_change(dvar: Array, root: Array) -> Array:
  """How the logarithm of `reciprocal_root` changes.

  Factor by factor: float32 has the root of 1e-30, and not its cube.
  """
  return _ops.mul(_ops.mul(_ops.mul(dvar, -0.5), root), root)


def row_mean(size: int) -> Mean:
  """The mean of each row, of `size` elements; what lies beyond is zero."""

  def mean(tiles: Tiles) -> Array:
    return added([jnp.sum(t, -1, keepdims=True) for t in tiles]) / size

  return mean


def group_mean(size: int, groups: int, count: int) -> Mean:
  """The mean of each group of `size` channels, at each of these.

  Args:
    size: how many neighbouring channels are a group.
    groups: how many there are in a tile, or more.
    count: how many elements a group has.

  Returns:
    A function of tiles (places, ..., channels), zero beyond the groups.
  """

  def mean(tiles: Tiles) -> Array:
    sums = added([column_sums(t) for t in tiles])
    if groups == 1:
      sums = jnp.sum(sums, -1, keepdims=True)
    elif size > 1:
      shape = groups, sums.size
      group = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), size)
      is_member = group == lax.broadcasted_iota(jnp.int32, shape, 0)
      row = sums.reshape(1, -1)
      each = jnp.sum(jnp.where(is_member, row, 0), 1, keepdims=True)
      row = jnp.sum(jnp.where(is_member, each, 0), 0, keepdims=True)
      sums = row.reshape(sums.shape)
    return sums / count

  return mean


def column_sums(tile: Array) -> Array:
  """Over all axes but the last, one after the other, kept with size one."""
  for axis in range(tile.ndim - 1):
    tile = jnp.sum(tile, axis, keepdims=True)
  return tile


def added(parts: Tiles) -> Array:
  """Their sum, of one array at least."""
  return sum(parts[1:], parts[0])


def standardize(
  tiles: Tiles, mean: Mean, spec: Spec, inside: Tiles | None = None
) -> tuple[Tiles, Array, tuple[Array, ...]]:
  """x in units of its set's standard deviation, and the reciprocal of that.

  The mean is subtracted in two parts: the second is what the first had lost in
  rounding. Last come the statistics, the parts of the mean and the variance.
  """
  means = list[Array]()
  for _ in range(2 if spec.center else 0):
    means.append(mean(tiles))
    tiles = [t - means[-1] for t in tiles]
    if inside is not None:
      pairs = zip(inside, tiles, strict=True)
      tiles = [jnp.where(i, t, 0) for i, t in pairs]
  var = mean([t * t for t in tiles])
  root = reciprocal_root(var, spec.epsilon)
  return [t * root for t in tiles], root, (*means, var)


def outputs(
  xhat: Array, parameters: Parameters, spec: Spec, narrow: Narrow | None = None
) -> Array:
  """From standardized values to the result."""
  y = affine(xhat, parameters, spec, narrow)
  y = y if spec.activation is None else spec.activation(y)
  return y.astype(spec.dtype)


def gradients(
  dys: Tiles,
  xhats: Tiles,
  root: Array,
  parameters: Parameters,
  mean: Mean,
  spec: Spec,
) -> tuple[Tiles, Tiles]:
  """From the gradient of the result to that of x, and of scale * xhat + bias.

  With g the second of these and h = g * scale, the first is
  root * (h - mean(h) - xhat * mean(h * xhat)).
  """
  pairs = zip(dys, xhats, strict=True)
  gs = [slope_of(d, n, parameters, spec) for d, n in pairs]
  hs = [_times(g, parameters.scale) for g in gs]
  slope = mean([h * n for h, n in zip(hs, xhats, strict=True)])
  shift = mean(hs) if spec.center else 0
  pairs = zip(hs, xhats, strict=True)
  return [(h - n * slope - shift) * root for h, n in pairs], gs


def slope_of(
  dy: Array, xhat: Array, parameters: Parameters, spec: Spec
) -> Array:
  """The gradient of scale * xhat + bias from that of the result."""
  if spec.activation is None:
    return dy
  y = affine(xhat, parameters, spec)
  g: Array = jax.vjp(spec.activation, y)[1](dy)[0]
  return g


def _times(values: Array, scale: Array | None) -> Array:
  return values if scale is None else values * scale


def affine(
  xhat: Array, parameters: Parameters, spec: Spec, narrow: Narrow | None = None
) -> Array:
  """scale * xhat + bias; `narrow` rounds it on the way, for kernels that do."""
  if spec.rounding is None:
    y = _times(xhat, parameters.scale)
  else:
    assert narrow is not None
    y = narrow(xhat, spec.rounding.normalized)
    if parameters.scale is not None:
      y = narrow(y * parameters.scale, spec.rounding.product)
  return y if parameters.bias is None else y + parameters.bias
