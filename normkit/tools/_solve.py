"""Which unit goes to which: what the evidence leaves of all pairs.

`left[i, j]` says that unit i there may still go to unit j here. A relation is a
pair of matrices: what holds of i and k there has to hold of j and l here. A
pair is taken away only if it contradicts a relation, or if another has been
decided; so what is left single is the only answer that the evidence allows.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from normkit.tools._units import Mark, Unit

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
  product: np.ndarray = a.astype(np.float32) @ b.astype(np.float32) > 0.5
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


Peers: TypeAlias = tuple[list[Node], list[Node]]


def modules(there: Sequence[Unit], here: Sequence[Unit]) -> list[Peers]:
  """The modules of both sides that hold the same, as many on each side.

  From the top down: those that hold the same go to each other in some order,
  the largest of the others are opened.
  """
  sides = there, here
  found: list[Peers] = []
  left = [tuple(_open(Node((*range(len(u)),), 0), u) for u in sides)]
  while left:
    ours, theirs = left.pop()
    whole = Counter(there[i].mark for node in ours for i in node.units)
    while max(map(_size, [*ours, *theirs]), default=1) > 1:
      settled = _settled(ours, theirs, there, here, whole)
      found += settled
      left += [
        tuple(
          [part for node in nodes for part in _open(node, units)]
          for nodes, units in zip(peers, sides, strict=True)
        )
        for peers in settled
      ]
      gone = {node for peers in settled for node in peers[0]}
      ours = [node for node in ours if node not in gone]
      gone = {node for peers in settled for node in peers[1]}
      theirs = [node for node in theirs if node not in gone]
      large = max(map(_size, [*ours, *theirs]), default=1)
      ours, theirs = (
        [
          part
          for node in nodes
          for part in (
            _open(node, units) if _size(node) == large > 1 else [node]
          )
        ]
        for nodes, units in zip((ours, theirs), sides, strict=True)
      )
  return found


def _size(node: Node) -> int:
  return len(node.units)


def _settled(
  ours: Sequence[Node],
  theirs: Sequence[Node],
  there: Sequence[Unit],
  here: Sequence[Unit],
  whole: Counter[Mark],
) -> list[Peers]:
  """Modules that hold the same, as many there as here.

  Not those that what is outside of them, loose or in other modules, could make
  up: modules do not cut through each other, so that no other case is left.
  """
  kinds: dict[object, Peers] = {}
  marks: dict[object, Counter[Mark]] = {}
  for k, (nodes, units) in enumerate(((ours, there), (theirs, here))):
    for node in nodes:
      if _size(node) > 1:
        held = Counter(units[i].mark for i in node.units)
        kind = frozenset(held.items())
        marks[kind] = held
        kinds.setdefault(kind, ([], []))[k].append(node)
  return [
    pair
    for kind, pair in kinds.items()
    if len(pair[0]) == len(pair[1])
    and any(
      whole[mark] - len(pair[0]) * size < size
      for mark, size in marks[kind].items()
    )
  ]


def _open(node: Node, units: Sequence[Unit]) -> list[Node]:
  """The modules in a module, past those that hold one alone."""
  if len(node.units) < 2:
    return []
  groups: dict[str | int, list[int]] = {}
  for i in node.units:
    parts = units[i].parts
    part = parts[node.depth] if node.depth < len(parts) else i
    groups.setdefault(part, []).append(i)
  if len(groups) == 1:
    return _open(Node(node.units, node.depth + 1), units)
  return [Node(tuple(group), node.depth + 1) for group in groups.values()]


def same_module(
  pairs: Iterable[Peers], left: np.ndarray
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
