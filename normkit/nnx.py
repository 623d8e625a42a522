"""Flax nnx modules: variables in, a pure function of normkit, variables out.

The names, constructors, attributes and variables are those of `flax.nnx`, so
that changing `nnx.BatchNorm` to `normkit.nnx.BatchNorm` is all there is to do.
No maths here.

Statistics are in float32 or wider: with `dtype=jnp.bfloat16` neither the input
nor a stored statistic is rounded before it is used, only the result. Flax's
`promote_dtype` therefore serves to find the dtype of the result; another one is
called as Flax calls it, and what it returns is used.
"""

from collections.abc import Callable, Mapping
import dataclasses
from dataclasses import KW_ONLY, InitVar
import math
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Initializer, PromoteDtypeFn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

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

Metadata = Mapping[str, Any]


class _Running(nnx.Module):
  """A module that may use stored statistics: `train`, `eval`, `nnx.view`."""

  use_running_average: bool | None

  def _evaluates(self, use_running_average: bool | None) -> bool:
    """Whether to use the stored statistics: the call beats the attribute."""
    for choice in (use_running_average, self.use_running_average):
      if choice is not None:
        return bool(choice)
    raise ValueError(
      'use_running_average is None in the module and at the call. Give it in '
      'either place, or use train(), eval() or nnx.view(module, '
      'use_running_average=...).'
    )

  def set_view(self, use_running_average: bool | None = None) -> None:
    """What `nnx.view` calls; None leaves the attribute as it is."""
    if use_running_average is not None:
      self.use_running_average = use_running_average


class Norm(_Running):
  """Any normalization transform as an nnx module.

  The arrays of the transform's parameters become `nnx.Param`, those of its
  state `nnx.BatchStat`. Where they come in a NamedTuple, its fields become
  attributes of the same names; any other pytree becomes the attribute `params`
  or `state`.

  Args:
    transform: the transform, such as `normkit.LayerNorm()`, or anyone's own.
    x: an input, or its shape and dtype, from which the transform makes its
      parameters: `jax.ShapeDtypeStruct((1, 8), jnp.float32)`.
    use_running_average: apply the transform with `train=False`; the call beats
      it. None leaves it to the call.

  Attributes:
    transform: the transform.
    use_running_average: set by `train()` and `eval()`.

  Raises:
    ValueError: if a field has the name of another attribute.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit as nk, normkit.nnx
    >>> x = jax.ShapeDtypeStruct((1, 3, 4), jnp.float32)
    >>> norm = normkit.nnx.Norm(nk.GroupNorm(num_groups=2), x)
    >>> norm(jnp.ones((5, 3, 4))).shape, norm.scale.shape
    ((5, 3, 4), (4,))
  """

  def __init__(
    self,
    transform: norm.Norm,
    x: Array | jax.ShapeDtypeStruct,
    *,
    use_running_average: bool | None = False,
  ) -> None:
    self.transform = transform
    self.use_running_average = use_running_average
    params, state = transform.init(x)
    self._params_type = self._hang('params', params, nnx.Param)
    self._state_type = self._hang('state', state, nnx.BatchStat)

  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    train = not self._evaluates(use_running_average)
    params = self._gather('params', self._params_type)
    state = self._gather('state', self._state_type)
    y, updated = self.transform.apply(
      _read(params), _read(state), x, train=train, where=mask
    )
    if train:
      _write(state, updated)
    return y

  def _hang(self, name: str, tree: Any, kind: type) -> type | None:
    """Makes a tree of arrays attributes; returns its type if a NamedTuple."""
    named = hasattr(tree, '_fields')
    variables = jax.tree.map(lambda a: kind(jnp.asarray(a)), tree)
    fields = variables._asdict() if named else {name: variables}
    for field, value in fields.items():
      if hasattr(self, field):
        raise ValueError(
          f'the field {field!r} of the {name} of {self.transform} is the name '
          f'of another attribute of {type(self).__name__}. Rename the field.'
        )
      setattr(self, field, nnx.data(value))
    return type(tree) if named else None

  def _gather(self, name: str, kind: Any) -> Any:
    """The tree of variables that `_hang` made."""
    if kind is None:
      return getattr(self, name)
    return kind(*(getattr(self, field) for field in kind._fields))


@dataclasses.dataclass(eq=False, repr=False)
class _Scaled(nnx.Module):
  """What the five drop-in modules share: options, a scale."""

  num_features: int
  _: KW_ONLY
  epsilon: float = 1e-6
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  use_scale: bool = True
  scale_init: InitVar[Initializer] = nnx.initializers.ones
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  use_fast_variance: bool = True
  promote_dtype: PromoteDtypeFn = dtypes.promote_dtype
  rngs: InitVar[nnx.Rngs]
  scale_metadata: InitVar[Metadata | None] = None
  implementation: Implementation | None = None

  def __post_init__(
    self,
    scale_init: Initializer,
    rngs: nnx.Rngs,
    scale_metadata: Metadata | None,
  ) -> None:
    width = 'The width is num_features, the first argument.'
    arguments.check_not_width(self.epsilon, width)
    self.axis_index_groups = _types.hashable(self.axis_index_groups)
    self.scale = self._param(self.use_scale, scale_init, rngs, scale_metadata)

  def _param(
    self,
    use: bool,
    init: Initializer,
    rngs: nnx.Rngs,
    metadata: Metadata | None,
  ) -> Any:
    """A parameter, drawn with a key of its own, or None."""
    if not use:
      return nnx.data(None)
    value = init(rngs.params(), (self.num_features,), self.param_dtype)
    return nnx.Param(value, **(metadata or {}))

  def _params(self) -> dict[str, Any]:
    return {'scale': self.scale}

  def _prepare(
    self,
    x: Array,
    mask: Array | None,
    features: tuple[int, ...],
    *stats: Array,
  ) -> tuple[Array, tuple[Array, ...], dict[str, Any]]:
    """Returns x, the statistics, and the arguments that all functions share."""
    params = self._params()
    arrays = x, *stats, *_read(tuple(params.values()))
    if self.promote_dtype is dtypes.promote_dtype:
      dtype = dtypes.canonicalize_dtype(*arrays, dtype=self.dtype)
      arrays = _types.as_inexact(x, dtype), *arrays[1:]
    else:
      arrays = self.promote_dtype(arrays, dtype=self.dtype)
      outer = arrays[0], *arrays[1 + len(stats) :]
      dtype = dtypes.canonicalize_dtype(*outer, dtype=self.dtype)
    x, *rest = arrays
    options = {
      'epsilon': self.epsilon,
      'where': _types.check_mask(mask, x.shape, cast=False),
      'axis_name': self.axis_name,
      'axis_index_groups': self.axis_index_groups,
      'dtype': dtype,
      'implementation': self.implementation,
    }
    for name, value in zip(params, rest[len(stats) :], strict=True):
      if value is not None:
        options[name] = _as_features(value, x, features)
    return x, tuple(rest[: len(stats)]), options


@dataclasses.dataclass(eq=False, repr=False)
class _Affine(_Scaled):
  """What the four modules with a bias share."""

  _: KW_ONLY
  use_bias: bool = True
  bias_init: InitVar[Initializer] = nnx.initializers.zeros
  bias_metadata: InitVar[Metadata | None] = None

  def __post_init__(
    self,
    scale_init: Initializer,
    rngs: nnx.Rngs,
    scale_metadata: Metadata | None,
    bias_init: Initializer,
    bias_metadata: Metadata | None,
  ) -> None:
    super().__post_init__(scale_init, rngs, scale_metadata)
    self.bias = self._param(self.use_bias, bias_init, rngs, bias_metadata)

  def _params(self) -> dict[str, Any]:
    return {'scale': self.scale, 'bias': self.bias}


@dataclasses.dataclass(eq=False, repr=False)
class BatchNorm(_Affine, _Running):
  """Batch normalization, in place of `flax.nnx.BatchNorm`.

  Args:
    num_features: the width of the feature axis.
    use_running_average: normalize with the stored statistics; the call beats
      it. None leaves it to the call.
    axis: the feature axis; of several, `num_features` is the product.
    momentum: the share of the old running value that is kept (PyTorch's 0.1 is
      0.9 here). None weighs all updates equally.
    epsilon: added to the variance.
    dtype: dtype of the result; None promotes x's, the parameters' and the
      statistics'.
    param_dtype: dtype of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the variance is accurate either way.
    promote_dtype: a function of `((x, mean, var, scale, bias), dtype=...)`.
    rngs: gives a key for each parameter.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.
    debias: forget the initial statistics from the first update on.
    unbiased: keep the unbiased variance, as PyTorch does.
    skip_nonfinite: keep the running statistics of a feature whose batch
      statistics are not finite.
    virtual_batch_size: normalize each so many neighbouring examples by their
      own statistics.
    implementation: 'xla', or None to choose.

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

  _: KW_ONLY
  use_running_average: bool | None = False
  axis: Axes = -1
  momentum: float | None = 0.99
  epsilon: float = 1e-5
  debias: bool = False
  unbiased: bool = False
  skip_nonfinite: bool = False
  virtual_batch_size: int | None = None

  def __post_init__(self, *args: Any) -> None:
    super().__post_init__(*args)
    shape = (self.num_features,)
    self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
    self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))
    self.count: Any = nnx.data(None)
    if self._needs_count():
      self.count = nnx.BatchStat(jnp.zeros(shape, jnp.int32))

  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    train = not self._evaluates(use_running_average)
    axes = _types.check_axes(self.axis, np.ndim(x), repeats=True)
    stored = self.mean[...], self.var[...]
    x, promoted, options = self._prepare(x, mask, axes, *stored)
    mean, var = stored if train else promoted
    if train and jnp.iscomplexobj(x):
      mean = mean.astype(x.dtype)
    y, updated = batch.batch_norm(
      x,
      _running.BatchNormState(
        *(_as_features(s, x, axes) for s in (mean, var, self._updates()))
      ),
      train=train,
      axis=axes,
      momentum=self.momentum,
      debias=self.debias,
      unbiased=self.unbiased,
      skip_nonfinite=self.skip_nonfinite,
      virtual_batch_size=self.virtual_batch_size,
      check_batch=False,
      **options,
    )
    if train:
      _write((self.mean, self.var, self.count), updated)
    return y

  def _needs_count(self) -> bool:
    return self.debias or self.momentum is None

  def _updates(self) -> Array:
    """How many updates each feature has received, or as many zeros."""
    if self.count is not None:
      count: Array = self.count[...]
      return count
    if self._needs_count():
      raise ValueError(
        f'debias={self.debias} with momentum={self.momentum} needs a count of '
        'the updates, which the module makes at construction. Give them there.'
      )
    return jnp.zeros((self.num_features,), jnp.int32)


@dataclasses.dataclass(eq=False, repr=False)
class LayerNorm(_Affine):
  """Layer normalization, in place of `flax.nnx.LayerNorm`.

  Args:
    num_features: the width of the feature axis.
    epsilon: added to the variance.
    dtype: dtype of the result; None promotes x's and the parameters'.
    param_dtype: dtype of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    reduction_axes: the normalized axes, an integer or several.
    feature_axes: the axes of the parameters; of several, `num_features` is the
      product.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the variance is accurate either way.
    promote_dtype: a function of `((x, scale, bias), dtype=...)`.
    rngs: gives a key for each parameter.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.
    implementation: 'xla', or None to choose.

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

  _: KW_ONLY
  reduction_axes: Axes = -1
  feature_axes: Axes = -1

  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=True)


@dataclasses.dataclass(eq=False, repr=False)
class RMSNorm(_Scaled):
  """Root mean square normalization, in place of `flax.nnx.RMSNorm`.

  Args:
    num_features: the width of the feature axis.
    epsilon: added to the mean square.
    dtype: dtype of the result; None promotes x's and the scale's.
    param_dtype: dtype of the scale.
    use_scale: whether there is a scale.
    scale_init: initializer of the scale.
    reduction_axes: the normalized axes, an integer or several.
    feature_axes: the axes of the scale; of several, `num_features` is the
      product.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the mean square is accurate either way.
    promote_dtype: a function of `((x, scale), dtype=...)`.
    rngs: gives a key for the scale.
    scale_metadata: metadata of the scale.
    implementation: 'xla', or None to choose.

  Attributes:
    scale: an `nnx.Param`, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> norm = normkit.nnx.RMSNorm(3, rngs=nnx.Rngs(0))
    >>> norm(jnp.ones((4, 3))).shape
    (4, 3)
  """

  _: KW_ONLY
  reduction_axes: Axes = -1
  feature_axes: Axes = -1

  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    return _normalize(self, x, mask, center=False)


@dataclasses.dataclass(eq=False, repr=False)
class GroupNorm(_Affine):
  """Group normalization, in place of `flax.nnx.GroupNorm`.

  Args:
    num_features: the number of channels.
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
    promote_dtype: a function of `((x, scale, bias), dtype=...)`.
    rngs: gives a key for each parameter.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.
    implementation: 'xla', or None to choose.

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

  num_groups: int | None = 32
  group_size: int | None = None
  _: KW_ONLY
  reduction_axes: Axes | None = None
  feature_axis: int = dataclasses.field(default=-1, init=False)

  def __post_init__(self, *args: Any) -> None:
    self.num_groups, self.group_size = group.groups_of(
      self.num_features, self.num_groups, self.group_size
    )
    super().__post_init__(*args)

  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    batch_axes = group.batch_axes(self.reduction_axes, np.ndim(x))
    channels = (np.ndim(x) - 1,)
    _check_width(self.num_features, x, channels)
    x, _, options = self._prepare(x, mask, channels)
    options |= {'num_groups': self.num_groups, 'batch_axis': batch_axes}
    return group.group_norm(x, **options)


@dataclasses.dataclass(eq=False, repr=False)
class InstanceNorm(_Affine):
  """Instance normalization, in place of `flax.nnx.InstanceNorm`.

  Args:
    num_features: the number of channels.
    epsilon: added to the variance.
    dtype: dtype of the result; None promotes x's and the parameters'.
    param_dtype: dtype of the parameters.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    feature_axes: the channels, an axis or several, not the first; of several,
      `num_features` is the product.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    use_fast_variance: accepted; the variance is accurate either way.
    promote_dtype: a function of `((x, scale, bias), dtype=...)`.
    rngs: gives a key for each parameter.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.
    implementation: 'xla', or None to choose.

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

  _: KW_ONLY
  feature_axes: Axes = -1

  def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
    """Normalizes x; `mask` is True where an element counts."""
    axes = instance.check_feature_axes(self.feature_axes, np.ndim(x))
    x, _, options = self._prepare(x, mask, axes)
    return instance.instance_norm(x, axis=axes, **options)


def _normalize(
  module: LayerNorm | RMSNorm, x: Array, mask: Array | None, center: bool
) -> Array:
  features, reduced = (
    _types.check_axes(getattr(module, name), np.ndim(x), name, repeats=True)
    for name in ('feature_axes', 'reduction_axes')
  )
  x, _, options = module._prepare(x, mask, features)
  return general.normalize(
    x, axis=reduced, feature_axis=features, center=center, **options
  )


def _as_features(values: Array, x: Array, axes: tuple[int, ...]) -> Array:
  """One number a feature, in the shape of the feature axes of x."""
  _check_width(values.size, x, axes)
  return values.reshape(tuple(x.shape[a] for a in axes))


def _check_width(width: int, x: Array, axes: tuple[int, ...]) -> None:
  shape = tuple(np.shape(x)[a] for a in axes)
  if width != math.prod(shape):
    raise ValueError(
      f'x has the feature axes {axes} of shape {shape}, but num_features is '
      f'{width}. Make the module with num_features={math.prod(shape)}.'
    )


def _is_variable(value: Any) -> bool:
  return isinstance(value, nnx.Variable)


def _read(variables: Any) -> Any:
  """A tree of variables as arrays."""
  return jax.tree.map(lambda v: v[...], variables, is_leaf=_is_variable)


def _write(variables: Any, values: Any) -> None:
  """Stores arrays, which take no part in differentiation, in variables."""

  def is_leaf(value: Any) -> bool:
    return value is None or _is_variable(value)

  old, new = (jax.tree.leaves(t, is_leaf=is_leaf) for t in (variables, values))
  for variable, value in zip(old, new, strict=True):
    if variable is not None:
      new_value = jnp.asarray(value, variable.dtype).reshape(variable.shape)
      variable[...] = lax.stop_gradient(new_value)


_Path = tuple[Any, ...]
_KERNELS = nnx.PathContains('kernel')


class _Wrapper(nnx.Module):
  """What norms of weights share: a layer, some of its weights."""

  layer_instance: nnx.Module
  epsilon: float | None

  def _check(self) -> None:
    _types.check_layer(self.layer_instance, nnx.Pytree, 'nnx.Linear(...)')
    width = 'The layer is the first argument.'
    arguments.check_not_width(self.epsilon, width)

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
      with _types.note_path('/'.join(map(str, path))):
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

  feature_axes: Axes | None
  param_dtype: DType
  variable_filter: Any

  def _prepare(self) -> None:
    """Checks the options, in the form that the calls take them in."""
    self._check()
    axes = () if self.feature_axes is None else self.feature_axes
    self.feature_axes = _types.hashable(axes)
    self.variable_filter = nnx.filterlib.to_predicate(self.variable_filter)

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


@dataclasses.dataclass(eq=False, repr=False)
class WeightNorm(_Filtered):
  """Weight normalization of a layer, in place of `flax.nnx.WeightNorm`.

  The parameters of the layer are never overwritten, and the scales are
  parameters too: both train.

  Args:
    layer_instance: the layer whose weights are normalized at each call.
    feature_axes: the axes along which each index has a length of its own, an
      integer or several. None: one length of the whole weight.
    use_scale: whether there are scales.
    scale_init: initializer of the scales; all but `nnx.initializers.ones` are
      given a key for each weight.
    epsilon: added to the squared length.
    dtype: dtype of the normalized weights; None promotes each weight's and its
      scale's.
    param_dtype: dtype of the scales.
    variable_filter: an nnx filter: which parameters are normalized.
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

  layer_instance: nnx.Module
  _: KW_ONLY
  feature_axes: Axes | None = -1
  use_scale: bool = True
  scale_init: Initializer = nnx.initializers.ones
  epsilon: float = 1e-12
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  variable_filter: Any = _KERNELS
  promote_dtype: PromoteDtypeFn = dtypes.promote_dtype
  rngs: InitVar[nnx.Rngs]

  def __post_init__(self, rngs: nnx.Rngs) -> None:
    self._prepare()
    self.scales: Any = self._factors(self.use_scale, self.scale_init, rngs)

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
  epsilon: float | None = None
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  variable_filter: Any = _KERNELS
  rngs: InitVar[nnx.Rngs]

  def __post_init__(self, rngs: nnx.Rngs) -> None:
    self._prepare()
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


@dataclasses.dataclass(eq=False, repr=False)
class SpectralNorm(_Wrapper, _Running):
  """Spectral normalization of a layer, in place of `flax.nnx.SpectralNorm`.

  Each parameter of the layer of rank two or more is divided by its largest
  singular value, its leading axes taken together. The parameters themselves are
  never overwritten.

  Args:
    layer_instance: the layer whose weights are normalized at each call.
    n_steps: steps of the power iteration at each call; below one, the weights
      are left as they are.
    epsilon: added to squared lengths in the power iteration.
    dtype: dtype of the normalized weights; None keeps each weight's.
    param_dtype: dtype of u and sigma.
    error_on_non_matrix: refuse parameters of rank three or more.
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

  layer_instance: nnx.Module
  _: KW_ONLY
  n_steps: int = 1
  epsilon: float = 1e-12
  dtype: DType | None = None
  param_dtype: DType = jnp.float32
  error_on_non_matrix: bool = False
  update_stats: InitVar[bool] = True
  rngs: InitVar[nnx.Rngs]

  def __post_init__(self, update_stats: bool, rngs: nnx.Rngs) -> None:
    self._check()
    update = _types.check_flag(update_stats, 'update_stats')
    self.use_running_average: bool | None = not update
    normal, stats = nnx.initializers.normal(), {}
    for path, param in self._params().items():
      if self._normalizes(param):
        shape = 1, param.shape[-1]
        u = normal(rngs.params(), shape, self.param_dtype)
        stats[*path, 'u'] = nnx.BatchStat(u)
        sigma = jnp.ones((), self.param_dtype)
        stats[*path, 'sigma'] = nnx.BatchStat(sigma)
    self.batch_stats = nnx.data(stats)

  def __call__(
    self, x: Any, update_stats: bool | None = None, **kwargs: Any
  ) -> Any:
    """Calls the layer, given x and `kwargs`, with normalized weights."""
    frozen = None
    if update_stats is not None:
      frozen = not _types.check_flag(update_stats, 'update_stats')
    update = not self._evaluates(frozen)

    def normalized(path: _Path, param: nnx.Param[Array]) -> Array | None:
      if not self._normalizes(param):
        return None
      return self._normalized(path, param[...], update)

    return self._call_with(normalized, x, **kwargs)

  def _normalizes(self, weight: Any) -> bool:
    return self.n_steps >= 1 and _types.is_matrix(
      weight, self.error_on_non_matrix
    )

  def _normalized(self, path: _Path, weight: Array, update: bool) -> Array:
    names = weights.SpectralNormState._fields
    stored = weights.SpectralNormState(
      *(_stored(self.batch_stats, (*path, name)) for name in names)
    )
    y, state = weights.spectral_norm(
      weight,
      _read(stored),
      n_steps=self.n_steps,
      epsilon=self.epsilon,
      update=update,
      dtype=dtypes.canonicalize_dtype(weight, dtype=self.dtype),
    )
    if update:
      _write(stored, state)
    return y


delattr(SpectralNorm, 'update_stats')  # an argument's default, no attribute


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


_TENTH = nnx.initializers.constant(0.1)


class LayerNormLSTMCell(nnx.OptimizedLSTMCell):
  """A layer-normalized LSTM cell, in place of `flax.nnx.OptimizedLSTMCell`.

  The variables of Flax's cell, whose kernels hold the gates i, f, g, o side by
  side, and those of three norms. See `normkit.recurrent.layer_norm_lstm`.

  Args:
    in_features: number of input features.
    hidden_features: number of hidden units.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.
    rngs: gives a key for each parameter.
    **options: the other arguments of Flax's cell: `gate_fn`, `activation_fn`,
      `kernel_init`, `recurrent_kernel_init`, `bias_init`, `dtype`,
      `param_dtype` and so on; `promote_dtype` is not called.

  Attributes:
    norm_i: holds scale and bias of the norm of the input's sums.
    norm_h: holds those of the norm of the hidden state's sums.
    norm_c: holds those of the norm of the memory.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.LayerNormLSTMCell(3, 4, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 3))
    >>> nnx.RNN(cell)(x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    epsilon: float = 1e-6,
    scale_init: Initializer = nnx.initializers.ones,
    implementation: Implementation | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    super().__init__(in_features, hidden_features, rngs=rngs, **options)
    self.epsilon = epsilon
    self.implementation = implementation
    for name, width in _lstm_norms(hidden_features).items():
      setattr(self, name, _CellNorm(width, scale_init, self.param_dtype, rngs))

  def __call__(
    self, carry: tuple[Array, Array], inputs: Array
  ) -> tuple[tuple[Array, Array], Array]:
    """One time step: `((c, h), inputs)` to `((c, h), h)`."""
    return recurrent.layer_norm_lstm(
      _cell_params(self),
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


class LayerNormGRUCell(nnx.GRUCell):
  """A layer-normalized GRU cell, in place of `flax.nnx.GRUCell`.

  The variables of Flax's cell, whose kernels hold the gates r, z, n side by
  side, and those of two norms. See `normkit.recurrent.layer_norm_gru`.

  Args:
    in_features: number of input features.
    hidden_features: number of hidden units.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms; their biases are zero.
    implementation: as `normkit.layer_norm` takes it.
    rngs: gives a key for each parameter.
    **options: the other arguments of Flax's cell: `gate_fn`, `activation_fn`,
      `kernel_init`, `recurrent_kernel_init`, `bias_init`, `dtype`,
      `param_dtype` and so on; `promote_dtype` is not called.

  Attributes:
    norm_i: holds scale and bias of the norms of the input's sums.
    norm_h: holds those of the norms of the hidden state's sums.

  References:
    Ba, Kiros and Hinton, "Layer Normalization" (2016).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.LayerNormGRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, 3))
    >>> nnx.RNN(cell)(x, seq_lengths=jnp.array([5, 2])).shape
    (2, 5, 4)
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    epsilon: float = 1e-6,
    scale_init: Initializer = nnx.initializers.ones,
    implementation: Implementation | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    super().__init__(in_features, hidden_features, rngs=rngs, **options)
    self.epsilon = epsilon
    self.implementation = implementation
    for name in ('norm_i', 'norm_h'):
      wide = 3 * hidden_features
      setattr(self, name, _CellNorm(wide, scale_init, self.param_dtype, rngs))

  def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
    """One time step: `(h, inputs)` to `(h, h)`."""
    return recurrent.layer_norm_gru(
      _cell_params(self),
      carry,
      inputs,
      implementation=self.implementation,
      **_cell_options(self),
    )


class BatchNormLSTMCell(_Running, nnx.OptimizedLSTMCell):
  """A batch-normalized LSTM cell, in place of `flax.nnx.OptimizedLSTMCell`.

  The variables of Flax's cell, whose kernels hold the gates i, f, g, o side by
  side, and scales and statistics of three norms, of which that of the memory
  alone has a bias. See `normkit.recurrent.batch_norm_lstm`.

  Run it with `normkit.nnx.RNN`, which tells the cell where sequences end.
  Flax's RNN does not: there, where `seq_lengths` are given, give them to the
  carry too, or the padding enters the statistics:
  `initial_carry=carry.with_lengths(seq_lengths)`, with the carry from
  `initialize_carry`.

  Args:
    in_features: number of input features.
    hidden_features: number of hidden units.
    max_length: how many time steps have statistics of their own; later ones
      share the last.
    use_running_average: normalize with the stored statistics; the call beats
      it. None leaves it to the call.
    momentum: the share of the old running value that is kept (PyTorch's 0.1 is
      0.9 here). None weighs all updates equally.
    epsilon: added to the variances.
    scale_init: initializer of the scales of the norms, 0.1 unless given.
    axis_name: names of mapped axes over which statistics are pooled.
    axis_index_groups: groups of indices of `axis_name`, each pooled by itself.
    rngs: gives a key for each parameter.
    **options: the other arguments of Flax's cell: `gate_fn`, `activation_fn`,
      `kernel_init`, `recurrent_kernel_init`, `bias_init`, `dtype`,
      `param_dtype` and so on; `promote_dtype` is not called.

  Attributes:
    norm_i: holds scale, mean, var and count of the norm of the input's sums.
    norm_h: holds those of the norm of the hidden state's sums.
    norm_c: holds those of the norm of the memory, and its bias.

  References:
    Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch
    Normalization" (2017).

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.BatchNormLSTMCell(
    ...   3, 4, max_length=5, rngs=nnx.Rngs(0)
    ... )
    >>> rnn, x = normkit.nnx.RNN(cell), jnp.ones((2, 5, 3))
    >>> rnn(x, seq_lengths=jnp.array([4, 2])).shape
    (2, 5, 4)
    >>> cell.norm_c.count[:, 0].tolist()
    [1, 1, 1, 1, 0]
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    max_length: int,
    use_running_average: bool | None = False,
    momentum: float | None = 0.99,
    epsilon: float = 1e-5,
    scale_init: Initializer = _TENTH,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ) -> None:
    super().__init__(in_features, hidden_features, rngs=rngs, **options)
    self.use_running_average = use_running_average
    self.momentum = momentum
    self.epsilon = epsilon
    self.axis_name = axis_name
    self.axis_index_groups = _types.hashable(axis_index_groups)
    initial = recurrent.init_batch_norm_lstm(hidden_features, max_length)
    for name, width in _lstm_norms(hidden_features).items():
      made = _CellNorm(
        width,
        scale_init,
        self.param_dtype,
        rngs,
        use_bias=name == 'norm_c',
        stats=getattr(initial, name),
      )
      setattr(self, name, made)

  def __call__(  # type: ignore[override]
    self,
    carry: recurrent.BatchNormLSTMCarry,
    inputs: Array,
    use_running_average: bool | None = None,
  ) -> tuple[recurrent.BatchNormLSTMCarry, Array]:
    """One time step: `(carry, inputs)` to `(carry, h)`."""
    train = not self._evaluates(use_running_average)
    names = recurrent.BatchNormLSTMState._fields
    stats = recurrent.BatchNormLSTMState(
      *(getattr(self, name).stats() for name in names)
    )
    carry, y, state = recurrent.batch_norm_lstm(
      _cell_params(self),
      _read(stats),
      carry,
      inputs,
      train=train,
      momentum=self.momentum,
      axis_name=self.axis_name,
      axis_index_groups=self.axis_index_groups,
      **_cell_options(self),
    )
    if train:
      _write(stats, state)
    return carry, y

  def initialize_carry(  # type: ignore[override]
    self, input_shape: tuple[int, ...], *args: Any, **kwargs: Any
  ) -> recurrent.BatchNormLSTMCarry:
    """A carry at time step zero, of sequences without end."""
    c, h = super().initialize_carry(input_shape, *args, **kwargs)
    step = jnp.zeros(input_shape[:-1], jnp.int32)
    return recurrent.BatchNormLSTMCarry(c, h, step)


class RNN(nnx.RNN):
  """Runs a cell over a sequence, in place of `flax.nnx.RNN`.

  It differs in one thing: the batch-normalized LSTM is told `seq_lengths`, so
  that padding does not enter its statistics.

  Args:
    cell: the cell; the other arguments too are those of `flax.nnx.RNN`.

  Examples:
    >>> import jax.numpy as jnp, normkit.nnx
    >>> from flax import nnx
    >>> cell = normkit.nnx.LayerNormGRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> normkit.nnx.RNN(cell)(jnp.ones((2, 5, 3))).shape
    (2, 5, 4)
  """

  def __call__(
    self,
    inputs: Array,
    *,
    initial_carry: Any = None,
    seq_lengths: Array | None = None,
    time_major: bool | None = None,
    rngs: nnx.Rngs | nnx.RngStream | None = None,
    **kwargs: Any,
  ) -> Any:
    """Runs the cell; the arguments are those of `flax.nnx.RNN`."""
    major = self.time_major if time_major is None else time_major
    if initial_carry is None:
      time = 0 if major else inputs.ndim - self.cell.num_feature_axes - 1
      shape = (*inputs.shape[:time], *inputs.shape[time + 1 :])
      stream = self.rngs if rngs is None else rngs
      initial_carry = self.cell.initialize_carry(shape, stream)
    if isinstance(initial_carry, recurrent.BatchNormLSTMCarry):
      initial_carry = initial_carry.with_lengths(seq_lengths)
    return super().__call__(
      inputs,
      initial_carry=initial_carry,
      seq_lengths=seq_lengths,
      time_major=major,
      rngs=rngs,
      **kwargs,
    )


class _CellNorm(nnx.Module):
  """The parameters of one norm of a cell, and its statistics if it has any."""

  def __init__(
    self,
    width: int,
    scale_init: Initializer,
    param_dtype: DType,
    rngs: nnx.Rngs,
    use_bias: bool = True,
    stats: _running.BatchNormState | None = None,
  ) -> None:
    self.scale = nnx.Param(scale_init(rngs.params(), (width,), param_dtype))
    self.bias: Any = nnx.data(None)
    if use_bias:
      self.bias = nnx.Param(jnp.zeros((width,), param_dtype))
    if stats is not None:
      for name, value in stats._asdict().items():
        setattr(self, name, nnx.BatchStat(value))

  def params(self) -> norm.NormParams:
    """The parameters as arrays."""
    return norm.NormParams(*_read((self.scale, self.bias)))

  def stats(self) -> _running.BatchNormState:
    """The variables that hold the statistics."""
    names = _running.BatchNormState._fields
    return _running.BatchNormState(*(getattr(self, name) for name in names))


def _lstm_norms(hidden: int) -> dict[str, int]:
  """The names of the norms of an LSTM and their widths."""
  return {'norm_i': 4 * hidden, 'norm_h': 4 * hidden, 'norm_c': hidden}


def _cell_params(cell: Any) -> recurrent.CellParams:
  """The parameters of a cell as its function takes them."""
  is_gru = isinstance(cell, nnx.GRUCell)
  names = ('norm_i', 'norm_h') if is_gru else ('norm_i', 'norm_h', 'norm_c')
  bias = (cell.dense_i if is_gru else cell.dense_h).bias
  return recurrent.CellParams(
    cell.dense_i.kernel[...],
    cell.dense_h.kernel[...],
    _read(bias),
    **{name: getattr(cell, name).params() for name in names},
  )


def _cell_options(cell: Any) -> dict[str, Any]:
  """The options that all cells share."""
  names = 'epsilon', 'gate_fn', 'activation_fn', 'dtype'
  return {name: getattr(cell, name) for name in names}
