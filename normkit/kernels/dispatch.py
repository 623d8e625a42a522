"""One function in several forms: which one runs is known when it is lowered.

A function has a plain form, in `jax.numpy`, and may have kernels for some
platforms. The plain form says what it computes and what its derivatives are;
a kernel takes its place in the program of its platform, and only where that
program is one device's: XLA cannot split a kernel among several and would
gather its input. Under `shard_map` and `pmap` the program is one device's.

This is a primitive of JAX, since nothing else of its choices is made so late,
and since a linear function with a transpose of its own can then be batched
and differentiated again.
"""

from collections.abc import Callable, Mapping
import contextlib
import functools
import importlib.util
import itertools
import math
from typing import Any, NamedTuple
import warnings

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from normkit import _primitives
from normkit._types import Array, Implementation

Function = Callable[..., Any]
Kernels = Mapping[Implementation, Function]
Chips = Mapping[Implementation, tuple[str, ...] | None]
PLATFORMS: dict[Implementation, str] = {
  'triton': 'cuda',
  'mosaic_gpu': 'cuda',
  'mosaic_tpu': 'tpu',
}


class Needs(NamedTuple):
  """What a kernel for NVIDIA GPUs asks for."""

  title: str
  module: str
  capability: float
  chip: str
  before: float = math.inf


NEEDS: dict[Implementation, Needs] = {
  'triton': Needs('Triton', 'jax.experimental.pallas.triton', 8.0, 'A100'),
  'mosaic_gpu': Needs(
    'Mosaic GPU', 'jax.experimental.pallas.mosaic_gpu', 9.0, 'H100', 11.0
  ),
}

# For tests: the kernel that runs, interpreted, where the platform is a CPU.
interpreted: Implementation | None = None

choice_p = core.Primitive('normkit_choice')
choice_p.multiple_results = True


def choose(
  plain: Function,
  kernels: Kernels,
  *arguments: Any,
  required: Implementation | None = None,
  chips: Chips | None = None,
) -> Any:
  """Runs a function in the form that suits the platform.

  Args:
    plain: a function of trees of arrays; also what is differentiated.
    kernels: the same for some implementations, by their names. They take the
      keyword `interpret`.
    *arguments: what the function takes.
    required: the implementation that must run, or None to choose.
    chips: on which a kernel may run, for those that are confined to some.

  Returns:
    What the function returns.

  Raises:
    NotImplementedError: when the program is lowered, if what is required
      cannot run there.
  """
  confined = tuple((n, c) for n, c in (chips or {}).items() if c is not None)
  return _bind(plain, kernels, None, arguments, (), required, confined)


def choose_linear(
  plain: Function, transpose: Function, residuals: Any, linear: Any
) -> Any:
  """Runs a function that is linear in an argument, its transpose given.

  Args:
    plain: `(residuals, linear)` to a tree of arrays.
    transpose: `(residuals, cotangents)` to a tree like `linear`.
    residuals: what the function is not linear in.
    linear: what it is linear in.

  Returns:
    What the function returns.
  """
  return _bind(plain, {}, transpose, (residuals,), (linear,))


def _bind(
  plain: Function,
  kernels: Kernels,
  transpose: Function | None,
  residuals: tuple[Any, ...],
  linear: tuple[Any, ...],
  required: Implementation | None = None,
  chips: tuple[tuple[Implementation, tuple[str, ...]], ...] = (),
) -> Any:
  """The primitive takes leaves, and its functions leaves to leaves."""
  leaves, tree = jax.tree.flatten((*residuals, *linear))
  closed, shapes = jax.make_jaxpr(plain, return_shape=True)(*residuals, *linear)
  results = jax.tree.structure(shapes)
  cotangents = jax.tree.structure((*residuals, shapes))
  found = choice_p.bind(
    *leaves,
    plain=closed,
    kernels=tuple((n, _flat(k, tree)) for n, k in kernels.items()),
    transpose=transpose and _flat(transpose, cotangents),
    linear=len(jax.tree.leaves(linear)),
    required=required,
    chips=chips,
    interpreted=interpreted if kernels else None,
  )
  return jax.tree.unflatten(results, found)


def _flat(run: Function, tree: Any) -> Function:
  """The function on leaves, which makes a list of leaves."""

  def flat(*leaves: Array, **options: Any) -> list[Array]:
    return jax.tree.leaves(run(*jax.tree.unflatten(tree, leaves), **options))

  return flat


choice_p.def_impl(_primitives.compiled(choice_p))


def _abstract_eval(*_: Any, plain: Any, **__: Any) -> Any:
  return plain.out_avals


choice_p.def_abstract_eval(_abstract_eval)


def _lowering(platform: str | None) -> Callable[..., Any]:
  def lower(ctx: Any, *arguments: Any, plain: Any, **params: Any) -> Any:
    exported = ctx.module_context.lowering_parameters.for_export
    kernel = _form(platform, ctx, is_exported=exported, **params)
    if kernel is None:
      run = mlir.lower_fun(core.jaxpr_as_fun(plain), multiple_results=True)
      return run(ctx, *arguments)
    # A kernel knows nothing of what varies over which devices, nor of 64 bits.
    local = ctx.replace(
      avals_in=[jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in],
      avals_out=[jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_out],
    )
    device = _for_any_gpu() if platform == 'cuda' else contextlib.nullcontext()
    with jax.enable_x64(False), device, warnings.catch_warnings():
      # From jax 0.12 on; nobody who calls a norm can do anything about it.
      warnings.filterwarnings('ignore', 'The Pallas Triton backend is deprec')
      return mlir.lower_fun(kernel, multiple_results=True)(local, *arguments)

  return lower


def _for_any_gpu() -> contextlib.AbstractContextManager[Any]:
  """Pallas then needs no GPU here, nor one that it knows by name."""
  least = jax.sharding.AbstractDevice('NVIDIA A100', None, 'gpu')
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=least)
  return jax.sharding.use_abstract_mesh(mesh)


def _form(
  platform: str | None,
  ctx: Any,
  *,
  kernels: tuple[tuple[Implementation, Function], ...],
  required: Implementation | None,
  chips: tuple[tuple[Implementation, tuple[str, ...]], ...],
  interpreted: Implementation | None,
  is_exported: bool,
  **_: Any,
) -> Function | None:
  """The kernel that runs on the platform, or None for the plain form.

  An exported program is kept for a JAX to come, for which kernels promise
  nothing: one enters only where it is asked for by name.
  """
  if is_exported and required is None:
    return None
  confined = dict(chips)
  for name, kernel in kernels:
    if name == interpreted:
      return lambda *a, kernel=kernel: kernel(*a, interpret=True)
    if name in confined and chip() not in confined[name]:
      continue
    if PLATFORMS[name] == platform and _obstacle(name, ctx) is None:
      return lambda *a, kernel=kernel: kernel(*a, interpret=False)
  if required is None:
    return None
  if PLATFORMS[required] != platform:
    raise NotImplementedError(
      f'implementation={required!r} runs on {PLATFORMS[required]} and this '
      f'program is lowered for {", ".join(ctx.module_context.platforms)}. Use '
      "None or 'xla'."
    )
  raise NotImplementedError(
    f'implementation={required!r} cannot run here: {_obstacle(required, ctx)}, '
    "or use None or 'xla'."
  )


def _obstacle(name: Implementation, ctx: Any) -> str | None:
  """What keeps a kernel out of a program, and how to mend it."""
  if not _primitives.is_one_device(ctx):
    return (
      'XLA partitions the program over several devices, and would gather the '
      "kernel's input. Call it under jax.shard_map over all axes of the mesh, "
      'use a mesh with explicit axes'
    )
  return lacking(name)


def lacking(name: Implementation) -> str | None:
  """What JAX or the GPUs here lack for a kernel, and how to mend it."""
  if (needs := NEEDS.get(name)) is None:
    return None
  if importlib.util.find_spec(needs.module) is None:
    return f'this version of JAX has no {needs.title}. Use another one'
  if oldest_gpu() < needs.capability:
    return (
      f'{needs.title} needs GPUs of compute capability {needs.capability}. Use '
      f'an {needs.chip} or newer'
    )
  if needs.before <= oldest_gpu() < math.inf:
    return f'{needs.title} is for H100, H200, B200 and their like. Use those'
  return None


@functools.cache
def oldest_gpu() -> float:
  """The least compute capability of the GPUs here; of none, infinite."""
  try:
    devices = jax.local_devices(backend='cuda')
  except RuntimeError:  # compiled here for elsewhere
    return math.inf
  return min(float(d.compute_capability) for d in devices)


@functools.cache
def chip() -> str | None:
  """The GPUs here, as JAX names them; None for none, or where they differ."""
  try:
    kinds = {d.device_kind for d in jax.local_devices(backend='cuda')}
  except RuntimeError:
    return None
  return kinds.pop() if len(kinds) == 1 else None


mlir.register_lowering(choice_p, _lowering(None))
for _platform in {*PLATFORMS.values()}:
  mlir.register_lowering(choice_p, _lowering(_platform), platform=_platform)


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
  """A linear function stays one; all else is differentiated as it is plain."""
  found = choice_p.bind(*primals, **params)
  given = [ad.instantiate_zeros(t) for t in tangents]
  count = len(primals) - params['linear']
  if params['linear'] and all(type(t) is ad.Zero for t in tangents[:count]):
    return found, choice_p.bind(*primals[:count], *given[count:], **params)
  run = core.jaxpr_as_fun(params['plain'])
  return found, jax.jvp(run, tuple(primals), tuple(given))[1]


def _transpose(cotangents: Any, *arguments: Any, **params: Any) -> Any:
  count = len(arguments) - params['linear']
  given = [ad.instantiate_zeros(c) for c in cotangents]
  found = params['transpose'](*arguments[:count], *given)
  return _primitives.transposed(arguments, found)


def _batch(arguments: Any, axes: Any, **params: Any) -> Any:
  """Each form under `vmap`; whatever is linear gets the new axis."""
  count = len(arguments) - params['linear']
  residuals = arguments[:count]
  pairs = list(zip(arguments, axes, strict=True))
  size = next(a.shape[d] for a, d in pairs if d is not None)
  linear = [batching.bdim_at_front(a, d, size) for a, d in pairs[count:]]
  fixed = tuple(axes[:count])
  plain, transpose = core.jaxpr_as_fun(params['plain']), params['transpose']
  results = len(params['plain'].out_avals)

  def batched(run: Function, others: int) -> Function:
    return lambda *a, **options: jax.vmap(
      lambda *b: run(*b, **options), (*fixed, *[0] * others)
    )(*a)

  leaves = _bind(
    _on_lists(batched(plain, len(linear))),
    {n: _on_lists(batched(k, len(linear))) for n, k in params['kernels']},
    transpose and _on_lists(batched(transpose, results)),
    (list(residuals),),
    (linear,),
    params['required'],
    params['chips'],
  )
  return leaves, [0] * results


def _on_lists(run: Function) -> Function:
  return lambda *lists, **options: run(*itertools.chain(*lists), **options)


ad.primitive_jvps[choice_p] = _jvp
ad.primitive_transposes[choice_p] = _transpose
batching.primitive_batchers[choice_p] = _batch
