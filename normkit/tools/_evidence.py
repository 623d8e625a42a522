"""What tells which unit goes to which, the surest first.

Marks; modules that hold alike; numbers in names, or where a PyTorch module ran
its flow; equal names; the order of definition. Only flow here counts as order:
two units that are used side by side are not ordered by when that happens.
"""

from collections.abc import Iterator, Sequence
import re

import numpy as np

from normkit.tools import _solve
from normkit.tools._flow import Flow
from normkit.tools._solve import Contradiction, Relation
from normkit.tools._units import Unit


class Matching:
  """A matching that evidence narrows.

  Attributes:
    left: (n, n), which unit there may still go to which here.
    why: by the unit there, what decided it.
  """

  def __init__(
    self,
    there: Sequence[Unit],
    here: Sequence[Unit],
    flow: Flow,
    left: np.ndarray,
  ) -> None:
    self.there, self.here, self.flow = there, here, flow
    kinds: dict[object, int] = {}
    self._kinds = tuple(
      np.array([kinds.setdefault(u.mark, len(kinds)) for u in units])
      for units in (there, here)
    )
    self.relations: list[Relation] = []
    self.why: dict[int, str] = {}
    self.left = left
    self.narrow('shape')

  @property
  def decided(self) -> np.ndarray:
    """Which units there have one left."""
    decided: np.ndarray = self.left.sum(1) == 1
    return decided

  def narrow(self, why: str, probe: bool = False) -> None:
    """Draws the conclusions; what they decide is decided for that reason."""
    self.left = _solve.narrowed(self.left, self.relations)
    if probe:
      self.left = _solve.probed(self.left, self.relations)
    for i in np.flatnonzero(self.decided):
      self.why.setdefault(int(i), why)

  def by_modules(self) -> None:
    """Modules with the same marks in them go to each other."""
    pairs = _solve.modules(self.there, self.here)
    self.left, relations = _solve.same_module(pairs, self.left)
    self.relations += relations
    self.narrow('module')

  def by_numbers(self) -> None:
    """What is numbered there is used one after the other.

    Of two members of a series that is taken where all of the one can flow into
    all of the other here; of none of a series in which some can only be used
    the other way round.
    """
    before = self.flow.before
    forward = _solve.can_hold(self.left, before)
    backward = ~_solve.can_hold(self.left, ~before.T)
    there = np.zeros_like(self.left)
    for series in _series([u.parts for u in self.there]):
      places = [
        np.ix_(first, second)
        for i, first in enumerate(series)
        for second in series[i + 1 :]
      ]
      if not any(backward[at].any() for at in places):
        for at in places:
          there[at] = forward[at].all()
    self._relate(Relation(there, before), 'numbers')

  def by_flow(self, there: Flow) -> None:
    """What flows into what does so on both sides."""
    parallel = [~(f.before | f.before.T) for f in (there, self.flow)]
    for relation in (
      Relation(there.before, self.flow.before),
      Relation(parallel[0] & ~np.eye(len(self.left), dtype=bool), parallel[1]),
    ):
      self._relate(_solve.supported(self.left, relation), 'flow')

  def _relate(self, relation: Relation, why: str) -> None:
    self.left = _solve.counted(self.left, relation, *self._kinds)
    self.relations.append(relation)
    self.narrow(why, probe=True)

  def by_names(self) -> None:
    """Units of one shape that are called alike on both sides."""
    for ours, theirs in self.undecided():
      for k in (1, 2, 3):
        called = [_called(self.there[i], k) for i in ours]
        names = [_called(self.here[j], k) for j in theirs]
        if len({*called}) == len(called) and {*called} == {*names}:
          for i, name in zip(ours, called, strict=True):
            only = np.zeros(len(self.here), bool)
            only[theirs[names.index(name)]] = True
            self.left[i] &= only
          break
    self.narrow('name')

  def by_definition(self) -> None:
    """What is defined first there flows into what is defined later.

    From the outermost modules inwards. Of two members of a module it is taken
    where all of the one can flow into all of the other, and nothing that is
    decided flows back; of no modules of a depth where that contradicts itself.
    """
    before = self.flow.before
    depth = max(len(unit.parts) for unit in self.there)
    for level in range(depth):
      if (is_decided := self.decided).all():
        return
      forward = _solve.can_hold(self.left, before)
      back = _solve.can_hold(self.left & is_decided[:, None], before.T)
      there = np.zeros_like(self.left)
      for first, second in _members([u.parts for u in self.there], level):
        at = np.ix_(first, second)
        there[at] = forward[at].all() and not back[at].any()
      there &= ~(is_decided[:, None] & is_decided)
      kept = self.left.copy(), [*self.relations], {**self.why}
      try:
        self._relate(Relation(there, before), 'definition')
      except Contradiction:
        self.left, self.relations, self.why = kept

  def check_definition(self) -> None:
    """Raises if all that flows between two members flows against it.

    Of what has one shape; shapes that are there once need no order.
    """
    kinds, _ = self._kinds
    told = [
      self.why.get(i) not in ('shape', 'given') for i in range(len(kinds))
    ]
    of_one = (kinds[:, None] == kinds) & np.array(told)[:, None] & told
    forward = _solve.can_hold(self.left, self.flow.before) & of_one
    reverse = _solve.can_hold(self.left, self.flow.before.T) & of_one
    for first, second in _members([u.parts for u in self.there]):
      at = np.ix_(first, second)
      if reverse[at].any() and not forward[at].any():
        raise Contradiction(first[0])

  def undecided(self) -> list[tuple[list[int], list[int]]]:
    """The units that are left, in groups that have no candidate in common."""
    groups: list[tuple[set[int], set[int]]] = []
    for i in np.flatnonzero(~self.decided):
      ours, theirs = {int(i)}, {int(j) for j in np.flatnonzero(self.left[i])}
      for group in [g for g in groups if g[1] & theirs]:
        groups.remove(group)
        ours, theirs = ours | group[0], theirs | group[1]
      groups.append((ours, theirs))
    return [(sorted(ours), sorted(theirs)) for ours, theirs in groups]


def matching(
  there: Sequence[Unit],
  here: Sequence[Unit],
  flow: Flow,
  left: np.ndarray,
  flow_there: Flow | None,
  is_defined: bool,
) -> Matching:
  """The matching that all evidence allows.

  Raises:
    Contradiction: if it allows none.
  """
  if flow_there is not None:
    found = Matching(there, here, flow, left)
    found.by_flow(flow_there)
    found.by_names()
    return found
  try:
    found = Matching(there, here, flow, left)
    found.by_modules()
    found.by_numbers()
  except Contradiction:  # modules are made up otherwise here
    found = Matching(there, here, flow, left)
    found.by_numbers()
  found.by_names()
  if is_defined and found.decided.all():
    found.check_definition()
  elif is_defined:
    found.by_definition()
  return found


def _called(unit: Unit, k: int) -> str:
  """The last parts of a name, without what spelling adds."""
  return re.sub('[^a-z0-9]', '', ''.join(unit.parts[-k:]).lower())


def _series(paths: Sequence[tuple[str, ...]]) -> Iterator[list[list[int]]]:
  """The numbered members of each module: of each the units, in order."""
  for _, groups in _modules(paths):
    stems: dict[str, list[tuple[int, list[int]]]] = {}
    for part, units in groups.items():
      found = re.fullmatch(r'(.*?)(\d+)', part)
      if found:
        number = int(found[2])
        stems.setdefault(found[1], []).append((number, units))
    for series in stems.values():
      yield [units for _, units in sorted(series)]


def _members(
  paths: Sequence[tuple[str, ...]], depth: int | None = None
) -> Iterator[tuple[list[int], list[int]]]:
  """Members of a module that no number orders, as they are defined.

  Of all modules, or of those of a depth.
  """
  for level, groups in _modules(paths):
    members = [
      (re.sub(r'\d+$', '', part), units) for part, units in groups.items()
    ]
    for i, (stem, first) in enumerate(members):
      for other, second in members[i + 1 :]:
        if stem != other and depth in (None, level):
          yield first, second


def _modules(
  paths: Sequence[tuple[str, ...]],
) -> Iterator[tuple[int, dict[str, list[int]]]]:
  """The depth of each module, and its members, each with its units."""
  left = [(0, [*range(len(paths))])]
  while left:
    depth, units = left.pop()
    groups: dict[str, list[int]] = {}
    for i in units:
      if depth < len(paths[i]):
        groups.setdefault(paths[i][depth], []).append(i)
    yield depth, groups
    left += [(depth + 1, group) for group in groups.values()]
