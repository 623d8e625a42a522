"""Classes of layers with running statistics: whose call is known, or wrapped.

A class that derives from a batch norm may do more than it, before and after
`super().__call__`. What a tool puts around the norm is therefore a class
between the two, in the order in which Python looks methods up.
"""

from collections.abc import Callable
import inspect
from typing import Any

from flax import linen, nnx

import normkit.linen
import normkit.nnx
from normkit.nnx._shared import calls_super
from normkit.norms._running import RunningOptions

BATCH_NORMS = (
  linen.BatchNorm,
  normkit.linen.BatchNorm,
  normkit.linen.BatchRenorm,
  nnx.BatchNorm,
  normkit.nnx.BatchNorm,
  normkit.nnx.BatchRenorm,
)
_NORMS = normkit.linen.Norm, normkit.nnx.Norm
_CALLS = {inspect.unwrap(kind.__call__) for kind in (*BATCH_NORMS, *_NORMS)}


def options(module: Any, method: Callable[..., Any]) -> Any | None:
  """What holds the options of a layer with running statistics, else None.

  `method` is the one that runs; of a subclass with another `__call__`, the call
  of its base class counts, which sees what the layer normalizes.
  """
  if inspect.unwrap(method) not in _CALLS:
    return None
  if isinstance(module, _NORMS):
    is_running = isinstance(module.transform, RunningOptions)
    return module.transform if is_running else None
  return module


def intercepting(
  instead: Callable[..., Any], missed: Callable[[Any], None]
) -> Callable[..., Any]:
  """What `linen.intercept_methods` takes.

  `instead(module, call, args, kwargs)` runs in place of the call of a norm, of
  a class that derives from one too; `missed(module)` after one that derives
  from batch norm has run without it.
  """
  reached = set()

  def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if options(module, context.orig_method.func) is not None:
      reached.add(module.path)
      return instead(module, call, args, kwargs)
    is_call = context.method_name == '__call__'
    if not (is_call and isinstance(module, linen.BatchNorm)):
      return call(*args, **kwargs)
    reached.discard(module.path)
    y = call(*args, **kwargs)
    if module.path not in reached:
      missed(module)
    return y

  return intercept


def nnx_options(module: nnx.Module) -> Any | None:
  """As `options`, of an nnx module; None if no call of a norm is reached."""
  kind: Any = original(type(module))
  base = base_of(kind)
  if base is None or not calls_super(kind, base):
    return None
  return options(module, base.__call__)


def base_of(kind: Any, calls: Any = _CALLS) -> Any | None:
  """The first class among those of `kind` whose call is known, or wrapped."""
  for base in kind.__mro__:
    call = vars(base).get('__call__')
    wraps = '_normkit_original' in vars(base)
    if call and (wraps or inspect.unwrap(call) in calls):
      return base
  return None


def has_own_call(kind: Any) -> bool:
  """Whether a class does more than the norm that it derives from, or else."""
  base: Any = base_of(original(kind))
  return base is None or original(kind).__call__ is not base.__call__


def wrapped(
  kind: Any, around: Callable[[Any], Callable[..., Any]], calls: Any = _CALLS
) -> Any:
  """A class like `kind`, whose norm is called as `around(base)` says."""
  base: Any = base_of(kind, calls)
  made = {'_normkit_original': original(kind)}
  between = type(base.__name__, (base,), made | {'__call__': around(base)})
  if kind is base:
    return between
  return type(kind.__name__, (kind, between), made)


def original(kind: Any) -> Any:
  """The class that `wrapped` was first given, or any other as it is."""
  return getattr(kind, '_normkit_original', kind)
