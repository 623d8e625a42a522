# %% [markdown]
# # Training mode against evaluation mode: where the gap comes from
#
# In training batch norm uses the statistics of the batch, in evaluation running
# ones. If the two differ, the network that is evaluated isn't the one that was
# trained. Six ways that are said to lead there, each measured as the accuracy
# in both modes on the same held-out images, then what `normkit.tools.inspect`
# says of it, and what `normkit.tools.recalibrate` mends (Wu and Johnson,
# "Rethinking 'Batch' in BatchNorm", 2021, sections 3 and 4).
#
# The data are real, and few: patches of ten photographs, the class being which
# of them a patch is from.
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/train_eval.py --out out
#     python examples/train_eval.py --out out --small

# %%
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import data
import figures
from models import TORCH, ConvNorm
import normkit as nk
from normkit.tools.inspect import Inspection, inspect
from normkit.tools.recalibrate import recalibrate
import options
import summary
import training

# %% [markdown]
# ## What is trained
#
# Four convolutions, each with a norm and a ReLU, and the mean over positions.
# Batch norm keeps 0.9 of its running statistics at each step unless it is said
# otherwise, and the learning rate of Adam falls to zero along a cosine.


# %%
Layers = tuple[tuple[int, int], ...]
LAYERS = (16, 2), (32, 1), (32, 2), (64, 1)  # widths and strides
FEWER = (8, 4), (8, 2)  # to see it run


class Network(nn.Module):
  """Some convolutions: (n, 32, 32, 3) to the logits of ten classes."""

  norm: nk.Norm = TORCH
  layers: Layers = LAYERS

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for number, (width, stride) in enumerate(self.layers, 1):
      layer = ConvNorm(width, 3, stride, self.norm, name=f'conv{number}')
      x = nn.relu(layer(x, train=train))
    return nn.Dense(10, name='dense')(x.mean((1, 2)))


def skewed(labels: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
  """Indices of batches without end, each of two classes, half and half."""
  rng = np.random.default_rng(seed)
  while True:
    pair = rng.choice(labels.max() + 1, 2, replace=False)
    halves = [
      rng.choice(np.flatnonzero(labels == label), size // 2) for label in pair
    ]
    yield np.concatenate(halves)


def shuffled(labels: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
  """Indices of batches without end, of all classes."""
  return training.batches(len(labels), size, seed)


class Setting(NamedTuple):
  """How a network is trained.

  Attributes:
    norm: its batch norm.
    decay: whether the learning rate falls to zero.
    order: gives the batches of labels, by size and seed.
    batch_size: images of a batch.
    longer: how many times as many steps.
    layers: the convolutions of the network.
  """

  norm: nk.BatchNorm = TORCH
  decay: bool = True
  order: Callable[..., Iterator[np.ndarray]] = shuffled
  batch_size: int = 64
  longer: int = 1
  layers: Layers = LAYERS

  @property
  def model(self) -> Network:
    return Network(self.norm, self.layers)

  def batches(self, labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Indices of so many batches like those of training."""
    order = self.order(labels, self.batch_size, seed)
    return np.stack([next(order) for _ in range(number)])


SLOW = dataclasses.replace(TORCH, momentum=0.99)
SETTINGS = {
  'baseline': Setting(),
  'momentum 0.99': Setting(SLOW),
  'momentum 0.99, debias': Setting(dataclasses.replace(SLOW, debias=True)),
  'rate stays high': Setting(decay=False),
  'batches of 4': Setting(batch_size=4, longer=3),
  'two classes a batch': Setting(order=skewed, longer=3),
}
RATE = 0.02
TESTED = 768  # images, in batches like those of training
STATISTICS = 512  # images to recalibrate with and to inspect


# %% [markdown]
# The averages of weights are over the second half of the steps: equal shares
# (SWA: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
# Generalization", 2018), or an exponential average (EMA) that keeps 0.95. They
# are taken from the run whose rate stays high. No step of training made these
# weights, so no running statistics belong to them.
#
# Who forgets `mutable=['batch_stats']`, or drops what it returns, trains the
# same weights, since training reads no running statistics; these stay at mean
# zero and variance one.


# %%
class Point(NamedTuple):
  """A test during training: the step, and accuracies in both modes, in %."""

  step: int
  train: float
  evaluation: float


def train(
  setting: Setting, dataset: data.Dataset, steps: int, seed: int, tests: int
) -> tuple[dict[str, Any], list[Point]]:
  """Trains a network: its variables by the way to take them, and its tests.

  The ways are 'last', 'EMA', 'SWA', and 'forgotten', which has the statistics
  from before the first step.
  """
  steps *= setting.longer
  optimizer = adam(steps if setting.decay else None)
  first = training.init(setting.model, optimizer, dataset.train_images, seed)
  order = setting.order(dataset.train_labels, setting.batch_size, seed)
  order = itertools.islice(order, steps)
  when = np.linspace(0, steps, tests + 1).astype(int)[1:]
  ema = swa = first.params
  points = []
  for number, state, _ in training.walk(
    setting.model, optimizer, dataset, order, first
  ):
    if taken := max(number - steps // 2, 0):
      ema = mix(state.params, ema, 1 if taken == 1 else 0.05)
      swa = mix(state.params, swa, 1 / taken)
    if number in when:
      both = accuracies(setting, state.variables, dataset, seed)
      points.append(Point(number, *both))
  last = state.variables
  return {
    'last': last,
    'EMA': last | {'params': ema},
    'SWA': last | {'params': swa},
    'forgotten': last | {'batch_stats': first.batch_stats},
  }, points


@functools.cache
def adam(steps: int | None) -> optax.GradientTransformation:
  """Adam, whose rate falls to zero over the steps, or stays; made once."""
  rate = RATE if steps is None else optax.cosine_decay_schedule(RATE, steps)
  return optax.adam(rate)


mix = jax.jit(optax.incremental_update)

# %% [markdown]
# ## Measured
#
# Held-out images in batches that are put together as in training, in training
# mode and in evaluation mode. A batch of two classes can give its classes away
# in training mode, which would be no merit of the network.


# %%
def accuracies(
  setting: Setting, variables: Any, dataset: data.Dataset, seed: int
) -> tuple[float, float]:
  """The accuracy on held-out images in training and evaluation mode, in %."""
  labels = dataset.test_labels
  index = setting.batches(labels, TESTED // setting.batch_size, seed)
  images = dataset.test_images[index]

  def share(train: bool) -> float:
    found = np.array(classes(setting.model, train, variables, images))
    return 100 * float((found == labels[index]).mean())

  return share(True), share(False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def classes(
  model: nn.Module, train: bool, variables: Any, images: jax.Array
) -> jax.Array:
  """The classes that are found, (batches, images of a batch)."""
  return jax.vmap(
    lambda batch: call(model, train, variables, batch)[0].argmax(-1)
  )(images)


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(
  model: nn.Module, train: bool, variables: Any, images: jax.Array
) -> tuple[jax.Array, Any]:
  """The logits and the updated statistics."""
  return model.apply(variables, images, train=train, mutable=['batch_stats'])


# %% [markdown]
# ## Seen and mended
#
# `inspect` gets batches like those of training. `recalibrate` replaces the
# running statistics by those of training images in two ways:
#
# - in one pass in training mode, over batches like those of training;
# - layer by layer in evaluation mode, over large batches of all classes.


# %%
class Result(NamedTuple):
  """One cause and seed: accuracies in %, and what `inspect` found."""

  train: float
  evaluation: float
  one_pass: float
  layerwise: float
  inspection: Inspection

  @property
  def gap(self) -> float:
    return self.train - self.evaluation


def examine(
  setting: Setting,
  variables: Any,
  dataset: data.Dataset,
  steps: int,
  seed: int,
) -> Result:
  """The gap of a network, what is seen of it, and what is mended."""
  images, labels = dataset.train_images, dataset.train_labels
  number = STATISTICS // setting.batch_size
  like = images[setting.batches(labels, number, seed)]
  mixed = images[shuffled_halves(labels, seed)]
  in_training, in_evaluation = (
    functools.partial(call, setting.model, mode) for mode in (True, False)
  )
  one_pass = recalibrate(in_training, variables, like)
  layerwise = recalibrate(in_evaluation, variables, mixed, layerwise=True)
  mended = (
    accuracies(setting, v, dataset, seed)[1] for v in (one_pass, layerwise)
  )
  seen = inspect(in_training, variables, like, steps=steps * setting.longer)
  return Result(*accuracies(setting, variables, dataset, seed), *mended, seen)


def shuffled_halves(labels: np.ndarray, seed: int) -> np.ndarray:
  """Indices of two large batches of all classes."""
  order = shuffled(labels, STATISTICS // 2, seed)
  return np.stack([next(order) for _ in range(2)])


# The causes of a gap: the setting, and the way to take its variables.
CAUSES = {
  'baseline': ('baseline', 'last'),
  'rate stays high': ('rate stays high', 'last'),
  'average: EMA': ('rate stays high', 'EMA'),
  'average: SWA': ('rate stays high', 'SWA'),
  'momentum 0.99': ('momentum 0.99', 'last'),
  'momentum 0.99, debias': ('momentum 0.99, debias', 'last'),
  'batches of 4': ('batches of 4', 'last'),
  'two classes a batch': ('two classes a batch', 'last'),
  'forgotten `mutable`': ('baseline', 'forgotten'),
}
SMALL = ['baseline', 'forgotten `mutable`']
Results = dict[str, list[Result]]  # cause, seed
Curves = dict[str, list[list[Point]]]  # setting, seed, test


def run(
  causes: Sequence[str],
  dataset: data.Dataset,
  *,
  seeds: int,
  steps: int,
  tests: int,
  layers: Layers,
  console: Console,
) -> tuple[Results, Curves]:
  """Examines some causes with each seed, after training what they need."""
  results: Results = {cause: [] for cause in causes}
  curves: Curves = {CAUSES[cause][0]: [] for cause in causes}
  settings = {n: s._replace(layers=layers) for n, s in SETTINGS.items()}
  with console.status('training') as status:
    for seed in range(seeds):
      trained = {}
      for name in curves:
        status.update(f'seed {seed}: training, {name}')
        trained[name], points = train(
          settings[name], dataset, steps, seed, tests
        )
        curves[name].append(points)
      for cause in causes:
        name, way = CAUSES[cause]
        status.update(f'seed {seed}: examining, {cause}')
        results[cause].append(
          examine(settings[name], trained[name][way], dataset, steps, seed)
        )
  return results, curves


# %% [markdown]
# ## What came out

# %%
MEASURED = {  # label and look
  'train': ('training mode', 'none'),
  'evaluation': ('evaluation mode', 'batch'),
  'one_pass': ('recalibrated, one pass', 'instance'),
  'layerwise': ('recalibrated, by layer', 'group'),
}


def values(results: list[Result], name: str) -> np.ndarray:
  """One measure over the seeds."""
  return np.array([getattr(result, name) for result in results])


def codes(results: list[Result]) -> list[str]:
  """What `inspect` warns of with any seed."""
  advice = [f for result in results for f in result.inspection.advice]
  return sorted({finding.code for finding in advice})


def result_table(results: Results) -> Table:
  """Each cause: the accuracy in both modes, and mended."""
  table = Table(title='Held-out accuracy, %, mean ± std over seeds')
  table.add_column('cause', no_wrap=True)
  for title in ('training', 'evaluation', 'one pass', 'by layer'):
    table.add_column(title, justify='right', no_wrap=True)
  for cause, runs in results.items():
    cells = (summary.spread(values(runs, name)) for name in MEASURED)
    table.add_row(cause, *cells)
  return table


def findings(results: Results) -> list[str]:
  """What the numbers say, in words."""
  gaps = {cause: values(runs, 'gap') for cause, runs in results.items()}
  worse = [c for c, gap in gaps.items() if gap.mean() > gap.std(ddof=1)]
  better = [c for c, gap in gaps.items() if -gap.mean() > gap.std(ddof=1)]
  level = [c for c in gaps if c not in worse + better]
  gains = {
    c: values(runs, 'layerwise') - values(runs, 'evaluation')
    for c, runs in results.items()
  }
  mended = {c: g for c, g in gains.items() if g.mean() > g.std(ddof=1)}
  silent = [c for c in worse if not codes(results[c])]

  def told(causes: Sequence[str], numbers: dict[str, np.ndarray]) -> str:
    listed = sorted(causes, key=lambda cause: -abs(numbers[cause].mean()))
    return (
      '; '.join(f'{c}, {summary.spread(numbers[c])}' for c in listed) or 'none'
    )

  warned = {c: ', '.join(codes(runs)) for c, runs in results.items()}

  return [
    'Points by which evaluation is below training mode, where that is more '
    f'than a standard deviation: {told(worse, gaps)}.',
    f'And where it is above it: {told(better, gaps)}.',
    f'No gap as large: {told(level, gaps)}.',
    'Points that recalibrating by layer wins, where that is more than a '
    f'standard deviation: {told(list(mended), gains)}.',
    'What `inspect` warns of: '
    f'{"; ".join(f"{c}, {w}" for c, w in warned.items() if w) or "nothing"}.',
    f'Gaps that it does not warn of at its limits: {told(silent, gaps)}.',
  ]


# %%
def draw_gaps(results: Results, title: str) -> Figure:
  """Each cause: both modes, and evaluation after recalibrating."""
  figure, ((axes,),) = figures.make(title)
  figure.set_figheight(6)
  rows = np.arange(len(results))
  for i, (name, (label, look)) in enumerate(MEASURED.items()):
    found = np.array([values(runs, name) for runs in results.values()])
    axes.errorbar(
      found.mean(1),
      rows + 0.17 * (i - 1.5),
      xerr=found.std(1, ddof=1),
      label=label,
      capsize=2,
      **figures.look(look) | {'linestyle': 'none'},
    )
  axes.set_yticks(rows, list(results))
  axes.invert_yaxis()
  axes.set(xlabel='held-out accuracy, %', ylabel='cause', xlim=(0, 100))
  figures.legend(figure)
  return figure


def draw_curves(curves: Curves, title: str) -> Figure:
  """Both modes over the steps of each setting."""
  columns = min(len(curves), 3)
  figure, panels = figures.make(title, -(-len(curves) // columns), columns)
  for axes, (name, runs) in zip(panels.flat, curves.items(), strict=True):
    points = np.array(runs)  # seeds, tests, fields
    for column, key in ((1, 'train'), (2, 'evaluation')):
      label, look = MEASURED[key]
      figures.draw(axes, points[0, :, 0], points[..., column], label, look)
    axes.set(title=name, xlabel='step', ylim=(0, 100))
  for axes in panels[:, 0]:
    axes.set_ylabel('held-out accuracy, %')
  figures.legend(figure)
  return figure


def draw_inspections(results: Results, title: str) -> Figure:
  """How far the running statistics are off in each layer."""
  figure, panels = figures.make(title, 1, 2)
  drawn = {
    'running means off, deviations': 'shift',
    '|log2 of running / batch deviations|': 'stretch',
  }
  shown = [cause for cause in results if cause != 'average: EMA']
  for axes, (label, name) in zip(panels.flat, drawn.items(), strict=True):
    for i, cause in enumerate(shown):
      off = [
        [np.sqrt(np.mean(getattr(layer, name) ** 2)) for layer in seen.layers]
        for seen in (result.inspection for result in results[cause])
      ]
      number = len(off[0])
      figures.draw(axes, np.arange(1, number + 1), off, cause, i)
    axes.axhline(0.5, color='black', linewidth=0.8, label='a warning above')
    axes.set(xlabel='norm, from the input', ylabel=label, yscale='log')
    axes.set_xticks(range(1, number + 1))
  figures.legend(figure, 'cause')
  return figure


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None, 'The gap between training and evaluation mode.', 'the photographs'
  )
  causes, seeds, steps, tests = list(CAUSES), 3, 100, 8
  if args.small:
    causes, seeds, steps, tests = SMALL, 2, 6, 2
  console = Console(markup=False, emoji=False, width=100)
  results, curves = run(
    causes,
    args.data or data.photographs(),
    seeds=seeds,
    steps=steps,
    tests=tests,
    layers=FEWER if args.small else LAYERS,
    console=console,
  )
  mean = f'mean ± std of {seeds} seeds'

# %% [markdown]
# ### While training

# %%
if __name__ == '__main__':
  figures.save(
    args.out, train_eval_curves=draw_curves(curves, f'While training, {mean}')
  )

# %% [markdown]
# ### The gap, and what mends it

# %%
if __name__ == '__main__':
  console.print(result_table(results))
  figures.save(
    args.out, train_eval_gap=draw_gaps(results, f'Both modes, {mean}')
  )

# %% [markdown]
# ### What `inspect` sees

# %%
if __name__ == '__main__':
  summary.tell((f'- {finding}' for finding in findings(results)), args.small)
  title = f'`inspect`, {mean}, without EMA'
  figures.save(args.out, train_eval_inspect=draw_inspections(results, title))
