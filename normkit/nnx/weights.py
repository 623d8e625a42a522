"""Norms of the weights of a layer, two of them Flax's with normkit's call."""

from collections.abc import Callable
import dataclasses
from dataclasses import KW_ONLY, InitVar
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Initializer
import jax
import jax.numpy as jnp

from normkit import _types, arguments, weights
from normkit._docs import documented
from normkit._types import Array, Axes, DType, Scalar
from normkit.nnx._shared import Running, read, with_signature_of, write
from normkit.weights._shared import (
  check_layer,
  is_bias,
  is_matrix,
  note_path,
)

_Path = tuple[Any, ...]


_KERNELS = nnx.PathContains('kernel')


def _check(layer_instance: Any, epsilon: Any) -> None:
  check_layer(layer_instance, nnx.Pytree, 'nnx.Linear(...)')
  arguments.check_not_width(epsilon, 'The layer is the first argument.')


class _Wrapper(nnx.Module):
  """What norms of weights share: a layer, some of its weights."""

  layer_instance: nnx.Module

  def _params(self) -> dict[_Path, nnx.Param[Array]]:
    """The parameters of the layer, by their paths."""
    return dict(nnx.to_flat_state(nnx.state(self.layer_instance, nnx.Param)))

  def _call_with(
    self,
    normalized: Callable[[_Path, nnx.Param[Array]], Array | None],
    *args: Any,
    **kwargs: Any,
  ) -> Any:
    """Calls the layer with its parameters normalized, None where not.

    What is called is a copy that shares all other variables with the layer;
    those that the call makes, as `sow` does, are handed over to the layer.
    """
    graph, state = nnx.split(self.layer_instance)
    leaves = dict(nnx.to_flat_state(state))
    for path, param in self._params().items():
      with note_path('/'.join(map(str, path))):
        value = normalized(path, param)
      if value is not None:
        leaves[path] = param.copy(value)
    layer = nnx.merge(graph, nnx.from_flat_state(leaves))
    y = layer(*args, **kwargs)
    after = dict(nnx.to_flat_state(nnx.state(layer)))
    made = {p: v for p, v in after.items() if v is not leaves.get(p)}
    if made:
      nnx.update(self.layer_instance, nnx.from_flat_state(made))
    return y


class _Filtered(_Wrapper):
  """What weight norm and weight standardization share: a filter, factors."""

  feature_axes: Any
  param_dtype: DType
  variable_filter: Any

  def _factors(self, use: bool, init: Initializer, rngs: nnx.Rngs) -> Any:
    """A parameter for each weight, in the shape of its features, or None."""
    if not use:
      return nnx.data(None)
    return nnx.data(
      {
        path: nnx.Param(self._init_factor(param, init, rngs))
        for path, param in self._params().items()
        if self.variable_filter(path, param)
      }
    )

  def _init_factor(
    self, param: nnx.Param[Array], init: Initializer, rngs: nnx.Rngs
  ) -> Array:
    axes = self._axes(param[...])
    key: Any = None if init is nnx.initializers.ones else rngs.params()
    shape = tuple(param.shape[a] for a in axes)
    factor: Array = init(key, shape, self.param_dtype)
    return factor

  def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the layer, given these arguments, with normalized weights."""

    def normalized(path: _Path, param: nnx.Param[Array]) -> Array | None:
      if not self.variable_filter(path, param):
        return None
      return self._normalized(path, param[...])

    return self._call_with(normalized, x, *args, **kwargs)

  def _axes(self, weight: Array) -> tuple[int, ...]:
    axes = () if self.feature_axes is None else self.feature_axes
    return _types.check_axes(axes, weight.ndim, 'feature_axes', repeats=True)

  def _normalized(self, path: _Path, weight: Array) -> Array:
    raise NotImplementedError


@documented(nnx.WeightNorm)
@with_signature_of(nnx.WeightNorm)
class WeightNorm(_Filtered, nnx.WeightNorm):
  """Weight normalization of a layer, in place of `flax.nnx.WeightNorm`.

  The parameters of the layer are never overwritten, and the scales are
  parameters too: both train.

  Args:
    scale_init: initializer of the scales; all but `nnx.initializers.ones` are
      given a key for each weight.
    dtype: dtype of the normalized weights; None promotes each weight's and its
      scale's.
    param_dtype: dtype of the scales.
    promote_dtype: accepted, and not called, as in Flax.
    rngs: gives a key for each scale.

  Attributes:
    scales: a dictionary of `nnx.Param` under the paths of their weights, such
      as `('kernel',)`, or None.

  Raises:
    TypeError: if the layer is not a module, or a parameter that the filter
      chooses is not floating-point or complex.
    ValueError: if an axis is out of range, a parameter has no scale, or epsilon
      is negative or not finite or looks like a width.

  References:
    Salimans and Kingma, "Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks" (2016).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = normkit.nnx.WeightNorm(nnx.Linear(3, 5, rngs=rngs), rngs=rngs)
    >>> layer(jnp.ones((4, 3))).shape, layer.scales['kernel',].shape
    ((4, 5), (5,))
  """

  def __init__(
    self,
    layer_instance: nnx.Module,
    *,
    use_scale: bool = True,
    scale_init: Initializer = nnx.initializers.ones,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    _check(layer_instance, options.get('epsilon'))
    # Flax's scales are not in param_dtype, nor drawn with a key.
    super().__init__(
      layer_instance,
      use_scale=False,
      scale_init=scale_init,
      rngs=rngs,
      **options,
    )
    self.feature_axes = _types.hashable(self.feature_axes)
    self.use_scale = use_scale
    self.scales: Any = self._factors(use_scale, scale_init, rngs)

  def _normalized(self, path: _Path, weight: Array) -> Array:
    scale = _stored(self.scales, path)[...] if self.use_scale else None
    return weights.weight_norm(
      weight,
      scale,
      feature_axes=self._axes(weight),
      epsilon=self.epsilon,
      dtype=dtypes.canonicalize_dtype(weight, scale, dtype=self.dtype),
    )


@dataclasses.dataclass(eq=False, repr=False)
class WeightStandardization(_Filtered):
  """Weight standardization of a layer, which Flax does not have.

  The parameters of the layer are never overwritten. Gains, where asked for, are
  parameters too.

  Args:
    layer_instance: the layer whose weights are standardized at each call.
    feature_axes: the axes along which each index has a mean and a variance of
      its own, an integer or several. None: one of each for the whole weight.
    scaled: divide by the root of the fan-in as well.
    use_gain: whether there are gains.
    gain_init: initializer of the gains; all but `nnx.initializers.ones` are
      given a key for each weight.
    epsilon: None: 1e-10, added to the variance, or scaled 1e-4, the least that
      the fan-in times the variance is taken to be.
    dtype: dtype of the standardized weights; None promotes each weight's and
      its gain's.
    param_dtype: dtype of the gains.
    variable_filter: an nnx filter: which parameters are standardized.
    rngs: gives a key for each gain.

  Attributes:
    gains: a dictionary of `nnx.Param` under the paths of their weights, such
      as `('kernel',)`, or None.

  Raises:
    TypeError: if the layer is not a module, or a parameter that the filter
      chooses is not floating-point or complex.
    ValueError: if an axis is out of range, fewer than two elements share a
      mean, a parameter has no gain, or epsilon is negative or not finite or
      looks like a width.

  References:
    Qiao, Wang, Liu, Shen and Yuille, "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization" (2019); scaled: Brock, De and
    Smith, "Characterizing Signal Propagation to Close the Performance Gap in
    Unnormalized ResNets" (2021).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> conv = nnx.Conv(3, 5, (3, 3), rngs=rngs)
    >>> layer = normkit.nnx.WeightStandardization(
    ...   conv, scaled=True, use_gain=True, rngs=rngs
    ... )
    >>> layer(jnp.ones((4, 8, 8, 3))).shape, layer.gains['kernel',].shape
    ((4, 8, 8, 5), (5,))
  """

  layer_instance: nnx.Module
  _: KW_ONLY
  feature_axes: Axes | None = -1
  scaled: bool = False
  use_gain: bool = False
  gain_init: Initializer = nnx.initializers.ones
  epsilon: Scalar | None = None
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  variable_filter: Any = _KERNELS
  rngs: InitVar[nnx.Rngs]

  def __post_init__(self, rngs: nnx.Rngs) -> None:
    _check(self.layer_instance, self.epsilon)
    axes = () if self.feature_axes is None else self.feature_axes
    self.feature_axes = _types.hashable(axes)
    self.variable_filter = nnx.filterlib.to_predicate(self.variable_filter)
    self.gains: Any = self._factors(self.use_gain, self.gain_init, rngs)

  def _normalized(self, path: _Path, weight: Array) -> Array:
    gain = _stored(self.gains, path)[...] if self.use_gain else None
    return weights.weight_standardize(
      weight,
      gain,
      feature_axes=self._axes(weight),
      scaled=self.scaled,
      epsilon=self.epsilon,
      dtype=dtypes.canonicalize_dtype(weight, gain, dtype=self.dtype),
    )


@documented(nnx.SpectralNorm)
@with_signature_of(nnx.SpectralNorm)
class SpectralNorm(_Wrapper, nnx.SpectralNorm, Running):
  """Spectral normalization of a layer, in place of `flax.nnx.SpectralNorm`.

  Each parameter of the layer of rank two or more is divided by its largest
  singular value, its leading axes taken together; but none of the name `bias`:
  an attention layer's, (heads, features), is a vector. The parameters
  themselves are never overwritten.

  Args:
    n_steps: steps of the power iteration at each call; below one, the weights
      are left as they are.
    dtype: dtype of the normalized weights; None keeps each weight's.
    update_stats: save u and sigma at each call; the call beats it, and so do
      `train()` and `eval()`.
    rngs: gives a key for the u of each weight.

  Attributes:
    batch_stats: a dictionary of `nnx.BatchStat`, u and sigma under the path of
      their weight: `('kernel', 'u')` and `('kernel', 'sigma')`.
    use_running_average: the opposite of `update_stats`.

  Raises:
    TypeError: if the layer is not a module, `update_stats` not a static flag,
      or a parameter of rank two or more not real and floating-point.
    ValueError: if epsilon is negative or not finite or looks like a width, a
      parameter has no fitting u, or `error_on_non_matrix` finds one.

  References:
    Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative
    Adversarial Networks" (2018).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = normkit.nnx.SpectralNorm(nnx.Linear(3, 5, rngs=rngs), rngs=rngs)
    >>> y = layer(jnp.ones((4, 3)))
    >>> layer.eval()
    >>> layer(jnp.ones((4, 3))).shape, layer.batch_stats['kernel', 'u'].shape
    ((4, 5), (1, 5))
  """

  def __init__(
    self,
    layer_instance: nnx.Module,
    *,
    update_stats: bool = True,
    **options: Any,
  ) -> None:
    _check(layer_instance, options.get('epsilon'))
    update = _types.check_flag(update_stats, 'update_stats')
    if options.get('n_steps', 1) >= 1:
      only = options.get('error_on_non_matrix', False)
      for param in jax.tree.leaves(nnx.state(layer_instance, nnx.Param)):
        is_matrix(param, only)
    super().__init__(layer_instance, update_stats=update, **options)

  def __call__(
    self, x: Any, update_stats: bool | None = None, **kwargs: Any
  ) -> Any:
    """Calls the layer, given x and `kwargs`, with normalized weights."""
    frozen = None
    if update_stats is not None:
      frozen = not _types.check_flag(update_stats, 'update_stats')
    update = not self._evaluates(frozen)

    def normalized(path: _Path, param: nnx.Param[Array]) -> Array | None:
      if not self._normalizes(param) or is_bias(str(path[-1])):
        return None
      return self._normalized(path, param[...], update)

    return self._call_with(normalized, x, **kwargs)

  def _normalizes(self, weight: Any) -> bool:
    return self.n_steps >= 1 and is_matrix(weight, self.error_on_non_matrix)

  def _normalized(self, path: _Path, weight: Array, update: bool) -> Array:
    names = weights.SpectralNormState._fields
    stored = weights.SpectralNormState(
      *(_stored(self.batch_stats, (*path, name)) for name in names)
    )
    y, state = weights.spectral_norm(
      weight,
      read(stored),
      n_steps=self.n_steps,
      epsilon=self.epsilon,
      update=update,
      dtype=dtypes.canonicalize_dtype(weight, dtype=self.dtype),
    )
    if update:
      write(stored, state)
    return y


def _stored(variables: dict[_Path, Any] | None, path: _Path) -> Any:
  """The variable of a weight, made with the module."""
  if variables is None or path not in variables:
    held = [] if variables is None else [*variables]
    raise ValueError(
      f'the module holds nothing for {path}, only for {held!s:.200}: it is '
      'made for the parameters that the layer has at construction. Wrap the '
      'layer when it is complete.'
    )
  return variables[path]
