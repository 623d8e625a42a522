# %% [markdown]
# # Where the norm goes, and what goes with it
#
# Ioffe and Szegedy (2015) put batch norm before the nonlinearity (section 3.2)
# and say that it makes saturating ones trainable (section 1, 4.2.1); many
# networks have it behind. Here, on 1,797 scans of handwritten digits, 8x8:
#
# 1. Batch norm before and after the activation, and none, for ReLU, tanh and
#    sigmoid, at several learning rates.
# 2. Gradient clipping, by the norm of all gradients and adaptive (Brock, De,
#    Smith and Simonyan 2021), with batch norm and without.
# 3. PyTorch's and Flax's conventions for momentum and epsilon, side by side:
#    what becomes of running statistics when one is taken for the other.
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/placement.py --out out
#     python examples/placement.py --out out --small

# %%
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

import data
import figures
from models import TORCH, DeepNet
import normkit as nk
import options
import summary
from sweep import Runs, Setting, fit, last, near, settings_table
import training

# %% [markdown]
# ## Before or after
#
# Eight dense layers of 64 units, the same initial weights for all, those of He
# et al. (2015). They are made for ReLUs; saturating units get no better start
# here than a careless one.

# %%
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'ReLU': nn.relu,
  'tanh': nn.tanh,
  'sigmoid': nn.sigmoid,
}
PLACES = 'none', 'before', 'after'


def placed_net(
  place: str, activation: Callable[[jax.Array], jax.Array], layers: int
) -> DeepNet:
  norm = None if place == 'none' else TORCH
  return DeepNet((norm,) * layers, 64, activation, place == 'after')


# %% [markdown]
# ## Clipping
#
# All gradients together are scaled down to a norm of at most 1, or those of
# each unit to a hundredth of its weights' norm.

# %%
CLIPS: dict[str, optax.GradientTransformation | None] = {
  'no clipping': None,
  'norm at most 1': optax.clip_by_global_norm(1.0),
  'adaptive, 0.01': optax.adaptive_grad_clip(0.01),
}

# %% [markdown]
# ## Momentum and epsilon
#
# PyTorch's `momentum=0.1` is the share of the new batch, so 0.9 of the old
# value stay; Flax's, Haiku's, Keras's and normkit's is the share that stays.
# 0.1, taken from one for the other, keeps but the last batch or so. The inputs
# are those of a first layer: the pixels of the digits, in batches of 60.
#
# PyTorch and Flax add 1e-5 to the variance, Keras 1e-3. Channels that vary
# little feel it: of a pixel of variance v the output is smaller by the factor
# sqrt((v + 1e-5) / (v + 1e-3)).


# %%
class Conventions(NamedTuple):
  """What the conventions do to the pixels' statistics.

  Attributes:
    means: the running mean of a pixel over the steps, by momentum.
    errors: of all running means in deviations, root mean square over pixels
      and the second half of the steps, by momentum.
    var: the variance of each pixel that varies.
    factors: outputs with an epsilon of 1e-3 over those with 1e-5.
  """

  means: dict[float, np.ndarray]
  errors: dict[float, float]
  var: np.ndarray
  factors: np.ndarray


def conventions(dataset: data.Dataset, steps: int) -> Conventions:
  """Running means by two momenta, and outputs by two epsilons."""
  images = dataset.train_images.reshape(len(dataset.train_labels), -1)
  images = images[:, images.var(0) > 1e-6]
  order = training.batches(len(images), 60, seed=0)
  batches = jnp.stack([images[next(order)] for _ in range(steps)])
  mean, var = images.mean(0), images.var(0)
  means, errors = {}, {}
  for momentum in (0.9, 0.1):
    norm = nk.BatchNorm(momentum=momentum, use_scale=False, use_bias=False)
    params, state = norm.init(batches[0])

    def step(state, x, norm=norm, params=params):
      _, state = norm.apply(params, state, x, train=True)
      return state, state.mean

    _, found = jax.lax.scan(step, state, batches)
    off = (np.asarray(found) - mean) / np.sqrt(var)
    means[momentum] = np.asarray(found)[:, int(var.argmax())]
    errors[momentum] = float(np.sqrt(np.mean(off[steps // 2 :] ** 2)))
  factors = np.sqrt((var + 1e-5) / (var + 1e-3))
  return Conventions(means, errors, var, factors)


# %% [markdown]
# ## What is found
#
# Each network at its best learning rate, which is chosen on the test images:
# that flatters all of them alike.


# %%
def findings(
  placed: dict[str, dict[str, Runs]], clips: dict[str, Runs], found: Conventions
) -> list[str]:
  """The numbers in words: each at its best learning rate."""
  lines = []
  for activation, runs in placed.items():
    ends = {place: top(run) for place, run in runs.items()}
    told = ', '.join(f'{p} {ends[p].mean():.1f}' for p in PLACES)
    lines.append(
      f'{activation}: {told} %; before less after '
      f'{summary.difference(ends["before"], ends["after"])}.'
    )
  for name, run in clips.items():
    lines.append(f'{name}: within 5 points of its best at {near(run)} rates.')
  wide, narrow = (found.errors[m] for m in (0.9, 0.1))
  lines.append(
    f'Running means are {wide:.3f} deviations off with momentum 0.9, '
    f'{narrow:.3f} with 0.1, {narrow / wide:.1f} times as much.'
  )
  lines.append(
    f'Epsilon 1e-3 for 1e-5 shrinks a pixel to {found.factors.min():.2f} at '
    f'the least, half of them to {np.median(found.factors):.3f} or less.'
  )
  return lines


def top(runs: Runs) -> np.ndarray:
  """The last accuracy of each seed at the best rate, the mean's."""
  ends = last(runs)
  return ends[ends.mean(-1).argmax()]


# %%
LOOKS = {'none': 'none', 'before': 'batch', 'after': 'group'}


def draw_placed(
  rates: Sequence[float], placed: dict[str, dict[str, Runs]], over: str
) -> Figure:
  """The last accuracy against the rate, a panel for each activation."""
  figure, panels = figures.make(
    f'Batch norm and activation, {over}', 1, len(placed)
  )
  for axes, (activation, runs) in zip(panels[0], placed.items(), strict=True):
    for place, run in runs.items():
      figures.draw(axes, rates, last(run).T, place, LOOKS[place])
    axes.set(xscale='log', xlabel='learning rate', title=activation)
    axes.set_ylim(-4, 104)
  panels[0, 0].set_ylabel('last test accuracy, %')
  figures.legend(figure, 'batch norm')
  return figure


def draw_clips(
  rates: Sequence[float], clips: dict[str, Runs], over: str
) -> Figure:
  """The last accuracy against the rate, with each clipping."""
  figure, panels = figures.make(f'Gradient clipping, {over}', 1, 2)
  looks = dict(zip(CLIPS, ('none', 'batch', 'group'), strict=True))
  for name, run in clips.items():
    place, clip = name.split(', ', 1)
    axes = panels[0, int(place == 'batch norm')]
    figures.draw(axes, rates, last(run).T, clip, looks[clip])
    axes.set(xscale='log', xlabel='learning rate', title=place)
    axes.set_ylim(-4, 104)
  panels[0, 0].set_ylabel('last test accuracy, %')
  figures.legend(figure, 'gradients')
  return figure


def draw_conventions(found: Conventions) -> Figure:
  """A running mean over the steps, and the factor of epsilon."""
  figure, panels = figures.make('PyTorch and Keras, taken for Flax', 1, 2)
  left, right = panels[0]
  for momentum, color in ((0.1, 'group'), (0.9, 'batch')):
    style = {**figures.look(color), 'marker': ''}
    label = f'{momentum:g} of the old kept'
    left.plot(found.means[momentum], label=label, **style)
  left.set(
    xlabel='step', ylabel='running mean of a pixel', title='momentum 0.1'
  )
  left.legend(frameon=False, loc='lower right')
  right.plot(found.var, found.factors, 'o', color='#0072B2', fillstyle='none')
  right.set(
    xscale='log',
    xlabel='variance of a pixel',
    ylabel='output over that of 1e-5',
    title='epsilon 1e-3',
    ylim=(0, 1.05),
  )
  return figure


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None, 'Norm and activation, clipping, conventions.', 'the digits'
  )
  dataset = data.part(args.data or data.digits(), args.small)
  layers, seeds, steps = (1, 2, 5) if args.small else (8, 5, 300)
  rates = [float(r) for r in np.geomspace(0.001, 10, 3 if args.small else 9)]
  settings = [Setting(rate) for rate in rates]
  console = Console(markup=False, emoji=False, width=100)
  title = 'Last test accuracy, %; in brackets, runs that failed'
  over = f'mean and standard deviation of {seeds} seeds'

# %% [markdown]
# ### Before or after the activation

# %%
if __name__ == '__main__':
  activations = list(ACTIVATIONS)[: 1 if args.small else None]
  placed: dict[str, dict[str, Runs]] = {}
  for name in track(activations, 'places', console=console):
    placed[name] = {
      place: fit(
        placed_net(place, ACTIVATIONS[name], layers),
        dataset,
        settings,
        seeds,
        steps,
      )
      for place in PLACES
    }
  for name, runs in placed.items():
    table = settings_table(rates, runs, f'{name}: {title}', 'learning rate')
    console.print(table)
  figures.save(args.out, placement_activation=draw_placed(rates, placed, over))

# %% [markdown]
# ### Clipping

# %%
if __name__ == '__main__':
  clips = {}
  kinds = list(CLIPS)[: 2 if args.small else None]
  for name in track(kinds, 'clipping', console=console):
    for label, place in (('no norm', 'none'), ('batch norm', 'before')):
      model, clip = placed_net(place, nn.relu, layers), CLIPS[name]
      clips[f'{label}, {name}'] = (
        fit(model, dataset, settings, seeds, steps, clip)
        if clip
        else placed['ReLU'][place]
      )
  console.print(settings_table(rates, clips, title, 'learning rate'))
  figures.save(args.out, placement_clipping=draw_clips(rates, clips, over))

# %% [markdown]
# ### Conventions

# %%
if __name__ == '__main__':
  found = conventions(dataset, 20 if args.small else 100)
  summary.tell(findings(placed, clips, found), args.small)
  figures.save(args.out, placement_conventions=draw_conventions(found))
