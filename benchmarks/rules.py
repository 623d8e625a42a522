"""The rules by which normkit's modules may differ from Flax's, and no others.

A rule of values claims elements of an array; normkit's own must be those of
the float64 reference all the same. A rule of errors claims a call in which only
one of the two raises, or each another class.
"""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.draws import Case
from benchmarks.expected import (
  Fact,
  features_of,
  mask_of,
  real_dtype,
  reduced_of,
  width,
)

# What roundings a sum of a few hundred terms may take, and what those of
# E[x^2] - E[x]^2 may: they are magnified once in the variance and once after.
ROUNDINGS, LOST = 40, 400
SAME_ERROR = 'the same error'
NAMES = (
  'axis',
  'reduction_axes',
  'feature_axes',
  'group_size',
  'num_groups',
  'mask',
  'epsilon',
  'momentum',
)


class Leaf(NamedTuple):
  """One array of a call, by Flax and by normkit, and what it should be."""

  stage: str
  name: str
  theirs: np.ndarray
  ours: np.ndarray
  fact: Fact


class Verdict(NamedTuple):
  """The rules that a use needed, and what none explains."""

  rules: set[str]
  problems: list[str]


class Count(NamedTuple):
  """How many uses of a module were compared, and how they came out."""

  compared: int
  equal: int
  raised: int
  rules: collections.Counter[str]
  unexplained: list[str]


def tally(verdicts: dict[str, Verdict]) -> Count:
  """Counts the verdicts on uses, which are told by their names."""
  equal = raised = 0
  rules, unexplained = collections.Counter[str](), []
  for name, verdict in verdicts.items():
    rules.update(verdict.rules)
    equal += not verdict.rules and not verdict.problems
    raised += verdict.rules == {SAME_ERROR} and not verdict.problems
    if verdict.problems:
      problems = '\n  '.join(verdict.problems)
      unexplained.append(f'{name}\n  {problems}')
  return Count(len(verdicts), equal, raised, rules, unexplained)


class Rule(NamedTuple):
  """A difference that is meant.

  Attributes:
    name: what stands in the table, and in docs/flax.md with its reason.
    claims: which elements of a leaf it explains: `(case, leaf) -> bools`.
    permits: whether it explains a pair of outcomes of which at least one is an
      error: `(case, theirs, ours) -> bool`.
    adapts: Flax's arrays in the form that normkit gives them: `(case, theirs)
      -> theirs`.
  """

  name: str
  claims: Callable[[Case, Leaf], Any] = lambda case, leaf: False
  permits: Callable[[Case, Any, Any], bool] = lambda case, theirs, ours: False
  adapts: Callable[[Case, Any], Any] = lambda case, theirs: theirs


def unit(dtype: Any) -> float:
  """The distance of one from the next larger number."""
  return float(jnp.finfo(dtype).eps)


def statistics_dtype(case: Case) -> Any:
  """The dtype in which Flax takes statistics by default."""
  dtype = jnp.dtype(case.option('dtype') or case.x.dtype)
  return jnp.promote_types(dtype, jnp.float32)


def tolerance(case: Case, leaf: Leaf) -> np.ndarray:
  """How far two values may be apart that are both rounded well."""
  info = jnp.finfo(leaf.ours.dtype)
  eps = float(info.eps)
  if leaf.name in ('dscale', 'dbias') and unforced(case):
    eps = max(eps, unit(case.option('param_dtype', jnp.float32)))
  fact = leaf.fact
  terms = np.abs(fact.value) if leaf.name != 'dx' else fact.terms
  stored = 4 * eps * terms + float(info.smallest_subnormal)
  reference = unit(np.float64) * np.sqrt(fact.condition)
  return stored + fact.terms * ROUNDINGS * (
    unit(statistics_dtype(case)) + reference
  )


def close(a: Any, b: Any, by: Any) -> np.ndarray:
  """Whether two arrays agree: within `by`, or both not finite."""
  a, b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
  with np.errstate(invalid='ignore'):
    near = np.abs(a - b) <= by
  return near | ~np.isfinite(a) & ~np.isfinite(b)


def lost(case: Case, leaf: Leaf, eps: float) -> np.ndarray:
  """Where Flax's value is as good as its formula lets it be, in `eps`."""
  condition = np.asarray(leaf.fact.condition)
  by = LOST * eps * condition**1.5 * (leaf.fact.terms + np.abs(leaf.fact.value))
  hopeless = eps * condition > 0.01
  return hopeless | close(leaf.theirs, leaf.fact.value, by)


def not_finite(leaf: Leaf) -> np.ndarray:
  return ~np.isfinite(np.asarray(leaf.theirs, np.complex128))


def exact(case: Case, leaf: Leaf) -> Any:
  return leaf.stage != 'evaluate' and lost(
    case, leaf, unit(statistics_dtype(case))
  )


def unforced(case: Case) -> bool:
  return not case.option('force_float32_reductions', True)


def narrow(case: Case, leaf: Leaf) -> Any:
  if not unforced(case):
    return False
  dtypes = [jnp.dtype(case.option('dtype') or case.x.dtype)]
  dtypes.append(jnp.dtype(case.option('param_dtype', jnp.float32)))
  widest = max(unit(d) for d in dtypes if jnp.issubdtype(d, jnp.inexact))
  return lost(case, leaf, widest)


def stored(case: Case, leaf: Leaf) -> Any:
  used = leaf.stage == 'evaluate' or leaf.name in ('mean', 'var')
  return case.wide and used and lost(case, leaf, unit(np.float32))


def without_elements(case: Case, leaf: Leaf) -> Any:
  return leaf.fact.empty & not_finite(leaf)


def masked_values(case: Case, leaf: Leaf) -> Any:
  itself = leaf.name == 'dx' and ~np.isfinite(case.x)  # passes as it is
  others = not_finite(leaf) | (leaf.name == 'dbias')
  return leaf.fact.stray & (itself | others)


def without_variance(case: Case, leaf: Leaf) -> Any:
  return leaf.fact.flat


def by_count(case: Case, leaf: Leaf) -> Any:
  return leaf.fact.uneven


def rounded(case: Case, leaf: Leaf) -> Any:
  if case.family != 'nnx' or 'dtype' not in case.options:
    return False
  eps, dtype = (
    unit(case.options['dtype']),
    jnp.promote_types(case.x.dtype, jnp.float32),
  )
  return eps > unit(dtype) and lost(case, leaf, eps)


def repeated(case: Case) -> bool:
  """Whether nnx repeats the statistics of groups along another axis."""
  if (case.family, case.norm) != ('nnx', 'GroupNorm'):
    return False
  return len(reduced_of(case)) != len(case.shape) - 2


def wrong_axis(case: Case, leaf: Leaf) -> Any:
  return repeated(case)


def repeat_fails(case: Case, theirs: Any, ours: Any) -> bool:
  kinds = TypeError, ValueError, IndexError
  return repeated(case) and (
    isinstance(theirs, kinds) and not isinstance(ours, Exception)
  )


def several_axes(case: Case, theirs: Any, ours: Any) -> bool:
  several = case.norm == 'BatchNorm' and len(features_of(case)) != 1
  return several and (
    isinstance(theirs, ValueError) and not isinstance(ours, Exception)
  )


def without_channels(case: Case, theirs: Any, ours: Any) -> bool:
  return (
    (case.family, case.norm) == ('nnx', 'GroupNorm')
    and not isinstance(theirs, Exception)
    and names(ours, 'must hold the last axis')
  )


def names(error: Any, *arguments: str) -> bool:
  """Whether an error is a ValueError about one of the arguments."""
  return type(error) is ValueError and any(n in str(error) for n in arguments)


def accident(case: Case, theirs: Any, ours: Any) -> bool:
  kinds = IndexError, TypeError, ArithmeticError, AssertionError
  return isinstance(theirs, kinds) and names(ours, *NAMES)


def mask_broadcasts(case: Case, theirs: Any, ours: Any) -> bool:
  return (
    case.norm == 'GroupNorm'
    and np.shape(case.mask) != case.x.shape
    and isinstance(theirs, (TypeError, ValueError))
    and 'reshape' in str(theirs)
    and not isinstance(ours, Exception)
  )


def beyond_rank(case: Case, theirs: Any, ours: Any) -> bool:
  ndim = len(case.shape)
  given = {n: case.option(n) for n in NAMES[:3] if n in case.options}
  return any(
    names(ours, name)
    and np.any((np.asarray(a) < -ndim) | (np.asarray(a) >= ndim))
    for name, a in given.items()
  )


def checked_numbers(case: Case, theirs: Any, ours: Any) -> bool:
  epsilon, momentum = case.option('epsilon', 0), case.option('momentum', 0)
  bad = {'epsilon': not 0 <= epsilon < 1, 'momentum': momentum > 1}
  return any(names(ours, n) and wrong for n, wrong in bad.items())


def checked_mask(case: Case, theirs: Any, ours: Any) -> bool:
  if not names(ours, 'mask', 'where'):
    return False
  if case.family == 'nnx' and np.asarray(case.mask).dtype != bool:
    return True
  try:
    mask_of(case)
  except ValueError:
    return True
  return False


def complex_dtype(case: Case, theirs: Any, ours: Any) -> bool:
  return (
    real_dtype(case) and isinstance(ours, TypeError) and 'complex' in str(ours)
  )


def groups_mapped(case: Case, theirs: Any, ours: Any) -> bool:
  works = not isinstance(ours, Exception) or type(ours) is ValueError
  return case.mapped and isinstance(theirs, NotImplementedError) and works


def groups_alone(case: Case, theirs: Any, ours: Any) -> bool:
  return names(ours, 'axis_index_groups') and 'axis_name' not in case.options


def real_variance(case: Case, theirs: dict[str, Any]) -> dict[str, Any]:
  if not case.mapped or not np.iscomplexobj(theirs.get('var')):
    return theirs
  return theirs | {'var': theirs['var'].real}


def without_features(case: Case, theirs: dict[str, Any]) -> dict[str, Any]:
  if case.family != 'nnx' or width(case) or 'dtype' in case.options:
    return theirs
  dtypes = [theirs[n].dtype for n in ('dscale', 'dbias') if n in theirs]
  if case.norm == 'BatchNorm' or not dtypes:
    return theirs
  dtype = jnp.result_type(case.x.dtype, *dtypes)
  if theirs['y'].dtype == dtype:
    return theirs
  return theirs | {'y': theirs['y'].astype(dtype)}


def pooled_complex(case: Case, theirs: Any, ours: Any) -> bool:
  dtypes = case.x.dtype, case.option('dtype', case.x.dtype)
  return (
    case.mapped
    and any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes)
    and isinstance(theirs, TypeError)
    and not isinstance(ours, Exception)
  )


RULES = (
  Rule('an accident is a ValueError', permits=accident),
  Rule('a set without elements is defined', claims=without_elements),
  Rule('masked values do not leak', claims=masked_values),
  Rule('no variance and no epsilon is defined', claims=without_variance),
  Rule('devices are pooled by count', claims=by_count),
  Rule('statistics are never narrower than float32', claims=narrow),
  Rule('nnx rounds only the result', claims=rounded),
  Rule('stored statistics are widened first', claims=stored),
  Rule('nnx groups are channels', wrong_axis, repeat_fails),
  Rule('nnx groups hold the channels', permits=without_channels),
  Rule('nnx batch norm keeps several axes', permits=several_axes),
  Rule('exact statistics', claims=exact),
  Rule('the variance is real', permits=pooled_complex, adapts=real_variance),
  Rule('nnx counts parameters without elements', adapts=without_features),
  Rule('masks broadcast', permits=mask_broadcasts),
  Rule('masks are checked', permits=checked_mask),
  Rule('axes beyond the rank raise', permits=beyond_rank),
  Rule('epsilon and momentum are checked', permits=checked_numbers),
  Rule('complex input needs a complex dtype', permits=complex_dtype),
  Rule('groups work under vmap', permits=groups_mapped),
  Rule('groups need an axis name', permits=groups_alone),
)
