"""Why a layer of Flax may compute otherwise than the one of PyTorch."""

from collections.abc import Callable, Iterator, Sequence
import functools
import math
from typing import Any, TypeAlias

import jax
from jax import lax
import numpy as np

from normkit.tools._pairs import Pair, apart, nearest

# A code, and a sentence.
Told: TypeAlias = tuple[str, str]
Pads: TypeAlias = list[tuple[int, int]]

_EPSILONS = 'eps', 'variance_epsilon', 'epsilon'
_CONV = 'torch.nn.modules.conv'
_POOLS = 'MaxPool', 'AvgPool'
_ALIKE = 1e-3  # how near an activation must come to be taken for it
_BACK = 8  # layers before one that may feed it
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
  'nothing': lambda x: x,
  'relu': jax.nn.relu,
  'relu6': jax.nn.relu6,
  'gelu(approximate=False)': functools.partial(jax.nn.gelu, approximate=False),
  'gelu(approximate=True)': jax.nn.gelu,
  'x * sigmoid(1.702 * x)': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'silu': jax.nn.silu,
  'leaky_relu': jax.nn.leaky_relu,
  'leaky_relu(negative_slope=0.2)': lambda x: jax.nn.leaky_relu(x, 0.2),
  'hard_silu': jax.nn.hard_silu,
  'elu': jax.nn.elu,
  'selu': jax.nn.selu,
  'mish': jax.nn.mish,
  'softplus': jax.nn.softplus,
  'tanh': jax.nn.tanh,
  'sigmoid': jax.nn.sigmoid,
}


def of_options(pair: Pair) -> Iterator[Told]:
  """What the options of both layers tell, whatever they compute."""
  yield from _norm(pair)
  yield from _running(pair)
  if _is_conv(pair.source) and hasattr(pair.module, 'kernel_size'):
    yield from _conv(pair)


def _norm(pair: Pair) -> Iterator[Told]:
  here = _epsilon(_options(pair.module), ('epsilon',), math.nan)
  tiny = _eps(pair.their_output)
  there = _epsilon(pair.source, _EPSILONS, tiny)
  if math.isnan(here + there) or math.isclose(here, there, rel_tol=1e-6):
    return
  yield 'epsilon', f'epsilon is {here:g} here, and {there:g} there'


def _options(module: Any) -> Any:
  """What holds a norm's options: a module, or the transform in it."""
  return getattr(module, 'transform', module)


def _epsilon(layer: Any, names: Sequence[str], default: float) -> float:
  """A layer's epsilon; NaN without one, and the default where it is None."""
  for name in names:
    value = getattr(layer, name, math.nan)
    if value is None:
      return default
    if isinstance(value, int | float) and not math.isnan(value):
      return float(value)
  return math.nan


def _eps(array: Any) -> float:
  """The distance from one to the next number of an array's dtype."""
  if array is None or not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
    return math.nan
  return float(jax.numpy.finfo(array.dtype).eps)


def _running(pair: Pair) -> Iterator[Told]:
  """What batch norms differ in."""
  here, there = _options(pair.module), pair.source
  if not (hasattr(here, 'momentum') and hasattr(there, 'running_mean')):
    return
  share = None if there.momentum is None else 1 - there.momentum
  if not _same(here.momentum, share):
    yield (
      'momentum',
      f'momentum is {here.momentum} here, and that there is '
      f'{share if share is None else round(share, 6)} here (for training)',
    )
  if there.running_mean is None:
    yield (
      'statistics',
      'there it has no running statistics (track_running_stats=False), and '
      'normalizes with those of the batch in evaluation too',
    )
  if not _evaluates(pair):
    yield (
      'training',
      'here it normalizes with the statistics of the batch: run the model in '
      'evaluation (use_running_average=True, train=False)',
    )


def _same(one: Any, other: float | None) -> bool:
  if one is None or other is None:
    return one is None and other is None
  return not isinstance(one, int | float) or math.isclose(one, other)


def _evaluates(pair: Pair) -> bool:
  """Whether a batch norm here took its running statistics."""
  given = dict(pair.options)
  positional = [a for a in given.pop('positional', ()) if isinstance(a, bool)]
  train = given.get('train')
  if train is not None:
    return train is not True
  choices = (
    *positional,
    given.get('use_running_average'),
    getattr(pair.module, 'use_running_average', None),
  )
  return next((c for c in choices if c is not None), True) is not False


def _is_conv(layer: Any) -> bool:
  """Whether a layer is a convolution of PyTorch that pads as PyTorch does."""
  forward = getattr(type(layer), 'forward', None)
  return getattr(forward, '__module__', '') == _CONV


def _conv(pair: Pair) -> Iterator[Told]:
  here, there, given = pair.module, pair.source, pair.given
  rank = len(there.kernel_size)
  if given is None or given.ndim < rank + 2:
    return
  sizes = given.shape[-1 - rank : -1]
  is_transposed = type(there).__name__.startswith('ConvTranspose')
  strides, dilation = (
    _each(getattr(here, name, 1), rank)
    for name in ('strides', 'kernel_dilation')
  )
  if set(_each(getattr(here, 'input_dilation', 1), rank)) != {1}:
    return  # a transposed one by another class
  if strides != tuple(there.stride):
    yield 'strides', f'strides are {strides} here, and {there.stride} there'
  if dilation != tuple(there.dilation):
    yield (
      'dilation',
      f'kernel_dilation is {dilation} here, and {there.dilation} there',
    )
  windows, wide = (
    [(k - 1) * n + 1 for k, n in zip(there.kernel_size, d, strict=True)]
    for d in (dilation, there.dilation)
  )
  ours, mode = _pads(here.padding, sizes, windows, strides, is_transposed)
  wanted = _torch_pads(there, wide, is_transposed)
  if ours != wanted or mode != there.padding_mode:
    yield (
      'padding',
      f'padding={here.padding!r} adds {_plain(ours)} of {mode} to a size of '
      f'{sizes} at strides {strides} here, and there are {_plain(wanted)} of '
      f'{there.padding_mode}: give padding={_plain(wanted)}',
    )


def _each(value: Any, rank: int, default: int = 1) -> tuple[int, ...]:
  """A number for each spatial axis."""
  if value is None or isinstance(value, int):
    return (default if value is None else value,) * rank
  return tuple(value)


def _plain(pads: Pads) -> str:
  """Pads as they are written: one number, or pairs."""
  whole = {n for pair in pads for n in pair}
  return str(whole.pop()) if len(whole) == 1 else str(tuple(pads))


def _pads(
  padding: Any,
  sizes: Sequence[int],
  windows: Sequence[int],
  strides: Sequence[int],
  is_transposed: bool,
) -> tuple[Pads, str]:
  """What Flax adds before and after each axis, and of what."""
  if isinstance(padding, int):
    return [(padding, padding)] * len(sizes), 'zeros'
  if not isinstance(padding, str):
    return [
      (p, p) if isinstance(p, int) else tuple(p) for p in padding
    ], 'zeros'
  if padding in ('CIRCULAR', 'REFLECT'):
    return [((w - 1) // 2, w // 2) for w in windows], padding.lower()
  if padding == 'CAUSAL':
    return [(w - 1, 0) for w in windows], 'zeros'
  if not is_transposed:
    return [*lax.padtype_to_pads(sizes, windows, strides, padding)], 'zeros'
  return [
    _transposed_pads(w, s, padding)
    for w, s in zip(windows, strides, strict=True)
  ], 'zeros'


def _transposed_pads(window: int, stride: int, padding: str) -> tuple[int, int]:
  """Those of `lax.conv_transpose`."""
  if padding == 'SAME':
    whole = window + stride - 2
    before = window - 1 if stride > window - 1 else -(-whole // 2)
  else:
    whole = window + stride - 2 + max(window - stride, 0)
    before = window - 1
  return before, whole - before


def _torch_pads(
  layer: Any, windows: Sequence[int], is_transposed: bool
) -> Pads:
  """What PyTorch adds before and after each axis, as Flax counts it."""
  if is_transposed:
    return [
      (w - 1 - p, w - 1 - p + more)
      for w, p, more in zip(
        windows, layer.padding, layer.output_padding, strict=True
      )
    ]
  if layer.padding == 'same':
    return [((w - 1) // 2, w // 2) for w in windows]
  if layer.padding == 'valid':
    return [(0, 0)] * len(windows)
  return [(p, p) for p in layer.padding]


def of_layer(pair: Pair) -> Told:
  """Why a layer's output parts, where its input and options do not."""
  ours, theirs = pair.output, pair.their_output
  if ours is not None and theirs is not None:
    if ours.dtype != theirs.dtype:
      told = f'it computes in {ours.dtype} here, and in {theirs.dtype} there'
      return 'rounding', told
    if ours.shape != theirs.shape:
      told = f'its output is {ours.shape} here, and {theirs.shape} there'
      return 'shape', told
  return (
    'layer',
    'its input and its weights are those there, and so are the options that '
    'are known: it computes something else',
  )


def of_input(
  pair: Pair, before: Sequence[Pair], between: Sequence[Any], tolerance: float
) -> Iterator[Told]:
  """Why a layer's input parts where the outputs before it do not.

  Args:
    pair: the layer.
    before: those before it, the last one last.
    between: calls there since the last one, of modules without parameters.
    tolerance: the largest error allowed.
  """
  for fed in before[: -_BACK - 1 : -1]:
    outs = fed.output, fed.their_output
    ins = pair.given, pair.their_given
    if any(a is None or a.shape != ins[0].shape for a in (*outs, *ins)):  # type: ignore[union-attr]
      continue
    here, there = (_activation(*a) for a in zip(outs, ins, strict=True))
    if there and here and here != there:
      yield (
        'activation',
        f'after {fed.name!r} comes {there} there, and {here} here',
      )
      return
  for seen in between:
    if told := _pool(pair, seen, tolerance):
      yield told
      return


def _activation(before: Any, after: Any) -> str | None:
  """What is between two arrays, by name."""
  before, after = np.float32(before), np.float32(after)
  errors = {
    name: apart(after, np.asarray(f(before))) for name, f in ACTIVATIONS.items()
  }
  best = min(errors, key=errors.__getitem__)
  return best if errors[best] < _ALIKE else None


def _pool(pair: Pair, seen: Any, tolerance: float) -> Told | None:
  """Whether a pool there, padded as Flax pads, gives the input here."""
  kind, layer = type(seen.module).__name__, seen.module
  if seen.given is None or pair.given is None or not kind.startswith(_POOLS):
    return None
  x = np.float32(np.moveaxis(seen.given, 1, -1))
  rank = x.ndim - 2
  window, strides = (
    (1, *_each(size, rank), 1) for size in (layer.kernel_size, layer.stride)
  )
  padding = [(p, p) for p in _each(layer.padding, rank, 0)]
  for other in ('SAME', 'VALID'):
    start, by = (-np.inf, lax.max) if kind[0] == 'M' else (0, lax.add)
    y = lax.reduce_window(x, np.float32(start), by, window, strides, other)
    if kind[0] != 'M':
      y = y / math.prod(window)
    if nearest([np.asarray(y)], pair.given)[1] <= tolerance:
      return (
        'padding',
        f'the pool before it pads {other!r} a size of {x.shape[1:-1]} here, '
        f'and {_plain(padding)} there: give padding={tuple(padding)}',
      )
  return None
