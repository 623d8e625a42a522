"""How a kernel of Mosaic GPU starts: on a device, or interpreted on any."""

from collections.abc import Callable
import functools
import math
import threading
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as gpu
import numpy as np

from normkit._types import Array
from normkit.kernels import clusters, dispatch, plans
from normkit.kernels.configs import OUTPUT_TILES, Config
from normkit.kernels.warpgroups import INPUTS, OUTPUTS, Arrays


def launch(
  body: Callable[[Arrays, clusters.Place], None],
  name: str,
  arguments: Arrays,
  outs: Arrays,
  scratch: Arrays,
  programs: int,
  config: Config,
  interpret: bool,
) -> Arrays:
  """Runs `body` on references, by name, to these arrays and this memory.

  Under `vmap` the programs of all examples are one axis of the grid: along
  another CUDA takes no more than 65,535.
  """

  def kernel(*refs: Any) -> None:
    names = (*arguments, *outs, *scratch)
    at = clusters.Place(config, interpret)
    body(at.own(dict(zip(names, refs, strict=True)), scratch), at)

  kernel.__name__ = name
  memory = clusters.memory(scratch, config, interpret)
  start = gpu.kernel(
    kernel,
    out_type=tuple(outs.values()),
    grid=(programs,),
    grid_names=('program',),
    thread_name='warpgroup',
    scratch_types=tuple(memory.values()),
    **clusters.options(config, interpret),
    **_options(interpret),
  )
  if interpret:
    start = functools.partial(_interpreted, start, tuple(outs.values()))

  @jax.custom_batching.custom_vmap
  def run(*given: Array) -> list[Array]:
    return [*start(*given)]

  @run.def_vmap
  def _(size: int, is_batched: Any, *given: Array) -> Any:
    named = dict(zip(arguments, given, strict=True))
    pairs = zip(named, is_batched, strict=True)
    own = {n for n, is_one in pairs if is_one}
    for n in own:
      named[n] = plans.padded(named[n], (size, *_even(arguments[n])))
    more = {n: a.update(shape=(size, *_even(a))) for n, a in outs.items()}
    own |= more.keys()

    def one(refs: Arrays, at: clusters.Place) -> None:
      example, at = at.within(programs)
      body(refs | {n: refs[n].at[example] for n in own}, at)

    rest = more, scratch, size * programs, config, interpret
    found = launch(one, name, named, *rest)
    cut = {n: (slice(None), *map(slice, a.shape)) for n, a in outs.items()}
    return [a[cut[n]] for n, a in found.items()], [True] * len(found)

  return dict(zip(outs, run(*arguments.values()), strict=True))


def _even(array: Any) -> tuple[int, ...]:
  """Its shape; of one axis of multiples of 16 bytes, for those side by side."""
  if len(array.shape) != 1:
    return tuple(array.shape)
  vector = 16 // array.dtype.itemsize
  return (-(-array.shape[0] // vector) * vector,)


def capability() -> int:
  """Of the GPUs here; where there are none, of those that all kernels fit."""
  return 10 if 10 <= dispatch.oldest_gpu() < math.inf else 9


def rings(
  config: Config, arguments: Arrays, outs: Arrays, copies: int
) -> Arrays:
  """Shared memory for tiles on their way, and barriers, of so many copies."""
  groups, tile = config.warpgroups, (config.rows, config.width)
  depths = {n: ('ring', config.stages) for n in arguments if n in INPUTS}
  depths |= {n: ('out', OUTPUT_TILES) for n in outs if n in OUTPUTS}
  found: Arrays = {
    f'{name} {kind}': gpu.SMEM(
      (groups, depth, *tile), (arguments | outs)[name].dtype
    )
    for name, (kind, depth) in depths.items()
  }
  barriers = min(groups, config.groups_an_array) * config.stages
  for index in range(config.barrier_arrays):
    found[f'arrived {index}'] = gpu.Barrier(
      num_arrivals=copies, num_barriers=barriers
    )
  everyone = config.members * groups
  return found | {clusters.MET: gpu.Barrier(num_arrivals=everyone)}


def _options(interpret: bool) -> dict[str, Any]:
  if interpret:
    return {'interpret': interpreter()}
  semantics = gpu.LoweringSemantics.Lane
  # No sum over a tile needs scratch: warps meet in `parts`.
  return {
    'compiler_params': gpu.CompilerParams(
      lowering_semantics=semantics, reduction_scratch_bytes=0
    )
  }


def interpreter(**options: Any) -> Any:
  """What runs shared memory, barriers and copies on any device."""
  from jax._src.pallas.mosaic_gpu.interpret import params  # noqa: PLC0415

  return params.InterpretGPUParams(**options)


INTERPRETING = threading.Lock()


def _interpreted(
  run: Callable[..., Any], results: tuple[Any, ...], *arguments: Array
) -> Any:
  """One kernel at a time, on a device of its own.

  The interpreter calls Python in a certain order, which is not allowed where a
  norm may stand, and has one shared memory.
  """

  def call(*arguments: Any) -> Any:
    with INTERPRETING, jax.default_device(jax.local_devices()[-1]):
      return jax.tree.map(np.asarray, jax.jit(run)(*arguments))

  return jax.pure_callback(
    call,
    [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results],
    *arguments,
    vmap_method='sequential',
  )
