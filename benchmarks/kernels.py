"""Bytes of blocks with a norm in them, by XLA and by kernel.

Programs compiled for H200 and TPU, forward and in training, in passes over the
norm's input, weights included. A kernel moves less by itself and is a wall to
the fusion of its neighbours.
"""

import argparse
from collections.abc import Callable
import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from rich.progress import track

from benchmarks import report, targets
from benchmarks.bytes import measure
import normkit as nk

NAMES = {'h200': 'triton', 'v5e': 'mosaic_tpu', 'v6e': 'mosaic_tpu'}
GROUPS = 32
Norm = Callable[..., Any]
Block = Callable[..., Any]
# Of x, scale and two matrices.
BLOCKS: dict[str, Block] = {
  'norm': lambda norm, x, s, v, w: norm(x, s),
  'norm, gelu': lambda norm, x, s, v, w: jax.nn.gelu(norm(x, s)),
  'matmul, norm, matmul': lambda norm, x, s, v, w: norm(x @ v, s) @ w,
  'matmul, norm, gelu, matmul': lambda norm, x, s, v, w: (
    jax.nn.gelu(norm(x @ v, s)) @ w
  ),
  'pre-norm': lambda norm, x, s, v, w: x + jax.nn.gelu(norm(x, s) @ v) @ w,
  'post-norm': lambda norm, x, s, v, w: norm(x + jax.nn.gelu(x @ v) @ w, s),
}
# Of images, scale and two kernels of 3 x 3.
IMAGE_BLOCKS: dict[str, Block] = {
  'norm': lambda norm, x, s, v, w: norm(x, s),
  'norm, relu': lambda norm, x, s, v, w: jax.nn.relu(norm(x, s)),
  'conv, norm, conv': lambda norm, x, s, v, w: conv(norm(conv(x, v), s), w),
  'conv, norm, relu, conv': lambda norm, x, s, v, w: conv(
    jax.nn.relu(norm(conv(x, v), s)), w
  ),
  'conv, norm, residual, relu': lambda norm, x, s, v, w: jax.nn.relu(
    x + norm(conv(x, v), s)
  ),
}


class Family(NamedTuple):
  """Norms and the blocks they are measured in.

  Attributes:
    norms: functions of x, scale and the implementation.
    blocks: functions of such a norm, x, scale and two weights.
    x: the shape of the input.
    weight: the shape of each weight.
  """

  norms: dict[str, Norm]
  blocks: dict[str, Block]
  x: tuple[int, ...]
  weight: tuple[int, ...]


FAMILIES = (
  Family(
    {'LayerNorm': nk.layer_norm, 'RMSNorm': nk.rms_norm},
    BLOCKS,
    (8192, 2048),
    (2048, 2048),
  ),
  Family(
    {
      'GroupNorm': functools.partial(nk.group_norm, num_groups=GROUPS),
      'InstanceNorm': nk.instance_norm,
    },
    IMAGE_BLOCKS,
    (64, 28, 28, 512),
    (3, 3, 512, 512),
  ),
)
CASES = [
  (norm, kind)
  for family in FAMILIES
  for norm in family.norms
  for kind in family.blocks
]
# Images on both sides of where XLA's form fuses a ReLU after the norm; see
# `normkit/kernels/cases.py`.
SIZES = (
  ('GroupNorm', (64, 7, 7, 512)),
  ('GroupNorm', (64, 14, 14, 512)),
  ('GroupNorm', (64, 20, 20, 512)),
  ('GroupNorm', (64, 28, 28, 512)),
  ('GroupNorm', (128, 20, 20, 512)),
  ('GroupNorm', (128, 28, 28, 512)),
  ('GroupNorm', (128, 28, 28, 256)),
  ('GroupNorm', (512, 28, 28, 64)),
  ('GroupNorm', (32, 64, 64, 256)),
  ('GroupNorm', (32, 72, 72, 256)),
  ('InstanceNorm', (64, 5, 5, 512)),
  ('InstanceNorm', (64, 7, 7, 512)),
)
DTYPES = 'bfloat16', 'float32'
ACTIVATIONS = {'relu': jax.nn.relu, 'silu': jax.nn.silu, 'gelu': jax.nn.gelu}


def conv(x: Any, kernel: Any) -> Any:
  names = 'NHWC', 'HWIO', 'NHWC'
  return lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=names
  )


def block(
  kind: str,
  norm: str,
  implementation: str | None,
  dtype: str,
  shape: tuple[int, ...] | None = None,
  has_bias: bool = False,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """A function of the shapes that come with it; the scale is the bias too."""
  family = next(f for f in FAMILIES if norm in f.norms)

  def one(x: Any, scale: Any) -> Any:
    given = (scale, scale) if has_bias and norm != 'RMSNorm' else (scale,)
    return family.norms[norm](x, *given, implementation=implementation)

  def run(*given: Any) -> Any:
    return family.blocks[kind](one, *given)

  shape = shape or family.x
  x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
  square = (*family.weight[:-2], *shape[-1:] * 2)
  weight = jax.ShapeDtypeStruct(square, jnp.dtype(dtype))
  scale = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
  return run, (x, scale, weight, weight)


def moved(
  target: str, run: Callable[..., Any], given: tuple[Any, ...]
) -> tuple[float, float]:
  """Passes over x, forward and in training."""

  def step(*given: Any) -> Any:
    y, pull = jax.vjp(run, *given[:-1])
    return y, pull(given[-1])

  n = given[0].size * given[0].dtype.itemsize
  forward = measure(target, run, given)
  training = measure(target, step, (*given, given[0]))
  return forward.bytes / n, training.bytes / n


def before(
  activation: str, norm: str, implementation: str, dtype: str, shape: Any
) -> str:
  """Passes in training of a norm and what follows it, without weights."""
  one, given = block('norm', norm, implementation, dtype, shape)

  def run(x: Any, scale: Any) -> Any:
    return ACTIVATIONS[activation](one(x, scale, None, None))

  return f'{moved("h200", run, given[:2])[1]:.2f}'


def of_sizes() -> list[list[str]]:
  """Group and instance norm of images, large and small, on H200."""
  rows = []
  for norm, shape in track(SIZES, 'sizes'):
    row = [f'{norm} {" x ".join(map(str, shape))}']
    for dtype in DTYPES:
      row += [before(a, norm, 'xla', dtype, shape) for a in ACTIVATIONS]
    row.append(before('relu', norm, 'mosaic_gpu', 'bfloat16', shape))
    rows.append(row)
  return rows


def run_sizes(args: argparse.Namespace) -> int:
  if 'h200' not in targets.installed():
    return 1
  header = ['in training, in n']
  header += [f'{d}, {a}' for d in DTYPES for a in ACTIVATIONS]
  report.publish('sizes', 'sizes', [*header, 'kernel'], of_sizes(), args.update)
  return 0


def run(args: argparse.Namespace) -> int:
  if args.sizes:
    return run_sizes(args)
  chosen = [t for t in targets.installed() if t in args.target]
  cases = [
    (target, norm, dtype, kind)
    for target in chosen
    for norm, kind in CASES
    if norm in args.norm
    for dtype in args.dtype
  ]
  rows = []
  for target, norm, dtype, kind in track(cases, 'blocks'):
    row = [f'{target} {norm} {dtype}: {kind}']
    for implementation in 'xla', NAMES[target]:
      found = moved(target, *block(kind, norm, implementation, dtype))
      row.append(' / '.join(f'{passes:.2f}' for passes in found))
    rows.append(row)
  header = ['forward / training, in n', 'XLA', 'kernel']
  report.publish('kernels', 'blocks', header, rows, args.update)
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1))
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('kernels', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--target', nargs='*', choices=list(NAMES), default=list(NAMES)
  )
  norms = list(dict.fromkeys(norm for norm, _ in CASES))
  parser.add_argument('--norm', nargs='*', choices=norms, default=norms)
  parser.add_argument('--dtype', nargs='*', default=DTYPES)
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument(
    '--sizes', action='store_true', help='images of several sizes, on H200'
  )
  report.add_update(parser)
  parser.set_defaults(run=run)
