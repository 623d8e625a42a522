"""How exact the statistics are: float32 against float64 on the same values.

Two tables. The first holds normkit's own forms against the bounds that it
promises, over many sizes and scales; the exit status is 1 if one is broken.
The second puts the output's error beside the peers'.
"""

import argparse
from collections.abc import Callable
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import peers, report
from normkit import samples
from normkit.affine import Arguments, affine
from normkit.centred import (
  Centred,
  _mean_of_few,
  _mean_of_sample,
  _own_mean,
  about,
)
from normkit.sets import Sets

RATIOS = 0, 1e2, 1e3, 1e4, 1e5
SCALES = 1e-15, 1.0, 1e15
ROWS = 16, 128, 768, 4096, 65_536
BATCHES = 100, 10_000, 1_000_000, 10_000_000
SEEDS = 3
UNIT = 2.0**-24


class Errors(NamedTuple):
  """The worst relative error of the variance, and of y in units of its std."""

  var: float
  y: float


def about_the_mean(x: jax.Array, axis: int) -> Centred:
  """The form of short rows, but on TPU, and of masked input."""
  return about_a_pivot(_own_mean, x, axis)


def about_a_sample(x: jax.Array, axis: int) -> Centred:
  """The form of all else."""
  return about_a_pivot(_mean_of_sample, x, axis)


def about_a_few(x: jax.Array, axis: int) -> Centred:
  """The form of a CPU for short rows that are many."""
  return about_a_pivot(_mean_of_few, x, axis)


def about_a_pivot(
  pivot_of: Callable[..., jax.Array], x: jax.Array, axis: int
) -> Centred:
  count, sets = jnp.full((1, 1), x.shape[axis], x.dtype), Sets((axis % x.ndim,))
  pivot = pivot_of(x, count, sets, x.dtype)
  return Centred(*about(pivot, x, count, sets), count)


def textbook(x: jax.Array, axis: int) -> Centred:
  mean = jnp.mean(x, axis, keepdims=True)
  var = jnp.mean(jnp.square(x - mean), axis, keepdims=True)
  return Centred(mean, jnp.zeros_like(mean), var, jnp.ones((1, 1)))


FORMS: dict[str, Callable[..., Centred]] = {
  'float32 two-pass': textbook,
  'normkit, about a sample': about_a_sample,
  'normkit, about the mean': about_the_mean,
}
SHORT = {'normkit, about a few': about_a_few}  # of rows


def sample(
  seed: int, shape: tuple[int, int], ratio: float, scale: float
) -> np.ndarray:
  """Normal values whose mean is `ratio` standard deviations, in float32."""
  values = np.random.default_rng(seed).standard_normal(shape, np.float32)
  return ((values.astype(np.float64) + ratio) * scale).astype(np.float32)


def reference(
  x: np.ndarray, axis: int, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
  """The variance and the output, two passes in float64."""
  wide = x.astype(np.float64)
  mean = wide.mean(axis, keepdims=True)
  var = np.square(wide - mean).mean(axis, keepdims=True)
  return var, (wide - mean) / np.sqrt(var + epsilon)


def worst(error: np.ndarray) -> float:
  return float(np.max(np.abs(np.nan_to_num(error, nan=np.inf))))


def errors(form: Callable[..., Centred], x: np.ndarray, axis: int) -> Errors:
  """The errors of one form of the statistics, and of the output by them."""
  epsilon = 1e-6 * float(np.var(x.astype(np.float64), axis).max())
  var, y = reference(x, axis, epsilon)
  arguments = Arguments(None, None, epsilon, None, x.dtype, x.dtype)

  @jax.jit
  def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    stats = form(x, axis)
    return stats.var, affine(x, stats, arguments)

  got_var, got_y = (np.asarray(a, np.float64) for a in run(jnp.asarray(x)))
  return Errors(worst(got_var / var - 1), worst(got_y - y))


def bounds(ratio: float, two_pass: Errors) -> Errors:
  """What normkit promises for values of this ratio of mean to deviation."""
  var = 1e-5 if ratio <= 1e3 else max(1e-5, 4 * two_pass.var)
  return Errors(var, 4 * UNIT * (1 + ratio) + 4e-6)


def measure(quick: bool) -> dict[tuple[str, float], dict[str, Errors]]:
  """The worst errors of each form, by kind of norm and ratio, over the rest."""
  rows = [('rows', (max(4, 65_536 // n), n), -1) for n in ROWS]
  batches = [('batches', (n, 2), 0) for n in BATCHES[: 3 if quick else None]]
  cases = list(itertools.product(rows + batches, RATIOS, SCALES, range(SEEDS)))
  found: dict[tuple[str, float], dict[str, Errors]] = {}
  for (kind, shape, axis), ratio, scale, seed in track(cases, 'measuring'):
    x = sample(seed, shape, ratio, scale)
    worsts = found.setdefault((kind, ratio), {})
    is_short = kind == 'rows' and samples.has_few(x)
    for name, form in (FORMS | (SHORT if is_short else {})).items():
      new = errors(form, x, axis)
      old = worsts.get(name, Errors(0.0, 0.0))
      worsts[name] = Errors(*map(max, old, new))
  return found


def promise_rows(
  found: dict[tuple[str, float], dict[str, Errors]],
) -> tuple[list[list[str]], bool]:
  """A row for each form, kind and ratio; and whether all bounds hold."""
  rows, kept = [], True
  for (kind, ratio), worsts in found.items():
    bound = bounds(ratio, worsts['float32 two-pass'])
    for name, error in worsts.items():
      holds = all(e <= b for e, b in zip(error, bound, strict=True))
      kept &= holds or name == 'float32 two-pass'
      figures = error.var, bound.var, error.y, bound.y
      rows.append(
        [
          f'{name}, {kind}',
          f'{ratio:g}',
          *(f'{v:.1e}' for v in figures),
          'yes' if holds else 'NO',
        ]
      )
  return rows, kept


def peer_rows() -> list[list[str]]:
  """The output's error beside the peers', mean over deviation by column."""
  norms: dict[str, tuple[Any, Any]] = {
    name: tuple(
      lambda x, epsilon, form=form, axis=axis: affine(
        jnp.asarray(x),
        form(jnp.asarray(x), axis),
        Arguments(None, None, epsilon, None, x.dtype, x.dtype),
      )
      for axis in (-1, 0)
    )
    for name, form in FORMS.items()
  }
  norms |= peers.available()
  kinds = ('layer norm', (512, 768), -1), ('batch norm', (100_352, 8), 0)
  rows = []
  for index, (kind, shape, axis) in enumerate(kinds):
    for name, functions in norms.items():
      found = []
      for ratio in RATIOS:
        x = sample(0, shape, ratio, 1.0)
        y = np.asarray(functions[index](x, 1e-6), np.float64)
        found.append(worst(y - reference(x, axis, 1e-6)[1]))
      cells = ('NaN' if np.isinf(e) else f'{e:.0e}' for e in found)
      rows.append([f'{kind}: {name}', *cells])
  return rows


def run(args: argparse.Namespace) -> int:
  ratios = [f'{r:g}' for r in RATIOS]
  peer_header = ['mean / std', *ratios]
  rows = peer_rows()
  title = 'error of the output, in its std'
  report.publish('accuracy', title, peer_header, rows, args.update)
  header = ['form', 'mean / std', 'var', 'bound', 'y', 'bound', 'holds']
  promises, kept = promise_rows(measure(args.quick))
  title = 'worst errors, and the bounds they keep'
  full = [p for p in args.update if '<!-- promises -->' in p.read_text()]
  report.publish('promises', title, header, promises, full)
  print('every bound holds' if kept else 'A BOUND IS BROKEN')
  return 0 if kept else 1


def add_command(commands: Any) -> None:
  parser = commands.add_parser('accuracy', help=__doc__.splitlines()[0])
  parser.add_argument(
    '--quick', action='store_true', help='leave out the largest batches'
  )
  report.add_update(parser)
  parser.set_defaults(run=run)
