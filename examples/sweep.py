"""Many runs of a network at once: seeds, learning rates, initial scales.

Gradient descent with momentum 0.9 and a constant rate. The learning rate and
the scale of the initial weights are numbers in the state of a run, so all runs
of a network are one program, `training.step` under `jax.vmap`. Runs of one seed
share their initial weights and the order of the images.
"""

from collections.abc import Iterator, Sequence
import functools
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

import data
import summary
import training


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
  dataset: data.Dataset,
  settings: Sequence[Setting],
  seeds: int,
  steps: int,
  clip: optax.GradientTransformation | None = None,
) -> Runs:
  """Trains a network with each setting and each seed, all at once.

  `clip`, if given, changes the gradients first.
  """
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
  variables = jax.vmap(lambda key: training.initial(model, key, images))(keys)

  each = Setting(*(jnp.array(field) for field in zip(*settings, strict=True)))
  return begin(each, variables)


@jax.jit
def begin(settings: Setting, variables: Any) -> training.State:
  """The states of settings, (settings,), and variables, (seeds, ...)."""

  def one(setting: Setting, variables: Any) -> training.State:
    params = scale_weights(variables['params'], setting.scale)
    stats = variables.get('batch_stats', {})
    state = training.State(params, stats, OPTIMIZER.init(params))
    return with_rate(state, setting.rate)

  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(settings, variables)


def with_rate(state: training.State, rate: float | jax.Array) -> training.State:
  """The state of a run with that learning rate."""
  rates = {'learning_rate': jnp.asarray(rate, jnp.float32)}
  optimizer = state.optimizer
  hyperparams = optimizer.hyperparams | rates
  return state._replace(optimizer=optimizer._replace(hyperparams=hyperparams))


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


def failed(losses: np.ndarray) -> np.ndarray:
  """Which runs learned nothing, from losses (..., steps).

  Their loss, the mean of the last tenth of the steps, is no lower than that of
  guessing, or not a number.
  """
  last = losses[..., -max(losses.shape[-1] // 10, 1) :].mean(-1)
  return ~(last < math.log(10))


def steps_to(runs: Runs, target: float) -> np.ndarray:
  """Steps of each run until its accuracy is the target's, inf if never."""
  reached = runs.accuracies >= target
  return np.where(reached.any(-1), runs.steps[reached.argmax(-1)], np.inf)


def after(steps: float) -> str:
  """In words, after so many steps; inf is never."""
  return f'after {steps:.0f} steps' if math.isfinite(steps) else 'never'


def last(runs: Runs) -> np.ndarray:
  """The last accuracies, (settings, seeds)."""
  return runs.accuracies[..., -1]


def best(values: Sequence[float], runs: Runs) -> float:
  """The value, of one a setting, with the highest last accuracy.

  It is chosen on the test images, so it flatters, all norms alike.
  """
  return values[int(last(runs).mean(-1).argmax())]


def near(runs: Runs) -> int:
  """How many settings end within 5 points of the best."""
  means = last(runs).mean(-1)
  return int((means > means.max() - 5).sum())


def row_of(runs: Runs, row: int) -> Runs:
  """The runs of one setting."""
  losses, accuracies = runs.losses[row], runs.accuracies[row]
  return Runs(losses[None], runs.steps, accuracies[None])


def settings_table(
  values: Sequence[float], runs: dict[str, Runs], title: str, first: str
) -> Table:
  """The last accuracy of each setting and norm; failures in brackets."""
  table = summary.table(title, [first], list(runs))
  for row, value in enumerate(values):
    cells = []
    for run in runs.values():
      bad = failed(run.losses[row]).sum()
      cells.append(
        summary.spread(last(run)[row]) + (f' ({bad})' if bad else '')
      )
    table.add_row(f'{value:.2g}', *cells)
  return table
