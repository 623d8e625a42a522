"""What a program of the Mosaic GPU kernels holds, by a short rule.

Nothing here needs Pallas. `MEASURED` is for what a device has shown to be
better than the rule; none has yet.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from normkit._types import DType

PIECE = 256  # elements: the most of one axis in an asynchronous copy
IN_WARP = 1024  # elements of the longest row that a warp takes by itself
LEAST = 64  # elements of a tile's rows: 128 bytes of scale and bias
WARPS = 4  # of a warpgroup
BUFFERS = 2  # of what the warps of a program tell each other
BARRIERS = 32  # at most in one array
MEMBERS = 1, 2, 4, 8  # of a cluster; more are not in every chip
THREADS = 128  # of a warpgroup
# Sums for scale and bias that a thread may keep in registers, by the bytes of
# an element: with more the assembler spills, for H200 or B200.
SUMS = {2: 64, 4: 48}
# Of longer rows the sums that programs write would move more than a tenth of x.
OWN_SUMS = 10_240  # elements for each sum, and each byte of one
LINES = 64, 32, 128, 16  # bytes of memory next to each other, the best first
# Of groups, elements that a thread holds of a place and of a tile, and programs
# on a multiprocessor with the warpgroups of each.
MOST_OF_PLACE, MOST_OF_TILE = 16, 32
TEAMS = (4, 1), (2, 2), (1, 4), (1, 3), (1, 2)
SUMS_OF_ONE = {2: 40, 4: 32}  # of rows that are longer, then
SUMS_OF_SETS = {2: 40, 4: 24}  # the same with sets
SUMS_OF_ACTIVATED = 32  # and for the smallest tiles; or with a gate
SUMS_OF_ACTIVATED_ONE = 24  # of one sum
# In a cluster: warpgroups, and numbers of each sum.
OF_MEMBERS, OF_ACTIVATED_MEMBERS = (4, 16), (3, 16)


class Chip(NamedTuple):
  """What a kernel must know of a chip.

  Attributes:
    processors: multiprocessors.
    in_clusters: of these, how many clusters of more than two surely have: parts
      of the chip with 16 to 20 each. Fewer are enough for the memory bus.
    shared: bytes of shared memory of each that programs may use.
    under_way: bytes that each must have under way to fill the memory bus.
  """

  processors: int
  in_clusters: int
  shared: int
  under_way: int


CHIPS = {
  9: Chip(132, 112, 227 * 1024, 36 * 1024),  # H200
  10: Chip(148, 128, 227 * 1024, 54 * 1024),  # B200
}


@dataclasses.dataclass(frozen=True)
class Config:
  """What a program holds.

  Attributes:
    rows: of a tile.
    width: of a tile.
    tiles: of a row, or of some rows together, for each warpgroup.
    warpgroups: of a program.
    is_shared: whether the warpgroups share a row; or each has rows of its own.
    stages: tiles that a warpgroup has in its ring.
    resident: programs on each multiprocessor.
    holds_parameters: whether scale and bias lie in shared memory.
    members: programs that share a row or a group, each with a part of it.
  """

  rows: int
  width: int
  tiles: int
  warpgroups: int
  is_shared: bool
  stages: int
  resident: int
  holds_parameters: bool
  members: int = 1

  @property
  def row_width(self) -> int:
    """Elements of a row, filled up."""
    if self.is_shared:
      return self.members * self.tiles * self.tile_width
    return self.tiles * self.width

  @property
  def tile_width(self) -> int:
    """Elements of a row in a tile of each warpgroup of a program."""
    if self.is_shared:
      return self.warpgroups * self.rows * self.width
    return self.width

  def firsts(self, size: int) -> int:
    """Elements of a row of `size` in the first tiles."""
    each, most = self.tiles * self.tile_width, self.tile_width
    left = (size - each * member for member in range(self.members))
    return sum(min(max(n, 0), most) for n in left)

  def clusters(self, chip: Chip) -> int:
    """Programs, or clusters of these, that are on a chip at once."""
    processors = chip.in_clusters if self.members > 2 else chip.processors
    return self.resident * (processors // self.members)

  @property
  def groups_an_array(self) -> int:
    """Warpgroups whose rings have their barriers in one array."""
    return max(BARRIERS // self.stages, 1)

  @property
  def barrier_arrays(self) -> int:
    """How many of these there are."""
    return -(-self.warpgroups // self.groups_an_array)

  @property
  def rows_at_once(self) -> int:
    """Rows of x that a warpgroup takes together."""
    return 1 if self.is_shared else self.rows

  @property
  def workers(self) -> int:
    """How many of these a program takes at once."""
    return 1 if self.is_shared else self.warpgroups


@dataclasses.dataclass(frozen=True)
class Case:
  """What the rule depends on.

  Attributes:
    size: of a row.
    inputs: dtypes of what is as large as x and read.
    outputs: of what is as large as x and written.
    parameters: dtypes of scale and bias, where there are any.
    sums: how many sums over rows are kept.
    has_sets: whether they are of some rows, as scale and bias are.
    is_activated: whether there is an activation, or a gate.
  """

  size: int
  inputs: tuple[DType, ...]
  outputs: tuple[DType, ...]
  parameters: tuple[DType, ...] = ()
  sums: int = 0
  has_sets: bool = False
  is_activated: bool = False

  @property
  def vector(self) -> int:
    """Elements that a thread loads or stores at once: 16 bytes at most."""
    dtypes = (*self.inputs, *self.outputs, *self.parameters)
    widest = max(jnp.dtype(d).itemsize for d in dtypes)
    return 16 // (4 if self.sums else widest)


@dataclasses.dataclass(frozen=True)
class Groups:
  """What the rule depends on for groups of channels.

  Attributes:
    places: of an example.
    size: channels of a group.
    count: groups of an example.
    inputs: dtypes of what is as large as x and read.
    outputs: of what is as large as x and written.
  """

  places: int
  size: int
  count: int
  inputs: tuple[DType, ...]
  outputs: tuple[DType, ...]

  @property
  def itemsizes(self) -> tuple[int, ...]:
    """Bytes of an element of each array."""
    return tuple(jnp.dtype(d).itemsize for d in self.inputs + self.outputs)

  def lanes(self, width: int) -> tuple[int, int]:
    """Of a warp, how many hold a place of `width` channels, and their vectors.

    All that a thread holds of a place should not take too many registers.
    """
    for vector in (4, 2, 1):
      lanes = math.gcd(width // vector, 16)
      if width % vector == 0 and width // lanes <= MOST_OF_PLACE:
        break
    return lanes, vector


MEASURED: dict[tuple[int, Case | Groups], Config] = {}
OUTPUT_TILES = 2  # of each output, written in turn
SLACK = 3 * 1024  # barriers, sums of warps, and what alignment loses
SPARE = 2 * 1024  # of these, for a ring where it decides


def config(case: Case, capability: int = 9) -> Config | None:
  """What a program holds, or None where a row does not fit.

  The first choice whose ring has room for three rows and for the bytes that
  are to be under way; or for these; or else the one with most of them. And the
  fewest programs to a row for which there is one of the first two; if there is
  none, memory is shared out to the last KiB.
  """
  return _config(case, capability, _choices, (0, SPARE))


def groups_of(
  shape: tuple[int, ...],
  count: int,
  inputs: Iterable[DType],
  outputs: Iterable[DType],
) -> Groups:
  """The case of x (batch, ..., channels) in so many groups."""
  return Groups(
    math.prod(shape[1:-1]),
    shape[-1] // count,
    count,
    tuple(map(jnp.dtype, inputs)),
    tuple(map(jnp.dtype, outputs)),
  )


@functools.cache
def groups(case: Groups, capability: int = 9) -> Config | None:
  """The same for groups of channels, of which a ring has room for one task.

  A tile is places by channels, which are whole groups next to each other.
  """
  return _config(case, capability, _choices_of_groups)


def _config(
  case: Any,
  capability: int,
  choices: Callable[..., list[Config]],
  spares: Iterable[int] = (0,),
) -> Config | None:
  if (measured := MEASURED.get((capability, case))) is not None:
    return measured
  chip, best, most = CHIPS[capability], None, -1
  for spare, members in itertools.product(spares, MEMBERS):
    roomy = chip._replace(shared=chip.shared + spare)
    found = _best(case, choices(case, roomy, members), roomy)
    ahead = -1 if found is None else under_way(case, found, found.resident)
    if ahead > most:
      best, most = found, ahead
    if most >= chip.under_way:
      break
  return best


def _best(
  case: Case | Groups, choices: list[Config], chip: Chip
) -> Config | None:
  found = [c for c in choices if c.stages >= c.tiles]
  ahead = [under_way(case, c, c.resident) for c in found]
  full = [c for c, n in zip(found, ahead, strict=True) if n >= chip.under_way]
  long = [c for c in full if c.stages >= 3 * c.tiles]
  if chosen := (isinstance(case, Case) and long) or full:
    return chosen[0]
  return found[ahead.index(max(ahead))] if found else None


def _choices(case: Case, chip: Chip, members: int) -> list[Config]:
  """Many warpgroups on a multiprocessor first, but as registers allow."""
  found = []
  for tile in _tiles(case, members):
    groups, is_masked = tile.warpgroups, tile.row_width > case.size
    is_heavy = case.sums > 0 or (tile.is_shared and tile.rows > 4)
    most = max((4 if is_heavy else 8) // groups, 1)
    if members > 1 and case.is_activated and (case.sums > 1 or is_masked):
      most = 1  # of so many registers
    for resident in range(most, 0, -1):
      for holds in (True, False) if case.parameters else (False,):
        one = dataclasses.replace(
          tile, resident=resident, holds_parameters=holds
        )
        room = _room(case, chip, one) // (groups * _bytes(case, one))
        stages = _stages(room, chip, one, case)
        found.append(dataclasses.replace(one, stages=stages))
  return found


def _tiles(case: Case, members: int) -> list[Config]:
  """Tiles and warpgroups, the rest to be filled in."""
  itemsize = jnp.dtype(case.inputs[0]).itemsize
  if case.size <= IN_WARP:
    return _tiles_in_warp(case, itemsize) if members == 1 else []
  if not case.sums:
    groups = min(-(-case.size // (4096 * members)), 4)
    found = _shared(case.size, groups, 16 // itemsize, members)
    if case.is_activated and found.row_width > case.size:
      found = _shared(case.size, groups, 4, members)  # a mask takes registers
    return [found]
  if members == 1 and case.size * case.sums > OWN_SUMS * itemsize:
    return []  # members write a part of a row each
  # Each program writes out its sums over rows, so programs are few and large.
  high = 4 if case.is_activated else 16 // itemsize
  groups, most, masked = _most_sums(case, itemsize, members)
  choices = [
    _shared(case.size, number, rows, members)
    for number in range(groups, 0, -1)
    for rows in range(high, 3, -4)
  ]
  choices = [
    c
    for c in choices
    if c.tiles * c.rows * PIECE
    <= THREADS * (most if c.row_width == case.size else masked)
  ]
  return sorted(choices, key=lambda c: c.row_width)[:1]


def _tiles_in_warp(case: Case, itemsize: int) -> list[Config]:
  """The same for rows that a warp takes by itself."""
  width = max(min(1 << (case.size - 1).bit_length(), PIECE), LEAST)
  rows = 4 * 32 // min(32, width // case.vector)
  tiles = -(-case.size // width)
  # An activation takes registers: as few elements a thread as of float32.
  least = 4096 // (4 if case.is_activated else itemsize)
  while tiles == 1 and rows * width < least:
    rows *= 2
  # Sets take some registers, and fewer warpgroups have more of them.
  is_more = tiles > 3 or (tiles > 1 and (case.has_sets or case.is_activated))
  most = 3 if is_more and case.sums else 4
  return [
    Config(rows, width, tiles, groups, False, 0, 0, False)
    for groups in range(most, 1, -1)
  ]


def _most_sums(case: Case, itemsize: int, members: int) -> tuple[int, int, int]:
  """Warpgroups, and numbers of each sum that a thread may keep; with a mask."""
  if members > 1:  # which have registers left for it
    found = OF_ACTIVATED_MEMBERS if case.is_activated else OF_MEMBERS
    return *found, found[1]
  if case.is_activated and case.sums == 1:
    most = SUMS_OF_ACTIVATED_ONE
    return 4, most, most // 2 if case.has_sets else SUMS_OF_ACTIVATED // 2
  of_many = SUMS_OF_ACTIVATED if case.is_activated else SUMS[itemsize]
  of_one = (SUMS_OF_SETS if case.has_sets else SUMS_OF_ONE)[itemsize]
  most = of_many // case.sums if case.sums > 1 else of_one
  return 4, most, most // 2


def _shared(size: int, groups: int, rows: int, members: int) -> Config:
  """Warpgroups that share a row."""
  tiles = -(-size // (rows * PIECE * groups * members))
  return Config(rows, PIECE, tiles, groups, True, 0, 0, False, members)


def _choices_of_groups(case: Groups, chip: Chip, members: int) -> list[Config]:
  """Lines of 64 bytes of memory first, and many programs."""
  found = []
  for width in widths(case):
    least = THREADS // case.lanes(width)[0]
    most = THREADS * MOST_OF_TILE // len(case.inputs)
    for resident, warpgroups in TEAMS:
      rows = [
        r
        for r in range(least, PIECE + 1, least)
        if r * width <= most or r == least
      ]
      teams = warpgroups * members
      tiles = {r: -(-case.places // (r * teams)) for r in rows}
      # Each tile costs as much again as some elements.
      rows.sort(key=lambda r: tiles[r] * (r * width + 8 * THREADS))
      for r in rows:
        one = Config(
          r, width, tiles[r], warpgroups, True, 0, resident, False, members
        )
        room = _room_of_groups(case, chip, one)
        stages = _stages(
          room // (warpgroups * _bytes(case, one)), chip, one, case
        )
        found.append(dataclasses.replace(one, stages=stages))
  return found


def widths(case: Groups) -> list[int]:
  """Of whole groups whose bytes are multiples of 16, as copies ask."""
  least = min(case.itemsizes)
  step = math.lcm(case.size, 16 // least)
  most = -(-case.size * case.count // step)
  steps = [-(-line // (least * step)) for line in LINES]
  return [w for n in steps if (w := min(n, most) * step) <= PIECE]


def _room(case: Case, chip: Chip, found: Config) -> int:
  """Bytes for the rings of a program."""
  of_tile = found.rows * found.width
  outputs = OUTPUT_TILES * sum(jnp.dtype(d).itemsize for d in case.outputs)
  fixed = found.warpgroups * of_tile * outputs
  if found.holds_parameters:
    itemsizes = sum(jnp.dtype(d).itemsize for d in case.parameters)
    fixed += found.row_width // found.members * itemsizes
  if case.sums and not found.is_shared:
    fixed += found.warpgroups * of_tile * 4
  # Of the sums of the others.
  fixed += 16 * (found.members - 1) * found.warpgroups * found.rows
  return chip.shared // found.resident - fixed - SLACK


def _room_of_groups(case: Groups, chip: Chip, found: Config) -> int:
  """Bytes for the rings of a program."""
  outputs = OUTPUT_TILES * sum(jnp.dtype(d).itemsize for d in case.outputs)
  parts = 4 * math.prod((BUFFERS, BUFFERS, found.members, WARPS, found.width))
  fixed = found.warpgroups * (found.rows * found.width * outputs + parts)
  # Rings, outputs and sums lie in several buffers, at multiples of 1,024.
  return chip.shared // found.resident - fixed - SLACK - 2048


def _bytes(case: Case | Groups, found: Config) -> int:
  """Of a tile of every input."""
  itemsizes = sum(jnp.dtype(d).itemsize for d in case.inputs)
  return found.rows * found.width * itemsizes


def _stages(room: int, chip: Chip, found: Config, case: Case | Groups) -> int:
  """Three rows' tiles, or what is to be under way; as far as they fit."""
  each = found.resident * found.warpgroups * _bytes(case, found)
  wanted = found.tiles + -(-2 * chip.under_way // each)
  return min(room, max(3 * found.tiles, wanted), BARRIERS)


def under_way(case: Case | Groups, found: Config, resident: int) -> int:
  """Bytes on their way to a multiprocessor while a row is worked on.

  Args:
    case: the case.
    found: its config.
    resident: programs that fit on a multiprocessor, by registers too.
  """
  ahead = found.stages - found.tiles
  return resident * found.warpgroups * ahead * _bytes(case, found)
