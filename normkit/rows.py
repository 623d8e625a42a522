"""Norms that have kernels: of rows, the last axis, and of groups of channels.

Groups are of x (batch, ..., channels), over all axes but the first. What is
kept for the backward is x and the parameters: the kernels of the backward find
the statistics again while they have a row or group on chip.
"""

from collections.abc import Callable
import functools
import importlib
import math
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from normkit import _shards, _types, plain, platforms
from normkit._types import Array, Implementation
from normkit.affine import Arguments
from normkit.centred import named
from normkit.kernels import cases
from normkit.kernels.rows import Gate, Spec, statistics
from normkit.plain import SUMMANDS, Arrays

FLOATS = {*map(jnp.dtype, (jnp.float32, jnp.bfloat16, jnp.float16))}
# Each with the chips that it is confined to, or None.
Kernels = dict[Implementation, tuple[str, ...] | None]
# What is kept for the backward, of what is given and of what comes out.
RESULTS = 'y', 'total'
SAVED = 'x', 'gate', 'scale', 'bias', 'pivot', 'offset', 'var'


def _load(module: str) -> Any:
  """A module of the kernels, when it is first needed.

  Pallas, and what primitives are made with, would take a tenth of the time of
  `import jax`.
  """
  return importlib.import_module(f'normkit.kernels.{module}')


def normalize(
  x: Array,
  args: Arguments,
  axes: tuple[int, ...],
  features: tuple[int, ...],
  is_pooled: bool,
  center: bool,
  implementation: Implementation | None,
) -> Array | None:
  """The norm over `axes`, or None where XLA's form needs nothing of this."""
  if features != (x.ndim - 1,) or axes == features:
    found = normalize_rows(x, args, axes, is_pooled, center, implementation)
    return None if found is None else found[0]
  groups = x.shape[-1]
  return normalize_groups(
    x, args, axes, x.ndim - 1, groups, is_pooled, implementation, center
  )


def normalize_rows(
  x: Array,
  args: Arguments,
  axes: tuple[int, ...],
  is_pooled: bool,
  center: bool,
  implementation: Implementation | None,
  residual: Array | None = None,
  activation: Callable[[Array], Array] | None = None,
  gate: tuple[Array, Gate] | None = None,
) -> tuple[Array, Array] | None:
  """The norm over the last axis, and its input; or None where it is another.

  Unless an implementation is named, the forward is XLA's, which fuses it with
  what stands around it; in training it is a kernel's where those are chosen.
  With a residual it is XLA's too where there is no kernel, and never None.
  """
  is_last = axes == (x.ndim - 1,)
  why = None if is_last else f'the normalized axes {axes} are not the last one'
  if gate is not None and gate[0].dtype != x.dtype:
    why = why or f'a gate of {gate[0].dtype} beside x of {x.dtype}'
  if why := why or _refusal(x, args, axes, is_pooled):
    _types.refuse_kernel(implementation, why)
    if residual is None:
      return None
  assert isinstance(args.epsilon, float)
  spec = Spec(
    args.epsilon,
    center,
    args.dtype,
    activation,
    rounding=args.rounding,
    gate=None if gate is None else gate[1],
  )
  given = {'x': x} if residual is None else {'x': x, 'residual': residual}
  given |= {} if gate is None else {'gate': gate[0]}
  shape = (1, *x.shape)[-max(x.ndim, 2) :]
  case = {**given, 'x': jax.ShapeDtypeStruct(shape, x.dtype)}
  case |= {
    n: jax.ShapeDtypeStruct(_shape(a), a.dtype) for n, a in _given(args).items()
  }  # nothing is traced for what is not chosen
  is_chosen = implementation is not None or bool(_names(case, spec, None))
  if not is_chosen and residual is None:
    return None
  given = {n: a[None] if x.ndim == 1 else a for n, a in given.items()}
  whole = given | _parameters(args)
  is_plain = spec.rounding is None and not _others(whole)
  if why is None and (is_chosen or is_plain):
    found = _partitioned(whole, spec, implementation)
  else:
    parameters = {'scale': args.scale, 'bias': args.bias}
    given |= {n: a for n, a in parameters.items() if a is not None}
    options = spec, 'xla', platforms.context()
    found = _types.ruled(_differentiable, given, *options)
  return found['y'].reshape(x.shape), found.get('total', x).reshape(x.shape)


def normalize_groups(
  x: Array,
  args: Arguments,
  axes: tuple[int, ...],
  channel: int,
  groups: int,
  is_pooled: bool,
  implementation: Implementation | None,
  center: bool = True,
) -> Array | None:
  """The norm over `axes` and groups of channels, or None for XLA's form."""
  first = channel - len(axes)
  is_ordered = axes == tuple(range(first, channel)) and channel == x.ndim - 1
  why = None if is_ordered else 'x is not (batch, ..., channels)'
  if first > 1 and _shards.sharded_axes(x):
    why = why or f'one of the first {first} axes is sharded'
  if why := why or _refusal(x, args, (*axes, channel), is_pooled):
    _types.refuse_kernel(implementation, why)
    return None
  shape = (math.prod(x.shape[:first]), *x.shape[first:])
  assert isinstance(args.epsilon, float)
  spec = Spec(args.epsilon, center, args.dtype, groups=groups)
  case = jax.ShapeDtypeStruct(shape, x.dtype)
  if implementation is None and not _names({'x': case}, spec, None):
    return None
  given = {'x': x.reshape(shape), **_parameters(args)}
  return _partitioned(given, spec, implementation)['y'].reshape(x.shape)


def _refusal(
  x: Array, args: Arguments, axes: tuple[int, ...], is_pooled: bool
) -> str | None:
  """Why there is no kernel where a set of x lies along `axes`, or None."""
  parameters = [p for p in (args.scale, args.bias) if p is not None]
  last = (1,) * (x.ndim - 1) + x.shape[-1:]
  if axes == (x.ndim - 1,):  # or of an example, or a head
    is_other = any(p.shape[-1] != x.shape[-1] for p in parameters)
  else:
    is_other = any(p.shape != last for p in parameters)
  is_rounded = args.rounding is not None and axes != (x.ndim - 1,)
  is_sharded = set(axes) & set(_shards.sharded_axes(x))
  reasons = {
    'statistics are pooled over devices': is_pooled,
    'there is a mask': args.where is not None,
    'it rounds before the scale': is_rounded,
    'epsilon is an array': isinstance(args.epsilon, Array),
    f'dtype {x.dtype} to {args.dtype}': not {x.dtype, args.dtype} <= FLOATS,
    'scale or bias is not a float of 32 bits for each element of the last '
    'axis': is_other or any(p.dtype not in FLOATS for p in parameters),
    'the normalized axes or the parameters are sharded': is_sharded
    or not all(_lies_with(p, x) for p in parameters),
  }
  return next((why for why, holds in reasons.items() if holds), None)


def _given(args: Arguments) -> Arrays:
  given = {'scale': args.scale, 'bias': args.bias}
  return {n: a for n, a in given.items() if a is not None}


def _shape(parameter: Array) -> tuple[int, ...]:
  """Of one axis; of x's rank those of an example, or of a head."""
  shape = parameter.shape
  return shape[-1:] if shape[:-1] == (1,) * (len(shape) - 1) else shape


def _parameters(args: Arguments) -> Arrays:
  return {n: a.reshape(_shape(a)) for n, a in _given(args).items()}


def _lies_with(p: Array, x: Array) -> bool:
  """Whether a parameter is whole, or sharded as the examples of x are."""
  own, of_x = (jax.typeof(a).sharding.spec for a in (p, x))
  return all(own[a] in (None, of_x[a]) for a in range(x.ndim))


def _others(given: Any) -> tuple[tuple[int, ...], ...]:
  """The shapes of parameters of more than one number a feature."""
  found = [given[n].shape for n in ('scale', 'bias') if n in given]
  return tuple(shape for shape in found if len(shape) > 1)


def _partitioned(
  given: Arrays, spec: Spec, implementation: Implementation | None
) -> Arrays:
  """Rows that an explicit mesh shards stay where they are."""
  x = given['x']
  check(implementation, given, spec)
  options = {'spec': spec, 'context': platforms.context()}
  options['implementation'] = platforms.implied(implementation)
  run = functools.partial(_types.ruled, _differentiable, **options)
  kind = jax.typeof(x).sharding
  if kind.mesh.empty or not kind.mesh.are_all_axes_explicit:
    return dict(run(given))
  specs = {n: _spec_like(a, kind.spec) for n, a in given.items()}
  given = {
    n: jax.sharding.reshard(a, kind.update(spec=specs[n]))
    for n, a in given.items()
  }
  sharded: Arrays = jax.shard_map(
    run, mesh=kind.mesh, in_specs=(specs,), out_specs=kind.spec
  )(given)
  return sharded


def _spec_like(a: Array, spec: P) -> P:
  """How x, a residual or a parameter is sharded where x is by `spec`."""
  if a.ndim == 1:
    return P()
  return P(*(s if n > 1 else None for s, n in zip(spec, a.shape, strict=True)))


def check(
  implementation: Implementation | None, given: Arrays, spec: Spec
) -> None:
  """Raises if the kernel that is named cannot take what is given."""
  if implementation in (None, 'xla'):
    return
  x = given['x']
  case = x.shape, x.dtype, spec.groups
  if why := cases.refusal(implementation, *case, **_extra(given, spec)):
    of = f'{why}, and x is {x.dtype}{list(x.shape)}'
    _types.refuse_kernel(implementation, f'it does not take {of}')


def _extra(given: Any, spec: Spec) -> dict[str, Any]:
  """What a case has beside its input, as `cases` names it."""
  return {
    'residual': 'residual' in given or 'total' in given,
    'activation': spec.gate.activation if spec.gate else spec.activation,
    'parameters': _others(given),
    'rounds': spec.rounding is not None,
    'gate': spec.gate is not None,
  }


@functools.partial(
  jax.jit, static_argnames=('spec', 'implementation', 'context')
)
def _differentiable(
  given: Arrays,
  spec: Spec,
  implementation: Implementation | None,
  context: Any,
) -> Arrays:
  """The norm and its derivatives: 'y' and, with a residual, 'total'.

  `context` keeps apart what `jit` has traced; see `platforms.context`. JAX
  traces the rule later, and keeps it with what is traced here: it is of the
  same context.
  """

  @jax.custom_jvp
  def run(given: Arrays) -> Arrays:
    return _forward(given, spec, implementation)

  @platforms.within(context)
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
    if not moved:
      return results, jax.tree.map(jnp.zeros_like, results)
    return results, _tangents(saved, moved, spec, implementation, results)

  run.defjvp(derive, symbolic_zeros=True)
  # Under shard_map gradients of parameters are summed outside of the kernels.
  given = {n: _shards.vary(a, given['x']) for n, a in given.items()}
  results: Arrays = _types.ruled(run, given)
  return results


def _forward(
  given: Arrays, spec: Spec, implementation: Implementation | None
) -> Arrays:
  """The results alone."""
  by_xla = functools.partial(plain.norm, spec)
  name = implementation or platforms.preferred()
  if name not in _names(given, spec, implementation):
    return by_xla(given)
  kernel = functools.partial(_kernel, name, spec, RESULTS, False)
  found: Arrays = _load('dispatch').choose(
    by_xla, {name: kernel}, given, required=implementation
  )
  return found


def _names(
  given: Any, spec: Spec, implementation: Implementation | None
) -> Kernels:
  """The kernels that may run: the one that is named, or those chosen."""
  if implementation is not None:
    return {} if implementation == 'xla' else {implementation: None}
  preferred = platforms.preferred()
  x = given['x']
  case = x.shape, x.dtype, spec.groups, preferred
  others = _extra(given, spec) | {'center': spec.center, 'result': spec.dtype}
  return cases.chosen(*case, **others)


def _with_backward(names: Kernels, given: Arrays, spec: Spec) -> Kernels:
  x, sums = given['x'], len({'scale', 'bias'} & given.keys())
  case = x.shape, x.dtype, spec.groups, spec.activation is not None
  is_sum = 'residual' in given or 'total' in given
  more = max(sums, 1), is_sum, spec.dtype, bool(_others(given))
  taken = functools.partial(cases.has_backward, gate=spec.gate is not None)
  return {n: c for n, c in names.items() if taken(n, *case, *more)}


def _training_forward(
  given: Arrays, spec: Spec, implementation: Implementation | None
) -> Arrays:
  """The results and, where XLA's form may run backward, the statistics.

  They come apart from the results, so that a policy of `jax.checkpoint` may
  keep them alone; of the two calls of a kernel XLA makes one.
  """
  names = _names(given, spec, implementation)
  if not names:
    by_xla = named(plain.statistics_of_rows(spec, given))
    return {**plain.norm(spec, given, by_xla), **by_xla}
  name = implementation or platforms.preferred()
  if name in _with_backward(names, given, spec):
    return _forward(given, spec, implementation)

  def chosen(form: Any, wanted: tuple[str, ...], *given: Arrays) -> Any:
    return _load('dispatch').choose(
      functools.partial(form, spec),
      {n: functools.partial(_kernel, n, spec, wanted, True) for n in names},
      *given,
      required=implementation,
      chips=names,
    )

  stats = named(chosen(plain.statistics_of_rows, statistics(spec), given))
  return {**chosen(plain.norm, RESULTS, given, stats), **stats}


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


def _tangents(
  saved: Arrays,
  moved: Arrays,
  spec: Spec,
  implementation: Implementation | None,
  results: Arrays,
) -> Arrays:
  """A linear map of what has moved, whose transpose a kernel may compute."""
  by_xla: Callable[[Arrays, Arrays], Arrays] = jax.checkpoint(
    functools.partial(plain.tangents, spec=spec, results=tuple(results)),
    prevent_cse=False,
  )
  given = {**saved, **results}
  names = _names(given, spec, implementation)
  names = _with_backward(names, given, spec)
  if not names:
    return by_xla(saved, moved)
  wanted = 'dx', *(f'd{n}' for n in moved if n not in SUMMANDS)
  kept = tuple(moved)  # no tracers: the functions below outlive the trace

  def like(saved: Arrays) -> Arrays:
    return {n: saved['x' if n in SUMMANDS else n] for n in kept}

  def gradients_by_xla(saved: Arrays, given: Arrays) -> Arrays:
    run = functools.partial(by_xla, saved)
    transpose = jax.linear_transpose(run, like(saved))
    gradients: Arrays = transpose(given)[0]
    return gradients

  def by_kernel(
    name: Implementation, saved: Arrays, given: Arrays, interpret: bool
  ) -> Arrays:
    named = {f'd{n}': a for n, a in given.items()}
    kept = 'x', 'gate', 'scale', 'bias'
    given = {n: saved[n] for n in kept if n in saved} | named
    found = _load(name).backward(given, spec, wanted, interpret=interpret)
    found |= dict.fromkeys([f'd{n}' for n in SUMMANDS], found['dx'])
    return {n: found[f'd{n}'].astype(a.dtype) for n, a in like(saved).items()}

  def transpose(saved: Arrays, given: Arrays) -> Arrays:
    kernels = {name: functools.partial(by_kernel, name) for name in names}
    gradients: Arrays = _load('dispatch').choose(
      gradients_by_xla,
      kernels,
      saved,
      given,
      required=implementation,
      chips=names,
    )
    return gradients

  changed: Arrays = _load('dispatch').choose_linear(
    by_xla, transpose, saved, moved
  )
  return changed
