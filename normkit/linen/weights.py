"""Norms of the weights of a layer, two of them Flax's with normkit's call."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flax import linen as nn
from flax.linen import dtypes
from flax.typing import Initializer
import jax
import jax.numpy as jnp

from normkit import _types, weights
from normkit._docs import documented
from normkit._types import Array, Axes, DType, Scalar
from normkit.linen._shared import Checked
from normkit.weights._shared import (
  check_layer,
  is_bias,
  is_matrix,
  note_path,
)


@documented(nn.WeightNorm)
class WeightNorm(Checked, nn.WeightNorm):
  """Weight normalization of a layer, in place of `flax.linen.WeightNorm`.

  The parameters of the layer stay where they are; the scales are parameters of
  this module, each under the path of its weight: `Dense_0/kernel/scale`.

  Attributes:
    dtype: dtype of the normalized weights; None promotes each weight's and its
      scale's.
    variable_filter: strings; parameters whose path contains one of them are
      normalized. None: all parameters.

  Raises:
    TypeError: if the layer is not a module, `variable_filter` is not several
      strings, or a parameter that it chooses is not floating-point or complex.
    ValueError: if an axis is out of range, or epsilon is negative or not finite
      or looks like a width.

  References:
    Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks" (2016).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> x = jnp.ones((4, 3))
    >>> layer = normkit.linen.WeightNorm(nn.Dense(5))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x).shape
    (4, 5)
    >>> variables['params']['layer_instance/kernel/scale'].shape
    (5,)
  """

  variable_filter: Iterable[str] | None = frozenset({'kernel'})

  @nn.compact
  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the layer, given its arguments, with normalized weights."""
    return _call_chosen(self, args, kwargs)

  def _normalized(self, path: str, weight: Array) -> Array:
    axes, scale = _weight_axes(self.feature_axes, weight), None
    if self.use_scale:
      shape = tuple(weight.shape[a] for a in axes)
      name = f'{path}/scale'
      scale = self.param(name, self.scale_init, shape, self.param_dtype)
    return weights.weight_norm(
      weight,
      scale,
      feature_axes=axes,
      epsilon=self.epsilon,
      dtype=dtypes.canonicalize_dtype(weight, scale, dtype=self.dtype),
    )


class WeightStandardization(Checked):
  """Weight standardization of a layer, which Flax does not have.

  The parameters of the layer stay where they are. Gains, where asked for, are
  parameters of this module, each under the path of its weight:
  `Conv_0/kernel/gain`.

  Attributes:
    layer_instance: the layer whose weights are standardized at each call.
    epsilon: None: 1e-10, added to the variance, or scaled 1e-4, the least that
      the fan-in times the variance is taken to be.
    dtype: dtype of the standardized weights; None promotes each weight's and
      its gain's.
    param_dtype: dtype of the gains.
    use_gain: whether there are gains.
    gain_init: initializer of the gains.
    feature_axes: the axes along which each index has a mean and a variance of
      its own, an integer or several. None: one of each for the whole weight.
    scaled: divide by the root of the fan-in as well.
    variable_filter: strings; parameters whose path contains one of them are
      standardized. None: all parameters.

  Raises:
    TypeError: if the layer is not a module, `variable_filter` is not several
      strings, or a parameter that it chooses is not floating-point or complex.
    ValueError: if an axis is out of range, fewer than two elements share a
      mean, or epsilon is negative or not finite or looks like a width.

  References:
    Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization" (2019); scaled: Brock, De and
    Smith, "Characterizing Signal Propagation to Close the Performance Gap in
    Unnormalized ResNets" (2021).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> x = jnp.ones((4, 8, 8, 3))
    >>> layer = normkit.linen.WeightStandardization(nn.Conv(5, (3, 3)))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x).shape
    (4, 8, 8, 5)
    >>> list(variables['params'])
    ['layer_instance']
  """

  layer_instance: nn.Module
  epsilon: Scalar | None = None
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_gain: bool = False
  gain_init: Initializer = nn.initializers.ones
  feature_axes: Axes | None = -1
  scaled: bool = False
  variable_filter: Iterable[str] | None = frozenset({'kernel'})

  @nn.compact
  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the layer, given its arguments, with standardized weights."""
    return _call_chosen(self, args, kwargs, keep=True)

  def _normalized(self, path: str, weight: Array) -> Array:
    axes, gain = _weight_axes(self.feature_axes, weight), None
    if self.use_gain:
      shape = tuple(weight.shape[a] for a in axes)
      name = f'{path}/gain'
      gain = self.param(name, self.gain_init, shape, self.param_dtype)
    return weights.weight_standardize(
      weight,
      gain,
      feature_axes=axes,
      scaled=self.scaled,
      epsilon=self.epsilon,
      dtype=dtypes.canonicalize_dtype(weight, gain, dtype=self.dtype),
    )


@documented(nn.SpectralNorm)
class SpectralNorm(Checked, nn.SpectralNorm):
  """Spectral normalization of a layer, in place of `flax.linen.SpectralNorm`.

  Each parameter of the layer of rank two or more is divided by its largest
  singular value, its leading axes taken together; but none of the name `bias`:
  an attention layer's, (heads, features), is a vector. Where the power
  iteration stands is kept under the path of the weight: `Dense_0/kernel/u` and
  `Dense_0/kernel/sigma`.

  Attributes:
    n_steps: steps of the power iteration at each call; below one, the weights
      are left as they are.
    dtype: dtype of the normalized weights; None promotes each weight's and u's.

  Raises:
    TypeError: if the layer is not a module, `update_stats` not a static flag,
      or a parameter of rank two or more not real and floating-point.
    ValueError: if epsilon is negative or not finite or looks like a width, u
      does not fit its weight, or `error_on_non_matrix` finds a weight.

  References:
    Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative
    Adversarial Networks" (2018).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> x = jnp.ones((4, 3))
    >>> layer = normkit.linen.SpectralNorm(nn.Dense(5))
    >>> variables = layer.init(jax.random.key(0), x, update_stats=False)
    >>> y, updates = layer.apply(
    ...   variables, x, update_stats=True, mutable=['batch_stats']
    ... )
    >>> updates['batch_stats']['layer_instance/kernel/u'].shape
    (1, 5)
  """

  @nn.compact
  def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
    """Calls the layer, given its arguments, with normalized weights.

    `update_stats` says whether u and sigma are saved: True in training.
    """
    update = _types.check_flag(update_stats, 'update_stats')

    def normalized(path: str, weight: Array) -> Array:
      if self.n_steps < 1 or not is_matrix(weight, self.error_on_non_matrix):
        return weight
      return self._normalized(path, weight, update)

    return _call_with(self, normalized, args, kwargs)

  def _normalized(self, path: str, weight: Array, update: bool) -> Array:
    def draw() -> Array:
      shape, key = (1, weight.shape[-1]), self.make_rng('params')
      return jax.random.normal(key, shape, self.param_dtype)

    place, ones = self.collection_name, jnp.ones
    u = self.variable(place, f'{path}/u', draw)
    sigma = self.variable(place, f'{path}/sigma', ones, (), self.param_dtype)
    dtype = dtypes.canonicalize_dtype(weight, u.value, dtype=self.dtype)
    if is_bias(path):
      return weight.astype(dtype)
    y, state = weights.spectral_norm(
      weight,
      weights.SpectralNormState(u.value, sigma.value),
      n_steps=self.n_steps,
      epsilon=self.epsilon,
      update=update,
      dtype=dtype,
    )
    if update:
      u.value, sigma.value = state
    return y


def _weight_axes(feature_axes: Axes | None, weight: Array) -> tuple[int, ...]:
  axes = () if feature_axes is None else feature_axes
  return _types.check_axes(axes, weight.ndim, 'feature_axes', repeats=True)


def _call_chosen(
  module: WeightNorm | WeightStandardization,
  args: Sequence[Any],
  kwargs: dict[str, Any],
  keep: bool = False,
) -> Any:
  """Calls the wrapped layer, parameters that pass the filter normalized."""
  parts = _filter_parts(module.variable_filter)

  def normalized(path: str, weight: Array) -> Array:
    chosen = not parts or any(part in path for part in parts)
    return module._normalized(path, weight) if chosen else weight

  return _call_with(module, normalized, args, kwargs, keep)


def _call_with(
  module: WeightNorm | WeightStandardization | SpectralNorm,
  normalized: Callable[[str, Array], Array],
  args: Sequence[Any],
  kwargs: dict[str, Any],
  keep: bool = False,
) -> Any:
  """Calls the wrapped layer with its parameters normalized for the while.

  Initialising starts from the normalized parameters, as in Flax, each in the
  dtype that the layer gave it; with `keep` from those that the layer made.
  """
  layer = module.layer_instance
  check_layer(layer, nn.Module, 'nn.Dense(4)')
  given: list[Any] = []

  def leaf(path: Any, weight: Array) -> Array:
    below = jax.tree_util.keystr(path[1:], simple=True, separator='/')
    name = f'{layer.name}/{below}'
    with note_path(name):
      return normalized(name, weight)

  def enter(params: Any) -> Any:
    given.append(params)
    return jax.tree.map_with_path(leaf, params)

  def leave(params: Any) -> Any:
    if not given:  # made, not yet normalized
      return params
    if keep:
      return given[0]
    return jax.tree.map(lambda old, new: new.astype(old.dtype), *given, params)

  return nn.map_variables(
    lambda layer: layer(*args, **kwargs),
    'params',
    trans_in_fn=enter,
    trans_out_fn=leave,
    init=module.is_initializing(),
  )(layer)


def _filter_parts(variable_filter: Iterable[str] | None) -> tuple[str, ...]:
  """The strings that a path may contain; none where every path will do."""
  parts = tuple(variable_filter or ())
  if isinstance(variable_filter, str) or not all(
    isinstance(part, str) for part in parts
  ):
    raise TypeError(
      f'variable_filter must be None or several strings, got '
      f"{variable_filter!r:.60}. For example {{'kernel'}}."
    )
  return parts
