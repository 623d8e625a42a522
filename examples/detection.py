# %% [markdown]
# # Object detection: two scenes a device
#
# Images for detection are large, so that few fit on a device, two as a rule,
# and eight devices make a batch of 16. Batch norm then has the statistics of
# two. What is done about it: freeze those of the pretrained backbone (He et
# al., "Deep Residual Learning", 2016, appendix A), pool them over the devices
# (Peng et al., "MegDet", 2018), or do without a batch (Wu and He, "Group
# Normalization", 2018). This compares them where it takes seconds.
#
# The scenes are composed, not found: one to three scans of digits, which
# scikit-learn ships, in white on grey, darkened pieces of photographs that
# packages ship. 48x48 pixels, and a detector of three convolutions.
#
# All of it, in a minute or two, or a part, sooner, to see it run:
#
#     python examples/detection.py --out out
#     python examples/detection.py --out out --small

# %%
from collections.abc import Sequence
import contextlib
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import data
import figures
from models import ConvNorm
import normkit as nk
from normkit.tools.freeze import frozen, frozen_mask
import options
import summary
import training


class Setting(NamedTuple):
  singles: int = 3000  # images that the backbone learns from
  train: int = 800  # scenes
  test: int = 300
  pretraining: int = 300  # steps
  steps: int = 500
  tests: int = 5
  seeds: int = 3
  norms: tuple[str, ...] = 'batch', 'synchronized', 'frozen', 'group', 'none'


SMALL = Setting(200, 48, 24, 4, 4, 2, 2, ('batch', 'frozen'))

# %% [markdown]
# ## The scenes
#
# The digits and the blocks of the photographs are split into training and test:
# no digit and no pixel is in both. Digits do not touch. A box is what the ink
# fills.

# %%
CANVAS, CROP, CELL = 48, 24, 8  # pixels a side: a scene, one digit, a cell
SIZES = 12, 16, 20
MOST = 3


class Scenes(NamedTuple):
  images: np.ndarray  # (n, size, size, 1), in [0, 1]
  boxes: np.ndarray  # (n, MOST, 4): top, left, bottom, right, in pixels
  labels: np.ndarray  # (n, MOST), -1 where there is no digit


class Parts(NamedTuple):
  """What scenes are made of."""

  backgrounds: np.ndarray  # (blocks, data.BLOCK, data.BLOCK)
  digits: dict[int, np.ndarray]  # by size, (n, size, size)
  labels: np.ndarray


def load_parts(digits: data.Dataset) -> tuple[Parts, Parts]:
  """The parts of the training and of the test scenes."""
  blocks = [], []
  for label, photograph in enumerate(data.load_photographs().values()):
    grey = data.to_float(photograph).mean(-1)
    corners = data.block_corners(grey.shape, label)
    for number, (i, j) in enumerate(corners):
      block = grey[i : i + data.BLOCK, j : j + data.BLOCK]
      blocks[number < data.TEST_BLOCKS].append(block)
  train, test = (
    Parts(
      np.stack(found) / 2,
      {n: data.enlarge(images, (n, n))[..., 0] for n in SIZES},
      labels,
    )
    for found, images, labels in (
      (blocks[0], digits.train_images, digits.train_labels),
      (blocks[1], digits.test_images, digits.test_labels),
    )
  )
  return train, test


def compose(
  parts: Parts, count: int, size: int, most: int, seed: int
) -> Scenes:
  """Scenes of one to `most` digits; of another seed, others."""
  rng = np.random.default_rng(seed)
  scenes = Scenes(
    np.empty((count, size, size, 1), np.float32),
    np.zeros((count, most, 4), np.float32),
    np.full((count, most), -1, np.int32),
  )
  for image, boxes, labels in zip(*scenes, strict=True):
    i, j = rng.integers(data.BLOCK - size + 1, size=2)
    background = rng.choice(parts.backgrounds)
    image[..., 0] = background[i : i + size, j : j + size]
    for number in range(rng.integers(1, most + 1)):
      place(parts, rng, number, image[..., 0], boxes, labels)
  return scenes


def place(
  parts: Parts,
  rng: np.random.Generator,
  number: int,
  image: np.ndarray,
  boxes: np.ndarray,
  labels: np.ndarray,
) -> None:
  """Adds a digit in place, unless it would touch another."""
  side, index = rng.choice(SIZES), rng.integers(len(parts.labels))
  ink = parts.digits[side][index]
  i, j = rng.integers(len(image) - side + 1, size=2)
  rows, columns = (np.flatnonzero((ink > 0.2).any(a)) for a in (1, 0))
  box = [i + rows[0], j + columns[0], i + rows[-1] + 1, j + columns[-1] + 1]
  top, left, bottom, right = boxes[labels >= 0].T
  apart = (top > box[2]) | (bottom < box[0]) | (left > box[3])
  if (apart | (right < box[1])).all():
    part = image[i : i + side, j : j + side]
    part += ink * (1 - part)
    boxes[number], labels[number] = box, parts.labels[index]


# %% [markdown]
# ## The detector
#
# No anchors. Each of 6x6 cells says whether the middle of a digit lies in it,
# which digit that is, where in the cell its middle is, and the logarithms of
# the box's sides. The backbone first learns to name single digits on such
# backgrounds, once for each norm and seed, in batches of 64.


# %%
class Backbone(nn.Module):
  """Three convolutions, each halves the image."""

  norm: nk.Norm | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    for number, width in enumerate((16, 32, 64), 1):
      conv = ConvNorm(width, 3, 2, self.norm, name=f'conv{number}')
      x = nn.relu(conv(x, train=train))
    return x


class Classifier(nn.Module):
  """What the backbone is pretrained in."""

  norm: nk.Norm | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = Backbone(self.norm, name='backbone')(x, train=train)
    return nn.Dense(10)(x.mean((1, 2)))


class Detector(nn.Module):
  """For each cell: 1 digit or none, 10 which, 4 where."""

  norm: nk.Norm | None
  head_norm: nk.Norm | None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = Backbone(self.norm, name='backbone')(x, train=train)
    x = nn.relu(ConvNorm(64, 3, 1, self.head_norm, name='head')(x, train=train))
    return nn.Dense(1 + 10 + 4)(x)


class Targets(NamedTuple):
  present: np.ndarray  # (n, cells, cells), 1 where a digit's middle lies
  labels: np.ndarray  # (n, cells, cells)
  boxes: np.ndarray  # (n, cells, cells, 4): middle in the cell, log sides


def encode(scenes: Scenes) -> Targets:
  """What the detector should say."""
  n, cells = len(scenes.images), CANVAS // CELL
  present = np.zeros((n, cells, cells), np.float32)
  labels = np.zeros((n, cells, cells), np.int32)
  boxes = np.zeros((n, cells, cells, 4), np.float32)
  scene, number = np.nonzero(scenes.labels >= 0)
  box = scenes.boxes[scene, number]
  middle = (box[:, :2] + box[:, 2:]) / 2 / CELL
  sides = np.log((box[:, 2:] - box[:, :2]) / CELL)
  cell = middle.astype(int)
  at = scene, cell[:, 0], cell[:, 1]
  present[at], labels[at] = 1, scenes.labels[scene, number]
  boxes[at] = np.concatenate([middle - cell, sides], -1)
  return Targets(present, labels, boxes)


def detection_loss(y: jax.Array, targets: Targets) -> jax.Array:
  """The sum over the cells, the mean over the scenes."""
  presence = optax.sigmoid_binary_cross_entropy(y[..., 0], targets.present)
  label = optax.softmax_cross_entropy_with_integer_labels(
    y[..., 1:11], targets.labels
  )
  box = optax.huber_loss(y[..., 11:], targets.boxes, delta=0.2).sum(-1)
  losses = presence + targets.present * (label + 4 * box)
  return losses.sum((1, 2)).mean()


# %% [markdown]
# ## Average precision
#
# A detection is the likeliest digit of a cell, its score the probability that
# it is there. Of two detections of a digit that overlap by half, the lower
# goes. What is left counts as found if it overlaps a true box of its digit by
# half or more (intersection over union), each true box once. Average precision
# is the area under precision against recall, precision made to fall; the mean
# is over the ten digits.


# %%
class Found(NamedTuple):
  scenes: np.ndarray  # (detections,), the scene of each
  labels: np.ndarray
  scores: np.ndarray
  boxes: np.ndarray


def decode(y: np.ndarray) -> Found:
  """The detections of scenes, from what the detector says of them."""
  y = np.float64(y)
  n, cells = y.shape[:2]
  likely = np.exp(y[..., 1:11] - y[..., 1:11].max(-1, keepdims=True))
  likely /= likely.sum(-1, keepdims=True)
  middle = y[..., 11:13] + np.stack(np.indices((cells, cells)), -1)
  half = np.exp(np.minimum(y[..., 13:], 3)) / 2
  every = Found(
    np.repeat(np.arange(n), cells * cells),
    likely.argmax(-1).ravel(),
    (likely.max(-1) / (1 + np.exp(-y[..., 0]))).ravel(),
    CELL * np.concatenate([middle - half, middle + half], -1).reshape(-1, 4),
  )
  return suppress(Found(*(a[every.scores > 0.02] for a in every)))


def suppress(found: Found) -> Found:
  """The detections by falling score, without those that repeat a better one."""
  found = Found(*(a[np.argsort(-found.scores, kind='stable')] for a in found))
  kept: list[int] = []
  groups: dict[tuple[int, int], list[int]] = {}
  for i, key in enumerate(zip(found.scenes, found.labels, strict=True)):
    better = groups.setdefault(key, [])
    if not (overlap(found.boxes[i], found.boxes[better]) > 0.5).any():
      better.append(i)
      kept.append(i)
  return Found(*(a[kept] for a in found))


def overlap(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
  """The intersection over union of a box with each of others."""
  low = np.maximum(box[:2], boxes[:, :2])
  high = np.minimum(box[2:], boxes[:, 2:])
  common = np.maximum(high - low, 0).prod(-1)
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
  return common / ((box[2:] - box[:2]).prod() + areas - common)


def mean_average_precision(found: Found, scenes: Scenes) -> float:
  """The mean over the digits that occur, in percent; `found` by score."""
  precisions = []
  for label in range(10):
    true = scenes.labels == label
    free, hits = true.copy(), []
    if not true.any():
      continue
    for i in np.flatnonzero(found.labels == label):
      scene = found.scenes[i]
      overlaps = overlap(found.boxes[i], scenes.boxes[scene])
      best = np.where(true[scene], overlaps, 0).argmax()
      hits.append(overlaps[best] >= 0.5 and free[scene, best])
      free[scene, best] &= not hits[-1]
    hits = np.array(hits, bool)
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    precisions.append(falling[hits].sum() / true.sum())
  return 100 * float(np.mean(precisions))


# %% [markdown]
# ## Training
#
# Each step has eight devices, two scenes each, whatever the norm, and averages
# their gradients. The devices are simulated: `vmap` with a named axis gives
# each its own statistics, or those of all where the norm has the axis's name,
# as `pmap` and `shard_map` do on real ones. The running statistics are the mean
# over the devices.
#
# Frozen are the statistics, scales and biases of the backbone; its head then
# has no norm. Adam, its rate falling from 0.003 to zero along a cosine, the
# same for all and tuned for none.

# %%
DEVICES, EACH = 8, 2
AXIS = 'device'
BATCH = nk.BatchNorm(momentum=0.9)
SYNCHRONIZED = nk.BatchNorm(momentum=0.9, axis_name=AXIS)
GROUP = nk.GroupNorm(num_groups=8)
PRETRAINER = optax.adam(0.003)
FROZEN = Detector(BATCH, head_norm=None)
DETECTORS = {
  'batch': Detector(BATCH, BATCH),
  'synchronized': Detector(SYNCHRONIZED, SYNCHRONIZED),
  'frozen': FROZEN,
  'group': Detector(GROUP, GROUP),
  'none': Detector(None, None),
}
LOOKS = {
  'batch': 'batch',
  'synchronized': 'renorm',
  'frozen': 'ghost',
  'group': 'group',
  'none': 'none',
}


class Backboned(NamedTuple):
  variables: dict[str, Any]
  accuracy: float  # of single digits, %


def single_digits(parts: Sequence[Parts], images: int) -> data.Dataset:
  """So many training and test images of one digit each."""
  sets = [compose(part, images, CROP, 1, i) for i, part in enumerate(parts)]
  arrays = [a for s in sets for a in (s.images, s.labels[:, 0])]
  return data.Dataset('single digits', *arrays)


def pretrain(
  norm: nk.Norm | None, dataset: data.Dataset, steps: int, seed: int
) -> Backboned:
  """A backbone that has learned to name single digits, its test accuracy."""
  run = training.fit(
    Classifier(norm), dataset, PRETRAINER, steps=steps, seed=seed, tests=1
  )
  variables = {k: v['backbone'] for k, v in run.variables.items() if v}
  return Backboned(variables, float(run.accuracies[-1]))


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(
  model: Detector,
  optimizer: optax.GradientTransformation,
  state: training.State,
  images: jax.Array,
  targets: Targets,
) -> training.State:
  """One step on a batch of shape (devices, scenes, ...)."""

  def loss(params, images, targets):
    with frozen('backbone/*') if model is FROZEN else contextlib.nullcontext():
      y, updated = model.apply(
        state._replace(params=params).variables,
        images,
        train=True,
        mutable=['batch_stats'],
      )
    return detection_loss(y, targets), updated.get('batch_stats', {})

  def mean_loss(params):
    devices = jax.vmap(loss, (None, 0, 0), axis_name=AXIS)
    losses, stats = devices(params, images, targets)
    mean = jax.tree.map(lambda a: a.mean(0).astype(a.dtype), stats)
    return losses.mean(), mean

  return training.update(optimizer, state, mean_loss)[0]


def make_optimizer(
  model: Detector, images: np.ndarray, steps: int
) -> optax.GradientTransformation:
  """Adam, of what is not frozen."""
  adam = optax.adam(optax.cosine_decay_schedule(0.003, steps))
  if model is not FROZEN:
    return adam
  init = functools.partial(model.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), images[:1])
  mask = frozen_mask(variables, 'backbone/*')
  return optax.selective_transform(adam, freeze_mask=mask)


class Run(NamedTuple):
  steps: np.ndarray  # (tests,), the number of steps taken before each test
  precisions: np.ndarray  # (tests,), mean average precision, %
  found: Found  # in the test scenes, after the last step


def train(
  model: Detector,
  backbones: Sequence[Backboned],
  train_set: Scenes,
  test_set: Scenes,
  setting: Setting,
) -> list[Run]:
  """A run for each seed, each from a backbone of that seed."""
  optimizer = make_optimizer(model, train_set.images, setting.steps)
  when = np.linspace(0, setting.steps, setting.tests + 1).astype(int)[1:]
  shape, targets, runs = (DEVICES, EACH), encode(train_set), []
  for seed, backbone in enumerate(backbones):
    state = training.init(model, optimizer, train_set.images, seed)
    state = start(state, backbone.variables)
    order = training.batches(len(train_set.images), DEVICES * EACH, seed)
    precisions = []
    for number in range(1, setting.steps + 1):
      index = next(order).reshape(shape)
      batch = Targets(*(a[index] for a in targets))
      images = train_set.images[index]
      state = step(model, optimizer, state, images, batch)
      if number in when:
        y = training.predict(model, state.variables, test_set.images)
        found = decode(np.asarray(y))
        precisions.append(mean_average_precision(found, test_set))
    runs.append(Run(when, np.array(precisions), found))
  return runs


def start(state: training.State, backbone: Any) -> training.State:
  """The state with the pretrained backbone in it."""
  variables = {
    kind: {**tree, 'backbone': backbone[kind]} if kind in backbone else tree
    for kind, tree in state.variables.items()
  }
  return training.State(*variables.values(), state.optimizer)


# %% [markdown]
# ## What came out


# %%
def precision_table(
  results: dict[str, list[Run]], backbones: dict[str, list[Backboned]]
) -> Table:
  """The precision after the last step, over the seeds."""
  columns = 'mean ± std', 'range', 'digits named by the backbone'
  title = 'Mean average precision at IoU 0.5, %'
  table = summary.table(title, ['norm'], columns)
  for name, runs in results.items():
    last = [run.precisions[-1] for run in runs]
    named = summary.spread([b.accuracy for b in backbones[name]])
    table.add_row(name, summary.spread(last), summary.reach(last), named)
  return table


def findings(results: dict[str, list[Run]]) -> list[str]:
  """A sentence a norm on how it compares with batch norm of two scenes."""
  last = {n: [run.precisions[-1] for run in r] for n, r in results.items()}
  told = (
    f'  {name}: {summary.difference(last[name], last["batch"])}'
    for name in list(last)[1:]
  )
  return ['Beside batch norm of two scenes:', *told]


def draw_curves(results: dict[str, list[Run]], spread: str) -> Figure:
  """The precision over the steps."""
  figure, panels = figures.make(f'Two scenes a device, {spread}')
  axes = panels[0, 0]
  for name, runs in results.items():
    precisions = [run.precisions for run in runs]
    figures.draw(axes, runs[0].steps, precisions, name, LOOKS[name])
  axes.set(xlabel='step', ylabel='mean average precision, %')
  figures.legend(figure, 'norm')
  return figure


def draw_scenes(scenes: Scenes, found: Found, name: str) -> Figure:
  """The first test scenes, what is in them and what was found."""
  title = f'Test scenes, norm: {name}. Green: true, orange: found'
  figure, panels = figures.make(title, 2, 5)
  figure.set_size_inches(9, 4.4)
  for number, axes in enumerate(panels.flat):
    axes.imshow(scenes.images[number, ..., 0], 'gray', vmin=0, vmax=1)
    axes.set_axis_off()
    real = scenes.labels[number] >= 0
    for box in scenes.boxes[number][real]:
      outline(axes, box, '#009E73', '-')
    sure = (found.scenes == number) & (found.scores > 0.3)
    for label, score, box in zip(*(a[sure] for a in found[1:]), strict=True):
      outline(axes, box, '#E69F00', '--')
      text = f'{label}: {100 * score:.0f} %'
      axes.text(
        box[1],
        box[0] - 1,
        text,
        color='#E69F00',
        fontsize=8,
        bbox={'color': 'black', 'alpha': 0.6, 'pad': 1},
      )
  return figure


def outline(axes: Axes, box: np.ndarray, color: str, line: str) -> None:
  top, left, bottom, right = box - 0.5  # of pixels, whose middles are whole
  axes.add_patch(
    Rectangle(
      (left, top),
      right - left,
      bottom - top,
      fill=False,
      edgecolor=color,
      linestyle=line,
      linewidth=1.5,
    )
  )


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  parser = options.make_parser(
    'A detector with two scenes a device, with several norms.', 'the digits'
  )
  args = options.finish(parser, None)
  if args.data and args.data.train_images.shape[-1] > 1:
    parser.error(
      f'argument --data: {args.data.name} has images in color, accepted are '
      'grey images, such as those of MNIST, whose light pixels are the ink'
    )
  setting = SMALL if args.small else Setting()
  console = Console(markup=False, emoji=False, width=100)
  parts = load_parts(args.data or data.digits())
  train_set = compose(parts[0], setting.train, CANVAS, MOST, 2)
  test_set = compose(parts[1], setting.test, CANVAS, MOST, 3)
  singles = single_digits(parts, setting.singles)

# %% [markdown]
# ### Each norm's precision

# %%
if __name__ == '__main__':
  results: dict[str, list[Run]] = {}
  backbones: dict[str, list[Backboned]] = {}
  for name in track(setting.norms, 'norms', console=console):
    model = DETECTORS[name]
    # These begin with the backbone that was trained on one device.
    of_batch = model.norm is SYNCHRONIZED or model is FROZEN
    backbones[name] = (
      backbones['batch']
      if of_batch
      else [
        pretrain(model.norm, singles, setting.pretraining, seed)
        for seed in range(setting.seeds)
      ]
    )
    results[name] = train(model, backbones[name], train_set, test_set, setting)
  console.print(precision_table(results, backbones))
  summary.tell(findings(results), args.small)
  spread = f'mean and standard deviation of {setting.seeds} seeds'
  figures.save(args.out, detection=draw_curves(results, spread))

# %% [markdown]
# ### What the best one finds

# %%
if __name__ == '__main__':
  best = max(results, key=lambda name: results[name][0].precisions[-1])
  scenes = draw_scenes(test_set, results[best][0].found, best)
  figures.save(args.out, detection_scenes=scenes)
