# %% [markdown]
# # What batch norm regularizes, and what goes badly with it
#
# Ioffe and Szegedy (2015, section 3.4) say that batch norm regularizes: an
# example is seen together with others, drawn anew each time, and dropout can be
# weakened or left out. Here, on scikit-learn's 1,797 scans of digits, 8x8:
#
# 1. The noise: by how much an example's normalized features differ from batch
#    to batch, against the size of the batch.
# 2. The gap between training and test error, from 300 images: with dropout,
#    weight decay (of all parameters, and not of norms and biases) and
#    augmentation by shifts of a pixel, with batch norm and without.
# 3. Dropout before a batch norm: what it does to running variances (Li, Chen,
#    Hu and Yang, "Understanding the Disharmony between Dropout and Batch
#    Normalization by Variance Shift", 2019).
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/regularization.py --out out
#     python examples/regularization.py --out out --small

# %%
from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import data
import figures
from models import TORCH, normalize
import normkit as nk
from normkit.tools.inspect import inspect
import options
import summary
import training

# %% [markdown]
# ## The noise
#
# The features are those of a dense layer with random weights. Each of 20
# digits is put into 500 batches, the rest of which is drawn at random; the
# standard deviation of its normalized features over the batches is the noise.
# The law: a mean of B values errs by one deviation over the root of B.

# %%
SIZES = 2, 4, 8, 16, 32, 64, 128, 256


def noise(
  dataset: data.Dataset, sizes: Sequence[int], draws: int
) -> np.ndarray:
  """The noise for each size of batch: (sizes, images)."""
  images = dataset.train_images.reshape(len(dataset.train_labels), -1)
  rng = np.random.default_rng(0)
  weights = rng.normal(size=(images.shape[1], 64)).astype(np.float32)
  features = images @ weights
  norm = nk.BatchNorm(use_scale=False, use_bias=False)
  params, state = norm.init(features)

  @jax.jit
  def of(chosen: jax.Array) -> jax.Array:
    """The normalized features of the first example of each batch."""
    y, _ = jax.vmap(lambda x: norm.apply(params, state, x, train=True))(chosen)
    return y[:, 0]

  found = []
  for size in sizes:
    each = []
    for digit in range(20):
      others = rng.integers(20, len(features), (draws, size - 1))
      batch = np.concatenate([np.full((draws, 1), digit), others], 1)
      each.append(np.asarray(of(features[batch])).std(0).mean())
    found.append(each)
  return np.array(found)


# %% [markdown]
# ## The network and its variants
#
# Three hidden layers of 128 units: dense, norm or none, ReLU, and dropout of a
# half after every layer or after the last alone, behind all norms, as Li and
# others advise. AdamW, 300 images, batches of 50 or 10; augmented images are
# moved by up to a pixel along each axis, with zeros behind. All of them learn
# their 300 images nearly by heart, so the gap is what the test lacks of 100 %.


# %%
class Net(nn.Module):
  norm: nk.Norm | None = None
  dropout: str = 'no'  # or 'all', 'last'

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = x.reshape(len(x), -1)
    for number in range(1, 4):
      x = nn.Dense(128, name=f'dense{number}')(x)
      x = nn.relu(normalize(x, self.norm, train, f'norm{number}'))
      if self.dropout == 'all' or (self.dropout == 'last' and number == 3):
        x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(10, name='logits')(x)


class Variant(NamedTuple):
  """A way to train.

  Attributes:
    norm: the norm.
    dropout: where there is dropout: 'no', 'all' layers or the 'last'.
    decay: weight decay, of AdamW.
    spare: leave norms and biases out of it.
    shifts: augment by shifts.
    size: images of a batch; the epochs are the same.
  """

  norm: nk.Norm | None
  dropout: str = 'no'
  decay: float = 0.0
  spare: bool = False
  shifts: bool = False
  size: int = 50


VARIANTS = {
  'none': Variant(None),
  'none, dropout': Variant(None, 'all'),
  'none, decay': Variant(None, decay=0.3, spare=True),
  'none, shifts': Variant(None, shifts=True),
  'batch': Variant(TORCH),
  'batch, dropout': Variant(TORCH, 'all'),
  'batch, dropout last': Variant(TORCH, 'last'),
  'batch, decay of all': Variant(TORCH, decay=0.3),
  'batch, decay of weights': Variant(TORCH, decay=0.3, spare=True),
  'batch, shifts': Variant(TORCH, shifts=True),
  'batch, 10 a batch': Variant(TORCH, size=10),
  'batch, dropout, 10 a batch': Variant(TORCH, 'all', size=10),
}


SMALL = 'none', 'batch', 'batch, dropout', 'batch, dropout last'
FEW = 300  # training images


class Trained(NamedTuple):
  """The runs of a variant: variables, and accuracies in %, one a seed."""

  variables: Any
  train: np.ndarray
  test: np.ndarray


def fit(
  variant: Variant, dataset: data.Dataset, seeds: int, steps: int
) -> Trained:
  """Trains all seeds at once; each has `FEW` images of its own."""
  rng = np.random.default_rng(0)
  chosen = np.stack(
    [rng.permutation(len(dataset.train_labels))[:FEW] for _ in range(seeds)]
  )
  images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
  model = Net(variant.norm, variant.dropout)
  mask = nk.decay_mask if variant.spare else None
  optimizer = optax.adamw(0.003, weight_decay=variant.decay, mask=mask)
  keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
  state = jax.vmap(functools.partial(start, model, optimizer, images[0, :1]))(
    keys
  )
  one = functools.partial(train_step, model, optimizer, variant.shifts)
  step = jax.jit(jax.vmap(one))
  orders = [training.batches(FEW, variant.size, seed) for seed in range(seeds)]
  for number in range(steps * 50 // variant.size):
    index = np.stack([next(order) for order in orders])[..., None, None, None]
    batch = np.take_along_axis(images, index, 1)
    found = np.take_along_axis(labels, index[..., 0, 0, 0], 1)
    drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    state = step(state, batch, found, drawn)

  def right(variables: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = model.apply(variables, x, train=False)
    return 100 * jnp.mean(logits.argmax(-1) == y)

  variables = state.variables
  known = jax.jit(jax.vmap(right))(variables, images, labels)
  test = jax.jit(jax.vmap(right, (0, None, None)))(
    variables, dataset.test_images, dataset.test_labels
  )
  return Trained(variables, np.asarray(known), np.asarray(test))


def start(
  model: Net,
  optimizer: optax.GradientTransformation,
  images: np.ndarray,
  key: jax.Array,
) -> training.State:
  variables = training.initial(model, key, images)
  params = variables['params']
  stats = variables.get('batch_stats', {})
  return training.State(params, stats, optimizer.init(params))


def train_step(
  model: Net,
  optimizer: optax.GradientTransformation,
  shifts: bool,
  state: training.State,
  images: jax.Array,
  labels: jax.Array,
  key: jax.Array,
) -> training.State:
  """One step of one seed."""
  drop, move = jax.random.split(key)
  if shifts:
    moves = jax.random.randint(move, (len(images), 2), 0, 3)
    images = training.shifted(images, moves)

  loss = training.loss_of(model, state, images, labels, rngs={'dropout': drop})
  return training.update(optimizer, state, loss)[0]


# %% [markdown]
# ## The shift of variances
#
# In training dropout doubles what it leaves: the mean stays, the variance does
# not. A batch norm behind it keeps the variances of training, and in evaluation
# sees others. `normkit.tools.inspect` tells both.


# %%
def variance_shift(
  trained: Trained, dropout: str, images: np.ndarray
) -> np.ndarray:
  """Running variances over those of evaluation: (seeds, layers), medians."""
  model = Net(TORCH, dropout)

  @jax.jit
  def call(variables: Any, x: jax.Array) -> Any:
    return model.apply(variables, x, train=False, mutable=['batch_stats'])

  ratios = []
  for seed in range(len(trained.test)):
    one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], trained.variables)
    layers = inspect(call, one, [images]).layers
    ratios.append(
      [np.median((n.var + 1e-5) / (n.batch_var + 1e-5)) for n in layers]
    )
  return np.array(ratios)


# %%
def table(runs: dict[str, Trained]) -> Table:
  """Accuracies and their gap."""
  columns = 'training', 'test', 'gap, points'
  title = f'{FEW} training images, accuracy in %'
  made = summary.table(title, ['network'], columns)
  for name, run in runs.items():
    cells = run.train, run.test, run.train - run.test
    made.add_row(name, *(summary.spread(values) for values in cells))
  return made


PAIRS = (
  ('batch', 'none'),
  ('none, dropout', 'none'),
  ('none, decay', 'none'),
  ('none, shifts', 'none'),
  ('batch, dropout', 'batch'),
  ('batch, dropout last', 'batch, dropout'),
  ('batch, decay of all', 'batch'),
  ('batch, decay of weights', 'batch, decay of all'),
  ('batch, shifts', 'batch'),
  ('batch, 10 a batch', 'batch'),
  ('batch, dropout, 10 a batch', 'batch, dropout'),
  ('none, dropout', 'batch'),
)


def findings(
  sizes: Sequence[int],
  noises: np.ndarray,
  runs: dict[str, Trained],
  shifts: dict[str, np.ndarray],
) -> list[str]:
  """The numbers in words."""
  scaled = noises.mean(1) * np.sqrt(sizes)
  lines = [
    f'Noise times the root of the batch: {scaled[0]:.2f} at {sizes[0]} to '
    f'{scaled[-1]:.2f} at {sizes[-1]}; the law has it constant.'
  ]
  for one, other in PAIRS:
    if not {one, other} <= runs.keys():  # in a small setting
      continue
    told = summary.difference(runs[one].test, runs[other].test)
    lines.append(f'{one} less {other}: {told}.')
  for name, ratio in shifts.items():
    told = ', '.join(f'{r:.2f}' for r in ratio.mean(0))
    lines.append(f'{name}: running variances over those in evaluation {told}.')
  return lines


# %%
def draw_noise(sizes: Sequence[int], noises: np.ndarray) -> Figure:
  figure, ((axes,),) = figures.make('Noise of batch norm, 20 images')
  figures.draw(axes, sizes, noises.T, 'measured', 'batch')
  law = noises.mean(1)[-1] * np.sqrt(sizes[-1] / np.array(sizes))
  axes.plot(sizes, law, 'k:', label='1 / root of the batch')
  axes.set(xscale='log', yscale='log', xlabel='images in a batch')
  axes.set_ylabel('std of a normalized feature')
  axes.set_xticks(sizes, [str(size) for size in sizes])
  axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ['0.05', '0.1', '0.2', '0.5', '1'])
  axes.minorticks_off()
  figures.legend(figure)
  return figure


def draw_gap(runs: dict[str, Trained], seeds: int) -> Figure:
  """Training and test accuracy of each variant."""
  figure, ((axes,),) = figures.make(
    f'{FEW} training images, mean ± std of {seeds} seeds'
  )
  figure.set_size_inches(9, 4.6)
  rows = np.arange(len(runs))
  for label, look, offset in (('training', 'none', 0.12), ('test', 'batch', 0)):
    values = [
      getattr(run, 'train' if offset else 'test') for run in runs.values()
    ]
    axes.errorbar(
      [v.mean() for v in values],
      rows - offset,
      xerr=[v.std(ddof=1) for v in values],
      label=label,
      capsize=3,
      **{**figures.look(look), 'linestyle': 'none'},
    )
  axes.set_yticks(rows, list(runs))
  axes.invert_yaxis()
  axes.set_xlabel('accuracy, %')
  figures.legend(figure)
  return figure


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None, 'Noise, generalization and dropout beside batch norm.', 'the digits'
  )
  dataset = data.part(args.data or data.digits(), args.small)
  seeds, steps = (2, 3) if args.small else (5, 600)
  console = Console(markup=False, emoji=False, width=100)

# %% [markdown]
# ### Noise

# %%
if __name__ == '__main__':
  sizes, draws = (SIZES[::3], 20) if args.small else (SIZES, 500)
  noises = noise(dataset, sizes, draws)
  figures.save(args.out, regularization_noise=draw_noise(sizes, noises))

# %% [markdown]
# ### Generalization and dropout

# %%
if __name__ == '__main__':
  names = SMALL if args.small else VARIANTS
  runs = {
    name: fit(VARIANTS[name], dataset, seeds, steps)
    for name in track(names, 'variants', console=console)
  }
  shifts = {
    name: variance_shift(
      runs[name], VARIANTS[name].dropout, dataset.train_images[:2000]
    )
    for name in ('batch', 'batch, dropout', 'batch, dropout last')
  }
  console.print(table(runs))
  summary.tell(findings(sizes, noises, runs, shifts), args.small)
  figures.save(args.out, regularization_gap=draw_gap(runs, seeds))
