# %% [markdown]
# # Norms for sequences: an LSTM, padding, and a small transformer
#
# 1. An LSTM tells which of six packages a sentence documents: without a norm,
#    with layer norm (Ba, Kiros and Hinton 2016), and with batch norm (Cooijmans
#    et al., "Recurrent Batch Normalization", 2017). Sentences are padded to one
#    length. What becomes of batch norm where the padding enters its statistics?
# 2. A small transformer guesses the next character. Its norms come before each
#    sublayer, after it, on both sides, or after the sum, it is deep or shallow,
#    and learns at a range of rates (Xiong et al., "On Layer Normalization in
#    the Transformer Architecture", 2020), with no, batch, layer and RMS norm.
#
# The text is real: the documentation strings in the source files of packages
# that this example needs anyway. Another release of them is another text. It is
# little, and the models are tiny.
#
# All of it, in ten minutes or so, or a part, sooner, to see it run:
#
#     python examples/sequences.py --out out
#     python examples/sequences.py --out out --small

# %%
import ast
from collections import Counter
from collections.abc import Callable, Sequence
import functools
import importlib.util
import itertools
import pathlib
import re
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import figures
from models import normalize
import normkit as nk
import normkit.linen
import options
import summary
import training

PACKAGES = 'numpy', 'scipy', 'sklearn', 'matplotlib', 'skimage', 'jax'


class Setting(NamedTuple):
  files: int = 100  # of each package
  sentences: int = 500  # of each package, a fifth of them for the test
  seeds: int = 3
  rounds: int = 8  # tests in a run
  lstm_steps: int = 200
  steps: int = 120
  rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
  depths: tuple[int, ...] = (1, 6)
  lstms: tuple[str, ...] = ('none', 'layer', 'batch', 'batch, no mask')
  norms: tuple[str, ...] = ('layer', 'rms', 'batch', 'none')
  places: tuple[str, ...] = ('pre', 'after', 'both', 'post', 'post, warm-up')


SMALL = Setting(
  files=12,
  sentences=60,
  seeds=2,
  rounds=2,
  lstm_steps=4,
  steps=4,
  rates=(0.001, 0.03),
  depths=(2,),
  lstms=('batch', 'batch, no mask'),
  norms=('layer',),
  places=('both',),
)

# %% [markdown]
# ## The text
#
# For the LSTM, the first paragraph of each documentation string, in words. The
# names of the packages are left out, and so is a paragraph that two packages
# share. For the transformer, the strings as they are, in printable ASCII.


# %%
def docstrings(package: str, files: int) -> list[str]:
  """The documentation strings in some of a package's files, each once."""
  root = pathlib.Path(importlib.util.find_spec(package).origin).parent
  paths = [
    path
    for path in sorted(root.rglob('*.py'))
    if 'test' not in str(path.relative_to(root))
  ]
  kinds = ast.Module, ast.ClassDef, ast.FunctionDef
  found = [
    ast.get_docstring(node)
    for path in paths[:: max(1, len(paths) // files)]
    for node in ast.walk(ast.parse(path.read_text('utf-8')))
    if isinstance(node, kinds)
  ]
  return sorted(set(filter(None, found)))


# The most and the fewest words of a sentence, and how many words are known.
MOST, LEAST, WORDS = 20, 4, 1000


class Sentences(NamedTuple):
  words: np.ndarray  # (n, MOST), indices of words, 0 for the padding
  lengths: np.ndarray
  labels: np.ndarray


def to_words(text: str) -> tuple[str, ...]:
  """The words of the first paragraph, but for the names of the packages."""
  words = re.findall('[a-z]+', text.partition('\n\n')[0].lower())
  return tuple(word for word in words if word not in PACKAGES)


def classify_data(
  texts: Sequence[Sequence[str]], each: int
) -> tuple[Sentences, Sentences]:
  """The training and the test sentences, the same number of each package."""
  paragraphs = [sorted({to_words(t) for t in text}) for text in texts]
  owners = Counter(p for group in paragraphs for p in group)
  rng, parts = np.random.default_rng(0), ([], [])
  for label, group in enumerate(paragraphs):
    own = [p for p in group if owners[p] == 1 and LEAST <= len(p) <= MOST]
    chosen = [(own[i], label) for i in rng.permutation(len(own))[:each]]
    parts[0].extend(chosen[: each * 4 // 5])
    parts[1].extend(chosen[each * 4 // 5 :])
  counts = Counter(word for words, _ in parts[0] for word in words)
  index = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS), 1)}

  def encode(words: Sequence[str]) -> list[int]:
    indices = [index.get(word, WORDS + 1) for word in words]
    return indices + [0] * (MOST - len(words))

  train, test = (
    Sentences(
      np.int32([encode(words) for words, _ in part]),
      np.int32([len(words) for words, _ in part]),
      np.int32([label for _, label in part]),
    )
    for part in parts
  )
  return train, test


FIRST, SYMBOLS = 31, 96  # one for the end of a line, and ' ' to '~'


def characters(texts: Sequence[Sequence[str]]) -> np.ndarray:
  """All strings in turn, shuffled, as indices of characters."""
  strings = sorted({string for text in texts for string in text})
  order = np.random.default_rng(0).permutation(len(strings))
  text = '\n'.join(strings[i] for i in order).replace('\n', chr(FIRST))
  codes = np.frombuffer(text.encode('ascii', 'ignore'), np.uint8)
  return np.int32(codes[(codes >= FIRST) & (codes < FIRST + SYMBOLS)] - FIRST)


# %% [markdown]
# ## Training
#
# Adam. Runs that share a model, for all seeds and learning rates, go side by
# side under `vmap`; the steps between two tests are a `lax.scan`. A loss that
# is not finite ends nothing.


# %%
@functools.partial(jax.jit, static_argnums=(0, 1))
def train(
  loss: Callable, test: Callable, variables: Any, batches: Any, rates: Any
) -> tuple[Any, Any]:
  """Trains runs side by side.

  `loss(variables, batch)` is the loss and the new `batch_stats`. A leaf of
  `variables` is (runs, ...), of `batches` and `rates` (runs, rounds, steps,
  ...). Returns the variables and what `test(variables)` found after each round.
  """

  def step(state, inputs):
    batch, rate = inputs
    state, _ = training.update(
      optax.adam(rate),
      state,
      lambda params: loss(state._replace(params=params).variables, batch),
    )
    return state, None

  def steps_and_test(state, inputs):
    state, _ = lax.scan(step, state, inputs)
    return state, test(state.variables)

  def one(variables, batches, rates):
    params, stats = variables['params'], variables.get('batch_stats', {})
    state = training.State(params, stats, optax.adam(0).init(params))
    state, found = lax.scan(steps_and_test, state, (batches, rates))
    return state.variables, found

  return jax.vmap(one)(variables, batches, rates)


@functools.partial(jax.jit, static_argnums=(0, 1))
def initialize(model: nn.Module, seeds: int, *inputs: Any) -> Any:
  """The variables of each seed, (seeds, ...)."""
  # Of JAX's generators this one compiles fastest.
  keys = jax.random.split(jax.random.key(0, impl='rbg'), seeds)
  return jax.vmap(lambda key: training.initial(model, key, *inputs))(keys)


# %% [markdown]
# ## 1. The LSTM and the padding
#
# Batch norm in an LSTM keeps statistics for each time step. Sentences have 4 to
# 20 words, so that at late steps most of a batch is padding.
# `normkit.linen.RNN` tells the cell where each sentence ends, and the padding
# stays out. Flax's RNN doesn't, and it goes in: `batch, no mask`.

# %%
WIDTH = 48


class Classifier(nn.Module):
  """An LSTM over the words; its last state decides."""

  norm: str

  @nn.compact
  def __call__(
    self, words: jax.Array, lengths: jax.Array, *, train: bool
  ) -> jax.Array:
    if self.norm == 'none':
      cell = nn.LSTMCell(WIDTH)
    elif self.norm == 'layer':
      cell = normkit.linen.LayerNormLSTMCell(WIDTH)
    else:
      cell = normkit.linen.BatchNormLSTMCell(
        WIDTH, max_length=MOST, use_running_average=not train, momentum=0.9
      )
    if self.norm == 'batch, no mask':
      stats = {'variable_carry': 'batch_stats'}
      fixed = {'variable_broadcast': ('params', 'batch_stats')}
      rnn = nn.RNN(cell, return_carry=True, **(stats if train else fixed))
    else:
      rnn = normkit.linen.RNN(cell, return_carry=True)
    x = nn.Embed(WORDS + 2, WIDTH)(words)
    (_, h, *_), _ = rnn(x, seq_lengths=lengths)
    return nn.Dense(len(PACKAGES))(h)


class Classified(NamedTuple):
  right: np.ndarray  # (seeds, rounds, test sentences)
  shift: np.ndarray  # (seeds,), in percentage points; see padding_shift


def classify(
  norm: str, train_set: Sentences, test_set: Sentences, setting: Setting
) -> Classified:
  """Trains the classifier of each seed."""
  model = Classifier(norm)
  words, lengths, labels = map(jnp.asarray, train_set)

  def loss(variables, batch):
    logits, updated = model.apply(
      variables,
      words[batch],
      lengths[batch],
      train=True,
      mutable=['batch_stats'],
    )
    return training.mean_loss(logits, labels[batch]), updated.get(
      'batch_stats', {}
    )

  def test(variables):
    logits = model.apply(variables, *test_set[:2], train=False)
    return logits.argmax(-1) == test_set.labels

  seeds, rounds = setting.seeds, setting.rounds
  shape = seeds, rounds, setting.lstm_steps // rounds
  batches = np.random.default_rng(0).integers(len(labels), size=(*shape, 64))
  variables = initialize(model, seeds, words[:2], lengths[:2])
  variables, right = train(
    loss, test, variables, batches, np.full(shape, 0.003, np.float32)
  )
  shift = padding_shift(model, variables, test_set)
  return Classified(np.asarray(right), np.asarray(shift))


@functools.partial(jax.jit, static_argnums=0)
def padding_shift(model: nn.Module, variables: Any, data: Sentences) -> Any:
  """How far other padding moves a class's probability in training, at most.

  The padding of a batch of 64 sentences is replaced by the commonest word.
  Returns a number for each seed, in percentage points.
  """
  words, lengths, _ = (a[:64] for a in data)
  padding = jnp.arange(MOST)[None] >= lengths[:, None]

  def probabilities(variables, words):
    logits, _ = model.apply(
      variables, words, lengths, train=True, mutable=['batch_stats']
    )
    return jax.nn.softmax(logits)

  both = jnp.stack([words, jnp.where(padding, 1, words)])
  each = jax.vmap(jax.vmap(probabilities, (None, 0)), (0, None))
  before, after = jnp.moveaxis(each(variables, both), 1, 0)
  return 100 * abs(after - before).max((1, 2))


# %% [markdown]
# ## 2. The transformer
#
# Post-norm, as it was at first: `norm(x + sublayer(x))`. Pre-norm: `x +
# sublayer(norm(x))`, and a norm at the end. Xiong et al. find that post-norm
# needs small steps at first, a warm-up, and pre-norm doesn't: at the start,
# post-norm's gradients are large near the output.
#
# Two more keep the sum free, as pre-norm does: norms after each sublayer, `x +
# norm(sublayer(x))`, as in OLMo 2 (2024); and on both sides, `x +
# norm(sublayer(norm(x)))`, the sandwich of Gemma 2 (2024), which Kim et al.,
# "Peri-LN" (2025), find to hold the sum's growth in check.
#
# Batch norm takes its statistics over all positions, so in training the model
# gets a hint of characters to come. In the test it has running statistics.

# %%
NORMS = {
  'layer': nk.LayerNorm(),
  'rms': nk.RMSNorm(),
  'batch': nk.BatchNorm(momentum=0.9),
  'none': None,
}
PLACES = 'pre', 'post'
NORMS_A_BLOCK = {'pre': 2, 'post': 2, 'after': 2, 'both': 4}
LENGTH, BATCH, FEATURES = 32, 8, 32


class Block(nn.Module):
  """Attention to what came before, and a layer for each position."""

  norm: nk.Norm | None
  place: str

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
    mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
    attention = nn.MultiHeadDotProductAttention(num_heads=4, name='attention')
    wide, narrow = nn.Dense(4 * FEATURES), nn.Dense(FEATURES, name='narrow')

    def normed(x: jax.Array, *places: str) -> jax.Array:
      here = self.place in places
      return normalize(x, self.norm, train) if here else x

    sublayers = (
      lambda x: attention(x, mask=mask),
      lambda x: narrow(nn.relu(wide(x))),
    )
    for sublayer in sublayers:
      y = normed(x, 'pre', 'both')
      x = x + normed(sublayer(y), 'after', 'both')
      x = normed(x, 'post')
    return x, None


class Transformer(nn.Module):
  """The logits of the next character, at each position."""

  norm: nk.Norm | None
  place: str
  depth: int

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    places = nn.Embed(LENGTH, FEATURES)(jnp.arange(x.shape[1]))
    x = nn.Embed(SYMBOLS, FEATURES)(x) + places[None]
    blocks = nn.scan(
      Block,
      variable_axes={'params': 0, 'batch_stats': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.depth,
    )
    x, _ = blocks(self.norm, self.place, name='blocks')(x, train)
    if self.place != 'post':
      x = normalize(x, self.norm, train)
    return nn.Dense(SYMBOLS)(x)


def guess(
  model: Transformer, text: np.ndarray, setting: Setting, warm: bool
) -> np.ndarray:
  """Bits a character in the validation text, (rates, seeds).

  `warm` lets the rate rise from zero over the first quarter of the steps.
  """
  known, unseen = np.split(text, [len(text) * 9 // 10])
  starts = np.linspace(0, len(unseen) - LENGTH - 1, 64, dtype=int)
  validation, known = windows(unseen, starts), jnp.asarray(known)

  def loss(variables, batch):
    x = windows(known, batch)
    logits, updated = model.apply(
      variables, x[:, :-1], train=True, mutable=['batch_stats']
    )
    return training.mean_loss(logits, x[:, 1:]), updated.get('batch_stats', {})

  def test(variables):
    logits = model.apply(variables, validation[:, :-1], train=False)
    return training.mean_loss(logits, validation[:, 1:])

  seeds, rates = setting.seeds, np.float32(setting.rates)
  shape = seeds, 1, setting.steps
  batches = np.random.default_rng(0).integers(
    len(known) - LENGTH, size=(*shape, BATCH)
  )
  variables = initialize(model, seeds, validation[:1, :-1])
  ramp = np.arange(1, setting.steps + 1) / (setting.steps / 4)
  curve = np.minimum(ramp, 1) if warm else np.ones(setting.steps)
  schedules = (np.repeat(rates, seeds)[:, None] * curve)[:, None]
  variables, batches = jax.tree.map(
    lambda a: np.concatenate([a] * len(rates)), (variables, batches)
  )
  _, losses = train(loss, test, variables, batches, np.float32(schedules))
  return bits(np.asarray(losses).reshape(len(rates), seeds))


def windows(text: Any, starts: Any) -> Any:
  """The text from each start on, (starts, LENGTH + 1)."""
  return text[starts[:, None] + np.arange(LENGTH + 1)[None]]


def first_gradients(
  model: Transformer, text: np.ndarray, seeds: int
) -> np.ndarray:
  """Norms of the gradients of a matrix of each block, (seeds, depth).

  Before the first step, on four batches in one.
  """
  starts = np.linspace(0, len(text) - LENGTH - 1, 4 * BATCH, dtype=int)
  x = windows(text, starts)
  variables = initialize(model, seeds, x[:1, :-1])

  def loss(variables):
    return training.mean_loss(
      model.apply(variables, x[:, :-1], train=False), x[:, 1:]
    )

  grads = jax.jit(jax.vmap(jax.grad(loss)))(variables)
  kernels = grads['params']['blocks']['narrow']['kernel']
  return np.linalg.norm(kernels, axis=(-2, -1))


def temporaries(model: Transformer, text: np.ndarray) -> float:
  """What a gradient of one batch holds beside its results, in MiB."""
  x = windows(text, np.arange(BATCH))
  init = functools.partial(model.init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), x[:1, :-1])['params']

  def loss(params):
    logits = model.apply({'params': params}, x[:, :-1], train=False)
    return training.mean_loss(logits, x[:, 1:])

  program = jax.jit(jax.grad(loss)).lower(params).compile()
  return program.memory_analysis().temp_size_in_bytes / 2**20


def bits(losses: np.ndarray) -> np.ndarray:
  """Nats in bits; where they are not finite or more, what guessing costs."""
  worst = np.log2(SYMBOLS)
  return np.minimum(np.nan_to_num(losses / np.log(2), nan=worst), worst)


class Case(NamedTuple):
  depth: int
  norm: str
  place: str


def cases(setting: Setting) -> list[Case]:
  """Layer norm in all places and depths, the others in the deep ones."""
  found = [Case(d, 'layer', p) for d in setting.depths for p in setting.places]
  for norm in setting.norms[1:]:
    places = ('none',) if norm == 'none' else PLACES
    found += [Case(setting.depths[-1], norm, place) for place in places]
  return found


# %% [markdown]
# ## What came out
#
# A transformer has learned nothing where it is less than 0.1 bits better than
# the frequencies of the characters.


# %%
def entropy(text: np.ndarray) -> float:
  """Bits a character from the frequencies of the characters."""
  share = np.bincount(text, minlength=SYMBOLS) / len(text)
  return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def accuracies(run: Classified) -> np.ndarray:
  """The test accuracy of each seed after each round, in percent."""
  return 100 * run.right.mean(-1)


def lstm_table(runs: dict[str, Classified]) -> Table:
  columns = 'mean ± std', 'range', 'moved by padding, points'
  table = summary.table('LSTM: test accuracy, %', ['norm'], columns)
  for name, run in runs.items():
    last = accuracies(run)[:, -1]
    row = summary.spread(last), summary.reach(last), f'{run.shift.mean():.1f}'
    table.add_row(name, *row)
  return table


def transformer_table(
  runs: dict[Case, np.ndarray], rates: Sequence[float]
) -> Table:
  title = 'Transformer: bits a character, by learning rate, mean ± std'
  table = summary.table(title, ['depth', 'norm', 'place'], rates)
  for case, losses in runs.items():
    row = (summary.spread(of_rate, 2) for of_rate in losses)
    table.add_row(*map(str, case), *row)
  return table


def findings(
  lstm: dict[str, Classified], runs: dict[Case, np.ndarray], frequencies: float
) -> list[str]:
  """What the numbers say, in words."""
  last = {name: accuracies(run)[:, -1] for name, run in lstm.items()}
  pairs = [(name, 'none') for name in last if name != 'none']
  if 'none' not in last:  # in a small setting
    pairs = []
  if 'batch, no mask' in last:
    pairs.append(('batch', 'batch, no mask'))
  lines = [
    f'LSTM, {new} beside {old}: {summary.difference(last[new], last[old])}'
    for new, old in pairs
  ]
  lines.append(f'Frequencies of characters alone: {frequencies:.2f} bits')
  for case, losses in runs.items():
    failed = int((losses > frequencies - 0.1).sum())
    lines.append(
      f'{case.depth} deep, norm {case.norm}, {case.place}: best '
      f'{losses.mean(1).min():.2f} bits, {failed} of {losses.size} runs '
      'learned nothing'
    )
  return lines


def place_table(
  gradients: dict[str, np.ndarray], costs: dict[str, float]
) -> Table:
  title = 'Layer norm: gradients before the first step, mean ± std; costs'
  columns = 'first block', 'last block', 'norms a block', 'temporaries, MiB'
  table = summary.table(title, ['place'], columns)
  for place, norms in gradients.items():
    ends = norms[:, 0], norms[:, -1]
    cost = str(NORMS_A_BLOCK[place]), f'{costs[place]:.2f}'
    table.add_row(place, *(summary.spread(end, 2) for end in ends), *cost)
  return table


LSTM_LOOKS = {
  'none': 'none',
  'layer': 'layer',
  'batch': 'batch',
  'batch, no mask': 'ghost',
}


def draw_lstm(
  runs: dict[str, Classified], lengths: np.ndarray, setting: Setting
) -> Figure:
  """Accuracy over the steps, and by the length of the sentence."""
  title = f'LSTM: which package? Mean and std of {setting.seeds} seeds'
  figure, ((left, right),) = figures.make(title, 1, 2)
  steps = np.linspace(0, setting.lstm_steps, setting.rounds + 1)[1:]
  edges = np.array([LEAST, 7, 10, 13, MOST + 1])
  group = np.digitize(lengths, edges) - 1
  for name, run in runs.items():
    look = LSTM_LOOKS[name]
    figures.draw(left, steps, accuracies(run), name, look)
    by_length = [
      100 * run.right[:, -1, group == i].mean(-1) for i in range(len(edges) - 1)
    ]
    places = range(len(edges) - 1)
    figures.draw(right, places, np.transpose(by_length), name, look)
  names = [f'{a}-{b - 1}' for a, b in itertools.pairwise(edges)]
  right.set_xticks(range(len(names)), names)
  left.set(xlabel='step', ylabel='test accuracy, %', title='all sentences')
  right.set_title('after the last step')
  right.set(xlabel='words in the sentence', ylabel='test accuracy, %')
  figures.legend(figure, 'norm')
  return figure


PLACE_LOOKS = {
  'pre': 'layer',
  'after': 'batch',
  'both': 'group',
  'post': 'renorm',
  'post, warm-up': 'instance',
}
NORM_LOOKS = {'layer': 'layer', 'rms': 'group', 'batch': 'batch'}


def draw_transformer(
  runs: dict[Case, np.ndarray], frequencies: float, setting: Setting
) -> Figure:
  """The loss over the learning rate: depth and place, and then the norms."""
  title = f'Transformer, mean and standard deviation of {setting.seeds} seeds'
  figure, panels = figures.make(title, 2, 2)
  shallow, deep = setting.depths[0], setting.depths[-1]
  for axes, depth in zip(panels[0], (shallow, deep), strict=True):
    axes.set_title(f'depth {depth}, layer norm')
    for place, look in PLACE_LOOKS.items():
      if (case := Case(depth, 'layer', place)) in runs:
        figures.draw(axes, setting.rates, runs[case].T, place, look)
  for axes, place in zip(panels[1], PLACES, strict=True):
    axes.set_title(f'depth {deep}, {place}-norm')
    for norm, look in NORM_LOOKS.items():
      if (case := Case(deep, norm, place)) in runs:
        figures.draw(axes, setting.rates, runs[case].T, norm, look)
    if (case := Case(deep, 'none', 'none')) in runs:
      figures.draw(axes, setting.rates, runs[case].T, 'none')
  for axes in panels.flat:
    axes.axhline(
      frequencies, color='0.3', linestyle=':', label='frequencies\nalone'
    )
    axes.set(xscale='log', ylim=(3.8, 6.8))
    axes.set(xlabel='learning rate', ylabel='bits a character')
  for axes in panels[:, 1]:
    axes.legend(frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  return figure


def draw_gradients(gradients: dict[str, np.ndarray], seeds: int) -> Figure:
  """The gradient of each block before the first step."""
  title = f'Before the first step, mean and standard deviation of {seeds} seeds'
  figure, ((axes,),) = figures.make(title)
  for place, norms in gradients.items():
    blocks = range(1, norms.shape[1] + 1)
    figures.draw(axes, blocks, norms, place, PLACE_LOOKS[place])
    axes.set_xticks(blocks)
  axes.set(xlabel='block, from the input on', ylabel='norm of the gradient')
  axes.set_ylim(0)
  figures.legend(figure, 'layer norm')
  return figure


# %% [markdown]
# ## The runs
#
# In a notebook, options stand in the next cell: `['--small']` for `None`.

# %%
if __name__ == '__main__':
  args = options.parse(
    None, 'Norms in an LSTM and in a transformer, on documentation.'
  )
  setting = SMALL if args.small else Setting()
  console = Console(markup=False, emoji=False, width=100)
  texts = [docstrings(package, setting.files) for package in PACKAGES]

# %% [markdown]
# ### The LSTM

# %%
if __name__ == '__main__':
  train_set, test_set = classify_data(texts, setting.sentences)
  lstm = {}
  for name in track(setting.lstms, 'LSTM', console=console):
    lstm[name] = classify(name, train_set, test_set, setting)
  console.print(lstm_table(lstm))
  figures.save(
    args.out, sequences_lstm=draw_lstm(lstm, test_set.lengths, setting)
  )

# %% [markdown]
# ### The transformer

# %%
if __name__ == '__main__':
  text = characters(texts)
  runs, gradients, costs = {}, {}, {}
  for case in track(cases(setting), 'transformer', console=console):
    place, _, warm_up = case.place.partition(', ')
    model = Transformer(NORMS[case.norm], place, case.depth)
    runs[case] = guess(model, text, setting, bool(warm_up))
    if case[:2] == (setting.depths[-1], 'layer') and not warm_up:
      gradients[place] = first_gradients(model, text, setting.seeds)
      costs[place] = temporaries(model, text)
  frequencies = entropy(text)
  console.print(transformer_table(runs, setting.rates))
  figures.save(
    args.out, sequences_transformer=draw_transformer(runs, frequencies, setting)
  )

# %% [markdown]
# ### The place of the norm

# %%
if __name__ == '__main__':
  console.print(place_table(gradients, costs))
  summary.tell(findings(lstm, runs, frequencies), args.small)
  figures.save(
    args.out, sequences_gradients=draw_gradients(gradients, setting.seeds)
  )
