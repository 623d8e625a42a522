# %% [markdown]
# # Four networks of articles on batch normalization
#
# One for PyTorch on MNIST, one for Keras on CIFAR-10, and two for PyTorch that
# show the layer in one and two dimensions: layer for layer in `models.py`,
# trained here with and without their batch norm, a few times each. And what
# a ReLU behind the last layer costs, and a slow running average.
#
# The data are real, but others and fewer than the articles': scans of digits,
# and patches of ten photographs, the class being which of them a patch is from.
# So the accuracies are not the articles' either.
#
# All of it, in a minute or two, or a part, in seconds, to see it run:
#
#     python examples/articles.py --out out
#     python examples/articles.py --out out --small

# %%
import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import pathlib
import sys
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import data
import figures
from models import KERAS, Conv1D, Conv2D, KerasCNN, MnistNet
import training

# %% [markdown]
# ## The networks and their data
#
# The norm is a field of each network, so that None takes its place. All else
# stays as it is, the biases that batch norm makes idle among it. Adam with its
# usual rate of 0.001; nothing was tuned.
#
# Keras keeps 0.99 of its running averages at each step, so after 150 steps a
# fifth of them is still what they began with, mean zero and variance one.
# `debias` forgets that; it changes what the test sees, and the training not at
# all.


# %%
class Task(NamedTuple):
  """Variants of a network, and what they are trained with."""

  variants: dict[str, nn.Module]
  load: Callable[[], data.Dataset]
  steps: int
  batch_size: int


TASKS = {
  'MnistNet': Task(
    {
      'batch': MnistNet(),
      'none': MnistNet(norm=None),
      'batch, last ReLU': MnistNet(last_relu=True),
      'none, last ReLU': MnistNet(norm=None, last_relu=True),
    },
    data.digits28,
    steps=200,
    batch_size=64,
  ),
  'KerasCNN': Task(
    {
      'batch': KerasCNN(),
      'batch, debias': KerasCNN(dataclasses.replace(KERAS, debias=True)),
      'none': KerasCNN(norm=None),
    },
    data.photographs,
    steps=150,
    batch_size=32,
  ),
  'Conv1D': Task(
    {'batch': Conv1D(), 'none': Conv1D(norm=None)},
    data.digit_sequences,
    steps=400,
    batch_size=64,
  ),
  'Conv2D': Task(
    {'batch': Conv2D(), 'none': Conv2D(norm=None)},
    data.digits_rgb28,
    steps=100,
    batch_size=32,
  ),
}
SMALL = {name: TASKS[name]._replace(steps=4) for name in ('MnistNet', 'Conv1D')}
OPTIMIZER = optax.adam(0.001)
Results = dict[str, dict[str, list[training.Run]]]  # network, variant, seed


def train(
  task: Task, seeds: int, watch: Callable[[], None]
) -> dict[str, list[training.Run]]:
  """Trains each variant of a network once for each seed."""
  dataset = task.load()
  runs: dict[str, list[training.Run]] = {name: [] for name in task.variants}
  for name, model in task.variants.items():
    for seed in range(seeds):
      run = training.fit(
        model,
        dataset,
        OPTIMIZER,
        steps=task.steps,
        seed=seed,
        batch_size=task.batch_size,
      )
      runs[name].append(run)
      watch()
  return runs


# %% [markdown]
# ## The last ReLU
#
# A ReLU before the softmax makes each negative logit zero and lets no gradient
# through there. An output that is negative for every image, as it may be from
# the start, is dead: it learns nothing, and its class is hardly ever found,
# as another logit is above zero.


# %%
@functools.partial(jax.jit, static_argnums=0)
def dead_outputs(
  model: nn.Module, variables: Any, images: jax.Array
) -> jax.Array:
  """How many outputs are negative on every image, before the last ReLU."""
  _, captured = model.apply(
    variables,
    images,
    train=False,
    capture_intermediates=lambda module, _: module.name == 'dense2',
  )
  (logits,) = captured['intermediates']['dense2']['__call__']
  return (logits <= 0).all(0).sum()


# %% [markdown]
# ## What came out


# %%
def accuracy_table(results: Results) -> Table:
  """Test accuracies after the last step, over the seeds."""
  table = Table('network', 'norm', title='Test accuracy, %')
  for name in ('mean', 'std', 'range'):
    table.add_column(name, justify='right')
  for network, variants in results.items():
    for name, runs in variants.items():
      last = np.array([run.accuracies[-1] for run in runs])
      std = f'{last.std(ddof=1):.1f}' if len(last) > 1 else '-'
      spread = f'{last.min():.1f} to {last.max():.1f}'
      table.add_row(network, name, f'{last.mean():.1f}', std, spread)
  return table


def dead_table(runs: dict[str, list[training.Run]]) -> Table:
  """The dead outputs of MnistNet where it ends in a ReLU."""
  title = 'MnistNet: outputs that are dead'
  table = Table('norm', 'of 10, one number a seed', title=title)
  task = TASKS['MnistNet']
  images = task.load().test_images
  for name in ('batch, last ReLU', 'none, last ReLU'):
    model = task.variants[name]
    dead = [dead_outputs(model, run.variables, images) for run in runs[name]]
    table.add_row(name, ', '.join(map(str, dead)))
  return table


LOOKS = {'batch': 'batch', 'batch, debias': 'ghost', 'none': 'none'}


def draw_curves(results: Results, spread: str) -> Figure:
  """The test accuracy of each network over the steps."""
  title = f'With and without batch norm, {spread}'
  figure, panels = figures.make(title, -(-len(results) // 2), 2)
  for axes, (network, variants) in zip(
    panels.flat, results.items(), strict=True
  ):
    for name, look in LOOKS.items():
      if name in variants:
        draw_runs(axes, variants[name], name, look)
    axes.set_title(network)
  figures.legend(figure, 'norm')
  return figure


def draw_last_relu(runs: dict[str, list[training.Run]], spread: str) -> Figure:
  """MnistNet with and without its last ReLU."""
  title = f'A ReLU before the softmax of MnistNet, {spread}'
  figure, panels = figures.make(title, 1, 2)
  for axes, norm in zip(panels.flat, ('batch', 'none'), strict=True):
    draw_runs(axes, runs[norm], 'no ReLU', 'group')
    draw_runs(axes, runs[f'{norm}, last ReLU'], 'ReLU', 'renorm')
    axes.set(title=f'norm: {norm}', ylim=(0, 100))
  figures.legend(figure)
  return figure


def draw_runs(
  axes: Axes, runs: list[training.Run], label: str, look: str
) -> None:
  accuracies = [run.accuracies for run in runs]
  figures.draw(axes, runs[0].steps, accuracies, label, look)
  axes.set(xlabel='step', ylabel='test accuracy, %')


# %%
def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description='Four networks of articles, with batch norm and without.'
  )
  parser.add_argument(
    '--out', type=pathlib.Path, default=pathlib.Path('out'), help='folder'
  )
  parser.add_argument(
    '--small', action='store_true', help='seconds: to see it run, no more'
  )
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  tasks, seeds = (SMALL, 2) if args.small else (TASKS, 3)
  console = Console(markup=False, emoji=False)
  results: Results = {}
  with Progress(console=console) as progress:
    for name, task in tasks.items():
      bar = progress.add_task(name, total=len(task.variants) * seeds)
      watch = functools.partial(progress.advance, bar)
      results[name] = train(task, seeds, watch)
  console.print(accuracy_table(results), dead_table(results['MnistNet']))
  spread = f'mean and standard deviation of {seeds} seeds'
  curves = draw_curves(results, spread)
  last_relu = draw_last_relu(results['MnistNet'], spread)
  for name, figure in {'articles': curves, 'last_relu': last_relu}.items():
    console.print(f'Wrote {figures.save(figure, args.out, name)}.')


# %%
if __name__ == '__main__':
  main([] if 'ipykernel' in sys.modules else None)
