"""The training loop of the examples: a compiled step, a test now and then.

`fit` is one run of one seed; runs that share model and optimizer share what is
compiled. The steps are a Python loop: on processors XLA's convolutions are
several times slower inside `lax.scan`, and under `vmap` too.
"""

from collections.abc import Callable, Iterable, Iterator
import functools
import itertools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr
import jax.numpy as jnp
import numpy as np
import optax

import data


class Run(NamedTuple):
  """What came out of a run.

  Attributes:
    variables: the variables after the last step.
    losses: the training loss of each step, (steps,).
    steps: the number of steps taken before each test, (tests,).
    accuracies: the test accuracy then, in percent, (tests,).
  """

  variables: dict[str, Any]
  losses: np.ndarray
  steps: np.ndarray
  accuracies: np.ndarray


class State(NamedTuple):
  """What a step takes and gives back."""

  params: Any
  batch_stats: Any
  optimizer: Any

  @property
  def variables(self) -> dict[str, Any]:
    """The variables for `model.apply`."""
    return {'params': self.params, 'batch_stats': self.batch_stats}


def fit(
  model: nn.Module,
  dataset: data.Dataset,
  optimizer: optax.GradientTransformation,
  *,
  steps: int,
  seed: int,
  batch_size: int = 64,
  tests: int = 10,
) -> Run:
  """Trains a model, and tests it `tests` times, at last after the last step.

  The seed chooses the initial weights and the order of the images. A loss that
  is not finite ends nothing: it is in `losses`.
  """
  images = len(dataset.train_labels)
  if not 1 <= batch_size <= images:
    raise ValueError(
      f'batch_size is {batch_size}, but {dataset.name} has {images} training '
      f'images. Give a number from 1 to {images}.'
    )
  when = np.unique(np.linspace(0, steps, tests + 1).astype(int))[1:]
  order = itertools.islice(batches(images, batch_size, seed), steps)
  losses, accuracies = [], []
  first = init(model, optimizer, dataset.train_images, seed)
  for number, state, loss in walk(model, optimizer, dataset, order, first):
    losses.append(loss)
    if number in when:
      accuracies.append(accuracy(model, state.variables, dataset))
  return Run(state.variables, np.array(losses), when, np.array(accuracies))


def walk(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  dataset: data.Dataset,
  order: Iterable[np.ndarray],
  state: State,
) -> Iterator[tuple[int, State, jax.Array]]:
  """A step for each batch of indices: their number, the state and the loss."""
  images, labels = dataset.train_images, dataset.train_labels
  for number, index in enumerate(order, 1):
    state, loss = step(model, optimizer, state, images[index], labels[index])
    yield number, state, loss


def init(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  images: np.ndarray,
  seed: int,
) -> State:
  """The state before the first step, for images of that shape."""
  # Of JAX's generators this one compiles fastest.
  key = jax.random.key(seed, impl='rbg')
  variables = initial(model, key, images[:1])
  params = variables['params']
  return State(params, variables.get('batch_stats', {}), optimizer.init(params))


def initial(model: nn.Module, key: jax.Array, *inputs: Any) -> Any:
  """The initial variables, for images, or other inputs, of that shape.

  Of the network nothing is run; a program draws the weights of a shape, in
  whatever network, so that there is little to compile.
  """
  like = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, *inputs))
  draw, tree = traced_draws(model, *like)
  return tree.unflatten(draw(key))


@functools.cache
def traced_draws(model: nn.Module, *like: jax.ShapeDtypeStruct) -> Any:
  """A function from a key to the initial variables' leaves, and their tree."""
  init = functools.partial(model.init, train=False)
  traced, shapes = jax.make_jaxpr(init, return_shape=True)(*like)
  leaves, tree = jax.tree.flatten(shapes)
  draws, _ = dce_jaxpr(
    traced.jaxpr, [True] * len(leaves), [True] + [False] * (len(like) - 1)
  )
  return core.jaxpr_as_fun(core.ClosedJaxpr(draws, traced.consts)), tree


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  state: State,
  images: jax.Array,
  labels: jax.Array,
) -> tuple[State, jax.Array]:
  """One step on one batch: the new state and the loss before it."""
  return update(optimizer, state, loss_of(model, state, images, labels))


Loss = Callable[[Any], tuple[jax.Array, Any]]


def loss_of(
  model: nn.Module,
  state: State,
  images: jax.Array,
  labels: jax.Array,
  **options: Any,
) -> Loss:
  """Parameters to the loss in training mode, and the new statistics.

  The options are those of `model.apply`.
  """

  def loss(params: Any) -> tuple[jax.Array, Any]:
    logits, updated = model.apply(
      state._replace(params=params).variables,
      images,
      train=True,
      mutable=['batch_stats'],
      **options,
    )
    return mean_loss(logits, labels), updated.get('batch_stats', {})

  return loss


def update(
  optimizer: optax.GradientTransformation, state: State, loss: Loss
) -> tuple[State, jax.Array]:
  """The state after a step of the optimizer, and the loss before it."""
  gradient = jax.value_and_grad(loss, has_aux=True)
  (value, stats), grads = gradient(state.params)
  updates, moments = optimizer.update(grads, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  return State(params, stats, moments), value


@jax.jit
def mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The mean cross entropy, of logits or of their log-softmax."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


def shifted(images: jax.Array, shifts: jax.Array) -> jax.Array:
  """Each image moved, with zeros behind.

  `shifts`, (n, 2), are from 0 to 2: a pixel down or right, none, up or left.
  """
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))

  def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(image, (*shift, 0), images.shape[1:])

  return jax.vmap(crop)(padded, shifts)


def batches(images: int, size: int, seed: int) -> Iterator[np.ndarray]:
  """Indices of whole batches without end, shuffled anew in each epoch."""
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(images)
    for start in range(0, images - size + 1, size):
      yield order[start : start + size]


@functools.partial(jax.jit, static_argnums=0)
def predict(model: nn.Module, variables: Any, images: jax.Array) -> jax.Array:
  """The logits, with running statistics."""
  return model.apply(variables, images, train=False)


def logits_of(
  model: nn.Module, variables: Any, images: np.ndarray
) -> np.ndarray:
  """The logits of all images, with running statistics."""
  return in_parts(functools.partial(predict, model, variables), images)


def in_parts(
  program: Callable[[Any], jax.Array], images: np.ndarray
) -> np.ndarray:
  """The outputs for all images, a thousand at a time."""
  starts = range(0, len(images), 1000)
  return np.concatenate([program(images[i : i + 1000]) for i in starts])


def accuracy(model: nn.Module, variables: Any, dataset: data.Dataset) -> float:
  """The share of test images that the model gets right, in percent."""
  found = logits_of(model, variables, dataset.test_images).argmax(-1)
  return 100 * float((found == dataset.test_labels).mean())


@functools.partial(jax.jit, static_argnums=(0, 3))
def layer_outputs(
  model: nn.Module, variables: Any, images: jax.Array, names: tuple[str, ...]
) -> dict[str, jax.Array]:
  """The outputs of the model's layers of these names, in evaluation mode."""
  _, captured = model.apply(
    variables,
    images,
    train=False,
    capture_intermediates=lambda module, _: module.name in names,
    mutable=['intermediates'],
  )
  found = captured['intermediates']
  return {n: found[n]['__call__'][0] for n in names if n in found}
