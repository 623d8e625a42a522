"""Flax's norms with normkit's call.

Constructors, attributes and variables are those of `flax.nnx`, whose classes
these derive from. No maths here.

Statistics are in float32 or wider: with `dtype=jnp.bfloat16` neither the input
nor a stored statistic is rounded before it is used, only the result. Flax's
`promote_dtype` therefore serves to find the dtype of the result; another one is
called as Flax calls it, and what it returns is used.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import PromoteDtypeFn
import jax.numpy as jnp
import numpy as np

from normkit import _types, _words, arguments, general, norm
from normkit._docs import documented
from normkit._types import Array, DType, Implementation
from normkit.nnx._shared import (
  Running,
  as_features,
  check_width,
  read,
  with_offset,
  with_signature_of,
  write,
)
from normkit.norms import (
  _running,
  batch,
  group,
  instance,
  layer,
  renorm,
  rms,
)


class DropIn(nnx.Module, _words.OwnWords):
  """What the five share: Flax's constructor, checked, and one option more."""

  axis_index_groups: Any
  dtype: DType | None
  promote_dtype: PromoteDtypeFn

  def __init__(
    self,
    *args: Any,
    implementation: Implementation | None = None,
    **options: Any,
  ) -> None:
    width = 'The width is num_features, the first argument.'
    arguments.check_not_width(options.get('epsilon'), width)
    size = args[0] if args else options.get('num_features')
    if size is not None:
      arguments.check_num_features(size)
    super().__init__(*args, **options)
    self.axis_index_groups = _types.hashable(self.axis_index_groups)
    self.implementation = implementation

  def _prepare(
    self,
    function: Callable[..., Any],
    x: Array,
    mask: Array | None,
    features: tuple[int, ...],
    *stats: Array,
  ) -> tuple[Array, tuple[Array, ...], dict[str, Any]]:
    """Returns x, the statistics, and what the function is told."""
    params = {
      n: getattr(self, n) for n in ('scale', 'bias') if hasattr(self, n)
    }
    arrays = x, *stats, *read(tuple(params.values()))
    if self.promote_dtype is dtypes.promote_dtype:
      dtype = dtypes.canonicalize_dtype(*arrays, dtype=self.dtype)
      arrays = _types.as_inexact(x, dtype), *arrays[1:]
    else:
      arrays = self.promote_dtype(arrays, dtype=self.dtype)
      outer = arrays[0], *arrays[1 + len(stats) :]
      dtype = dtypes.canonicalize_dtype(*outer, dtype=self.dtype)
    x, *rest = arrays
    options = norm.options_of(self, function)
    where = _types.check_mask(mask, x.shape, cast=False)
    options.update(where=where, dtype=dtype)
    for name, value in zip(params, rest[len(stats) :], strict=True):
      if value is not None:
        options[name] = as_features(value, x, features)
    return x, tuple(rest[: len(stats)]), options


@documented(nnx.BatchNorm, batch.BatchNorm)
@with_signature_of(nnx.BatchNorm)
class BatchNorm(DropIn, nnx.BatchNorm, Running):
  """Batch normalization, in place of `flax.nnx.BatchNorm`.

  Args:
    axis: the feature axis; of several, `num_features` is the product.
    momentum: the share of the old running value that is kept (PyTorch's 0.1 is
      0.9 here). None weighs all updates equally.

  Attributes:
    mean: running means, an `nnx.BatchStat`.
    var: running variances, an `nnx.BatchStat`.
    count: how many updates each feature has received, an `nnx.BatchStat`, or
      None where neither `debias` nor `momentum=None` needs it.
    scale: an `nnx.Param`, or None.
    bias: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    >>> y = norm(jnp.ones((4, 3)))
    >>> norm.eval()
    >>> norm(jnp.ones((4, 3))).shape, norm.mean[...].tolist()
    ((4, 3), [0.5, 0.5, 0.5])
  """

  def __init__(
    self,
    num_features: int,
    *,
    debias: bool = False,
    unbiased: bool = False,
    skip_nonfinite: bool = False,
    virtual_batch_size: int | None = None,
    **options: Any,
  ) -> None:
    super().__init__(num_features, **options)
    self.debias = debias
    self.unbiased = unbiased
    self.skip_nonfinite = skip_nonfinite
    self.virtual_batch_size = virtual_batch_size
    self.make_count(num_features)

  def make_count(self, num_features: int) -> None:
    """Makes the variable that counts updates, if one is needed."""
    self.count: Any = nnx.data(None)
    if self._needs_count():
      self.count = nnx.BatchStat(jnp.zeros((num_features,), jnp.int32))

  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _running_norm(
      self, batch.batch_norm, x, use_running_average, mask, self._counter()
    )

  def _needs_count(self) -> bool:
    return self.debias or self.momentum is None

  def _counter(self) -> Any:
    """The variable that counts the updates of each feature, or None."""
    if self.count is None and self._needs_count():
      raise ValueError(
        f'debias={self.debias} with momentum={self.momentum} needs a count of '
        'the updates, which the module makes at construction. Give them there.'
      )
    return self.count


@documented(nnx.BatchNorm, renorm.BatchRenorm)
@with_signature_of(nnx.BatchNorm)
class BatchRenorm(DropIn, nnx.BatchNorm, Running):
  """Batch renormalization, called as `flax.nnx.BatchNorm` is.

  Args:
    axis: the feature axis; of several, `num_features` is the product.
    momentum: the share of the old running value that is kept (PyTorch's 0.1 is
      0.9 here). None weighs all updates equally.

  Attributes:
    mean: running means, an `nnx.BatchStat`.
    var: running variances, an `nnx.BatchStat`.
    steps: the updates so far, on which the limits depend, an `nnx.BatchStat`.
    scale: an `nnx.Param`, or None.
    bias: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.BatchRenorm(3, r_max=3., d_max=5., rngs=nnx.Rngs(0))
    >>> y = norm(jnp.ones((4, 3)))
    >>> norm.steps[...].tolist()
    1
  """

  def __init__(
    self,
    num_features: int,
    *,
    r_max: renorm.Limit = None,
    d_max: renorm.Limit = None,
    **options: Any,
  ) -> None:
    super().__init__(num_features, **options)
    self.r_max = r_max
    self.d_max = d_max
    self.steps = nnx.BatchStat(jnp.zeros((), jnp.int32))

  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _running_norm(
      self, renorm.batch_renorm, x, use_running_average, mask, self.steps
    )


def _running_norm(
  module: Any,
  function: Callable[..., Any],
  x: Array,
  use_running_average: bool | None,
  mask: Array | None,
  counter: Any,
) -> Array:
  """A norm of batches; `counter` is the variable of its updates, or None."""
  train = not module._evaluates(use_running_average)
  axes = _types.check_axes(module.axis, np.ndim(x), repeats=True)
  stored = module.mean[...], module.var[...]
  x, promoted, options = module._prepare(function, x, mask, axes, *stored)
  mean, var = stored if train else promoted
  if train and jnp.iscomplexobj(x):
    mean = mean.astype(x.dtype)
  count = jnp.zeros((), jnp.int32) if counter is None else counter[...]
  count = jnp.broadcast_to(count, mean.shape)
  state = _running.BatchNormState(
    *(as_features(s, x, axes) for s in (mean, var, count))
  )
  options.update(axis=axes, check_batch=False)
  y: Array
  y, (mean, var, count) = function(x, state, train=train, **options)
  if train:
    if counter is not None and not counter.shape:
      count = count.max(initial=0)
    write((module.mean, module.var, counter), (mean, var, count))
  return y


@documented(nnx.LayerNorm, layer.LayerNorm)
@with_signature_of(nnx.LayerNorm)
class LayerNorm(DropIn, nnx.LayerNorm):
  """Layer normalization, in place of `flax.nnx.LayerNorm`.

  Args:
    feature_axes: the axes of the parameters; of several, `num_features` is the
      product.
    scale_init: draws the parameter; its default makes a scale of one, and so
      draws 1 - scale_offset.

  Attributes:
    scale: an `nnx.Param`, or None.
    bias: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    >>> norm(jnp.ones((4, 3))).shape
    (4, 3)
  """

  def __init__(
    self, num_features: int, *, scale_offset: float = 0.0, **options: Any
  ) -> None:
    super().__init__(num_features, **with_offset(options, scale_offset))
    self.scale_offset = scale_offset

  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=True)


@documented(nnx.RMSNorm, rms.RMSNorm)
@with_signature_of(nnx.RMSNorm)
class RMSNorm(DropIn, nnx.RMSNorm):
  """Root mean square normalization, in place of `flax.nnx.RMSNorm`.

  Args:
    feature_axes: the axes of the scale; of several, `num_features` is the
      product.
    scale_init: draws the parameter; its default makes a scale of one, and so
      draws 1 - scale_offset.

  Attributes:
    scale: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.RMSNorm(3, rngs=nnx.Rngs(0))
    >>> norm(jnp.ones((4, 3))).shape
    (4, 3)
  """

  def __init__(
    self,
    num_features: int,
    *,
    scale_offset: float = 0.0,
    round_before_scale: bool = False,
    **options: Any,
  ) -> None:
    super().__init__(num_features, **with_offset(options, scale_offset))
    self.scale_offset = scale_offset
    self.round_before_scale = round_before_scale

  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=False)


@documented(nnx.GroupNorm, group.GroupNorm)
@with_signature_of(nnx.GroupNorm)
class GroupNorm(DropIn, nnx.GroupNorm):
  """Group normalization, in place of `flax.nnx.GroupNorm`.

  Attributes:
    num_groups: how many groups there are, given or not.
    group_size: how many channels a group has, given or not.
    scale: an `nnx.Param`, or None.
    bias: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))
    >>> norm(jnp.ones((4, 3, 8))).shape, norm.group_size
    ((4, 3, 8), 4)
  """

  def __init__(
    self,
    num_features: int,
    num_groups: int | None = 32,
    group_size: int | None = None,
    *,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    group.groups_of(num_features, num_groups, group_size)
    super().__init__(num_features, num_groups, group_size, rngs=rngs, **options)
    self.num_features = num_features

  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    batch_axes = group.batch_axes(self.reduction_axes, np.ndim(x))
    channels = (np.ndim(x) - 1,)
    check_width(self.num_features, x, channels)
    x, _, options = self._prepare(group.group_norm, x, mask, channels)
    return group.group_norm_any(x, **options | {'batch_axis': batch_axes})


@documented(nnx.InstanceNorm, instance.InstanceNorm)
@with_signature_of(nnx.InstanceNorm)
class InstanceNorm(DropIn, nnx.InstanceNorm):
  """Instance normalization, in place of `flax.nnx.InstanceNorm`.

  Args:
    feature_axes: the channels, an axis or several, not the first; of several,
      `num_features` is the product.

  Attributes:
    scale: an `nnx.Param`, or None.
    bias: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.InstanceNorm(8, rngs=nnx.Rngs(0))
    >>> norm(jnp.ones((4, 3, 8))).shape
    (4, 3, 8)
  """

  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    axes = instance.check_feature_axes(self.feature_axes, np.ndim(x))
    x, _, options = self._prepare(instance.instance_norm, x, mask, axes)
    return instance.normalize_any(x, axes, options)


def _normalize(
  module: LayerNorm | RMSNorm, x: Array, mask: Array | None, center: bool
) -> Array:
  features, reduced = (
    _types.check_axes(getattr(module, name), np.ndim(x), name, repeats=True)
    for name in ('feature_axes', 'reduction_axes')
  )
  x, _, options = module._prepare(general.normalize, x, mask, features)
  options.update(axis=reduced, feature_axis=features, center=center)
  return general.normalize_any(x, **options)
