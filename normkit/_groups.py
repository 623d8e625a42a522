"""What devices exchange where groups hold several members of each.

A member is one of a `vmap` on a device. Each device first sums its own members
of each group. Groups that share no device may lie at one place of what is then
exchanged, a slot; slots whose groups lie on the same sets of devices are
exchanged together, in a round.
"""

from collections.abc import Sequence
import itertools
from typing import NamedTuple

import numpy as np

from normkit._types import Groups

Devices = frozenset[int]

# Numbers that take as long to send as a collective does to start, or so: 64 KiB
# of float32.
START = 2**14


class Round(NamedTuple):
  """Sums over the sets of a partition of the devices.

  The tables say for each device and slot which of its own members it sums, a
  number that none has for nobody: (devices, slots, longest).
  """

  partition: list[list[int]]
  tables: list[np.ndarray]


def schedule(
  groups: Groups, devices: int, each: int, size: int
) -> tuple[np.ndarray, list[Round]]:
  """How to sum `size` numbers of each member over its group.

  Each group is summed over its own devices, or, where that costs less, all are
  over all devices, which starts one collective.

  Args:
    groups: a partition of the members: those of the first device first.
    devices: how many devices there are.
    each: how many members each has.
    size: how many numbers a member has.

  Returns:
    The slot of each member, (devices, each), and the rounds that fill them.
  """
  parts: list[dict[int, list[int]]] = []
  for group in groups:
    parts.append({})
    for member in group:
      parts[-1].setdefault(member // each, []).append(member % each)
  sets = [frozenset(part) for part in parts]
  all_devices = frozenset(range(devices))
  wide = [all_devices if len(own) > 1 else own for own in sets]
  ways = [_in_rounds(way, devices) for way in (sets, wide)]
  best = min(ways, key=lambda way: sum(_cost(p, s, size) for p, s in way))
  own = np.zeros((devices, each), np.int32)
  found, first = [], 0
  for partition, slots in best:
    found.append(Round(partition, []))
    rows = [{d: p for n in slot for d, p in parts[n].items()} for slot in slots]
    for longest, some in itertools.groupby(
      sorted(rows, key=_longest), _longest
    ):
      table = _table([*some], devices, longest, each)
      for slot in range(table.shape[1]):
        device, where = np.nonzero(table[:, slot] < each)
        own[device, table[device, slot, where]] = first + slot
      first += table.shape[1]
      found[-1].tables.append(table)
  return own, found


def _longest(row: dict[int, list[int]]) -> int:
  return max(map(len, row.values()))


def _table(
  rows: list[dict[int, list[int]]], devices: int, longest: int, nobody: int
) -> np.ndarray:
  table = np.full((devices, len(rows), longest), nobody, np.int32)
  for slot, row in enumerate(rows):
    for device, members in row.items():
      table[device, slot, : len(members)] = members
  return table


def _in_rounds(
  sets: Sequence[Devices], devices: int
) -> list[tuple[list[list[int]], list[list[int]]]]:
  found: list[tuple[set[Devices], list[list[int]]]] = []
  for slot in _slots(sets):
    shared = {sets[n] for n in slot if len(sets[n]) > 1}
    for known, slots in found:
      if shared <= known and bool(shared) == bool(known):
        slots.append(slot)
        break
    else:
      found.append((shared, [slot]))
  return [(_partition(known, devices), slots) for known, slots in found]


def _slots(sets: Sequence[Devices]) -> list[list[int]]:
  """Groups in as few slots as come of taking the first one that is free."""
  slots: list[list[int]] = []
  taken: list[set[int]] = []
  first: dict[Devices, int] = {}
  for n in sorted(
    range(len(sets)), key=lambda n: (-len(sets[n]), sorted(sets[n]))
  ):
    slot = first.get(sets[n], 0)
    while slot < len(slots) and not sets[n].isdisjoint(taken[slot]):
      slot += 1
    if slot == len(slots):
      slots.append([])
      taken.append(set())
    slots[slot].append(n)
    taken[slot] |= sets[n]
    first[sets[n]] = slot + 1
  return slots


def _partition(sets: set[Devices], devices: int) -> list[list[int]]:
  """The sets, and each other device by itself."""
  others = set(range(devices)).difference(*sets)
  return sorted([*map(sorted, sets), *([d] for d in others)])


def _cost(partition: list[list[int]], slots: list[list[int]], size: int) -> int:
  """The collectives, and what they send; sets of several sizes take a tree."""
  sizes = {*map(len, partition)}
  steps = (max(sizes) - 1).bit_length()
  exchanges = min(steps, 1) if len(sizes) == 1 else 2 * steps
  return exchanges * (START + len(slots) * size)
