# %% [markdown]
# # Looking into a network that has batch norm
#
# What a channel shows before and after its norm; which pixels a class depends
# on (saliency: Simonyan, Vedaldi and Zisserman, "Deep Inside Convolutional
# Networks", 2014, section 3); which image a class likes best (activation
# maximization, their section 2); all with batch norm and without. And why these
# are looked at in evaluation mode: in training mode the output for an image
# depends on the other images of the batch, and so does its explanation.
#
# The data are real, and few: 1,797 scans of handwritten digits, enlarged from
# 8x8 to 28x28 pixels.
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/interpret.py --out out
#     python examples/interpret.py --out out --small

# %%
import functools
import itertools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import data
import figures
from models import Conv2D
import options
import summary
import training

# %% [markdown]
# ## The networks
#
# Two convolutions of 16 and 32 channels, a norm and a ReLU behind each, and a
# dense layer, with batch norm and without, trained a few times each.

# %%
MODELS = {'batch norm': Conv2D(), 'no norm': Conv2D(norm=None)}
OPTIMIZER = optax.adam(0.001)
LOOKS = {'batch norm': 'batch', 'no norm': 'none'}
Trained = dict[str, list[Any]]  # the variables by model and seed


def train(
  dataset: data.Dataset, steps: int, seeds: int
) -> tuple[Trained, dict[str, list[float]]]:
  """The variables of each model and seed, and their test accuracies in %."""
  runs = {
    name: [
      training.fit(model, dataset, OPTIMIZER, steps=steps, seed=seed, tests=1)
      for seed in range(seeds)
    ]
    for name, model in MODELS.items()
  }
  trained = {name: [r.variables for r in of] for name, of in runs.items()}
  return trained, {
    name: [float(r.accuracies[-1]) for r in of] for name, of in runs.items()
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits(
  model: nn.Module, in_training: bool, variables: Any, images: jax.Array
) -> jax.Array:
  """The logits; updated statistics are dropped."""
  return model.apply(
    variables, images, train=in_training, mutable=['batch_stats']
  )[0]


# %% [markdown]
# ## Channels before and after a norm


# %%
LAYERS = ('conv1', 'bn1', 'conv2', 'bn2')


def unevenness(activations: np.ndarray) -> float:
  """How many times as much the liveliest channel varies as the median one."""
  stds = activations.std((0, 1, 2))
  return float(stds.max() / np.median(stds))


def unevennesses(
  found: list[dict[str, jax.Array]],
) -> dict[str, list[float]]:
  """That of each layer and seed."""
  return {
    layer: [unevenness(np.array(of[layer])) for of in found]
    for layer in found[0]
  }


# %% [markdown]
# ## Saliency
#
# The gradient of the logit of an image's class with respect to the pixels. With
# `in_training` the image is one of a batch, and the gradient with respect to
# the other images, whose logits don't enter, isn't zero either.
#
# Whether it points at what matters is tested so: the tenth of the pixels with
# the largest product of gradient and distance from the mean image becomes the
# mean image there, and the probability of the class should fall by more than
# with as many pixels at random.


# %%
@functools.partial(jax.jit, static_argnums=(0, 1))
def saliency(
  model: nn.Module,
  in_training: bool,
  variables: Any,
  batches: jax.Array,
  labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Of the first image of each batch: its logits, and the gradients of one.

  Returns:
    The logits, (batches, classes), and the gradient of the logit of the label
    with respect to all images of the batch, of the shape of `batches`.
  """

  def of_first(batch: jax.Array, label: jax.Array) -> Any:
    first = logits(model, in_training, variables, batch)[0]
    return first[label], first

  gradient = jax.vmap(jax.grad(of_first, has_aux=True))
  gradients, found = gradient(batches, labels)
  return found, gradients


def probabilities(
  model: nn.Module, variables: Any, images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
  """The probability of each image's label, in evaluation mode."""
  shares = jax.nn.softmax(logits(model, False, variables, images))
  return np.array(shares)[np.arange(len(labels)), labels]


def erase(
  images: np.ndarray, scores: np.ndarray, mean: np.ndarray
) -> np.ndarray:
  """The images with the tenth of the pixels of highest score made the mean."""
  flat = scores.reshape(len(scores), -1)
  limit = np.quantile(flat, 0.9, axis=1).reshape(-1, 1, 1, 1)
  return np.where(scores > limit, mean, images)


class Explained(NamedTuple):
  """How a network's saliency does.

  Attributes:
    maps: the saliency of each image, (images, height, width, 1).
    salient: how far the probability falls without the salient pixels, points.
    random: how far it falls without as many others.
    roughness: `roughness` of the maps.
  """

  maps: np.ndarray
  salient: float
  random: float
  roughness: float


def explain(
  model: nn.Module,
  variables: Any,
  images: np.ndarray,
  labels: np.ndarray,
  mean: np.ndarray,
) -> Explained:
  """The saliency of images in evaluation mode, and how it does."""
  _, gradients = saliency(model, False, variables, images[:, None], labels)
  maps = np.array(gradients[:, 0])
  chance = np.random.default_rng(0).random(images.shape)
  before = probabilities(model, variables, images, labels)
  falls = [
    before - probabilities(model, variables, erase(images, s, mean), labels)
    for s in (np.abs(maps * (images - mean)), chance)
  ]
  salient, random = (100 * float(fall.mean()) for fall in falls)
  return Explained(maps, salient, random, roughness(maps))


def roughness(maps: np.ndarray) -> float:
  """The mean difference of neighbouring pixels over the mean size of one."""
  down, right = (np.abs(np.diff(maps, axis=axis)).mean() for axis in (1, 2))
  return float((down + right) / 2 / np.abs(maps).mean())


def agreements(maps: list[np.ndarray]) -> list[float]:
  """The mean correlation of saliency between each two seeds, in %."""
  flat = [m.reshape(len(m), -1) for m in maps]
  flat = [m - m.mean(1, keepdims=True) for m in flat]
  flat = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in flat]
  return [
    100 * float((first * second).sum(1).mean())
    for first, second in itertools.combinations(flat, 2)
  ]


# %% [markdown]
# ## The other images of the batch
#
# The same image with other images beside it, drawn anew a few times.


# %%
SIZES = (2, 4, 8, 16, 64)


class Dependence(NamedTuple):
  """What the other images change, means over images.

  Attributes:
    change: the standard deviation of the saliency over the draws, over the
      size of its mean, in %.
    leak: the share of the squared gradient that is on the other images, in %.
    flips: the share of draws that find another class than evaluation mode,
      in %.
  """

  change: float
  leak: float
  flips: float


def depend(
  in_training: bool,
  variables: Any,
  dataset: data.Dataset,
  size: int,
  *,
  images: int,
  draws: int,
) -> Dependence:
  """How much the other images matter to some images in batches of a size."""
  model, rng = MODELS['batch norm'], np.random.default_rng(size)
  test = dataset.test_images
  usual = logits(model, False, variables, test[:images]).argmax(-1)
  changes, leaks, flips = [], [], []
  for i in range(images):
    others = rng.integers(images, len(test), (draws, size - 1))
    index = np.concatenate([np.full((draws, 1), i), others], 1)
    label = np.repeat(dataset.test_labels[i], draws)
    found, gradients = saliency(
      model, in_training, variables, test[index], label
    )
    squares = (np.array(gradients) ** 2).sum((2, 3, 4))  # draws, batch
    changes.append(variation(np.array(gradients[:, 0])))
    leaks.append((squares[:, 1:].sum(1) / squares.sum(1)).mean())
    flips.append((found.argmax(-1) != usual[i]).mean())
  return Dependence(*(100 * float(np.mean(x)) for x in (changes, leaks, flips)))


def dependences(
  trained: Trained, dataset: data.Dataset, in_training: bool, small: bool
) -> list[list[Dependence]]:
  """Those of each seed and size of batch; without training few draws do."""
  images, draws = (2 if small else 12), (6 if in_training else 2)
  return [
    [
      depend(in_training, v, dataset, size, images=images, draws=draws)
      for size in SIZES[: 1 if small else None]
    ]
    for v in trained['batch norm']
  ]


def in_company(variables: Any, dataset: data.Dataset) -> dict[str, np.ndarray]:
  """The saliency of six images in training mode, among 15 others, twice."""
  model, test = MODELS['batch norm'], dataset.test_images
  rows = {}
  for draw in range(2):
    others = np.random.default_rng(draw).integers(6, len(test), (6, 15))
    index = np.concatenate([np.arange(6)[:, None], others], 1)
    _, gradients = saliency(
      model, True, variables, test[index], dataset.test_labels[:6]
    )
    rows[f'training\nmode, {"AB"[draw]}'] = np.array(gradients[:, 0, ..., 0])
  return rows


def variation(maps: np.ndarray) -> float:
  """The standard deviation over the first axis, over the size of the mean."""
  mean = maps.mean(0)
  off = ((maps - mean) ** 2).sum() / len(maps)
  return float(np.sqrt(off / (mean**2).sum()))


# %% [markdown]
# ## What a class likes best
#
# From the mean image, the logit of a class is raised by Adam, with pixels kept
# in [0, 1], for all ten classes, as one batch. "Training mode" is what happens
# to those who forget evaluation mode: the ten images share their statistics.
#
# Three tests: whether networks of other seeds find the class too, whether the
# image correlates with the mean of the class's images (both less the mean of
# all), and how rough it is.


# %%
def maximize(
  model: nn.Module,
  in_training: bool,
  variables: Any,
  start: np.ndarray,
  steps: int,
) -> np.ndarray:
  """An image of a high logit for each of ten classes."""
  images = jnp.tile(start, (10, 1, 1, 1))
  state = CLIMB.init(images)
  for _ in range(steps):
    images, state = climb(model, in_training, variables, images, state)
  return np.array(images)


CLIMB = optax.adam(0.05)


@functools.partial(jax.jit, static_argnums=(0, 1))
def climb(
  model: nn.Module,
  in_training: bool,
  variables: Any,
  images: jax.Array,
  state: Any,
) -> tuple[jax.Array, Any]:
  """A step of each image towards a higher logit of its class."""

  def loss(images: jax.Array) -> jax.Array:
    return -jnp.trace(logits(model, in_training, variables, images))

  updates, state = CLIMB.update(jax.grad(loss)(images), state)
  return jnp.clip(optax.apply_updates(images, updates), 0, 1), state


class Climbed(NamedTuple):
  """Maximized images of one network.

  Attributes:
    images: one for each class.
    own: mean probability of the class, by the network itself, in %.
    others: the same by networks of other seeds.
    likeness: mean correlation with the images of the class, in %.
    roughness: `roughness` of the difference from the start.
  """

  images: np.ndarray
  own: float
  others: float
  likeness: float
  roughness: float


WAYS = {
  'batch norm': ('batch norm', False),
  'batch norm, training mode': ('batch norm', True),
  'no norm': ('no norm', False),
}


def maximized(
  trained: Trained, dataset: data.Dataset, steps: int
) -> dict[str, list[Climbed]]:
  """The maximized images of each way and seed."""
  results: dict[str, list[Climbed]] = {}
  labels, train_images = np.arange(10), dataset.train_images
  mean = train_images.mean(0)
  means = np.stack(
    [train_images[dataset.train_labels == n].mean(0) for n in labels]
  )
  for way, (name, in_training) in WAYS.items():
    model, results[way] = MODELS[name], []
    for seed, variables in enumerate(trained[name]):
      images = maximize(model, in_training, variables, mean, steps)
      found = [
        100 * float(probabilities(model, v, images, labels).mean())
        for v in trained[name]
      ]
      own = found.pop(seed)
      others = float(np.mean(found))
      (likeness,) = agreements([images - mean, means - mean])
      rough = roughness(images - mean)
      results[way].append(Climbed(images, own, others, likeness, rough))
  return results


# %% [markdown]
# ## What came out


# %%
def network_table(
  accuracies: dict[str, list[float]],
  uneven: dict[str, dict[str, list[float]]],
  explained: dict[str, list[Explained]],
) -> Table:
  """Each network: its accuracy, its channels and its saliency."""
  table = summary.table('Mean ± std over seeds', ['measure'], list(MODELS))

  def row(measure: str, cells: dict[str, list[float]]) -> None:
    told = (
      summary.spread(cells[name]) if name in cells else '-' for name in MODELS
    )
    table.add_row(measure, *told)

  row('test accuracy, %', accuracies)
  for layer in LAYERS:
    row(
      f'unevenness of channels, {layer}',
      {name: of[layer] for name, of in uneven.items() if layer in of},
    )
  for label, field in {
    'fall without salient pixels, points': 'salient',
    'fall without random pixels, points': 'random',
    'roughness of saliency': 'roughness',
  }.items():
    row(
      label, {n: [getattr(e, field) for e in of] for n, of in explained.items()}
    )
  row(
    'agreement of saliency between seeds, %',
    {n: agreements([e.maps for e in of]) for n, of in explained.items()},
  )
  return table


def dependence_table(depends: dict[str, list[list[Dependence]]]) -> Table:
  """What the other images change, by mode and size of batch."""
  title = 'What the other images change, %, mean ± std over seeds'
  table = summary.table(title, ['mode', 'batch'], DEPENDENCE)
  for mode, seeds in depends.items():
    for size, found in zip(SIZES, zip(*seeds, strict=True), strict=False):
      cells = (summary.spread(column) for column in zip(*found, strict=True))
      table.add_row(mode, str(size), *cells)
  return table


DEPENDENCE = ('change of saliency', 'gradient on others', 'other class')
MODES = {'training mode': True, 'evaluation mode': False}


def climbed_table(climbed: dict[str, list[Climbed]]) -> Table:
  """Whether the maximized images are of their class."""
  title = 'Mean ± std over seeds'
  table = summary.table(title, ['maximized with'], list(CLIMBED))
  for way, seeds in climbed.items():
    cells = [[getattr(c, field) for c in seeds] for field in CLIMBED.values()]
    table.add_row(way, *map(summary.spread, cells))
  return table


CLIMBED = {
  'probability of the class, %': 'own',
  'by other seeds, %': 'others',
  'likeness, %': 'likeness',
  'roughness': 'roughness',
}


def findings(
  explained: dict[str, list[Explained]],
  depends: dict[str, list[list[Dependence]]],
  climbed: dict[str, list[Climbed]],
) -> list[str]:
  """What the numbers say, in words."""
  told = []
  for name, seeds in explained.items():
    more = np.array([e.salient - e.random for e in seeds])
    finds = more.mean() > 0 and summary.is_clear(more)
    told.append(
      f'With {name}, saliency {"finds" if finds else "does not find"} pixels '
      'that matter: without them the probability falls by '
      f'{summary.spread(more)} points more than without others.'
    )
  maps = {n: agreements([e.maps for e in of]) for n, of in explained.items()}
  batch, none = (summary.spread(maps[name]) for name in MODELS)
  told.append(
    'Networks of two seeds agree in their saliency to '
    f'{batch}% with batch norm and {none}% without (of pairs of seeds).'
  )
  for mode, seeds in depends.items():
    change = [found[-1].change for found in seeds]
    largest = max(d.change for found in seeds for d in found)
    told.append(
      f'In {mode} other images change the saliency of an image by up to '
      f'{largest:.2g}%, and by {summary.spread(change)}% in the largest batch.'
    )
  usual, training_mode, _ = (
    np.array([[c.likeness, c.roughness] for c in of]) for of in climbed.values()
  )
  told.append(
    'Images maximized in training mode beside evaluation mode: likeness '
    f'{summary.difference(training_mode[:, 0], usual[:, 0])}; roughness '
    f'{usual[:, 1].mean():.2f} to {training_mode[:, 1].mean():.2f}.'
  )
  return told


# %%
def show(
  axes: Axes, image: np.ndarray, colors: str = 'gray', limit: float = 0.0
) -> Any:
  """One channel, in [0, 1], or from -limit to limit if that is given."""
  low, high = (-limit, limit) if limit else (0, 1)
  axes.grid(False)
  axes.set(xticks=[], yticks=[])
  axes.spines[['bottom', 'left']].set_visible(False)
  return axes.imshow(image, colors, vmin=low, vmax=high)


def draw_channels(found: dict[str, jax.Array], title: str) -> Figure:
  """Eight channels of each layer for one image, on one scale a row."""
  figure, panels = figures.make(title, len(LAYERS), 8)
  figure.set_figheight(1.15 * len(LAYERS) + 0.6)
  for row, layer in zip(panels, LAYERS, strict=True):
    shown = np.array(found[layer][0, ..., :8])
    limit = float(np.abs(shown).max())
    for i, axes in enumerate(row):
      drawn = show(axes, shown[..., i], 'RdBu_r', limit)
    row[0].set_ylabel(layer)
    figure.colorbar(drawn, ax=row, shrink=0.9, label='activation')
  for i, axes in enumerate(panels[0]):
    axes.set_title(f'channel {i}', fontsize='small')
  return figure


def draw_saliency(
  images: np.ndarray, rows: dict[str, np.ndarray], title: str
) -> Figure:
  """Images, and below them their saliency, each on a scale of its own."""
  figure, panels = figures.make(title, 1 + len(rows), len(images))
  figure.set_figheight(1.15 * (1 + len(rows)) + 0.6)
  for axes, image in zip(panels[0], images, strict=True):
    show(axes, image)
  for row, maps in zip(panels[1:], rows.values(), strict=True):
    for axes, values in zip(row, maps, strict=True):
      drawn = show(axes, values, 'RdBu_r', float(np.abs(values).max()))
  for axes, label in zip(panels[:, 0], ['image', *rows], strict=True):
    axes.set_ylabel(label, fontsize='small')
  bar = figure.colorbar(drawn, ax=panels[1:], shrink=0.8, ticks=[])
  bar.ax.set_title('above 0', fontsize='small')
  bar.ax.set_xlabel('below 0', fontsize='small')
  bar.set_label('gradient of the logit (each map on its own scale)')
  return figure


def draw_dependence(
  depends: dict[str, list[list[Dependence]]], title: str
) -> Figure:
  """What the other images change, over the size of the batch."""
  figure, panels = figures.make(title, 1, 2)
  for mode, seeds in depends.items():
    look = 'batch' if MODES[mode] else 'group'
    values = np.array(seeds)  # seeds, sizes, measures
    for i, axes in enumerate(panels.flat):
      figures.draw(axes, SIZES[: values.shape[1]], values[..., i], mode, look)
  for axes, label in zip(panels.flat, DEPENDENCE, strict=False):
    axes.set(xlabel='images in the batch', ylabel=f'{label}, %', xscale='log')
    axes.set_xticks(SIZES, SIZES)
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
  figures.legend(figure)
  return figure


def draw_climbed(climbed: dict[str, list[Climbed]], title: str) -> Figure:
  """The image that each class likes best, of the first seed."""
  figure, panels = figures.make(title, len(climbed), 10)
  figure.set_figheight(0.8 * len(climbed) + 0.7)
  for row, (way, seeds) in zip(panels, climbed.items(), strict=True):
    for axes, image in zip(row, seeds[0].images, strict=True):
      show(axes, image)
    label = way.replace(', ', ',\n')
    row[0].set_ylabel(label, rotation=0, ha='right', va='center')
  for i, axes in enumerate(panels[0]):
    axes.set_title(str(i))
  return figure


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None, 'Looking into networks with batch norm and without.', 'the digits'
  )
  small, seeds = args.small, 3
  console = Console(markup=False, emoji=False, width=100)
  size = 8 if small else 28
  dataset = data.part(args.data or data.digits(), small)
  dataset = data.as_images(dataset, (size, size, 1))
  images = dataset.test_images[: 20 if small else 100]
  labels = dataset.test_labels[: len(images)]
  with console.status('training'):
    trained, accuracies = train(dataset, 4 if small else 100, seeds)

# %% [markdown]
# ### Channels and saliency

# %%
if __name__ == '__main__':
  found = {
    name: [training.layer_outputs(MODELS[name], v, images, LAYERS) for v in of]
    for name, of in trained.items()
  }
  mean = dataset.train_images.mean(0)
  explained = {
    name: [explain(MODELS[name], v, images, labels, mean) for v in of]
    for name, of in trained.items()
  }
  uneven = {name: unevennesses(of) for name, of in found.items()}
  console.print(network_table(accuracies, uneven, explained))
  first = {name: of[0].maps[:6, ..., 0] for name, of in explained.items()}
  figures.save(
    args.out,
    interpret_channels=draw_channels(
      found['batch norm'][0], 'An image before and after batch norm'
    ),
    interpret_saliency=draw_saliency(
      images[:6, ..., 0],
      {
        'evaluation\nmode': first['batch norm'],
        **in_company(trained['batch norm'][0], dataset),
        'no norm': first['no norm'],
      },
      'Which pixels the class depends on, with batch norm and without',
    ),
  )

# %% [markdown]
# ### The other images of a batch

# %%
if __name__ == '__main__':
  with console.status('other images'):
    depends = {
      mode: dependences(trained, dataset, in_training, small)
      for mode, in_training in MODES.items()
    }
  console.print(dependence_table(depends))
  title = f'What other images change, mean ± std of {seeds} seeds'
  figures.save(args.out, interpret_others=draw_dependence(depends, title))

# %% [markdown]
# ### The images that classes like best

# %%
if __name__ == '__main__':
  with console.status('maximizing'):
    climbed = maximized(trained, dataset, 4 if small else 60)
  console.print(climbed_table(climbed))
  found_here = findings(explained, depends, climbed)
  summary.tell((f'- {finding}' for finding in found_here), small)
  title = 'The image that each class likes best'
  figures.save(args.out, interpret_maximized=draw_climbed(climbed, title))
