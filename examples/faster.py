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
#
# The network is small and dense, and the data are 1,797 scans of handwritten
# digits, 8x8: a network deep enough to be hard to train, and easy data.
#
# All of it, in a minute or two, or a part, in seconds, to see it run:
#
#     python examples/faster.py --out out
#     python examples/faster.py --out out --small

# %%
import argparse
from collections.abc import Callable, Iterator, Sequence
import functools
import math
import pathlib
import sys
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import data
import figures
from models import TORCH, normalize
import normkit as nk
import training

# %% [markdown]
# ## The network
#
# Hidden layers of 64 units, a norm before each ReLU. The initial weights are
# those of He et al. (2015), made for plain networks with ReLUs: the plain one
# gets the best start that is known for it.


# %%
class DeepNet(nn.Module):
  """A row of dense layers, one for each of the norms, and ten classes."""

  norms: tuple[nk.Norm | None, ...]
  width: int = 64
  activation: Callable[[jax.Array], jax.Array] = nn.relu

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = x.reshape(len(x), -1)
    for number, norm in enumerate(self.norms, 1):
      x = nn.Dense(
        self.width,
        use_bias=norm is None,
        kernel_init=nn.initializers.he_normal(),
        name=f'dense{number}',
      )(x)
      x = self.activation(normalize(x, norm, train, f'norm{number}'))
    return nn.Dense(10, name='logits')(x)


NORMS: dict[str, nk.Norm | None] = {
  'none': None,
  'batch': TORCH,
  'layer': nk.LayerNorm(),
  'group': nk.GroupNorm(num_groups=8),
}

# %% [markdown]
# ## Many runs at once
#
# Gradient descent with momentum 0.9 and a constant rate. The learning rate and
# the scale of the initial weights are numbers in the state of a run, so all
# runs of a network are one program, `training.step` under `jax.vmap`. Runs of
# one seed share their initial weights and the order of the images.


# %%
class Setting(NamedTuple):
  """What differs between the runs of a network."""

  rate: float
  scale: float = 1.0


class Runs(NamedTuple):
  """What came out of the runs of a network.

  Attributes:
    losses: the training loss of each step, (settings, seeds, steps).
    steps: the number of steps taken before each test, (tests,).
    accuracies: the test accuracy then, %, (settings, seeds, tests).
  """

  losses: np.ndarray
  steps: np.ndarray
  accuracies: np.ndarray


OPTIMIZER = optax.inject_hyperparams(optax.sgd)(learning_rate=0, momentum=0.9)
BATCH_SIZE = 60


def fit(
  model: nn.Module,
  settings: Sequence[Setting],
  seeds: int,
  steps: int,
  clip: optax.GradientTransformation | None = None,
) -> Runs:
  """Trains a network with each setting and each seed, all at once.

  `clip`, if given, changes the gradients first.
  """
  dataset = data.digits()
  state = start(model, dataset.train_images[:1], settings, seeds)
  order = batches(dataset, seeds)
  interval = max(steps // 60, 1)
  losses, accuracies = [], []
  for number in range(1, steps + 1):
    state, loss = step(model, state, *next(order), clip)
    losses.append(loss)
    if number % interval == 0:
      found = np.array(predict(model, state.variables, dataset.test_images))
      accuracies.append(100 * (found == dataset.test_labels).mean(-1))
  when = np.arange(interval, steps + 1, interval)
  return Runs(np.stack(losses, -1), when, np.stack(accuracies, -1))


def start(
  model: nn.Module, images: np.ndarray, settings: Sequence[Setting], seeds: int
) -> training.State:
  """The states before the first step, (settings, seeds)."""
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  variables = jax.vmap(lambda key: model.init(key, images, train=False))(keys)

  def one(setting: Setting, variables: Any) -> training.State:
    params = scale_weights(variables['params'], setting.scale)
    optimizer = OPTIMIZER.init(params)
    rate = {'learning_rate': jnp.asarray(setting.rate, jnp.float32)}
    optimizer = optimizer._replace(hyperparams=optimizer.hyperparams | rate)
    return training.State(params, variables.get('batch_stats', {}), optimizer)

  each = Setting(*(jnp.array(field) for field in zip(*settings, strict=True)))
  return jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(each, variables)


def batches(
  dataset: data.Dataset, seeds: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """A batch of each seed, (seeds, images, ...), without end."""
  images, labels = dataset.train_images, dataset.train_labels
  orders = [
    training.batches(len(labels), BATCH_SIZE, seed) for seed in range(seeds)
  ]
  while True:
    index = np.stack([next(order) for order in orders])
    yield images[index], labels[index]


def scale_weights(params: Any, scale: float | jax.Array) -> Any:
  """The parameters, all weights but none of the scales and biases scaled."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x * scale if path[-1].key == 'kernel' else x, params
  )


@functools.partial(jax.jit, static_argnums=(0, 4))
def step(
  model: nn.Module,
  state: training.State,
  images: jax.Array,
  labels: jax.Array,
  clip: optax.GradientTransformation | None = None,
) -> tuple[training.State, jax.Array]:
  """One step of all runs; images and labels have the axis of the seeds."""
  optimizer = OPTIMIZER if clip is None else clipped(clip)
  one = functools.partial(training.step, model, optimizer)
  return jax.vmap(jax.vmap(one), (0, None, None))(state, images, labels)


def clipped(
  clip: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """The optimizer behind a clipping that keeps no state."""

  def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    grads, _ = clip.update(grads, clip.init(params), params)
    return OPTIMIZER.update(grads, state, params)

  return optax.GradientTransformation(OPTIMIZER.init, update)


@functools.partial(jax.jit, static_argnums=0)
def predict(model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
  """The classes that each run finds, with running statistics."""
  logits = jax.vmap(jax.vmap(lambda v: training.predict(model, v, images)))
  return logits(variables).argmax(-1)


# %% [markdown]
# ## What is taken from a run
#
# A run failed if its loss, the mean of the last tenth of the steps, is no lower
# than that of guessing, or not a number. The best rate of a norm is that of the
# highest last accuracy, the mean over the seeds, for all norms alike; as it is
# chosen on the test images, it flatters all of them alike.


# %%
def failed(losses: np.ndarray) -> np.ndarray:
  """Which runs learned nothing, from losses (..., steps)."""
  last = losses[..., -max(losses.shape[-1] // 10, 1) :].mean(-1)
  return ~(last < math.log(10))


def steps_to(runs: Runs, target: float) -> np.ndarray:
  """Steps of each run until its accuracy is the target's, inf if never."""
  reached = runs.accuracies >= target
  return np.where(reached.any(-1), runs.steps[reached.argmax(-1)], np.inf)


def last(runs: Runs) -> np.ndarray:
  """The last accuracies, (settings, seeds)."""
  return runs.accuracies[..., -1]


def best(values: Sequence[float], runs: Runs) -> float:
  """The value, of one a setting, with the highest last accuracy."""
  return values[int(last(runs).mean(-1).argmax())]


def row_of(runs: Runs, row: int) -> Runs:
  """The runs of one setting."""
  losses, accuracies = runs.losses[row], runs.accuracies[row]
  return Runs(losses[None], runs.steps, accuracies[None])


# %%
def curves_table(runs: dict[str, Runs], target: float) -> Table:
  """Steps to the target, and the last accuracy, of each curve."""
  table = Table('run', title=f'Steps to {target:.1f}%, one number a seed')
  for name in ('steps', 'last accuracy, %', 'failed'):
    table.add_column(name, justify='right')
  for name, run in runs.items():
    (steps,), (end,) = steps_to(run, target), last(run)
    found = ', '.join(f'{n:.0f}' if n < np.inf else 'never' for n in steps)
    bad = f'{failed(run.losses).sum()} of {end.size}'
    table.add_row(name, found, spread(end), bad)
  return table


def settings_table(
  values: Sequence[float], runs: dict[str, Runs], title: str, first: str
) -> Table:
  """The last accuracy of each setting and norm; failures in brackets."""
  table = Table(first, title=title)
  for name in runs:
    table.add_column(name, justify='right')
  for row, value in enumerate(values):
    cells = []
    for run in runs.values():
      bad = failed(run.losses[row]).sum()
      cells.append(spread(last(run)[row]) + (f' ({bad})' if bad else ''))
    table.add_row(f'{value:.2g}', *cells)
  return table


def spread(values: np.ndarray) -> str:
  return f'{values.mean():.1f} ± {values.std(ddof=1):.1f}'


# %%
def claims(
  curves: dict[str, Runs],
  target: float,
  rates: dict[str, Runs],
  scales: dict[str, Runs],
) -> list[str]:
  """The claims of the paper, and what was found."""
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
  ends = f'ends at {last(runs).mean():.1f}%, the plain network at {target:.1f}%'
  if not math.isfinite(steps) or not math.isfinite(before):
    return (
      f'takes {steps:.0f} steps, the plain network {before:.0f}, and {ends}'
    )
  ratio = before / steps
  much = (
    f'{ratio:.1f} times fewer' if ratio >= 1 else f'{1 / ratio:.1f} times more'
  )
  return f'is there in {much} steps, and {ends}'


def near(runs: Runs) -> int:
  """How many settings end within 5 points of the best."""
  means = last(runs).mean(-1)
  return int((means > means.max() - 5).sum())


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


def draw_curves(runs: dict[str, Runs], target: float, title: str) -> Figure:
  """Test error over the steps."""
  figure, ((axes,),) = figures.make(title)
  for name, run in runs.items():
    errors = 100 - run.accuracies[0]
    figures.draw(axes, run.steps, errors, name, LOOKS[name])
    axes.lines[-1].set_markevery(4)
  axes.axhline(100 - target, color='black', linewidth=0.8, label='target')
  axes.set(xlabel='step', ylabel='test error, %', yscale='log', ylim=(2, 100))
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
TIMES = {'none': (1, 5), 'batch': (1, 5, 30)}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description='Steps to an accuracy, with batch norm and without.'
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
  layers, seeds, steps = (2, 2, 20) if args.small else (8, 5, 300)
  console = Console(markup=False, emoji=False, width=100)
  nets = {name: DeepNet((norm,) * layers) for name, norm in NORMS.items()}
  if args.small:
    del nets['layer'], nets['group']

  rates = {}
  for name in track(nets, 'learning rates', console=console):
    settings = [Setting(rate) for rate in RATES]
    rates[name] = fit(nets[name], settings, seeds, steps)
  tuned = {name: best(RATES, runs) for name, runs in rates.items()}
  console.print(settings_table(RATES, rates, LAST, 'learning rate'))

  scales = {}
  for name in track(nets, 'initial weights', console=console):
    settings = [Setting(tuned[name], scale) for scale in SCALES]
    scales[name] = fit(nets[name], settings, seeds, steps)
  console.print(settings_table(SCALES, scales, LAST, 'scale'))

  curves = {}
  for name, factors in track(TIMES.items(), 'curves', console=console):
    settings = [Setting(n * tuned['none']) for n in factors]
    runs = fit(nets[name], settings, seeds, steps)
    for row, n in enumerate(factors):
      curves[f'{name}, x{n}'] = row_of(runs, row)
  target = float(last(curves['none, x1']).mean())
  console.print(curves_table(curves, target))
  best_rates = ', '.join(f'{name} {rate:.2g}' for name, rate in tuned.items())
  console.print(f'Best learning rates: {best_rates}; x1 is that of none.')
  for claim in claims(curves, target, rates, scales):
    console.print(claim, soft_wrap=True)

  over = f'mean and standard deviation of {seeds} seeds'
  drawn = {
    'curves': draw_curves(curves, target, f'Error over the steps, {over}'),
    'rates': draw_settings(
      RATES, rates, 'learning rate', f'Learning rates, {over}'
    ),
    'scales': draw_settings(
      SCALES,
      scales,
      "scale of the initial weights, He's = 1",
      f'Initial weights, each norm at its best rate, {over}',
    ),
  }
  for name, figure in drawn.items():
    path = figures.save(figure, args.out, f'faster_{name}')
    console.print(f'Wrote {path}.', soft_wrap=True)


# %%
if __name__ == '__main__':
  main([] if 'ipykernel' in sys.modules else None)
