"""Norms on NVIDIA GPUs: a row or group is read once, and stays in registers.

Programs take row after row, so that scale, bias and the sums over rows stay in
registers too; or each takes some groups of channels of one example. Pallas,
lowered to Triton.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from normkit._types import Array
from normkit.kernels import cases, rows
from normkit.kernels.cases import TRITON_WIDTH as WIDTH
from normkit.kernels.rows import Spec

# Of rows longer than a program holds at once it holds the first 12 pieces, all
# that fit without spills, and loads the others twice.
PIECE, HELD = 4096, 12
# Programs in flight: two for each of an H200's 132 multiprocessors, and one in
# the backward, where each writes out its sums over rows.
FORWARD, BACKWARD = 264, 132
# Elements of groups in one tile, and warps: with more of either, what just fits
# would spill.
GROUP_PIECE, GROUP_WARPS = 1024, 8
Arrays = dict[str, Any]


@functools.partial(
  jax.jit, static_argnames=('spec', 'with_statistics', 'interpret')
)
def forward(
  given: Arrays,
  spec: Spec,
  with_statistics: bool = False,
  interpret: bool = False,
) -> Arrays:
  """The norm of each row, or of each group of channels.

  Args:
    given: 'x', of two axes or more, and where there are any 'scale' and
      'bias', of one, and 'residual', which is added to the x of rows first.
    spec: the options.
    with_statistics: return them too.
    interpret: run it on any device, slowly.

  Returns:
    'y'; where there is a residual, 'total', the sum; and of each row or group
    the statistics: 'pivot' and 'offset', whose sum is the mean, and 'var'.
  """
  x = given['x']
  results = {'y': spec.dtype}
  if 'residual' in given:
    results['total'] = x.dtype
  count, size = x.size // x.shape[-1], x.shape[-1]
  shapes = {
    name: rows.result(x, (count, size), dtype)
    for name, dtype in results.items()
  }
  sets = (*x.shape[:-1], 1)
  if spec.groups is not None:
    sets = (len(x), *[1] * (x.ndim - 2), spec.groups)
  if with_statistics:
    one = rows.result(x, (math.prod(sets),), jnp.float32)
    shapes |= dict.fromkeys(rows.statistics(spec), one)
  if spec.groups is not None:
    found = _call_on_groups(_forward_of_groups, given, shapes, spec, interpret)
  else:
    body = _forward if size <= WIDTH else _forward_in_pieces
    found = _call_on_rows(body, FORWARD, given, shapes, spec, interpret)
  return {
    name: a.reshape(x.shape if a.ndim == 2 else sets)
    for name, a in found.items()
  }


@functools.partial(jax.jit, static_argnames=('spec', 'wanted', 'interpret'))
def backward(
  given: Arrays, spec: Spec, wanted: tuple[str, ...], interpret: bool = False
) -> Arrays:
  """Gradients of `forward`.

  Args:
    given: 'x', or the sum where there was a residual, 'dy' and, where there
      are any, 'scale', 'bias' and 'dtotal', the gradient of the sum.
    spec: the options.
    wanted: which gradients: 'dx', 'dscale', 'dbias'.
    interpret: run it on any device, slowly.

  Returns:
    What is wanted, 'dscale' and 'dbias' in float32.
  """
  x = given['x']
  count, size = x.size // x.shape[-1], x.shape[-1]
  shapes = {'dx': rows.result(x, (count, size), x.dtype)}
  programs = min(BACKWARD, pl.cdiv(count, _tile(size)[0]))
  parts = programs if spec.groups is None else len(x)
  partial = rows.result(x, (parts, size), jnp.float32)
  shapes |= {name: partial for name in wanted if name != 'dx'}
  if spec.groups is not None:
    found = _call_on_groups(_backward_of_groups, given, shapes, spec, interpret)
  else:
    found = _call_on_rows(_backward, programs, given, shapes, spec, interpret)
  sums = {n: a.sum(0) for n, a in found.items() if n != 'dx'}
  return {'dx': found['dx'].reshape(x.shape)} | sums


def _tile(size: int) -> tuple[int, int, int]:
  """Rows that a program takes at once, their width, and its warps."""
  width = max(min(pl.next_power_of_2(size), WIDTH), 16)
  height = max(2048 // width, 1)
  return height, width, min(max(height * width // 512, 4), 16)


def _call_on_rows(
  body: Callable[..., None],
  programs: int,
  given: Arrays,
  shapes: Arrays,
  spec: Spec,
  interpret: bool,
) -> Arrays:
  size = given['x'].shape[-1]
  count = given['x'].size // size
  height, _, warps = _tile(size)
  grid = (min(programs, pl.cdiv(count, height)),)
  run = functools.partial(body, count=count, size=size, spec=spec)
  return _call(run, body.__name__, grid, warps, given, shapes, interpret)


def _call_on_groups(
  body: Callable[..., None],
  given: Arrays,
  shapes: Arrays,
  spec: Spec,
  interpret: bool,
) -> Arrays:
  x = given['x']
  width = cases.group_width(x.shape, x.dtype, spec.groups or 1)
  assert width is not None
  run = functools.partial(body, shape=x.shape, width=width, spec=spec)
  grid = len(x), pl.cdiv(x.shape[-1], width)
  held = math.prod(x.shape[1:-1]) * cases.power_of_2(width)
  warps = min(max(cases.power_of_2(held) // 512, 4), GROUP_WARPS)
  return _call(run, body.__name__, grid, warps, given, shapes, interpret)


def _call(
  body: Callable[..., None],
  name: str,
  grid: tuple[int, ...],
  warps: int,
  given: Arrays,
  shapes: Arrays,
  interpret: bool,
) -> Arrays:
  size = given['x'].shape[-1]
  given = {name: a.reshape(-1, size) for name, a in given.items()}
  names = *given, *shapes

  def kernel(*refs: Any) -> None:
    body(dict(zip(names, refs, strict=True)))

  found = pl.pallas_call(
    kernel,
    out_shape=tuple(shapes.values()),
    grid=grid,
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    interpret=interpret,
    name=f'normkit{name}',
  )(*given.values())
  return dict(zip(shapes, found, strict=True))


def _load(ref: Any, at: Any, inside: Array) -> Array:
  value: Array = triton.load(ref.at[at], mask=inside, other=0)
  return value


def _store(ref: Any, at: Any, inside: Array, value: Array) -> None:
  triton.store(ref.at[at], value.astype(ref.dtype), mask=inside)


def _parameters(
  refs: Arrays, columns: Array, is_column: Array
) -> rows.Parameters:
  at = jnp.zeros((1, 1), jnp.int32), columns[None]
  inside = is_column[None]
  return rows.Parameters(
    *(
      _load(refs[n], at, inside).astype(jnp.float32) if n in refs else None
      for n in ('scale', 'bias')
    )
  )


def _input(
  refs: Arrays, at: Any, inside: Array, with_total: bool = True
) -> Array:
  """x, or in float32 its sum with the residual, which is stored rounded."""
  x = _load(refs['x'], at, inside)
  if 'residual' in refs:
    residual = _load(refs['residual'], at, inside)
    x = x.astype(jnp.float32) + residual.astype(jnp.float32)
    if with_total:
      _store(refs['total'], at, inside, x)
  return x


def _store_statistics(
  refs: Arrays, row: Array, count: int, spec: Spec, values: Any
) -> None:
  for name, value in zip(rows.statistics(spec), values, strict=True):
    if name in refs:
      _store(refs[name], row, row < count, value.reshape(row.shape))


def _for_each_tile(
  count: int, height: int, body: Callable[..., Any], carry: Any = None
) -> Any:
  """Runs `body(rows, carry)` on each of this program's tiles."""
  program, programs = pl.program_id(0), pl.num_programs(0)
  trips = pl.cdiv(pl.cdiv(count, height) - program, programs)

  def step(trip: Array, carry: Any) -> Any:
    tile = program + trip * programs
    return body(tile * height + jnp.arange(height), carry)

  return lax.fori_loop(0, trips, step, carry)


def _forward(refs: Arrays, count: int, size: int, spec: Spec) -> None:
  height, width, _ = _tile(size)
  columns = jnp.arange(width)
  parameters = _parameters(refs, columns, columns < size)
  mean = rows.row_mean(size)

  def tile(row: Array, _: Any) -> None:
    at = row[:, None], columns[None]
    inside = (row < count)[:, None] & (columns < size)[None]
    x = _input(refs, at, inside).astype(jnp.float32)
    (xhat,), _, stats = rows.standardize([x], mean, spec, [inside])
    _store(refs['y'], at, inside, rows.outputs(xhat, parameters, spec))
    _store_statistics(refs, row, count, spec, stats)

  _for_each_tile(count, height, tile)


def _backward(refs: Arrays, count: int, size: int, spec: Spec) -> None:
  height, width, _ = _tile(size)
  columns = jnp.arange(width)
  parameters = _parameters(refs, columns, columns < size)
  mean = rows.row_mean(size)
  sums = tuple(name for name in ('dscale', 'dbias') if name in refs)

  def tile(row: Array, totals: Any) -> Any:
    at = row[:, None], columns[None]
    inside = (row < count)[:, None] & (columns < size)[None]
    x, dy = (
      _load(refs[name], at, inside).astype(jnp.float32) for name in ('x', 'dy')
    )
    (xhat,), root, _ = rows.standardize([x], mean, spec, [inside])
    (dx,), (g,) = rows.gradients([dy], [xhat], root, parameters, mean, spec)
    if 'dtotal' in refs:
      dx = dx + _load(refs['dtotal'], at, inside).astype(jnp.float32)
    _store(refs['dx'], at, inside, dx)
    terms = {'dscale': g * xhat, 'dbias': g}
    return tuple(t + terms[n].sum(0) for n, t in zip(sums, totals, strict=True))

  totals = tuple(jnp.zeros(width, jnp.float32) for _ in sums)
  totals = _for_each_tile(count, height, tile, totals)
  at = pl.program_id(0), columns
  for name, total in zip(sums, totals, strict=True):
    _store(refs[name], at, columns < size, total)


def _forward_in_pieces(refs: Arrays, count: int, size: int, spec: Spec) -> None:
  """Row by row: sums about the mean of the first piece, then the output."""
  pieces = pl.cdiv(size, PIECE)
  held = min(pieces, HELD)

  def place(row: Array, piece: Any) -> tuple[Any, Array]:
    columns = piece * PIECE + jnp.arange(PIECE)
    return (row[:, None], columns[None]), (columns < size)[None]

  def row(row: Array, _: Any) -> None:
    def distances(x: Array, piece: Any) -> Array:
      inside = place(row, piece)[1]
      return jnp.where(inside, x.astype(jnp.float32) - pivot, 0)

    def add(x: Array, piece: Any, sums: Any) -> Any:
      d = distances(x, piece)
      return sums[0] + d.sum(), sums[1] + (d * d).sum()

    def write(x: Array, piece: Any) -> None:
      at, inside = place(row, piece)
      xhat = (distances(x, piece) - offset) * root
      parameters = _parameters(refs, at[1][0], inside[0])
      y = rows.outputs(xhat, parameters, spec)
      _store(refs['y'], at, inside, y)

    first = [_input(refs, *place(row, piece)) for piece in range(held)]
    pivot = jnp.float32(0)
    if spec.center:
      pivot = first[0].astype(jnp.float32).sum() / PIECE
    sums = jnp.float32(0), jnp.float32(0)
    for piece, x in enumerate(first):
      sums = add(x, piece, sums)
    sums = lax.fori_loop(
      held, pieces, lambda i, s: add(_input(refs, *place(row, i)), i, s), sums
    )
    offset = sums[0] / size if spec.center else jnp.float32(0)
    var = jnp.maximum(sums[1] / size - offset * offset, 0)
    root = rows.reciprocal_root(var, spec.epsilon)
    stats = (pivot, offset, var) if spec.center else (var,)
    _store_statistics(refs, row, count, spec, stats)
    for piece, x in enumerate(first):
      write(x, piece)

    def write_again(piece: Any, _: Any) -> None:
      write(_input(refs, *place(row, piece), with_total=False), piece)

    lax.fori_loop(held, pieces, write_again, None)

  _for_each_tile(count, 1, row)


class _Groups:
  """Groups of channels of one example, in pieces of some places each."""

  def __init__(self, shape: tuple[int, ...], width: int, spec: Spec) -> None:
    places, channels = math.prod(shape[1:-1]), shape[-1]
    assert spec.groups is not None
    size = channels // spec.groups
    lanes = cases.power_of_2(width)
    height = min(max(GROUP_PIECE // lanes, 1), cases.power_of_2(places))
    example, local = pl.program_id(0), jnp.arange(lanes)
    self.columns = pl.program_id(1) * width + local
    self.is_column = (local < width) & (self.columns < channels)
    self.set = example * spec.groups + lax.div(self.columns, size)
    groups = cases.power_of_2(width // size)
    self.mean = rows.group_mean(size, groups, size * places)
    self.at, self.inside = list[Any](), list[Array]()
    for piece in range(pl.cdiv(places, height)):
      place = piece * height + jnp.arange(height)
      row = example * places + place
      self.at.append((row[:, None], self.columns[None]))
      self.inside.append((place < places)[:, None] & self.is_column[None])

  def load(self, ref: Any) -> list[Array]:
    pairs = zip(self.at, self.inside, strict=True)
    return [_load(ref, *pair).astype(jnp.float32) for pair in pairs]

  def store(self, ref: Any, tiles: Any) -> None:
    for at, inside, tile in zip(self.at, self.inside, tiles, strict=True):
      _store(ref, at, inside, tile)


def _forward_of_groups(
  refs: Arrays, shape: tuple[int, ...], width: int, spec: Spec
) -> None:
  groups = _Groups(shape, width, spec)
  parameters = _parameters(refs, groups.columns, groups.is_column)
  xhats, _, stats = rows.standardize(
    groups.load(refs['x']), groups.mean, spec, groups.inside
  )
  groups.store(refs['y'], [rows.outputs(n, parameters, spec) for n in xhats])
  for name, value in zip(rows.statistics(spec), stats, strict=True):
    if name in refs:
      each = jnp.broadcast_to(value[0], groups.columns.shape)
      _store(refs[name], groups.set, groups.is_column, each)


def _backward_of_groups(
  refs: Arrays, shape: tuple[int, ...], width: int, spec: Spec
) -> None:
  groups = _Groups(shape, width, spec)
  parameters = _parameters(refs, groups.columns, groups.is_column)
  xhats, root, _ = rows.standardize(
    groups.load(refs['x']), groups.mean, spec, groups.inside
  )
  dys = groups.load(refs['dy'])
  dxs, gs = rows.gradients(dys, xhats, root, parameters, groups.mean, spec)
  groups.store(refs['dx'], dxs)
  terms = {
    'dscale': [g * n for g, n in zip(gs, xhats, strict=True)],
    'dbias': gs,
  }
  at = pl.program_id(0), groups.columns
  for name, tiles in terms.items():
    if name in refs:
      total = rows.added([rows.column_sums(tile) for tile in tiles])
      _store(refs[name], at, groups.is_column, total[0])
