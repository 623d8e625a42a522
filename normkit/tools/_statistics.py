"""Norms whose statistics the program computes: they stay."""

from collections.abc import Iterator
from typing import Any

from jax.extend import core

from normkit.tools._chains import LAYERS
from normkit.tools._plan import Row
from normkit.tools._program import Graph, Op, bodies

BATCH = (
  'normalizes by statistics over the first axis: if that is the batch, call '
  'the model in evaluation'
)
_OWN = 'normalizes by statistics of its own input'
_LOOPS = frozenset({'scan', 'while'})
_ROOTS = frozenset({'rsqrt', 'sqrt'})


def own_statistics(graph: Graph) -> list[tuple[int, Row]]:
  """The norms whose statistics the program computes, and where they are."""
  rows: dict[str, tuple[int, Row]] = {}
  for i, op in enumerate(graph.ops):
    if reason := _statistics(op):
      name = _nearest(op) or str(op.eqn.source_info.name_stack) or op.name
      rows.setdefault(name, (i, Row(name, None, reason)))
  return list(rows.values())


def _statistics(op: Op) -> str:
  """Why an operation, or one inside it, is a norm that stays; or nothing."""
  roots = (e for e in _inner(op.eqn) if e.primitive.name in _ROOTS)
  if op.is_constant or not any(roots):
    return ''
  if op.name in _ROOTS:
    sums = list(_sums(op))
    if not sums:
      return ''
    return BATCH if any(map(_is_over_batch, sums)) else _OWN
  if op.name in _LOOPS:
    return 'is inside a loop'
  found = {_statistics(inner) for body in bodies(op) for inner in body.ops}
  known = (reason for reason in (BATCH, _OWN) if reason in found)
  return next(known, f'is inside {op.name}')


def _inner(eqn: core.JaxprEqn) -> Iterator[core.JaxprEqn]:
  """An equation and those inside it."""
  yield eqn
  for jaxpr in core.jaxprs_in_params(eqn.params):
    for inside in jaxpr.eqns:
      yield from _inner(inside)


def _sums(op: Op) -> Iterator[core.JaxprEqn]:
  """The nearest sums that an operation follows from."""
  seen: set[Op] = set()
  found = [op]
  while found:
    for value in found.pop().moving():
      source = value.source
      if source is None or source in seen or source.name in LAYERS:
        continue
      seen.add(source)
      sums = [e for e in _inner(source.eqn) if _axes(e)]
      yield from sums
      if not sums:
        found.append(source)


def _axes(eqn: core.JaxprEqn) -> list[int]:
  """Those that it sums over; of a sum with forms, those that it shortens."""
  if eqn.primitive.name == 'reduce_sum':
    return list(eqn.params['axes'])
  if eqn.primitive.name != 'normkit_form':
    return []
  given: Any = eqn.invars[0].aval
  found: Any = eqn.outvars[0].aval
  if given.ndim != found.ndim:
    return []
  sizes = zip(given.shape, found.shape, strict=True)
  return [a for a, (n, m) in enumerate(sizes) if n != m]


def _is_over_batch(eqn: core.JaxprEqn) -> bool:
  summed: Any = eqn.invars[0].aval
  return 0 in _axes(eqn) and len(summed.shape) > 1


def _nearest(op: Op) -> str:
  """Whose variables an operation, or one soon after it, takes."""
  ops = [op]
  for _ in range(6):
    leaves = [leaf for op in ops for v in op.inputs for leaf in v.leaves]
    if leaves:
      return leaves[0].owner
    ops = [use for op in ops for v in op.outputs for use in v.uses if use]
    ops = [use for use in ops if use.name not in LAYERS]
  return ''
