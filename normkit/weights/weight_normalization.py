"""Weight normalization: the length of a weight is a parameter of its own.

Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to
Accelerate Training of Deep Neural Networks" (2016).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from normkit import _types, arguments
from normkit._types import Array, ArrayLike, Axes, DType, Scalar
from normkit.norm import EmptyState, NormParams
from normkit.weights._shared import (
  Options,
  Tree,
  check_features,
  check_tree,
  choose,
  features_of,
  map_chosen,
  replace_chosen,
  unit,
)


def weight_norm(
  weight: ArrayLike,
  scale: ArrayLike | None = None,
  *,
  feature_axes: Axes | None = -1,
  epsilon: Scalar = 1e-12,
  dtype: DType | None = None,
) -> Array:
  """Weight normalization: the length of a weight is a parameter of its own.

    w = v / ||v|| * g,    ||v|| = sqrt(sum |v|^2 + epsilon),

  v the weight, g the scale, the sum over all axes but `feature_axes`, in
  float32 or wider.

  Args:
    weight: array of any shape, float16, bfloat16, float32, float64 or complex.
    scale: of the shape of the axes `feature_axes`, or of weight's rank and
      broadcasting against it. None: one.
    feature_axes: the axes along which each index has a length of its own, an
      integer or several; for kernels of Flax the last, the outputs. None: one
      length of the whole weight.
    epsilon: added to the squared length, not negative. With 0, a weight of
      zeros gives zeros.
    dtype: dtype of the result; None keeps weight's.

  Returns:
    An array of the shape of weight.

  Raises:
    TypeError: if weight is not floating-point or complex, or `dtype` cannot
      hold the result.
    ValueError: if an axis is out of range or given twice, scale does not fit,
      or epsilon is negative or not finite.

  References:
    Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks" (2016), equation 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import weight_norm
    >>> kernel = jnp.array([[2., 0.], [0., 4.]])
    >>> weight_norm(kernel, jnp.array([1., 3.])).tolist()
    [[1.0, 0.0], [0.0, 3.0]]
  """
  weight = _types.check_input(weight, 'weight')
  features = check_features(feature_axes, weight.ndim)
  scale = arguments.check_feature(
    scale, weight.shape, features, 'scale', 'weight'
  )
  epsilon = _types.check_epsilon(epsilon)
  dtype = _types.check_output_dtype(dtype, weight.dtype, 'weight')
  v = weight.astype(_types.statistics_dtype(weight.dtype))
  w = unit(v, epsilon, _types.other_axes(features, v.ndim))
  if scale is not None:
    _types.check_output_dtype(dtype, scale.dtype, 'scale')
    w = w * scale
  return w.astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightNorm(Options):
  """Weight normalization as a transform of pytrees; see `weight_norm`.

  The parameters are the scales, which train beside the weights; there is no
  state. Scales start at one, as in Flax, so that each length starts at one.

  Attributes:
    feature_axes: the axes along which each index has a length of its own, an
      integer or several. None: one length of the whole weight.
    use_scale: whether there are scales.
    epsilon: added to the squared length.
    param_dtype: dtype of the scales that `init` makes.
    dtype: dtype of the normalized weights; None keeps each weight's.
    where: `where(path, weight)` says which weights are normalized, by a path
      such as 'Dense_0/kernel' (an array alone has the path ''). None: those of
      rank two or more.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import WeightNorm
    >>> weights = {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)}
    >>> wn = WeightNorm(where=lambda path, weight: 'kernel' in path)
    >>> params, state = wn.init(weights)
    >>> params.scale
    {'bias': None, 'kernel': Array([1., 1.], dtype=float32)}
    >>> normalized, state = wn.apply(params, state, weights, update=True)
    >>> normalized['kernel'][0].tolist(), normalized['bias'].tolist()
    ([0.5, 0.5], [1.0, 1.0])

    To start from trained weights, let the scales be their lengths:

    >>> wn = WeightNorm()
    >>> params, state = wn.init(weights['kernel'])
    >>> lengths = jnp.linalg.norm(weights['kernel'], axis=0)
    >>> params = params._replace(scale=lengths)
    >>> wn.apply(params, state, weights['kernel'], update=True)[0][0].tolist()
    [1.0, 1.0]
  """

  feature_axes: Axes | None = -1
  use_scale: bool = True
  epsilon: Scalar = 1e-12

  def init(
    self, weights: Tree, key: Array | None = None
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for weights, arrays or their shapes.

    Args:
      weights: an array or a pytree of them; `jax.ShapeDtypeStruct` will do.
      key: not needed.

    Returns:
      `NormParams(scale)`, a tree like `weights` of arrays of the shape of the
      feature axes, None where there is none; and `EmptyState()`.

    Raises:
      TypeError, ValueError: as `weight_norm` does, or if `where` chooses none.
    """
    del key
    chosen = choose(self.where, weights)

    def ones(weight: Any) -> Array | None:
      features = features_of(weight, self.feature_axes)
      shape = tuple(weight.shape[a] for a in features)
      return jnp.ones(shape, self.param_dtype) if self.use_scale else None

    return NormParams(scale=map_chosen(ones, chosen, weights)), EmptyState()

  def apply(
    self, params: NormParams, state: EmptyState, weights: Tree, *, update: bool
  ) -> tuple[Tree, EmptyState]:
    """Returns `(weights, state)`; `update` makes no difference.

    Args:
      params: the scales, as `init` makes them.
      state: `EmptyState()`.
      weights: an array or a pytree of them.
      update: not needed.

    Returns:
      The weights, those that `where` chooses normalized; and the state.

    Raises:
      TypeError, ValueError: as `weight_norm` does, or if params or state are
        not those of `init`.
    """
    del update
    chosen = choose(self.where, weights)
    scaled = jax.tree.map(lambda c: c and self.use_scale, chosen)
    check_tree(params, NormParams(scale=scaled), 'params')
    check_tree(state, EmptyState(), 'state')

    def normalized(weight: Array, scale: Array | None) -> Array:
      return weight_norm(
        weight,
        scale,
        feature_axes=self.feature_axes,
        epsilon=self.epsilon,
        dtype=self.dtype,
      )

    new = map_chosen(normalized, chosen, weights, params.scale)
    return replace_chosen(chosen, weights, new), state
