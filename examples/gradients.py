# %% [markdown]
# # Why batch norm helps: gradients, shifts and smoothness
#
# Three papers explain the same thing in three ways. What each one measures is
# measured here, on networks small enough for it.
#
# 1. At the start of training, without batch norm, activations grow with depth
#    and gradients are larger, with heavy tails (Bjorck et al., "Understanding
#    Batch Normalization", 2018, section 3).
# 2. With batch norm the inputs of a layer keep their distribution while the
#    network learns (Ioffe and Szegedy, 2015, section 4.1 and figure 1).
# 3. That isn't why it helps: with noise behind batch norm, which shifts the
#    distributions at every step, it trains as well (Santurkar et al., "How Does
#    Batch Normalization Help Optimization?", 2018, section 2).
# 4. It makes the loss smoother (theirs, section 3 and figure 4).
#
# The data are real and small: patches of ten photographs, the class being which
# of them a patch is from, and 1,797 scans of handwritten digits, 8x8.
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/gradients.py --out out
#     python examples/gradients.py --out out --small

# %%
from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console

import data
import figures
from models import TORCH, DeepNet, SmallResNet
import normkit as nk
import options
import summary
from sweep import (
  BATCH_SIZE,
  Runs,
  Setting,
  after,
  batches,
  best,
  fit,
  last,
  scale_weights,
  start,
  step,
  steps_to,
)
import training

# %% [markdown]
# ## 1. At the start: activations and gradients by depth
#
# A residual network with the initial weights of He et al., one batch of
# patches at half their size, no step taken. Without a norm every block adds to
# what it gets, so the activations grow from block to block.


# %%
class Start(NamedTuple):
  """A network before its first step.

  Attributes:
    means: mean over channels of the size of their means, by block, (blocks,).
    stds: standard deviation of the outputs of each block, (blocks,).
    grads: sizes of the gradient of each convolution's weights, (weights,).
    channels: their means, (input channels, output channels).
    logits: gradient of the loss with respect to the logits, (images, classes).
  """

  means: np.ndarray
  stds: np.ndarray
  grads: list[np.ndarray]
  channels: list[np.ndarray]
  logits: np.ndarray


def halved(dataset: data.Dataset) -> data.Dataset:
  """The images with each 2x2 pixels averaged."""

  def shrink(images: np.ndarray) -> np.ndarray:
    n, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    shape = n, height // 2, 2, width // 2, 2, channels
    return even.reshape(shape).mean((2, 4))

  return data.map_images(f'{dataset.name}, halved', dataset, shrink)


def at_start(model: nn.Module, dataset: data.Dataset, seed: int) -> Start:
  """The activations and gradients of one batch, the weights being new."""
  index = next(training.batches(len(dataset.train_labels), BATCH_SIZE, seed))
  images, labels = dataset.train_images[index], dataset.train_labels[index]
  found, grads, logits = gradients(model, images, labels, seed)
  blocks = [x.reshape(-1, x.shape[-1]) for x in found]
  return Start(
    np.array([np.abs(x.mean(0)).mean() for x in blocks]),
    np.array([x.std() for x in blocks]),
    [np.abs(g).ravel() for g in grads],
    [np.abs(g).mean((0, 1)) for g in grads],
    np.array(logits),
  )


@functools.partial(jax.jit, static_argnums=0)
def gradients(
  model: nn.Module, images: jax.Array, labels: jax.Array, seed: int
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
  """The outputs of the blocks, and the gradients of weights and logits.

  Blocks and convolutions are in the order of the network.
  """
  key = jax.random.key(seed, impl='rbg')  # compiles fastest
  variables = model.init(key, images[:1], train=False)
  params = scale_weights(variables['params'], 2**0.5)  # LeCun's to He's

  def loss(params: Any, extra: jax.Array) -> tuple[jax.Array, Any]:
    logits, captured = model.apply(
      {**variables, 'params': params},
      images,
      train=True,
      mutable=['batch_stats', 'intermediates'],
      capture_intermediates=lambda module, _: is_block(module.name),
    )
    loss = training.mean_loss(logits + extra, labels)
    return loss, captured['intermediates']

  zeros = jnp.zeros((len(images), model.classes))
  (grads, logits), found = jax.grad(loss, (0, 1), has_aux=True)(params, zeros)
  names = sorted(filter(is_block, grads), key=order)
  kernels = [
    grads[name][conv]['conv']['kernel']
    for name in names
    for conv in ('first', 'second')
  ]
  return [found[name]['__call__'][0] for name in names], kernels, logits


def is_block(name: str | None) -> bool:
  return name is not None and '_block' in name


def order(name: str) -> tuple[int, ...]:
  """The numbers in a block's name: stage, and place in it."""
  stage, block = name.split('_')
  return int(stage.removeprefix('stage')), int(block.removeprefix('block'))


def tail(grads: np.ndarray) -> float:
  """How heavy a tail is: the 99.9th percentile over the median.

  NaN where most gradients are zero, as where ReLUs are dead.
  """
  median, high = np.percentile(grads, (50, 99.9))
  return float(high / median) if median else np.nan


def unevenness(channels: np.ndarray) -> float:
  """The gradient of the strongest output channel over the mean of all.

  NaN where all are zero.
  """
  means = channels.mean(0)
  return float(means.max() / means.mean()) if means.any() else np.nan


# %% [markdown]
# ## 2. What a layer gets, while the network learns
#
# The paper's network: three hidden layers of 100 sigmoid units. What is watched
# is what goes into a sigmoid of the last of them, for all test images. The unit
# drawn is the one in the middle, ordered by how far its median moves.


# %%
def follow(
  model: DeepNet,
  dataset: data.Dataset,
  rate: float,
  seeds: int,
  steps: int,
  layer: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Trains a network, and keeps what goes into the activations of a layer.

  Returns:
    The number of steps before each look, (looks,), and the 15th, 50th and 85th
    percentiles over the test images, (3, seeds, looks, units).
  """
  when, found = [], []
  for number, state, _ in looks(model, dataset, rate, seeds, steps):
    inputs = watch(model, layer, state.variables, dataset.test_images)
    when.append(number)
    found.append(np.percentile(inputs[0], (15, 50, 85), axis=1))
  return np.array(when), np.stack(found, 2)


def looks(
  model: nn.Module, dataset: data.Dataset, rate: float, seeds: int, steps: int
) -> Iterator[tuple[int, training.State, tuple[np.ndarray, np.ndarray]]]:
  """Trains a network; now and then the number, the state and the batch."""
  state = start(model, dataset.train_images[:1], [Setting(rate)], seeds)
  order, interval = batches(dataset, seeds), max(steps // 40, 1)
  for number in range(steps):
    batch = next(order)
    if number % interval == 0:
      yield number, state, batch
    state, _ = step(model, state, *batch, None)  # as in `fit`: compiled once


@functools.partial(jax.jit, static_argnums=(0, 1))
def watch(
  model: DeepNet, layer: int, variables: Any, images: jax.Array
) -> jax.Array:
  """What goes into a layer's activations, (settings, seeds, images, units)."""
  kind = 'dense' if model.norms[layer - 1] is None else 'norm'
  name = f'{kind}{layer}'

  def one(variables: Any) -> jax.Array:
    _, captured = model.apply(
      variables,
      images,
      train=True,
      mutable=['batch_stats', 'intermediates'],
      capture_intermediates=lambda module, _: module.name == name,
    )
    return captured['intermediates'][name]['__call__'][0]

  return jax.vmap(jax.vmap(one))(variables)


def drift(quantiles: np.ndarray) -> np.ndarray:
  """How far each unit's median moves, over its mean spread, (seeds, units)."""
  low, middle, high = quantiles
  return np.ptp(middle, axis=1) / (high - low).mean(1)


def jumps(quantiles: np.ndarray) -> np.ndarray:
  """The mean move of a median from look to look, over the spread, (seeds,)."""
  low, middle, high = quantiles
  moves = np.abs(np.diff(middle, axis=1)).mean(1)
  return (moves / (high - low).mean(1)).mean(-1)


# %% [markdown]
# ## 3. Noise behind batch norm
#
# A norm of one's own is a frozen dataclass with `init` and `apply`. This one is
# batch norm, and then, in training, each unit is multiplied and moved by random
# numbers, drawn around others that change at every step, after the paper's
# appendix A: factors around 1 to 1.25, means in ±0.5, and `level` times that.


# %%
@dataclasses.dataclass(frozen=True)
class NoisyBatchNorm:
  """Batch norm, then noise whose mean and variance change at every step.

  Attributes:
    layer: chooses the noise, with the number of the step.
    level: multiplies the noise.
    norm: the norm before it.
  """

  layer: int
  level: float = 1.0
  norm: nk.BatchNorm = TORCH

  def init(self, x: Any) -> tuple[Any, Any]:
    return self.norm.init(x)

  def apply(
    self, params: Any, state: Any, x: jax.Array, *, train: bool, where: Any
  ) -> tuple[jax.Array, Any]:
    y, new = self.norm.apply(params, state, x, train=train, where=where)
    if train:
      key = jax.random.key(self.layer, impl='rbg')  # compiles fastest
      key = jax.random.fold_in(key, state.count[0])
      mean, factor = noise(key, y.shape)
      y = y * (1 + self.level * (factor - 1)) + self.level * mean
    return y, new


def noise(
  key: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
  """A number to add to each value of (images, units), and a factor."""
  mean_key, factor_key, mean_each, factor_each = jax.random.split(key, 4)
  units = (1, shape[-1])
  mean = jax.random.uniform(mean_key, units, minval=-0.5, maxval=0.5)
  factor = jax.random.uniform(factor_key, units, minval=1, maxval=1.25)
  mean += jax.random.uniform(mean_each, shape, minval=-0.1, maxval=0.1)
  return mean, factor + 0.1 * jax.random.normal(factor_each, shape)


# %% [markdown]
# ## 4. The loss along the gradient
#
# From where a network is, in the direction of the gradient of a batch: the loss
# at several multiples of it, and how far the gradient there is from the one at
# the start. The multiples are the same for both networks, and so is the rate; a
# network with a smaller gradient goes less far, and its loss varies less for
# that alone. The last two measures take the length into account.


# %%
FACTORS = np.geomspace(0.5, 4, 7)


class Line(NamedTuple):
  """What is found along the gradient, each (seeds, looks, factors).

  Attributes:
    losses: the loss after a step of that length.
    changes: the distance of the gradient there from that at the start.
    relative: that distance over the length of the gradient at the start.
    smoothness: that distance over the length of the step, the paper's beta.
  """

  losses: np.ndarray
  changes: np.ndarray
  relative: np.ndarray
  smoothness: np.ndarray


def landscape(
  model: nn.Module, dataset: data.Dataset, rate: float, seeds: int, steps: int
) -> tuple[np.ndarray, Line]:
  """Trains a network, and looks along the gradient now and then."""
  when, found = [], []
  for number, state, batch in looks(model, dataset, rate, seeds, steps):
    when.append(number)
    found.append(along_gradient(model, rate, state, *batch))
  return np.array(when), jax.tree.map(lambda *x: np.stack(x, 1), *found)


@functools.partial(jax.jit, static_argnums=0)
def along_gradient(
  model: nn.Module,
  rate: float,
  state: training.State,
  images: jax.Array,
  labels: jax.Array,
) -> Line:
  """Losses and gradients of each seed along its gradient, (seeds, factors)."""

  def one(state: training.State, images: jax.Array, labels: jax.Array) -> Line:
    def loss(params: Any) -> jax.Array:
      return training.loss_of(model, state, images, labels)(params)[0]

    gradient = jax.grad(loss)(state.params)
    length = optax.tree.norm(gradient)

    def at(factor: jax.Array) -> Line:
      there = jax.tree.map(
        lambda p, g: p - factor * rate * g, state.params, gradient
      )
      value, other = jax.value_and_grad(loss)(there)
      change = optax.tree.norm(optax.tree.sub(other, gradient))
      taken = factor * rate * length
      return Line(value, change, change / length, change / taken)

    return jax.vmap(at)(jnp.asarray(FACTORS))

  state = jax.tree.map(lambda x: x[0], state)  # the one setting
  return jax.vmap(one)(state, images, labels)


# %% [markdown]
# ## What came out


# %%
CLAIMS = {
  'means, last / first': 'the channel means grow less with depth',
  'gradient': 'the gradients are smaller',
  'gradient, last / first': 'the last gradients are smaller beside the first',
  'tail': 'the tails of the gradients are lighter',
  'channels': 'the gradients of output channels are more alike',
  'one class, %': 'fewer images are pulled away from one and the same class',
  'drift': 'the inputs of a sigmoid move less, over their spread',
  'range of the loss': 'the loss varies less along the gradient',
  'change': 'the gradient changes less along itself',
  'change / length': 'the gradient changes less in relation to its length',
  'change / step': 'its change over the step, the beta of the paper, is less',
}
Found = dict[str, dict[str, np.ndarray]]  # norm, column, a number a seed


def report(title: str, found: Found, console: Console, small: bool) -> None:
  """A table over the seeds, and which claims hold."""
  title = f'{title}, mean ± standard deviation of seeds'
  table = summary.table(title, ['norm'], list(found['none']))
  for name, columns in found.items():
    table.add_row(name, *map(spread, columns.values()))
  console.print(table)
  for column in filter(CLAIMS.get, found['none']):
    none, batch = (found[name][column] for name in ('none', 'batch'))
    line = (
      f'With batch norm {CLAIMS[column]}: {verdict(none, batch)} '
      f'({spread(batch)}, without {spread(none)}).'
    )
    summary.tell([line], small)


def spread(values: np.ndarray) -> str:
  return f'{values.mean():.3g} ± {values.std(ddof=1):.2g}'


def verdict(none: np.ndarray, batch: np.ndarray) -> str:
  """Whether batch is lower, by more than both standard deviations."""
  difference = none.mean() - batch.mean()
  if abs(difference) <= none.std(ddof=1) + batch.std(ddof=1):
    return 'not clear'
  return 'holds' if difference > 0 else 'does not hold'


def of_start(runs: list[Start]) -> dict[str, np.ndarray]:
  ends = [(np.median(run.grads[0]), np.median(run.grads[-1])) for run in runs]
  return {
    'means, last / first': np.array([r.means[-1] / r.means[0] for r in runs]),
    'gradient': np.array(
      [np.median([np.median(g) for g in r.grads]) for r in runs]
    ),
    'gradient, last / first': np.array([end / begin for begin, end in ends]),
    'tail': np.array([np.nanmedian([tail(g) for g in r.grads]) for r in runs]),
    'channels': np.array(
      [np.nanmedian([unevenness(c) for c in r.channels]) for r in runs]
    ),
    'one class, %': np.array([share(run.logits) for run in runs]),
  }


def share(logits: np.ndarray) -> float:
  """The images, %, whose largest gradient is of the commonest such class."""
  return 100 * np.bincount(logits.argmax(-1)).max() / len(logits)


def of_line(line: Line) -> dict[str, np.ndarray]:
  ranges = np.ptp(line.losses, axis=-1)
  most = (values.max(-1) for values in line[1:])
  columns = ('range of the loss', 'change', 'change / length', 'change / step')
  return {
    name: values.mean(-1)
    for name, values in zip(columns, (ranges, *most), strict=True)
  }


def report_noise(
  rates: Sequence[float],
  runs: dict[str, Runs],
  quantiles: dict[str, np.ndarray],
  console: Console,
  small: bool,
) -> None:
  """What noise does to the shifts, and to the training."""
  columns = 'rate', 'last accuracy, %', 'at 90%', 'shift'
  title = 'Noise behind batch norm, best rates'
  table = summary.table(title, ['norm'], columns)
  shifts, steps, ends = {}, {}, {}
  for name, run in runs.items():
    rate = best(rates, run)
    row = rates.index(rate)
    steps[name] = float(np.median(steps_to(run, 90)[row]))
    shifts[name] = jumps(quantiles[name])
    ends[name], shift = last(run)[row], spread(shifts[name])
    table.add_row(
      name, f'{rate:.2g}', spread(ends[name]), after(steps[name]), shift
    )
  console.print(table)
  for name in list(shifts)[2:]:  # those with noise
    more = 'more' if shifts[name].mean() > shifts['none'].mean() else 'no more'
    line = (
      f'With {name} the inputs shift {more} than without a norm; at 90% '
      f'{after(steps[name])}, without a norm {after(steps["none"])}, with '
      f'batch norm {after(steps["batch"])}. In the end beside batch norm: '
      f'{summary.difference(ends[name], ends["batch"])}; beside none: '
      f'{summary.difference(ends[name], ends["none"])}.'
    )
    summary.tell([line], small)


# %% [markdown]
# ## The figures


# %%
def draw_start(starts: dict[str, list[Start]], over: str) -> Figure:
  figure, panels = figures.make(f'Before the first step, {over}', 2, 2)
  for name, runs in starts.items():
    for axes, rows in zip(
      panels.flat,
      (
        [run.means for run in runs],
        [run.stds for run in runs],
        [[np.median(g) for g in run.grads] for run in runs],
        [[tail(g) for g in run.grads] for run in runs],
      ),
      strict=True,
    ):
      figures.draw(axes, np.arange(1, len(rows[0]) + 1), rows, name)
  for axes, x, y in zip(
    panels.flat,
    ('block', 'block', 'convolution', 'convolution'),
    (
      'mean size of channel means',
      'standard deviation',
      'median size of gradients',
      'their 99.9th percentile / median',
    ),
    strict=True,
  ):
    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
  figures.legend(figure, 'norm')
  return figure


def draw_channels(starts: dict[str, list[Start]]) -> Figure:
  """Gradients by input and output channel of three convolutions, seed 0."""
  title = 'Mean size of the gradient by channel, before the first step'
  count = len(starts['none'][0].channels)
  chosen = sorted({0, count // 2, count - 1})
  figure, panels = figures.make(title, len(starts), len(chosen))
  every = np.concatenate(
    [c.ravel() for runs in starts.values() for c in runs[0].channels]
  )
  least = np.percentile(every[every > 0], 1)  # and what is below it
  scale = LogNorm(least, every.max())
  for row, (name, runs) in zip(panels, starts.items(), strict=True):
    for axes, number in zip(row, chosen, strict=True):
      shown = np.maximum(runs[0].channels[number], least)
      image = axes.imshow(shown, norm=scale, aspect='auto')
      axes.grid(False)
      axes.set_title(f'norm: {name}, convolution {number + 1}')
      axes.set(xlabel='output channel', ylabel='input channel')
  figure.colorbar(image, ax=panels, label='mean size of the gradient')
  return figure


def draw_unit(
  axes: Axes, when: np.ndarray, quantiles: np.ndarray, name: str
) -> None:
  """The percentiles of the unit whose median moves a middling way, seed 0."""
  moves = drift(quantiles)[0]
  unit = np.argsort(moves)[len(moves) // 2]
  low, middle, high = quantiles[:, 0, :, unit]
  color = figures.look(LOOKS[name])['color']
  axes.fill_between(when, low, high, color=color, alpha=0.3, linewidth=0)
  axes.plot(when, middle, color=color)
  axes.set(xlabel='step', ylabel='input of the activation')
  axes.set_title(f'norm: {name}, a unit of one seed')


def draw_sigmoid(when: np.ndarray, quantiles: dict[str, np.ndarray]) -> Figure:
  title = 'What goes into a sigmoid: median, 15th to 85th percentile'
  figure, panels = figures.make(title, 1, 2)
  panels[0, 1].sharey(panels[0, 0])
  for axes, (name, values) in zip(panels.flat, quantiles.items(), strict=True):
    draw_unit(axes, when, values, name)
  return figure


def draw_noise(
  rates: Sequence[float],
  runs: dict[str, Runs],
  when: np.ndarray,
  quantiles: dict[str, np.ndarray],
  over: str,
) -> Figure:
  """The accuracies, and two units: median, 15th to 85th percentile."""
  figure, panels = figures.make(f'Noise behind batch norm, {over}', 2, 2)
  for name, run in runs.items():
    look = LOOKS[name]
    figures.draw(panels[0, 0], rates, last(run).T, name, look)
    row = rates.index(best(rates, run))
    figures.draw(panels[0, 1], run.steps, run.accuracies[row], name, look)
    panels[0, 1].lines[-1].set_markevery(6)
  y = 'test accuracy, %'
  panels[0, 0].set(xscale='log', xlabel='learning rate', ylabel=f'last {y}')
  panels[0, 1].set(xlabel='step, at the best rate', ylabel=y)
  panels[1, 1].sharey(panels[1, 0])
  for axes, name in zip(panels[1], ('batch', 'noise x1'), strict=True):
    draw_unit(axes, when, quantiles[name], name)
  figures.legend(figure, 'norm')
  return figure


def draw_landscape(
  when: np.ndarray, lines: dict[str, Line], over: str
) -> Figure:
  figure, panels = figures.make(f'Along the gradient, {over}', 2, 2)
  for name, line in lines.items():
    color = figures.look(name)['color']
    for axes, values in zip(panels[0], line[:2], strict=True):
      low, high = values.min(-1).mean(0), values.max(-1).mean(0)
      axes.fill_between(when, low, high, color=color, alpha=0.4, linewidth=0)
    for axes, values in zip(panels[1], line[2:], strict=True):
      figures.draw(axes, when, values.max(-1), name)
      axes.lines[-1].set_markevery(3)
  for axes, y in zip(
    panels.flat,
    (
      'loss, least to most',
      'change of the gradient',
      'change / gradient, most',
      'change / step, most',
    ),
    strict=True,
  ):
    axes.set(xlabel='step', ylabel=y)
  for axes in panels[0]:
    axes.set_yscale('log')
  for axes in panels[1]:
    axes.set_ylim(bottom=0)
  figures.legend(figure, 'norm')
  return figure


# %%
RATES = [0.01, 0.03, 0.1, 0.3, 1.0]
COMMON = 0.03  # the rate where both networks of part 4 train
LEVELS = 1, 2, 4
LOOKS = {
  'none': 'none',
  'batch': 'batch',
  'noise x1': 'group',
  'noise x2': 'instance',
  'noise x4': 'other',
}


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None,
    'Gradients, shifts and smoothness, with batch norm or without.',
    'digits and photographs',
  )
  blocks, layers, seeds, steps = (1, 1, 2, 8) if args.small else (3, 8, 5, 300)
  console = Console(markup=False, emoji=False, width=120)
  over = f'mean and standard deviation of {seeds} seeds'
  norms = {'none': None, 'batch': TORCH}

# %% [markdown]
# ### 1. At the start

# %%
if __name__ == '__main__':
  patches, starts = halved(args.data or data.photographs()), {}
  size = {'widths': (16,)} if args.small else {}
  for name, norm in norms.items():
    net = SmallResNet(norm, blocks, **size)
    starts[name] = [at_start(net, patches, seed) for seed in range(seeds)]
  found = {name: of_start(runs) for name, runs in starts.items()}
  report('At the start', found, console, args.small)
  figures.save(
    args.out,
    gradients_start=draw_start(starts, over),
    gradients_channels=draw_channels(starts),
  )

# %% [markdown]
# ### 2. Sigmoids

# %%
if __name__ == '__main__':
  digits = args.data or data.digits()
  units = 64 if args.small else 100
  found, quantiles = {}, {}
  for name, norm in norms.items():
    net = DeepNet((norm,) * min(layers, 3), units, nn.sigmoid)
    layer = len(net.norms)
    when, quantiles[name] = follow(net, digits, 0.1, seeds, steps, layer)
    accuracies = last(fit(net, digits, [Setting(0.1)], seeds, steps))[0]
    moves = np.median(drift(quantiles[name]), -1)
    found[name] = {'drift': moves, 'last accuracy, %': accuracies}
  report('Sigmoids', found, console, args.small)
  figures.save(args.out, gradients_sigmoid=draw_sigmoid(when, quantiles))

# %% [markdown]
# ### 3. Noise

# %%
if __name__ == '__main__':
  levels = LEVELS[:1] if args.small else LEVELS
  rates = [COMMON] if args.small else RATES
  nets = {name: DeepNet((norm,) * layers) for name, norm in norms.items()}
  for level in levels:
    noisy = (NoisyBatchNorm(layer, level) for layer in range(layers))
    nets[f'noise x{level}'] = DeepNet(tuple(noisy))
  runs, quantiles = {}, {}
  for name, net in nets.items():
    settings = [Setting(rate) for rate in rates]
    runs[name] = fit(net, digits, settings, seeds, steps)
    rate = best(rates, runs[name])
    layer = max(layers // 2, 1)
    when, quantiles[name] = follow(net, digits, rate, seeds, steps, layer)
  report_noise(rates, runs, quantiles, console, args.small)
  figures.save(
    args.out, gradients_noise=draw_noise(rates, runs, when, quantiles, over)
  )

# %% [markdown]
# ### 4. Along the gradient

# %%
if __name__ == '__main__':
  lines = {}
  for name in norms:
    when, lines[name] = landscape(nets[name], digits, COMMON, seeds, steps)
  found = {name: of_line(line) for name, line in lines.items()}
  report('Along the gradient', found, console, args.small)
  figures.save(args.out, gradients_landscape=draw_landscape(when, lines, over))
