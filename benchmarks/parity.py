"""Time of norms over Flax's on a CPU, of shapes that are drawn.

Nobody has chosen a form for them. Flax is timed against itself too, as
`speed.interleave` times: what differs less from one is noise.
"""

import argparse
import collections
from collections.abc import Iterator
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.progress import track

from benchmarks import report, speed

NORMS = tuple(speed.CPU_SHAPES)
DTYPES = 'float32', 'float32', 'bfloat16'
IMAGES = 4, 7, 8, 12, 14, 16, 17, 28, 32, 56
SIZES = range(2**8, 2**22)  # of an array, in elements


class Case(NamedTuple):
  norm: str
  shape: tuple[int, ...]
  dtype: str


class Ratios(NamedTuple):
  """Medians over Flax's time, of a case."""

  case: Case
  program: str
  normkit: float
  itself: float


def cases(seed: int) -> Iterator[Case]:
  """Sizes are drawn by their logarithm; channels are a number of groups."""
  random = np.random.default_rng(seed)

  def size(low: int, high: int) -> int:
    return round(low * (high / low) ** random.random())

  while True:
    norm, dtype = random.choice(NORMS), random.choice(DTYPES)
    is_flat = norm == 'BatchNorm' and random.random() < 0.4
    if norm in ('LayerNorm', 'RMSNorm') or is_flat:
      shape: tuple[int, ...] = size(2, 4000), size(4, 8192)
    else:
      side = int(random.choice(IMAGES))
      step = speed.GROUPS if norm == 'GroupNorm' else 8
      shape = size(1, 64), side, side, step * size(1, 256 // step)
    if np.prod(shape) in SIZES:
      yield Case(str(norm), shape, str(dtype))


def measure(case: Case, seconds: float) -> list[Ratios]:
  arrays = speed.draw(case.shape, case.dtype)
  ours = speed.jax_calls(speed.of_normkit(case.norm), arrays)
  theirs = speed.jax_calls(speed.of_flax(case.norm), arrays)
  rows = []
  for program, call in ours.items():
    flax = theirs[program]
    calls = {'normkit': call, 'flax': flax, 'again': flax}
    times = speed.interleave(calls, seconds)
    medians = [
      float(np.median(times[name] / times['flax']))
      for name in ('normkit', 'again')
    ]
    rows.append(Ratios(case, program, *medians))
  return rows


def table(rows: list[Ratios]) -> tuple[list[str], list[list[str]]]:
  """A line for each program, norm and dtype."""
  groups: dict[str, list[Ratios]] = collections.defaultdict(list)
  for row in rows:
    groups[f'{row.program}, {row.case.norm} {row.case.dtype}'].append(row)
  lines = []
  for name, found in sorted(groups.items(), reverse=True):
    ratios = [r.normkit for r in found]
    itself = [r.itself for r in found]
    largest = max(found, key=lambda r: r.normkit)
    lines.append(
      [
        name,
        str(len(found)),
        f'{min(itself):.2f}-{max(itself):.2f}',
        f'{min(ratios):.2f}',
        f'{np.median(ratios):.2f}',
        f'{largest.normkit:.2f}',
        'x'.join(map(str, largest.case.shape)),
      ]
    )
  header = 'over Flax', 'shapes', 'itself', 'least', 'median', 'most', 'where'
  return [*header], lines


def run(args: argparse.Namespace) -> int:
  speed.settle_memory()
  drawn = list(itertools.islice(cases(args.seed), args.cases))
  rows = [
    row
    for case in track(drawn, 'timing')
    for row in measure(case, args.seconds)
  ]
  title = f'cpu, jax {jax.__version__}, seed {args.seed}'
  report.publish('parity', title, *table(rows), args.update)
  for row in sorted(rows, key=lambda r: -r.normkit)[: args.worst]:
    print(f'{row.normkit:.2f} {row.program} {row.case}')
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('parity', help=__doc__.splitlines()[0])
  parser.add_argument('--cases', type=int, default=120)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--seconds', type=float, default=1.0, help='time for each program'
  )
  parser.add_argument(
    '--worst', type=int, default=10, help='how many shapes to print'
  )
  report.add_update(parser)
  parser.set_defaults(run=run)
