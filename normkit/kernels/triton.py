"""Row norms on NVIDIA GPUs: a row is read once, and stays in registers.

Programs take row after row, so that scale, bias and the sums over rows stay in
registers too. Pallas, lowered to Triton.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from normkit._types import Array
from normkit.kernels import rows
from normkit.kernels.cases import TRITON_WIDTH as WIDTH
from normkit.kernels.rows import Spec

# Of rows longer than a program holds at once it holds the first 12 pieces, all
# that fit without spills, and loads the others twice.
PIECE, HELD = 4096, 12
# Programs in flight: two for each of an H200's 132 multiprocessors, and one in
# the backward, where each writes out its sums over rows.
FORWARD, BACKWARD = 264, 132
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
  """The norm of each row.

  Args:
    given: 'x', of two axes or more, and where there are any 'scale' and
      'bias', of one, and 'residual', which is added to x first.
    spec: the options.
    with_statistics: return them too.
    interpret: run it on any device, slowly.

  Returns:
    'y'; where there is a residual, 'total', the sum; and of each row the
    statistics: 'pivot' and 'offset', whose sum is the mean, and 'var'.
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
  if with_statistics:
    row = rows.result(x, (count,), jnp.float32)
    shapes |= dict.fromkeys(rows.statistics(spec), row)
  body = _forward if size <= WIDTH else _forward_in_pieces
  found = _call(body, FORWARD, given, shapes, spec, interpret)
  one = (*x.shape[:-1], 1)
  return {
    name: a.reshape(x.shape if a.ndim == 2 else one)
    for name, a in found.items()
  }


@functools.partial(jax.jit, static_argnames=('spec', 'wanted', 'interpret'))
def backward(
  given: Arrays, spec: Spec, wanted: tuple[str, ...], interpret: bool = False
) -> Arrays:
  """Gradients of the norm of each row.

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
  programs = min(BACKWARD, pl.cdiv(count, _tile(size)[0]))
  partial = rows.result(x, (programs, size), jnp.float32)
  shapes = {'dx': rows.result(x, (count, size), x.dtype)}
  shapes |= {name: partial for name in wanted if name != 'dx'}
  found = _call(_backward, programs, given, shapes, spec, interpret)
  sums = {n: a.sum(0) for n, a in found.items() if n != 'dx'}
  return {'dx': found['dx'].reshape(x.shape)} | sums


def _tile(size: int) -> tuple[int, int, int]:
  """Rows that a program takes at once, their width, and its warps."""
  width = max(min(pl.next_power_of_2(size), WIDTH), 16)
  height = max(2048 // width, 1)
  return height, width, min(max(height * width // 512, 4), 16)


def _call(
  body: Callable[..., None],
  programs: int,
  given: Arrays,
  shapes: Arrays,
  spec: Spec,
  interpret: bool,
) -> Arrays:
  size = given['x'].shape[-1]
  given = {name: a.reshape(-1, size) for name, a in given.items()}
  count = len(given['x'])
  height, _, warps = _tile(size)
  names = *given, *shapes

  def kernel(*refs: Any) -> None:
    body(dict(zip(names, refs, strict=True)), count, size, spec)

  found = pl.pallas_call(
    kernel,
    out_shape=tuple(shapes.values()),
    grid=(min(programs, pl.cdiv(count, height)),),
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
    interpret=interpret,
    name=f'normkit{body.__name__}',
  )(*given.values())
  return dict(zip(shapes, found, strict=True))


def _load(ref: Any, at: Any, inside: Array) -> Array:
  value: Array = triton.load(ref.at[at], mask=inside, other=0)
  return value


def _store(ref: Any, at: Any, inside: Array, value: Array) -> None:
  triton.store(ref.at[at], value.astype(ref.dtype), mask=inside)


def _parameters(refs: Arrays, columns: Array, size: int) -> rows.Parameters:
  at = jnp.zeros((1, 1), jnp.int32), columns[None]
  inside = (columns < size)[None]
  return rows.Parameters(
    *(
      _load(refs[n], at, inside).astype(jnp.float32) if n in refs else None
      for n in ('scale', 'bias')
    )
  )


def _input(refs: Arrays, at: Any, inside: Array) -> Array:
  """x, or its sum with the residual, which is stored."""
  x = _load(refs['x'], at, inside)
  if 'residual' in refs:
    x = x + _load(refs['residual'], at, inside)
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
  parameters = _parameters(refs, columns, size)

  def tile(row: Array, _: Any) -> None:
    at = row[:, None], columns[None]
    inside = (row < count)[:, None] & (columns < size)[None]
    x = _input(refs, at, inside).astype(jnp.float32)
    xhat, _, stats = rows.standardize(x, size, spec, inside)
    _store(refs['y'], at, inside, rows.outputs(xhat, parameters, spec))
    _store_statistics(refs, row, count, spec, stats)

  _for_each_tile(count, height, tile)


def _backward(refs: Arrays, count: int, size: int, spec: Spec) -> None:
  height, width, _ = _tile(size)
  columns = jnp.arange(width)
  parameters = _parameters(refs, columns, size)
  sums = tuple(name for name in ('dscale', 'dbias') if name in refs)

  def tile(row: Array, totals: Any) -> Any:
    at = row[:, None], columns[None]
    inside = (row < count)[:, None] & (columns < size)[None]
    x, dy = (
      _load(refs[name], at, inside).astype(jnp.float32) for name in ('x', 'dy')
    )
    xhat, root, _ = rows.standardize(x, size, spec, inside)
    dx, g = rows.gradients(dy, xhat, root, parameters, size, spec)
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
      parameters = _parameters(refs, at[1][0], size)
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
    source = refs['total' if 'residual' in refs else 'x']
    lax.fori_loop(
      held, pieces, lambda i, _: write(_load(source, *place(row, i)), i), None
    )

  _for_each_tile(count, 1, row)
