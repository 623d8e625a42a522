"""Which unit goes to which: what the evidence leaves of all pairs.

`left[i, j]` says that unit i there may still go to unit j here. A relation is a
pair of matrices: what holds of i and k there has to hold of j and l here. A
pair is taken away only if it contradicts a relation, or if another has been
decided; so what is left single is the only answer that the evidence allows.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from normkit.tools._units import Unit

_PROBES = 2000


class Relation(NamedTuple):
  """What has to hold of two units here where it holds of their peers there."""

  there: np.ndarray
  here: np.ndarray


class Contradiction(Exception):
  """No assignment satisfies the evidence; has the unit there."""


def supported(left: np.ndarray, relation: Relation) -> Relation:
  """A relation without what nothing here can satisfy from the start."""
  return Relation(relation.there & can_hold(left, relation.here), relation.here)


def can_hold(left: np.ndarray, here: np.ndarray) -> np.ndarray:
  """Of which two units there a relation here may hold."""
  return _any(_any(left, here), left.T)


def counted(
  left: np.ndarray, relation: Relation, there: np.ndarray, here: np.ndarray
) -> np.ndarray:
  """What is left where as many of each kind come before and after.

  Implied by the relation, in one step where `narrowed` takes one for each.
  `there` and `here` are the kinds, as numbers.
  """
  kinds = np.eye(max(there.max(initial=0), here.max(initial=0)) + 1)
  left = left.copy()
  for needs, holds in (
    (relation.there.T, relation.here.T),
    (relation.there, relation.here),
  ):
    needed, held = needs @ kinds[there], holds @ kinds[here]
    for i, row in enumerate(needed):
      left[i] &= (held >= row).all(1)
  return left


def narrowed(left: np.ndarray, relations: Sequence[Relation]) -> np.ndarray:
  """What is left once every pair has its support."""
  left = left.copy()
  small = [_small(relation) for relation in relations]
  while True:
    old = left.copy()
    for (there, here), at in small:
      # To unit i may go j only if each k that i is related to has an l.
      part = left[at]
      part &= ~_any(there, ~_any(part, here.T))
      part &= ~_any(there.T, ~_any(part, here))
      left[at] = part
    left = _one_each(left)
    if (left == old).all():
      return left


def _small(relation: Relation) -> tuple[Relation, tuple[np.ndarray, ...]]:
  """A relation between those alone that are in it, and which those are."""
  there, here = relation
  i = np.flatnonzero((there | there.T).any(1))
  at = np.ix_(i, np.arange(len(here)))
  return Relation(there[np.ix_(i, i)], here), at


def _any(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The product of matrices of truth."""
  product: np.ndarray = np.float32(a) @ np.float32(b) > 0.5
  return product


def _one_each(left: np.ndarray) -> np.ndarray:
  """What is left where a decided unit is taken from the others."""
  for pairs in (left, left.T):
    if not pairs.any(1).all():
      raise Contradiction(int(pairs.any(1).argmin()))
    single = pairs.sum(1) == 1
    taken = pairs[single].sum(0)
    if (taken > 1).any():
      raise Contradiction(int(np.flatnonzero(single)[0]))
    pairs[~single] &= taken == 0
  return left


def probed(left: np.ndarray, relations: Sequence[Relation]) -> np.ndarray:
  """What is left if no choice that leads to a contradiction is."""
  open_ = [*zip(*np.nonzero(left & (left.sum(1) > 1)[:, None]), strict=True)]
  if len(open_) > _PROBES:
    return left
  for i, j in open_:
    if not left[i, j] or left[i].sum() == 1:
      continue
    tried = left.copy()
    tried[i] = False
    tried[i, j] = True
    try:
      narrowed(tried, relations)
    except Contradiction:
      left = left.copy()
      left[i, j] = False
      left = narrowed(left, relations)
  return left


class Node(NamedTuple):
  """A module: its units, and how many parts of their names lead to it."""

  units: tuple[int, ...]
  depth: int


def modules(
  there: Sequence[Unit], here: Sequence[Unit]
) -> list[tuple[list[Node], list[Node]]]:
  """The modules of both sides that hold alike, and as many on each side.

  From the top down: where as many hold the same marks on both sides, they go to
  each other in some order; the largest of the others is opened.
  """
  found: list[tuple[list[Node], list[Node]]] = []
  whole = [Node(tuple(range(len(units))), 0) for units in (there, here)]
  queue = [(_open(whole[0], there), _open(whole[1], here))]
  while queue:
    sides = [list(nodes) for nodes in queue.pop()]
    while True:
      settled = _settled(sides, there, here)
      for ours in settled:
        found.append(ours)
        opened = [
          [part for node in nodes for part in _open(node, units)]
          for nodes, units in zip(ours, (there, here), strict=True)
        ]
        queue.append((opened[0], opened[1]))
        sides = [
          [node for node in side if node not in nodes]
          for side, nodes in zip(sides, ours, strict=True)
        ]
      large = max((n for side in sides for n in side), key=_size, default=None)
      if large is None or _size(large) == 1:
        break
      for side, units in zip(sides, (there, here), strict=True):
        for node in [n for n in side if _size(n) == _size(large)]:
          side.remove(node)
          side.extend(_open(node, units))
  return found


def _size(node: Node) -> int:
  return len(node.units)


def _settled(
  sides: Sequence[Sequence[Node]], there: Sequence[Unit], here: Sequence[Unit]
) -> list[tuple[list[Node], list[Node]]]:
  kinds: dict[object, tuple[list[Node], list[Node]]] = {}
  for k, (side, units) in enumerate(zip(sides, (there, here), strict=True)):
    for node in side:
      if _size(node) > 1:
        marks = tuple(sorted(map(repr, (units[i].mark for i in node.units))))
        kinds.setdefault(marks, ([], []))[k].append(node)
  return [pair for pair in kinds.values() if len(pair[0]) == len(pair[1])]


def _open(node: Node, units: Sequence[Unit]) -> list[Node]:
  """The modules in a module, past those that hold one alone."""
  if len(node.units) < 2:
    return []
  groups: dict[str | None, list[int]] = {}
  for i in node.units:
    parts = units[i].parts
    part = parts[node.depth] if node.depth < len(parts) else None
    groups.setdefault(part, []).append(i)
  if len(groups) == 1 and None not in groups:
    return _open(Node(node.units, node.depth + 1), units)
  return [Node(tuple(group), node.depth + 1) for group in groups.values()]


def same_module(
  pairs: Iterable[tuple[list[Node], list[Node]]], left: np.ndarray
) -> tuple[np.ndarray, list[Relation]]:
  """What is left, and the relations, if such modules go to each other."""
  left, relations = left.copy(), []
  for pair in pairs:
    inside = []
    for nodes in pair:
      of = np.zeros(len(left), int)
      for number, node in enumerate(nodes, 1):
        of[list(node.units)] = number
      inside.append(of)
    left &= (inside[0] > 0)[:, None] == (inside[1] > 0)
    if len(pair[0]) > 1:
      same = [(of[:, None] == of) & (of > 0) for of in inside]
      relations.append(Relation(same[0], same[1]))
  return left, relations
