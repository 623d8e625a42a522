"""Watching norms without running statistics: layer, RMS, group, instance norm.

What is seen leaves the program by a callback, with what the trace told, so that
a program that was compiled before tells it again.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import inspect
import math
from typing import Any

from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np

from normkit import _types
import normkit.linen
import normkit.nnx
from normkit.nnx._shared import calls_super, set_class
from normkit.tools import _classes
from normkit.tools._advice import Flags, Floats, feature_problem

_NAMES = 'LayerNorm', 'RMSNorm', 'GroupNorm', 'InstanceNorm'
_CALLS = {
  inspect.unwrap(getattr(m, n).__call__)
  for n in _NAMES
  for m in (linen, nnx, normkit.linen, normkit.nnx)
}
_FLAT = 1e-5  # of the layer's widest range: a feature that does not vary
_COMPILED = jax.make_user_context(default_value=False)
_watches: list[dict[str, 'Norm']] = []
_outputs: list[tuple[Any, str]] = []  # of norms, in a trace that runs


@dataclasses.dataclass(eq=False)
class Facts:
  """What the trace tells of a call of a norm."""

  name: str
  kind: str
  shape: tuple[int, ...]
  reduced: tuple[int, ...]
  elements: int
  epsilon: float
  dtype: Any
  after: str | None


@dataclasses.dataclass(eq=False)
class Norm(Facts):
  """What was seen of a norm without running statistics.

  Attributes:
    name: its path, 'encoder/LayerNorm_0'.
    kind: its class in Flax, 'LayerNorm'.
    shape: the shape of an input.
    reduced: the axes over which it takes statistics.
    elements: how many elements it normalizes together.
    epsilon: its epsilon.
    dtype: the dtype of its input.
    after: the norm whose output is its input, or None.
    low: the least output of each feature.
    high: the largest.
    examples: how often each feature was seen.

  Examples:
    >>> import jax, jax.numpy as jnp, normkit.linen
    >>> from normkit.tools.inspect import inspect
    >>> norm = normkit.linen.LayerNorm()
    >>> x = jnp.arange(12.0).reshape(3, 4) ** 2
    >>> variables = norm.init(jax.random.key(0), x)
    >>> found = inspect(norm.apply, variables, [x])
    >>> found.norms[0].kind, found.norms[0].elements
    ('LayerNorm', 4)
  """

  low: Floats
  high: Floats
  examples: int = 0

  @property
  def dead(self) -> Flags:
    """Features whose output does not vary, where others' do."""
    span = self.high - self.low
    dead: Flags = (span <= _FLAT * span.max()) & (span.max() > 0)
    return dead


@contextlib.contextmanager
def watching() -> Iterator[dict[str, Norm]]:
  """Gathers what linen norms, and modules that `prepared` made, see inside."""
  seen: dict[str, Norm] = {}
  _watches.append(seen)

  def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    y = call(*args, **kwargs)
    method = inspect.unwrap(context.orig_method.func)
    name = '/'.join(module.path)
    if method in _CALLS and not module.is_initializing():
      y = _tell(module, name, _input(*args, **kwargs), y)
    elif _classes.options(module, method) is not None:
      _outputs.append((y, name))
    return y

  try:
    with linen.intercept_methods(intercept), _COMPILED(True):
      yield seen
    jax.effects_barrier()
  finally:
    _watches.remove(seen)
    _outputs.clear()


def forget() -> None:
  """Lets go of what a trace held, at its end."""
  _outputs.clear()


def prepared(model: Any) -> Any:
  """A copy of an nnx model whose norms tell what they see; variables stay."""
  if not isinstance(model, nnx.Module):
    return model
  model = nnx.clone(model)
  module: Any
  for path, module in nnx.iter_modules(model):
    kind: Any = type(module)
    base = _classes.base_of(kind, _CALLS)
    if base is not None and calls_super(kind, base):
      module._normkit_path = '/'.join(map(str, path))
      set_class(module, _telling(kind))
  return model


@functools.cache
def _telling(kind: Any) -> Any:
  def around(base: Any) -> Callable[..., Any]:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
      y = base.__call__(self, *args, **kwargs)
      if _COMPILED.value:
        y = _tell(self, self._normkit_path, _input(*args, **kwargs), y)
      return y

    return __call__

  return _classes.wrapped(kind, around, _CALLS)


def _input(x: Any, *_: Any, **__: Any) -> Any:
  return x


def _tell(module: Any, name: str, x: Any, y: Any) -> Any:
  """Takes what the trace tells, and has the program tell the rest."""
  kind = next(n for n in _NAMES if isinstance(module, _of(n)))
  features, reduced, elements = _sets(module, kind, np.shape(x))
  after = next((n for before, n in _outputs if before is x), None)
  epsilon = module.epsilon
  facts = Facts(
    name,
    kind,
    np.shape(x),
    reduced,
    elements,
    float(epsilon) if isinstance(epsilon, int | float) else math.nan,
    jnp.result_type(x),
    after,
  )
  others = _types.other_axes(features, y.ndim)
  real = jnp.real(y).astype(jnp.float32)
  examples = math.prod(y.shape[axis] for axis in others)
  if y.size:
    record = functools.partial(_record, facts, examples)
    bounds = jax.lax.stop_gradient((real.min(others), real.max(others)))
    if _is_scanned():
      zero = jax.ShapeDtypeStruct((), jnp.float32)
      told = jax.pure_callback(record, zero, *bounds, vmap_method='sequential')
      y = y + told.astype(y.dtype)
    else:
      jax.debug.callback(record, *bounds)
  _outputs.append((y, name))
  return y


def _is_scanned() -> bool:
  """Whether `nn.scan` traces this: what has an effect is refused there.

  Nothing but the stack says so. An output that waits for what is told, and is
  the same for it, does as well.
  """
  frame = inspect.currentframe()
  while frame and frame.f_globals.get('__name__') != 'flax.core.axes_scan':
    frame = frame.f_back
  return frame is not None


def _of(name: str) -> Any:
  return getattr(linen, name), getattr(nnx, name)


def _sets(
  module: Any, kind: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
  """The axes of the features and of a set, and the elements of a set."""
  rank = len(shape)
  given = -1 if kind == 'GroupNorm' else module.feature_axes
  features = _types.check_axes(given, rank, repeats=True)
  if kind == 'InstanceNorm':
    reduced = tuple(a for a in range(1, rank) if a not in features)
  elif kind == 'GroupNorm' and module.reduction_axes is None:
    reduced = tuple(range(1, rank))
  else:
    reduced = _types.check_axes(module.reduction_axes, rank, repeats=True)
  elements = math.prod(shape[axis] for axis in reduced)
  if kind == 'GroupNorm':
    size = module.group_size
    elements //= module.num_groups or max(1, shape[-1] // (size or 1))
  return features, reduced, elements


def _record(facts: Facts, examples: int, low: Any, high: Any) -> Any:
  """Returns -0, which any number may be added to."""
  low, high = np.float64(low), np.float64(high)
  for seen in _watches:
    row = seen.get(facts.name)
    if row is None or row.low.shape != low.shape:
      seen[facts.name] = Norm(
        **vars(facts), low=low, high=high, examples=examples
      )
      continue
    row.low, row.high = np.minimum(row.low, low), np.maximum(row.high, high)
    row.examples += examples
  return np.full((), -0.0, np.float32)


def problems(norm: Norm) -> Iterator[tuple[str, dict[str, Any]]]:
  """What is wrong with a norm: codes of messages and what they name."""
  shape, kind = norm.shape, norm.kind
  if 0 in norm.reduced and len(shape) > 1:
    yield 'axis', {'shape': shape}
  if kind in ('GroupNorm', 'InstanceNorm') and _looks_channels_first(shape):
    yield 'axis/channels', {'shape': shape}
  if norm.after is not None:
    yield 'doubled', {'after': norm.after or 'another'}
  largest = float(jnp.finfo(norm.dtype).max) if _is_float(norm.dtype) else 0
  if largest and norm.epsilon * largest < 1 / largest:
    details = {'epsilon': norm.epsilon, 'dtype': jnp.dtype(norm.dtype).name}
    yield 'epsilon/dtype', details
  if norm.elements <= 1:
    yield 'one_element/set', {}
  elif norm.examples > 1 and (told := feature_problem(norm.dead)):
    yield 'dead/feature', told


def _is_float(dtype: Any) -> bool:
  return bool(jnp.issubdtype(dtype, jnp.floating))


def _looks_channels_first(shape: tuple[int, ...]) -> bool:
  """Squares at the end, and another size before them."""
  return len(shape) == 4 and shape[1] != shape[2] == shape[3] > 1
