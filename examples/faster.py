# %% [markdown]
# # The same accuracy in fewer steps
#
# Ioffe and Szegedy, "Batch Normalization" (2015), section 4.2, say of an
# Inception on ImageNet that with batch norm it reaches the accuracy of the
# plain network in 2.3 times fewer steps at the same learning rate, and in 14
# times fewer at five times that rate, at which the plain network diverges; and,
# in section 3.3, that the scale of the weights matters less. Do they hold here?
#
# 1. Test accuracy over the steps, at 1, 5 and 30 times the plain network's best
#    learning rate, and the steps to its last accuracy.
# 2. The last accuracy against the learning rate.
# 3. The last accuracy against the scale of the initial weights.
# 4. The first again, of a small Inception.
#
# The first network is small and dense, and its data are 1,797 scans of
# handwritten digits, 8x8: a network deep enough to be hard to train, and easy
# data. The Inception tells patches of ten photographs apart.
#
# All of it, in a few minutes, or a part, sooner, to see it run:
#
#     python examples/faster.py --out out
#     python examples/faster.py --out out --small

# %%
from collections.abc import Sequence
import itertools
import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import data
import figures
from models import TORCH, DeepNet, SmallInception
import normkit as nk
import options
import summary
from sweep import (
  BATCH_SIZE,
  OPTIMIZER,
  Runs,
  Setting,
  after,
  best,
  failed,
  fit,
  last,
  near,
  row_of,
  settings_table,
  steps_to,
  with_rate,
)
import training

# %% [markdown]
# ## The network
#
# `DeepNet` in `models.py`: hidden layers of 64 units, a norm before each ReLU.
# The initial weights are those of He et al. (2015), made for plain networks
# with ReLUs: the plain one gets the best start that is known for it.
#
# Gradient descent with momentum 0.9 and a constant rate, batches of 60. All
# runs of a network, five seeds of each rate and scale, are one program
# (`sweep.py`).

# %%
NORMS: dict[str, nk.Norm | None] = {
  'none': None,
  'batch': TORCH,
  'layer': nk.LayerNorm(),
  'group': nk.GroupNorm(num_groups=8),
}

# %% [markdown]
# ## The paper's kind of network
#
# `SmallInception` in `models.py`. Its runs go one after another: on processors
# convolutions are slow under `vmap`.


# %%
def fit_inception(
  model: SmallInception,
  dataset: data.Dataset,
  rates: Sequence[float],
  seeds: int,
  steps: int,
) -> Runs:
  """Trains an Inception with each rate and each seed."""
  every = max(steps // 12, 3)

  starts = [
    training.init(model, OPTIMIZER, dataset.train_images, seed)
    for seed in range(seeds)
  ]

  def run(rate: float, seed: int) -> tuple[list[Any], list[float]]:
    first = with_rate(starts[seed], rate)
    order = training.batches(len(dataset.train_labels), BATCH_SIZE, seed)
    order = itertools.islice(order, steps)
    losses, accuracies = [], []
    for number, state, loss in training.walk(
      model, OPTIMIZER, dataset, order, first
    ):
      losses.append(loss)
      if number % every == 0:
        accuracies.append(training.accuracy(model, state.variables, dataset))
    return losses, accuracies

  runs = [[run(rate, seed) for seed in range(seeds)] for rate in rates]
  losses, accuracies = (
    np.array([[one[i] for one in of_rate] for of_rate in runs]) for i in (0, 1)
  )
  return Runs(losses, np.arange(every, steps + 1, every), accuracies)


# %% [markdown]
# ## What is taken from a run
#
# A run failed if its loss, the mean of the last tenth of the steps, is no lower
# than that of guessing, or not a number. The best rate of a norm is that of the
# highest last accuracy, the mean over the seeds, for all norms alike; as it is
# chosen on the test images, it flatters all of them alike.


# %%
def curves_table(runs: dict[str, Runs], target: float) -> Table:
  """Steps to the target, and the last accuracy, of each curve."""
  title = f'Steps to {target:.1f}%, one number a seed'
  table = summary.table(title, ['run'], ['steps', 'last accuracy, %', 'failed'])
  for name, run in runs.items():
    (steps,), (end,) = steps_to(run, target), last(run)
    found = ', '.join(f'{n:.0f}' if n < np.inf else 'never' for n in steps)
    bad = f'{failed(run.losses).sum()} of {end.size}'
    table.add_row(name, found, summary.spread(end), bad)
  return table


# %%
def claims(curves: dict[str, Runs], target: float) -> list[str]:
  """The claims of the paper on the number of steps, and what was found."""
  plain = curves['none, x1']
  found = [
    f'{name} {compare(plain, curves[name], target)}; the paper: {paper}.'
    for name, paper in (
      ('batch, x1', '2.3 times fewer'),
      ('batch, x5', '14 times fewer'),
      ('batch, x30', '11 times fewer, and the highest accuracy in the end'),
    )
  ]
  losses = curves['none, x5'].losses
  found.append(
    f'none, x5: {failed(losses).sum()} of {losses.shape[1]} runs failed; the '
    'paper: it diverges.'
  )
  return found


def ranges(rates: dict[str, Runs], scales: dict[str, Runs]) -> list[str]:
  """How many rates and scales serve."""
  found = []
  for what, runs in (('rates', rates), ('scales', scales)):
    counts = ', '.join(f'{near(runs[name])} {name}' for name in runs)
    total = len(last(runs['none']))
    found.append(
      f'Of {total} {what}, those within 5 points of the best of their norm: '
      f'{counts}.'
    )
  return found


def compare(plain: Runs, runs: Runs, target: float) -> str:
  """The median steps to the target beside the plain network's."""
  before, steps = (float(np.median(steps_to(r, target))) for r in (plain, runs))
  ends = (
    f'ends at {last(runs).mean():.1f}%, the plain network at '
    f'{last(plain).mean():.1f}%'
  )
  if not math.isfinite(steps) or not math.isfinite(before):
    return (
      f'is there {after(steps)}, the plain network {after(before)}, and {ends}'
    )
  ratio = before / steps
  much = (
    f'{ratio:.1f} times fewer' if ratio >= 1 else f'{1 / ratio:.1f} times more'
  )
  return f'is there in {much} steps, and {ends}'


# %% [markdown]
# ## The figures


# %%
LOOKS = {
  'none, x1': 'none',
  'none, x5': 'other',
  'batch, x1': 'group',
  'batch, x5': 'batch',
  'batch, x30': 'renorm',
}


def draw_curves(
  runs: dict[str, Runs], target: float, title: str, least: float
) -> Figure:
  """Test error over the steps, down to the least that is shown."""
  figure, ((axes,),) = figures.make(title)
  for name, run in runs.items():
    errors = 100 - run.accuracies[0]
    figures.draw(axes, run.steps, errors, name, LOOKS[name])
    axes.lines[-1].set_markevery(max(len(run.steps) // 15, 1))
  axes.axhline(100 - target, color='black', linewidth=0.8, label='target')
  axes.set(
    xlabel='step', ylabel='test error, %', yscale='log', ylim=(least, 100)
  )
  axes.yaxis.set_major_locator(FixedLocator([2, 5, 10, 20, 50, 100]))
  axes.yaxis.set_major_formatter('{x:.0f}')
  axes.yaxis.set_minor_locator(NullLocator())
  figures.legend(figure, 'norm, rate')
  return figure


def draw_settings(
  values: Sequence[float], runs: dict[str, Runs], label: str, title: str
) -> Figure:
  """The last accuracy, and below it how many runs failed."""
  figure, panels = figures.make(title, 2)
  for name, run in runs.items():
    figures.draw(panels[0, 0], values, last(run).T, name)
    share = 100 * failed(run.losses).mean(-1)
    panels[1, 0].plot(values, share, **figures.look(name))
  for axes, y in zip(
    panels.flat, ('last test accuracy, %', 'runs that failed, %'), strict=True
  ):
    axes.set(xscale='log', xlabel=label, ylabel=y, ylim=(-4, 104))
  figures.legend(figure, 'norm')
  return figure


# %%
LAST = 'Last test accuracy, %; in brackets, runs that failed'
RATES = [float(rate) for rate in np.geomspace(0.001, 10, 9)]
SCALES = [float(scale) for scale in np.geomspace(0.1, 10, 9)]
COARSE = [0.01, 0.03, 0.1]  # of the Inception
TIMES = {'none': (1, 5), 'batch': (1, 5, 30)}


def inception_curves(
  dataset: data.Dataset, seeds: int, steps: int, **options: Any
) -> tuple[float, dict[str, Runs]]:
  """The plain Inception's best rate, and the runs at multiples of it.

  The options are those of `SmallInception`.
  """
  nets = {name: SmallInception(NORMS[name], **options) for name in TIMES}
  plain = fit_inception(nets['none'], dataset, COARSE, seeds, steps)
  rate = best(COARSE, plain)
  curves = {'none, x1': row_of(plain, COARSE.index(rate))}
  for name, n in (('none', 5), ('batch', 1), ('batch', 5), ('batch', 30)):
    curves[f'{name}, x{n}'] = fit_inception(
      nets[name], dataset, [n * rate], seeds, steps
    )
  return rate, curves


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None,
    'Steps to an accuracy, with batch norm and without.',
    'digits and photographs',
  )
  digits = data.part(args.data or data.digits(), args.small)
  layers, seeds, steps = (1, 2, 5) if args.small else (8, 5, 300)
  console = Console(markup=False, emoji=False, width=100)
  nets = {name: DeepNet((norm,) * layers) for name, norm in NORMS.items()}
  if args.small:
    del nets['layer'], nets['group']
  every = 4 if args.small else 1
  tried, sizes = RATES[::every], SCALES[::every]
  over = f'mean and standard deviation of {seeds} seeds'

# %% [markdown]
# ### Learning rates

# %%
if __name__ == '__main__':
  rates = {}
  for name in track(nets, 'learning rates', console=console):
    settings = [Setting(rate) for rate in tried]
    rates[name] = fit(nets[name], digits, settings, seeds, steps)
  tuned = {name: best(tried, runs) for name, runs in rates.items()}
  console.print(settings_table(tried, rates, LAST, 'learning rate'))
  title = f'Learning rates, {over}'
  figures.save(
    args.out, faster_rates=draw_settings(tried, rates, 'learning rate', title)
  )

# %% [markdown]
# ### Initial weights

# %%
if __name__ == '__main__':
  scales = {}
  for name in track(nets, 'initial weights', console=console):
    settings = [Setting(tuned[name], scale) for scale in sizes]
    scales[name] = fit(nets[name], digits, settings, seeds, steps)
  console.print(settings_table(sizes, scales, LAST, 'scale'))
  label = "scale of the initial weights, He's = 1"
  title = f'Initial weights, each norm at its best rate, {over}'
  figures.save(
    args.out, faster_scales=draw_settings(sizes, scales, label, title)
  )

# %% [markdown]
# ### Steps to an accuracy

# %%
if __name__ == '__main__':
  curves = {}
  for name, factors in track(TIMES.items(), 'curves', console=console):
    settings = [Setting(n * tuned['none']) for n in factors]
    runs = fit(nets[name], digits, settings, seeds, steps)
    for row, n in enumerate(factors):
      curves[f'{name}, x{n}'] = row_of(runs, row)
  target = float(last(curves['none, x1']).mean())
  console.print(curves_table(curves, target))
  best_rates = ', '.join(f'{name} {rate:.2g}' for name, rate in tuned.items())
  console.print(f'Best learning rates: {best_rates}; x1 is that of none.')
  summary.tell(claims(curves, target) + ranges(rates, scales), args.small)
  title = f'Error over the steps, {over}'
  figures.save(args.out, faster_curves=draw_curves(curves, target, title, 2))

# %% [markdown]
# ### A small Inception

# %%
if __name__ == '__main__':
  patches = data.part(args.data or data.photographs(), args.small)
  seeds_of, steps_of = (2, 3) if args.small else (3, 180)
  size = {'widths': (8,)} if args.small else {}
  rate, inception = inception_curves(patches, seeds_of, steps_of, **size)
  # What every plain run reaches: they end far apart.
  goal = float(last(inception['none, x1']).min())
  console.print(curves_table(inception, goal))
  console.print(f'Inception, best of {COARSE} without a norm: {rate:g}.')
  found = (f'Inception: {claim}' for claim in claims(inception, goal))
  summary.tell(found, args.small)
  title = f'A small Inception, mean and standard deviation of {seeds_of} seeds'
  figures.save(
    args.out, faster_inception=draw_curves(inception, goal, title, 10)
  )
