"""What a norm costs before it runs: import, trace, compile, program size."""

import argparse
from collections.abc import Callable
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks import layers, report, traffic, whole
from benchmarks.whole import timed

SHAPES = layers.shapes((256, 512), (8, 16, 16, 64))
DEPTH = 24
IMPORTS = (
  'import jax',
  'import jax, normkit',
  'import flax.linen',
  'import normkit.linen',
)


def import_seconds(statement: str) -> float:
  """Seconds that an import takes in a fresh interpreter, of bytecode."""
  code = f'import time; t = time.perf_counter(); {statement}; '
  code += 'print(time.perf_counter() - t)'
  environment = dict(os.environ)
  environment.pop('PYTHONDONTWRITEBYTECODE', None)
  out = subprocess.run(
    [sys.executable, '-c', code],
    capture_output=True,
    check=True,
    env=environment,
    text=True,
  )
  return float(out.stdout)


def table_of_imports(runs: int) -> list[list[str]]:
  """Medians, the statements taken in turn; the first round is left out."""
  times: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
  for _ in track(range(runs + 1), 'imports'):
    for statement, found in times.items():
      found.append(import_seconds(statement))
  times = {statement: found[1:] for statement, found in times.items()}
  base = statistics.median(times[IMPORTS[0]])
  return [
    [
      f'`{s}`',
      f'{statistics.median(t):.2f}',
      f'{statistics.median(t) / base:.2f}',
    ]
    for s, t in times.items()
  ]


def one_norm(library: str, norm: str) -> layers.Program:
  layer = layers.make(library, norm, SHAPES[norm], 'float32')
  return layers.programs(layer)['step']


def many_norms(library: str) -> layers.Program:
  """Gradients through layer norms of one shape, one after the other."""
  layer = layers.make(library, 'LayerNorm', SHAPES['LayerNorm'], 'float32')

  def loss(params, x):
    for p in params:
      x = jnp.tanh(layer.apply(p, x)[0])
    return x.sum()

  return jax.grad(loss), ([layer.params] * DEPTH, layer.x)


def measure(step: Callable[..., Any], given: Any) -> dict[str, float]:
  """A training step: milliseconds, instructions, traces."""
  traces = 0

  def counted(*args):
    nonlocal traces
    traces += 1
    return step(*args)

  jitted = jax.jit(counted)
  trace, lowered = timed(lambda: jitted.lower(*given))
  compiling, compiled = timed(lowered.compile)
  jitted.lower(*given)  # the same shapes again
  computations, _ = traffic.parse(compiled.as_text())
  return {
    'trace': 1e3 * trace,
    'compile': 1e3 * compiling,
    'instructions': sum(map(len, computations.values())),
    'traces': traces,
  }


def table_of_norms(runs: int) -> list[list[str]]:
  """normkit's medians before Flax's; the first run is left out."""
  programs = {n: functools.partial(one_norm, norm=n) for n in layers.NORMS}
  programs[f'{DEPTH} LayerNorms'] = many_norms
  rows = []
  for norm, program in track(programs.items(), 'norms'):
    cells = {}
    for library in layers.LIBRARIES:
      found = []
      for _ in range(runs + 1):
        jax.clear_caches()
        found.append(measure(*program(library)))
      cells[library] = {
        name: statistics.median(f[name] for f in found[1:]) for name in found[0]
      }
    ours, theirs = cells['normkit'], cells['flax']
    rows.append([norm, *(f'{ours[n]:.0f} / {theirs[n]:.0f}' for n in ours)])
  return rows


def plot(rows: list[list[str]], path: pathlib.Path) -> None:
  """Trace and compile together."""
  series: dict[str, list[float]] = {name: [] for name in layers.LIBRARIES}
  for row in rows:
    pairs = [cell.split(' / ') for cell in row[1:3]]
    for values, found in zip(
      series.values(), zip(*pairs, strict=True), strict=True
    ):
      values.append(sum(map(float, found)))
  title = 'milliseconds to trace and compile a training step'
  report.bars(path, [row[0] for row in rows], series, title)


def run(args: argparse.Namespace) -> int:
  tables = (
    ('imports', ('statement', 'seconds', 'over jax'), table_of_imports),
    (
      'compile',
      (
        'normkit / flax',
        'trace, ms',
        'compile, ms',
        'instructions',
        'traces of two lowerings',
      ),
      table_of_norms,
    ),
    (
      'whole',
      (
        "normkit over Flax's (Flax's)",
        'trace',
        'compile',
        'init',
        'instructions',
      ),
      whole.table,
    ),
  )
  found = {}
  for name, header, make in tables:
    found[name] = rows = make(args.runs)
    report.publish(name, name, header, rows, args.update)
    if args.plot and name == 'compile':
      plot(rows, args.plot)
  if args.json:
    args.json.write_text(json.dumps(found, indent=1))
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('compile', help=__doc__.splitlines()[0])
  parser.add_argument('--runs', type=int, default=5)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--plot', type=pathlib.Path)
  report.add_update(parser)
  parser.set_defaults(run=run)
