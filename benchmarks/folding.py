"""What folding saves: bytes that ResNet-50 moves in evaluation, per device."""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import bytes as moved, models, report, targets
import normkit.linen
from normkit.tools.fold import fold

TARGETS = 'h200', 'v5e'
HEADER = ['ResNet-50 in evaluation', 'MiB moved', 'kernels']


def resnet() -> tuple[models.ResNet, Any]:
  """The network in evaluation, with statistics and scales drawn at random."""
  norm = functools.partial(
    normkit.linen.BatchNorm, use_running_average=True, dtype=jnp.bfloat16
  )
  model = models.ResNet(norm)
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3), jnp.bfloat16)
  )
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if path[-1].key == 'kernel':
      values = rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape)
    else:
      values = rng.uniform(0.5, 1.5, leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return model, jax.tree_util.tree_map_with_path(draw, shapes)


def rows(chosen: list[str], batches: list[int]) -> list[list[str]]:
  """A row for each device, batch and program."""
  model, variables = resnet()
  x = jax.random.normal(jax.random.key(0), (2, 64, 64, 3), jnp.bfloat16)
  folded = fold(model.apply, variables, x)
  if kept := [row.norm for row in folded.report.rows if not row.layer]:
    raise AssertionError(f'not folded: {kept}')
  programs = {
    'as trained': (model.apply, variables),
    'folded': (folded.apply, folded.params),
  }
  cases = [(t, b, p) for t in chosen for b in batches for p in programs]
  found = []
  for target, batch, program in track(cases, 'programs'):
    function, params = programs[program]
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.bfloat16)
    cost = moved.measure(target, function, (params, images))
    found.append(
      [
        f'{target}, batch of {batch}: {program}',
        f'{cost.bytes / moved.MIB:,.1f}',
        str(cost.kernels),
      ]
    )
  return found


def run(args: argparse.Namespace) -> int:
  chosen = [t for t in args.target if targets.is_installed(t)]
  if 'h200' in chosen and not targets.has('nvidia.cudnn'):
    print('convolutions on h200 need cuDNN: pip install nvidia-cudnn-cu13')
    chosen.remove('h200')
  report.publish(
    'folding',
    'Bytes moved by ResNet-50 in evaluation',
    HEADER,
    rows(chosen, args.batch),
    args.update,
  )
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('folding', help='bytes that folding saves')
  parser.add_argument('--target', nargs='*', choices=TARGETS, default=TARGETS)
  parser.add_argument('--batch', nargs='*', type=int, default=[1, 128])
  report.add_update(parser)
  parser.set_defaults(run=run)
