"""What a transform is: its protocol, options, parameters and empty state."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from normkit import _types, _words, arguments
from normkit._types import (
  Array,
  Axes,
  AxisName,
  DType,
  Groups,
  Implementation,
  Scalar,
)


@_types.serializable
class NormParams(NamedTuple):
  """The affine parameters of a norm; None where it has none.

  Attributes:
    scale: what the normalized values are multiplied by, or None.
    bias: what is added after that, or None.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> nk.NormParams(scale=jnp.ones(4)).bias is None
    True
  """

  scale: Array | None = None
  bias: Array | None = None


@_types.serializable
class EmptyState(NamedTuple):
  """The state of a norm that keeps none.

  Examples:
    >>> import normkit as nk
    >>> nk.EmptyState()
    EmptyState()
  """


class Norm(Protocol):
  """What a normalization transform is: two pure functions and its options.

  A frozen, hashable dataclass with these two methods is a transform; it can be
  closed over or passed to `jax.jit` as a static argument, and
  `normkit.linen.Norm` and `normkit.nnx.Norm` turn it into a module. One whose
  epsilon or momentum is an array does not hash: make it inside of the program,
  `dataclasses.replace(norm, momentum=schedule(step)).apply(...)`.

  Examples:
    >>> import jax.numpy as jnp, normkit as nk
    >>> norm: nk.Norm = nk.LayerNorm(epsilon=1e-5)
    >>> params, state = norm.init(jnp.ones((2, 3)))
    >>> y, state = norm.apply(params, state, jnp.ones((2, 3)), train=True)
  """

  def init(self, x: Array | jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    """Returns `(params, state)` for inputs of the shape and dtype of x."""
    ...

  def apply(
    self,
    params: Any,
    state: Any,
    x: Array,
    *,
    train: bool,
    where: Array | None = None,
  ) -> tuple[Array, Any]:
    """Returns `(y, state)`, y of the shape of x."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamOptions(_words.OwnWords):
  """The options of every transform that has a scale.

  The scale is `params.scale + scale_offset`: with an offset of one the
  parameter starts at zero, and weight decay draws the scale to one (Gemma).

  Frozen and hashable: lists become tuples, and what can be checked without an
  input is checked when the transform is made.
  """

  use_scale: bool = True
  scale_offset: float = 0.0
  param_dtype: DType = jnp.float32
  dtype: DType | None = None

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = _types.hashable(getattr(self, field.name))
      if check := _FIELD_CHECKS.get(field.name):
        value = check(value)
      object.__setattr__(self, field.name, value)
    groups = getattr(self, 'axis_index_groups', None)
    if groups is not None and getattr(self, 'axis_name', None) is None:
      _types.refuse_groups(groups)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ParamOptions):
  """The options of the transforms that take statistics."""

  epsilon: Scalar = 1e-6
  axis_name: AxisName | None = None
  axis_index_groups: Groups | None = None
  implementation: Implementation | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CenteredOptions(Options):
  """The options of the transforms that subtract a mean."""

  use_bias: bool = True


def options_of(holder: Any, function: Callable[..., Any]) -> dict[str, Any]:
  """The options of a norm's function that a transform or a module holds.

  They are the attributes that have the names of its keyword-only arguments,
  but for what each call says anew.
  """
  names = _keywords(function)
  return {
    name: getattr(holder, name) for name in names if hasattr(holder, name)
  }


@functools.cache
def _keywords(function: Callable[..., Any]) -> tuple[str, ...]:
  parameters = inspect.signature(function).parameters.values()
  names = (p.name for p in parameters if p.kind == p.KEYWORD_ONLY)
  return tuple(name for name in names if name not in ('train', 'where'))


_FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
  'epsilon': _types.check_epsilon,
  'activation': arguments.check_activation,
  'norm_before_gate': lambda f: _types.check_flag(f, 'norm_before_gate'),
  'implementation': _types.check_implementation,
  'alpha': lambda alpha: _types.check_real(alpha, 'alpha'),
  'round_before_scale': lambda f: _types.check_flag(f, 'round_before_scale'),
  'shift': lambda shift: _types.check_real(shift, 'shift'),
  'scale_offset': lambda offset: _types.check_real(offset, 'scale_offset'),
  'momentum': _types.check_momentum,
  'axis_index_groups': _types.check_index_groups,
  'virtual_batch_size': _types.check_virtual_batch_size,
  'axis': lambda axis: (
    _types.as_axes(axis) if isinstance(axis, tuple) else axis
  ),
  'feature_axis': lambda axis: (
    _types.as_axes(axis, 'feature_axis') if isinstance(axis, tuple) else axis
  ),
  'param_dtype': lambda dtype: _types.check_dtype(dtype, 'param_dtype'),
  'dtype': lambda dtype: None if dtype is None else _types.check_dtype(dtype),
}


def check_transform(transform: Any) -> None:
  """Raises for what a module cannot wrap: a class, another module."""
  name = getattr(transform, '__name__', type(transform).__name__)
  if isinstance(transform, type):
    raise TypeError(
      f'transform must be an instance, got the class {name}. Make one: '
      f'{name}(...).'
    )
  is_module = hasattr(transform, 'init_with_output')  # linen's has both, too
  if is_module or not all(hasattr(transform, m) for m in ('init', 'apply')):
    raise TypeError(
      'transform must have init and apply, as normkit.LayerNorm() has, got '
      f'{name}. Give one of normkit or your own; a Flax module needs no Norm '
      'around it.'
    )


def check_like(x: Any) -> None:
  """Raises unless x has the shape and dtype of an input."""
  if not (hasattr(x, 'shape') and hasattr(x, 'dtype')):
    shape = tuple(x) if isinstance(x, (tuple, list)) else (8, 32)
    raise TypeError(
      'x must be an array or a jax.ShapeDtypeStruct, got '
      f'{type(x).__name__}: {x!r:.60}. Give an input or its form, for example '
      f'jax.ShapeDtypeStruct({shape}, jnp.float32).'
    )
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    raise TypeError(
      f'x must be an input, got a random key: {x!r:.60}. Nothing is drawn at '
      'random: init takes x alone.'
    )
  _types.check_dtype(x.dtype, 'x')


def init_params(
  x: Array | jax.ShapeDtypeStruct, axis: Axes, options: ParamOptions
) -> NormParams:
  """Scales of one and biases of zero for the feature axes of x."""
  check_like(x)
  axes = _types.check_axes(axis, len(x.shape))
  shape = tuple(x.shape[a] for a in axes)
  return NormParams(
    jnp.full(shape, 1 - options.scale_offset, options.param_dtype)
    if options.use_scale
    else None,
    jnp.zeros(shape, options.param_dtype) if _use_bias(options) else None,
  )


def check_params(
  params: Any, options: ParamOptions, kind: Any = NormParams, **others: bool
) -> Any:
  """Returns `params`, the offset in its scale; raises unless as init makes it.

  For functions that take no offset themselves; `kind` and `others` as in
  `check_made`.
  """
  params = check_made(params, options, kind, **others)
  if params.scale is None or not options.scale_offset:
    return params
  wide = _types.statistics_dtype(params.scale.dtype)
  return params._replace(scale=params.scale.astype(wide) + options.scale_offset)


def check_made(
  params: Any, options: ParamOptions, kind: Any = NormParams, **others: bool
) -> Any:
  """Returns `params`; raises unless as init makes it.

  `kind` is its type, a NamedTuple with scale and bias; `others` tell which of
  its other fields may be None, and whether they are.
  """
  wanted = {'scale': options.use_scale, 'bias': _use_bias(options), **others}
  held = {name: wanted.get(name, True) for name in kind._fields}
  if not isinstance(params, kind) or any(
    (getattr(params, name) is not None) != hold for name, hold in held.items()
  ):
    fields = (f'{n}={"an array" if h else "None"}' for n, h in held.items())
    raise ValueError(
      f'params must be {kind.__name__}({", ".join(fields)}), got '
      f'{_told(params)}. {_mend(params, kind, "params")}'
    )
  return params


def _use_bias(options: ParamOptions) -> bool:
  return getattr(options, 'use_bias', False)


def check_empty_state(state: Any) -> None:
  """Raises unless `state` is the empty state of a norm that keeps none."""
  if not isinstance(state, EmptyState):
    raise ValueError(
      f'state must be EmptyState(), got {_told(state)}: this norm keeps no '
      f'running statistics. {_mend(state, EmptyState, "state")}'
    )


def check_kind(value: Any, kind: Any, name: str) -> None:
  """Raises unless `value` is of a kind of NamedTuple."""
  if not isinstance(value, kind):
    raise ValueError(
      f'{name} must be {kind.__name__}({", ".join(kind._fields)}), got '
      f'{_told(value)}. {_mend(value, kind, name)}'
    )


def _told(value: Any) -> str:
  """What was given in place of a NamedTuple, in a few words."""
  if hasattr(value, '_fields'):
    fields = zip(value._fields, value, strict=True)
    held = (f'{n}={"None" if v is None else "an array"}' for n, v in fields)
    return f'{type(value).__name__}({", ".join(held)})'
  if isinstance(value, Mapping):
    return f'a dict of {", ".join(map(str, value)) or "nothing"}'
  if _types.is_array(value):
    return f'an array of shape {value.shape}'
  return f'{type(value).__name__}: {value!r:.60}'


def _mend(value: Any, kind: Any, name: str) -> str:
  """How to have a NamedTuple in place of what was given."""
  if value is None or (not _types.is_array(value) and not value):
    value = {}
  is_dict = isinstance(value, Mapping)
  if is_dict and set(value) == set(kind._fields):
    call = f'{kind.__name__}({f"**{name}" if value else ""})'
    return (
      f'If a checkpoint was restored without a target, make it one: '
      f'normkit.{call}.'
    )
  is_made = kind._fields and not is_dict and not hasattr(value, '_fields')
  make = f'{kind.__name__}({", ".join(kind._fields)})'
  return (
    'Take it from init of this transform'
    f'{f", or make {make} of arrays" if is_made else ""}; '
    'apply takes params, state and x, in this order.'
  )
