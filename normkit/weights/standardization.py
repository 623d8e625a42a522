"""Weight standardization: mean 0 and variance 1 for each output.

Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel
Normalization and Weight Standardization" (2019), with the scaled form of Brock,
De and Smith (2021).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normkit import _types, arguments
from normkit._types import Array, ArrayLike, Axes, DType, Scalar
from normkit.centred import centred
from normkit.kernels.rows import reciprocal_root
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
)


def weight_standardize(
  weight: ArrayLike,
  gain: ArrayLike | None = None,
  *,
  feature_axes: Axes | None = -1,
  scaled: bool = False,
  epsilon: Scalar | None = None,
  dtype: DType | None = None,
) -> Array:
  """Weight standardization: mean 0 and variance 1 for each output.

  With N the number of elements that share a mean and a variance, those of all
  axes but `feature_axes`,

    w = (v - E[v]) / sqrt(Var[v] + epsilon) * gain,

  and scaled, so that an output has the variance of the inputs' mean square,

    w = (v - E[v]) / sqrt(max(N Var[v], epsilon)) * gain.

  Statistics are in float32 or wider.

  Args:
    weight: array of any shape, float16, bfloat16, float32, float64 or complex.
    gain: of the shape of the axes `feature_axes`, or of weight's rank and
      broadcasting against it, or one number, such as the gain of the
      activation. None: one.
    feature_axes: the axes along which each index has a mean and a variance of
      its own, an integer or several; for kernels of Flax the last, the outputs,
      and N is then the fan-in. None: one mean and variance of the whole weight.
    scaled: divide by the root of N as well.
    epsilon: not negative. None: 1e-10, and scaled 1e-4, the value of NF-nets.
      With 0, equal elements give zeros.
    dtype: dtype of the result; None keeps weight's.

  Returns:
    An array of the shape of weight.

  Raises:
    TypeError: if weight is not floating-point or complex, `scaled` is not a
      static flag, or `dtype` cannot hold the result.
    ValueError: if an axis is out of range or given twice, gain does not fit,
      fewer than two elements share a mean, or epsilon is negative or not
      finite.

  References:
    Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization" (2019), equations 2 to 4; Brock,
    De and Smith, "Characterizing Signal Propagation to Close the Performance
    Gap in Unnormalized ResNets" (2021), section 4.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import weight_standardize
    >>> kernel = jnp.array([[1.], [3.], [1.], [3.]])
    >>> weight_standardize(kernel).round(6).tolist()
    [[-1.0], [1.0], [-1.0], [1.0]]
    >>> weight_standardize(kernel, scaled=True).round(6).tolist()
    [[-0.5], [0.5], [-0.5], [0.5]]
  """
  weight = _types.check_input(weight, 'weight')
  features = check_features(feature_axes, weight.ndim)
  if gain is not None and np.ndim(gain) > 0:
    gain = arguments.check_feature(
      gain, weight.shape, features, 'gain', 'weight'
    )
  scaled = _types.check_flag(scaled, 'scaled')
  epsilon = _EPSILON[scaled] if epsilon is None else epsilon
  epsilon = _types.check_epsilon(epsilon)
  dtype = _types.check_output_dtype(dtype, weight.dtype, 'weight')
  axes = _types.other_axes(features, weight.ndim)
  _check_shared(weight.shape, axes)
  v = weight.astype(_types.statistics_dtype(weight.dtype))
  stats = centred(v, axes)
  power = stats.var
  if scaled:
    least = jnp.asarray(epsilon, power.dtype)
    power, epsilon = jnp.maximum(stats.count * power, least), 0.0
  v = (v - stats.pivot) - stats.offset
  w: Array = v * reciprocal_root(power, epsilon)
  if gain is not None:
    gain = jnp.asarray(gain)
    _types.check_output_dtype(dtype, gain.dtype, 'gain')
    w = w * gain
  return w.astype(dtype)


# Of weight standardization, by `scaled`: Kolesnikov and others, "Big Transfer"
# (2020), and Brock and others, as published with their models.
_EPSILON = {False: 1e-10, True: 1e-4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightStandardization(Options):
  """Weight standardization as a transform of pytrees; see `weight_standardize`.

  There are no parameters, or gains that train beside the weights and start at
  one; there is no state.

  Attributes:
    feature_axes: the axes along which each index has a mean and a variance of
      its own, an integer or several. None: one of each for the whole weight.
    scaled: divide by the root of the fan-in as well.
    use_gain: whether there are gains.
    epsilon: None: 1e-10, added to the variance, or scaled 1e-4, the least that
      the fan-in times the variance is taken to be.
    param_dtype: dtype of the gains that `init` makes.
    dtype: dtype of the standardized weights; None keeps each weight's.
    where: `where(path, weight)` says which weights are standardized, by a path
      such as 'Dense_0/kernel' (an array alone has the path ''). None: those of
      rank two or more; name the kernels where there are embeddings, or norms
      whose scales have such a rank.

  Examples:
    >>> import jax.numpy as jnp
    >>> from normkit.weights import WeightStandardization
    >>> weights = {'kernel': jnp.array([[1.], [5.]]), 'bias': jnp.ones(1)}
    >>> ws = WeightStandardization(use_gain=True)
    >>> params, state = ws.init(weights)
    >>> params.scale
    {'bias': None, 'kernel': Array([1.], dtype=float32)}
    >>> standardized, state = ws.apply(params, state, weights, update=True)
    >>> standardized['kernel'].round(6).tolist(), standardized['bias'].tolist()
    ([[-1.0], [1.0]], [1.0])
  """

  feature_axes: Axes | None = -1
  scaled: bool = False
  use_gain: bool = False

  def init(
    self, weights: Tree, key: Array | None = None
  ) -> tuple[NormParams, EmptyState]:
    """Returns `(params, state)` for weights, arrays or their shapes.

    Args:
      weights: an array or a pytree of them; `jax.ShapeDtypeStruct` will do.
      key: not needed.

    Returns:
      `NormParams(scale)`, a tree like `weights` of gains of the shape of the
      feature axes, None where there is none; and `EmptyState()`.

    Raises:
      TypeError, ValueError: as `weight_standardize` does, or if `where` chooses
        none.
    """
    del key
    chosen = choose(self.where, weights)

    def ones(weight: Any) -> Array | None:
      features = features_of(weight, self.feature_axes)
      axes = _types.other_axes(features, len(weight.shape))
      _check_shared(weight.shape, axes)
      shape = tuple(weight.shape[a] for a in features)
      return jnp.ones(shape, self.param_dtype) if self.use_gain else None

    return NormParams(scale=map_chosen(ones, chosen, weights)), EmptyState()

  def apply(
    self, params: NormParams, state: EmptyState, weights: Tree, *, update: bool
  ) -> tuple[Tree, EmptyState]:
    """Returns `(weights, state)`; `update` makes no difference.

    Args:
      params: the gains, as `init` makes them.
      state: `EmptyState()`.
      weights: an array or a pytree of them.
      update: not needed.

    Returns:
      The weights, those that `where` chooses standardized; and the state.

    Raises:
      TypeError, ValueError: as `weight_standardize` does, or if params or state
        are not those of `init`.
    """
    del update
    chosen = choose(self.where, weights)
    gained = jax.tree.map(lambda c: c and self.use_gain, chosen)
    check_tree(params, NormParams(scale=gained), 'params')
    check_tree(state, EmptyState(), 'state')

    def standardized(weight: Array, gain: Array | None) -> Array:
      return weight_standardize(
        weight,
        gain,
        feature_axes=self.feature_axes,
        scaled=self.scaled,
        epsilon=self.epsilon,
        dtype=self.dtype,
      )

    new = map_chosen(standardized, chosen, weights, params.scale)
    return replace_chosen(chosen, weights, new), state


def _check_shared(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
  """Raises unless a mean is that of two elements or more along the axes."""
  count = math.prod(shape[a] for a in axes)
  if count < 2:
    raise ValueError(
      f'weight has shape {shape}, and only {count} element shares a mean along '
      f'the axes {axes}: standardized, all would be zero. Give other '
      'feature_axes, or leave this weight as it is, in trees by where.'
    )
