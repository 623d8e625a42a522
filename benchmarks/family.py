"""Bytes of the norms that Flax lacks, beside their formulas written out.

In units of n, one pass over x: forward and backward in one program, and what is
kept for the backward. Written out, a formula is in float32 as the published
code is, and JAX's to differentiate.
"""

import argparse
from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from rich.progress import track

from benchmarks import report, targets
from benchmarks.bytes import measure
import normkit as nk

ROWS, IMAGES, TOKENS = (16_384, 8_192), (64, 56, 56, 128), (64, 256, 4_096)
F32 = jnp.float32


class Case(NamedTuple):
  """A norm here and written out, of x, others like x, and smaller arrays."""

  ours: Callable[..., Any]
  written: Callable[..., Any]
  shape: tuple[int, ...]
  likes: int = 0
  small: tuple[tuple[int, ...], ...] = ()


def normalized(x: Any, center: bool = False) -> Any:
  x = x.astype(F32)
  x = x - x.mean(-1, keepdims=True) if center else x
  return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def rms_offset(x, w):
  return (normalized(x) * (1 + w.astype(F32))).astype(x.dtype)


def rms_rounded(x, w):
  return w * normalized(x).astype(x.dtype)


def gated_last(x, gate, w):
  y = w * normalized(x).astype(x.dtype)
  return (y * jax.nn.silu(gate.astype(F32))).astype(x.dtype)


def gated_first(x, gate, w):
  y = normalized(x.astype(F32) * jax.nn.silu(gate.astype(F32)))
  return w * y.astype(x.dtype)


def global_response(x, w, b):
  length = jnp.sqrt(jnp.square(x.astype(F32)).sum((1, 2), keepdims=True))
  response = length / (length.mean(-1, keepdims=True) + 1e-6)
  return (b + (w * (x * response) + x)).astype(x.dtype)


def derf(x, w, b):
  return (lax.erf(0.5 * x.astype(F32)) * w + b).astype(x.dtype)


def adaptive(x, shift, scale):
  y = normalized(x, center=True).astype(x.dtype)
  return y * (1 + scale[:, None]) + shift[:, None]


def residual(x, branch, gate):
  return x + gate[:, None] * branch


ROW, IMAGE, EXAMPLE = ROWS[-1:], IMAGES[-1:], (TOKENS[0], TOKENS[2])
ROUNDS = {'round_before_scale': True}
CASES = {
  'RMS, offset': Case(
    functools.partial(nk.rms_norm, scale_offset=1.0),
    rms_offset,
    ROWS,
    0,
    (ROW,),
  ),
  'RMS, rounded before the scale': Case(
    functools.partial(nk.rms_norm, **ROUNDS), rms_rounded, ROWS, 0, (ROW,)
  ),
  'gated RMS, norm first': Case(
    functools.partial(nk.gated_rms_norm, **ROUNDS), gated_last, ROWS, 1, (ROW,)
  ),
  'gated RMS, gate first': Case(
    functools.partial(nk.gated_rms_norm, norm_before_gate=False, **ROUNDS),
    gated_first,
    ROWS,
    1,
    (ROW,),
  ),
  'global response': Case(
    nk.global_response_norm, global_response, IMAGES, 0, (IMAGE, IMAGE)
  ),
  'Derf': Case(
    lambda x, w, b: nk.derf(x, 0.5, None, w, b), derf, ROWS, 0, (ROW, ROW)
  ),
  'adaptive layer': Case(
    nk.adaptive_layer_norm, adaptive, TOKENS, 0, (EXAMPLE, EXAMPLE)
  ),
  'adaptive residual': Case(
    nk.adaptive_residual, residual, TOKENS, 1, (EXAMPLE,)
  ),
}


def arrays_of(case: Case) -> list[jax.ShapeDtypeStruct]:
  shapes = [case.shape] * (1 + case.likes) + [*case.small]
  return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def measure_form(
  target: str, form: Callable[..., Any], args: list[jax.ShapeDtypeStruct]
) -> tuple[float, float]:
  """Passes over x of a step, and what its forward keeps."""

  def step(dy, *args):
    y, pull = jax.vjp(form, *args)
    return y, pull(dy)

  n = args[0].size * args[0].dtype.itemsize
  with jax.numpy_rank_promotion('allow'):
    pull = jax.eval_shape(lambda *a: jax.vjp(form, *a)[1], *args)
    kept = sum(r.size * r.dtype.itemsize for r in jax.tree.leaves(pull))
    moved = measure(target, step, [args[0], *args]).bytes
  return moved / n, kept / n


def rows_of(target: str) -> list[list[str]]:
  rows = []
  for name, case in track(CASES.items(), target):
    args = arrays_of(case)
    pairs = [measure_form(target, f, args) for f in (case.ours, case.written)]
    columns = zip(*pairs, strict=True)
    rows.append([name, *(' / '.join(f'{v:.2f}' for v in c) for c in columns)])
  return rows


HEADER = 'normkit / written out, in n', 'forward and backward', 'kept'


def run(args: argparse.Namespace) -> int:
  chosen = [t for t in targets.installed() if t in args.target]
  for target in chosen:
    name = f'family-{target}'
    report.publish(name, name, HEADER, rows_of(target), args.update)
  return 0


def add_command(commands: Any) -> None:
  parser = commands.add_parser('family', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--target', nargs='*', choices=targets.TARGETS, default=('h200',)
  )
  report.add_update(parser)
  parser.set_defaults(run=run)
