"""Registers, bytes and copies of Mosaic GPU's kernels, compiled for H200, B200.

Each chip has a process of its own: in one, a second chip fails to compile, or
NVIDIA's assembler says nothing.
"""

import argparse
from collections.abc import Iterable
from concurrent import futures
import dataclasses
import functools
import math
import multiprocessing
import os
import re
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks import report as tables, targets, traffic
from normkit.kernels import cases, configs, dispatch, mosaic_gpu
from normkit.kernels.rows import Spec

NAME = 'mosaic_gpu'
CHIPS = {'h200': 9, 'b200': 10}  # compute capability
KINDS = 'forward', 'training forward', 'backward'
SIZES = 64, 100, 768, 1000, 4096, 5120, 8192, 12_288, 16_384, 65_536
# Height, width and channels of a group of images, of which there are 32.
GROUPS = (
  (8, 8, 4),
  (8, 8, 40),
  (14, 14, 16),
  (28, 28, 16),
  (32, 32, 20),
  (56, 56, 8),
  (56, 56, 16),
)
COUNT = 32
DTYPES = 'bfloat16', 'float16', 'float32'


class Report(NamedTuple):
  """What is known of a compiled kernel.

  Attributes:
    moved: bytes that the program moves, in passes over x.
    spilled: bytes of registers that go to memory.
    registers: of a thread.
    code: what the assembler got.
    resident: programs on a multiprocessor, as registers allow.
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


Size = int | tuple[int, ...]  # of rows, or of groups


def shape_of(size: Size, elements: int = 2**27) -> tuple[int, ...]:
  """Of so many elements or so: enough to fill the chip again and again."""
  if isinstance(size, int):
    return elements // max(size, 1024), size
  example = *size[:-1], COUNT * size[-1]
  return max(elements // math.prod(example), 1), *example


def is_taken(kind: str, size: Size, dtype: str) -> bool:
  groups = None if isinstance(size, int) else COUNT
  case = NAME, shape_of(size), jnp.dtype(dtype), groups
  if kind == 'backward':
    return cases.has_backward(*case)
  return cases.refusal(*case) is None


def report(target: str, kind: str, size: Size, dtype: str) -> Report:
  """Of layer norm or group norm with scale and bias in float32."""
  run = compiler(target).submit(_report, target, kind, size, dtype)
  return run.result()


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
  jax.config.update('jax_platforms', 'cpu')
  dispatch.oldest_gpu = lambda: capability


def _report(target: str, kind: str, size: Size, dtype: str) -> Report:
  x = jax.ShapeDtypeStruct(shape_of(size), dtype)
  scale = jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32)
  is_backward = kind == 'backward'
  spec = Spec(1e-6, True, x.dtype)
  inputs, outputs = (x.dtype,) * (1 + is_backward), (x.dtype,)
  if isinstance(size, int):
    parameters = (scale.dtype,) * (2 - is_backward)
    sums = 2 if is_backward else 0
    case = configs.Case(size, inputs, outputs, parameters, sums)
    config = configs.config(case, CHIPS[target])
  else:
    spec = dataclasses.replace(spec, groups=COUNT)
    case = configs.groups_of(x.shape, COUNT, inputs, outputs)
    config = configs.groups(case, CHIPS[target])
  if is_backward:
    given = {'x': x, 'dy': x, 'scale': scale}
    wanted = 'dx', 'dscale', 'dbias'
    run = functools.partial(mosaic_gpu.backward, spec=spec, wanted=wanted)
  else:
    given = {'x': x, 'scale': scale, 'bias': scale}
    options = {'with_statistics': kind == 'training forward'}
    run = functools.partial(mosaic_gpu.forward, spec=spec, **options)
  compiled, said = _said_by(lambda: targets.compile_for(target, run, given))
  (found,) = re.findall(
    r'(\d+) bytes spill stores, (\d+) bytes spill loads.*\n.*Used (\d+) reg',
    said,
  )
  stores, loads, registers = map(int, found)
  moved = traffic.measure(compiled.as_text()).bytes
  assert config is not None
  threads = config.warpgroups * configs.THREADS
  fit = 65_536 // (-(-registers // 8) * 8 * threads)
  resident = min(config.resident, fit)
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


def table(
  sizes: Iterable[Size], dtypes: list[str], target: str
) -> list[list[str]]:
  rows = []
  for size in track(list(sizes), 'sizes'):
    name = f'{size:,}' if isinstance(size, int) else ' x '.join(map(str, size))
    for dtype in dtypes:
      row = [f'{name} {dtype}']
      for kind in KINDS:
        taken = is_taken(kind, size, dtype)
        found = report(target, kind, size, dtype) if taken else None
        row.append(described(found) if found else 'XLA')
      rows.append(row)
  return rows


def run(args: argparse.Namespace) -> int:
  groups = GROUPS if args.groups is None else map(_group, args.groups)
  tables_of = {'width': args.size, 'group': groups}
  marks = {'width': 'registers', 'group': 'registers of groups'}
  for first, sizes in tables_of.items():
    if rows := table(sizes, args.dtype, args.target):
      header = [first, *KINDS]
      tables.publish(marks[first], args.target, header, rows, args.update)
  return 0


def _group(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split('x')))


def add_command(commands: Any) -> None:
  parser = commands.add_parser('registers', help=__doc__.splitlines()[0])
  parser.add_argument('--target', choices=list(CHIPS), default='h200')
  parser.add_argument('--size', nargs='*', type=int, default=SIZES)
  parser.add_argument(
    '--groups', nargs='*', help='height, width and channels, as 28x28x16'
  )
  parser.add_argument(
    '--dtype', nargs='*', choices=DTYPES, default=['bfloat16', 'float32']
  )
  tables.add_update(parser)
  parser.set_defaults(run=run)
