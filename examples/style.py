# %% [markdown]
# # Style and contrast: instance norm and AdaIN
#
# Instance norm takes the mean and the deviation of each channel of each image
# away, and AdaIN puts those of another image in their place. Two claims:
#
# 1. Instance norm makes a network blind to the contrast of its input (Ulyanov,
#    Vedaldi and Lempitsky, "Instance Normalization", 2016). Here networks with
#    batch, instance and no norm tell patches of ten photographs apart, and are
#    tested at other contrasts than they were trained with.
# 2. Mean and deviation of features are the style of an image, and AdaIN
#    transfers it; a norm in the decoder spoils that (Huang and Belongie,
#    "Arbitrary Style Transfer in Real-time with Adaptive Instance
#    Normalization", 2017, sections 5, 6.1 and 7.2).
#
# The encoder is that of an autoencoder of a few thousand weights, trained here
# on six photographs, where the paper has VGG, trained on ImageNet. It knows
# colors, edges and their contrast, so that is the style that it can transfer.
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/style.py --out out
#     python examples/style.py --out out --small

# %%
from collections.abc import Iterator, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import data
import figures
import normkit as nk
import normkit.linen
import options
import summary
import training

NORMS: dict[str, nk.Norm | None] = {
  'batch': nk.BatchNorm(momentum=0.9),
  'instance': nk.InstanceNorm(),
  'none': None,
}

OPTIMIZER = optax.adam(0.003)  # of all networks


class Layers(NamedTuple):
  """The convolutions of each network, by their widths.

  Attributes:
    classifier: those with a norm.
    encoder: with their strides.
    decoder: with their stretches.
  """

  classifier: tuple[int, ...] = (16, 32)
  encoder: tuple[tuple[int, int], ...] = ((16, 1), (32, 2), (48, 2))
  decoder: tuple[tuple[int, int], ...] = ((32, 2), (16, 2), (16, 1))


class Plan(NamedTuple):
  """How much is run: seeds, steps of each network, and its layers."""

  seeds: int
  classifier: int
  encoder: int
  decoder: int
  layers: Layers = Layers()


FULL = Plan(seeds=3, classifier=150, encoder=200, decoder=200)
SMALL = Plan(2, 3, 3, 3, Layers((16,), ((8, 4),), ((8, 4),)))

# %% [markdown]
# ## A convolution that passes contrast on
#
# Contrast c makes x into `mean + c * (x - mean)`. A convolution without bias
# passes that on exactly if the borders are mirrored, not padded with zeros:
# then the norm behind it sees another mean and a deviation c times as large.


# %%
class Conv(nn.Module):
  """A 3x3 convolution, its norm and a ReLU."""

  features: int
  norm: nk.Norm | None
  stride: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = nn.Conv(
      self.features,
      (3, 3),
      self.stride,
      padding='REFLECT',
      use_bias=self.norm is None,
    )(x)
    if self.norm is not None:
      x = normkit.linen.Norm(self.norm)(x, train=train)
    return nn.relu(x)


class Classifier(nn.Module):
  """Three convolutions, the mean over all positions, ten classes.

  The last has no norm: of features that instance norm has just made equal in
  mean, the mean tells next to nothing.
  """

  norm: nk.Norm | None
  layers: Layers = Layers()

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for width in self.layers.classifier:
      x = Conv(width, self.norm, 2)(x, train=train)
    x = Conv(64, None, 2)(x, train=train)
    return nn.Dense(10)(x.mean((1, 2)))


CONTRASTS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)


def with_contrast(images: np.ndarray, contrast: float) -> np.ndarray:
  """Images nearer to their own mean color."""
  mean = images.mean((1, 2), keepdims=True)
  return np.float32(mean + contrast * (images - mean))


class Seen(NamedTuple):
  """What a classifier makes of the test images, at each of CONTRASTS.

  Attributes:
    accuracies: in percent.
    features: the mean of the channels behind the first ReLU, of one image.
  """

  accuracies: list[float]
  features: list[np.ndarray]


def classify(
  model: Classifier, dataset: data.Dataset, steps: int, seed: int
) -> Seen:
  """Trains a classifier at contrast 1, and tests it at all of them."""
  run = training.fit(model, dataset, OPTIMIZER, steps=steps, seed=seed, tests=1)
  accuracies, features = [], []
  for contrast in CONTRASTS:
    changed = with_contrast(dataset.test_images, contrast)
    altered = dataset._replace(test_images=changed)
    accuracies.append(training.accuracy(model, run.variables, altered))
    picture = with_contrast(crop(photographs()['hopper'])[None], contrast)
    layers = training.layer_outputs(model, run.variables, picture, ('Conv_0',))
    features.append(np.asarray(layers['Conv_0'][0].mean(-1)))
  return Seen(accuracies, features)


# %% [markdown]
# ## The photographs
#
# Six to train with and four that are kept for the test, at half their size.
# The classifiers have the patches of all ten, in whole; their test patches are
# from other places than those they are trained on.

# %%
HELD_OUT = ('hopper', 'flower', 'tissue', 'retina')
PATCH = 48


@functools.cache
def photographs() -> dict[str, np.ndarray]:
  """All ten, at half their size."""
  return {n: halve(p) for n, p in data.load_photographs().items()}


def halve(photograph: np.ndarray) -> np.ndarray:
  """Means of 2x2 pixels, in [0, 1]."""
  height, width = (2 * (size // 2) for size in photograph.shape[:2])
  even = data.to_float(photograph[:height, :width])
  return even.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3))


def crop(photograph: np.ndarray, size: int = 128) -> np.ndarray:
  """The middle of a photograph."""
  row, column = ((n - size) // 2 for n in photograph.shape[:2])
  return photograph[row : row + size, column : column + size]


def patches(names: Sequence[str], size: int, seed: int) -> Iterator[np.ndarray]:
  """Batches of patches from anywhere in photographs of those names."""
  rng = np.random.default_rng(seed)
  while True:
    batch = []
    for name in rng.choice(names, size):
      photograph = photographs()[name]
      row, column = (rng.integers(n - PATCH) for n in photograph.shape[:2])
      batch.append(photograph[row:, column:][:PATCH, :PATCH])
    yield np.stack(batch)


# %% [markdown]
# ## Encoder and decoder
#
# The encoder has no norm, like VGG, so that its features keep their means and
# deviations. It gives the features of three scales; AdaIN works on the last.


# %%
class Encoder(nn.Module):
  """Features of an image at its full, half and quarter size."""

  layers: Layers = Layers()

  @nn.compact
  def __call__(self, x: jax.Array) -> list[jax.Array]:
    features = []
    for width, stride in self.layers.encoder:
      x = Conv(width, None, stride)(x, train=False)
      features.append(x)
    return features


class Decoder(nn.Module):
  """An image of its features, with a norm behind each convolution, or none."""

  norm: nk.Norm | None
  layers: Layers = Layers()

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for width, stretch in self.layers.decoder:
      x = x.repeat(stretch, 1).repeat(stretch, 2)
      x = Conv(width, self.norm)(x, train=train)
    return nn.sigmoid(nn.Conv(3, (3, 3), padding='REFLECT')(x))


class Loss(NamedTuple):
  """How much of the content is lost, and how much of the style is left.

  Attributes:
    content: squared distance of the features of the output from those that it
      was made of, over their variance: 0 for none lost.
    style: squared distance of means and deviations from those of the style,
      over that of the content image, at all three scales: 0 for all
      transferred, 1 for nothing.
  """

  content: jax.Array
  style: jax.Array


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def transfer(
  decoder: Decoder,
  variables: Any,
  encoder: Any,
  content: jax.Array,
  style: jax.Array,
  *,
  train: bool,
) -> tuple[jax.Array, Loss, Any]:
  """The content in that style, its losses, and the decoder's new statistics."""
  encode = functools.partial(Encoder(decoder.layers).apply, encoder)
  old, wanted = map(encode, (content, style))
  target = nk.adaptive_instance_norm(old[-1], wanted[-1])
  image, updated = decoder.apply(
    variables, target, train=train, mutable=['batch_stats']
  )
  new = encode(image)
  lost = ((new[-1] - target) ** 2).mean() / target.var()
  left = [
    distance(a, c) / distance(b, c)
    for a, b, c in zip(new, old, wanted, strict=True)
  ]
  return image, Loss(lost, sum(left) / len(left)), updated


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
  """Between the means and deviations of two batches of features, squared."""
  return sum(
    ((a - b) ** 2).sum() for a, b in zip(style_of(x), style_of(y), strict=True)
  )


def style_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean and the deviation of each channel of each image."""
  mean, var, _ = nk.moments(x, axis=(1, 2))
  return mean, jnp.sqrt(var + 1e-5)


# %% [markdown]
# ## Training
#
# First the autoencoder, to give back what it sees. Then its encoder stays as it
# is, and new decoders learn to lose neither the content nor the style.


# %%
BATCH = 8


class Autoencoder(nn.Module):
  """An encoder, and a decoder without norm."""

  layers: Layers = Layers()

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    features = Encoder(self.layers, name='encoder')(x)
    decoder = Decoder(None, self.layers, name='decoder')
    return decoder(features[-1], train=train)


@functools.partial(jax.jit, static_argnums=0)
def encoder_step(
  model: Autoencoder, state: training.State, x: jax.Array
) -> training.State:
  """One step of the autoencoder."""

  def error(params: Any) -> tuple[jax.Array, Any]:
    y = model.apply({'params': params}, x, train=True)
    return ((y - x) ** 2).mean(), {}

  return training.update(OPTIMIZER, state, error)[0]


def fit_encoder(model: Autoencoder, steps: int, seed: int) -> Any:
  """The variables of the encoder of an autoencoder."""
  batches = patches(training_names(), BATCH, seed)
  state = training.init(model, OPTIMIZER, next(batches), seed)
  for _ in range(steps):
    state = encoder_step(model, state, next(batches))
  return {'params': state.params['encoder']}


@functools.partial(jax.jit, static_argnums=0)
def decoder_step(
  decoder: Decoder,
  state: training.State,
  encoder: Any,
  content: jax.Array,
  style: jax.Array,
) -> training.State:
  """One step of a decoder."""

  def loss(params: Any) -> tuple[jax.Array, Any]:
    variables = state._replace(params=params).variables
    _, losses, updated = transfer(
      decoder, variables, encoder, content, style, train=True
    )
    return sum(losses), updated.get('batch_stats', {})

  return training.update(OPTIMIZER, state, loss)[0]


def fit_decoder(decoder: Decoder, encoder: Any, steps: int, seed: int) -> Any:
  """The variables of a decoder of AdaIN's features."""
  batches = patches(training_names(), BATCH, seed)
  width, _ = decoder.layers.encoder[-1]
  features = np.zeros((1, PATCH // 4, PATCH // 4, width), np.float32)
  state = training.init(decoder, OPTIMIZER, features, seed)
  for _ in range(steps):
    state = decoder_step(decoder, state, encoder, next(batches), next(batches))
  return state.variables


def training_names() -> list[str]:
  return [name for name in photographs() if name not in HELD_OUT]


# %% [markdown]
# ## What came out
#
# The decoders are tested on the four photographs that no network here has seen,
# each in the style of the three others.


# %%
class Transfers(NamedTuple):
  """What a decoder makes of PAIRS, and of all contents and styles together."""

  images: np.ndarray
  content: float
  style: float


PAIRS = [(a, b) for a in HELD_OUT for b in HELD_OUT if a != b]


def test_decoder(decoder: Decoder, variables: Any, encoder: Any) -> Transfers:
  """Contents and styles that are new to encoder and decoder."""
  content, style = (
    np.stack([crop(photographs()[name]) for name in names])
    for names in zip(*PAIRS, strict=True)
  )
  images, loss, _ = transfer(
    decoder, variables, encoder, content, style, train=False
  )
  return Transfers(np.asarray(images), *(100 * float(x) for x in loss))


Classified = dict[str, list[Seen]]  # norm, seed
Decoded = dict[str, list[Transfers]]


def classify_all(
  plan: Plan, dataset: data.Dataset, progress: Progress
) -> Classified:
  """Trains and tests a classifier with each norm, once a seed."""
  bar = progress.add_task('classifiers', total=plan.seeds * len(NORMS))
  classified: Classified = {name: [] for name in NORMS}
  for name, norm in NORMS.items():
    for seed in range(plan.seeds):
      model = Classifier(norm, plan.layers)
      classified[name].append(classify(model, dataset, plan.classifier, seed))
      progress.advance(bar)
  return classified


def decode_all(plan: Plan, progress: Progress) -> Decoded:
  """Trains and tests a decoder with each norm, once a seed."""
  bar = progress.add_task('decoders', total=plan.seeds * len(NORMS))
  decoded: Decoded = {name: [] for name in NORMS}
  for seed in range(plan.seeds):
    encoder = fit_encoder(Autoencoder(plan.layers), plan.encoder, seed)
    for name, norm in NORMS.items():
      decoder = Decoder(norm, plan.layers)
      variables = fit_decoder(decoder, encoder, plan.decoder, seed)
      decoded[name].append(test_decoder(decoder, variables, encoder))
      progress.advance(bar)
  return decoded


def accuracy_table(classified: Classified) -> Table:
  title = 'Test accuracy by contrast, %, mean ± std'
  table = summary.table(title, ['norm'], CONTRASTS)
  for name, runs in classified.items():
    values = np.array([run.accuracies for run in runs])
    table.add_row(name, *map(summary.spread, values.T))
  return table


def loss_table(decoded: Decoded) -> Table:
  columns = 'content lost, %', 'style left, %'
  title = 'Unseen photographs, mean ± std'
  table = summary.table(title, ['norm in the decoder'], columns)
  for name, runs in decoded.items():
    content = summary.spread([run.content for run in runs])
    table.add_row(name, content, summary.spread([run.style for run in runs]))
  return table


def findings(classified: Classified, decoded: Decoded) -> Iterator[str]:
  """The claims, and whether they hold here."""
  mean = {
    name: np.mean([run.accuracies for run in runs], 0)
    for name, runs in classified.items()
  }
  lost = {name: values[-1] - values[0] for name, values in mean.items()}
  blind = abs(lost['instance']) < 0.1 * lost['batch']
  yield (
    f'{verdict(blind)}: instance norm is blind to contrast, losing less than a '
    "tenth of batch norm's loss. At a contrast of "
    f'{CONTRASTS[0]:g} its accuracy is {-lost["instance"]:+.1f} points off, '
    f'with batch norm {-lost["batch"]:+.1f}, without {-lost["none"]:+.1f}.'
  )
  full = {
    name: [run.accuracies[-1] for run in runs]
    for name, runs in classified.items()
  }
  yield (
    'Its price: at full contrast instance norm beside batch norm has '
    f'{summary.difference(full["instance"], full["batch"])}.'
  )
  left = np.mean([run.style for run in decoded['none']])
  yield (
    f'{verdict(left < 50)}: AdaIN transfers means and deviations, by more than '
    f'half. {left:.0f} % of the distance to the style is left without a norm '
    'in the decoder.'
  )
  total = {
    name: np.array([run.content + run.style for run in runs])
    for name, runs in decoded.items()
  }
  for name in ('batch', 'instance'):
    more = total[name] - total['none']
    told = verdict(more.mean() > 0) if summary.is_clear(more) else 'Not clear'
    yield (
      f'{told}: {name} norm in the decoder spoils it. Content lost '
      'and style left together beside those without: '
      f'{summary.difference(total[name], total["none"])}.'
    )


def verdict(holds: bool | np.bool) -> str:
  return 'Holds' if holds else 'Does not hold'


# %%
def draw_accuracies(classified: Classified) -> Figure:
  """Accuracy against contrast, a line a norm."""
  seeds = len(classified['batch'])
  title = f'Trained at contrast 1: mean and standard deviation of {seeds} seeds'
  figure, ((axes,),) = figures.make(title)
  for name, runs in classified.items():
    figures.draw(axes, CONTRASTS, [run.accuracies for run in runs], name)
  axes.set(
    xlabel='contrast of the test images, 1 as they are',
    ylabel='test accuracy, %',
    ylim=(0, 100),
  )
  figures.legend(figure, 'norm')
  return figure


def draw_contrast(classified: Classified) -> Figure:
  """A photograph at several contrasts, and what the first layer makes of it."""
  title = (
    'One photograph, and the mean of the first features, in one grey scale'
  )
  chosen = (0, 2, 5)
  figure, panels = make_pictures(title, 3, len(chosen))
  photograph = crop(photographs()['hopper'])[None]
  for column, at in enumerate(chosen):
    image = with_contrast(photograph, CONTRASTS[at])[0]
    show(panels[0, column], image, f'contrast {CONTRASTS[at]:g}')
    for row, name in enumerate(('batch', 'instance'), 1):
      features = classified[name][0].features
      show(panels[row, column], features[at], vmin=0, vmax=np.max(features))
  for row, name in enumerate(('input', 'batch norm', 'instance norm')):
    panels[row, 0].set_ylabel(name)
  return figure


def draw_grid(decoded: Decoded) -> Figure:
  """Each unseen photograph in the style of the others, the first seed's."""
  title = 'Content (rows) in the style of another photograph (columns)'
  count = len(HELD_OUT)
  figure, panels = make_pictures(title, count, count)
  images = dict(zip(PAIRS, decoded['none'][0].images, strict=True))
  for row, content in enumerate(HELD_OUT):
    for column, style in enumerate(HELD_OUT):
      own = crop(photographs()[content])
      show(panels[row, column], images.get((content, style), own))
    panels[row, 0].set_ylabel(f'content: {content}')
    panels[0, row].set_title(f'style: {content}')
    for side in panels[row, row].spines.values():
      side.set(visible=True, linewidth=3)
  return figure


def draw_decoders(decoded: Decoded) -> Figure:
  """The same content and style by a decoder with each norm."""
  pairs = [('hopper', 'tissue'), ('flower', 'retina')]
  title = 'A norm in the decoder: two contents and styles'
  figure, panels = make_pictures(title, len(pairs), 2 + len(decoded))
  for row, pair in zip(panels, pairs, strict=True):
    for axes, name, what in zip(row, pair, ('content', 'style'), strict=False):
      show(axes, crop(photographs()[name]), f'{what}: {name}')
    for axes, (norm, runs) in zip(row[2:], decoded.items(), strict=True):
      show(axes, runs[0].images[PAIRS.index(pair)], f'norm: {norm}')
  return figure


def make_pictures(
  title: str, rows: int, columns: int
) -> tuple[Figure, np.ndarray]:
  """A figure for square pictures, as high as they need."""
  figure, panels = figures.make(title, rows, columns)
  figure.set_size_inches(9, 9 / columns * rows + 0.3 * rows + 0.4)
  return figure, panels


def show(axes: Any, image: np.ndarray, title: str = '', **scale: float) -> None:
  axes.imshow(np.clip(image, 0, None), cmap='gray', **scale)
  axes.set(xticks=[], yticks=[], title=title)
  axes.spines[:].set_visible(False)


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None,
    'Instance norm and AdaIN: contrast and style.',
    'the patches that are classified',
  )
  dataset = args.data or data.photographs()
  dataset = data.as_images(data.part(dataset, args.small), (32, 32, 3))
  console = Console(markup=False, emoji=False, width=100)
  plan = SMALL if args.small else FULL

# %% [markdown]
# ### Contrast

# %%
if __name__ == '__main__':
  with Progress(console=console) as progress:
    classified = classify_all(plan, dataset, progress)
  console.print(accuracy_table(classified))
  figures.save(
    args.out,
    style_contrast_accuracy=draw_accuracies(classified),
    style_contrast=draw_contrast(classified),
  )

# %% [markdown]
# ### Style

# %%
if __name__ == '__main__':
  with Progress(console=console) as progress:
    decoded = decode_all(plan, progress)
  console.print(loss_table(decoded))
  summary.tell(findings(classified, decoded), args.small)
  figures.save(
    args.out,
    style_grid=draw_grid(decoded),
    style_decoders=draw_decoders(decoded),
  )
