"""What a warpgroup does with rows that pass through shared memory.

A tile is (rows, width): rows of x, each in the lanes of a warp; or, where the
warpgroups of a program share one long row, pieces of that.
"""

from collections.abc import Callable
import functools
import inspect
import math
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
import jax.numpy as jnp

from normkit._types import Array
from normkit.kernels import flat, layouts, rows
from normkit.kernels.clusters import Place
from normkit.kernels.configs import OUTPUT_TILES, Case, Groups
from normkit.kernels.rows import Spec

# `load` wants an index in JAX 0.10, and a part of the array later.
_INDEX = inspect.signature(gpu.load).parameters.get('idx')
IS_INDEXED = _INDEX is not None and _INDEX.default is inspect.Parameter.empty
UNROLLED = 2  # tiles of a row, of which each has its own code
INPUTS = 'x', 'residual', 'gate', 'dy', 'dtotal'
OUTPUTS = 'y', 'total', 'dx', 'dgate'
PARAMETERS = 'scale', 'bias'
Arrays = dict[str, Any]
Tile = Any


class Work:
  """What a warpgroup has at hand: arrays, shared memory, its place."""

  def __init__(
    self,
    refs: Arrays,
    at: Place,
    case: Case | Groups,
    plan: Any,
    spec: Spec,
    interpret: bool,
  ) -> None:
    self.refs, self.at, self.spec = refs, at, spec
    self.config = config = at.config
    self.interpret = interpret
    self.case: Any = case
    self.plan: Any = plan
    self.tile, self.layout = self.tiled()
    self.program = at.program
    self.group = at.group
    place = 0 if config.is_shared else self.group
    self.set = jnp.int32(0)
    if plan.sets.number == 1:
      # Tasks, one row or some, go round among all that take them.
      self.first = self.program * config.workers + place
      self.step = plan.programs * config.workers
      self.end = jnp.int32(plan.tasks)
    else:
      # A program's lie side by side: most of one set, or of few.
      self.begin = self.program * plan.turns
      self.first, self.step = self.begin + place, config.workers
      self.end = jnp.minimum((self.program + 1) * plan.turns, plan.tasks)
    self.turns = self.turns_before(self.end)
    self.inputs = [n for n in INPUTS if n in refs]
    self.parameters = [n for n in PARAMETERS if n in refs]
    self.sums_so_far = 0

  def tiled(self) -> tuple[tuple[int, ...], Any]:
    """The shape of a tile, and where the threads have it."""
    config = self.config
    return (config.rows, config.width), layouts.of_rows(
      config.width, self.case.vector
    )

  def cast(self, value: Tile, layout: Any = None) -> Tile:
    """The interpreter knows no layouts."""
    if self.interpret:
      return value
    return gpu.layout_cast(value, self.layout if layout is None else layout)

  def narrow(self, value: Tile, dtype: Any) -> Tile:
    """Rounded to a dtype; XLA, which interprets, would leave out the casts."""
    info = jnp.finfo(dtype)
    if info.bits >= jnp.finfo(value.dtype).bits:
      return value
    if self.interpret:
      return lax.reduce_precision(value, info.nexp, info.nmant)
    return value.astype(dtype).astype(value.dtype)

  def normalized(self, xhat: Tile) -> Tile:
    """What the scale multiplies."""
    rounding = self.spec.rounding
    return xhat if rounding is None else self.narrow(xhat, rounding.normalized)

  def full(self, value: Any) -> Tile:
    """A tile of one number."""
    return self.cast(jnp.full(self.tile, value, jnp.float32))

  def turns_before(self, task: Any) -> Array:
    """How many of this warpgroup's tasks come before one."""
    turns = lax.div(task - self.first + (self.step - 1), self.step)
    return jnp.maximum(turns, 0)

  def start(self) -> None:
    """The first tiles of the ring are on their way."""

    def fetch(index: Array, _: Any) -> None:
      self.fetch(index)

    lax.fori_loop(0, self.config.stages, fetch, None)

  def hold(self) -> None:
    """Has the parameters of the set brought, if they are to be held."""
    if not self.config.holds_parameters:
      return

    @pl.when(self.group == 0)
    def _() -> None:
      for name in self.parameters:
        held = self.refs[f'{name} held']
        of = self.refs[name].at[self.set, self.at.share(held.shape[0])]
        gpu.copy_gmem_to_smem(of, held, self.at.barrier(self.refs['loaded']))

  def wait_held(self) -> None:
    """Until what `hold` has brought is there."""
    if self.config.holds_parameters:
      gpu.barrier_wait(self.at.barrier(self.refs['loaded']))

  def fetch(self, index: Array) -> None:
    """Has a tile brought, of all this warpgroup's the so-manieth."""

    @pl.when(index < self.turns * self.config.tiles)
    def _() -> None:
      turn = lax.div(index, self.config.tiles)
      block = lax.rem(index, self.config.tiles)
      slot = lax.rem(index, self.config.stages)

      def run(arrived: Any) -> None:
        for name in self.inputs:
          ring = self.refs[f'{name} ring'].at[self.group, slot]
          self.bring(self.refs[name], ring, turn, block, arrived)

      self.with_barrier(slot, run)

  def bring(
    self, array: Any, tile: Any, turn: Any, block: Any, arrived: Any
  ) -> None:
    """Has a part of an array brought."""
    if flat.is_flat(self.plan):
      self.flat_rows(turn, block).fetch(array, tile, arrived)
      return
    for of, to in self.places(array, tile, turn, block):
      gpu.copy_gmem_to_smem(of, to, arrived)

  def send(self, array: Any, tile: Any, turn: Any, block: Any) -> None:
    """Has a tile written to an array."""
    if flat.is_flat(self.plan):
      self.flat_rows(turn, block).send(array, tile, self.interpret)
      return
    for to, of in self.places(array, tile, turn, block):
      gpu.copy_smem_to_gmem(of, to, commit_group=False)

  def flat_rows(self, turn: Any, block: Any) -> flat.Rows:
    """Where a tile lies in arrays of one axis."""
    task, number = self.task(turn), self.number(block)
    return flat.Rows(self.config, self.plan, task, number)

  def with_barrier(self, slot: Array, run: Callable[[Any], None]) -> None:
    """Runs what needs the barrier of a tile of this warpgroup's ring."""
    config = self.config
    each = config.groups_an_array
    place = lax.rem(self.group, each) * config.stages + slot
    for index in range(config.barrier_arrays):
      count = min(config.warpgroups, each) * config.stages
      barrier = self.at.barrier(self.refs[f'arrived {index}'], place, count)
      if config.barrier_arrays == 1:
        run(barrier)
      else:
        mine = lax.div(self.group, each) == index
        pl.when(mine)(functools.partial(run, barrier))

  def number(self, block: Any) -> Any:
    """Of a row's tiles, which is this warpgroup's so-manieth."""
    number, config = self.own_number(block), self.config
    if config.members > 1:
      number += self.at.member * (config.tiles * config.warpgroups)
    return number

  def own_number(self, block: Any) -> Any:
    """Of those of the tiles that this program has."""
    if not self.config.is_shared:
      return block
    return block * self.config.warpgroups + self.group

  def places(
    self, array: Any, tile: Any, turn: Any, block: Any
  ) -> list[tuple[Any, Any]]:
    """Pairs of what is copied: parts of an array, and of a tile."""
    number, (height, width) = self.number(block), self.tile
    sets, task = self.plan.sets, self.task(turn)
    if not self.config.is_shared:
      columns = pl.ds(number * width, width)
      if sets.number == 1:
        return [(array.at[pl.ds(task * height, height), columns], tile)]
      of_set = lax.div(task, self.plan.of_set)
      some = pl.ds((task - of_set * self.plan.of_set) * height, height)
      at = (some, of_set) if sets.is_apart else (of_set, some)
      return [(array.at[(*at, columns)], tile)]
    row = self.row(task)
    if len(self.plan.shape) == 3:
      return [(array.at[row, pl.ds(number * height, height)], tile)]
    return [
      (
        array.at[row, pl.ds((number * height + piece) * width, width)],
        tile.at[piece],
      )
      for piece in range(height)
    ]

  def task(self, turn: Any) -> Any:
    """This warpgroup's so-manieth, of all."""
    return self.first + turn * self.step

  def row(self, task: Any) -> Any:
    """Where the one row of a task lies."""
    sets = self.plan.sets
    if not sets.is_apart:
      return task
    of_set = lax.div(task, sets.rows)
    return sets.row(of_set, task - of_set * sets.rows)

  def load(self, name: str, turn: Any, block: Any) -> Tile:
    """A tile of an input, which has arrived, in float32."""
    slot = lax.rem(turn * self.config.tiles + block, self.config.stages)
    ring, at = self.refs[f'{name} ring'], (self.group, slot)
    return self.get(ring, at).astype(jnp.float32)

  def get(self, ref: Any, index: Any) -> Tile:
    """A tile that lies in shared memory."""
    return self.part(ref, index, self.layout)

  def wait(self, turn: Any) -> None:
    """Until the tiles of a task are there."""

    def one(block: Any, _: Any) -> None:
      index = turn * self.config.tiles + block
      self.with_barrier(lax.rem(index, self.config.stages), gpu.barrier_wait)

    self.each(one, None)

  def each(self, body: Callable[..., Any], carry: Any) -> Any:
    """`body(block, carry)` for the tiles of a task."""
    tiles = self.config.tiles
    if tiles > UNROLLED:
      return lax.fori_loop(0, tiles, body, carry)
    for block in range(tiles):
      carry = body(jnp.int32(block), carry)
    return carry

  def parameter(self, name: str, block: Any) -> Tile | None:
    """A tile of scale or bias, in float32."""
    if name not in self.refs:
      return None
    number, layout = self.number(block), self.layout
    if not self.config.is_shared:
      layout = layout.reduce(0)
    at, held = (self.set, number), name
    if self.config.holds_parameters:
      at, held = self.own_number(block), f'{name} held'
    value = self.part(self.refs[held], at, layout).astype(jnp.float32)
    if not self.config.is_shared:
      value = self.cast(lax.broadcast_in_dim(value, self.tile, (1,)))
    return value

  def part(self, ref: Any, index: Any, layout: Any) -> Tile:
    """What lies at an index of an array or of shared memory."""
    if self.interpret:
      return ref[index]
    options = {'layout': layout, 'optimized': False}
    load: Any = gpu.load
    if IS_INDEXED:
      return load(ref, index, **options)
    return load(ref.at[index], **options)

  def set_part(self, ref: Any, index: Any, value: Array) -> None:
    """The reverse; JAX 0.12 asks for whole sectors unless told."""
    store: Any = getattr(gpu, 'store', None)
    if self.interpret or store is None:
      ref[index] = value
    else:
      store(ref.at[index], value, optimized=False)

  def affine(self, block: Any) -> rows.Parameters:
    """Tiles of scale and bias."""
    return rows.Parameters(*(self.parameter(n, block) for n in PARAMETERS))

  def masked(self, value: Tile, block: Any) -> Tile:
    """Zero beyond the row."""
    config, size = self.config, self.case.size
    if config.row_width == size:
      return value
    axes = [
      self.cast(lax.broadcasted_iota(jnp.int32, self.tile, axis))
      for axis in range(2)
    ]
    at = axes[1] + self.number(block) * config.width
    if config.is_shared:
      first = self.number(block) * (config.rows * config.width)
      at = axes[0] * config.width + axes[1] + first
    # One comparison of what lies side by side in a thread: fewer registers.
    last = math.gcd(size, self.case.vector) - 1
    return jnp.where((at | last) < size, value, self.full(0))

  def added(self, turn: Any, *values: Tile) -> list[Array]:
    """Sums over each row: an array of them, or the one of a shared row."""
    sums = [jnp.sum(value, 1) for value in values]
    if not self.config.is_shared:
      return sums
    # Each warpgroup writes what it has, and reads what all have, in one of two
    # buffers, of which the other may still be read.
    height = self.config.rows
    buffer = lax.rem(turn * self.meetings + self.sums_so_far, 2)
    self.sums_so_far += 1
    parts, of_each = self.at.parts(self.refs['parts'])
    for index, value in enumerate(sums):

      def write(number: Any, index: int = index, value: Array = value) -> None:
        for of_member in of_each:
          of_member[buffer, index, pl.ds(number * height, height)] = value

      self.at.by_number(write)
    self.meet()
    layout = layouts.of_all()
    return [
      jnp.sum(self.part(parts, (buffer, index), layout))
      for index in range(len(sums))
    ]

  def meet(self) -> None:
    """All warpgroups come here before one goes on."""
    self.at.meet(self.refs['met'])

  def spread(self, value: Array) -> Tile:
    """One number a row, or one, to all of a tile."""
    if self.config.is_shared:
      return self.cast(jnp.broadcast_to(value, self.tile))
    return self.cast(lax.broadcast_in_dim(value, self.tile, (0,)))

  def write(self, turn: Any, block: Any, values: dict[str, Tile]) -> None:
    """Sends tiles of the results off, and has the next ones brought."""
    index = turn * self.config.tiles + block
    slot = lax.rem(index, OUTPUT_TILES)
    gpu.wait_smem_to_gmem(OUTPUT_TILES - 1, wait_read_only=True)
    for name, value in values.items():
      ring = self.refs[f'{name} out']
      self.put(ring.at[self.group, slot], value.astype(ring.dtype))
    gpu.commit_smem()
    for name in values:
      tile = self.refs[f'{name} out'].at[self.group, slot]
      self.send(self.refs[name], tile, turn, block)
    gpu.commit_smem_to_gmem_group()
    self.fetch(index + self.config.stages)

  def put(self, ref: Any, value: Tile) -> None:
    """Stores a tile in shared memory."""
    ref[...] = value

  def write_statistics(self, turn: Any, values: Any) -> None:
    """Those of a task, where they are wanted."""
    task = self.task(turn)
    row = self.row(task)
    for name, value in zip(rows.statistics(self.spec), values, strict=True):
      if name in self.refs:
        if not self.config.is_shared:
          self.set_part(self.refs[name], task, value)
          continue

        @pl.when(self.at.is_first)
        def _(name: str = name, value: Array = value) -> None:
          self.refs[name][row] = value

  def run(
    self,
    body: Callable[..., Any],
    carry: Callable[[], Any],
    finish: Callable[[Any], None],
    meetings: int,
  ) -> None:
    """`body(turn, carry)` for each task, with so many sums of all in each.

    The carry starts and is finished with each set.
    """
    self.meetings = meetings
    sets, of_set = self.plan.sets, self.plan.of_set

    def one(turn: Any, carry: Any) -> Any:
      self.sums_so_far = 0
      self.wait(turn)
      return body(turn, carry)

    def each(index: Any, _: Any) -> None:
      self.set = index
      self.meet()  # what is held of the last set is read no more
      self.hold()
      self.wait_held()
      first = self.turns_before(jnp.maximum(index * of_set, self.begin))
      end = jnp.minimum((index + 1) * of_set, self.end)
      turns = first, self.turns_before(end)
      finish(lax.fori_loop(*turns, one, carry()))

    if sets.number == 1:
      self.hold()
    self.start()
    if sets.number == 1:
      self.wait_held()
      finish(lax.fori_loop(0, self.turns, one, carry()))
    else:
      last = lax.div(self.end - 1, of_set)
      lax.fori_loop(lax.div(self.begin, of_set), last + 1, each, None)
    gpu.wait_smem_to_gmem(0)
