"""Shared types, and the argument checks that every norm uses.

Each check runs at trace time, before any work, and its message names the
argument, what was given, what is accepted and how to mend it.
"""

from collections.abc import Iterable, Sequence
import functools
import inspect
import math
import operator
import sys
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import jax
from jax import export
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.typing.ArrayLike
DType: TypeAlias = Any
Axes: TypeAlias = int | Sequence[int]
AxisName: TypeAlias = str | tuple[str, ...]
Groups: TypeAlias = Sequence[Sequence[int]]
Scalar: TypeAlias = float | Array  # a number is checked, an array may be traced
Implementation: TypeAlias = Literal['xla', 'triton', 'mosaic_gpu', 'mosaic_tpu']
Class = TypeVar('Class', bound=type)


def serializable(kind: Class) -> Class:
  """Lets a NamedTuple be an argument or result of programs that are saved."""
  export.register_namedtuple_serialization(
    kind, serialized_name=f'normkit.{kind.__name__}'
  )
  return kind


def as_array(x: ArrayLike) -> Array:
  """x as an array of JAX's, also where it is one of NumPy inside.

  `vmap` wraps that as it is, and under `jit` no rule of `jax.custom_jvp` takes
  it then: `jax.jit(lambda: jax.vmap(jax.nn.relu)(np.ones(3)))()` fails.
  """
  array = inner = jnp.asarray(x)
  while type(inner).__name__ == 'BatchTracer':
    inner = inner.val  # type: ignore[attr-defined]
  return jnp.copy(array) if isinstance(inner, np.ndarray) else array


def check_input(x: ArrayLike, name: str = 'x') -> Array:
  """Returns `x` as an array of real or complex floating-point numbers."""
  if hasattr(x, '_fields'):
    raise TypeError(
      f'{name} must be an array, got {type(x).__name__}. The order is x, '
      'state, scale, bias in functions, and params, state, x in apply.'
    )
  if not isinstance(x, (jax.Array, np.ndarray, np.generic)):
    raise TypeError(
      f'{name} must be an array, got {type(x).__name__}: {x!r:.60}. '
      'Convert it first, for example with jnp.asarray.'
    )
  check_dtype(x.dtype, name)
  return as_array(x)


def check_dtype(dtype: DType, name: str = 'dtype') -> DType:
  """Returns `dtype` as a NumPy dtype that holds 16-bit floats or wider."""
  try:
    dtype = jnp.dtype(dtype)
  except TypeError:
    raise TypeError(
      f'{name} must be a dtype, got {dtype!r}. Give one, or its name: '
      "jnp.bfloat16, 'bfloat16'."
    ) from None
  if not jnp.issubdtype(dtype, jnp.inexact):
    raise TypeError(
      f'{name} must have a floating-point or complex dtype, got {dtype}. '
      f'{_of_dtype(name, "float32")}'
    )
  if dtype.itemsize < 2:
    raise TypeError(
      f'{name} must have at least 16 bits, got {dtype}. '
      f'{_of_dtype(name, "bfloat16")}'
    )
  return dtype


def _of_dtype(name: str, dtype: str) -> str:
  """A sentence for a message: how to give that dtype."""
  if name.endswith('dtype'):
    return f'Give one, for example {name}=jnp.{dtype}.'
  return f'Cast it first, for example with {name}.astype(jnp.{dtype}).'


def check_output_dtype(
  dtype: DType | None, x_dtype: DType, name: str = 'x'
) -> DType:
  """Returns the dtype of the result, which must be able to hold it."""
  if dtype is None:
    return x_dtype
  dtype = check_dtype(dtype)
  if jnp.issubdtype(x_dtype, jnp.complexfloating) and not jnp.issubdtype(
    dtype, jnp.complexfloating
  ):
    raise TypeError(
      f'dtype={dtype} cannot hold the complex result of {name} of dtype '
      f'{x_dtype}. Give a complex dtype or None.'
    )
  return dtype


@functools.cache
def promote(one: DType, other: DType) -> DType:
  """The dtype that holds both, whatever JAX is told to promote by itself."""
  with jax.numpy_dtype_promotion('standard'):
    return jnp.promote_types(one, other)


def ruled(function: Any, *args: Any, **options: Any) -> Any:
  """Calls a function of `jax.custom_jvp` or `jax.jit`.

  Under `jax.experimental.jet`, whose tracers such rules do not take (it cannot
  differentiate `jax.nn.relu`), it calls what the function wraps.
  """
  if in_jet((args, options)):
    function = inspect.unwrap(function)
  return function(*args, **options)


def in_jet(given: Any) -> bool:
  """Whether `jax.experimental.jet` traces any of this, inside of others too."""
  jet: Any = sys.modules.get('jax.experimental.jet')
  found = jax.tree.leaves(given) if jet else []
  while found and not any(isinstance(value, jet.JetTracer) for value in found):
    inside = [getattr(v, 'primal', getattr(v, 'val', None)) for v in found]
    found = [v for v in inside if isinstance(v, jax.core.Tracer)]
  return bool(found)


def has_hash(value: Any) -> bool:
  """Whether `hash` takes it, with all that it holds."""
  try:
    hash(value)
  except TypeError:
    return False
  return True


def statistics_dtype(dtype: DType) -> DType:
  """The dtype in which statistics of `dtype` are taken: float32 or wider."""
  return promote(dtype, jnp.float32)


def widen(x: Any, dtype: DType) -> Any:
  """x in its dtype or in `dtype`, the wider of them; None stays None."""
  return None if x is None else x.astype(promote(x.dtype, dtype))


def real_dtype(dtype: DType) -> DType:
  """The dtype of the real part of `dtype`."""
  return jnp.finfo(dtype).dtype


def as_inexact(x: ArrayLike, dtype: DType) -> Array:
  """Returns x as a norm takes it whose result is of `dtype`.

  Integers become floats, and what is narrower than the statistics of `dtype`
  is widened; but half precision to float32, which the norms do themselves.
  """
  x = as_array(x)
  wide = promote(x.dtype, statistics_dtype(dtype))
  is_half = x.dtype in (jnp.float16, jnp.bfloat16)
  return x if is_half and wide == jnp.float32 else x.astype(wide)


def as_axes(axis: Any, name: str = 'axis') -> tuple[int, ...]:
  """Returns `axis`, an integer or several, as a tuple of Python integers."""
  axes = axis if isinstance(axis, Iterable) else (axis,)
  try:
    if any(isinstance(a, (bool, np.bool_)) for a in axes):
      raise TypeError
    return tuple(operator.index(a) for a in axes)
  except TypeError:
    raise TypeError(
      f'{name} must be an integer or a sequence of integers, got {axis!r}.'
    ) from None


def check_axes(
  axis: Axes, ndim: int, name: str = 'axis', *, repeats: bool = False
) -> tuple[int, ...]:
  """Returns the axes as sorted, non-negative integers, each once.

  `repeats` lets an axis be given more than once, as Flax does.
  """
  axes = as_axes(axis, name)
  for a in axes:
    if not -ndim <= a < ndim:
      raise ValueError(
        f'{name}={axis!r} is out of range for an input of rank {ndim}: '
        f'{f"axes run from {-ndim} to {ndim - 1}" if ndim else "it has none"}.'
      )
  positive = sorted({a % ndim for a in axes})
  if len(positive) != len(axes) and not repeats:
    raise ValueError(
      f'{name}={axis!r} names an axis twice in an input of rank {ndim}. '
      'Give each axis once.'
    )
  return tuple(positive)


def other_axes(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
  """The axes of a rank-`ndim` array that are not in `axes`."""
  return tuple(a for a in range(ndim) if a not in axes)


def check_where(
  where: ArrayLike | None, shape: tuple[int, ...]
) -> Array | None:
  """Returns the mask as a boolean array of the rank of `shape`, or None."""
  if where is None:
    return None
  where = _as_mask(where, shape, 'where', TypeError)
  return where.reshape((1,) * (len(shape) - where.ndim) + where.shape)


def check_mask(
  mask: ArrayLike | None, shape: tuple[int, ...], *, cast: bool
) -> Array | None:
  """Returns the mask of a module's call; `cast` takes numbers, zero as False.

  Without it, what is not boolean is a ValueError, as in Flax.
  """
  if mask is None:
    return None
  return _as_mask(mask, shape, 'mask', None if cast else ValueError)


def _as_mask(
  mask: ArrayLike,
  shape: tuple[int, ...],
  name: str,
  error: type[Exception] | None,
) -> Array:
  """The mask as a boolean array; raises `error`, if any, for numbers."""
  try:
    mask = as_array(mask)
  except TypeError:
    raise TypeError(
      f'{name} must be an array of booleans, got {mask!r:.60}.'
    ) from None
  if mask.dtype != jnp.bool_ and error:
    raise error(
      f'{name} must be boolean (True where x counts), got {mask.dtype}. Of '
      f'zeros and ones make it with {name}.astype(bool); of lengths by '
      'comparing, jnp.arange(n) < lengths[:, None].'
    )
  check_broadcast(mask.shape, shape, name)
  return mask.astype(bool)


def check_broadcast(
  shape: tuple[int, ...], to: tuple[int, ...], name: str, of: str = 'x'
) -> None:
  """Raises unless `shape` broadcasts to exactly the shape `to`."""
  last = to[len(to) - len(shape) :]  # sizes may be symbols, unknown to NumPy
  if len(shape) > len(to) or any(
    size not in (1, wanted) for size, wanted in zip(shape, last, strict=True)
  ):
    raise ValueError(
      f'{name} of shape {shape} does not broadcast to the shape {to} of {of}. '
      'Each of its axes, counted from the last, must be 1 or equal.'
      f'{_leading_axes(shape, to, name, of)}'
    )


def _leading_axes(
  shape: tuple[int, ...], to: tuple[int, ...], name: str, of: str
) -> str:
  """A sentence for a message, if these are the sizes of x's first axes."""
  more = len(to) - len(shape)
  if more < 1 or shape != to[: len(shape)]:
    return ''
  new = ', None' * more
  return f' If its axes are the first of {of}, give {name}[...{new}].'


def check_not_empty(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
  """Returns how many elements the axes hold; raises if there are none."""
  count = math.prod(shape[a] for a in axes)
  if count == 0:
    raise ValueError(
      f'x of shape {shape} has no elements along the reduced axes {axes}: '
      'their mean does not exist. Give at least one element.'
    )
  return count


def is_known(size: Any) -> bool:
  """Whether a size is a number: `jax.export` knows sizes that are symbols.

  A decision on another one is for whatever it may be.
  """
  return isinstance(size, (int, np.integer))


def check_real(value: Any, name: str) -> float:
  """Returns a static real number."""
  if isinstance(value, (bool, np.bool_)) or not isinstance(
    value, (int, float, np.integer, np.floating)
  ):
    raise TypeError(
      f'{name} must be a Python number, got {type(value).__name__}: '
      f'{value!r:.60}.'
    )
  return float(value)


def is_integer(value: Any) -> bool:
  """Whether `value` is a static integer."""
  return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_array(value: Any) -> bool:
  """Whether a value is an array, whose numbers cannot be checked."""
  return isinstance(value, (jax.Array, np.ndarray))


def check_scalar(value: Any, name: str) -> Scalar:
  """Returns a static real number, or an array of one."""
  if not is_array(value):
    return check_real(value, name)
  if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(
      f'{name} must be a Python number or an array of one, got {value.dtype}'
      f'{list(value.shape)}. Give one real number, float and without axes.'
    )
  return as_array(value)


def check_epsilon(epsilon: Any) -> Scalar:
  """Returns epsilon: a finite number that is not negative, or an array."""
  value = check_scalar(epsilon, 'epsilon')
  if is_array(value):
    return value
  if not 0 <= value < math.inf:
    raise ValueError(
      f'epsilon must be finite and not negative, got {epsilon!r}. '
      'It is added to the variance; usual values are 1e-6 to 1e-3.'
    )
  return value


def check_momentum(momentum: Any) -> Scalar | None:
  """Returns momentum, the share of the old value that is kept, or None."""
  if momentum is None:
    return None
  value = check_scalar(momentum, 'momentum')
  if is_array(value):
    return value
  if not 0 <= value <= 1:
    raise ValueError(
      f'momentum must lie in [0, 1], got {momentum!r}. It is the share of the '
      'old running value that is kept (PyTorch counts the other way: its 0.1 '
      'is 0.9 here); None gives the cumulative average.'
    )
  return value


def check_virtual_batch_size(size: Any) -> int | None:
  """Returns how many examples are normalized by themselves, or None."""
  if size is None:
    return None
  if not is_integer(size):
    raise TypeError(f'virtual_batch_size must be an integer, got {size!r}.')
  if size < 1:
    raise ValueError(f'virtual_batch_size must be 1 or more, got {size!r}.')
  return int(size)


def check_index_groups(groups: Any) -> Groups | None:
  """Returns groups of indices; raises unless each from 0 is in one of them."""
  if groups is None:
    return None
  try:
    indices = sorted(operator.index(i) for group in groups for i in group)
  except TypeError:
    indices = [-1]
  if indices != list(range(len(indices))):
    raise ValueError(
      f'axis_index_groups={groups!r} must be sequences of integers: each index '
      'from 0 must stand in exactly one group.'
    )
  found: Groups = groups
  return found


def refuse_groups(groups: Any) -> None:
  """Raises for groups of the indices of no axis."""
  raise ValueError(
    f'axis_index_groups={groups!r} was given without axis_name. '
    'Name the mapped axis whose indices the groups hold.'
  )


def check_flag(flag: Any, name: str) -> bool:
  """Returns a static flag."""
  if not isinstance(flag, (bool, np.bool_)):
    raise TypeError(
      f'{name} must be True or False, got {type(flag).__name__}: '
      f'{flag!r:.60}. It chooses the program, so it is static: under jit, '
      'close over it or list it in static_argnames.'
    )
  return bool(flag)


def check_not_traced(flag: Any, name: str) -> None:
  """Raises for a flag of a Flax module that is known on the device alone."""
  if isinstance(flag, jax.core.Tracer):
    check_flag(flag, name)


def check_implementation(
  implementation: Any, name: str = 'implementation'
) -> Implementation | None:
  """Returns an implementation's name; raises unless there is one."""
  names = get_args(Implementation)
  if implementation is not None and implementation not in names:
    raise ValueError(
      f'{name} must be None or one of {names}, got {implementation!r}.'
    )
  found: Implementation | None = implementation
  return found


def refuse_kernel(implementation: Implementation | None, why: str) -> None:
  """Raises if a kernel is asked for where there is none."""
  if implementation not in (None, 'xla'):
    raise NotImplementedError(
      f'implementation={implementation!r} has no kernel for this: {why}. '
      "Use None or 'xla'."
    )


def hashable(value: Any) -> Any:
  """Returns lists, however nested, as tuples: a transform's fields hash."""
  if isinstance(value, (list, tuple)):
    return tuple(hashable(v) for v in value)
  return value
