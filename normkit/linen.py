"""Flax linen modules: variables in, a pure function of normkit, variables out.

The names, fields, parameters and collections are those of `flax.linen`, so that
changing `nn.BatchNorm` to `normkit.linen.BatchNorm` is all there is to do. No
maths here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY
from typing import Any

from flax import linen as nn
from flax.core.scope import union_filters
from flax.linen import dtypes
from flax.linen.recurrent import DenseParams
import jax
import jax.numpy as jnp

from normkit import (
  _types,
  arguments,
  general,
  norm,
  recurrent,
  weights,
)
from normkit._types import Array, Axes, AxisName, DType, Groups, Implementation
from normkit.norms import _running, batch, group, instance

Initializer = nn.initializers.Initializer


class Norm(nn.Module):
  """Any normalization transform as a linen module.

  Parameters are in the collection `params`, the state in `batch_stats`, both
  under the names that they have in the transform's tuples. Initialising leaves
  the state as `transform.init` makes it.

  Attributes:
    transform: the transform, such as `normkit.LayerNorm()`, or anyone's own.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk, normkit.linen
    >>> norm = normkit.linen.Norm(nk.GroupNorm(num_groups=2))
    >>> x = jnp.ones((1, 3, 4))
    >>> variables = norm.init(jax.random.key(0), x, train=False)
    >>> norm.apply(variables, x, train=False).shape
    (1, 3, 4)
  """

  transform: norm.Norm

  @nn.compact
  def __call__(
    self, x: Array, *, train: bool, mask: Array | None = None
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    params, state = self.transform.init(x)
    params = _map_fields(
      lambda name, value: self.param(name, lambda _: value), params, 'params'
    )
    variables: dict[str, nn.Variable[Any]] = {}

    def variable(name: str, value: Any) -> Any:
      variables[name] = self.variable('batch_stats', name, lambda: value)
      return variables[name].value

    def save(name: str, value: Any) -> None:
      variables[name].value = value

    state = _map_fields(variable, state, 'state')
    train = train and not self.is_initializing()
    y, state = self.transform.apply(params, state, x, train=train, where=mask)
    if train:
      _map_fields(save, state, 'state')
    return y


def _map_fields(
  function: Callable[[str, Any], Any], tree: Any, default: str
) -> Any:
  """Maps the fields of a NamedTuple by name, or any other tree as a whole."""
  if not jax.tree.leaves(tree):
    return tree
  if not hasattr(tree, '_fields'):
    return function(default, tree)
  return type(tree)(
    *(
      None if value is None else function(name, value)
      for name, value in zip(tree._fields, tree, strict=True)
    )
  )


class _FlaxNorm(nn.Module):
  """What the modules below share: the check that Flax lacks."""

  def __post_init__(self) -> None:
    arguments.check_not_width(
      self.epsilon, 'Modules find the width themselves.'
    )
    super().__post_init__()


class BatchNorm(_FlaxNorm):
  """Batch normalization, in place of `flax.linen.BatchNorm`.

  Attributes:
    use_running_average: normalize with the stored statistics; given here or at
      the call, not both.
    axis: the feature axes, an integer or several.
    momentum: the share of the old running value that is kept; None weighs all
      updates equally, with their number in `batch_stats/count`.
    epsilon: added to the variance.
    dtype: dtype of the result; None promotes x's and the parameters'.
    param_dtype: dtype of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the variance is accurate either way.
    force_float32_reductions: False keeps the stored statistics in param_dtype;
      they are taken in float32 or wider all the same.
    debias: forget the initial values from the first update on.
    unbiased: store the unbiased variance, as PyTorch does.
    skip_nonfinite: keep the stored statistics of a feature whose batch
      statistics are not finite.
    virtual_batch_size: normalize each so many neighbouring examples by their
      own statistics.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3))
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> variables = norm.init(jax.random.key(0), x)
    >>> y, updates = norm.apply(variables, x, mutable=['batch_stats'])
    >>> updates['batch_stats']['mean'].shape
    (3,)
  """

  use_running_average: bool | None = None
  axis: Axes = -1
  momentum: float | None = 0.99
  epsilon: float = 1e-5
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Initializer = nn.initializers.zeros
  scale_init: Initializer = nn.initializers.ones
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  use_fast_variance: bool = True
  force_float32_reductions: bool = True
  _: KW_ONLY
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  virtual_batch_size: int | None = None
  implementation: Implementation | None = None

  @nn.compact
  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    eval_mode = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    axes = _types.check_axes(self.axis, x.ndim, repeats=True)
    shape = tuple(x.shape[a] for a in axes)
    stored = jnp.float32 if self.force_float32_reductions else self.param_dtype
    mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, stored)
    var = self.variable('batch_stats', 'var', jnp.ones, shape, stored)
    count = None
    if self.debias or self.momentum is None:
      count = self.variable('batch_stats', 'count', jnp.zeros, shape, jnp.int32)
    x, options = _prepare(self, x, shape, mask)
    old = _running.BatchNormState(
      *_promoted(mean.value, var.value, _flax_dtype(self, x)),
      jnp.zeros(shape, jnp.int32) if count is None else count.value,
    )
    if initializing := self.is_initializing():
      options.update(axis_name=None, axis_index_groups=None)
    y, new = batch.batch_norm(
      x,
      old,
      train=not eval_mode,
      axis=axes,
      momentum=self.momentum,
      debias=self.debias,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
      virtual_batch_size=None if initializing else self.virtual_batch_size,
      check_batch=False,
      **options,
    )
    if not eval_mode and not initializing:
      mean.value, var.value = new.mean, new.var
      if count is not None:
        count.value = new.count
    return y


class LayerNorm(_FlaxNorm):
  """Layer normalization, in place of `flax.linen.LayerNorm`.

  Attributes:
    epsilon: added to the variance.
    dtype: dtype of the result; None promotes x's and the parameters'.
    param_dtype: dtype of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    reduction_axes: the normalized axes, an integer or several.
    feature_axes: the axes of the parameters, an integer or several.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the variance is accurate either way.
    force_float32_reductions: accepted; statistics are float32 or wider.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3))
    >>> norm = normkit.linen.LayerNorm()
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3)
  """

  epsilon: float = 1e-6
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Initializer = nn.initializers.zeros
  scale_init: Initializer = nn.initializers.ones
  reduction_axes: Axes = -1
  feature_axes: Axes = -1
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  use_fast_variance: bool = True
  force_float32_reductions: bool = True
  _: KW_ONLY
  implementation: Implementation | None = None

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=True)


class RMSNorm(_FlaxNorm):
  """Root mean square normalization, in place of `flax.linen.RMSNorm`.

  Attributes:
    epsilon: added to the mean square.
    dtype: dtype of the result; None promotes x's and the parameters'.
    param_dtype: dtype of the parameters.
    use_scale: whether there is a scale.
    scale_init: initializer of the scale.
    reduction_axes: the normalized axes, an integer or several.
    feature_axes: the axes of the parameters, an integer or several.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the mean square is accurate either way.
    force_float32_reductions: accepted; statistics are float32 or wider.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3))
    >>> norm = normkit.linen.RMSNorm()
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3)
  """

  epsilon: float = 1e-6
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_scale: bool = True
  scale_init: Initializer = nn.initializers.ones
  reduction_axes: Axes = -1
  feature_axes: Axes = -1
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  use_fast_variance: bool = True
  force_float32_reductions: bool = True
  _: KW_ONLY
  implementation: Implementation | None = None

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=False)


class GroupNorm(_FlaxNorm):
  """Group normalization, in place of `flax.linen.GroupNorm`.

  Attributes:
    num_groups: how many groups of channels, or None where group_size is given.
    group_size: how many channels a group has, or None.
    epsilon: added to the variance.
    dtype: dtype of the result; None promotes x's and the parameters'.
    param_dtype: dtype of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    reduction_axes: the normalized axes, the last (the channels) among them;
      None takes all but the first.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the variance is accurate either way.
    force_float32_reductions: accepted; statistics are float32 or wider.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3, 8))
    >>> norm = normkit.linen.GroupNorm(num_groups=2)
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3, 8)
  """

  num_groups: int | None = 32
  group_size: int | None = None
  epsilon: float = 1e-6
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Initializer = nn.initializers.zeros
  scale_init: Initializer = nn.initializers.ones
  reduction_axes: Axes | None = None
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  use_fast_variance: bool = True
  force_float32_reductions: bool = True
  _: KW_ONLY
  implementation: Implementation | None = None

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    batch_axes = group.batch_axes(self.reduction_axes, x.ndim)
    shape = x.shape[-1:]
    groups, _ = group.groups_of(shape[0], self.num_groups, self.group_size)
    x, options = _prepare(self, x, shape, mask)
    return group.group_norm(
      x, num_groups=groups, batch_axis=batch_axes, **options
    )


class InstanceNorm(_FlaxNorm):
  """Instance normalization, in place of `flax.linen.InstanceNorm`.

  Attributes:
    epsilon: added to the variance.
    dtype: dtype of the result; None promotes x's and the parameters'.
    param_dtype: dtype of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    feature_axes: the channels, an axis or several; not the first, the batch.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the variance is accurate either way.
    force_float32_reductions: accepted; statistics are float32 or wider.
    implementation: 'xla', or None to choose.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3, 8))
    >>> norm = normkit.linen.InstanceNorm()
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3, 8)
  """

  epsilon: float = 1e-6
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Initializer = nn.initializers.zeros
  scale_init: Initializer = nn.initializers.ones
  feature_axes: Axes = -1
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  use_fast_variance: bool = True
  force_float32_reductions: bool = True
  _: KW_ONLY
  implementation: Implementation | None = None

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    axes = instance.check_feature_axes(self.feature_axes, x.ndim)
    x, options = _prepare(self, x, tuple(x.shape[a] for a in axes), mask)
    return instance.instance_norm(x, axis=axes, **options)


def _normalize(
  module: LayerNorm | RMSNorm, x: Array, mask: Array | None, center: bool
) -> Array:
  features, reduced = (
    _types.check_axes(getattr(module, name), x.ndim, name, repeats=True)
    for name in ('feature_axes', 'reduction_axes')
  )
  x, options = _prepare(module, x, tuple(x.shape[a] for a in features), mask)
  return general.normalize(
    x, axis=reduced, feature_axis=features, center=center, **options
  )


def _prepare(
  module: Any, x: Array, shape: Sequence[int], mask: Array | None
) -> tuple[Array, dict[str, Any]]:
  """Makes the parameters; returns x and what all functions are told."""
  scale = bias = None
  if module.use_scale:
    scale = _param(module, 'scale', module.scale_init, shape)
  if getattr(module, 'use_bias', False):
    bias = _param(module, 'bias', module.bias_init, shape)
  dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=module.dtype)
  options = {
    'scale': scale,
    'epsilon': module.epsilon,
    'where': _types.check_mask(mask, x.shape, cast=True),
    'axis_name': module.axis_name,
    'axis_index_groups': module.axis_index_groups,
    'dtype': dtype,
    'implementation': module.implementation,
  }
  if bias is not None:
    options['bias'] = bias
  return _types.as_inexact(x, dtype), options


def _param(
  module: Any, name: str, init: Initializer, shape: Sequence[int]
) -> Array:
  """A parameter; without float32 forced in `param_dtype`, however stored."""
  value: Array = module.param(name, init, shape, module.param_dtype)
  if module.force_float32_reductions:
    return value
  return value.astype(module.param_dtype)


def _flax_dtype(module: BatchNorm, x: Array) -> DType:
  """The dtype of Flax's statistics, to which it promotes the stored ones."""
  dtype = x.dtype if module.dtype is None else module.dtype
  if not module.force_float32_reductions:
    return dtype
  return _types.statistics_dtype(dtype)


def _promoted(mean: Array, var: Array, dtype: DType) -> tuple[Array, Array]:
  """The statistics in `dtype` or wider, the variance real."""
  real = _types.real_dtype(dtype)
  return (
    mean.astype(jnp.promote_types(mean.dtype, dtype)),
    var.astype(jnp.promote_types(var.dtype, real)),
  )


class WeightNorm(_FlaxNorm):
  """Weight normalization of a layer, in place of `flax.linen.WeightNorm`.

  The parameters of the layer stay where they are; the scales are parameters of
  this module, each under the path of its weight: `Dense_0/kernel/scale`.

  Attributes:
    layer_instance: the layer whose weights are normalized at each call.
    epsilon: added to the squared length.
    dtype: dtype of the normalized weights; None promotes each weight's and its
      scale's.
    param_dtype: dtype of the scales.
    use_scale: whether there are scales.
    scale_init: initializer of the scales.
    feature_axes: the axes along which each index has a length of its own, an
      integer or several. None: one length of the whole weight.
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

  layer_instance: nn.Module
  epsilon: float = 1e-12
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_scale: bool = True
  scale_init: Initializer = nn.initializers.ones
  feature_axes: Axes | None = -1
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


class WeightStandardization(_FlaxNorm):
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
  epsilon: float | None = None
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


class SpectralNorm(_FlaxNorm):
  """Spectral normalization of a layer, in place of `flax.linen.SpectralNorm`.

  Each parameter of the layer of rank two or more is divided by its largest
  singular value, its leading axes taken together. Where the power iteration
  stands is kept under the path of the weight: `Dense_0/kernel/u` and
  `Dense_0/kernel/sigma`.

  Attributes:
    layer_instance: the layer whose weights are normalized at each call.
    n_steps: steps of the power iteration at each call; below one, the weights
      are left as they are.
    epsilon: added to squared lengths in the power iteration.
    dtype: dtype of the normalized weights; None promotes each weight's and u's.
    param_dtype: dtype of u and sigma.
    error_on_non_matrix: refuse parameters of rank three or more.
    collection_name: the collection that holds u and sigma.

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

  layer_instance: nn.Module
  n_steps: int = 1
  epsilon: float = 1e-12
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  error_on_non_matrix: bool = False
  collection_name: str = 'batch_stats'

  @nn.compact
  def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
    """Calls the layer, given its arguments, with normalized weights.

    `update_stats` says whether u and sigma are saved: True in training.
    """
    update = _types.check_flag(update_stats, 'update_stats')

    def normalized(path: str, weight: Array) -> Array:
      if self.n_steps < 1 or not _types.is_matrix(
        weight, self.error_on_non_matrix
      ):
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
    y, state = weights.spectral_norm(
      weight,
      weights.SpectralNormState(u.value, sigma.value),
      n_steps=self.n_steps,
      epsilon=self.epsilon,
      update=update,
      dtype=dtypes.canonicalize_dtype(weight, u.value, dtype=self.dtype),
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
  _types.check_layer(layer, nn.Module, 'nn.Dense(4)')
  given: list[Any] = []

  def leaf(path: Any, weight: Array) -> Array:
    below = jax.tree_util.keystr(path[1:], simple=True, separator='/')
    name = f'{layer.name}/{below}'
    with _types.note_path(name):
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


class LayerNormLSTMCell(nn.LSTMCell):
  """A layer-normalized LSTM cell, in place of `flax.linen.LSTMCell`.

  The parameters of Flax's cell under Flax's names, and those of the norms under
  `norm_i` (of the input's sums), `norm_h` (of the hidden state's) and `norm_c`
  (of the memory). See `normkit.recurrent.layer_norm_lstm`.

  Attributes:
    features: number of hidden units.
    gate_fn: the function of the gates.
    activation_fn: the function of the candidate and of the memory.
    kernel_init: initializer of the kernels of the input.
    recurrent_kernel_init: initializer of the kernels of the hidden state.
    bias_init: initializer of the biases.
    dtype: dtype of the sums of the gates; None promotes the inputs' and the
      parameters'.
    param_dtype: dtype of the parameters and of a new carry.
    carry_init: initializer of the carry.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> rnn = nn.RNN(normkit.linen.LayerNormLSTMCell(4))
    >>> x = jnp.ones((2, 5, 3))
    >>> variables = rnn.init(jax.random.key(0), x)
    >>> rnn.apply(variables, x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  _: KW_ONLY
  epsilon: float = 1e-6
  scale_init: Initializer = nn.initializers.ones
  implementation: Implementation | None = None

  @nn.compact
  def __call__(
    self, carry: tuple[Array, Array], inputs: Array
  ) -> tuple[tuple[Array, Array], Array]:
    """One time step: `((c, h), inputs)` to `((c, h), h)`."""
    params, _ = _cell_variables(self, inputs, 'ifgo')
    return recurrent.layer_norm_lstm(
      params,
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


class LayerNormGRUCell(nn.GRUCell):
  """A layer-normalized GRU cell, in place of `flax.linen.GRUCell`.

  The parameters of Flax's cell under Flax's names, and those of the norms under
  `norm_i` (of the input's sums) and `norm_h` (of the hidden state's), whose
  bias stands for `hn/bias`. See `normkit.recurrent.layer_norm_gru`.

  Attributes:
    features: number of hidden units.
    gate_fn: the function of the gates.
    activation_fn: the function of the candidate.
    kernel_init: initializer of the kernels of the input.
    recurrent_kernel_init: initializer of the kernels of the hidden state.
    bias_init: initializer of the biases.
    dtype: dtype of the sums of the gates; None promotes the inputs' and the
      parameters'.
    param_dtype: dtype of the parameters and of a new carry.
    carry_init: initializer of the carry.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from flax import linen as nn
    >>> rnn = nn.RNN(normkit.linen.LayerNormGRUCell(4))
    >>> x = jnp.ones((2, 5, 3))
    >>> variables = rnn.init(jax.random.key(0), x)
    >>> rnn.apply(variables, x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  _: KW_ONLY
  epsilon: float = 1e-6
  scale_init: Initializer = nn.initializers.ones
  implementation: Implementation | None = None

  @nn.compact
  def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
    """One time step: `(h, inputs)` to `(h, h)`."""
    params, _ = _cell_variables(self, inputs, 'rzn')
    return recurrent.layer_norm_gru(
      params,
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


class BatchNormLSTMCell(nn.LSTMCell):
  """A batch-normalized LSTM cell, in place of `flax.linen.LSTMCell`.

  The parameters are those of Flax's cell and the scales of the norms, `norm_i`
  and `norm_h` without a bias and `norm_c` with one; `batch_stats` holds mean,
  var and count of each time step under the same names. See
  `normkit.recurrent.batch_norm_lstm`.

  Run it with `normkit.linen.RNN`, which tells the cell where sequences end.
  Flax's RNN does not: there, say `variable_carry='batch_stats'` in training and
  `variable_broadcast=('params', 'batch_stats')` in evaluation, and where
  `seq_lengths` are given, give them to the carry too, or the padding enters the
  statistics: `initial_carry=carry.with_lengths(seq_lengths)`, with the carry
  from `initialize_carry`.

  Attributes:
    features: number of hidden units.
    gate_fn: the function of the gates.
    activation_fn: the function of the candidate and of the memory.
    kernel_init: initializer of the kernels of the input.
    recurrent_kernel_init: initializer of the kernels of the hidden state.
    bias_init: initializer of the biases.
    dtype: dtype of the sums of the gates; None promotes the inputs' and the
      parameters'.
    param_dtype: dtype of the parameters and of a new carry.
    carry_init: initializer of the carry; small noise keeps the hidden state
      from being constant in the first time step.
    max_length: how many time steps have statistics of their own; later ones
      share the last.
    use_running_average: normalize with the stored statistics; given here or at
      the call, not both. An RNN gives the cell no such argument.
    momentum: the share of the old running value that is kept; None weighs all
      updates equally.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms, 0.1 unless given.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.

  References:
    Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch
    Normalization" (2017).

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> cell = normkit.linen.BatchNormLSTMCell(
    ...   4, max_length=5, use_running_average=False
    ... )
    >>> rnn, x = normkit.linen.RNN(cell), jnp.ones((2, 5, 3))
    >>> variables = rnn.init(jax.random.key(0), x)
    >>> lengths = jnp.array([5, 2])
    >>> y, updates = rnn.apply(
    ...   variables, x, seq_lengths=lengths, mutable=['batch_stats']
    ... )
    >>> updates['batch_stats']['cell']['norm_c']['mean'].shape
    (5, 4)
  """

  _: KW_ONLY
  max_length: int
  use_running_average: bool | None = None
  momentum: float | None = 0.99
  epsilon: float = 1e-5
  scale_init: Initializer = nn.initializers.constant(0.1)
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None

  @nn.compact
  def __call__(
    self,
    carry: recurrent.BatchNormLSTMCarry,
    inputs: Array,
    use_running_average: bool | None = None,
  ) -> tuple[recurrent.BatchNormLSTMCarry, Array]:
    """One time step: `(carry, inputs)` to `(carry, h)`."""
    evaluates = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    train = not evaluates and not self.is_initializing()
    initial = recurrent.init_batch_norm_lstm(self.features, self.max_length)
    params, variables = _cell_variables(self, inputs, 'ifgo', initial)
    carry, y, state = recurrent.batch_norm_lstm(
      params,
      jax.tree.map(lambda v: v.value, variables),
      carry,
      inputs,
      train=train,
      momentum=self.momentum,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      **_cell_options(self),
    )
    if train:
      leaves = jax.tree.leaves(variables), jax.tree.leaves(state)
      for variable, value in zip(*leaves, strict=True):
        variable.value = value
    return carry, y

  @nn.nowrap
  def initialize_carry(  # type: ignore[override]
    self, rng: Array, input_shape: tuple[int, ...]
  ) -> recurrent.BatchNormLSTMCarry:
    """A carry at time step zero, of sequences without end.

    An RNN calls this before its loop; initialising, this makes the variables,
    which a loop that carries them cannot do.
    """
    c, h = super().initialize_carry(rng, input_shape)
    step = jnp.zeros(input_shape[:-1], jnp.int32)
    carry = recurrent.BatchNormLSTMCarry(c, h, step)
    if self.scope is not None and self.is_initializing():
      self(carry, jnp.zeros(input_shape, self.param_dtype))
    return carry


class RNN(nn.RNN):
  """Runs a cell over a sequence, in place of `flax.linen.RNN`.

  It differs in two defaults: a cell that keeps `batch_stats` carries them from
  step to step, and the batch-normalized LSTM is told `seq_lengths`, so that
  padding does not enter its statistics.

  Attributes:
    cell: the cell; the other fields too are those of `flax.linen.RNN`.
    variable_carry: the collections that are carried.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> rnn = normkit.linen.RNN(normkit.linen.LayerNormGRUCell(4))
    >>> x = jnp.ones((2, 5, 3))
    >>> rnn.apply(rnn.init(jax.random.key(0), x), x).shape
    (2, 5, 4)
  """

  variable_carry: Any = 'batch_stats'

  def __call__(
    self,
    inputs: Array,
    *,
    initial_carry: Any = None,
    init_key: Array | None = None,
    seq_lengths: Array | None = None,
    time_major: bool | None = None,
    **kwargs: Any,
  ) -> Any:
    """Runs the cell; the arguments are those of `flax.linen.RNN`."""
    major = self.time_major if time_major is None else time_major
    if initial_carry is None or self.is_initializing():
      key = jax.random.key(0) if init_key is None else init_key
      shape = _step_shape(inputs, self.cell, major)
      carry = self.cell.initialize_carry(key, shape)
      initial_carry = carry if initial_carry is None else initial_carry
    if isinstance(initial_carry, recurrent.BatchNormLSTMCarry):
      initial_carry = initial_carry.with_lengths(seq_lengths)
    if self.variable_carry == 'batch_stats' and not (
      self.is_mutable_collection('batch_stats')
    ):  # what cannot change cannot be carried; this is the module of one call
      broadcast = union_filters(self.variable_broadcast, 'batch_stats')
      object.__setattr__(self, 'variable_broadcast', broadcast)
      object.__setattr__(self, 'variable_carry', False)
    return super().__call__(
      inputs,
      initial_carry=initial_carry,
      seq_lengths=seq_lengths,
      time_major=major,
      **kwargs,
    )


def _step_shape(
  inputs: Array, cell: nn.RNNCellBase, time_major: bool
) -> tuple[int, ...]:
  """The shape of the input of one time step."""
  time = 0 if time_major else inputs.ndim - cell.num_feature_axes - 1
  return (*inputs.shape[:time], *inputs.shape[time + 1 :])


class _CellNorm(nn.Module):
  """The parameters of one norm of a cell, and its statistics if it has any."""

  width: int
  scale_init: Initializer
  use_bias: bool
  param_dtype: DType

  @nn.compact
  def __call__(
    self, initial: _running.BatchNormState | None
  ) -> tuple[norm.NormParams, Any]:
    shape, dtype = (self.width,), self.param_dtype
    scale, bias = self.param('scale', self.scale_init, shape, dtype), None
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, shape, dtype)
    stats = _map_fields(
      lambda name, value: self.variable('batch_stats', name, lambda: value),
      initial,
      'stats',
    )
    return norm.NormParams(scale, bias), stats


def _cell_variables(
  cell: Any,
  inputs: Array,
  gates: str,
  initial: recurrent.BatchNormLSTMState | None = None,
) -> tuple[recurrent.CellParams, Any]:
  """The parameters of a cell, its gates side by side, and its statistics."""
  is_gru, width = 'n' in gates, len(gates) * cell.features
  hidden = jax.ShapeDtypeStruct((cell.features,), cell.param_dtype)

  def dense(kind: str, x: Any, init: Initializer, use_bias: bool) -> Any:
    layers = [
      DenseParams(
        features=cell.features,
        use_bias=use_bias,
        param_dtype=cell.param_dtype,
        kernel_init=init,
        bias_init=cell.bias_init,
        name=kind + gate,
      )(x)
      for gate in gates
    ]
    kernels, biases = zip(*layers, strict=True)
    bias = jnp.concatenate(biases) if use_bias else None
    return jnp.concatenate(kernels, axis=-1), bias

  kernel_i, bias_i = dense('i', inputs, cell.kernel_init, is_gru)
  kernel_h, bias_h = dense('h', hidden, cell.recurrent_kernel_init, not is_gru)
  widths = {'norm_i': width, 'norm_h': width, 'norm_c': cell.features}
  if is_gru:
    del widths['norm_c']
  norms, stats = {}, {}
  for name, wide in widths.items():
    norms[name], stats[name] = _CellNorm(
      wide,
      cell.scale_init,
      initial is None or name == 'norm_c',
      cell.param_dtype,
      name=name,
    )(None if initial is None else getattr(initial, name))
  params = recurrent.CellParams(
    kernel_i, kernel_h, bias_i if is_gru else bias_h, **norms
  )
  return params, None if initial is None else type(initial)(**stats)


def _cell_options(cell: Any) -> dict[str, Any]:
  """The options that all cells share."""
  names = 'epsilon', 'gate_fn', 'activation_fn', 'dtype'
  return {name: getattr(cell, name) for name in names}
