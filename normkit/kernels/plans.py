"""How rows lie in arrays, and which program takes which of them.

Rows may share scale and bias in sets: those of an example (adaLN), which lie
side by side, or those of a head, which lie as far apart as there are heads. A
program then takes rows of one set after the other, and has sums for each.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from normkit._types import Array
from normkit.kernels import configs
from normkit.kernels.configs import PIECE, Case, Config

# Elements of an array of one axis: where they lie are numbers of 32 bits.
MOST_OF_FLAT = 2**31


class Sets(NamedTuple):
  """Rows that share a row of scale and of bias.

  Attributes:
    number: of the sets.
    rows: of each.
    is_apart: whether the rows of a set lie `number` apart, or side by side.
  """

  number: int
  rows: int
  is_apart: bool = False

  @property
  def step(self) -> int:
    """From a row to the next of its set."""
    return self.number if self.is_apart else 1

  def row(self, of_set: Any, index: Any) -> Any:
    """Which of all rows is one of a set."""
    first = of_set if self.is_apart else of_set * self.rows
    return first + index * self.step


def sets_of(
  shape: tuple[int, ...], *parameters: tuple[int, ...]
) -> Sets | None:
  """The sets of x (..., features), or None where there are no such.

  Args:
    shape: of x.
    *parameters: shapes of scale and bias: one number a feature, or of x's rank
      and along each axis of x's size or one.
  """
  axes = [a for a, n in enumerate(shape[:-1]) if n > 1]
  found = {
    tuple(a for a in axes if p[a] > 1)
    for p in parameters
    if len(p) == len(shape) > 1
  } - {()}
  rows = math.prod(shape[:-1])
  if not found:
    return Sets(1, rows)
  if len(found) > 1:
    return None
  (varied,) = map(list, found)
  count = math.prod(shape[a] for a in varied)
  if any(p[-1] != shape[-1] for p in parameters):
    return None
  if varied == axes[: len(varied)]:
    return Sets(count, rows // count)
  is_last = varied == axes[-len(varied) :]
  return Sets(count, rows // count, is_apart=True) if is_last else None


class Plan(NamedTuple):
  """How rows lie in arrays, and who takes them.

  Attributes:
    sets: of rows, of one scale and bias each.
    size: of a row.
    given: shape of x as rows, or of one axis.
    filled: the same with what an asynchronous copy asks for.
    shape: of the arrays of rows.
    tiles: of scale and bias of a set, and of sums over rows.
    tasks: rows, one or some, that a warpgroup or a program takes together.
    turns: of these, how many a program has with sets.
    programs: that take them.
    parts: how many programs at most have rows of a set.
  """

  sets: Sets
  size: int
  given: tuple[int, ...]
  filled: tuple[int, ...]
  shape: tuple[int, ...]
  tiles: tuple[int, ...]
  tasks: int
  turns: int
  programs: int
  parts: int

  @property
  def of_set(self) -> int:
    """The tasks of a set."""
    return self.tasks // self.sets.number

  def rows_of(self, array: Array) -> Array:
    """An array like x as rows, filled up."""
    return padded(array.reshape(self.given), self.filled).reshape(self.shape)

  def like_x(self, array: Array, shape: tuple[int, ...]) -> Array:
    """Rows of a result as x lies."""
    whole = array.reshape(self.filled)
    return whole[tuple(map(slice, self.given))].reshape(shape)

  def parameter(self, array: Array, width: int) -> Array:
    """Scale or bias: a row for each set, filled up, in tiles."""
    size, count = self.size, self.sets.number
    each = jnp.broadcast_to(array.reshape(-1, size), (count, size))
    return padded(each, (count, width)).reshape(count, *self.tiles)

  def statistics(self, array: Array, shape: tuple[int, ...]) -> Array:
    """One number a row, from what the tasks wrote."""
    count, rows, is_apart = self.sets
    if array.ndim > 1:
      array = array.reshape(count, -1)[:, :rows]
      array = array.T if is_apart else array
    return array.reshape(*shape[:-1], 1)

  def total(self, array: Array, shape: tuple[int, ...]) -> Array:
    """The sum of what the programs have, in the shape of scale or bias."""
    count, size = self.sets.number, self.size
    array = array.reshape(count, self.parts, -1)[..., :size]
    if count > 1:
      tasks = np.arange(count) * self.of_set
      first, last = tasks // self.turns, (tasks + self.of_set - 1) // self.turns
      is_there = np.arange(self.parts) <= (last - first)[:, None]
      array = jnp.where(is_there[..., None], array, 0)
    found = array.sum(1)
    return (found if math.prod(shape) > size else found.sum(0)).reshape(shape)


def plan(
  case: Case,
  config: Config,
  chip: int,
  sets: Sets,
  interpret: bool,
) -> Plan:
  """For so many rows.

  An asynchronous copy fills up with zeros, and leaves out, what lies beyond an
  array; rows of a multiple of 16 bytes are all that it asks, or else arrays of
  one axis. The interpreter asks for whole tiles.
  """
  size, high = case.size, config.rows_at_once
  vector = 16 // min(jnp.dtype(d).itemsize for d in case.inputs + case.outputs)
  is_flat = size % vector > 0 and sets.number * sets.rows * size < MOST_OF_FLAT
  width = size if is_flat else -(-size // vector) * vector
  width = config.row_width if interpret else width
  of_set = -(-sets.rows // high)
  rows = of_set * high if interpret else sets.rows
  given: tuple[int, ...] = (sets.number * sets.rows,)
  filled: tuple[int, ...] = (sets.number * rows,)
  if sets.number > 1 and high > 1:
    given, filled = (sets.number, sets.rows), (sets.number, rows)
    if sets.is_apart:
      given, filled = given[::-1], filled[::-1]
  shape: tuple[int, ...] = (*filled, width)
  if config.is_shared and size % PIECE == 0:
    shape = *filled, width // PIECE, PIECE
  tiles: tuple[int, ...] = (config.row_width // config.width, config.width)
  if config.is_shared:
    tiles = (tiles[0] // config.rows, config.rows, config.width)
  tasks = sets.number * of_set
  turns, programs = _shares(config, chip, tasks, sets)
  parts = programs
  if sets.number > 1:
    first = np.arange(sets.number) * of_set
    parts = int(np.max((first + of_set - 1) // turns - first // turns)) + 1
  given, filled = (*given, size), (*filled, width)
  if is_flat:
    given = (sets.number * sets.rows * size,)
    filled = shape = (given[0] + (width if interpret else 0),)
  return Plan(
    sets, size, given, filled, shape, tiles, tasks, turns, programs, parts
  )


def _shares(
  config: Config, chip: int, tasks: int, sets: Sets
) -> tuple[int, int]:
  """Tasks of a program, and programs: as many of each set, if few are idle."""
  workers = config.workers
  programs = min(config.clusters(configs.CHIPS[chip]), -(-tasks // workers))
  if sets.number == 1:
    return 0, programs
  if programs % sets.number <= programs // 8:
    programs -= programs % sets.number
  turns = -(-tasks // (programs * workers)) * workers
  return turns, -(-tasks // turns)


def padded(array: Array, shape: tuple[int, ...]) -> Array:
  """Filled up with zeros."""
  if array.shape == shape:
    return array
  pairs = zip(array.shape, shape, strict=True)
  return jnp.pad(array, [(0, to - of) for of, to in pairs])
