"""Norms on Hopper and Blackwell: a row is read once, into shared memory.

Programs stay and take row after row. Asynchronous copies bring the next rows,
tile by tile, into a ring of each warpgroup, while a row is worked on. Short
rows lie in the lanes of a warp, several at a time; longer ones in a warpgroup,
or in several. Pallas, lowered to Mosaic GPU.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
import jax.numpy as jnp

from normkit._types import Array
from normkit.kernels import (
  activations,
  configs,
  flat,
  mosaic_groups,
  plans,
  rows,
)
from normkit.kernels.clusters import Place
from normkit.kernels.configs import PIECE, Case, Config
from normkit.kernels.launch import capability, launch, rings
from normkit.kernels.rows import Spec
from normkit.kernels.warpgroups import (
  INPUTS,
  OUTPUTS,
  PARAMETERS,
  Arrays,
  Tile,
  Work,
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
  return _call(_forward, given, results, (), stats, spec, interpret)


@functools.partial(jax.jit, static_argnames=('spec', 'wanted', 'interpret'))
def backward(
  given: Arrays, spec: Spec, wanted: tuple[str, ...], interpret: bool = False
) -> Arrays:
  """Gradients of the norm; see `normkit.kernels.triton.backward`."""
  if spec.groups is not None:
    return mosaic_groups.backward(given, spec, wanted, interpret)
  x = given['x']
  sums = tuple(name for name in wanted if name not in OUTPUTS)
  results = {name: x.dtype for name in wanted if name in OUTPUTS}
  return _call(_backward, given, results, sums, (), spec, interpret)


def _call(
  body: Callable[..., None],
  given: Arrays,
  results: dict[str, Any],
  sums: tuple[str, ...],
  stats: tuple[str, ...],
  spec: Spec,
  interpret: bool,
) -> Arrays:
  """Runs a kernel on x as rows."""
  x = given['x']
  shapes = {n: given[n].shape for n in PARAMETERS if n in given}
  sets = plans.sets_of(x.shape, *shapes.values())
  assert sets is not None
  inputs = {n: given[n] for n in INPUTS if n in given}
  used = PARAMETERS if body is _forward or spec.activation else PARAMETERS[:1]
  parameters = {n: given[n] for n in used if n in given}
  case = Case(
    x.shape[-1],
    tuple(a.dtype for a in inputs.values()),
    tuple(results.values()),
    tuple(a.dtype for a in parameters.values()),
    len(sums),
    sets.number > 1,
    spec.activation is not None or spec.gate is not None,
  )
  chip = capability()
  config = configs.config(case, chip)
  assert config is not None
  plan = plans.plan(case, config, chip, sets, interpret)
  arguments = {n: plan.rows_of(a) for n, a in inputs.items()}
  arguments |= {
    n: plan.parameter(a, config.row_width) for n, a in parameters.items()
  }
  each = (plan.tasks,) if config.is_shared else (plan.tasks, config.rows)
  partial = (sets.number, plan.parts, *plan.tiles)
  outs = {n: rows.result(x, plan.shape, d) for n, d in results.items()}
  outs |= dict.fromkeys(stats, rows.result(x, each, jnp.float32))
  outs |= dict.fromkeys(sums, rows.result(x, partial, jnp.float32))
  scratch = _scratch(case, config, plan, arguments, outs, sums)

  def run(refs: Arrays, at: Place) -> None:
    body(Work(refs, at, case, plan, spec, interpret))

  name = f'normkit{body.__name__}'
  grid = plan.programs, config
  named = launch(run, name, arguments, outs, scratch, *grid, interpret)
  found = {n: plan.like_x(named[n], x.shape) for n in results}
  found |= {n: plan.statistics(named[n], x.shape) for n in stats}
  like = {n: shapes.get(n[1:], x.shape[-1:]) for n in sums}
  return found | {n: plan.total(named[n], like[n]) for n in sums}


def _scratch(
  case: Case,
  config: Config,
  plan: plans.Plan,
  arguments: Arrays,
  outs: Arrays,
  sums: tuple[str, ...],
) -> Arrays:
  """Shared memory: rings, outputs on their way, parameters; and barriers."""
  groups, tile = config.warpgroups, (config.rows, config.width)
  copies = len(case.inputs)
  if flat.is_flat(plan) or (config.is_shared and case.size % PIECE):
    copies *= config.rows
  found = rings(config, arguments, outs, copies)
  if config.is_shared:
    parts = 2, 2, config.members * groups * config.rows
    found['parts'] = gpu.SMEM(parts, jnp.float32)
  elif sums:
    found['fold'] = gpu.SMEM((groups, *tile), jnp.float32)
  if config.holds_parameters:
    parameters = {n: a for n, a in arguments.items() if n in PARAMETERS}
    for name, a in parameters.items():
      held = a.shape[1] // config.members, *a.shape[2:]
      found[f'{name} held'] = gpu.SMEM(held, a.dtype)
    found['loaded'] = gpu.Barrier(num_arrivals=len(parameters))
  return found


class Statistics:
  """Of a task: mean and variance, from sums about the mean of a part."""

  def __init__(self, work: Work, turn: Any, x: Callable[[Any], Tile]) -> None:
    self.work, self.x = work, x
    config, size = work.config, work.case.size
    self.center = work.spec.center
    if self.center:
      (part,) = work.added(turn, work.masked(x(jnp.int32(0)), jnp.int32(0)))
      self.pivot = part / config.firsts(size)
    self.pivots = work.spread(self.pivot) if self.center else None

    def add(block: Any, sums: Any) -> Any:
      d = self.distance(block)
      squares = sums[-1] + d * d
      return (sums[0] + d, squares) if self.center else (squares,)

    zeros = (work.full(0),) * (2 if self.center else 1)
    *sums, squares = work.added(turn, *work.each(add, zeros))
    var = squares / size
    self.values: tuple[Array, ...] = (var,)
    if self.center:
      offset = sums[0] / size
      var = jnp.maximum(var - offset * offset, 0)
      self.values = self.pivot, offset, var
    root = rows.root_of(var, work.spec.epsilon)
    self.root = work.spread(root)
    self.offsets = work.spread(offset) if self.center else None

  def distance(self, block: Any) -> Tile:
    """From the pivot."""
    x = self.x(block)
    if self.center:
      x = x - self.pivots
    return self.work.masked(x, block)

  def standardized(self, block: Any) -> Tile:
    """Beyond the row it may be anything."""
    x = self.x(block)
    if self.center:
      x = (x - self.pivots) - self.offsets
    return x * self.root


def _forward(work: Work) -> None:
  spec = work.spec
  if spec.activation is not None:
    run = functools.partial(activations.value, spec.activation)
    spec = dataclasses.replace(spec, activation=run)
  is_gated_last = spec.gate is not None and spec.gate.is_last

  def task(turn: Any, _: Any) -> None:
    x = functools.partial(_input, work, turn)
    stats = Statistics(work, turn, x)

    def write(block: Any, _: Any) -> None:
      xhat, last = stats.standardized(block), spec
      if is_gated_last:
        run = functools.partial(_times_factor, work, turn, block)
        last = dataclasses.replace(spec, activation=run)
      y = rows.outputs(xhat, work.affine(block), last, work.narrow)
      values = {'y': y}
      if 'total' in work.refs:
        values['total'] = x(block)
      work.write(turn, block, values)

    work.each(write, None)
    work.write_statistics(turn, stats.values)

  meetings = 2 if spec.center else 1
  work.run(task, lambda: None, lambda _: None, meetings)


def _input(work: Work, turn: Any, block: Any) -> Tile:
  """What is normalized: x, its sum with a residual, or what a gate leaves."""
  value, spec = work.load('x', turn, block), work.spec
  if spec.gate is not None and not spec.gate.is_last:
    return _times_factor(work, turn, block, value)
  if 'residual' in work.refs:
    value = value + work.load('residual', turn, block)
    if spec.rounding is not None:
      value = work.narrow(value, work.case.inputs[0])
  return value


def _times_factor(work: Work, turn: Any, block: Any, value: Tile) -> Tile:
  """A value times what its gate multiplies by."""
  assert work.spec.gate is not None
  gate, run = work.load('gate', turn, block), work.spec.gate.activation
  return value * (gate if run is None else activations.value(run, gate))


def _backward(work: Work) -> None:
  config = work.config
  sums = tuple(n for n in ('dscale', 'dbias') if n in work.refs)

  def task(turn: Any, totals: Any) -> Any:
    stats = Statistics(work, turn, functools.partial(_input, work, turn))
    *shift, slope = _means(work, turn, stats)
    now = list[Any]()
    for index in range(config.tiles):
      block = jnp.int32(index)
      xhat, g, h = _slopes(work, turn, stats, block)
      # Added now: later, xhat and g would take registers until then.
      terms = {'dscale': g * work.normalized(xhat), 'dbias': g}
      pairs = zip(sums, totals[index], strict=True)
      now.append(
        lax.optimization_barrier(tuple(t + terms[n] for n, t in pairs))
      )
      dx = h - xhat * slope
      dx = (dx - shift[0] if work.spec.center else dx) * stats.root
      if 'dtotal' in work.refs:
        dx = dx + work.load('dtotal', turn, block)
      values = {'dx': dx}
      if work.spec.gate is not None:
        values = _gated(work, turn, block, xhat, dx)
      work.write(turn, block, values)
    return tuple(now)

  def zeros() -> Any:
    return tuple(tuple(work.full(0) for _ in sums) for _ in range(config.tiles))

  def store(totals: Any) -> None:
    for index in range(config.tiles):
      for name, total in zip(sums, totals[index], strict=True):
        _store_sum(work, work.refs[name], index, total)

  work.run(task, zeros, store, 3 if work.spec.center else 2)


def _slopes(
  work: Work, turn: Any, stats: Statistics, block: Any
) -> tuple[Tile, Tile, Tile]:
  """xhat, and the gradients of scale * xhat + bias and of xhat."""
  spec = work.spec
  xhat = stats.standardized(block)
  g = work.load('dy', turn, block)
  if spec.activation is not None:
    y = rows.affine(xhat, work.affine(block), spec, work.narrow)
    g = g * activations.slope(spec.activation, y)
  if spec.gate is not None and spec.gate.is_last:
    g = _times_factor(work, turn, block, g)
  scale = work.parameter('scale', block)
  h = g if scale is None else g * scale
  return xhat, g, work.masked(h, block)


def _means(work: Work, turn: Any, stats: Statistics) -> tuple[Tile, ...]:
  """Of the gradient of xhat, where the mean is subtracted, and of it * xhat."""

  def add(block: Any, found: Any) -> Any:
    xhat, _, h = _slopes(work, turn, stats, block)
    slope = found[-1] + h * work.masked(xhat, block)
    return (found[0] + h, slope) if work.spec.center else (slope,)

  zeros = (work.full(0),) * (2 if work.spec.center else 1)
  sums = work.added(turn, *work.each(add, zeros))
  return tuple(work.spread(n / work.case.size) for n in sums)


def _gated(
  work: Work, turn: Any, block: Any, xhat: Tile, dz: Tile
) -> dict[str, Tile]:
  """The gradients of x and the gate; `dz` is that of what is normalized."""
  gate = work.spec.gate
  assert gate is not None
  factor, slope = work.load('gate', turn, block), work.full(1)
  if gate.activation is not None:
    factor, slope = activations.with_slope(gate.activation, factor)
  if gate.is_last:
    y = rows.affine(xhat, work.affine(block), work.spec, work.narrow)
    values = {'dx': dz, 'dgate': work.load('dy', turn, block) * y * slope}
  else:
    x = work.load('x', turn, block)
    values = {'dx': dz * factor, 'dgate': dz * x * slope}
  return {n: value for n, value in values.items() if n in work.refs}


def _store_sum(work: Work, ref: Any, block: int, total: Tile) -> None:
  """A program's share of a sum over rows."""
  config, plan = work.config, work.plan
  slot = work.program
  if plan.sets.number > 1:
    slot = slot - lax.div(work.set * plan.of_set, plan.turns)
  if config.is_shared:
    ref[work.set, slot, work.number(block)] = total
    return
  fold = work.refs['fold']
  fold[work.group] = total
  work.meet()
  lanes = min(32, config.width)
  vector = min(4, config.width // lanes)
  layout = gpu.Layout.TILED(
    gpu.Tiling(((lanes * vector,), (vector,))),
    (gpu.Replicated(4),),
    (-2,) if lanes == 32 else (gpu.Replicated(32 // lanes), -2),
    -1,
  )

  @pl.when(work.group == 0)
  def _() -> None:
    def add(row: Any, total: Any) -> Any:
      parts = [
        work.part(fold, (group, row), layout)
        for group in range(config.warpgroups)
      ]
      return total + rows.added(parts)

    zero = work.cast(jnp.zeros(config.width, jnp.float32), layout)
    ref[work.set, slot, block] = lax.fori_loop(0, config.rows, add, zero)

  work.meet()
