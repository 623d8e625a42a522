"""Bytes of blocks with a row norm in them, by XLA, by kernel, and as chosen.

Programs compiled for H200 and TPU, forward and in training, in passes over the
norm's input, weights included. A kernel moves less by itself and is a wall to
the fusion of its neighbours; what is chosen must not move more than XLA.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from rich.progress import track

from benchmarks import report, targets
from benchmarks.bytes import measure
import normkit as nk

ROWS, WIDTH = 8192, 2048
NAMES = {'h200': 'triton', 'v5e': 'mosaic_tpu', 'v6e': 'mosaic_tpu'}
NORMS = {'LayerNorm': nk.layer_norm, 'RMSNorm': nk.rms_norm}
# Of x, scale and two matrices.
BLOCKS: dict[str, Callable[..., Any]] = {
  'norm': lambda norm, x, s, v, w: norm(x, s),
  'norm, gelu': lambda norm, x, s, v, w: jax.nn.gelu(norm(x, s)),
  'matmul, norm, matmul': lambda norm, x, s, v, w: norm(x @ v, s) @ w,
  'matmul, norm, gelu, matmul': lambda norm, x, s, v, w: (
    jax.nn.gelu(norm(x @ v, s)) @ w
  ),
  'pre-norm': lambda norm, x, s, v, w: x + jax.nn.gelu(norm(x, s) @ v) @ w,
  'post-norm': lambda norm, x, s, v, w: norm(x + jax.nn.gelu(x @ v) @ w, s),
}


def block(
  kind: str, norm: str, implementation: str | None, dtype: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """A function of the shapes that come with it."""

  def one(x: Any, scale: Any) -> Any:
    return NORMS[norm](x, scale, implementation=implementation)

  def run(*given: Any) -> Any:
    return BLOCKS[kind](one, *given)

  x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.dtype(dtype))
  matrix = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.dtype(dtype))
  scale = jax.ShapeDtypeStruct((WIDTH,), jnp.float32)
  return run, (x, scale, matrix, matrix)


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


def run(args: argparse.Namespace) -> int:
  jax.config.update('jax_platforms', 'cpu')
  chosen = [t for t in targets.installed() if t in args.target]
  cases = [
    (target, norm, dtype, kind)
    for target in chosen
    for norm in NORMS
    for dtype in args.dtype
    for kind in BLOCKS
  ]
  rows = []
  for target, norm, dtype, kind in track(cases, 'blocks'):
    row = [f'{target} {norm} {dtype}: {kind}']
    for implementation in 'xla', NAMES[target], None:
      found = moved(target, *block(kind, norm, implementation, dtype))
      row.append(' / '.join(f'{passes:.2f}' for passes in found))
    rows.append(row)
  header = ['forward / training, in n', 'XLA', 'kernel', 'chosen']
  report.publish('kernels', 'blocks', header, rows, args.update)
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1))
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('kernels', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--target', nargs='*', choices=list(NAMES), default=list(NAMES)
  )
  parser.add_argument('--dtype', nargs='*', default=['bfloat16', 'float32'])
  parser.add_argument('--json', type=pathlib.Path)
  report.add_update(parser)
  parser.set_defaults(run=run)
