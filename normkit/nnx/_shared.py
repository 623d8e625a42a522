"""What the modules share: variables as arrays, the choice of statistics."""

from collections.abc import Callable
import functools
import inspect
import math
from typing import Any, TypeVar

from flax import nnx
from flax.nnx.nn import initializers
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from normkit import _types, arguments
from normkit._types import Array

Class = TypeVar('Class', bound=type)


class Running(nnx.Module):
  """A module that may use stored statistics: `train`, `eval`, `nnx.view`."""

  use_running_average: Any  # whether, or None

  def _evaluates(self, use_running_average: bool | None) -> bool:
    """Whether to use the stored statistics: the call beats the attribute."""
    for choice in (use_running_average, self.use_running_average):
      if choice is not None:
        _types.check_not_traced(choice, 'use_running_average')
        return bool(choice)
    raise ValueError(
      'use_running_average is None in the module and at the call. Give it in '
      'either place, or use train(), eval() or nnx.view(module, '
      'use_running_average=...).'
    )

  def set_view(self, use_running_average: bool | None = None) -> None:
    """What `nnx.view` calls.

    Args:
      use_running_average: normalize with the stored statistics; None leaves it
        as it is.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


def with_signature_of(flax: type) -> Callable[[Class], Class]:
  """Says in a constructor's signature what its `**options` stands for.

  They are the arguments of a Flax class, and behind them, by name only, those
  of the classes in between.
  """

  def complete(cls: Class) -> Class:
    init = cls.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
      init(self, *args, **options)

    theirs = _parameters(flax)
    own: dict[str, inspect.Parameter] = {}
    for kind in cls.__mro__[: cls.__mro__.index(flax)]:
      if '__init__' in vars(kind):
        own |= _parameters(kind) | own
    merged = [own.pop(name, p) for name, p in theirs.items()] + [*own.values()]
    __init__.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]
    return cls

  return complete


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
  """The parameters of a constructor that can be given by name."""
  parameters = inspect.signature(cls.__init__).parameters.values()
  unnamed = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
  return {p.name: p for p in parameters if p.kind not in unnamed}


def read(variables: Any) -> Any:
  """A tree of variables as arrays."""
  return jax.tree.map(lambda v: v[...], variables, is_leaf=_is_variable)


def write(variables: Any, values: Any) -> None:
  """Stores arrays, which take no part in differentiation, in variables.

  They take the dtype of the variable; but a count stays an integer.
  """

  def is_leaf(value: Any) -> bool:
    return value is None or _is_variable(value)

  old, new = (jax.tree.leaves(t, is_leaf=is_leaf) for t in (variables, values))
  for variable, value in zip(old, new, strict=True):
    if variable is None:
      continue
    is_count = jnp.issubdtype(jnp.result_type(value), jnp.integer)
    dtype = jnp.result_type(value) if is_count else variable.dtype
    stored = jnp.asarray(value, dtype).reshape(variable.shape)
    if dtype == variable.dtype:
      variable[...] = lax.stop_gradient(stored)
    else:
      variable.set_value(stored)


def _is_variable(value: Any) -> bool:
  return isinstance(value, nnx.Variable)


def with_offset(options: dict[str, Any], offset: float) -> dict[str, Any]:
  """A constructor's options; Flax's ones stand for a scale of one."""
  offset = _types.check_real(offset, 'scale_offset')
  given = options.get('scale_init', initializers.ones)
  if offset and given is initializers.ones:
    return options | {'scale_init': initializers.constant(1 - offset)}
  return options


def as_features(values: Array, x: Array, axes: tuple[int, ...]) -> Array:
  """One number a feature, in the shape of the feature axes of x."""
  check_width(values.size, x, axes)
  return values.reshape(tuple(x.shape[a] for a in axes))


def check_width(width: int, x: Array, axes: tuple[int, ...]) -> None:
  """Raises unless these axes of x have so many features together."""
  shape = tuple(np.shape(x)[a] for a in axes)
  if width != math.prod(shape):
    raise ValueError(
      f'x has the feature axes {axes} of shape {shape}, but num_features is '
      f'{width}. Make the module with num_features={math.prod(shape)}.'
      f'{arguments.other_axis((width,), np.shape(x), axes)}'
    )


def calls_super(kind: type, base: type) -> bool:
  """Whether each class above `base` leaves the call to it, or calls it."""
  for cls in kind.__mro__[: kind.__mro__.index(base)]:
    call = vars(cls).get('__call__')
    code = getattr(inspect.unwrap(call), '__code__', None) if call else None
    if call and not {'super', '__call__'} <= {*getattr(code, 'co_names', ())}:
      return False
  return True


def set_class(module: nnx.Module, kind: Any) -> None:
  """Makes a module one of another class, with the same variables."""
  object.__setattr__(module, '__class__', kind)
