"""Flax's norms with normkit's call.

Fields, parameters, collections and signatures are those of `flax.linen`, whose
classes these derive from. No maths here.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from typing import Any

from flax import linen as nn
from flax.linen import dtypes
from flax.typing import Initializer
import jax.numpy as jnp

from normkit import _types, arguments, general, norm
from normkit._docs import documented
from normkit._types import Array, DType
from normkit.linen._shared import DropIn, scale_init
from normkit.norms import (
  _running,
  batch,
  group,
  instance,
  layer,
  renorm,
  rms,
)


@documented(nn.BatchNorm, batch.BatchNorm)
class BatchNorm(DropIn, nn.BatchNorm):
  """Batch normalization, in place of `flax.linen.BatchNorm`.

  Where `momentum` is None or `debias` asked for, the number of updates is kept
  in `batch_stats/count`.

  Attributes:
    momentum: the share of the old running value that is kept; None weighs all
      updates equally.
    force_float32_reductions: False keeps the stored statistics in param_dtype;
      they are taken in float32 or wider all the same.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3))
    >>> norm = normkit.linen.BatchNorm(use_running_average=False)
    >>> variables = norm.init(jax.random.key(0), x)
    >>> y, updates = norm.apply(variables, x, mutable=['batch_stats'])
    >>> updates['batch_stats']['mean'].shape
    (3,)
  """

  _: KW_ONLY
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  virtual_batch_size: int | None = None

  def __post_init__(self) -> None:
    arguments.check_not_width_as_flag(self.use_running_average)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    count = ('count', False) if self.debias or self.momentum is None else None
    return _running_norm(
      self, batch.batch_norm, x, use_running_average, mask, count
    )


@documented(nn.BatchNorm, renorm.BatchRenorm)
class BatchRenorm(DropIn, nn.BatchNorm):
  """Batch renormalization, called as `flax.linen.BatchNorm` is.

  Beside the running statistics it keeps `batch_stats/steps`, the updates so
  far, on which the limits depend.

  Variables have the names that SBX (CrossQ) gives them, and `apply` takes what
  it has written, whose `r_max` and `d_max` are options here. Its limits are 1
  and 0 for `warmup_steps` updates, then 3 and 5, its epsilon .001, and it adds
  that to the variance in other places than the paper does.

  Attributes:
    momentum: the share of the old running value that is kept; None weighs all
      updates equally.
    force_float32_reductions: False keeps the stored statistics in param_dtype;
      they are taken in float32 or wider all the same.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen, optax
    >>> constant, join = optax.constant_schedule, optax.join_schedules
    >>> norm = normkit.linen.BatchRenorm(
    ...   momentum=0.99,
    ...   epsilon=1e-3,
    ...   r_max=join([constant(1.0), constant(3.0)], [100_000]),
    ...   d_max=join([constant(0.0), constant(5.0)], [100_000]),
    ... )
    >>> x = jnp.ones((4, 3))
    >>> variables = norm.init(jax.random.key(0), x, use_running_average=True)
    >>> y, updates = norm.apply(
    ...   variables, x, use_running_average=False, mutable=['batch_stats']
    ... )
    >>> updates['batch_stats']['steps'].tolist()
    1
  """

  _: KW_ONLY
  r_max: renorm.Limit = None
  d_max: renorm.Limit = None

  def __post_init__(self) -> None:
    arguments.check_not_width_as_flag(self.use_running_average)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _running_norm(
      self, renorm.batch_renorm, x, use_running_average, mask, ('steps', True)
    )


def _running_norm(
  module: nn.BatchNorm,
  function: Callable[..., Any],
  x: Array,
  use_running_average: bool | None,
  mask: Array | None,
  counted: tuple[str, bool] | None,
) -> Array:
  """A norm of batches; `counted` is the name of a count, if it is to keep one.

  And whether that is one number for all features.
  """
  eval_mode = nn.merge_param(
    'use_running_average', module.use_running_average, use_running_average
  )
  _types.check_not_traced(eval_mode, 'use_running_average')
  axes = _types.check_axes(module.axis, x.ndim, repeats=True)
  shape = tuple(x.shape[a] for a in axes)
  wide = module.force_float32_reductions
  stored = jnp.float32 if wide else module.param_dtype
  mean = module.variable('batch_stats', 'mean', jnp.zeros, shape, stored)
  var = module.variable('batch_stats', 'var', jnp.ones, shape, stored)
  count = None
  if counted is not None:
    name, is_one = counted
    size = () if is_one else shape
    count = module.variable('batch_stats', name, jnp.zeros, size, jnp.int32)
  x, options = _prepare(module, function, x, shape, mask)
  old = _running.BatchNormState(
    *_promoted(mean.value, var.value, _flax_dtype(module, x)),
    jnp.zeros(shape, jnp.int32)
    if count is None
    else jnp.broadcast_to(count.value, shape),
  )
  if initializing := module.is_initializing():
    alone = 'axis_name', 'axis_index_groups', 'virtual_batch_size'
    options.update({n: None for n in alone if n in options})
  options.update(axis=axes, check_batch=False)
  y: Array
  y, new = function(x, old, train=not eval_mode, **options)
  if not eval_mode and not initializing:
    mean.value, var.value = new.mean, new.var
    if count is not None:
      count.value = new.count.max(initial=0) if is_one else new.count
  return y


@documented(nn.LayerNorm, layer.LayerNorm)
class LayerNorm(DropIn, nn.LayerNorm):
  """Layer normalization, in place of `flax.linen.LayerNorm`.

  Attributes:
    scale_init: draws the parameter; its default makes a scale of one, and so
      draws 1 - scale_offset.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3))
    >>> norm = normkit.linen.LayerNorm()
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3)
  """

  _: KW_ONLY
  scale_offset: float = 0.0

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=True)


@documented(nn.RMSNorm, rms.RMSNorm)
class RMSNorm(DropIn, nn.RMSNorm):
  """Root mean square normalization, in place of `flax.linen.RMSNorm`.

  Attributes:
    scale_init: draws the parameter; its default makes a scale of one, and so
      draws 1 - scale_offset.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3))
    >>> norm = normkit.linen.RMSNorm()
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3)
  """

  _: KW_ONLY
  scale_offset: float = 0.0
  round_before_scale: bool = False

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=False)


@documented(nn.GroupNorm, group.GroupNorm)
class GroupNorm(DropIn, nn.GroupNorm):
  """Group normalization, in place of `flax.linen.GroupNorm`.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3, 8))
    >>> norm = normkit.linen.GroupNorm(num_groups=2)
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3, 8)
  """

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    batch_axes = group.batch_axes(self.reduction_axes, x.ndim)
    shape = x.shape[-1:]
    groups, _ = group.groups_of(shape[0], self.num_groups, self.group_size)
    x, options = _prepare(self, group.group_norm, x, shape, mask)
    options.update(num_groups=groups, batch_axis=batch_axes)
    return group.group_norm_any(x, **options)


@documented(nn.InstanceNorm, instance.InstanceNorm)
class InstanceNorm(DropIn, nn.InstanceNorm):
  """Instance normalization, in place of `flax.linen.InstanceNorm`.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> x = jnp.ones((4, 3, 8))
    >>> norm = normkit.linen.InstanceNorm()
    >>> norm.apply(norm.init(jax.random.key(0), x), x).shape
    (4, 3, 8)
  """

  @nn.compact
  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    axes = instance.check_feature_axes(self.feature_axes, x.ndim)
    shape = tuple(x.shape[a] for a in axes)
    x, options = _prepare(self, instance.instance_norm, x, shape, mask)
    return instance.normalize_any(x, axes, options)


def _normalize(
  module: LayerNorm | RMSNorm, x: Array, mask: Array | None, center: bool
) -> Array:
  features, reduced = (
    _types.check_axes(getattr(module, name), x.ndim, name, repeats=True)
    for name in ('feature_axes', 'reduction_axes')
  )
  shape = tuple(x.shape[a] for a in features)
  x, options = _prepare(module, general.normalize, x, shape, mask)
  options.update(axis=reduced, feature_axis=features, center=center)
  return general.normalize_any(x, **options)


def _prepare(
  module: Any,
  function: Callable[..., Any],
  x: Array,
  shape: Sequence[int],
  mask: Array | None,
) -> tuple[Array, dict[str, Any]]:
  """Makes the parameters; returns x and what the function is told."""
  scale = bias = None
  if module.use_scale:
    scale = _param(module, 'scale', scale_init(module), shape)
  if getattr(module, 'use_bias', False):
    bias = _param(module, 'bias', module.bias_init, shape)
  dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=module.dtype)
  where = _types.check_mask(mask, x.shape, cast=True)
  options = norm.options_of(module, function)
  options.update(scale=scale, where=where, dtype=dtype)
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


def _flax_dtype(module: nn.BatchNorm, x: Array) -> DType:
  """The dtype of Flax's statistics, to which it promotes the stored ones."""
  dtype = x.dtype if module.dtype is None else module.dtype
  if not module.force_float32_reductions:
    return dtype
  return _types.statistics_dtype(dtype)


def _promoted(mean: Array, var: Array, dtype: DType) -> tuple[Array, Array]:
  """The statistics in `dtype` or wider, the variance real."""
  real = _types.real_dtype(dtype)
  return (
    mean.astype(_types.promote(mean.dtype, dtype)),
    var.astype(_types.promote(var.dtype, real)),
  )
