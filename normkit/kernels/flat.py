"""Rows whose bytes are no multiple of 16, in arrays of one axis.

Where such rows start no asynchronous copy of a part of rows may; a copy of a
part of one axis may start anywhere, if it is of whole lines. So a row is
brought with what fills its last line, and threads write what is its own there.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray, utils
from jax.experimental.pallas import mosaic_gpu as gpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from normkit.kernels.configs import THREADS, Config
from normkit.kernels.plans import Plan

LINE = 128  # bytes, of which Mosaic GPU copies multiples


def is_flat(plan: Any) -> bool:
  """Whether arrays have one axis."""
  return len(plan.shape) == 1


class Rows:
  """Where the rows of a tile lie, which are of rows of x, or pieces of one."""

  def __init__(
    self, config: Config, plan: Plan, task: Any, number: Any
  ) -> None:
    """Tile `number`, of those of all warpgroups, of a task."""
    self.config, self.plan = config, plan
    sets, high, width = plan.sets, config.rows_at_once, config.width
    # Of the pieces of a row of x, the last is not whole.
    self.last, self.size = divmod(plan.size, width)
    of_set = lax.div(task, plan.of_set)
    within = (task - of_set * plan.of_set) * high
    self.step, piece = sets.step * plan.size, number
    there = sets.rows - within
    self.is_last, self.row = number == self.last, jnp.int32(0)
    if config.is_shared:
      self.step, piece = width, number * config.rows
      self.row = self.last - piece  # of the last piece
      there = jnp.maximum(self.row + 1, 0)
      self.is_last = (self.row >= 0) & (self.row < config.rows)
    self.count = jnp.minimum(there, config.rows)
    row = sets.row(of_set, within)
    self.first = row * plan.size + piece * width

  def fetch(self, array: Any, tile: Any, arrived: Any) -> None:
    """Has a tile brought, each of its rows by one copy: zeros for none.

    Of both loops the compiler does not know the end, or it would unroll them.
    """

    def copy(at: Any, row: Any, size: int) -> None:
      of = array.at[pl.ds(at, size)]
      gpu.copy_gmem_to_smem(of, tile.at[row, pl.ds(0, size)], arrived)

    def nothing(row: Any, _: Any) -> None:
      end = jnp.maximum(self.first, self.plan.given[0])
      copy(end, row, self.config.width)

    line = _line(array)
    self.each(copy, pl.cdiv(self.size, line) * line)
    lax.fori_loop(self.count, self.config.rows, nothing, None)

  def send(self, array: Any, tile: Any, interpret: bool) -> None:
    """Has a tile of a result written."""

    def copy(at: Any, row: Any, size: int) -> None:
      of = tile.at[row, pl.ds(0, size)]
      gpu.copy_smem_to_gmem(of, array.at[pl.ds(at, size)], commit_group=False)

    done = self.size - self.size % _line(array)
    self.each(copy, done)
    write = _interpreted if interpret else _write
    vector = math.gcd(self.plan.size, 16 // array.dtype.itemsize)
    columns = range(done, self.size, vector)
    at = self.first + self.row * self.step + done
    count = self.count - self.row

    @pl.when(self.is_last)
    def _() -> None:
      write(array, tile, columns, count, self.row, at, self.step)

  def each(self, copy: Callable[[Any, Any, int], None], size: int) -> None:
    """`copy(at, row, size)` of whole pieces, and some elements of the last."""

    def one(row: Any, _: Any) -> None:
      at = self.first + row * self.step
      is_last = self.is_last
      if self.config.is_shared:
        is_last = row == self.row
      if self.last:
        whole = functools.partial(copy, at, row, self.config.width)
        pl.when(jnp.logical_not(is_last))(whole)
      if size:
        pl.when(is_last)(functools.partial(copy, at, row, size))

    lax.fori_loop(0, self.count, one, None)


def _line(array: Any) -> int:
  """Elements of one."""
  return LINE // int(array.dtype.itemsize)


def element(
  number: Any, columns: range, row: Any, at: Any, step: Any
) -> tuple[Any, Any, Any]:
  """Of some columns of rows of a tile: row, column, and place in an array.

  Args:
    number: which, row after row.
    columns: of each row, every second one if two are stored at once.
    row: the first.
    at: its place, of its first column.
    step: from there to that of the next row.
  """
  index, column = number // len(columns), number % len(columns) * columns.step
  return row + index, column + columns.start, at + index * step + column


def _interpreted(
  array: Any, tile: Any, columns: range, count: Any, *rest: Any
) -> None:
  """Writes some columns of so many rows of a tile, `rest` as for `element`."""
  size = columns.stop - columns.start

  def one(index: Any, _: Any) -> None:
    row, column, to = element(index * len(columns), columns, *rest)
    array[pl.ds(to, size)] = tile[row, pl.ds(column, size)]

  lax.fori_loop(0, count, one, None)


def _write(array: Any, tile: Any, columns: range, *numbers: Any) -> None:
  """The same, some elements by each thread in turn."""

  def write(_: Any, array: Any, tile: Any, *numbers: Any) -> None:
    count, *rest = (_unsigned(n.registers.item()) for n in numbers)
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    threads = utils.c(THREADS, i32)
    thread = arith.remui(utils.thread_idx(), threads)
    end = (count * len(columns)).registers.item()
    for_op: Any = scf.ForOp
    loop = for_op(thread, end, threads)
    with ir.InsertionPoint(loop.body):
      found = element(_unsigned(loop.induction_variable), columns, *rest)
      *of, to = (arith.index_cast(index, n.registers.item()) for n in found)
      dtype = ir.MemRefType(tile.type).element_type
      some = ir.VectorType.get((columns.step,), dtype)
      vector.store(vector.load(some, tile, of), array, [to])
      scf.yield_([])

  types = (gpu.RefType(),) * 2 + (gpu.Layout.WG_SPLAT,) * len(numbers)
  inline = gpu.inline_mgpu(arg_types=types)(write)
  inline(array, tile, *map(jnp.int32, numbers))


def _unsigned(value: Any) -> FragmentedArray:
  """A number of 32 bits, with operators."""
  return FragmentedArray.splat(value, (), is_signed=False)
