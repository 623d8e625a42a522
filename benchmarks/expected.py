"""What a norm should give, in float64: outputs, averages and gradients.

Beside each value stands what its rounding may be, since that of Flax's own
values is often larger.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import numpy as np

from benchmarks.draws import Case
from tests import reference


class Fact(NamedTuple):
  """What an array should hold.

  Attributes:
    value: the numbers.
    terms: the magnitude of the terms that each is the sum of.
    condition: how much E[x^2] - E[x]^2 magnifies a rounding of them.
    empty: whether each rests on a set that holds no element, masks aside.
    flat: whether each rests on a set without variance, and epsilon is zero.
    stray: whether each rests on a masked value that is not finite.
    uneven: whether each rests on a set of which the devices hold unequal
      shares.
  """

  value: np.ndarray
  terms: Any
  condition: Any = 1.0
  empty: Any = False
  flat: Any = False
  stray: Any = False
  uneven: Any = False


class Sums(NamedTuple):
  """The normalized values and what they were made of, for each element."""

  norm: reference.Reference
  n: np.ndarray
  root: np.ndarray
  share: np.ndarray
  count: np.ndarray
  mean: np.ndarray
  var: np.ndarray
  condition: np.ndarray
  stray: np.ndarray
  uneven: np.ndarray


def axes_of(case: Case, name: str, default: Any = -1) -> tuple[int, ...]:
  """An option of axes, in order and without repetitions."""
  axes = case.option(name, default)
  axes = (axes,) if isinstance(axes, int) else axes
  return tuple(sorted({a % len(case.shape) for a in axes}))


def features_of(case: Case) -> tuple[int, ...]:
  names = {'BatchNorm': 'axis', 'GroupNorm': ''}
  return axes_of(case, names.get(case.norm, 'feature_axes'))


def width(case: Case) -> int:
  """How many features there are; as many as channels if that is no number."""
  try:
    return math.prod(case.shape[a] for a in features_of(case))
  except IndexError:
    return case.shape[-1]


def reduced_of(case: Case) -> tuple[int, ...]:
  """The reduced axes; those of group norm without the channels."""
  ndim = len(case.shape)
  if case.norm == 'BatchNorm':
    return reference.others(features_of(case), ndim)
  if case.norm == 'InstanceNorm':
    return reference.others((0, *features_of(case)), ndim)
  if case.norm == 'GroupNorm':
    axes = axes_of(case, 'reduction_axes', (*range(1, ndim - 1), -1))
    return tuple(a for a in axes if a != ndim - 1)
  return axes_of(case, 'reduction_axes')


def groups_of(case: Case) -> dict[int, int]:
  """By how much an index is divided to find its group."""
  if case.norm != 'GroupNorm':
    return {}
  channels = case.shape[-1]
  size = case.option('group_size')
  return {len(case.shape) - 1: size or channels // case.options['num_groups']}


def reference_of(case: Case, pooled: bool) -> reference.Reference:
  """The norm by its sets."""
  lead = int(case.mapped)
  alone = not pooled or case.option('axis_index_groups') == [[0], [1]]
  kept = reference.others(reduced_of(case), len(case.shape))
  kept = tuple(a + lead for a in kept)
  divide = {a + lead: size for a, size in groups_of(case).items()}
  if case.mapped and alone:
    kept = (0, *kept)
  return reference.Reference(
    lambda shape: reference.numbered(shape, kept, divide),
    lambda ndim: tuple(a + lead for a in features_of(case)),
    case.option('epsilon', 1e-5 if case.norm == 'BatchNorm' else 1e-6),
    case.norm != 'RMSNorm',
  )


def narrows(case: Case) -> bool:
  """Whether an nnx norm warns that it keeps the real part of a number."""
  dtypes = case.x.dtype, case.option('dtype', case.x.dtype)
  return case.family == 'nnx' and any(
    np.issubdtype(d, np.complexfloating) for d in dtypes
  )


def real_dtype(case: Case) -> bool:
  """Whether complex x is to give a real result."""
  dtype = case.option('dtype', np.complex64)
  return np.iscomplexobj(case.x) and not np.issubdtype(
    dtype, np.complexfloating
  )


def mask_of(case: Case) -> np.ndarray:
  """The mask in x's shape; True everywhere if there is none."""
  whole = case.mask is None or case.x.size == 0
  mask = True if whole else np.asarray(case.mask, bool)
  return np.broadcast_to(mask, case.x.shape)


def sums(case: Case, stats: Any, pooled: bool) -> Sums:
  """Normalizes by the statistics given, or else by those of x."""
  norm, where = reference_of(case, pooled), mask_of(case)
  x = reference.wide(case.x)
  stray = ~where & ~np.isfinite(x)
  x = np.where(stray, 0, x)
  mean, var, count = norm.moments(x, where)
  own = reference_of(case, False).total(np.ones(x.shape), where)
  uneven = (own != own[::-1]) & np.any(count != own)
  power = norm.total(np.abs(x) ** 2, where) / np.maximum(count, 1)
  share = where / np.maximum(count, 1)
  if stats is not None:
    zero = np.zeros(x.shape)
    mean, var = (zero + norm.expand(s, None, x.ndim) for s in stats)
    count, share, power = zero + 1, zero, zero
  total = var + norm.epsilon
  held = (count > 0) & (total != 0)
  total = np.where(total == 0, 1, total)
  root = held / np.sqrt(total)
  n = np.where(count > 0, (x - mean) * root, 0)
  condition = 1 + power / total
  n = np.where(stray, 0, n)
  return Sums(norm, n, root, share, count, mean, var, condition, stray, uneven)


@np.errstate(invalid='ignore')
def facts(
  case: Case,
  params: dict[str, np.ndarray],
  stats: dict[str, np.ndarray],
  dy: np.ndarray | None,
  train: bool,
  pooled: bool = True,
) -> dict[str, Fact]:
  """What a norm should give for the parameters and running statistics."""
  params, old = (
    {n: shaped(case, v) for n, v in t.items()} for t in (params, stats)
  )
  running = None if train else (old['mean'], old['var'])
  parts = sums(case, running, pooled)
  found = {'y': output(case, parts, params)}
  if dy is not None:
    found |= gradients(case, parts, params, reference.wide(dy))
  if train and old and dy is not None:
    found |= averages(case, old)
  return {name: packed(case, name, fact) for name, fact in found.items()}


def packed(case: Case, name: str, fact: Fact) -> Fact:
  """The fact about features in the shape that the family keeps them in."""
  if case.family == 'linen' or name in ('y', 'dx'):
    return fact
  lead = fact.value.ndim - len(features_of(case))
  return Fact(
    *(
      np.reshape(part, (*np.shape(part)[:lead], -1)) if np.ndim(part) else part
      for part in fact
    )
  )


def shaped(case: Case, value: np.ndarray) -> np.ndarray:
  """One number a feature, in the shape of the feature axes."""
  shape = tuple(case.shape[a] for a in features_of(case))
  return reference.wide(value).reshape(shape)


def rests(parts: Sums) -> dict[str, np.ndarray]:
  """What each element of x rests on."""
  return {
    'condition': parts.condition,
    'empty': parts.count == 0,
    'flat': (parts.root == 0) & (parts.count > 0),
    'stray': parts.norm.total(parts.stray * 1.0) > 0,
    'uneven': parts.uneven,
  }


def output(case: Case, parts: Sums, params: dict[str, np.ndarray]) -> Fact:
  scale, bias = expand(parts, params)
  y = np.where(parts.stray & (parts.count > 0), case.x, parts.n * scale + bias)
  terms = (np.abs(parts.n) + 1) * np.abs(scale) + np.abs(bias)
  return Fact(y, terms, **rests(parts))


def expand(parts: Sums, params: dict[str, np.ndarray]) -> Sequence[Any]:
  ndim = parts.n.ndim
  scale = parts.norm.expand(params.get('scale'), 1.0, ndim)
  return scale, parts.norm.expand(params.get('bias'), 0.0, ndim)


def gradients(
  case: Case, parts: Sums, params: dict[str, np.ndarray], dy: np.ndarray
) -> dict[str, Fact]:
  """The cotangents of x, scale and bias, given that of y.

  The formula is that of `Reference.gradients` in the tests. The terms are those
  of the same sums, each with its absolute value.
  """
  norm, n = parts.norm, parts.n
  passed = parts.stray & (parts.count > 0)
  own = np.where(passed, 0, dy)
  g = own * expand(parts, params)[0]
  through = np.conj(n) * norm.total(g * n).real
  size = np.abs(n) * norm.total(np.abs(g * n)) + norm.total(np.abs(g))
  if norm.center:
    through = through + norm.total(g)
  counts = parts.share > 0
  dx = parts.root * (g - np.where(counts, parts.share * through, 0))
  terms = parts.root * (np.abs(g) + np.where(counts, parts.share * size, 0))
  terms = terms + passed * np.abs(dy)
  found = {'dx': Fact(np.where(passed, dy, dx), terms, **rests(parts))}
  axes = reference.others(norm.features(n.ndim), n.ndim)
  whole = {k: np.any(v) for k, v in rests(parts).items()}
  whole['empty'] |= n.size == 0
  whole['condition'] = np.max(np.nan_to_num(parts.condition), initial=1.0)
  for name, factor in ('scale', n), ('bias', np.ones_like(n)):
    if name in params:
      value = np.sum(own * factor, axes)
      size = np.sum(np.abs(own) * (1 + np.abs(factor)), axes)
      value = value if np.iscomplexobj(params[name]) else value.real
      found['d' + name] = Fact(value, size, **whole)
  return found


def averages(case: Case, old: dict[str, np.ndarray]) -> dict[str, Fact]:
  """The running statistics, moved for the features that the batch held."""
  if case.x.size == 0:
    return {n: Fact(v, np.abs(v), empty=True) for n, v in old.items()}
  keep = case.option('momentum', 0.99)
  parts = sums(case, None, True)
  spread = np.sqrt(parts.var) + np.abs(parts.mean)
  found = {}
  for name, new, size in ('mean', parts.mean, spread), ('var', parts.var, 0):
    before = parts.norm.expand(old[name], None, case.x.ndim)
    moved = keep * before + (1 - keep) * new if keep else new
    value = np.where(parts.count > 0, moved, before)
    if case.family == 'nnx':
      value = value.real
    terms = np.abs(keep * before) + (1 - keep) * (np.abs(new) + size)
    fact = Fact(value, terms, **rests(parts))
    found[name] = Fact(*(first(case, part) for part in fact))
  return found


def first(case: Case, values: np.ndarray) -> np.ndarray:
  """One number a feature and device, of those given for each element of x."""
  axes = tuple(a + int(case.mapped) for a in features_of(case))
  axes = (0, *axes) if case.mapped else axes
  return values[
    tuple(slice(None) if a in axes else 0 for a in range(case.x.ndim))
  ]
