# %% [markdown]
# # A small CNN, with and without normalization
#
# The same convolutional network is trained on 8x8 scans of handwritten digits
# with batch, layer, group and instance norm and with none, several times each.
# Run the cells in a notebook opened in this folder, or all of them at once:
#
#     python examples/train_cnn.py --out out
#
# `--help` lists the options: other norms, steps, seeds, MNIST or CIFAR-10 from
# a directory, several devices.

# %%
import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import csv
import dataclasses
import itertools
import math
import pathlib
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from sklearn.model_selection import train_test_split

import data
import figures
import normkit as nk
import normkit.linen
import options
import training

# %% [markdown]
# ## The network
#
# Six convolutions, each followed by a norm. Every norm of normkit is a
# transform, a frozen dataclass with `init` and `apply`, and
# `normkit.linen.Norm` makes a Flax module of it. So the norm is one field of
# the network, and changing it is a change of one line.

# %%
NORMS: dict[str, nk.Norm | None] = {
  'batch': nk.BatchNorm(momentum=0.9),
  # Over a whole image, with a scale a channel. LayerNorm() alone is over the
  # channels of each pixel, and many pixels of these digits are empty.
  'layer': nk.LayerNorm(axis=(1, 2, 3), feature_axis=-1),
  'group': nk.GroupNorm(num_groups=8),
  'instance': nk.InstanceNorm(),
  'none': None,
}


# Channels, and whether pixels are halved behind them.
LAYERS = (32, True), (64, True), *(((64, False),) * 4)


class CNN(nn.Module):
  norm: nk.Norm | None
  classes: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for channels, pool in LAYERS:
      # The bias of a norm does what the bias of the convolution would do.
      x = nn.Conv(channels, (3, 3), use_bias=self.norm is None)(x)
      if self.norm is not None:
        x = normkit.linen.Norm(self.norm)(x, train=train)
      x = nn.relu(x)
      if pool:
        x = nn.max_pool(x, (2, 2), (2, 2))
    return nn.Dense(self.classes)(x.reshape(len(x), -1))


# %% [markdown]
# ## The data
#
# A tenth of the training images is set aside for validation: the settings
# below were chosen on it. The test images are looked at once, at the end.


# %%
class Split(NamedTuple):
  images: np.ndarray
  labels: np.ndarray


class Splits(NamedTuple):
  name: str
  classes: int
  train: Split
  validation: Split
  test: Split


def split(dataset: data.Dataset, seed: int) -> Splits:
  """Sets a tenth of the training images aside for validation."""
  labels = dataset.train_labels
  train, validation = train_test_split(
    np.arange(len(labels)), test_size=0.1, random_state=seed
  )
  images = dataset.train_images
  return Splits(
    dataset.name,
    int(max(labels.max(), dataset.test_labels.max())) + 1,
    Split(images[train], labels[train]),
    Split(images[validation], labels[validation]),
    Split(dataset.test_images, dataset.test_labels),
  )


class Batch(NamedTuple):
  images: np.ndarray
  labels: np.ndarray
  shifts: np.ndarray  # (n, 2), from 0 to 2: by how much each image moves


def batches(train: Split, size: int, seed: int) -> Iterator[Batch]:
  """Whole batches of epoch after epoch, without end, shuffled anew in each."""
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(len(train.labels))
    for start in range(0, len(order) - size + 1, size):
      index = order[start : start + size]
      shifts = rng.integers(0, 3, (size, 2))
      yield Batch(train.images[index], train.labels[index], shifts)


# %% [markdown]
# ## A step
#
# Parameters are trained; the running statistics of batch norm are carried
# along in `batch_stats`, which is empty for the other norms. With several
# devices each takes its part of the batch: batch norm pools its statistics
# over them (its field `axis_name`), and the gradients are averaged, so that
# the result is that of one device.

# %%
AXIS = 'devices'
Devices = Sequence[jax.Device]


def make_model(name: str, classes: int, devices: Devices) -> CNN:
  """The network with a norm that pools over the devices, if it has to."""
  norm = NORMS[name]
  if isinstance(norm, nk.BatchNorm) and len(devices) > 1:
    norm = dataclasses.replace(norm, axis_name=AXIS)
  return CNN(norm, classes)


def make_step(
  model: CNN, optimizer: optax.GradientTransformation, devices: Devices
) -> Callable[[training.State, Batch], tuple[training.State, jax.Array]]:
  """The compiled training step: state and batch in, state and loss out."""

  def loss_and_stats(params, batch_stats, batch):
    logits, updated = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      training.shifted(batch.images, batch.shifts),
      train=True,
      mutable=['batch_stats'],
    )
    return training.mean_loss(logits, batch.labels), updated.get(
      'batch_stats', {}
    )

  def step(state, batch):
    gradient = jax.value_and_grad(loss_and_stats, has_aux=True)
    (loss, batch_stats), grads = gradient(*state[:2], batch)
    if len(devices) > 1:
      loss, grads = lax.pmean((loss, grads), AXIS)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return training.State(params, batch_stats, moments), loss

  if len(devices) == 1:
    return jax.jit(step)
  return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def parts(batch: Batch, devices: Devices) -> Batch:
  """The batch with a leading axis of devices, where there are several."""
  n = len(devices)
  if n == 1:
    return batch
  return jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), batch)


# %% [markdown]
# ## Prediction
#
# With `train=False` batch norm uses its running statistics, so a prediction
# does not depend on the other images of its batch.


# %%
def evaluate(model: CNN, variables: Any, split: Split) -> tuple[float, float]:
  """Mean loss and accuracy."""
  logits = training.logits_of(model, variables, split.images)
  right = logits.argmax(-1) == split.labels
  return float(training.mean_loss(logits, split.labels)), float(right.mean())


# %% [markdown]
# ## A run
#
# Gradient descent with momentum, at a learning rate that falls to zero along a
# cosine, the same for all. Without a norm the signal shrinks from layer to
# layer, from 0.5 to 0.03, as Flax's initial weights reckon with no ReLU, the
# gradient with it, and the network hardly starts. Larger rates serve it better:
# with `--norm none --lr 0.03 --seeds 5` it ends at 92 %, with 0.1 between 60
# and 98 %, one seed of five at 95 % in time.
#
# The training loss is kept at every step, the validation loss and accuracy once
# an epoch.


# %%
class Epoch(NamedTuple):
  epoch: int
  step: int
  train_loss: float
  validation_loss: float
  validation_accuracy: float


class Run(NamedTuple):
  model: CNN
  seed: int
  variables: Any
  losses: list[float]
  epochs: list[Epoch]
  test_accuracy: float


class Watch(NamedTuple):
  """What is called after each step and after each epoch."""

  step: Callable[[], None]
  epoch: Callable[[Epoch], None]


def train_norm(
  name: str, splits: Splits, args: argparse.Namespace, watch: Watch
) -> list[Run]:
  """Trains the network with one norm, once for each seed."""
  model = make_model(name, splits.classes, args.devices)
  rate = optax.cosine_decay_schedule(args.lr, args.steps)
  optimizer = optax.sgd(rate, momentum=0.9)
  step = make_step(model, optimizer, args.devices)
  runs = []
  for seed in range(args.seed, args.seed + args.seeds):
    state = training.init(model, optimizer, splits.train.images[:1], seed)
    state, losses, epochs = fit(model, step, state, splits, args, seed, watch)
    _, accuracy = evaluate(model, state.variables, splits.test)
    runs.append(Run(model, seed, state.variables, losses, epochs, accuracy))
  return runs


def fit(
  model: CNN,
  step: Callable[[training.State, Batch], tuple[training.State, jax.Array]],
  state: training.State,
  splits: Splits,
  args: argparse.Namespace,
  seed: int,
  watch: Watch,
) -> tuple[training.State, list[float], list[Epoch]]:
  """Takes all steps; returns the last state, the losses and the epochs."""
  feed = batches(splits.train, args.batch_size, seed)
  length = len(splits.train.labels) // args.batch_size
  losses, epochs = [], []
  for number, batch in enumerate(itertools.islice(feed, args.steps), 1):
    state, loss = step(state, parts(batch, args.devices))
    losses.append(loss)
    watch.step()
    if number % length == 0 or number == args.steps:
      losses = [float(loss) for loss in losses]
      mean = float(np.mean(losses[len(epochs) * length :]))
      if not np.isfinite(mean):
        raise SystemExit(
          f'The loss of {model.norm}, seed {seed}, is {mean} by step {number}. '
          f'--lr={args.lr} is too large; take a smaller one.'
        )
      scores = evaluate(model, state.variables, splits.validation)
      epochs.append(Epoch(len(epochs) + 1, number, mean, *scores))
      watch.epoch(epochs[-1])
  return state, losses, epochs


# %% [markdown]
# ## Saving
#
# Orbax writes the weights and the running statistics. What it reads back must
# give the same predictions, bit for bit.


# %%
def save_and_check(run: Run, images: np.ndarray, path: pathlib.Path) -> None:
  """Saves the variables; raises unless they load to the same predictions."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path.absolute(), run.variables, force=True)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(lambda: run.variables)
    loaded = checkpointer.restore(path.absolute(), shapes)
  before, after = (
    training.logits_of(run.model, v, images) for v in (run.variables, loaded)
  )
  if not np.array_equal(before, after, equal_nan=True):
    raise RuntimeError(
      f'The variables loaded from {path} give other predictions than those '
      f'saved: the largest difference is {np.abs(before - after).max()}.'
    )


# %% [markdown]
# ## What came out
#
# A table of test accuracies and of the steps until validation accuracy is 95 %,
# a figure of the runs, and every step's loss. Validation is once an epoch, so
# steps are whole epochs.


# %%
TARGET = 0.95


def steps_to(run: Run) -> float:
  """Steps before the first epoch with the target's accuracy, inf if never."""
  reached = (e.step for e in run.epochs if e.validation_accuracy >= TARGET)
  return next(reached, math.inf)


def in_words(runs: list[Run]) -> str:
  """The median of the steps to the target, the least and the largest."""
  steps = sorted(map(steps_to, runs))
  middle, *ends = (
    f'{n:.0f}' if math.isfinite(n) else 'never'
    for n in (steps[len(steps) // 2], steps[0], steps[-1])
  )
  return middle if len(set(ends)) == 1 else f'{middle} ({" to ".join(ends)})'


def comparison(results: dict[str, list[Run]]) -> list[list[str]]:
  """One row for each norm: accuracies in percent, over the seeds."""
  rows = []
  for name, runs in results.items():
    test = 100 * np.array([run.test_accuracy for run in runs])
    validation = [run.epochs[-1].validation_accuracy for run in runs]
    rows.append(
      [
        name,
        f'{test.mean():.2f}',
        f'{test.std(ddof=1):.2f}' if len(test) > 1 else '-',
        f'{test.min():.2f} to {test.max():.2f}',
        f'{100 * np.mean(validation):.2f}',
        in_words(runs),
      ]
    )
  return rows


HEADER = [
  'norm',
  'test %',
  'std',
  'range',
  'validation %',
  f'steps to {TARGET:.0%}',
]


def markdown(rows: list[list[str]]) -> str:
  """The rows as a table in Markdown."""
  lines = [HEADER, ['---'] + ['---:'] * (len(HEADER) - 1), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def write_losses(results: dict[str, list[Run]], path: pathlib.Path) -> None:
  """Writes the training loss of every step, one a line."""
  with path.open('w', newline='') as file:
    writer = csv.writer(file)
    writer.writerow(['norm', 'seed', 'step', 'loss'])
    for name, runs in results.items():
      for run in runs:
        for number, loss in enumerate(run.losses, 1):
          writer.writerow([name, run.seed, number, loss])


def draw(results: dict[str, list[Run]], title: str) -> Figure:
  """Loss and accuracy over steps: the mean over the seeds, and their range."""
  figure, ((left, right),) = figures.make(title, 1, 2)
  for name, runs in results.items():
    draw_field(left, name, runs, 'train_loss')
    draw_field(right, name, runs, 'validation_accuracy')
  left.set(ylabel='training loss, mean of an epoch', yscale='log')
  right.set(ylabel='validation accuracy', ylim=late_range(results))
  for axes in (left, right):
    axes.set_xlabel('step')
  figures.legend(figure, 'norm')
  return figure


def curves(runs: list[Run], field: str) -> np.ndarray:
  """A field of all epochs, (seeds, epochs)."""
  return np.array([[getattr(e, field) for e in r.epochs] for r in runs])


def draw_field(axes: Axes, name: str, runs: list[Run], field: str) -> None:
  """Draws a field's mean over the seeds, and its range as a band."""
  steps, values = curves(runs[:1], 'step')[0], curves(runs, field)
  look = figures.look(name)
  axes.plot(steps, values.mean(0), label=name, **look)
  low, high = values.min(0), values.max(0)
  axes.fill_between(
    steps, low, high, color=look['color'], alpha=0.15, linewidth=0
  )


def late_range(results: dict[str, list[Run]]) -> tuple[float, float]:
  """The accuracies that follow the first fifth of training, and a margin."""
  values = [curves(runs, 'validation_accuracy') for runs in results.values()]
  late = np.concatenate(values)[:, values[0].shape[1] // 5 :]
  margin = 0.01 + 0.05 * np.ptp(late)
  return late.min() - margin, late.max() + margin


# %% [markdown]
# ## Options
#
# `--devices N` asks JAX for N devices: accelerators where there are so many,
# else that many parts of the processor, which serves to try the code.


# %%
def find_devices(n: int) -> tuple[jax.Device, ...]:
  """N accelerators, or N devices made of the processor."""
  if n > 1:
    # Once JAX runs, as it may in a notebook, it keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
      jax.config.update('jax_num_cpu_devices', n)
  devices = jax.devices()
  if len(devices) < n:
    devices = jax.devices('cpu')
  if len(devices) < n:
    raise ValueError(
      f'{n} devices were asked for, JAX has {len(devices)}. Start anew, or ask '
      f'for at most {len(devices)}.'
    )
  return tuple(devices[:n])


def whole(smallest: int) -> Callable[[str], int]:
  """An argument's type: a whole number, not below `smallest`."""

  def convert(text: str) -> int:
    if not text.isdecimal() or not smallest <= int(text) < 2**31:
      raise argparse.ArgumentTypeError(
        f'got {text!r}, accepted is a whole number from {smallest} to 2^31 - 1'
      )
    return int(text)

  return convert


def positive(text: str) -> float:
  """An argument's type: a finite number above zero."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < float('inf'):
    raise argparse.ArgumentTypeError(
      f'got {text!r}, accepted is a finite number above 0, such as 0.005'
    )
  return value


def make_parser() -> argparse.ArgumentParser:
  """The options and their types."""
  parser = argparse.ArgumentParser(
    description='Trains a small CNN on images and compares norms.'
  )

  def add(flag: str, help: str, **options: Any) -> None:
    if 'default' in options:
      help += ' (%(default)s)'
    parser.add_argument(flag, help=help, **options)

  add('--norm', 'train with this norm alone; without it, all', choices=NORMS)
  add('--steps', 'steps of a run', type=whole(1), default=300)
  add('--batch-size', 'images of a step', type=whole(1), default=64)
  add('--seed', 'the first seed', type=whole(0), default=0)
  add('--seeds', 'runs of each norm', type=whole(1), default=3)
  add('--lr', 'learning rate at the start', type=positive, default=0.01)
  add('--out', 'directory of results', type=pathlib.Path, default='out')
  add(
    '--data',
    'directory with MNIST (IDX files) or CIFAR-10 (binary version); without '
    'it, the digits of scikit-learn',
    type=options.dataset_in,
    metavar='DIR',
  )
  add('--devices', 'devices that share each batch', type=whole(1), default=1)
  return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Splits]:
  """The options and the data; a wrong option ends the program, status 2."""
  parser = make_parser()
  args = parser.parse_args(options.arguments(argv))
  splits = split(args.data or data.digits(), args.seed)
  images, size = len(splits.train.labels), args.batch_size
  if size > images:
    parser.error(
      f'argument --batch-size: got {size}, accepted is at most {images}, the '
      f'number of training images in {splits.name}'
    )
  if size % args.devices:
    parser.error(
      f'argument --devices: got {args.devices}, accepted is a divisor of '
      f'--batch-size, which is {size}'
    )
  try:
    args.devices = find_devices(args.devices)
  except ValueError as error:
    parser.error(f'argument --devices: {error}')
  if '[' in str(args.out.absolute()):
    parser.error(
      f'argument --out: got {str(args.out)!r}, accepted is a path without [, '
      'behind which Orbax does not find what it wrote'
    )
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(
      f'argument --out: got {str(args.out)!r}, accepted is a directory that '
      f'is there or can be made: {error}'
    )
  return args, splits


# %% [markdown]
# ## Everything together
#
# The first run prints a row for each epoch. The table at the end is of the
# test images.


# %%
def print_epoch(console: Console, epoch: Epoch) -> None:
  """Prints an epoch as a row of a table, below a header for the first."""
  table = Table(box=None, show_header=epoch.epoch == 1, pad_edge=False)
  for name in Epoch._fields:
    table.add_column(name.replace('_', ' '), justify='right', width=10)
  table.add_row(
    *(f'{x:.4f}' if isinstance(x, float) else str(x) for x in epoch)
  )
  console.print(table)


def print_comparison(console: Console, rows: list[list[str]]) -> None:
  """Prints the accuracies of all norms."""
  table = Table()
  for name in HEADER:
    table.add_column(name, justify='left' if name == 'norm' else 'right')
  for row in rows:
    table.add_row(*row)
  console.print(table)


def make_watch(progress: Progress, name: str, total: int, show: bool) -> Watch:
  """A bar for a norm, and if `show` a row for each epoch of its first run."""
  task = progress.add_task(name, total=total)
  bar = progress.tasks[task]

  def on_epoch(epoch: Epoch) -> None:
    if show and epoch.step == bar.completed:
      print_epoch(progress.console, epoch)

  return Watch(lambda: progress.advance(task), on_epoch)


# %% [markdown]
# In a notebook, options stand in the next cell: `['--steps=20', '--seeds=1']`
# for `None`.

# %%
if __name__ == '__main__':
  args, splits = parse(None)
  console = Console(markup=False, emoji=False)
  names = [args.norm] if args.norm else list(NORMS)
  counts = ', '.join(
    f'{len(part.labels)} {name}'
    for name, part in splits._asdict().items()
    if isinstance(part, Split)
  )
  console.print(f'{splits.name}: {counts} images.')
  console.print(f'The epochs of norm {names[0]}, seed {args.seed}:')
  results = {}
  columns = (*Progress.get_default_columns(), MofNCompleteColumn())
  with Progress(*columns, console=console) as progress:
    for name in names:
      total = args.steps * args.seeds
      watch = make_watch(progress, name, total, show=name == names[0])
      results[name] = train_norm(name, splits, args, watch)

# %%
if __name__ == '__main__':
  path = args.out / 'checkpoint'
  save_and_check(results[names[0]][0], splits.test.images, path)
  console.print(f'{path} loads back to the same predictions.')

# %%
if __name__ == '__main__':
  rows = comparison(results)
  (args.out / 'accuracy.md').write_text(markdown(rows))
  write_losses(results, args.out / 'losses.csv')
  title = f'{splits.name}, mean and range of {args.seeds} seeds'
  figures.save(args.out, curves=draw(results, title))
  print_comparison(console, rows)
  console.print(f'Wrote accuracy.md and losses.csv to {args.out}.')
