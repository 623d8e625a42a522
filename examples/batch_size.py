# %% [markdown]
# # Which norm for which batch
#
# Batch norm takes its statistics from the batch, so it depends on what else is
# in there. Here is by how much, on 1,797 scans of handwritten digits, 8x8
# pixels, which is little: the network takes seconds to train.
#
# 1. Test error against the size of the batch (after figure 1 of Wu and He,
#    "Group Normalization", 2018).
# 2. Batches that hold few of the ten classes (after section 4.3 of Ioffe,
#    "Batch Renormalization", 2017).
# 3. Time and memory of each norm beside batch norm's.
#
# All of it, in about a quarter of an hour, or a small part, sooner, to see it
# run:
#
#     python examples/batch_size.py --out out
#     python examples/batch_size.py --out out --small
#
# With `--data`, larger images take longer in proportion, and those of CIFAR-10
# several gigabytes of memory.

# %%
import argparse
from collections.abc import Callable, Sequence
import functools
import importlib
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

import data
import figures
from models import normalize
import normkit as nk
import options
import summary
import training

# %% [markdown]
# ## The network
#
# Two convolutions and a hidden layer, a norm after each. A channel of the
# convolutions has 64 and 16 values an image, a unit of the hidden layer has
# one: of a batch of two, batch norm sees two values there, and makes of them
# one and minus one, whatever they were.


# %%
class Place(NamedTuple):
  """The norm of the convolutions and that of the hidden layer."""

  convolutions: nk.Norm | None
  hidden: nk.Norm | None


ACTIVATED = nk.FilterResponseNorm, nk.EvoNormS0, nk.EvoNormB0


class Network(nn.Module):
  norms: Place
  widths: tuple[int, ...] = (16, 32)  # of the convolutions

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    def layer(x: jax.Array, features: int, norm: nk.Norm | None) -> jax.Array:
      x = nn.Dense(features, use_bias=norm is None)(x)
      x = normalize(x, norm, train)
      return x if isinstance(norm, ACTIVATED) else nn.relu(x)

    for number, width in enumerate(self.widths):
      x = halve(x) if number else x
      x = layer(patches(x), width, self.norms.convolutions)
    x = layer(x.reshape(len(x), -1), 64, self.norms.hidden)
    return nn.Dense(10)(x)


def patches(x: jax.Array) -> jax.Array:
  """The 3x3 around each pixel: a dense layer of these is a convolution.

  On processors that is several times faster than `nn.Conv` on images this
  small, above all under `vmap`.
  """
  _, height, width, _ = x.shape
  x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifts = [(i, j) for i in range(3) for j in range(3)]
  parts = [x[:, i : i + height, j : j + width] for i, j in shifts]
  return jnp.concatenate(parts, -1)


def halve(x: jax.Array) -> jax.Array:
  """The largest of each 2x2 pixels."""
  n, height, width, channels = x.shape
  x = x[:, : height // 2 * 2, : width // 2 * 2]
  x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
  return x.max((2, 4))


# %% [markdown]
# ## The norms
#
# Each is one line. Instance norm of a hidden unit would be zero, as there is
# but one value to take the mean of, so that layer goes without, and so it does
# with filter response norm. The same placement for batch norm, `batch (conv)`,
# tells what the hidden layer does. EvoNorms and filter response norm bring the
# activation with them.
#
# Batch renormalization starts as batch norm, and lets its corrections grow
# over the second quarter of the run to the limits of the paper, 3 and 5.


# %%
GHOST = 16


def make_norms(size: int, steps: int, momentum: float) -> dict[str, Place]:
  """The norms for batches of a size, for a run of so many steps."""
  ramp = {'transition_steps': steps // 4 + 1, 'transition_begin': steps // 4}
  batch = nk.BatchNorm(momentum=momentum)
  renorm = nk.BatchRenorm(
    momentum=momentum,
    r_max=optax.linear_schedule(1.0, 3.0, **ramp),
    d_max=optax.linear_schedule(0.0, 5.0, **ramp),
  )
  ghost = nk.BatchNorm(
    momentum=momentum, virtual_batch_size=GHOST if size > GHOST else None
  )
  streaming = nk.StreamingNorm(momentum=momentum)
  evonorm_b0 = nk.EvoNormB0(momentum=momentum)
  group = nk.GroupNorm(num_groups=8)
  evonorm_s0 = nk.EvoNormS0(num_groups=8)
  layer = nk.LayerNorm()
  return {
    'batch': Place(batch, batch),
    'batch (conv)': Place(batch, None),
    'renorm': Place(renorm, renorm),
    'ghost': Place(ghost, ghost),
    'streaming': Place(streaming, streaming),
    'evonorm b0': Place(evonorm_b0, evonorm_b0),
    'group': Place(group, group),
    'layer': Place(layer, layer),
    'instance': Place(nk.InstanceNorm(), None),
    'evonorm s0': Place(evonorm_s0, evonorm_s0),
    'response': Place(nk.FilterResponseNorm(), None),
    'none': Place(None, None),
  }


def window(size: int) -> float:
  """The momentum with which running statistics recall 1,024 images.

  Or two batches, where that is more: 16 steps with a momentum of 0.9 would
  leave a fifth of the initial values in them.
  """
  return max(0.5, 1 - size / 1024)


# %% [markdown]
# ## The data
#
# Cross-validation: each seed is a fold of its own, trained on four fifths of
# the images and tested on the last, so that each image is a test image once.
# One image is 0.06 % of all and 0.28 % of a fold.


# %%
FOLDS = 5


class Digits(NamedTuple):
  images: np.ndarray  # (n, height, width, channels)
  labels: np.ndarray  # (n,)
  train: np.ndarray  # (folds, images), indices
  test: np.ndarray


def load(parts: data.Dataset, folds: int) -> Digits:
  """Training and test images together, in folds."""
  images = np.concatenate([parts.train_images, parts.test_images])
  labels = np.concatenate([parts.train_labels, parts.test_labels])
  order = np.random.default_rng(0).permutation(len(labels))
  size = len(labels) // FOLDS
  test = order[: FOLDS * size].reshape(FOLDS, size)[:folds]
  train = np.stack([np.setdiff1d(order, fold) for fold in test])
  return Digits(images, labels, train, test)


def mixed(digits: Digits, images: int) -> np.ndarray:
  """Indices of so many images, epoch after epoch, (folds, images)."""

  def stream(train: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    epochs = -(-images // len(train))
    order = [rng.permutation(train) for _ in range(epochs)]
    return np.concatenate(order)[:images]

  return np.stack([stream(train, i) for i, train in enumerate(digits.train)])


def skewed(digits: Digits, steps: int, size: int, classes: int) -> np.ndarray:
  """Indices of batches, each of a few classes in equal shares.

  Returns:
    (folds, steps, size). Which classes is drawn anew for each batch.
  """

  def batch(members: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    chosen = rng.choice(10, classes, replace=False)
    each = size // classes
    return np.concatenate([rng.choice(members[c], each) for c in chosen])

  def stream(train: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    members = [train[digits.labels[train] == c] for c in range(10)]
    return np.stack([batch(members, rng) for _ in range(steps)])

  return np.stack([stream(train, i) for i, train in enumerate(digits.train)])


# %% [markdown]
# ## Training
#
# A run is one `lax.scan` over its steps, and all folds run together in one
# `vmap`. Adam, its rate falling to zero along a cosine. Tests use the running
# statistics.


# %%
def test_errors(
  network: Network, digits: Digits, batches: np.ndarray, rate: float
) -> np.ndarray:
  """The test error of each fold in percent, after batches (folds, steps, n)."""
  # Not compiled: random numbers are half of what there would be to compile.
  folds = [
    training.initial(network, jax.random.key(seed), digits.images[:1])
    for seed in range(len(batches))
  ]
  variables = jax.tree.map(lambda *leaves: jnp.stack(leaves), *folds)
  return np.asarray(run(network, variables, digits, batches, rate))


@functools.partial(jax.jit, static_argnums=0)
def run(
  network: Network,
  variables: Any,
  digits: Digits,
  batches: jax.Array,
  rate: float,
) -> jax.Array:
  """Trains all folds; returns their test errors."""
  images, labels = map(jnp.asarray, digits[:2])
  schedule = optax.cosine_decay_schedule(1.0, batches.shape[1])
  optimizer = optax.adam(lambda count: rate * schedule(count))

  def one(variables, batches, test):
    params, stats = variables['params'], variables.get('batch_stats', {})
    state = training.State(params, stats, optimizer.init(params))

    def step(state, index):
      batch = images[index], labels[index]
      return training.step(network, optimizer, state, *batch)

    state, _ = lax.scan(step, state, batches)

    def guess(image):
      return network.apply(state.variables, image[None], train=False).argmax()

    guesses = lax.map(guess, images[test], batch_size=512)
    return 100 * (guesses != labels[test]).mean()

  return jax.vmap(one)(variables, batches, digits.test)


# %% [markdown]
# ## 1. The size of the batch
#
# Every size sees the same images in the same order, 11 epochs of them, or 64
# steps where that is more: at 1,024 images those would be but 16 steps, and
# tell who learns fast. The learning rate grows with the root of the size, the
# rule for Adam (for SGD it grows with the size): 0.005 at 64 images. It is the
# same for all norms and tuned for none.


# %%
NAMES = tuple(make_norms(size=2, steps=1, momentum=0.9))


class Setting(NamedTuple):
  norms: tuple[str, ...] = NAMES
  sizes: tuple[int, ...] = (2, 4, 8, 16, 64, 256, 1024)
  images: int = 16 * 1024  # seen in training, 11 epochs
  least_steps: int = 64
  classes: tuple[int, ...] = (1, 2, 5, 10)
  skewed_steps: int = 400
  folds: int = FOLDS
  shape: tuple[int, ...] = (64, 32, 32, 64)
  rounds: int = 40
  widths: tuple[int, ...] = (16, 32)


SMALL = Setting(
  ('batch', 'renorm'), (2, 64), 128, 2, (1, 10), 4, 2, (8, 8, 8, 16), 3, (8,)
)
Errors = dict[str, np.ndarray]  # for each norm (sizes, folds), in percent


def rate(size: int) -> float:
  return 0.005 * (size / 64) ** 0.5


def by_size(digits: Digits, setting: Setting) -> Errors:
  """The test errors for each size of batch."""
  most = max(setting.images, setting.least_steps * max(setting.sizes))
  order = mixed(digits, most)
  errors: dict[str, list[np.ndarray]] = {}
  for size in track(setting.sizes, 'sizes of batch'):
    images = max(setting.images, setting.least_steps * size)
    batches = order[:, :images].reshape(len(order), -1, size)
    norms = make_norms(size, batches.shape[1], window(size))
    found: dict[Place, np.ndarray] = {}  # ghosts of small batches are batches
    for name in setting.norms:
      place = norms[name]
      if place not in found:
        network = Network(place, setting.widths)
        found[place] = test_errors(network, digits, batches, rate(size))
      errors.setdefault(name, []).append(found[place])
  return {name: np.stack(scores) for name, scores in errors.items()}


# %% [markdown]
# ## 2. Few classes in a batch
#
# Batches of 40 images of 1, 2, 5 or all 10 classes, in equal shares. In
# training, batch norm subtracts what the images of a batch have in common,
# the class among it. In the test each image stands alone, and is normalized
# with the mean over batches of all classes.


# %%
SKEWED = 40


def by_classes(digits: Digits, setting: Setting) -> Errors:
  """The test errors for each number of classes in a batch."""
  norms = make_norms(SKEWED, setting.skewed_steps, momentum=0.98)
  names = (name for name in setting.norms if name != 'ghost')
  errors: dict[str, list[np.ndarray]] = {name: [] for name in names}
  for classes in track(setting.classes, 'classes in a batch'):
    batches = skewed(digits, setting.skewed_steps, SKEWED, classes)
    for name, found in errors.items():
      network = Network(norms[name], setting.widths)
      found.append(test_errors(network, digits, batches, 0.002))
  return {name: np.stack(found) for name, found in errors.items()}


# %% [markdown]
# ## 3. What each costs
#
# One norm and the ReLU behind it, forward and backward, in training. One call
# of each in turn, many times over, and the median of the times: what else the
# machine does then falls on all alike. Beside it is the memory that the
# compiled program asks for besides its inputs and outputs.


# %%
class Cost(NamedTuple):
  milliseconds: float
  ratio: float  # to batch norm's time in the same round, the median
  mebibytes: float


def measure(setting: Setting) -> dict[str, Cost]:
  """The cost of each norm on one batch."""
  x = jax.random.normal(jax.random.key(0), setting.shape)
  norms = make_norms(len(x), steps=100, momentum=0.9)
  compiled = {
    name: compile_norm(norms[name].convolutions, x)
    for name in setting.norms
    if name != 'batch (conv)'
  }
  times = interleave({n: c[1] for n, c in compiled.items()}, setting.rounds)
  costs = {}
  for name, (memory, _) in compiled.items():
    ratios = map(lambda a, b: a / b, times[name], times['batch'])
    middle = 1000 * statistics.median(times[name])
    costs[name] = Cost(middle, statistics.median(ratios), memory / 2**20)
  return costs


def compile_norm(
  norm: nk.Norm | None, x: jax.Array
) -> tuple[int, Callable[[], Any]]:
  """The temporary bytes of a norm's forward and backward, and a call of it."""
  params, state = norm.init(x) if norm else ((), ())

  def step(params, state, x, dy):
    def forward(params, x):
      if norm is None:
        return nn.relu(x), state
      y, new = norm.apply(params, state, x, train=True)
      return nn.relu(y), new

    _, backward, new = jax.vjp(forward, params, x, has_aux=True)
    return backward(dy), new

  args = params, state, x, jnp.ones_like(x)
  compiled = jax.jit(step).lower(*args).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  return memory, lambda: jax.block_until_ready(compiled(*args))


def interleave(
  calls: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
  """Seconds of each call, one of each in turn."""
  times: dict[str, list[float]] = {name: [] for name in calls}
  for number in range(rounds + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      if number:  # the first round warms up
        times[name].append(time.perf_counter() - start)
  return times


# %% [markdown]
# ## What came out: tables


# %%
class Report(NamedTuple):
  """A table, and the name of its marks in a document."""

  name: str
  title: str
  header: list[str]
  rows: list[list[str]]


def error_table(
  name: str, title: str, columns: Sequence[str], errors: Errors
) -> Report:
  """Mean and standard deviation over the folds."""

  rows = [[norm, *map(summary.spread, found)] for norm, found in errors.items()]
  return Report(name, title, ['norm', *columns], rows)


def cost_table(costs: dict[str, Cost], shape: tuple[int, ...]) -> Report:
  rows = [
    [name, f'{c.milliseconds:.1f}', f'{c.ratio:.2f}', f'{c.mebibytes:.1f}']
    for name, c in costs.items()
  ]
  header = ['norm', 'time, ms', 'time / batch', 'temporary, MiB']
  return Report('costs', f'Norm and ReLU, both ways, {shape}', header, rows)


def show(report: Report) -> None:
  table = summary.table(report.title, report.header[:1], report.header[1:])
  for row in report.rows:
    table.add_row(*row)
  Console(width=120).print(table)


def markdown(report: Report) -> str:
  rule = ['---'] + ['---:'] * (len(report.header) - 1)
  lines = [report.header, rule, *report.rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def publish(report: Report, args: argparse.Namespace) -> None:
  """Shows a table, writes it, and puts it into the documents of `--update`."""
  show(report)
  args.out.mkdir(parents=True, exist_ok=True)
  (args.out / f'{report.name}.md').write_text(markdown(report) + '\n')
  if args.update:
    sys.path.append(str(pathlib.Path(__file__).parents[1]))
    quote = importlib.import_module('benchmarks.report').quote
    for path in args.update:  # between marks, `<!-- batch-size -->` and so on
      quote(path, report.name, markdown(report))


# %% [markdown]
# ## What came out: words
#
# Each norm's change, and whether it is clear: more than three times its
# standard error over the folds, which are compared one by one.


# %%
def findings(errors: Errors, unit: str, start: int, end: int) -> list[str]:
  """A sentence a norm on how its error goes from one column to another."""
  lines = [f'Test error, {unit}:']
  for name, found in errors.items():
    change = found[end] - found[start]
    clear = summary.is_clear(change)
    word = 'rises' if change.mean() > 0 else 'falls'
    lines.append(
      f'  {name}: {found[start].mean():.1f} to {found[end].mean():.1f} %'
      + (f', {word} clearly' if clear else ', no clear change')
    )
  return lines


# %% [markdown]
# ## What came out: pictures


# %%
# Of Okabe and Ito, told apart also by people who see few colors; the marks
# tell the lines apart in print.
STYLES = {
  'batch': ('#D55E00', 'o', '-'),
  'batch (conv)': ('#D55E00', 'o', ':'),
  'renorm': ('#CC79A7', 's', '-'),
  'ghost': ('#E69F00', 'D', '--'),
  'streaming': ('#0072B2', '^', '-'),
  'evonorm b0': ('#009E73', 'P', '-'),
  'group': ('#0072B2', '^', '-'),
  'layer': ('#56B4E9', 'v', '-'),
  'instance': ('#009E73', 'P', '-'),
  'evonorm s0': ('#E69F00', 'D', '-'),
  'response': ('#CC79A7', 's', '-'),
  'none': ('#555555', 'x', '--'),
}


def draw(
  errors: Errors, columns: Sequence[int], title: str, label: str
) -> Figure:
  """The error against the columns: those of a batch, and all the others."""
  figure, ((left, right),) = figures.make(title, 1, 2)
  figure.set_figheight(4.8)
  figure.supxlabel(label)
  of_batch = NAMES[: NAMES.index('group')]
  for name, found in errors.items():
    draw_norm(left if name in of_batch else right, name, columns, found)
  left.set(ylabel='test error, %', title='depends on the batch')
  right.set_title('each image by itself')
  for axes in (left, right):
    finish(axes, columns)
  return figure


def draw_norm(
  axes: Axes, name: str, columns: Sequence[int], found: np.ndarray
) -> None:
  """A line of means, in a band of one standard deviation each way."""
  color, marker, style = STYLES[name]
  mean, deviation = found.mean(1), found.std(1, ddof=1)
  look = {'color': color, 'marker': marker, 'markerfacecolor': 'none'}
  axes.plot(columns, mean, style, label=name, **look)
  low = np.maximum(mean - deviation, LEAST)
  axes.fill_between(
    columns, low, mean + deviation, color=color, alpha=0.15, linewidth=0
  )


LEAST = 0.25  # an image of a fold: the bands end there, for the sake of the log


def finish(axes: Axes, columns: Sequence[int]) -> None:
  axes.set(xscale='log', yscale='log', ylim=(LEAST, 100))
  axes.set_xticks(columns, [str(c) for c in columns])
  axes.set_yticks([0.3, 1, 3, 10, 30, 90], ['0.3', '1', '3', '10', '30', '90'])
  axes.minorticks_off()
  if axes.lines:
    below = {'loc': 'upper center', 'bbox_to_anchor': (0.5, -0.12)}
    axes.legend(frameon=False, ncols=3, **below)


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  parser = options.make_parser(
    'Which norm for which batch: errors, and what they cost.', 'the digits'
  )
  parser.add_argument(
    '--update',
    type=pathlib.Path,
    nargs='*',
    default=[],
    help='documents whose tables to replace',
  )
  args = options.finish(parser, None)
  setting = SMALL if args.small else Setting()
  dataset = args.data or data.digits()
  images = load(dataset, setting.folds)
  spread = f'mean ± standard deviation of {setting.folds} folds'

# %% [markdown]
# ### What a norm costs

# %%
if __name__ == '__main__':
  publish(cost_table(measure(setting), setting.shape), args)

# %% [markdown]
# ### By the size of the batch

# %%
if __name__ == '__main__':
  errors = by_size(images, setting)
  title = f'Test error, %, by the size of the batch, {spread}'
  names = list(map(str, setting.sizes))
  publish(error_table('batch-size', title, names, errors), args)
  usual = setting.sizes.index(64)
  unit = f'from 64 images a batch to {setting.sizes[0]}'
  summary.tell(findings(errors, unit, usual, 0), args.small)
  title = (
    f'{dataset.name}: {setting.images:,} images seen at every size, or '
    f'{setting.least_steps} steps'
  )
  label = 'images in a batch'
  figures.save(args.out, batch_size=draw(errors, setting.sizes, title, label))

# %% [markdown]
# ### By the classes in a batch

# %%
if __name__ == '__main__':
  errors = by_classes(images, setting)
  title = f'Test error, %, by the classes in a batch of {SKEWED}, {spread}'
  names = list(map(str, setting.classes))
  publish(error_table('skewed', title, names, errors), args)
  unit = f'from ten classes a batch to {setting.classes[0]}'
  summary.tell(findings(errors, unit, -1, 0), args.small)
  title, label = f'{dataset.name}: batches of {SKEWED}', 'classes in a batch'
  figures.save(args.out, skewed=draw(errors, setting.classes, title, label))
