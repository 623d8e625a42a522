"""Norms of groups of channels on Hopper and Blackwell, in shared memory.

A task is some groups, next to each other, of an example: a program brings it
into shared memory once, tile by tile, where the warpgroups read it for the
mean, for the squares about that, and for the result. A tile is (warps, places,
channels): the sums of a tile stay in a warp, and the warps of a program meet in
shared memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
import jax.numpy as jnp

from normkit._types import Array
from normkit.kernels import configs, rows
from normkit.kernels.clusters import Place
from normkit.kernels.configs import BUFFERS, WARPS, Config, Groups
from normkit.kernels.launch import capability, launch, rings
from normkit.kernels.plans import Sets, padded
from normkit.kernels.rows import Spec
from normkit.kernels.warpgroups import (
  INPUTS,
  PARAMETERS,
  Arrays,
  Tile,
  Work,
)

STEADY = 0.9  # of the programs, where the rest has nothing to do
STORE: Any = getattr(gpu, 'store', None)


def forward(
  given: Arrays,
  spec: Spec,
  with_statistics: bool = False,
  interpret: bool = False,
) -> Arrays:
  """The norm of each group; see `normkit.kernels.triton.forward`."""
  x = given['x']
  stats = rows.statistics(spec) if with_statistics else ()
  results = {'y': spec.dtype}
  found = _call(_forward, given, results, (), stats, spec, interpret)
  sets = len(x), *[1] * (x.ndim - 2), spec.groups
  return {n: a.reshape(sets) if n in stats else a for n, a in found.items()}


def backward(
  given: Arrays, spec: Spec, wanted: tuple[str, ...], interpret: bool = False
) -> Arrays:
  """Gradients of the norm; see `normkit.kernels.triton.backward`."""
  given = {n: a for n, a in given.items() if n != 'bias'}
  sums = tuple(name for name in wanted if name != 'dx')
  results = {'dx': given['x'].dtype}
  return _call(_backward, given, results, sums, (), spec, interpret)


class Plan(NamedTuple):
  """How an array (batch, places, channels) is parted.

  Attributes:
    shape: of it, filled up.
    bundles: of groups, next to each other, that are taken together.
    tasks: of all examples.
    programs: that take them in turn.
    is_steady: whether each has the same channels of all its examples.
  """

  shape: tuple[int, int, int]
  bundles: int
  tasks: int
  programs: int
  is_steady: bool

  @property
  def sets(self) -> Sets:
    """One, that all tasks are of."""
    return Sets(1, self.tasks)

  @property
  def of_set(self) -> int:
    """The tasks of that."""
    return self.tasks


def _plan(
  case: Groups, config: Config, batch: int, has_sums: bool, interpret: bool
) -> Plan:
  """The interpreter asks for whole tiles, a copy for multiples of 16 bytes."""
  channels = case.size * case.count
  bundles = pl.cdiv(channels, config.width)
  shape = batch, case.places, channels
  if channels * min(case.itemsizes) % 16 or interpret:
    places = config.row_width // config.width if interpret else case.places
    shape = batch, places, bundles * config.width
  tasks = batch * bundles
  chip = configs.CHIPS[capability()]
  programs = min(config.clusters(chip), tasks)
  steady = programs - programs % bundles
  is_steady = has_sums and steady >= STEADY * programs
  programs = steady if is_steady else programs
  return Plan(shape, bundles, tasks, programs, is_steady)


def _call(
  body: Callable[[Any], None],
  given: Arrays,
  results: dict[str, Any],
  sums: tuple[str, ...],
  stats: tuple[str, ...],
  spec: Spec,
  interpret: bool,
) -> Arrays:
  """Runs a kernel; sums over examples come as one number a channel."""
  x = given['x']
  inputs = {n: given[n] for n in INPUTS if n in given}
  dtypes = [a.dtype for a in inputs.values()]
  assert spec.groups is not None
  case = configs.groups_of(x.shape, spec.groups, dtypes, results.values())
  config = configs.groups(case, capability())
  assert config is not None
  plan = _plan(case, config, len(x), bool(sums), interpret)
  whole = len(x), case.places, x.shape[-1]
  wide = plan.bundles * config.width
  arguments = {
    n: padded(a.reshape(whole), plan.shape) for n, a in inputs.items()
  }
  arguments |= {
    n: padded(given[n], (wide,)).reshape(plan.bundles, config.width)
    for n in PARAMETERS
    if n in given
  }
  outs = {n: rows.result(x, plan.shape, d) for n, d in results.items()}
  each = plan.tasks, config.width // case.size
  outs |= dict.fromkeys(stats, rows.result(x, each, jnp.float32))
  scratch = rings(config, arguments, outs, len(inputs))
  team = config.members * config.warpgroups
  parts = BUFFERS, BUFFERS, team, WARPS, config.width
  scratch['parts'] = gpu.SMEM(parts, jnp.float32)
  each = plan.programs if plan.is_steady else plan.tasks, config.width
  outs |= dict.fromkeys(sums, rows.result(x, each, jnp.float32))

  def run(refs: Arrays, at: Place) -> None:
    body(GroupWork(refs, at, case, plan, spec, interpret))

  found = launch(
    run,
    f'normkit{body.__name__}_of_groups',
    arguments,
    outs,
    scratch,
    plan.programs,
    config,
    interpret,
  )
  for name in results:
    found[name] = found[name][:, : whole[1], : whole[2]].reshape(x.shape)
  for name in stats:
    found[name] = found[name].reshape(len(x), -1)[:, : case.count]
  for name in sums:
    found[name] = found[name].reshape(-1, wide).sum(0)[: whole[2]]
  return found


class GroupWork(Work):
  """What a warpgroup has at hand for groups of channels."""

  def __init__(
    self,
    refs: Arrays,
    at: Place,
    case: Groups,
    plan: Plan,
    spec: Spec,
    interpret: bool,
  ) -> None:
    self.of = case
    super().__init__(refs, at, case, plan, spec, interpret)
    self.of_channels = self.layout.reduce((0, 1))

  def tiled(self) -> tuple[tuple[int, ...], Any]:
    """Places in the lanes of a warp, in vectors of 16 bytes at most."""
    lanes, vector = self.of.lanes(self.config.width)
    high, most = 32 // lanes, lanes * vector
    if lanes == 1:
      tiling = gpu.Tiling(((WARPS, high, most),))
      layout = gpu.Layout.TILED(tiling, (-3,), (-2,), -1)
    else:
      tiling = gpu.Tiling(((WARPS, high, most), (vector,)))
      layout = gpu.Layout.TILED(tiling, (-4,), (-3, -2), -1)
    config = self.config
    return (WARPS, config.rows // WARPS, config.width), layout

  def get(self, ref: Any, index: Any) -> Tile:
    """A tile (places, channels) in shared memory, by the warps that take it."""
    if self.interpret:
      return ref[index].reshape(self.tile)
    return self.part(ref.at[index].reshape(self.tile), (), self.layout)

  def put(self, ref: Any, value: Tile) -> None:
    """Stores such a tile."""
    if self.interpret:
      ref[...] = value.reshape(ref.shape)
    else:
      self.store(ref.reshape(self.tile), value)

  def store(self, ref: Any, value: Array) -> None:
    """JAX 0.12 asks for whole lines of 128 bytes, unless told."""
    if self.interpret or STORE is None:
      ref[...] = value
    else:
      STORE(ref, value, optimized=False)

  def places(
    self, array: Any, tile: Any, turn: Any, block: Any
  ) -> list[tuple[Any, Any]]:
    """A part of an array, and a tile."""
    height, width = self.config.rows, self.config.width
    task = self.task(turn)
    example = lax.div(task, self.plan.bundles)
    bundle = lax.rem(task, self.plan.bundles)
    at = (
      example,
      pl.ds(self.number(block) * height, height),
      pl.ds(bundle * width, width),
    )
    return [(array.at[at], tile)]

  def channels(self, name: str, turn: Any) -> Array | None:
    """Scale or bias of a task's channels."""
    if name not in self.refs:
      return None
    bundle = lax.rem(self.task(turn), self.plan.bundles)
    part: Array = self.part(self.refs[name], bundle, self.of_channels)
    return part.astype(jnp.float32)

  def masked(self, value: Tile, block: Any) -> Tile:
    """Zero beyond the places of an example."""
    config, places = self.config, self.of.places
    if config.row_width == places * config.width:
      return value
    warp, place = (
      self.cast(lax.broadcasted_iota(jnp.int32, self.tile, axis))
      for axis in range(2)
    )
    first = self.number(block) * config.rows
    at = warp * self.tile[1] + place + first
    return jnp.where(at < places, value, self.full(0))

  def added(self, turn: Any, *values: Tile) -> list[Array]:
    """Sums over the places of a task, one for each channel."""
    buffer = lax.rem(turn * self.meetings + self.sums_so_far, BUFFERS)
    self.sums_so_far += 1
    parts, of_each = self.at.parts(self.refs['parts'])
    for index, value in enumerate(values):
      found = jnp.sum(value, 1)
      for of_member in of_each:
        self.store(of_member.at[buffer, index, self.at.number], found)
    self.meet()

    def total(index: int, member: Any) -> Array:
      first = member * self.config.warpgroups
      found = [
        self.part(parts, (buffer, index, first + group, warp), self.of_channels)
        for group in range(self.config.warpgroups)
        for warp in range(WARPS)
      ]
      return rows.added(found)

    return self.at.added(total, len(values))

  def mean(self, sums: Array) -> Array:
    """From sums of channels to the mean of the group of each, or of all."""
    size, width = self.of.size, self.config.width
    count = self.of.places * size
    if size == width:
      return jnp.sum(sums) / count
    if size > 1:
      total = sums
      for index in range(min(width // size, self.of.count)):
        is_member = lax.div(self.columns(), size) == index
        total = jnp.where(is_member, self.total(sums, is_member), total)
      sums = total
    return sums / count

  def of_group(self, value: Array, index: int) -> Array:
    """What the channels of a group have in common."""
    if value.ndim == 0:
      return value
    return self.total(value, self.columns() == index * self.of.size)

  def total(self, values: Array, inside: Array) -> Array:
    """Of some channels."""
    zero = self.cast(jnp.zeros(values.shape, jnp.float32), self.of_channels)
    return jnp.sum(jnp.where(inside, values, zero))

  def columns(self) -> Array:
    """The number of each channel in the tile."""
    found = lax.broadcasted_iota(jnp.int32, (self.config.width,), 0)
    columns: Array = self.cast(found, self.of_channels)
    return columns

  def spread(self, value: Array) -> Tile:
    """One number, or one a channel, to all of a tile."""
    if value.ndim == 0:
      return self.cast(jnp.broadcast_to(value, self.tile))
    return self.cast(lax.broadcast_in_dim(value, self.tile, (2,)))

  def write_sums(self, index: Any, sums: Arrays) -> None:
    """Of the channels of a task, or of a program."""

    @pl.when(self.at.is_first)
    def _() -> None:
      for name, value in sums.items():
        self.store(self.refs[name].at[index], value)

  def write_statistics(self, turn: Any, values: Any) -> None:
    """Of the groups of a task, where they are wanted."""
    names = rows.statistics(self.spec)
    if names[0] not in self.refs:
      return
    task, size = self.task(turn), self.of.size

    @pl.when(self.at.is_first)
    def _() -> None:
      for name, value in zip(names, values, strict=True):
        if size == 1:
          self.store(self.refs[name].at[task], value)
          continue
        for index in range(self.config.width // size):
          self.refs[name][task, index] = self.of_group(value, index)


class Statistics:
  """Of a task: the mean, then squares about it, and what it lost in rounding.

  Each is one number, or one a channel.
  """

  def __init__(self, work: GroupWork, turn: Any) -> None:
    self.work, self.turn = work, turn
    self.center = work.spec.center
    if self.center:

      def add(block: Any, total: Tile) -> Tile:
        return total + work.load('x', turn, block)

      (total,) = work.added(turn, work.each(add, work.full(0)))
      self.pivot = work.mean(total)

    def squares(block: Any, sums: Any) -> Any:
      d = work.masked(self.distance(block), block)
      square = sums[-1] + d * d
      return (sums[0] + d, square) if self.center else (square,)

    zeros = (work.full(0),) * (2 if self.center else 1)
    *sums, square = work.added(turn, *work.each(squares, zeros))
    var = work.mean(square)
    self.values: tuple[Array, ...] = (var,)
    if self.center:
      self.offset = work.mean(sums[0])
      var = jnp.maximum(var - self.offset * self.offset, 0)
      self.values = self.pivot, self.offset, var
    self.root = rows.root_of(var, work.spec.epsilon)

  def distance(self, block: Any) -> Tile:
    """From the pivot."""
    x = self.work.load('x', self.turn, block)
    return x - self.work.spread(self.pivot) if self.center else x


def _forward(work: GroupWork) -> None:
  spec = work.spec

  def task(turn: Any, _: Any) -> None:
    scale, bias = (work.channels(n, turn) for n in PARAMETERS)
    stats = Statistics(work, turn)
    work.write_statistics(turn, stats.values)
    # From the distance to the pivot, what remains is one product and one sum.
    factor = stats.root if scale is None else stats.root * scale
    if spec.center:
      rest = stats.offset * factor
      bias = -rest if bias is None else bias - rest

    def write(block: Any, _: Any) -> None:
      parts = (None if p is None else work.spread(p) for p in (factor, bias))
      y = rows.outputs(stats.distance(block), rows.Parameters(*parts), spec)
      work.write(turn, block, {'y': y})

    work.each(write, None)

  meetings = 2 if spec.center else 1
  work.run(task, lambda: None, lambda _: None, meetings)


def _backward(work: GroupWork) -> None:
  center = work.spec.center
  names = [n for n in ('dscale', 'dbias') if n in work.refs]

  def task(turn: Any, totals: Arrays) -> Arrays:
    scale = work.channels('scale', turn)
    stats = Statistics(work, turn)
    root = stats.root

    def add(block: Any, sums: Any) -> Any:
      dy = work.load('dy', turn, block)
      return sums[0] + dy, sums[1] + dy * stats.distance(block)

    none = work.full(0), work.full(0)
    dbias, dscale = work.added(turn, *work.each(add, none))
    dscale = (dscale - stats.offset * dbias if center else dscale) * root
    found = {'dscale': dscale, 'dbias': dbias}
    found = {n: found[n] for n in names}
    if work.plan.is_steady:
      totals = {n: totals[n] + found[n] for n in names}
    else:
      work.write_sums(work.task(turn), found)
    slope, shift = (
      work.mean(d if scale is None else d * scale) for d in (dscale, dbias)
    )
    slope = slope * root
    if center:
      shift = shift - stats.offset * slope

    def write(block: Any, _: Any) -> None:
      h = work.load('dy', turn, block)
      h = h if scale is None else h * work.spread(scale)
      h = h - stats.distance(block) * work.spread(slope)
      h = h - work.spread(shift) if center else h
      work.write(turn, block, {'dx': h * work.spread(root)})

    work.each(write, None)
    return totals

  def zeros() -> Arrays:
    zero = jnp.zeros(work.config.width, jnp.float32)
    return {n: work.cast(zero, work.of_channels) for n in names}

  def store(totals: Arrays) -> None:
    if work.plan.is_steady:
      work.write_sums(work.program, totals)

  work.run(task, zeros, store, 3 if center else 2)
