"""Bytes moved and kept by compiled programs, for H200 and TPU too; no timing.

The first table holds the norms by themselves, in units of n, one pass over the
input: forward, backward from what the forward kept, both in one program, and
what is kept. The second holds training steps of ResNet-50 and of transformer
blocks, and what the norm adds to them.
"""

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import jax
from rich.progress import track

from benchmarks import layers, models, report, targets, traffic
import normkit as nk

# Both larger than what a TPU holds on chip.
SHAPES = layers.shapes((16_384, 8_192), (256, 56, 56, 128))
MIB = 2**20
POLICIES = {'': None, 'products kept': nk.products_saveable}


class Measured(NamedTuple):
  """What a program costs.

  Attributes:
    bytes: bytes moved.
    kernels: kernels run.
    temporaries: bytes that are needed besides arguments and results.
  """

  bytes: int
  kernels: int
  temporaries: int


def measure(target: str, function: Any, arguments: Any) -> Measured:
  compiled = targets.compile_for(target, function, *arguments)
  moved = traffic.measure(compiled.as_text())
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return Measured(moved.bytes, moved.kernels, temporaries)


def measure_layer(
  target: str, library: str, norm: str, dtype: str
) -> dict[str, float]:
  """The programs of one norm, in units of n."""
  layer = layers.make(library, norm, SHAPES[norm], dtype)
  kept = sum(
    r.size * r.dtype.itemsize for r in jax.tree.leaves(layers.residuals(layer))
  )
  found: dict[str, float] = {'kept': kept / layer.bytes}
  for name, (function, arguments) in layers.programs(layer).items():
    measured = measure(target, function, arguments)
    found[name] = measured.bytes / layer.bytes
    found[f'{name} kernels'] = measured.kernels
    found[f'{name} temporaries'] = measured.temporaries / layer.bytes
  return found


def run_layers(chosen: list[str], dtypes: list[str]) -> list[dict[str, Any]]:
  cases = [
    {'target': t, 'norm': n, 'dtype': d, 'library': library}
    for t in chosen
    for n in layers.NORMS
    for d in dtypes
    for library in layers.LIBRARIES
  ]
  return [case | measure_layer(**case) for case in track(cases, 'norms')]


class Model(NamedTuple):
  """A training step, and the size of all inputs of its norms.

  Attributes:
    step: `(library, norm, policy) -> (function, arguments)`.
    norms: the norms that are put in it.
    unit: n in bytes: the inputs of all norms together.
  """

  step: Any
  norms: tuple[str, ...]
  unit: float


def resnet(library: str, norm: str, policy: Any) -> layers.Program:
  return models.resnet_step(library, norm, batch=128, policy=policy)


def transformer(library: str, norm: str, policy: Any) -> layers.Program:
  return models.transformer_step(library, norm, policy=policy)


MODELS = {
  'ResNet-50': Model(resnet, ('BatchNorm',), 128 * 11_113_984 * 2),
  'transformer': Model(
    transformer, ('LayerNorm', 'RMSNorm'), 12 * 8192 * 2048 * 2
  ),
}


def needs_cudnn(target: str, name: str) -> bool:
  """Whether a program needs what is not installed to be compiled."""
  has_convolutions = (target, name) == ('h200', 'ResNet-50')
  return has_convolutions and not targets.has('nvidia.cudnn')


def run_models(chosen: list[str], names: list[str]) -> list[dict[str, Any]]:
  cases = [
    (target, name, policy, library, norm)
    for target in chosen
    for name in names
    for policy in POLICIES
    for library, norm in (
      ('none', ''),
      *((b, n) for n in MODELS[name].norms for b in ('flax', 'normkit')),
    )
  ]
  rows, without = [], {}
  if no_cudnn := [c for c in cases if needs_cudnn(*c[:2])]:
    print(f'{len(no_cudnn)} programs need cuDNN: pip install nvidia-cudnn-cu13')
    cases = [c for c in cases if c not in no_cudnn]
  for target, name, policy, library, norm in track(cases, 'models'):
    model = MODELS[name]
    step = model.step(library, norm, POLICIES[policy])
    measured = measure(target, *step)
    base = without.setdefault((target, name, policy), measured)
    rows.append(
      {
        'target': target,
        'model': name,
        'policy': policy,
        'norm': f'{library} {norm}'.strip(),
        'GiB moved': measured.bytes / 2**30,
        'n moved more': (measured.bytes - base.bytes) / model.unit,
        'MiB temporary': measured.temporaries / MIB,
        'n temporary more': (measured.temporaries - base.temporaries)
        / model.unit,
        'kernels': measured.kernels,
      }
    )
  return rows


def table_of_layers(rows: list[dict[str, Any]]) -> list[list[str]]:
  """A row a target, norm and dtype: normkit's number before Flax's."""
  pairs: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
  for row in rows:
    key = row['target'], row['norm'], row['dtype']
    pairs.setdefault(key, {})[row['library']] = row
  return [
    [
      ' '.join(key),
      *(
        f'{both["normkit"][name]:.2f} / {both["flax"][name]:.2f}'
        for name in ('forward', 'backward', 'step', 'kept')
      ),
      *(
        f'{both["normkit"][f"{name} kernels"]} / '
        f'{both["flax"][f"{name} kernels"]}'
        for name in ('forward', 'step')
      ),
    ]
    for key, both in pairs.items()
  ]


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """The backward, and what is kept for it."""
  series: dict[str, list[float]] = {}
  for row in rows:
    for name in 'backward', 'kept':
      series.setdefault(f'{row["library"]}: {name}', []).append(row[name])
  labels = [
    ' '.join(row[k] for k in ('target', 'norm', 'dtype'))
    for row in rows
    if row['library'] == 'normkit'
  ]
  report.bars(path, labels, series, 'passes over the input', None)


LAYER_HEADER = (
  'normkit / flax, in n',
  'forward',
  'backward',
  'both in one',
  'kept',
  'kernels forward',
  'kernels in one',
)
MODEL_HEADER = (
  'training step',
  'GiB moved',
  'n added',
  'MiB temporary',
  'n added',
)


def table_of_models(rows: list[dict[str, Any]]) -> list[list[str]]:
  return [
    [
      ' '.join(
        [row['target'], f'{row["model"]}:', row['norm']]
        + ([f'({row["policy"]})'] if row['policy'] else [])
      ),
      f'{row["GiB moved"]:.2f}',
      f'{row["n moved more"]:.2f}',
      f'{row["MiB temporary"]:,.0f}',
      f'{row["n temporary more"]:.2f}',
    ]
    for row in rows
  ]


def run(args: argparse.Namespace) -> int:
  chosen = [t for t in targets.installed() if t in args.target]
  norms = [] if args.models_only else run_layers(chosen, args.dtype)
  devices = [t for t in chosen if t != 'cpu']
  whole = run_models(devices, args.models)
  if args.json:
    args.json.write_text(
      json.dumps({'norms': norms, 'models': whole}, indent=1)
    )
  if args.plot and norms:
    plot(norms, args.plot)
  tables = (
    ('bytes', LAYER_HEADER, table_of_layers(norms)),
    ('models', MODEL_HEADER, table_of_models(whole)),
  )
  for name, header, rows in tables:
    if rows:
      report.publish(name, name, header, rows, args.update)
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('bytes', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--target',
    nargs='*',
    choices=targets.TARGETS,
    default=targets.TARGETS[1:],
  )
  parser.add_argument(
    '--dtype', nargs='*', choices=layers.DTYPES, default=layers.DTYPES
  )
  parser.add_argument(
    '--models',
    nargs='*',
    choices=MODELS,
    default=[],
    help='whole models too: minutes each',
  )
  parser.add_argument('--models-only', action='store_true')
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--plot', type=pathlib.Path)
  report.add_update(parser)
  parser.set_defaults(run=run)
