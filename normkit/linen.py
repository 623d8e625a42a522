"""Flax linen modules: variables in, a pure function of normkit, variables out.

The names, fields, parameters and collections are those of `flax.linen`, so that
changing `nn.BatchNorm` to `normkit.linen.BatchNorm` is all there is to do. No
maths here.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from typing import Any

from flax import linen as nn
from flax.linen import dtypes
import jax
import jax.numpy as jnp

from normkit import _types, norm
from normkit._types import Array, Axes, AxisName, DType, Groups, Implementation
from normkit.norms import batch, group, instance

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
    norm.check_not_width(self.epsilon)
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
    axes = _axes(self.axis, x.ndim, 'axis')
    shape = tuple(x.shape[a] for a in axes)
    stored = jnp.float32 if self.force_float32_reductions else self.param_dtype
    mean = self.variable('batch_stats', 'mean', jnp.zeros, shape, stored)
    var = self.variable('batch_stats', 'var', jnp.ones, shape, stored)
    count = None
    if self.debias or self.momentum is None:
      count = self.variable('batch_stats', 'count', jnp.zeros, shape, jnp.int32)
    old = batch.BatchNormState(
      mean.value,
      var.value,
      jnp.zeros(shape, jnp.int32) if count is None else count.value,
    )
    options = _affine(self, x, shape, mask)
    x = _inexact(x)
    if initializing := self.is_initializing():
      options.update(axis_name=None, axis_index_groups=None)
    y, state = batch.batch_norm(
      x,
      _promoted(old, _types.statistics_dtype(x.dtype)),
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
      old = _promoted(old, _flax_dtype(self, x))
      mean.value = state.mean.astype(old.mean.dtype)
      var.value = state.var.astype(old.var.dtype)
      if count is not None:
        count.value = state.count
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
    if (self.num_groups is None) == (self.group_size is None):
      raise ValueError(
        f'give either num_groups or group_size, got num_groups='
        f'{self.num_groups} and group_size={self.group_size}. Set the other '
        'to None.'
      )
    axes = self.reduction_axes
    axes = (*range(1, x.ndim - 1), -1) if axes is None else axes
    axes = _axes(axes, x.ndim, 'reduction_axes')
    if x.ndim - 1 not in axes:
      raise ValueError(
        f'reduction_axes={self.reduction_axes} must hold the last axis, the '
        'channels.'
      )
    channels, groups = x.shape[-1], self.num_groups
    if groups is None:
      groups = _groups(channels, self.group_size)
    options = _affine(self, x, (channels,), mask)
    x, last = _inexact(x), (x.ndim - 1,)
    if x.size == 0:  # nothing to group, and group_norm divides by the size
      group.check_groups(x.shape, last, groups)
      return norm.normalize(x, axis=axes, feature_axis=last, **options)
    return group.group_norm(
      x,
      num_groups=groups,
      batch_axis=_types.other_axes(axes, x.ndim),
      **options,
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
    axes = _axes(self.feature_axes, x.ndim, 'feature_axes')
    if 0 in axes:
      raise ValueError(
        f'feature_axes={self.feature_axes} must not hold the first axis, the '
        'batch.'
      )
    shape = tuple(x.shape[a] for a in axes)
    return instance.instance_norm(
      _inexact(x), axis=axes, **_affine(self, x, shape, mask)
    )


def _normalize(
  module: LayerNorm | RMSNorm, x: Array, mask: Array | None, center: bool
) -> Array:
  features = _axes(module.feature_axes, x.ndim, 'feature_axes')
  shape = tuple(x.shape[a] for a in features)
  return norm.normalize(
    _inexact(x),
    axis=_axes(module.reduction_axes, x.ndim, 'reduction_axes'),
    feature_axis=features,
    center=center,
    **_affine(module, x, shape, mask),
  )


def _affine(
  module: Any, x: Array, shape: Sequence[int], mask: Array | None
) -> dict[str, Any]:
  """Makes the parameters; returns the arguments that all functions share."""
  scale = bias = None
  if module.use_scale:
    scale = _param(module, 'scale', module.scale_init, shape)
  if getattr(module, 'use_bias', False):
    bias = _param(module, 'bias', module.bias_init, shape)
  if mask is not None:
    mask = jnp.asarray(mask, bool)
    _types.check_broadcast(mask.shape, x.shape, 'mask')
  options = {'scale': scale, 'epsilon': module.epsilon}
  return options | {
    'bias': bias,
    'where': mask,
    'axis_name': module.axis_name,
    'axis_index_groups': module.axis_index_groups,
    'implementation': module.implementation,
    'dtype': dtypes.canonicalize_dtype(x, scale, bias, dtype=module.dtype),
  }


def _param(
  module: Any, name: str, init: Initializer, shape: Sequence[int]
) -> Array:
  """A parameter; without float32 forced in `param_dtype`, however stored."""
  value: Array = module.param(name, init, shape, module.param_dtype)
  if module.force_float32_reductions:
    return value
  return value.astype(module.param_dtype)


def _groups(channels: int, size: int | None) -> int:
  """How many groups of `size` channels there are."""
  if size is None or size < 1 or channels % size:
    raise ValueError(
      f'group_size={size} does not divide the {channels} channels of x. Give a '
      f'divisor of {channels}.'
    )
  return channels // size


def _axes(axes: Axes, ndim: int, name: str) -> tuple[int, ...]:
  """Flax's axes: given in any order, perhaps twice."""
  given = {a % ndim if -ndim <= a < 0 else a: a for a in _types.as_axes(axes)}
  return _types.check_axes(tuple(given.values()), ndim, name)


def _flax_dtype(module: BatchNorm, x: Array) -> DType:
  """The dtype of Flax's statistics, to which it promotes the stored ones."""
  dtype = x.dtype if module.dtype is None else module.dtype
  if not module.force_float32_reductions:
    return dtype
  return _types.statistics_dtype(dtype)


def _promoted(
  state: batch.BatchNormState, dtype: DType
) -> batch.BatchNormState:
  """The statistics in `dtype` or wider, the variance real."""
  real = _types.real_dtype(dtype)
  return state._replace(
    mean=state.mean.astype(jnp.promote_types(state.mean.dtype, dtype)),
    var=state.var.astype(jnp.promote_types(state.var.dtype, real)),
  )


def _inexact(x: Array) -> Array:
  """Integers as floats, as Flax takes them."""
  return (
    x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if (not jnp.issubdtype(x.dtype, jnp.inexact))
    else x
  )
