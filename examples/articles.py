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
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/articles.py --out out
#     python examples/articles.py --out out --small

# %%
from collections.abc import Callable
import dataclasses
import functools
import importlib
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
from normkit.tools import convert
import options
import summary
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
  """Variants of a network, and what they are trained with.

  `load` gives the images; it is given those of `--data`, or None.
  """

  variants: dict[str, nn.Module]
  load: Callable[[data.Dataset | None], data.Dataset]
  steps: int
  batch_size: int


def digits(shape: tuple[int, int, int]) -> Callable[..., data.Dataset]:
  """Images of one's own, or the digits, in that shape."""
  return lambda own: data.as_images(own or data.digits(), shape)


def photographs(own: data.Dataset | None) -> data.Dataset:
  return data.as_images(own or data.photographs(), (32, 32, 3))


def sequences(own: data.Dataset | None) -> data.Dataset:
  return data.as_sequences(own or data.digits())


TASKS = {
  'MnistNet': Task(
    {
      'batch': MnistNet(),
      'none': MnistNet(norm=None),
      'batch, last ReLU': MnistNet(last_relu=True),
      'none, last ReLU': MnistNet(norm=None, last_relu=True),
    },
    digits((28, 28, 1)),
    steps=200,
    batch_size=64,
  ),
  'KerasCNN': Task(
    {
      'batch': KerasCNN(),
      'batch, debias': KerasCNN(dataclasses.replace(KERAS, debias=True)),
      'none': KerasCNN(norm=None),
    },
    photographs,
    steps=150,
    batch_size=32,
  ),
  'Conv1D': Task(
    {'batch': Conv1D(), 'none': Conv1D(norm=None)},
    sequences,
    steps=400,
    batch_size=64,
  ),
  'Conv2D': Task(
    {'batch': Conv2D(), 'none': Conv2D(norm=None)},
    digits((28, 28, 3)),
    steps=100,
    batch_size=32,
  ),
}
SMALL = {name: TASKS[name]._replace(steps=2) for name in ('MnistNet', 'Conv1D')}
OPTIMIZER = optax.adam(0.001)
Results = dict[str, dict[str, list[training.Run]]]  # network, variant, seed


def train(
  task: Task, dataset: data.Dataset, seeds: int, watch: Callable[[], None]
) -> dict[str, list[training.Run]]:
  """Trains each variant of a network once for each seed."""
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
def dead_outputs(model: nn.Module, variables: Any, images: np.ndarray) -> int:
  """How many outputs are negative on every image, before the last ReLU."""
  layers = training.layer_outputs(model, variables, images, ('dense2',))
  return int((layers['dense2'] <= 0).all(0).sum())


# %% [markdown]
# ## To PyTorch and back
#
# `normkit.tools.convert` gives the arrays of a `state_dict`, which
# `MnistNet` of PyTorch loads, and takes them back. The names are equal, and so
# is the order of the 320 that are flattened. Where PyTorch is installed, the
# same network is built of its layers, and asked for its outputs.


# %%
def to_torch_and_back(variables: Any, images: np.ndarray) -> str:
  """Whether the weights survive, and how far PyTorch's outputs are off."""
  state = convert.to_torch(variables)
  shapes = jax.eval_shape(lambda: variables)
  back = convert.from_torch(state, shapes)
  same = jax.tree.all(jax.tree.map(np.array_equal, back, variables))
  found = f'To PyTorch and back, all arrays are {"equal" if same else "OTHERS"}'
  try:
    wanted = torch_outputs(state, images)
  except ModuleNotFoundError:
    return f'{found}. PyTorch is not installed, so it was not run.'
  y = np.asarray(training.predict(MnistNet(), variables, images))
  return (
    f'{found}; its log-probabilities differ by {abs(y - wanted).max():.0e}.'
  )


def torch_outputs(
  state: dict[str, np.ndarray], images: np.ndarray
) -> np.ndarray:
  """What PyTorch's layers make of images (n, 28, 28, 1), in evaluation mode."""
  torch = importlib.import_module('torch')
  arrays = {name: torch.from_numpy(np.array(a)) for name, a in state.items()}
  f = torch.nn.functional

  def norm(x: Any, name: str) -> Any:
    mean, var = (arrays[f'{name}.running_{kind}'] for kind in ('mean', 'var'))
    scale, bias = (arrays[f'{name}.{kind}'] for kind in ('weight', 'bias'))
    return f.batch_norm(x, mean, var, scale, bias)

  def layer(function: Callable[..., Any], x: Any, name: str) -> Any:
    return function(x, arrays[f'{name}.weight'], arrays[f'{name}.bias'])

  x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  x = f.relu(f.max_pool2d(layer(f.conv2d, x, 'conv1'), 2))
  x = norm(layer(f.conv2d, x, 'conv2'), 'conv2_bn')
  x = f.relu(f.max_pool2d(x, 2)).flatten(1)
  x = f.relu(norm(layer(f.linear, x, 'dense1'), 'dense1_bn'))
  return f.log_softmax(layer(f.linear, x, 'dense2'), 1).numpy()


# %% [markdown]
# ## What came out


# %%
def accuracy_table(results: Results) -> Table:
  """Test accuracies after the last step, over the seeds."""
  columns = 'mean ± std', 'range'
  table = summary.table('Test accuracy, %', ['network', 'norm'], columns)
  for network, variants in results.items():
    for name, runs in variants.items():
      last = [run.accuracies[-1] for run in runs]
      table.add_row(network, name, summary.spread(last), summary.reach(last))
  return table


def dead_table(
  runs: dict[str, list[training.Run]], images: np.ndarray
) -> Table:
  """The dead outputs of MnistNet where it ends in a ReLU."""
  title = 'MnistNet: outputs that are dead'
  table = Table('norm', 'of 10, one number a seed', title=title)
  for name in ('batch, last ReLU', 'none, last ReLU'):
    model = TASKS['MnistNet'].variants[name]
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


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None,
    'Four networks of articles, with batch norm and without.',
    'digits and photographs',
  )
  tasks, seeds = (SMALL, 2) if args.small else (TASKS, 3)
  console = Console(markup=False, emoji=False, width=100)
  datasets = {
    name: data.part(task.load(args.data), args.small)
    for name, task in tasks.items()
  }
  spread = f'mean and standard deviation of {seeds} seeds'

# %% [markdown]
# ### With and without batch norm

# %%
if __name__ == '__main__':
  runs: Results = {}
  with Progress(console=console) as progress:
    for name, task in tasks.items():
      bar = progress.add_task(name, total=len(task.variants) * seeds)
      watch = functools.partial(progress.advance, bar)
      runs[name] = train(task, datasets[name], seeds, watch)
  console.print(accuracy_table(runs))
  figures.save(args.out, articles=draw_curves(runs, spread))

# %% [markdown]
# ### The last ReLU, and PyTorch

# %%
if __name__ == '__main__':
  mnist, images = runs['MnistNet'], datasets['MnistNet'].test_images
  console.print(dead_table(mnist, images))
  console.print(to_torch_and_back(mnist['batch'][0].variables, images[:100]))
  figures.save(args.out, articles_last_relu=draw_last_relu(mnist, spread))
