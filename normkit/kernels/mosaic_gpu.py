"""Norms on Hopper and Blackwell: a row is read once, into shared memory.

Programs stay and take row after row. Asynchronous copies bring the next rows,
tile by tile, into a ring of each warpgroup, while a row is worked on. Short
rows lie in the lanes of a warp, several at a time; longer ones in a warpgroup,
or in several. Pallas, lowered to Mosaic GPU.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
import jax.numpy as jnp

from normkit._types import Array
from normkit.kernels import configs, mosaic_groups, rows
from normkit.kernels.configs import OUTPUT_TILES, PIECE, Case, Config
from normkit.kernels.launch import capability, launch, padded
from normkit.kernels.rows import Spec
from normkit.kernels.warpgroups import (
  INPUTS,
  OUTPUTS,
  PARAMETERS,
  Arrays,
  Statistics,
  Tile,
  Work,
  store_sum,
)


@functools.partial(
  jax.jit, static_argnames=('spec', 'with_statistics', 'interpret')
)
def forward(
  given: Arrays,
  spec: Spec,
  with_statistics: bool = False,
  interpret: bool = False,
) -> Arrays:
  """The norm of each row or group; see `normkit.kernels.triton.forward`."""
  if spec.groups is not None:
    return mosaic_groups.forward(given, spec, with_statistics, interpret)
  x = given['x']
  results = {'y': spec.dtype}
  if 'residual' in given:
    results['total'] = x.dtype
  stats = rows.statistics(spec) if with_statistics else ()
  found = _call(_forward, given, results, (), stats, spec, interpret)
  sets = (*x.shape[:-1], 1)
  return {
    n: a.reshape(sets if n in stats else x.shape) for n, a in found.items()
  }


@functools.partial(jax.jit, static_argnames=('spec', 'wanted', 'interpret'))
def backward(
  given: Arrays, spec: Spec, wanted: tuple[str, ...], interpret: bool = False
) -> Arrays:
  """Gradients of the norm; see `normkit.kernels.triton.backward`."""
  if spec.groups is not None:
    return mosaic_groups.backward(given, spec, wanted, interpret)
  x = given['x']
  sums = tuple(name for name in wanted if name != 'dx')
  found = _call(_backward, given, {'dx': x.dtype}, sums, (), spec, interpret)
  return {n: a.reshape(x.shape) if n == 'dx' else a for n, a in found.items()}


def _call(
  body: Callable[..., None],
  given: Arrays,
  results: dict[str, Any],
  sums: tuple[str, ...],
  stats: tuple[str, ...],
  spec: Spec,
  interpret: bool,
) -> Arrays:
  """Runs a kernel on x as rows; sums over these come as one row."""
  x = given['x']
  size = x.shape[-1]
  count = x.size // size
  inputs = {n: given[n] for n in INPUTS if n in given}
  used = PARAMETERS if body is _forward or spec.activation else PARAMETERS[:1]
  parameters = {n: given[n] for n in used if n in given}
  case = Case(
    size,
    tuple(a.dtype for a in inputs.values()),
    tuple(results.values()),
    tuple(a.dtype for a in parameters.values()),
    len(sums),
  )
  chip = capability()
  config = configs.config(case, chip)
  assert config is not None
  plan = _plan(case, config, chip, count, interpret)
  arguments = {n: _rows_of(a, plan) for n, a in inputs.items()}
  arguments |= {
    n: padded(a, (config.row_width,)).reshape(plan.tiles)
    for n, a in parameters.items()
  }
  each = (count,) if config.is_shared else (plan.tasks, config.rows)
  partial = (plan.programs, *plan.tiles)
  outs = {n: rows.result(x, plan.shape, d) for n, d in results.items()}
  outs |= dict.fromkeys(stats, rows.result(x, each, jnp.float32))
  outs |= dict.fromkeys(sums, rows.result(x, partial, jnp.float32))
  scratch = _scratch(case, config, arguments, outs, sums)

  def run(refs: Arrays) -> None:
    turns = plan.shape, plan.tasks, plan.programs
    body(Work(refs, config, case, *turns, spec, interpret))

  name = f'normkit{body.__name__}'
  size_of_grid = plan.programs, config.warpgroups
  named = launch(run, name, arguments, outs, scratch, *size_of_grid, interpret)
  for name in results:
    named[name] = named[name].reshape(plan.filled)[:count, :size]
  for name in stats:
    named[name] = named[name].reshape(-1)[:count]
  for name in sums:
    parts = named[name].reshape(plan.programs, -1)
    named[name] = parts[:, :size].sum(0)
  return named


class Plan(NamedTuple):
  """How rows lie in arrays, and who takes them.

  Attributes:
    height: how many rows.
    size: of a row.
    filled: rows and their width, with what an asynchronous copy asks for.
    shape: of the arrays of rows.
    tiles: of the arrays of scale and bias, and of sums over rows.
    tasks: rows, one or some, that a warpgroup or a program takes together.
    programs: that take them in turn.
  """

  height: int
  size: int
  filled: tuple[int, int]
  shape: tuple[int, ...]
  tiles: tuple[int, ...]
  tasks: int
  programs: int


def _plan(
  case: Case, config: Config, chip: int, count: int, interpret: bool
) -> Plan:
  """For so many rows.

  An asynchronous copy fills up with zeros, and leaves out, what lies beyond an
  array; rows of a multiple of 16 bytes are all that it asks. The interpreter
  asks for whole tiles.
  """
  tasks = pl.cdiv(count, config.rows_at_once)
  programs = config.resident * configs.CHIPS[chip].processors
  vector = 16 // min(jnp.dtype(d).itemsize for d in case.inputs + case.outputs)
  filled = count, pl.cdiv(case.size, vector) * vector
  if interpret:
    filled = tasks * config.rows_at_once, config.row_width
  tiles: tuple[int, ...] = (config.row_width // config.width, config.width)
  if config.is_shared:
    tiles = (tiles[0] // config.rows, config.rows, config.width)
  return Plan(
    count,
    case.size,
    filled,
    _viewed(filled, case.size, config),
    tiles,
    tasks,
    min(programs, pl.cdiv(tasks, config.workers)),
  )


def _rows_of(array: Array, plan: Plan) -> Array:
  """An array like x as rows, filled up."""
  whole = array.reshape(plan.height, plan.size)
  return padded(whole, plan.filled).reshape(plan.shape)


def _viewed(
  shape: tuple[int, int], size: int, config: Config
) -> tuple[int, ...]:
  """Rows, in pieces where each is a multiple of these."""
  if config.is_shared and size % PIECE == 0:
    return (shape[0], shape[1] // PIECE, PIECE)
  return shape


def _scratch(
  case: Case,
  config: Config,
  arguments: Arrays,
  outs: Arrays,
  sums: tuple[str, ...],
) -> Arrays:
  """Shared memory: rings, outputs on their way, parameters; and barriers."""
  groups, tile = config.warpgroups, (config.rows, config.width)
  found: Arrays = {}
  for name, a in arguments.items():
    if name in INPUTS:
      ring = (groups, config.stages, *tile)
      found[f'{name} ring'] = gpu.SMEM(ring, a.dtype)
    elif config.holds_parameters:
      found[f'{name} held'] = gpu.SMEM(a.shape, a.dtype)
  for name, a in outs.items():
    if name in OUTPUTS:
      found[f'{name} out'] = gpu.SMEM((groups, OUTPUT_TILES, *tile), a.dtype)
  if config.is_shared:
    parts = 2, 2, groups * config.rows
    found['parts'] = gpu.SMEM(parts, jnp.float32)
  elif sums:
    found['fold'] = gpu.SMEM((groups, *tile), jnp.float32)
  copies = len(case.inputs)
  if config.is_shared and case.size % PIECE:
    copies *= config.rows
  barriers = min(groups, config.groups_an_array) * config.stages
  for index in range(config.barrier_arrays):
    found[f'arrived {index}'] = gpu.Barrier(
      num_arrivals=copies, num_barriers=barriers
    )
  found['met'] = gpu.Barrier(num_arrivals=groups)
  if config.holds_parameters:
    found['loaded'] = gpu.Barrier(num_arrivals=len(case.parameters))
  return found


def _forward(work: Work) -> None:
  spec = work.spec

  def task(turn: Any, _: Any) -> None:
    def x(block: Any) -> Tile:
      value = work.load('x', turn, block)
      if 'residual' in work.refs:
        value = value + work.load('residual', turn, block)
      return value

    stats = Statistics(work, turn, x)

    def write(block: Any, _: Any) -> None:
      xhat = stats.standardized(block)
      values = {'y': rows.outputs(xhat, work.affine(block), spec)}
      if 'total' in work.refs:
        values['total'] = x(block)
      work.write(turn, block, values)

    work.each(write, None)
    work.write_statistics(turn, stats.values)

  work.run(task, None, 2 if spec.center else 1)


def _backward(work: Work) -> None:
  spec, config = work.spec, work.config
  size = work.case.size
  sums = tuple(n for n in ('dscale', 'dbias') if n in work.refs)

  def task(turn: Any, totals: Any) -> Any:
    def x(block: Any) -> Tile:
      return work.load('x', turn, block)

    def slopes(block: Any) -> tuple[Tile, Tile, Tile]:
      xhat = stats.standardized(block)
      g = rows.slope_of(
        work.load('dy', turn, block), xhat, work.affine(block), spec
      )
      scale = work.parameter('scale', block)
      h = g if scale is None else g * scale
      return xhat, g, work.masked(h, block)

    stats = Statistics(work, turn, x)

    def add(block: Any, found: Any) -> Any:
      xhat, _, h = slopes(block)
      slope = found[-1] + h * work.masked(xhat, block)
      return (found[0] + h, slope) if spec.center else (slope,)

    zeros = (work.full(0),) * (2 if spec.center else 1)
    *shift, slope = (
      work.spread(n / size) for n in work.added(turn, *work.each(add, zeros))
    )
    now = list[Any]()
    for index in range(config.tiles):
      block = jnp.int32(index)
      xhat, g, h = slopes(block)
      # Added now: later, xhat and g would take registers until then.
      terms = {'dscale': g * xhat, 'dbias': g}
      pairs = zip(sums, totals[index], strict=True)
      now.append(
        lax.optimization_barrier(tuple(t + terms[n] for n, t in pairs))
      )
      dx = h - xhat * slope
      dx = (dx - shift[0] if spec.center else dx) * stats.root
      if 'dtotal' in work.refs:
        dx = dx + work.load('dtotal', turn, block)
      work.write(turn, block, {'dx': dx})
    return tuple(now)

  zeros = tuple(tuple(work.full(0) for _ in sums) for _ in range(config.tiles))
  totals = work.run(task, zeros, 3 if spec.center else 2)
  for index in range(config.tiles):
    for name, total in zip(sums, totals[index], strict=True):
      store_sum(work, work.refs[name], index, total)
