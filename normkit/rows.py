"""Norms of rows, over the last axis alone: layer and RMS norm, in kernels.

What is kept for the backward is x and the parameters: the kernels of the
backward find the statistics again while they have a row on chip.
"""

from collections.abc import Callable
import functools
import importlib
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from normkit import _types
from normkit._types import Array, Implementation
from normkit.affine import Arguments, activated
from normkit.kernels import cases
from normkit.kernels.rows import Spec, statistics
from normkit.moments import Centred, centred, changes, named

Arrays = dict[str, Array]
FLOATS = {*map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16))}
# What is kept for the backward, of what is given and of what comes out.
RESULTS = 'y', 'total'
SAVED = 'x', 'scale', 'bias', 'pivot', 'offset', 'var'


def _load(module: str) -> Any:
  """A module of the kernels, when it is first needed.

  Pallas, and what primitives are made with, would take a tenth of the time of
  `import jax`.
  """
  return importlib.import_module(f'normkit.kernels.{module}')


def refusal(
  x: Array, args: Arguments, axes: tuple[int, ...], is_pooled: bool
) -> str | None:
  """Why the norm of x is not one of rows, or None."""
  parameters = [p for p in (args.scale, args.bias) if p is not None]
  one_row = (1,) * (x.ndim - 1) + x.shape[-1:]
  reasons = {
    f'the normalized axes {axes} are not the last one': axes != (x.ndim - 1,),
    'statistics are pooled over devices': is_pooled,
    'there is a mask': args.where is not None,
    f'dtype {x.dtype} to {args.dtype}': not {x.dtype, args.dtype} <= FLOATS,
    'scale or bias is not a float of 32 bits for each element of a row': any(
      p.shape != one_row or p.dtype not in FLOATS for p in parameters
    ),
    'rows or parameters are sharded': x.ndim - 1 in _types.sharded_axes(x)
    or any(map(_types.sharded_axes, parameters)),
  }
  return next((why for why, holds in reasons.items() if holds), None)


def normalize_rows(
  x: Array,
  args: Arguments,
  center: bool,
  implementation: Implementation | None,
  residual: Array | None = None,
  activation: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
  """The norm over the last axis of what `refusal` lets pass, and its input.

  Unless an implementation is named, the forward is XLA's, which fuses it with
  what stands around it; in training it is a kernel's where those are chosen.
  """
  spec = Spec(args.epsilon, center, args.dtype, activation)
  given = {'x': x} if residual is None else {'x': x, 'residual': residual}
  given = {n: a[None] if x.ndim == 1 else a for n, a in given.items()}
  for name, value in ('scale', args.scale), ('bias', args.bias):
    if value is not None:
      given[name] = value.reshape(-1)
  found = _partitioned(given, spec, implementation)
  return found['y'].reshape(x.shape), found.get('total', x).reshape(x.shape)


def _partitioned(
  given: Arrays, spec: Spec, implementation: Implementation | None
) -> Arrays:
  """Rows that an explicit mesh shards stay where they are."""
  x = given['x']
  check(implementation, x)
  run = functools.partial(
    _differentiable, spec=spec, implementation=implementation
  )
  kind = jax.typeof(x).sharding
  if kind.mesh.empty or not kind.mesh.are_all_axes_explicit:
    return dict(run(given))
  specs = {n: kind.spec if a.ndim > 1 else P() for n, a in given.items()}
  sharded: Arrays = jax.shard_map(
    run, mesh=kind.mesh, in_specs=(specs,), out_specs=kind.spec
  )(given)
  return sharded


def check(implementation: Implementation | None, x: Array) -> None:
  """Raises if the kernel that is named cannot take x."""
  if implementation is None:
    return
  if why := cases.refusal(implementation, x.shape, x.dtype):
    of = f'{why}, and x is {x.dtype}{list(x.shape)}'
    _types.refuse_kernel(implementation, f'it does not take {of}')


@functools.partial(jax.jit, static_argnames=('spec', 'implementation'))
def _differentiable(
  given: Arrays, spec: Spec, implementation: Implementation | None
) -> Arrays:
  """The norm and its derivatives: 'y' and, with a residual, 'total'."""

  @jax.custom_jvp
  def run(given: Arrays) -> Arrays:
    return _forward(given, spec, implementation)

  def derive(primals: Any, tangents: Any) -> tuple[Arrays, Arrays]:
    (given,), (given_tangents,) = primals, tangents
    results = _training_forward(given, spec, implementation)
    moved = {
      name: t
      for name, t in given_tangents.items()
      if not isinstance(t, SymbolicZero)
    }
    saved = {n: a for n, a in {**given, **results}.items() if n in SAVED}
    results = {n: a for n, a in results.items() if n in RESULTS}
    if 'total' in results:  # the norm is one of the sum
      saved['x'] = results['total']
      parts = [moved.pop(n) for n in ('x', 'residual') if n in moved]
      moved |= {'x': sum(parts[1:], parts[0])} if parts else {}
    if not moved:
      return results, jax.tree.map(jnp.zeros_like, results)
    return results, _tangents(saved, moved, spec, implementation, results)

  run.defjvp(derive, symbolic_zeros=True)
  # Under shard_map gradients of parameters are summed outside of the kernels.
  given = {n: _types.vary(a, given['x']) for n, a in given.items()}
  results: Arrays = run(given)
  return results


def _forward(
  given: Arrays, spec: Spec, implementation: Implementation | None
) -> Arrays:
  """The results alone."""
  plain = functools.partial(_plain, spec)
  if implementation is None:
    return plain(given)
  kernel = functools.partial(_kernel, implementation, spec, RESULTS, False)
  found: Arrays = _load('dispatch').choose(
    plain, {implementation: kernel}, given, required=implementation
  )
  return found


def _training_forward(
  given: Arrays, spec: Spec, implementation: Implementation | None
) -> Arrays:
  """The results and, where XLA's form may run backward, the statistics.

  They come apart from the results, so that a policy of `jax.checkpoint` may
  keep them alone; of the two calls of a kernel XLA makes one.
  """
  shape, dtype = given['x'].shape, given['x'].dtype
  names = cases.chosen(shape, dtype)
  if implementation is not None:
    if cases.has_backward(implementation, shape, dtype):
      return _forward(given, spec, implementation)
    names = (implementation,)

  def by(wanted: tuple[str, ...]) -> dict[Implementation, Any]:
    return {n: functools.partial(_kernel, n, spec, wanted, True) for n in names}

  stats: Arrays = _load('dispatch').choose(
    functools.partial(_plain_statistics, spec),
    by(statistics(spec)),
    given,
    required=implementation,
  )
  stats = named(stats)
  results: Arrays = _load('dispatch').choose(
    functools.partial(_plain, spec),
    by(RESULTS),
    given,
    stats,
    required=implementation,
  )
  return {**results, **stats}


def _kernel(
  name: Implementation,
  spec: Spec,
  wanted: tuple[str, ...],
  with_statistics: bool,
  given: Arrays,
  *_: Any,
  interpret: bool,
) -> Arrays:
  options = {'with_statistics': True} if with_statistics else {}
  found = _load(name).forward(given, spec, interpret=interpret, **options)
  return {n: a for n, a in found.items() if n in wanted}


def _plain_statistics(spec: Spec, given: Arrays) -> Arrays:
  x, axes = _sum(given), (given['x'].ndim - 1,)
  stats = centred(x, axes, None, spec.center, output_alone=False)
  return {n: getattr(stats, n) for n in statistics(spec)}


def _plain(spec: Spec, given: Arrays, stats: Arrays | None = None) -> Arrays:
  """The norm by XLA."""
  x = _sum(given)
  found = _statistics({'x': x, **(stats or {})}, spec)
  y = _affine(x, found, given, spec)
  return {'y': y, 'total': x} if 'residual' in given else {'y': y}


def _sum(given: Arrays) -> Array:
  x = given['x']
  return x + given['residual'] if 'residual' in given else x


def _affine(x: Array, stats: Centred, given: Arrays, spec: Spec) -> Array:
  scale, bias = (
    given[n].reshape((1,) * (x.ndim - 1) + (-1,)) if n in given else None
    for n in ('scale', 'bias')
  )
  wide = _types.statistics_dtype(x.dtype)
  args = Arguments(scale, bias, spec.epsilon, None, spec.dtype, wide)
  return activated(x, stats, args, spec.center, spec.activation)


def _tangents(
  saved: Arrays,
  moved: Arrays,
  spec: Spec,
  implementation: Implementation | None,
  results: Arrays,
) -> Arrays:
  """A linear map of what has moved, whose transpose a kernel may compute."""
  plain = functools.partial(_plain_tangents, spec=spec, results=tuple(results))
  shape, dtype = saved['x'].shape, saved['x'].dtype
  names, required = cases.chosen(shape, dtype), None
  if implementation and cases.has_backward(implementation, shape, dtype):
    names, required = (implementation,), implementation
  wanted = 'dx', *(f'd{n}' for n in moved if n != 'x')

  def plain_gradients(saved: Arrays, given: Arrays) -> Arrays:
    transpose = jax.linear_transpose(functools.partial(plain, saved), moved)
    gradients: Arrays = transpose(given)[0]
    return gradients

  def by_kernel(
    name: Implementation, saved: Arrays, given: Arrays, interpret: bool
  ) -> Arrays:
    named = {f'd{n}': a for n, a in given.items()}
    given = {n: saved[n] for n in ('x', 'scale', 'bias') if n in saved} | named
    found = _load(name).backward(given, spec, wanted, interpret=interpret)
    return {n: found[f'd{n}'].astype(a.dtype) for n, a in moved.items()}

  def transpose(saved: Arrays, given: Arrays) -> Arrays:
    kernels = {name: functools.partial(by_kernel, name) for name in names}
    found: Arrays = _load('dispatch').choose(
      plain_gradients, kernels, saved, given, required=required
    )
    return found

  found: Arrays = _load('dispatch').choose_linear(
    plain, transpose, saved, moved
  )
  return found


def _plain_tangents(
  saved: Arrays, moved: Arrays, spec: Spec, results: tuple[str, ...]
) -> Arrays:
  """How the results change, by XLA: linear in what has moved."""
  x, axes = saved['x'], (saved['x'].ndim - 1,)
  stats = _statistics(saved, spec)
  values = {n: saved[n] for n in moved}
  changed = dict(moved)
  if 'x' in moved:
    doffset, changed['var'] = changes(x, stats, moved['x'], axes)
    values['var'] = stats.var
    if spec.center:
      values['offset'], changed['offset'] = stats.offset, doffset

  def norm(values: Arrays) -> Array:
    some = {n: values[n] for n in ('offset', 'var') if n in values}
    now = stats._replace(**some)
    return _affine(values.get('x', x), now, saved | values, spec)

  found = {'y': jax.jvp(norm, (values,), (changed,))[1]}
  if 'total' in results:
    found['total'] = moved.get('x', jnp.zeros_like(x))
  return found


def _statistics(saved: Arrays, spec: Spec) -> Centred:
  x = saved['x']
  if 'var' not in saved:
    found: Centred = centred(x, (x.ndim - 1,), None, spec.center)
    return found
  count = jnp.full((1,) * x.ndim, x.shape[-1], saved['var'].dtype)
  zero = jnp.zeros_like(saved['var'])
  pivot, offset = (saved.get(n, zero) for n in ('pivot', 'offset'))
  return Centred(pivot, offset, saved['var'], count)
