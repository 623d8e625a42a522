"""L2 normalization, ScaleNorm (Nguyen and Salazar 2019) when it has a scale."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit import _types, arguments, norm
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
from normkit.norm import EmptyState, NormParams
from normkit.pooling import pool


def l2_norm(
  x: ArrayLike,
  scale: ArrayLike | None = None,
  *,
  axis: Axes = -1,
  epsilon: Scalar = 1e-12,
  where: ArrayLike | None = None,
  axis_name: AxisName | None = None,
  axis_index_groups: Groups | None = None,
  dtype: DType | None = None,
  implementation: Implementation | None = None,
) -> Array:
  """Vectors of length one, times a scale.

    y = x / sqrt(sum |x|^2 + epsilon) * scale,

  the sum over `axis`, in float32 or wider. With one learned number as scale it
  is ScaleNorm; over the features of a head, of queries and keys, it is QK norm
  (Henry and others 2020), whose scale takes the place of 1 / sqrt(features).

  Args:
    x: array of any shape, float16, bfloat16, float32, float64 or complex.
    scale: one number, of the shape of `axis`, or of x's rank and broadcasting
      against it. None: one.
    axis: the axes of a vector, an integer or several.
    epsilon: added to the sum of squares, not negative; a number or a scalar
      array.
    where: boolean mask that broadcasts to x; elements where it is False change
      no other output.
    axis_name: names of mapped axes over which sums are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    dtype: dtype of the result; None keeps x's.
    implementation: 'xla', or None to choose.

  Returns:
    An array of the shape of x.

  Raises:
    TypeError, ValueError: as `normalize` does.

  References:
    Nguyen and Salazar, "Transformers without Tears: Improving the
    Normalization of Self-Attention" (2019), equation 4.
    Henry, Dachapally, Pawar and Chen, "Query-Key Normalization for
    Transformers" (2020), section 3.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.l2_norm(jnp.array([3., 4.])).round(3).tolist()
    [0.6000000238418579, 0.800000011920929]
  """
  x = _types.check_input(x)
  axes = _types.check_axes(axis, x.ndim)
  if axis_name is None:
    arguments.check_some_axes(axes, x.shape)
  one = scale is not None and np.ndim(scale) == 0
  args = arguments.check_arguments(
    x, scale, None, () if one else axes, epsilon, where, dtype, implementation
  )
  _types.refuse_kernel(implementation, 'L2 norm has none')
  _types.check_not_empty(x.shape, axes)

  def run(x: Array, args: Arguments) -> Array:
    stats = centred(x, axes, args.where, center=False)
    stats = pool(stats, axis_name, axis_index_groups, center=False)
    stats = stats._replace(var=stats.var * stats.count)
    return affine(x, stats, args, center=False)

  y: Array = widened(run, x, args)
  return y


def _root(size: Any) -> float | Array:
  """The square root of a size, which may be a symbol."""
  return math.sqrt(size) if _types.is_known(size) else jnp.sqrt(size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleNorm(norm.Options):
  """L2 normalization with one learned length, as a transform; see `l2_norm`.

  The scale is one number, the square root of the vector's size at first; there
  is no state.

  Attributes:
    axis: the axes of a vector, an integer or several.
    epsilon: added to the sum of squares; a number or a scalar array.
    use_scale: whether there is a scale.
    scale_offset: added to the parameter to make the scale.
    param_dtype: dtype of the parameter that `init` makes.
    dtype: dtype of the result; None keeps x's.
    axis_name: names of mapped axes over which sums are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> x = jnp.ones((2, 4))
    >>> norm = nk.ScaleNorm()
    >>> params, state = norm.init(x)
    >>> y, state = norm.apply(params, state, x, train=True)
    >>> float(params.scale), y[0].tolist()
    (2.0, [1.0, 1.0, 1.0, 1.0])
  """

  axis: Axes = -1
  epsilon: Scalar = 1e-12

  def init(
    self, x: Array | jax.ShapeDtypeStruct
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for inputs like x, an array or its shape."""
    norm.check_like(x)
    axes = _types.check_axes(self.axis, len(x.shape))
    length = _root(math.prod(x.shape[a] for a in axes)) - self.scale_offset
    scale = jnp.asarray(length, self.param_dtype) if self.use_scale else None
    return NormParams(scale), EmptyState()

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
    scale, _ = norm.check_params(params, self)
    norm.check_empty_state(state)
    options = norm.options_of(self, l2_norm)
    return l2_norm(x, scale, where=where, **options), state
