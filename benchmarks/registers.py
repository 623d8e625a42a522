"""Registers, bytes and copies of Mosaic GPU's kernels, compiled for H200, B200.

Each chip has a process of its own: in one, a second chip fails to compile, or
NVIDIA's assembler says nothing.
"""

import argparse
from concurrent import futures
import functools
import math
import multiprocessing
import os
import re
import tempfile
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas import mosaic_gpu as gpu
import jax.numpy as jnp
from rich.progress import track

from benchmarks import report as tables, targets, traffic
from normkit.kernels import cases, clusters, configs, dispatch, mosaic_gpu
from normkit.kernels.rows import Gate, Rounding, Spec

NAME = 'mosaic_gpu'
CHIPS = {'h200': 9, 'b200': 10}  # compute capability
KINDS = 'forward', 'training forward', 'backward'
SIZES = 64, 100, 768, 1000, 4096, 5120, 8192, 12_288, 16_384, 65_536
HEAD_SIZES = 64, 100, 128, 256
# Height, width and channels of a group.
GROUPS = (
  (8, 8, 4),
  (8, 8, 40),
  (14, 14, 16),
  (28, 28, 16),
  (32, 32, 20),
  (56, 56, 8),
  (56, 56, 16),
)
DTYPES = 'bfloat16', 'float16', 'float32'
# What has a number of scale and bias; or, of images, what is a set.
OF = 'feature', 'example', 'head', 'group'
GATES = 'last', 'first'  # of a gated RMS norm by SiLU
TOKENS, HEADS, COUNT = 1000, 12, 32  # of an example; of a token; of an image
Size = int | tuple[int, ...]  # of a row, or of a group
ALIGNED = 1024  # bytes, of each array in shared memory
RESERVED = 1024  # bytes of this that each program has beside its own


class Report(NamedTuple):
  """What is known of a compiled kernel.

  Attributes:
    moved: bytes that the program moves, in passes over x.
    spilled: bytes of registers that go to memory.
    registers: of a thread.
    code: what the assembler got.
    resident: programs on a multiprocessor, as registers and memory allow.
    under_way: bytes on their way to each while a row is worked on.
    config: what a program holds.
  """

  moved: float
  spilled: int
  registers: int
  code: str
  resident: int
  under_way: int
  config: configs.Config


class Kernel(NamedTuple):
  """A kernel of layer, group or, without a bias, RMS norm; in some dtype.

  Attributes:
    kind: one of `KINDS`.
    size: of a row, or of a group.
    dtype: of x.
    of: one of `OF`.
    activation: after the norm, one of `jax.nn`.
    residual: whether one is added before the norm.
    center: whether it is not RMS norm; which it is with a gate.
    gate: one of `GATES`, or None.
    rounds: whether it rounds before the scale, RMS norm alone.
    parameters: dtype of scale and bias; None if there are none.
    result: dtype of the output, and of its gradient; None for that of x.
  """

  kind: str
  size: Size
  dtype: str
  of: str = OF[0]
  activation: str | None = None
  residual: bool = False
  center: bool = True
  gate: str | None = None
  rounds: bool = False
  parameters: str | None = 'float32'
  result: str | None = None

  @property
  def is_centred(self) -> bool:
    return self.center and self.gate is None

  @property
  def affine(self) -> tuple[str, ...]:
    """Which of scale and bias there are."""
    names = ('scale', 'bias') if self.is_centred else ('scale',)
    return names if self.parameters else ()


def is_taken(*given: Any, **options: Any) -> bool:
  """Whether there is a `Kernel(*given, **options)`."""
  kernel = Kernel(*given, **options)
  size, dtype = kernel.size, jnp.dtype(kernel.dtype)
  case: tuple[Any, ...] = NAME, (2, size), dtype
  if isinstance(size, tuple):
    case = NAME, shapes(size, 'group')[0], dtype, COUNT
  has = {'residual': kernel.residual, 'gate': kernel.gate is not None}
  if kernel.kind != 'backward':
    return cases.refusal(*case, **has) is None
  has |= {
    'activation': kernel.activation is not None,
    'has_sets': kernel.of in ('example', 'head'),
  }
  return cases.has_backward(*case, sums=len(kernel.affine), **has)


def report(target: str, *given: Any, **options: Any) -> Report:
  """Of a `Kernel(*given, **options)`."""
  kernel = Kernel(*given, **options)
  return compiler(target).submit(_report, target, kernel).result()


@functools.cache
def compiler(target: str) -> futures.ProcessPoolExecutor:
  """A process for one chip."""
  return futures.ProcessPoolExecutor(
    1,
    multiprocessing.get_context('spawn'),
    initializer=_prepare,
    initargs=(CHIPS[target],),
  )


def _prepare(capability: int) -> None:
  os.environ |= {f'MOSAIC_GPU_DUMP_{name}': '1' for name in ('PTXAS', 'PTX')}
  if assembler := targets.ptxas():  # rather than that of the machine
    os.environ['PATH'] = f'{assembler.parent}:{os.environ["PATH"]}'
  _ask_once()
  _note_launches()
  jax.config.update('jax_platforms', 'cpu')
  dispatch.oldest_gpu = lambda: capability


def _ask_once() -> None:
  """For each kernel JAX starts the assembler ten times for its version."""
  from jax._src.lib import mosaic_gpu as library

  extension, name = library._mosaic_gpu_ext, '_get_ptxas_isa_version'
  if ask := getattr(extension, name, None):
    setattr(extension, name, functools.cache(ask))


# Of the kernels that were traced: case and config, and bytes of shared memory.
CHOSEN, HELD = list[tuple[Any, configs.Config]](), list[int]()


def _note_launches() -> None:
  of_threads, choices = clusters.memory, (configs.config, configs.groups)

  def memory(scratch: Any, config: configs.Config, interpret: bool) -> Any:
    HELD.append(sum(map(_room, scratch.values())))
    return of_threads(scratch, config, interpret)

  def choose(choice: Any, case: Any, capability: int) -> Any:
    config = choice(case, capability)
    CHOSEN.append((case, config))
    return config

  clusters.memory = memory
  configs.config, configs.groups = (
    functools.partial(choose, choice) for choice in choices
  )


def _room(one: Any) -> int:
  """Of a part of shared memory, as Pallas lays it out."""
  if isinstance(one, gpu.Barrier):
    return 8 * math.prod(one.num_barriers)
  size = math.prod(one.shape) * jnp.dtype(one.dtype).itemsize
  return -(-size // ALIGNED) * ALIGNED


def shapes(size: Size, of: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Of x, of 2^27 elements or so, and of scale and bias."""
  if isinstance(size, tuple):
    image = *size[:-1], COUNT * size[-1]
    return (2**27 // math.prod(image), *image), image[-1:]
  rows = 2**27 // max(size, 1024)  # enough to fill the chip again and again
  if of == 'example':
    return (rows // TOKENS, TOKENS, size), (rows // TOKENS, 1, size)
  if of == 'head':
    return (rows // HEADS, HEADS, size), (1, HEADS, size)
  return (rows, size), (size,)


def _program(kernel: Kernel) -> tuple[Any, dict[str, Any]]:
  """What is compiled, for which arrays."""
  shape, of_scale = shapes(kernel.size, kernel.of)
  x = jax.ShapeDtypeStruct(shape, kernel.dtype)
  y = x.update(dtype=kernel.result or x.dtype)
  groups = COUNT if isinstance(kernel.size, tuple) else None
  run_after = getattr(jax.nn, kernel.activation) if kernel.activation else None
  gate = Gate(jax.nn.silu, kernel.gate == 'last') if kernel.gate else None
  rounding = Rounding(x.dtype, x.dtype) if kernel.rounds else None
  options = run_after, groups, rounding, gate
  spec = Spec(1e-6, kernel.is_centred, y.dtype, *options)
  given = {'x': x, 'gate': x} if gate else {'x': x}
  for name in kernel.affine:
    given[name] = jax.ShapeDtypeStruct(of_scale, kernel.parameters)
  is_backward = kernel.kind == 'backward'
  if kernel.residual:
    given['dtotal' if is_backward else 'residual'] = x
  if not is_backward:
    options = {'with_statistics': kernel.kind == 'training forward'}
    return functools.partial(mosaic_gpu.forward, spec=spec, **options), given
  wanted = 'dx', *(f'd{name}' for name in kernel.affine)
  wanted += ('dgate',) if gate else ()
  run = functools.partial(mosaic_gpu.backward, spec=spec, wanted=wanted)
  return run, given | {'dy': y}


@functools.cache  # compiled again, the assembler would say nothing
def _report(target: str, kernel: Kernel) -> Report:
  run, given = _program(kernel)
  jax.clear_caches()  # or what was traced before would not be again
  CHOSEN.clear()
  HELD.clear()
  compiled, said = _said_by(lambda: targets.compile_for(target, run, given))
  (found,) = re.findall(
    r'(\d+) bytes spill stores, (\d+) bytes spill loads.*\n.*Used (\d+) reg',
    said,
  )
  stores, loads, registers = map(int, found)
  ((case, config),), (held,) = CHOSEN, HELD
  threads = config.warpgroups * configs.THREADS
  shared = configs.CHIPS[CHIPS[target]].shared + RESERVED
  resident = min(
    config.resident,
    65_536 // (-(-registers // 8) * 8 * threads),
    shared // (held + RESERVED),
  )
  moved, x = traffic.measure(compiled.as_text()).bytes, given['x']
  return Report(
    moved / (x.size * x.dtype.itemsize),
    stores + loads,
    registers,
    said,
    resident,
    configs.under_way(case, config, resident),
    config,
  )


def _said_by(run: Any) -> tuple[Any, str]:
  """What a call prints, by whatever language."""
  with tempfile.TemporaryFile() as file:
    saved = [os.dup(number) for number in (1, 2)]
    for number in 1, 2:
      os.dup2(file.fileno(), number)
    try:
      result = run()
    finally:
      for number, old in zip((1, 2), saved, strict=True):
        os.dup2(old, number)
        os.close(old)
    file.seek(0)
    return result, file.read().decode(errors='replace')


def described(found: Report) -> str:
  passes = f'{found.moved:.2f} n, {found.registers}'
  if found.spilled:
    passes += f' ({found.spilled} bytes spilled)'
  return f'{passes}, {found.under_way // 1024} KiB'


def run(args: argparse.Namespace) -> int:
  is_group = args.of == 'group'
  more = args.of, args.activation, args.residual
  # Statistics are for XLA's backward, and the rest has one of its own.
  is_all = is_group or (*more, args.gate) == (OF[0], None, False, False)
  kinds = KINDS if is_all else KINDS[::2]
  columns = [(k, g) for g in (GATES if args.gate else (None,)) for k in kinds]
  rows = []
  for size in track(args.size or (GROUPS if is_group else SIZES), 'sizes'):
    text = ' x '.join(map(str, size)) if is_group else f'{size:,}'
    for dtype in args.dtype:
      row = [f'{text} {dtype}']
      for kind, gate in columns:
        case, of = (kind, size, dtype, *more), {'gate': gate}
        taken = is_taken(*case, **of)
        found = report(args.target, *case, **of) if taken else None
        row.append(described(found) if found else 'XLA')
      rows.append(row)
  titles = [f'{kind}, gate {gate}' if gate else kind for kind, gate in columns]
  header = ['group' if is_group else 'width', *titles]
  flags = [n for n in ('residual', 'gate') if getattr(args, n)]
  given = args.of, args.activation, *flags
  name = '-'.join(['registers', *(n for n in given if n and n != OF[0])])
  tables.publish(name, args.target, header, rows, args.update)
  return 0


def _size(text: str) -> Size:
  found = tuple(map(int, text.split('x')))
  return found if len(found) > 1 else found[0]


def add_command(commands: Any) -> None:
  parser = commands.add_parser('registers', help=__doc__.splitlines()[0])
  parser.add_argument('--target', choices=list(CHIPS), default='h200')
  parser.add_argument(
    '--size', nargs='*', type=_size, help='widths; of groups as 28x28x16'
  )
  parser.add_argument(
    '--dtype', nargs='*', choices=DTYPES, default=['bfloat16', 'float32']
  )
  parser.add_argument(
    '--of',
    choices=OF,
    default=OF[0],
    help='what has its own scale and bias, or is a set',
  )
  parser.add_argument('--activation', help='one of jax.nn, after the norm')
  parser.add_argument(
    '--residual', action='store_true', help='added before the norm'
  )
  parser.add_argument(
    '--gate', action='store_true', help='gated RMS norm, in both orders'
  )
  tables.add_update(parser)
  parser.set_defaults(run=run)
